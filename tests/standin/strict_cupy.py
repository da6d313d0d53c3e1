"""A strict stand-in for CuPy that needs nothing but NumPy: the device path on any machine.

`CUPY` stands in for the module. It has the names and parameters that manifest.json says CuPy has,
and no others. Its arrays hold their numbers in a NumPy array but are none: they refuse to become
one implicitly, and to meet one in any operation. It is stricter than CuPy: what CuPy lets pass but
copies behind the reader's back, or takes from the host, is refused here as well. `COPIES` counts
what goes between host and device.
"""

from __future__ import annotations

import functools
import inspect
import json
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

MANIFEST = json.loads(Path(__file__).with_name("manifest.json").read_text(encoding="utf-8"))
JOINING = ("concatenate", "stack", "hstack", "vstack", "dstack", "column_stack")
READING = ("item", "tolist", "tobytes", "dump", "dumps", "tofile")
DTYPES = "?bBhHiIlLqQefdFD"  # the characters of the dtypes that a GPU has

quiet = np.errstate(all="ignore")  # a GPU gives no floating-point warnings


@dataclass
class Copies:
    """How many copies were made in either direction."""

    to_host: int = 0
    to_device: int = 0

    def reset(self) -> None:
        self.to_host = self.to_device = 0


COPIES = Copies()


# --- what may meet an array --------------------------------------------------------------------


def operand(x: Any) -> Any:
    """The numbers of a device array or a scalar; anything else is refused."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, bool | int | float | complex | np.generic):
        return x
    raise TypeError(f"Unsupported type {type(x)}")


def argument(x: Any, *, joining: bool = False) -> Any:
    """An argument of a function for NumPy: no host array, and no list but one that is joined."""
    if isinstance(x, ndarray):
        return x._host
    if joining and isinstance(x, list | tuple):
        return [argument(part) for part in x]
    if isinstance(x, tuple):
        return tuple(operator.index(part) for part in x)  # a shape, or axes
    if isinstance(x, np.ndarray | list):
        raise TypeError(f"Unsupported type {type(x)}")
    return x


def index(key: Any) -> tuple[Any, ...]:
    """An index for NumPy, with an ellipsis, so that a single number is a view, too."""
    parts = key if isinstance(key, tuple) else (key,)
    for part in parts:
        if not (
            part is None or part is ... or isinstance(part, int | np.integer | slice | ndarray)
        ):
            raise IndexError(f"Unsupported type {type(part)}")
    found = tuple(part._host if isinstance(part, ndarray) else part for part in parts)
    return found if any(part is ... for part in found) else (*found, ...)


def on_device(x: Any) -> Any:
    """What NumPy gave, its arrays and scalars as device arrays."""
    if isinstance(x, np.ndarray | np.generic | bool):
        return ndarray(np.asarray(x))
    return type(x)(map(on_device, x)) if isinstance(x, tuple | list) else x


@functools.cache
def signature(parameters: str) -> inspect.Signature:
    """Of the text that the manifest has."""
    return inspect.signature(eval(f"lambda {parameters}: None"))


@quiet
def call(f: Callable, parameters: str, args: tuple, kwargs: dict, *, joining: bool = False) -> Any:
    """`f` of NumPy, called as CuPy's signature allows it to be called."""
    # A TypeError for a keyword that CuPy does not have:
    bound = signature(parameters).bind(*args, **kwargs)
    given = [argument(x, joining=joining) for x in bound.args]
    options = {name: argument(x) for name, x in bound.kwargs.items()}
    result = f(*given, **options)
    out = bound.arguments.get("out")
    return on_device(result) if out is None else out


# --- the array ---------------------------------------------------------------------------------


