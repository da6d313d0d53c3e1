"""NumPy or CuPy: which library an array belongs to, and the one place where arrays change device.

Random numbers and small arrays are made on the host and sent to the device. No other module copies
between the two.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from minilora import tree
from minilora.errors import MiniloraError

Array: TypeAlias = np.ndarray[Any, Any]
"""An array of either library; CuPy's arrays have the methods of NumPy's."""

DEVICES = ("cpu", "cuda", "auto")
HOST = (np.ndarray, np.generic)  # NumPy's arrays and scalars


def namespace(x: Array) -> Any:
    """The module whose functions accept `x`: numpy, or cupy for an array on a GPU."""
    if isinstance(x, HOST):
        return np
    array = x.array if isinstance(x, Half) else x
    return sys.modules[type(array).__module__.split(".")[0]]


def load_cupy() -> ModuleType:
    """CuPy, imported and tested with one small matrix product.

    Raises MiniloraError saying what is missing: the package, a usable GPU, or CUDA's libraries.
    """
    try:
        import cupy
    except ModuleNotFoundError as error:
        raise MiniloraError(
            "device cuda needs CuPy: pip install cupy-cuda13x, or cupy-cuda12x if nvidia-smi "
            "shows CUDA 12"
        ) from error
    except ImportError as error:
        raise MiniloraError(f"CuPy is installed but does not import: {error}") from error
    _check_gpu(cupy)
    return cupy


@functools.cache
def _check_gpu(cupy: ModuleType) -> None:
    """Check, once, that there is a GPU and that CUDA's libraries compile and multiply on it."""
    try:
        cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as error:
        raise MiniloraError(
            f"CuPy is installed but finds no usable GPU or driver ({error}); nvidia-smi must list "
            "a GPU and show CUDA 13 or later for cupy-cuda13x, 12 or later for cupy-cuda12x"
        ) from error
    try:
        probe = cupy.ones((2, 2), dtype=cupy.float32)
        float((probe @ probe).sum())
    except (ImportError, OSError, RuntimeError) as error:
        raise MiniloraError(
            f"the GPU is there but CUDA's libraries do not load ({error}); "
            "pip install 'cupy-cuda13x[ctk]' or 'cupy-cuda12x[ctk]' provides them"
        ) from error


def resolve_device(device: str) -> str:
    """`cpu` or `cuda` for `cpu`, `cuda` or `auto` (a GPU if one works, else the CPU).

    Raises MiniloraError for another name, and for `cuda` if it does not work.
    """
    if device not in DEVICES:
        raise MiniloraError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    if device == "cpu":
        return "cpu"
    try:
        load_cupy()
    except MiniloraError:
        if device == "cuda":
            raise
        return "cpu"
    return "cuda"


def to_device(arrays: Any, device: str) -> Any:
    """An array or tree on a device; arrays that are there already are not copied.

    Raises MiniloraError as `resolve_device` does.
    """
    if resolve_device(device) == "cpu":
        return to_host(arrays)
    asarray = load_cupy().asarray
    return tree.map_leaves(lambda x: x if isinstance(x, Half) else asarray(x), arrays)


def to_host(arrays: Any) -> Any:
    """An array or tree as NumPy arrays; arrays of NumPy are not copied."""
    return tree.map_leaves(lambda x: x if namespace(x) is np else x.get(), arrays)


def check_ids(
    ids: Array, vocab_size: int, *, name: str = "token id", ignored: int | None = None
) -> None:
    """Raise MiniloraError unless every id is in [0, vocab_size) or equal to `ignored`.

    Ids on a GPU are not checked: that would mean waiting for the device.
    """
    if not isinstance(ids, HOST):
        return
    is_outside, but = (ids < 0) | (ids >= vocab_size), ""
    if ignored is not None:
        is_outside, but = is_outside & (ids != ignored), f" and is not ignore_index, {ignored}"
    if is_outside.any():
        raise MiniloraError(
            f"{name} {ids[is_outside][0]} is outside the base's vocabulary of {vocab_size} tokens"
            + but
        )


# --- weights in float16 ------------------------------------------------------------------------

SMALLEST = 1e-37  # a row of zeros is divided by it


class Half:
    """A frozen float16 matrix on a GPU, with which float32 arrays compute as if it were float32.

    y = x W is a product in float16, for which a GPU has tensor cores. float16 reaches from 6e-8 to
    65504, so each row of x is divided by its largest entry before the product and y is multiplied
    by it afterwards: gradients, which are small, keep their three digits.
    """

    __array_ufunc__ = None  # both libraries then leave `x @ w` to __rmatmul__
    dtype = np.dtype(np.float32)

    def __init__(self, array: Array) -> None:
        self.array = array
        self.shape, self.size, self.nbytes = array.shape, array.size, array.nbytes

    @property
    def T(self) -> Half:
        """The transpose, a view."""
        return Half(self.array.T)

    def __rmatmul__(self, x: Array) -> Array:
        largest = namespace(x).maximum(abs(x).max(axis=-1, keepdims=True), SMALLEST)
        y = (x / largest).astype(self.array.dtype) @ self.array
        return y.astype(x.dtype) * largest

    def __getitem__(self, key: Any) -> Half | Array:
        """For slices, that part of the matrix as Half; for an index array, its rows as float32."""
        part = self.array[key]
        is_view = isinstance(key, slice | tuple)
        return Half(part) if is_view else part.astype(self.dtype)

    def get(self) -> np.ndarray:
        """The matrix on the host, as float32."""
        host: np.ndarray = to_host(self.array).astype(self.dtype)
        return host


def to_device_in_half(base: tree.Tree, device: str) -> tree.Tree:
    """`to_device` of a base that stays frozen, with its matrices in float16: half the memory.

    Biases, layer norms and positions, which are small, keep their dtype. Raises MiniloraError as
    `resolve_device` does, and for a device that is not a GPU.
    """
    if resolve_device(device) == "cpu":
        raise MiniloraError(
            "weights in float16 need the device cuda: NumPy multiplies float16 far more slowly"
        )

    def moved(path: str, x: Array) -> Array | Half:
        is_matrix = x.ndim == 2 and path != "wpe"
        return Half(to_device(x.astype(np.float16), device)) if is_matrix else to_device(x, device)

    return tree.unflatten({path: moved(path, x) for path, x in tree.flatten(base).items()})
