"""The matrix products of a computation: found by running it once, then repeated alone.

Their time is a lower bound on that of the computation. The products are recorded, not listed by
hand: the computation runs once on arrays that log every matmul. Each is then repeated with operands
and an output allocated beforehand, so that only products are timed: weights are the model's own,
everything else is contiguous, in buffers that products of equal shapes share.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import numpy as np

from minilora.backend import Array, namespace, to_device
from minilora.tree import Tree, flatten, map_leaves
from minilora.workers import Workers


class Operand(NamedTuple):
    """A matrix or a stack of matrices; `array` is None unless it is a weight or a view of one."""

    shape: tuple[int, ...]
    transposed: bool  # its columns are contiguous
    dtype: np.dtype[Any]
    array: Array | None


class Product(NamedTuple):
    """One call of matmul, and the name of the operation that made it."""

    operation: str
    a: Operand
    b: Operand

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's shape."""
        stack = np.broadcast_shapes(self.a.shape[:-2], self.b.shape[:-2])
        return (*stack, self.a.shape[-2], self.b.shape[-1])

    @property
    def flops(self) -> int:
        """Multiplications and additions: two for each entry of the result and inner index."""
        return 2 * int(np.prod(self.shape, dtype=np.int64)) * self.a.shape[-1]


# --- recording ---------------------------------------------------------------------------------


class Log:
    """The products of each item of `map`, in order."""

    def __init__(self, weights: Tree, operation: Callable[[], str]) -> None:
        self.items: list[list[Product]] = []
        self.operation = operation
        self.weights = {id(owner(leaf)) for leaf in flatten(weights).values()}

    def add(self, a: Array, b: Array) -> None:
        self.items[-1].append(Product(self.operation(), self.operand(a), self.operand(b)))

    def operand(self, x: Array) -> Operand:
        x = x.view(np.ndarray)
        transposed = x.strides[-2] < x.strides[-1]
        return Operand(x.shape, transposed, x.dtype, x if id(owner(x)) in self.weights else None)


def owner(x: Any) -> Any:
    """The array whose memory `x` is a view of."""
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


class Recorded(np.ndarray):
    """An array that computes like any other and logs its matrix products."""

    log: ClassVar[Log | None] = None

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = (), **kwargs: Any
    ) -> Any:
        if ufunc is np.matmul and Recorded.log is not None:
            Recorded.log.add(*inputs)
        if out:
            kwargs["out"] = tuple(plain(x) for x in out)
        y = getattr(ufunc, method)(*(plain(x) for x in inputs), **kwargs)
        if out:
            return out[0] if len(out) == 1 else out
        return y.view(Recorded) if isinstance(y, np.ndarray) else y

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        products = [np.dot, np.tensordot, np.inner, np.vdot]
        if func is np.einsum:
            operands = args[0].partition("->")[0].split(",")
            products += [func] if len(set(operands)) > 1 else []  # else it is entry by entry
        if func in products:
            raise TypeError(f"np.{func.__name__} is a product that is not recorded; use matmul")
        return super().__array_function__(func, types, args, kwargs)


def plain(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, Recorded) else x


class RecordingWorkers(Workers):
    """Workers that run one item after the other and log the products of each."""

    def map(self, f: Callable[..., Any], *items: Any) -> Iterator[Any]:
        for arguments in zip(*items, strict=True):
            assert Recorded.log is not None
            Recorded.log.items.append([])
            yield f(*arguments)


@contextmanager
def recording(weights: Tree, operation: Callable[[], str] = lambda: "") -> Iterator[Log]:
    """In the block, the log of all products of Recorded arrays; its first item is outside `map`.

    `weights` are the arrays that Recorded ones are views of; `operation` names the current one.
    """
    Recorded.log = log = Log(weights, operation)
    log.items.append([])
    try:
        yield log
    finally:
        Recorded.log = None


def recorded(tree: Tree) -> Tree:
    """The same arrays, as Recorded."""
    return map_leaves(lambda x: x.view(Recorded), tree)


# --- repeating ---------------------------------------------------------------------------------


class Ready(NamedTuple):
    """A product with its memory."""

    operation: str
    a: Array
    b: Array
    out: Array


def prepare(items: list[list[Product]], device: str) -> list[list[Ready]]:
    """The items' products with their memory on a device; buffers are shared within an item."""
    rng = np.random.default_rng(0)
    on_device: dict[int, Array] = {}

    def weight(x: Array) -> Array:
        return on_device.setdefault(id(x), to_device(x, device))

    def prepare_item(products: list[Product]) -> list[Ready]:
        buffers: dict[Any, Array] = {}

        def buffer(role: str, shape: tuple[int, ...], transposed: bool, dtype: Any) -> Array:
            key = role, shape, transposed, dtype
            if key not in buffers:
                if transposed:
                    shape = (*shape[:-2], shape[-1], shape[-2])
                x = to_device(rng.standard_normal(shape, np.float32).astype(dtype), device)
                buffers[key] = x.swapaxes(-1, -2) if transposed else x
            return buffers[key]

        def operand(role: str, x: Operand) -> Array:
            if x.array is not None:
                return weight(x.array)
            return buffer(role, x.shape, x.transposed, x.dtype)

        return [
            Ready(
                p.operation,
                operand("a", p.a),
                operand("b", p.b),
                buffer("out", p.shape, False, p.a.dtype),
            )
            for p in products
        ]

    return [prepare_item(products) for products in items if products]


def repeat(products: list[Ready]) -> None:
    """Every product once."""
    for _, a, b, out in products:
        namespace(a).matmul(a, b, out=out)


def repeat_timed(products: list[Ready], wait: Callable[[], None]) -> dict[str, float]:
    """Every product once: the seconds by operation, a `wait` after each product included."""
    seconds: dict[str, float] = {}
    for operation, a, b, out in products:
        start = time.perf_counter()
        namespace(a).matmul(a, b, out=out)
        wait()
        seconds[operation] = seconds.get(operation, 0.0) + time.perf_counter() - start
    return seconds
