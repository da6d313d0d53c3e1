"""A fused kernel computes what the plain code of the same name does."""

import numpy as np
import pytest

from minilora import kernels, ops, optim
from minilora.backend import to_device, to_host

TOLERANCES = {np.float32: 2e-6, np.float64: 1e-13}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES)
each_shape = pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 70)])


def draw(shape, dtype, count, scale=1.0):
    rng = np.random.default_rng(0)
    return [np.asarray(scale * rng.standard_normal(shape), dtype) for _ in range(count)]


def assert_close(actual, expected):
    tolerance = TOLERANCES[expected.dtype.type]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        to_host(actual), expected, rtol=tolerance, atol=tolerance * scale, strict=True
    )


@each_dtype
@each_shape
def test_gelu(device, dtype, shape):
    x, dy = draw(shape, dtype, 2, scale=3.0)
    constants = (ops.GELU_SCALE, ops.GELU_CUBIC)
    y = kernels.gelu_forward(to_device(x, device), *constants)
    assert_close(y, ops.gelu_forward(x)[0])
    dx = kernels.gelu_backward(to_device(dy, device), to_device(x, device), *constants)
    assert_close(dx, ops.gelu_backward(dy, (x,))[0])


@each_dtype
def test_gelu_far_from_zero(device, dtype):
    """Where tanh is ±1: neither overflow nor a difference of large numbers."""
    x = np.array([-1e4, -30.0, -6.0, 0.0, 6.0, 30.0, 1e4], dtype)
    dy = np.ones_like(x)
    constants = (ops.GELU_SCALE, ops.GELU_CUBIC)
    assert_close(kernels.gelu_forward(to_device(x, device), *constants), ops.gelu_forward(x)[0])
    dx = kernels.gelu_backward(to_device(dy, device), to_device(x, device), *constants)
    assert_close(dx, ops.gelu_backward(dy, (x,))[0])


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
        kernels.gelu_backward(to_device(np.ones(3), device), x, 1.0, 1.0)


def test_a_host_array_is_refused(device):
    x = to_device(np.ones(3, np.float32), device)
    with pytest.raises(TypeError, match="Unsupported type"):
        kernels.kernel(kernels.namespace(x), "gelu_backward")(np.ones(3, np.float32), x, 1.0, 1.0)