class ndarray:  # noqa: N801
    """An array on the device."""

    __module__ = "cupy"
    __array_ufunc__ = None  # np.exp(device), host + device: TypeError
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, host: np.ndarray) -> None:
        if host.dtype.char not in DTYPES:
            raise ValueError(f"Unsupported dtype {host.dtype}")
        self._host = host

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed; use .get()")

    def __array_function__(self, f: Callable, *_: Any) -> Any:
        raise TypeError(f"numpy.{f.__name__} of a device array; use the function of its namespace")

    def __getattr__(self, name: str) -> Any:
        if name in READING:
            COPIES.to_host += 1
            return getattr(self._host, name)
        if name in MANIFEST["methods"]:
            method, parameters = getattr(self._host, name), MANIFEST["methods"][name]
            return lambda *args, **kwargs: call(method, parameters, args, kwargs)
        if name in MANIFEST["attributes"] and name not in ("data", "base", "flat", "cstruct"):
            return on_device(getattr(self._host, name))
        raise AttributeError(f"CuPy's ndarray has no attribute {name!r}")

    def get(self) -> np.ndarray:
        COPIES.to_host += 1
        return self._host.copy()

    def __getitem__(self, key: Any) -> ndarray:
        found = index(key)
        if any(isinstance(part, np.ndarray) and part.dtype.kind == "b" for part in found):
            COPIES.to_host += 1  # how many entries a mask takes is known on the device alone
        return ndarray(self._host[found])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._host[index(key)] = operand(value)

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    @quiet
    def __neg__(self) -> ndarray:
        return ndarray(np.asarray(-self._host))

    def __abs__(self) -> ndarray:
        return ndarray(np.asarray(abs(self._host)))

    def __invert__(self) -> ndarray:
        return ndarray(np.asarray(~self._host))


def add_operators() -> None:
    """`x + y`, `y + x` and `x += y`, and so on, all by the same rule."""

    def add(name: str, method: str) -> None:
        f = getattr(operator, method)

        @quiet
        def forward(self: ndarray, other: Any) -> ndarray:
            if not isinstance(other, ndarray) and getattr(other, "__array_ufunc__", 0) is None:
                return NotImplemented  # its own operator is asked next
            return ndarray(np.asarray(f(self._host, operand(other))))

        @quiet
        def reflected(self: ndarray, other: Any) -> ndarray:
            return ndarray(np.asarray(f(operand(other), self._host)))

        setattr(ndarray, f"__{name}__", forward)
        if method in ("eq", "ne", "lt", "le", "gt", "ge"):
            return  # Python reflects these by themselves
        setattr(ndarray, f"__r{name}__", reflected)
        in_place = getattr(operator, f"i{name}")

        @quiet
        def changing(self: ndarray, other: Any) -> ndarray:
            in_place(self._host, operand(other))
            return self

        setattr(ndarray, f"__i{name}__", changing)

    arithmetic = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
    for name in (*arithmetic, "xor", "lshift", "rshift", "eq", "ne", "lt", "le", "gt", "ge"):
        add(name, name)
    add("and", "and_")
    add("or", "or_")


def add_readings() -> None:
    """`float(x)`, `bool(x)`, `print(x)`, …: each waits for the device and copies from it."""

    def add(name: str) -> None:
        def read(self: ndarray, *args: Any) -> Any:
            COPIES.to_host += 1
            return getattr(self._host, name)(*args)

        setattr(ndarray, name, read)

    for name in ("__float__", "__int__", "__bool__", "__complex__", "__repr__", "__str__"):
        add(name)
    add("__format__")


add_operators()
add_readings()


# --- the module --------------------------------------------------------------------------------


