"""NumPy or CuPy: which library an array belongs to, and the one place where arrays change device.

Everything that is random or small is made on the host and sent to the device; nothing else in the
package copies between the two.
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
"""An array of either library; CuPy's has the same methods as NumPy's."""

DEVICES = ("cpu", "cuda", "auto")


def namespace(x: Array) -> Any:
    """The module whose functions take `x`: numpy, or cupy for an array on a GPU."""
    return np if isinstance(x, (np.ndarray, np.generic)) else sys.modules[_root_module(x)]


def _root_module(x: Any) -> str:
    return type(x).__module__.split(".")[0]


def load_cupy() -> ModuleType:
    """CuPy, imported and proven by one small matrix product.

    Raises MiniloraError saying which is missing: the package, a usable GPU, or CUDA's libraries.
    """
    try:
        import cupy
    except ModuleNotFoundError as error:
        raise MiniloraError(
            "the device cuda needs CuPy: pip install 'minilora[cuda13]' (or [cuda12], "
            "as nvidia-smi names your driver's CUDA version)"
        ) from error
    except ImportError as error:
        raise MiniloraError(f"CuPy is installed but does not import: {error}") from error
    _prove(cupy)
    return cupy


@functools.cache
def _prove(cupy: ModuleType) -> None:
    """See, once, that there is a GPU and that CUDA's libraries compile and multiply on it."""
    try:
        cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as error:
        raise MiniloraError(
            f"CuPy is installed but finds no usable GPU or driver ({error}); nvidia-smi must list "
            "a GPU and name a CUDA version that is not older than CuPy's, 13 for minilora[cuda13] "
            "or 12 for minilora[cuda12]"
        ) from error
    try:
        probe = cupy.ones((2, 2), dtype=cupy.float32)
        float((probe @ probe).sum())
    except (ImportError, OSError, RuntimeError) as error:
        raise MiniloraError(
            f"the GPU is there but CUDA's libraries do not load ({error}); "
            "pip install 'cupy-cuda13x[ctk]' (or cupy-cuda12x[ctk]) brings them"
        ) from error


def resolve_device(device: str) -> str:
    """`cpu` or `cuda` for `cpu`, `cuda` or `auto` (a GPU if one works, else the CPU).

    Raises MiniloraError for another name, or for `cuda` where it does not work.
    """
    if device not in DEVICES:
        raise MiniloraError(f"unknown device {device!r}; it is one of {', '.join(DEVICES)}")
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
    """An array or tree on a device; what lies there already is not copied.

    Raises MiniloraError as `resolve_device` does.
    """
    if resolve_device(device) == "cpu":
        return to_host(arrays)
    return tree.map_leaves(load_cupy().asarray, arrays)


def to_host(arrays: Any) -> Any:
    """An array or tree as NumPy arrays; what is NumPy already is not copied."""
    return tree.map_leaves(lambda x: x if namespace(x) is np else x.get(), arrays)
