"""Every pair and the whole model compute on the device what they compute on the host."""

import dataclasses

import numpy as np
import pytest

from minilora.backend import namespace, to_device, to_host
from minilora.gradcheck import assert_close as assert_within
from minilora.keep import Plan
from minilora.network import loss_and_grads
from minilora.pairs import PAIRS, Sizes, check_model, tiny_llama, tiny_model
from minilora.tree import flatten, map_leaves

TOLERANCES = {np.float32: 1e-5, np.float64: 1e-12}
SIZES = (Sizes(lead=(3, 5), C=4, O=6, R=2, V=7, H=2), Sizes(lead=(2,), C=3, O=1, R=5, V=4, H=3))
PLANS = {
    "LoRA": Plan(lora=True),
    "base": Plan(base=True),
    "both": Plan(base=True, lora=True),
    "both, recomputed": Plan(base=True, lora=True, recompute=True),
}
each_model = pytest.mark.parametrize("a_model", [tiny_model, tiny_llama], ids=["gpt2", "llama"])
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def moved(tree, dtype, device):
    """The tree with its arrays on the device, those of floats as `dtype`; other leaves as is."""

    def leaf(x):
        if not isinstance(x, np.ndarray):
            return x
        return to_device(x.astype(dtype) if x.dtype.kind == "f" else x, device)

    return map_leaves(leaf, tree)


def assert_close(actual, expected, tolerance, name):
    """On the device, and there within `tolerance` times the largest entry; same dtype and shape."""
    assert namespace(actual) is not np, f"{name} is on the host"
    actual = to_host(actual)
    scale = np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(
        actual, expected, rtol=tolerance, atol=tolerance * scale, err_msg=name, strict=True
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_that_of_the_host(device, name, dtype):
    pair = PAIRS[name]
    for sizes in (*SIZES, pair.sizes):
        rng = np.random.default_rng(len(name))
        arguments, constants = pair.make(rng, sizes)
        seed, results = rng.integers(2**31), []
        for place in ("cpu", device):
            y, cache = pair.forward(
                *moved(arguments, dtype, place), **moved(constants, dtype, place)
            )
            dy = np.random.default_rng(seed).standard_normal(y.shape)
            gradients = pair.backward(moved(np.asarray(dy), dtype, place), pair.thin(cache))
            results.append([y, *(gradient for gradient in gradients if gradient is not None)])
        for i, (host, on_device) in enumerate(zip(*results, strict=True)):
            assert_close(on_device, np.asarray(host), TOLERANCES[dtype], f"{name}, result {i}")


@pytest.mark.parametrize("dtype", TOLERANCES)
@each_plan
@each_model
def test_a_models_loss_and_gradients_are_those_of_the_host(device, a_model, plan, dtype):
    net, batch = a_model()
    results = []
    for place in ("cpu", device):
        base, lora = moved([net.base, net.lora], dtype, place)
        placed = dataclasses.replace(net, base=base, lora=lora)
        loss, *gradients = loss_and_grads(placed, **moved(batch._asdict(), dtype, place), plan=plan)
        results.append(flatten([loss, *(tree for tree in gradients if tree is not None)]))
    host, on_device = results
    assert host.keys() == on_device.keys()
    for name, gradient in host.items():
        assert_close(on_device[name], np.asarray(gradient), 4 * TOLERANCES[dtype], name)


@each_plan
@each_model
def test_a_models_gradients_are_central_differences_of_its_loss_on_the_device(
    device, a_model, plan
):
    assert_within(check_model(*a_model(), plan, entries=1, device=device))