class Ufunc:
    """A ufunc: scalars and device arrays only.

    CuPy has `at` for add and `reduce` for add and multiply; for any other ufunc it raises
    NotImplementedError in these words, and so does this.
    """

    def __init__(self, name: str) -> None:
        self.name, self.f, self.parameters = name, getattr(np, name), MANIFEST["ufuncs"][name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for x in args[: self.f.nin]:
            operand(x)
        return call(self.f, self.parameters, args, kwargs)

    def at(self, a: ndarray, indices: Any, b: Any) -> None:
        if self.name != "add":
            raise NotImplementedError(f"`cupy_{self.name}.at` is not supported yet")
        np.add.at(operand(a), index(indices), operand(b))

    def reduce(self, a: ndarray, axis: int = 0) -> Any:
        if self.name not in ("add", "multiply"):
            raise NotImplementedError(f"`cupy_{self.name}.reduce` is not supported yet")
        return on_device(self.f.reduce(operand(a), axis))


class ElementwiseKernel:
    """A kernel run by Python: its C++ is Python, too, without `T` before a new name and `;`."""

    def __init__(self, in_params: str, out_params: str, operation: str, name: str = "kernel"):
        def names(params: str) -> list[str]:
            found = re.fullmatch(r"T \w+(, T \w+)*", params)
            assert found, f"{params!r}: the stand-in knows parameters of type T alone"
            return params.replace("T ", "").split(", ")

        self.inputs, self.outputs, self.name = names(in_params), names(out_params), name
        statements = re.sub(r"//.*", "", operation).split(";")
        assert not statements.pop().strip(), "a statement has no semicolon"
        code = (re.sub(r"^T (?=\w+ = )", "", statement.strip()) for statement in statements)
        self.code = compile("\n".join(code), name, "exec")

    @quiet
    def __call__(self, *args: Any) -> Any:
        if len(args) != len(self.inputs):
            raise TypeError(f"Wrong number of arguments for {self.name!r}")
        kinds = {x.dtype for x in args if isinstance(x, ndarray)}
        if len(kinds) != 1:
            raise TypeError(f"Type is mismatched. {kinds}")
        T = kinds.pop().type
        values = [x._host if isinstance(x, ndarray) else T(operand(x)) for x in args]
        known = {"T": T, "tanh": np.tanh, "sqrt": np.sqrt, "__builtins__": {}}
        known |= zip(self.inputs, values, strict=True)
        exec(self.code, known)
        results = tuple(ndarray(np.array(known[name], T)) for name in self.outputs)
        return results if results[1:] else results[0]


class Module(ModuleType):
    """The stand-in for `cupy`."""

    ndarray, ElementwiseKernel = ndarray, ElementwiseKernel
    __version__ = MANIFEST["cupy"]
    cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDeviceCount=lambda: 1),
        Device=lambda: SimpleNamespace(synchronize=lambda: None),
    )

    def __getattr__(self, name: str) -> Any:
        if name in MANIFEST["values"]:
            return getattr(np, name)
        if name in MANIFEST["ufuncs"]:
            return Ufunc(name)
        if name in MANIFEST["functions"]:
            f, parameters, joining = getattr(np, name), MANIFEST["functions"][name], name in JOINING
            return lambda *args, **kwargs: call(f, parameters, args, kwargs, joining=joining)
        raise AttributeError(f"CuPy has no {name!r}, or the stand-in must not hand it out")

    @property
    def linalg(self) -> SimpleNamespace:
        functions = {
            name: lambda *args, name=name, **kwargs: call(
                getattr(np.linalg, name), MANIFEST["linalg"][name], args, kwargs
            )
            for name in MANIFEST["linalg"]
        }
        return SimpleNamespace(**functions)

    @staticmethod
    def asarray(a: Any, dtype: Any = None) -> ndarray:
        """What lies on the device as it is, anything of the host copied there."""
        if isinstance(a, ndarray):
            return a if dtype in (None, a.dtype) else a.astype(dtype)
        COPIES.to_device += 1
        return ndarray(np.array(a, dtype))  # NumPy asks arrays in a list for __array__: refused

    @staticmethod
    def array(a: Any, dtype: Any = None) -> ndarray:
        return CUPY.asarray(a, dtype).copy()

    @staticmethod
    def empty(shape: Any, dtype: Any = float) -> ndarray:
        """Filled with NaN, so that reading what nobody wrote shows."""
        host = np.empty(shape, dtype)
        host.fill(np.nan if host.dtype.kind in "fc" else 77)
        return ndarray(host)

    @staticmethod
    def empty_like(a: ndarray, dtype: Any = None) -> ndarray:
        return Module.empty(a.shape, dtype or a.dtype)


CUPY = Module("cupy")
