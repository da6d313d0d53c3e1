"""The backend: whose functions take an array, and one clear sentence where there is no GPU."""

import sys
import types

import numpy as np
import pytest

from minilora.backend import (
    load_cupy,
    namespace,
    resolve_device,
    to_device,
    to_device_in_half,
    to_host,
)
from minilora.errors import MiniloraError


def fake_cupy(monkeypatch, *, available=True, fails=None):
    """A module in CuPy's place: NumPy with what `load_cupy` asks of CuPy."""

    class Array(np.ndarray):
        """An array that says that it is CuPy's, and that only `get` brings to the host."""

        def get(self):
            return np.array(self)

    Array.__module__ = "cupy._core.core"

    def device_count():
        if not available:
            raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return 1

    def ones(shape, dtype):
        proofs.append(shape)
        if fails is not None:
            raise fails
        return np.ones(shape, dtype)

    cupy = types.ModuleType("cupy")
    cupy.proofs = proofs = []
    cupy.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=device_count))
    cupy.float32 = np.float32
    cupy.ones = ones
    cupy.asarray = lambda x: np.asarray(x).view(Array)
    cupy.Array = Array
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return cupy


@pytest.mark.parametrize("x", [np.zeros(2), np.float32(1.0), np.zeros((), np.float64)])
def test_the_namespace_of_host_arrays_is_numpy(x):
    assert namespace(x) is np


def test_the_namespace_of_another_librarys_array_is_that_library(monkeypatch):
    cupy = fake_cupy(monkeypatch)

    class Foreign:
        pass

    Foreign.__module__ = "cupy._core.core"
    assert namespace(Foreign()) is cupy


def test_host_arrays_stay_where_they_are():
    arrays = {"a": np.zeros(2), "blocks": [{"b": np.ones(3)}, {}]}
    for moved in (to_device(arrays, "cpu"), to_host(arrays)):
        assert moved["a"] is arrays["a"]
        assert moved["blocks"][0]["b"] is arrays["blocks"][0]["b"]
        assert moved["blocks"][1] == {}
    assert to_host(arrays["a"]) is arrays["a"]


def test_trees_go_to_the_device_and_back(monkeypatch):
    class OnDevice:
        def __init__(self, x):
            self.x = x

        def get(self):
            return self.x

    fake_cupy(monkeypatch).asarray = OnDevice
    arrays = {"a": np.arange(3.0), "blocks": [{"b": np.ones((2, 2))}]}
    moved = to_device(arrays, "cuda")
    assert isinstance(moved["a"], OnDevice)
    assert isinstance(moved["blocks"][0]["b"], OnDevice)
    back = to_host(moved)
    np.testing.assert_array_equal(back["a"], arrays["a"])
    np.testing.assert_array_equal(back["blocks"][0]["b"], arrays["blocks"][0]["b"])


# --- choosing a device -------------------------------------------------------------------------


def without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # `import cupy` raises ImportError


def without_an_import(monkeypatch):
    class Broken:
        """Finds a CuPy that raises as it is imported."""

        def find_spec(self, name, *_):
            if name == "cupy":
                raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])


def without_gpu(monkeypatch):
    fake_cupy(monkeypatch, available=False)


def without_libraries(monkeypatch):
    fake_cupy(monkeypatch, fails=RuntimeError("libnvrtc.so.13 not found"))


def without_shared_objects(monkeypatch):
    fake_cupy(monkeypatch, fails=ImportError("libcublas.so.13: cannot open shared object file"))


MISSING = [
    (without_cupy, r"needs CuPy: pip install cupy-cuda13x"),
    (without_an_import, r"does not import: libcudart.so.13"),
    (without_gpu, r"finds no usable GPU or driver \(cudaErrorNoDevice"),
    (without_libraries, r"libraries do not load \(libnvrtc.so.13 not found\)"),
    (without_shared_objects, r"libraries do not load \(libcublas"),
]


@pytest.mark.parametrize(("break_it", "message"), MISSING)
def test_what_is_missing_is_named(monkeypatch, break_it, message):
    break_it(monkeypatch)
    with pytest.raises(MiniloraError, match=message):
        load_cupy()
    with pytest.raises(MiniloraError, match=message):
        resolve_device("cuda")
    with pytest.raises(MiniloraError, match=message):
        to_device(np.zeros(2), "cuda")
    assert resolve_device("auto") == "cpu"


def test_a_gpu_that_works_is_used(monkeypatch):
    cupy = fake_cupy(monkeypatch)
    assert load_cupy() is cupy
    assert load_cupy() is cupy
    assert len(cupy.proofs) == 1, "each proof waits for the device"
    assert resolve_device("cuda") == "cuda"
    assert resolve_device("auto") == "cuda"


def test_the_cpu_needs_no_cupy(monkeypatch):
    without_cupy(monkeypatch)
    assert resolve_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["gpu", "", "CUDA", "cuda:0"])
def test_other_devices_are_refused(name):
    with pytest.raises(MiniloraError, match="cpu, cuda, auto"):
        resolve_device(name)
    with pytest.raises(MiniloraError, match="cpu, cuda, auto"):
        to_device(np.zeros(2), name)


def test_float16_needs_a_gpu():
    with pytest.raises(MiniloraError, match="float16 need the device cuda"):
        to_device_in_half({"wte": np.ones((2, 2), np.float32)}, "cpu")
