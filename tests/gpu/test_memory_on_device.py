"""The memory that a step takes on the device is what `minilora budget` says."""

import gc

import numpy as np
import pytest

from minilora.adapters import LoRAConfig, lora_init
from minilora.bench.budget import Step, figures_of
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.keep import Plan
from minilora.network import Net
from minilora.optim import adamw, adamw_init, clip_by_global_norm
from minilora.training.loop import batch_loss_and_grads
from minilora.workers import Workers

pytestmark = pytest.mark.gpu

SHAPES = {
    "short sequences": (GPTConfig(256, 128, n_embd=96, n_layer=3, n_head=3), 16, 32),
    "long sequences": (GPTConfig(256, 128, n_embd=96, n_layer=3, n_head=3), 2, 128),
    "large vocabulary": (GPTConfig(8192, 64, n_embd=64, n_layer=2, n_head=2), 4, 64),
}
METHODS = {
    "full": None,
    "LoRA on qkv": LoRAConfig(rank=8, targets=("qkv",)),
    "LoRA everywhere": LoRAConfig(rank=2, targets=("qkv", "o", "up", "down")),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_peak_of_a_step_is_predicted(counters, shape, method):
    """It is worked out for NumPy; kernels need fewer arrays on their way."""
    gc.collect()
    device, before = "cuda", counters()["live_bytes"]
    config, batch, context = SHAPES[shape]
    step = Step(config, METHODS[method], batch, context, device=device)
    base, is_lora = gpt_init(config, seed=0), not step.trains_base
    lora = lora_init(base, step.lora_config, seed=0) if is_lora else None
    net = Net(base, config, lora, step.lora_config).on(device)
    params = net.lora if is_lora else net.base
    state = adamw_init(params)
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(config.vocab_size, size=(2, batch, context))
    with Workers(1, device) as workers:
        plan = Plan(base=not is_lora, lora=is_lora)
        _, grads = batch_loss_and_grads(workers, net, tokens, targets, plan=plan, device=device)
    grads, _ = clip_by_global_norm(grads, 1.0)
    adamw(params, grads, state, step=1, lr=1e-3)
    share = (counters()["peak_bytes"] - before) / figures_of(step)["peak_bytes"]
    assert 0.8 < share < 1.1, f"the peak is {share:.3f} of what is predicted"
