"""AdamW, clipping and the schedule against PyTorch's."""

import math

import numpy as np
import pytest

from minilora import tree
from minilora.optim import adamw, adamw_init, clip_by_global_norm, warmup_cosine

pytestmark = pytest.mark.oracle

STEPS, WARMUP, PEAK, DECAY, MAX_NORM = 10, 3, 0.1, 0.2, 0.7
SHAPES = {"w": (5, 4), "b": (4,), "table": (7, 3)}


def gradient(step):
    """Gradients above and below the norm at which they are clipped."""
    rng = np.random.default_rng(step)
    size = 1.0 if step % 2 else 0.05
    return {
        name: (size * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def test_ten_steps_with_clipping_and_schedule_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    params = gradient(0)
    ours = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in params.values()]
    matrices = [p for p in ours if p.ndim >= 2]
    others = [p for p in ours if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98), eps=1e-8)

    def factor(done):
        if done + 1 <= WARMUP:
            return (done + 1) / WARMUP
        share = (done + 1 - WARMUP) / (STEPS - WARMUP)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    moments = adamw_init(params)
    for step in range(1, STEPS + 1):
        grads = gradient(step)
        for p, g in zip(ours, grads.values(), strict=True):
            p.grad = torch.from_numpy(g.copy())
        norm_of_torch = torch.nn.utils.clip_grad_norm_(ours, MAX_NORM)
        optimizer.step()
        schedule.step()

        clipped, norm = clip_by_global_norm(grads, MAX_NORM)
        params, moments = adamw(
            params,
            clipped,
            moments,
            step=step,
            lr=warmup_cosine(step, steps=STEPS, peak=PEAK, warmup=WARMUP),
            beta2=0.98,
            weight_decay=DECAY,
        )
        assert float(norm) == pytest.approx(float(norm_of_torch), rel=1e-6)
        for name, p in zip(tree.flatten(params), ours, strict=True):
            np.testing.assert_allclose(
                params[name], p.detach().numpy(), rtol=1e-5, atol=1e-5, err_msg=f"{name}, {step}"
            )
