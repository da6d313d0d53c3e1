"""The stand-in refuses every mistake that CuPy refuses, and those that CuPy lets pass silently."""

import json
import operator

import numpy as np
import pytest
from strict_cupy import COPIES, MANIFEST

from minilora.backend import load_cupy, namespace, to_device, to_host


@pytest.fixture
def x(xp):
    """A small array on the device."""
    return xp.asarray(np.arange(6, dtype=np.float32).reshape(2, 3))


HOST = np.ones((2, 3), np.float32)
ZERO_D = np.array(2.0, np.float32)


# --- what is refused ---------------------------------------------------------------------------

REFUSED = {
    # NumPy's functions
    "np.exp": lambda xp, x: np.exp(x),
    "np.add, mixed": lambda xp, x: np.add(HOST, x),
    "np.sum": lambda xp, x: np.sum(x),
    "np.asarray": lambda xp, x: np.asarray(x),
    "np.array of a list": lambda xp, x: np.array([x[0, 0], x[0, 1]]),
    "np.einsum": lambda xp, x: np.einsum("ij->i", x),
    "np.zeros_like": lambda xp, x: np.zeros_like(x),
    "np.concatenate": lambda xp, x: np.concatenate([HOST, x]),
    "np.isfinite": lambda xp, x: np.isfinite(x),
    "np.add.at": lambda xp, x: np.add.at(HOST.copy(), x, 1.0),
    # host and device in one operation
    "device + host": lambda xp, x: x + HOST,
    "host + device": lambda xp, x: HOST + x,
    "device * 0-d host": lambda xp, x: x * ZERO_D,
    "0-d host * device": lambda xp, x: ZERO_D * x,
    "device @ host": lambda xp, x: x @ HOST.T,
    "host @ device": lambda xp, x: HOST.T @ x,
    "device += host": lambda xp, x: operator.iadd(x, HOST),
    "host += device": lambda xp, x: operator.iadd(HOST.copy(), x),
    "device > host": lambda xp, x: x > HOST,
    "device + list": lambda xp, x: x + [1.0, 2.0, 3.0],
    "ufunc of host": lambda xp, x: xp.exp(HOST),
    "ufunc of list": lambda xp, x: xp.exp([1.0]),
    "ufunc, mixed": lambda xp, x: xp.maximum(x, HOST),
    "ufunc, out on the host": lambda xp, x: xp.exp(x, out=HOST.copy()),
    "matmul, mixed": lambda xp, x: xp.matmul(x, HOST.T),
    "sum of host": lambda xp, x: xp.sum(HOST),
    "where": lambda xp, x: xp.where(x > 0, HOST, 0.0),
    "where, condition": lambda xp, x: xp.where(HOST > 0, x, 0.0),
    "concatenate": lambda xp, x: xp.concatenate([x, HOST]),
    "stack": lambda xp, x: xp.stack([x, HOST]),
    "einsum": lambda xp, x: xp.einsum("ij,ij->i", x, HOST),
    "take_along_axis": lambda xp, x: xp.take_along_axis(x, np.zeros((2, 1), int), -1),
    "method": lambda xp, x: x.dot(HOST.T),
    "x[i] = host": lambda xp, x: x.__setitem__(0, HOST[0]),
    "x[i] = list": lambda xp, x: x.__setitem__(0, [1.0, 2.0, 3.0]),
    "x[host]": lambda xp, x: x[np.array([0, 1])],
    "x[list]": lambda xp, x: x[[0, 1]],
    "x[host] = 0": lambda xp, x: x.__setitem__(np.array([0]), 0.0),
    "host[device]": lambda xp, x: HOST[x],
    "host[i] = device": lambda xp, x: HOST.copy().__setitem__(0, x[0]),
    "add.at, host index": lambda xp, x: xp.add.at(x, np.array([0]), 1.0),
    "add.at, host value": lambda xp, x: xp.add.at(x, 0, HOST[0]),
    "asarray of device scalars": lambda xp, x: xp.asarray([x[0, 0], x[0, 1]]),
    # what Python asks of a number
    "range": lambda xp, x: range(xp.asarray(3)),
    "list[device]": lambda xp, x: [1, 2][xp.asarray(1)],
    "x[device:]": lambda xp, x: x[xp.asarray(1) :],
    "round": lambda xp, x: round(x[0, 0]),
    "json": lambda xp, x: json.dumps(x[0, 0]),
    "hash": lambda xp, x: {x: 1},
    # what CuPy does not have
    "errstate": lambda xp, x: xp.errstate(all="ignore"),
    "vecdot": lambda xp, x: xp.vecdot(x, x),
    "unstack": lambda xp, x: xp.unstack(x),
    "linalg.multi_dot": lambda xp, x: xp.linalg.multi_dot([x, x.T]),
    "random": lambda xp, x: xp.random.default_rng(0).choice(3),
    "random, permuted": lambda xp, x: xp.random.default_rng(0).permuted(x),
    "longdouble": lambda xp, x: xp.asarray(np.ones(2, np.longdouble)),
    "text": lambda xp, x: xp.asarray(["a"]),
    "an attribute": lambda xp, x: x.to_device("cpu"),
    # keywords
    "where=, ufunc": lambda xp, x: xp.exp(x, where=x > 0),
    "where=, sum": lambda xp, x: xp.sum(x, where=x > 0),
    "where=, method": lambda xp, x: x.sum(where=x > 0),
    "initial=": lambda xp, x: xp.max(x, initial=0.0),
    "initial=, method": lambda xp, x: x.max(initial=0.0),
    "out= of einsum": lambda xp, x: xp.einsum("ij->i", x, out=x[:, 0]),
    "mode= of take": lambda xp, x: xp.take(x, xp.asarray(0), mode="clip"),
    "var(mean=)": lambda xp, x: xp.var(x, mean=x.mean()),
    "var(correction=)": lambda xp, x: x.var(correction=1),
    "clip(min=)": lambda xp, x: xp.clip(x, min=0.0),
    "reshape(shape=)": lambda xp, x: xp.reshape(x, shape=(3, 2)),
    "device=": lambda xp, x: xp.zeros(3, device="cpu"),
    "like=": lambda xp, x: xp.zeros(3, like=x),
    "NumPy's name of an argument": lambda xp, x: xp.reshape(a=x, shape=(3, 2)),
    "maximum.reduce": lambda xp, x: xp.maximum.reduce(x),
    "maximum.accumulate": lambda xp, x: xp.maximum.accumulate(x),
    "subtract.at": lambda xp, x: xp.subtract.at(x, 0, 1.0),
    # kernels
    "a kernel of host": lambda xp, x: double(xp)(HOST),
    "a kernel of two dtypes": lambda xp, x: summed(xp)(x, x.astype(np.float64)),
    "a kernel without an argument": lambda xp, x: summed(xp)(x),
}


