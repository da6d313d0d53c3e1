"""Every pair and the whole model compute on the device what they compute on the host."""

import numpy as np
import pytest

from minilora.backend import namespace, to_device, to_host
from minilora.gpt import loss_and_grads
from minilora.gradcheck import assert_close as assert_within
from minilora.pairs import PAIRS, Sizes, check_model, tiny_model
from minilora.tree import flatten, map_leaves

TOLERANCES = {np.float32: 1e-5, np.float64: 1e-12}
SIZES = (Sizes(lead=(3, 5), C=4, O=6, R=2, V=7, H=2), Sizes(lead=(2,), C=3, O=1, R=5, V=4, H=3))


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
    for sizes in SIZES:
        rng = np.random.default_rng(len(name))
        arguments, constants = pair.make(rng, sizes)
        seed, results = rng.integers(2**31), []
        for place in ("cpu", device):
            y, cache = pair.forward(
                *moved(arguments, dtype, place), **moved(constants, dtype, place)
            )
            dy = np.random.default_rng(seed).standard_normal(y.shape)
            gradients = pair.backward(moved(np.asarray(dy), dtype, place), cache)
            results.append([y, *(gradient for gradient in gradients if gradient is not None)])
        for i, (host, on_device) in enumerate(zip(*results, strict=True)):
            assert_close(on_device, np.asarray(host), TOLERANCES[dtype], f"{name}, result {i}")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("wrt", ["lora", "base", "both"])
def test_a_models_loss_and_gradients_are_those_of_the_host(device, wrt, dtype):
    case = tiny_model()._asdict()
    host, on_device = (
        flatten(
            {
                name: tree
                for name, tree in zip(
                    ("loss", "base", "lora"),
                    loss_and_grads(**moved(case, dtype, place), wrt=wrt),
                    strict=True,
                )
                if tree is not None
            }
        )
        for place in ("cpu", device)
    )
    assert host.keys() == on_device.keys()
    for name, gradient in host.items():
        assert_close(on_device[name], np.asarray(gradient), 4 * TOLERANCES[dtype], name)


@pytest.mark.parametrize("wrt", ["lora", "both"])
def test_a_models_gradients_are_central_differences_of_its_loss_on_the_device(device, wrt):
    assert_within(check_model(tiny_model(), wrt=wrt, entries=1, device=device))
