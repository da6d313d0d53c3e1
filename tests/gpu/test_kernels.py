"""Every form of a formula computes the same: as it is printed, in place, and as a kernel."""

import numpy as np
import pytest

from minilora import fused, kernels, llama_ops, ops, optim
from minilora.backend import to_device, to_host

TOLERANCES = {np.float32: 2e-6, np.float64: 1e-13}
GELU = {"scale": ops.GELU_SCALE, "cubic": ops.GELU_CUBIC}
ENTRYWISE = {  # where each is, the arrays that it takes, the one inside tanh, and its constants
    "gelu": (ops, 1, 0, GELU),
    "gelu_gradient": (ops, 2, 1, GELU),
    "swiglu": (llama_ops, 2, 0, {}),
    "swiglu_gate_gradient": (llama_ops, 3, 1, {}),
}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES)
each_shape = pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 70)])


def draw(shape, dtype, count, scale=1.0):
    rng = np.random.default_rng(0)
    return [np.asarray(scale * rng.standard_normal(shape), dtype) for _ in range(count)]


def assert_close(actual, expected, name=""):
    tolerance = TOLERANCES[expected.dtype.type]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        to_host(actual), expected, rtol=tolerance, atol=tolerance * scale, err_msg=name, strict=True
    )


def assert_forms_agree(name, xs, device):
    """A module has the formula, `fused` and `kernels` functions of its name."""
    module, _, _, constants = ENTRYWISE[name]
    formula = getattr(module, name).__wrapped__
    on_device = [to_device(x, device) for x in xs]
    before = [x.copy() for x in xs]
    expected = formula(*xs, **constants)
    in_place = np.empty_like(expected)
    getattr(fused, name)(*xs, **constants, out=in_place)
    assert_close(in_place, expected, "fused")
    assert_close(getattr(module, name)(*xs, **constants), expected, "by tiles")
    assert_close(formula(*on_device, **constants), expected, "the formula on the device")
    assert_close(getattr(kernels, name)(*on_device, **constants), expected, "kernel")
    assert_close(getattr(module, name)(*on_device, **constants), expected, "on the device")
    for x, then, there in zip(xs, before, on_device, strict=True):
        np.testing.assert_array_equal(x, then, err_msg="an argument was changed")
        np.testing.assert_array_equal(to_host(there), then, err_msg="an argument was changed")


@each_dtype
@each_shape
@pytest.mark.parametrize("name", ENTRYWISE)
def test_all_forms_of_a_formula_agree(device, name, dtype, shape):
    assert_forms_agree(name, draw(shape, dtype, ENTRYWISE[name][1], scale=3.0), device)


@each_dtype
@pytest.mark.parametrize("name", ENTRYWISE)
def test_they_agree_far_from_zero(device, name, dtype):
    """Where tanh is ±1: neither overflow nor a difference of large numbers."""
    _, count, inside, _ = ENTRYWISE[name]
    xs = [np.ones(7, dtype) for _ in range(count)]
    xs[inside][:] = [-1e4, -30.0, -6.0, 0.0, 6.0, 30.0, 1e4]
    assert_forms_agree(name, xs, device)


def test_every_entrywise_formula_is_compared():
    formulas = {
        name
        for module in (ops, llama_ops)
        for name, f in vars(module).items()
        if hasattr(f, "__wrapped__") and f.__module__ == module.__name__
    }
    assert formulas == set(ENTRYWISE)
    public = {
        name
        for name, f in vars(fused).items()
        if getattr(f, "__module__", "") == fused.__name__ and name[0] != "_"
    }
    assert public <= formulas
    assert set(kernels.SOURCES) - {"adamw"} <= formulas


@each_dtype
@each_shape
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_adamw(device, dtype, shape, step):
    p, g, m, v = draw(shape, dtype, 4)
    v = v * v
    before = [x.copy() for x in (p, g, m, v)]
    lr, beta1, beta2, eps, decay = 1e-2, 0.9, 0.999, 1e-8, 0.1
    on_device = [to_device(x, device) for x in (p, g, m, v)]
    new = kernels.adamw(*on_device, step, lr, beta1, beta2, eps, lr * decay)
    # The plain form decays matrices alone; here every shape is one.
    flat = [x.reshape(1, -1) for x in (p, g, m, v)]
    expected = optim._adamw_leaf(*flat, step, lr, beta1, beta2, eps, decay)
    for actual, leaf in zip(new, expected, strict=True):
        assert_close(actual, leaf.reshape(shape))
    for now, then in zip(on_device, before, strict=True):
        np.testing.assert_array_equal(to_host(now), then, err_msg="an argument was changed")


def test_arrays_of_two_dtypes_are_refused(device):
    x = to_device(np.ones(3, np.float32), device)
    with pytest.raises(TypeError, match="Type is mismatched"):
        kernels.gelu_gradient(to_device(np.ones(3), device), x, scale=1.0, cubic=1.0)


def test_a_host_array_is_refused(device):
    x = to_device(np.ones(3, np.float32), device)
    with pytest.raises(TypeError, match="Unsupported type"):
        kernels.kernel(kernels.namespace(x), "gelu_gradient")(np.ones(3, np.float32), x, 1.0, 1.0)
