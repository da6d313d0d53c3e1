"""The loss against its definition, by way of logits and without them, far out and in chunks."""

import math

import numpy as np
import pytest
from helpers import close, normal

from minilora import loss, ops
from minilora.adapters import LoRAConfig, lora_init
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.keep import Plan
from minilora.network import Net, loss_and_grads
from minilora.tree import flatten


def close_in_each(actual, expected, **tolerance):
    for found, wanted in zip(actual, expected, strict=True):
        close(found, wanted, **tolerance)


def cross_entropy(logits, targets, **constants):
    mean, cache = loss.cross_entropy_forward(logits, targets=targets, **constants)
    return mean, loss.cross_entropy_backward(1.0, cache)[0]


def one_after_the_other(x, table, dloss, **constants):
    """The loss, dx and dtable by way of all the logits."""
    logits, head = ops.head_forward(x, table)
    mean, cache = loss.cross_entropy_forward(logits, **constants)
    (dlogits,) = loss.cross_entropy_backward(dloss, cache)
    return mean, *ops.head_backward(dlogits, head)


def test_cross_entropy_is_the_mean_of_the_counted_rows():
    logits, targets = normal(2, 3, 5), np.array([[4, -100, 0], [1, 1, -100]])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    counted = [(b, t) for b, t in np.ndindex(2, 3) if targets[b, t] != -100]
    mean, dlogits = cross_entropy(logits, targets)
    close(mean, -sum(math.log(p[row][targets[row]]) for row in counted) / 4)
    for row in np.ndindex(2, 3):
        expected = (p[row] - np.eye(5)[targets[row]]) / 4 if row in counted else 0
        close(dlogits[row], expected)


def test_cross_entropy_of_equal_logits_is_log_v():
    mean, _ = cross_entropy(np.zeros((3, 7)), np.array([0, 3, 6]))
    close(mean, math.log(7))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cross_entropy_of_huge_logits_is_finite(dtype):
    logits = np.array([[1e3, 0, -1e3], [-1e3, 1e3, 1e3]], dtype)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        mean, dlogits = cross_entropy(logits, np.array([1, 2]))
    close(mean, (1e3 + math.log(2)) / 2, rtol=1e-6)
    close(dlogits, [[0.5, -0.5, 0], [0, 0.25, -0.25]], rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_the_head_and_the_loss_in_one_are_those_one_after_the_other(chunk, monkeypatch):
    """For parts of every size, logits far apart, and targets in each part, some of them ignored."""
    monkeypatch.setattr(loss, "VOCAB_CHUNK", chunk)
    x, table = 10.0 * normal(2, 4, 3), normal(7, 3)
    targets = np.array([[0, 6, -1, 3], [2, -1, 1, 5]])
    constants = {"targets": targets, "ignore_index": -1, "count": 11}
    expected, dx, dtable = one_after_the_other(x, table, 0.7, **constants)

    mean, cache = loss.head_loss_forward(x, table, **constants)
    close(mean, expected)
    close_in_each(loss.head_loss_backward(0.7, cache), (dx, dtable))

    mean, cache = loss.frozen_head_loss_forward(x, table=table, **constants)
    close(mean, expected)
    close_in_each(loss.frozen_head_loss_backward(0.7, cache), (dx,))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("chunk", [3, 100])
def test_logits_that_exp_cannot_take_give_a_finite_loss_in_any_order(
    dtype, order, chunk, monkeypatch
):
    """The largest logit, 4,000 above the smallest, comes in the last chunk or in the first."""
    monkeypatch.setattr(loss, "VOCAB_CHUNK", chunk)
    x = np.array([[1e3], [-1e3], [2e3], [0.0]], dtype)
    table = np.array([[-1.0], [-0.5], [0.0], [0.5], [0.999], [0.999], [1.0]], dtype)[::order]
    constants = {"targets": np.array([6, 6, 1, 3])}
    wide = [a.astype(np.float64) for a in (x, table)]
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        expected, dx, dtable = one_after_the_other(*wide, 1.0, **constants)
        mean, cache = loss.head_loss_forward(x, table, **constants)
        gradients = loss.head_loss_backward(1.0, cache)
        frozen_mean, frozen = loss.frozen_head_loss_forward(x, table=table, **constants)
        frozen_gradients = loss.frozen_head_loss_backward(1.0, frozen)
    assert expected > 100
    tolerance = {"rtol": 2e-3, "atol": 1e-4} if dtype == np.float32 else {"rtol": 1e-11}
    for found in (mean, frozen_mean):
        close(found, expected, rtol=1e-6 if dtype == np.float32 else 1e-13)
    close_in_each(gradients, (dx, dtable), **tolerance)
    close_in_each(frozen_gradients, (dx,), **tolerance)


def test_cross_entropy_without_a_counted_target_is_zero():
    mean, dlogits = cross_entropy(normal(2, 3), np.array([-100, -100]))
    assert mean == 0
    assert dlogits.shape == (2, 3)
    assert not dlogits.any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("targets", [[0, 2], [-100, -100]], ids=["targets", "no targets"])
def test_with_a_count_of_zero_the_loss_and_every_gradient_are_zero(targets, dtype):
    """For example, of a shard of a batch of which no target counts."""
    x, table = normal(2, 3).astype(dtype), normal(4, 3).astype(dtype)
    constants = {"targets": np.array(targets), "count": 0}
    head, head_cache = loss.head_loss_forward(x, table, **constants)
    frozen, frozen_cache = loss.frozen_head_loss_forward(x, table=table, **constants)
    mean, dlogits = cross_entropy(x, **constants)
    found = {
        "cross_entropy": (mean, dlogits),
        "head_loss": (head, *loss.head_loss_backward(1.0, head_cache)),
        "frozen_head_loss": (frozen, *loss.frozen_head_loss_backward(1.0, frozen_cache)),
    }
    for name, arrays in found.items():
        for array in arrays:
            assert array.dtype == dtype and not np.any(array), (name, array)


@pytest.mark.parametrize("base", [True, False], ids=["trained table", "frozen table"])
def test_with_a_count_of_zero_a_model_gets_no_gradient(base):
    lora_config = LoRAConfig(rank=2, targets=("qkv",))
    config = GPTConfig(vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=1)
    weights = gpt_init(config, seed=0)
    net = Net(weights, config, lora_init(weights, lora_config, seed=0), lora_config)
    tokens = np.array([[1, 2, 3]])
    mean, *grads = loss_and_grads(
        net, tokens=tokens, targets=tokens, count=0, plan=Plan(base=base, lora=True)
    )
    assert mean == 0
    for tree in grads:
        for path, gradient in flatten(tree or {}).items():
            assert not np.any(gradient), (path, gradient)


def test_ignore_index_may_be_an_existing_token():
    logits = normal(3, 4)
    mean, dlogits = cross_entropy(logits, np.array([0, 2, 0]), ignore_index=0)
    alone, dalone = cross_entropy(logits[1:2], np.array([2]))
    close(mean, alone)
    close(dlogits, np.stack([np.zeros(4), dalone[0], np.zeros(4)]))


def test_with_the_whole_count_the_shards_of_a_batch_add_up():
    logits, targets = normal(6, 5), np.array([1, -100, 2, 4, 0, -100])
    mean, dlogits = cross_entropy(logits, targets)
    halves = [cross_entropy(logits[s], targets[s], count=4) for s in (slice(0, 2), slice(2, 6))]
    close(sum(mean for mean, _ in halves), mean)
    close(np.concatenate([dlogits for _, dlogits in halves]), dlogits)