def double(xp):
    return xp.ElementwiseKernel("T x", "T y", "y = T(2) * x;", "double")


def summed(xp):
    return xp.ElementwiseKernel("T x, T z", "T y", "T s = x + z;  // a sum\ny = s;", "summed")


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_refused(xp, x, name):
    expected = (TypeError, AttributeError, IndexError, ValueError, NotImplementedError)
    with pytest.raises(expected) as refused:
        REFUSED[name](xp, x)
    assert COPIES.to_host == 0, f"copied before it refused: {refused.value}"


# --- what is counted ---------------------------------------------------------------------------

READS = {
    "get": lambda xp, x: x.get(),
    "item": lambda xp, x: x[0, 0].item(),
    "tolist": lambda xp, x: x.tolist(),
    "float": lambda xp, x: float(x[0, 0]),
    "int": lambda xp, x: int(x[0, 0]),
    "bool": lambda xp, x: bool(x[0, 0]),
    "if": lambda xp, x: 1 if x.max() > 3 else 0,
    "max of Python": lambda xp, x: max(x[0, 0], x[0, 1]),
    "format": lambda xp, x: f"{x.sum():.3f}",
    "print": lambda xp, x: str(x),
    "x[mask]": lambda xp, x: x[x > 1],
    "to_host": lambda xp, x: to_host(x),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_is_counted(xp, x, name):
    READS[name](xp, x)
    assert COPIES.to_host == 1


def test_a_host_scalar_in_a_loop_is_counted(xp, x):
    total = 0.0
    for row in x:
        total += float(row.sum())
    assert COPIES.to_host == 2
    COPIES.reset()
    assert float(sum(row.sum() for row in x)) == total == 15.0
    assert COPIES.to_host == 1


def test_copies_to_the_device_are_counted(xp):
    x = xp.asarray(HOST)
    assert COPIES.to_device == 1
    xp.asarray(x)
    to_device({"a": x, "b": [x]}, "cuda")
    assert COPIES.to_device == 1
    to_device({"a": x, "b": [HOST]}, "cuda")
    assert COPIES.to_device == 2


# --- what is allowed ---------------------------------------------------------------------------


def test_it_is_taken_for_cupy(xp, x):
    assert load_cupy() is xp
    assert namespace(x) is xp
    assert xp.__version__ == MANIFEST["cupy"]


def test_it_computes_what_numpy_computes(xp, x):
    host = np.arange(6, dtype=np.float32).reshape(2, 3)
    i = np.array([1, 0])

    def compute(xp, x, i):
        total = xp.zeros_like(x)
        xp.add.at(total, i, x[i] * 2.0)
        y = xp.exp(x - x.max(axis=-1, keepdims=True))
        y /= y.sum(axis=-1, keepdims=True)
        picked = xp.take_along_axis(y, i[:, None], axis=-1)
        scores = xp.matmul(y, x.T) + xp.triu(xp.full((2, 2), -1.0, dtype=x.dtype), 1)
        scores[0, 0] -= 1.0
        scores[:, 1] = np.float32(3.0)
        where = xp.where(x > 2, x, 0.0)
        norm = xp.linalg.norm(x)
        joined = xp.concatenate([xp.stack([x, y]).reshape(4, 3), where, -total])
        return [total, y, picked, scores, where, norm, joined, 1.0 / (1.0 + x), abs(x - 2) ** 2]

    results = zip(compute(xp, x, xp.asarray(i)), compute(np, host, i), strict=True)
    for on_device, expected in results:
        assert namespace(on_device) is xp
        np.testing.assert_array_equal(on_device.get(), expected, strict=True)


def test_a_number_of_an_array_is_a_view(xp, x):
    x[0, 0][...] = 7.0
    corner = x[1, 1]
    corner += 1.0
    assert x.tolist() == [[7.0, 1.0, 2.0], [3.0, 5.0, 5.0]]


def test_reductions_are_arrays_of_no_dimension(xp, x):
    for total in (x.sum(), xp.sum(x), x[0] @ x[1], xp.isfinite(x).all()):
        assert namespace(total) is xp
        assert total.shape == ()


def test_out_gives_the_array_that_was_given(xp, x):
    y = xp.empty((2, 3), dtype=np.float32)
    assert xp.exp(x, out=y) is y
    np.testing.assert_array_equal(y.get(), np.exp(x.get()))


def test_what_nobody_wrote_is_not_a_number(xp, x):
    assert bool(xp.isnan(xp.empty((2, 3), dtype=np.float32)).all())
    assert bool(xp.isnan(xp.empty_like(x)).all())


def test_the_device_has_an_array_of_its_own(xp):
    host = np.ones(3)
    x = xp.asarray(host)
    host[0] = 5.0
    back = x.get()
    back[1] = 6.0
    assert x.tolist() == [1.0, 1.0, 1.0]


def test_float32_meets_python_floats_and_stays(xp, x):
    assert (2.0 * x).dtype == (x / 3.0).dtype == xp.sqrt(x + 1e-5).dtype == np.float32
    assert (np.float64(2.0) * x).dtype == np.float64  # as in CuPy: a slip that a dtype test sees


def test_a_kernel_runs(xp, x):
    np.testing.assert_array_equal(double(xp)(x).get(), 2 * x.get(), strict=True)
    np.testing.assert_array_equal(summed(xp)(x, 1.0).get(), x.get() + 1, strict=True)
