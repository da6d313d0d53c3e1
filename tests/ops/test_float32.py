"""Float32 where it is strained: far from zero, far apart, deep in the tails.

The reference is the same pair in float64 on the same float32 numbers. What cannot be had in float32
is rounded once, in the inputs or in a product; each bound counts these roundings.
"""

import numpy as np
import pytest
from helpers import normal, small_tiles

from minilora import lora, loss, ops

EPS = float(np.finfo(np.float32).eps)


def in_both(forward, backward, arguments, *, table=None, **constants):
    """(found, exact) for y and each gradient, found in float32 and exact from float64."""
    found = []
    for dtype in (np.float32, np.float64):
        if table is not None:
            constants["table"] = table.astype(dtype)
        y, cache = forward(*(x.astype(dtype) for x in arguments), **constants)
        dy = normal(*y.shape, seed=9, dtype=np.float32)  # rounded to float32 in both
        found.append([y, *backward(dtype(1) if y.ndim == 0 else dy.astype(dtype), cache)])
    assert all(x.dtype == np.float32 for x in found[0])
    return list(zip(*found, strict=True))


def assert_within(pairs, *bounds):
    """Each of the pairs (found, exact) differs by no more than its bound, in every entry."""
    for place, ((found, exact), bound) in enumerate(zip(pairs, bounds, strict=True)):
        error = np.abs(found - exact).max()
        assert error <= bound, f"{place}: {error:.1e} is above {bound:.1e}"


LAYER_NORM = (ops.layer_norm_forward, ops.layer_norm_backward)


def test_layer_norm_far_from_zero():
    """x̂ is as exact as x - μ, which loses what float32 cannot say near 1,000: 1000 ε."""
    x = 1000 + normal(4, 256, dtype=np.float32)
    w, b = np.ones(256, np.float32), np.zeros(256, np.float32)
    pairs = in_both(*LAYER_NORM, [x, w, b])
    assert_within(pairs, 1000 * 4 * EPS, 1000 * EPS, 1000 * 16 * EPS, 16 * EPS)


def test_softmax_far_from_zero_is_as_exact_as_near_it():
    """x - max x is exact there."""
    x = np.float32(1000) + normal(5, 64, dtype=np.float32)
    assert_within(in_both(ops.softmax_forward, ops.softmax_backward, [x]), EPS, EPS)


@pytest.mark.parametrize("tiles", ["small", "default"])
def test_attention_with_scores_far_apart(tiles):
    """Scores near ±100, rounded at that size, are the exponents of P."""
    qkv = 6 * normal(2, 32, 3 * 2 * 8, dtype=np.float32)

    def pairs():
        return in_both(ops.attention_forward, ops.attention_backward, [qkv], heads=2)

    if tiles == "small":
        with small_tiles():
            found = pairs()
    else:
        found = pairs()
    scores = 6 * 6 * 8
    assert_within(found, scores * 6 * EPS, scores * 6 * 6 * EPS)


CROSS_ENTROPY = (loss.cross_entropy_forward, loss.cross_entropy_backward)
HEAD_LOSS = (loss.head_loss_forward, loss.head_loss_backward)
FROZEN_HEAD_LOSS = (loss.frozen_head_loss_forward, loss.frozen_head_loss_backward)


def test_cross_entropy_far_from_zero():
    """log Σ exp z - z_target is a difference of numbers near 1,000, each rounded once or twice."""
    logits = np.float32(1000) + 3 * normal(8, 50, dtype=np.float32)
    targets = np.arange(8)
    pairs = in_both(*CROSS_ENTROPY, [logits], targets=targets)
    assert_within(pairs, 1000 * EPS / 2, 1000 * EPS / len(targets))


@pytest.mark.parametrize("chunk", [7, 1000])
def test_head_and_loss_far_from_zero(chunk, monkeypatch):
    """Logits near 1,000, of which each chunk's largest is another."""
    monkeypatch.setattr(loss, "VOCAB_CHUNK", chunk)
    x, table = normal(8, 16, dtype=np.float32), normal(50, 16, seed=1, dtype=np.float32)
    x[:, 0], table[:, 0] = 25, 40 + table[:, 0] / 10
    targets = np.arange(8)
    bound = 1000 * EPS  # of a logit, whose largest product is near 1,000
    d = bound / len(targets)
    pairs = in_both(*HEAD_LOSS, [x, table], targets=targets)
    assert_within(pairs, bound, 45 * d, 25 * d)
    frozen = in_both(*FROZEN_HEAD_LOSS, [x], table=table, targets=targets)
    assert_within(frozen, bound, 45 * d)


def test_gelu_in_its_tails():
    """Below -4, 1 + tanh u is a small difference: its error is one of 1, times x."""
    x = np.linspace(-12, 12, 4801, dtype=np.float32)
    pairs = in_both(ops.gelu_forward, ops.gelu_backward, [x])
    assert_within(pairs, 12 * 2 * EPS, 4 * 12 * 4 * EPS)


def test_lora_where_the_products_nearly_cancel():
    """Inputs near 100 meet columns of A that sum to 0: what is left of x A is rounded at 100."""
    x = 100 + normal(6, 64, dtype=np.float32)
    A, B = normal(64, 4, seed=1, dtype=np.float32), normal(4, 32, seed=2, dtype=np.float32)
    A -= A.mean(axis=0)
    pairs = in_both(lora.lora_forward, lora.lora_backward, [x, A, B], scale=0.5)
    h = 0.5 * 100 * 8 * EPS  # of h = s x A, a sum of 64 products near 100
    assert_within(pairs, 4 * 3 * h, 64 * EPS, 6 * 100 * 16 * EPS, 6 * 3 * h)
