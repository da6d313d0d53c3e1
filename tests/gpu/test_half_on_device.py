"""A frozen base whose matrices are float16: half the memory, and adapters that train as well."""

import numpy as np
import pytest

from minilora import tree
from minilora.adapters import LoRAConfig, lora_init
from minilora.backend import Half, to_device, to_device_in_half, to_host
from minilora.errors import MiniloraError
from minilora.evaluation import evaluate_tokens
from minilora.keep import OF_WEIGHTS, without
from minilora.model import complete
from minilora.network import Net, loss_and_grads
from minilora.ops import head_forward, linear_backward, linear_forward
from minilora.training.loop import TrainConfig
from minilora.training.runs import adapt

LORA_CONFIG = LoRAConfig(rank=2, targets=("qkv", "o", "up", "down", "embedding"))
ROUNDING = 2.0**-11  # of float16, relative


def draw(*shape, scale=1.0):
    rng = np.random.default_rng(sum(shape))
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def halved(w, device):
    return Half(to_device(w.astype(np.float16), device))


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1.0, 1e8])
def test_a_product_keeps_three_digits_at_any_scale(device, scale):
    """float16 alone would give 0, 0, the product, and infinity."""
    w, b, x, dy = draw(64, 32), draw(32), draw(5, 3, 64), draw(5, 3, 32)
    y, cache = linear_forward(
        to_device(x * scale, device), halved(w, device), to_device(b * scale, device)
    )
    expected, host_cache = linear_forward(x * scale, w, b * scale)
    frozen = without(cache, OF_WEIGHTS)
    dx, dw, db = linear_backward(to_device(dy * scale, device), frozen)
    pairs = ((y, expected), (dx, linear_backward(dy * scale, host_cache)[0]))
    for actual, host in pairs:
        error = np.abs(to_host(actual) - host).max() / np.abs(host).max()
        assert error < 4 * ROUNDING, f"relative error {error:.1e}"
        assert actual.dtype == np.float32
        assert actual.shape == host.shape
    assert dw is None and db is None


def test_rows_of_zeros_give_zeros(device):
    x = np.zeros((2, 4), np.float32)
    y, _ = head_forward(to_device(x, device), halved(draw(7, 4), device))
    np.testing.assert_array_equal(to_host(y), np.zeros((2, 7), np.float32), strict=True)


def test_the_bytes_are_half(device, model):
    half = to_device_in_half(model.base, device)
    small = [x.nbytes for path, x in tree.flatten(model.base).items() if x.ndim == 1]
    small.append(model.base["wpe"].nbytes)
    assert tree.nbytes(half) == (tree.nbytes(model.base) + sum(small)) // 2
    assert tree.count(half) == tree.count(model.base)


def test_back_on_the_host_it_is_float32(device, model):
    back = to_device(to_device_in_half(model.base, device), "cpu")
    for path, leaf in tree.flatten(model.base).items():
        actual = tree.flatten(back)[path]
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, leaf, rtol=ROUNDING, atol=1e-7, err_msg=path)


def test_the_loss_and_its_gradients_are_those_of_the_rounded_base(device, model, corpus):
    """To the rounding of activations; the rounding of weights is not counted."""
    half = to_device_in_half(model.base, device)
    lora = tree.map_leaves(lambda x: 0.1 * draw(*x.shape),
                           lora_init(model.base, LORA_CONFIG, seed=0))  # fmt: skip
    batch = {"tokens": corpus.train[None, :32], "targets": corpus.train[None, 1:33]}
    expected, _, host = loss_and_grads(Net(to_host(half), model.config, lora, LORA_CONFIG), **batch)
    net = Net(half, model.config, to_device(lora, device), LORA_CONFIG)
    loss, dbase, dlora = loss_and_grads(net, **to_device(batch, device))
    assert float(loss) == pytest.approx(float(expected), rel=4 * ROUNDING)
    assert dbase is None
    actual = tree.flatten(to_host(dlora))
    for path, gradient in tree.flatten(host).items():
        error = np.linalg.norm(actual[path] - gradient) / np.linalg.norm(gradient)
        assert error < 16 * ROUNDING, f"{path}: relative error {error:.1e}"
        assert actual[path].dtype == np.float32


def test_a_base_in_half_is_adapted_evaluated_and_generates(device, model, corpus):
    settings = TrainConfig(steps=10, batch=4, context=16, lr=1e-2, warmup=2, threads=1)
    half = model.on(device, half=True)
    (full, trained), (on_device, trained_on_half) = (
        adapt(m, corpus, LORA_CONFIG, settings, device=place)
        for m, place in ((model, "cpu"), (half, device))
    )
    np.testing.assert_allclose(
        trained_on_half.history.train, trained.history.train, rtol=16 * ROUNDING
    )
    assert all(x.dtype == np.float32 for x in tree.flatten(trained_on_half.params).values())
    found = evaluate_tokens(on_device, corpus.held_out, text_bytes=300, device=device)
    expected = evaluate_tokens(full, corpus.held_out, text_bytes=300)
    assert found.loss == pytest.approx(expected.loss, rel=16 * ROUNDING)
    assert len(list(complete(on_device.on(device), "ab", max_tokens=5))) == 5


def test_it_is_neither_trained_nor_merged(device, model, corpus):
    half = model.on(device, half=True)
    settings = TrainConfig(method="full", steps=1, batch=1, context=16)
    with pytest.raises(MiniloraError, match="stays frozen"):
        adapt(half, corpus, settings=settings, device=device)
    adapted = half.with_adapter(lora_init(model.base, LORA_CONFIG, seed=0), LORA_CONFIG)
    with pytest.raises(MiniloraError, match="merge it before"):
        adapted.merged()
