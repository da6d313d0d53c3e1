"""Numeric derivatives: the independent witness of every hand-written backward pass.

This module imports nothing of the package, so an error there cannot hide here. A gradient is held
against central differences of the forward pass in float64, in two ways:

- entry by entry: one number per entry of an argument, which says *where* a gradient is wrong;
- along one random direction through all arguments at once, which sees every entry in one number.

The output gradient dy is always random. With dy = 1 many wrong gradients look right: the softmax's
true gradient is then zero, and a layer norm without its third term passes.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

DIRECTION = "(direction)"  # the name of the check along a random direction
STEP = 3e-4  # truncation, h⁴, and rounding, ε / h, meet near h = ε^(1/5)
TOLERANCE = 1e-6


class GradientError(AssertionError):
    """A gradient that is wrong, or a pair that breaks the law of the pairs."""


class Check(NamedTuple):
    """The comparison of one argument's gradient with its numeric derivative."""

    name: str  # the argument, the path of a tree's leaf, or DIRECTION
    error: float  # the largest relative error of the entries compared
    entries: int  # how many entries were compared
    worst: tuple[int, ...]  # the index of the entry with the largest error
    analytic: float  # the backward pass' value there
    numeric: float  # the central difference there


def check_pair(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    arguments: Sequence[np.ndarray],
    constants: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    entries: int | None = None,
    frozen: Sequence[str] = (),
) -> list[Check]:
    """Compares every gradient of a forward/backward pair with central differences.

    `entries` limits the entries compared per argument (a seeded sample; None: all of them), and
    `frozen` names the arguments whose gradient must be None. Raises `GradientError` when the pair
    breaks its law: a gradient missing, of another shape or dtype than its argument, or a pass that
    changes what it was given.
    """
    constants = dict(constants or {})
    rng = np.random.default_rng(seed)
    names = list(inspect.signature(forward).parameters)[: len(arguments)]

    before = _snapshot((arguments, constants))
    y, cache = forward(*arguments, **constants)
    _require(_same(before, (arguments, constants)), "the forward changed an argument")
    dy = np.asarray(rng.standard_normal(np.shape(y)), y.dtype)

    before = _snapshot((arguments, constants, dy, cache))
    gradients = backward(dy, cache)
    gradients_before = _snapshot(gradients)
    again = backward(dy, cache)
    _require(
        _same(before, (arguments, constants, dy, cache)),
        "the backward changed dy, an argument or its cache",
    )
    _require(_same(gradients_before, again), "the backward gave another result the second time")

    _require(isinstance(gradients, tuple), "the backward must return a tuple")
    _require(
        len(gradients) == len(names),
        f"{len(gradients)} gradients for {len(names)} arguments {names}",
    )
    given = dict(zip(names, arguments, strict=True))
    wanted = {}
    for name, gradient in zip(names, gradients, strict=True):
        if name in frozen:
            _require(gradient is None, f"d{name} must be None: {name} is frozen")
        else:
            wanted[name] = gradient

    def output(changed: Mapping[str, np.ndarray]) -> np.ndarray:
        return forward(*{**given, **changed}.values(), **constants)[0]

    return _compare(output, dy, given, wanted, rng, entries)


def check_tree(
    loss: Callable[[dict[str, np.ndarray]], float],
    tree: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
    entries: int | None = None,
) -> list[Check]:
    """Compares the gradients of a scalar loss in every leaf of a flat tree (path to array).

    `entries` limits the entries compared per leaf. Raises `GradientError` when the paths of tree
    and gradients differ, or a gradient has another shape or dtype than its leaf.
    """
    difference = sorted(set(tree) ^ set(gradients))
    _require(not difference, f"leaves and gradients differ in {difference}")

    def output(changed: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.asarray(loss({**tree, **changed}))

    rng = np.random.default_rng(seed)
    in_order = {path: gradients[path] for path in tree}
    return _compare(output, np.array(1.0), tree, in_order, rng, entries)


def assert_close(checks: Sequence[Check], tolerance: float = TOLERANCE) -> None:
    """Raises `GradientError` that shows the worst entry of each argument above the tolerance."""
    wrong = [check for check in checks if not check.error <= tolerance]
    if wrong:
        raise GradientError(
            "\n".join(
                f"d{c.name}{list(c.worst) if c.worst else ''} is {c.analytic:.12g}, "
                f"central differences give {c.numeric:.12g} (relative error {c.error:.1e}, "
                f"{c.entries} entries compared, tolerance {tolerance:.0e})"
                for c in wrong
            )
        )


def max_error(checks: Sequence[Check]) -> float:
    """The largest relative error of the checks."""
    return max(check.error for check in checks)


def _compare(
    output: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    dy: np.ndarray,
    given: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    rng: np.random.Generator,
    entries: int | None,
) -> list[Check]:
    """Checks every gradient entry by entry, then all together along one random direction."""
    floor = 1e-4 * float(np.sum(np.abs(dy * output({}))))
    checks = []
    for name, gradient in gradients.items():
        x = given[name]
        _require(gradient is not None, f"d{name} is None, but {name} is not frozen")
        _require(
            np.shape(gradient) == x.shape and gradient.dtype == x.dtype,
            f"d{name} is {gradient.dtype}{np.shape(gradient)}, but {name} is {x.dtype}{x.shape}",
        )
        chosen = np.arange(x.size)
        if entries is not None and entries < x.size:
            chosen = np.sort(rng.choice(x.size, entries, replace=False))
        index = [tuple(int(i) for i in np.unravel_index(flat, x.shape)) for flat in chosen]
        numeric = np.array([_derivative(output, dy, name, x, i) for i in index])
        analytic = np.array([gradient[i] for i in index])
        error = relative_error(analytic, numeric, floor)
        worst = int(np.argmax(error))
        checks.append(
            Check(
                name, float(error[worst]), len(index), index[worst], analytic[worst], numeric[worst]
            )
        )

    direction = {name: rng.standard_normal(given[name].shape) for name in gradients}
    length = np.sqrt(sum(np.sum(v * v) for v in direction.values()))
    direction = {name: v / length for name, v in direction.items()}
    products = np.array([np.sum(gradients[name] * v) for name, v in direction.items()])
    along = _central(
        lambda t: output({name: given[name] + t * v for name, v in direction.items()}), dy, STEP
    )
    floor = max(floor, 1e-2 * float(np.sum(np.abs(products))))
    total = float(np.sum(products))
    error = relative_error(np.array([total]), np.array([along]), floor)
    checks.append(Check(DIRECTION, float(error[0]), 1, (), total, along))
    return checks


def relative_error(analytic: np.ndarray, numeric: np.ndarray, floor: float) -> np.ndarray:
    """|analytic - numeric| over the larger of both, entry by entry; infinite where not finite.

    The divisor is at least a hundredth of the largest numeric entry and at least `floor` (what the
    differences can resolve), so that a gradient of zero is compared absolutely and a small entry
    still counts: at a tolerance of 1e-6, an error of 1e-8 of the argument's largest gradient.
    """
    scale = np.maximum(np.abs(analytic), np.abs(numeric))
    scale = np.maximum(scale, max(1e-2 * float(np.max(np.abs(numeric))), floor, 1e-300))
    with np.errstate(invalid="ignore"):
        error = np.abs(analytic - numeric) / scale
    return np.where(np.isfinite(error), error, np.inf)


def _derivative(
    output: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    dy: np.ndarray,
    name: str,
    x: np.ndarray,
    index: tuple[int, ...],
) -> float:
    """The derivative of <dy, y> in one entry of the argument `name`."""

    def moved(t: float) -> np.ndarray:
        changed = x.copy()
        changed[index] += t
        return output({name: changed})

    return _central(moved, dy, STEP * max(1.0, abs(float(x[index]))))


def _central(f: Callable[[float], np.ndarray], dy: np.ndarray, h: float) -> float:
    """d<dy, f(t)>/dt at 0 by the fourth-order central difference; truncation is O(h^4).

    The outputs are subtracted before they are weighted with dy and summed, so that outputs which do
    not depend on t cancel exactly.
    """
    inner = f(h) - f(-h)
    outer = f(2 * h) - f(-2 * h)
    return float(np.sum(dy * (8.0 * inner - outer))) / (12.0 * h)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise GradientError(message)


def _leaves(value: Any) -> Iterator[np.ndarray]:
    """Every array inside nested tuples, lists and dicts."""
    if isinstance(value, np.ndarray | np.generic):
        yield np.asarray(value)
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from _leaves(child)
    elif isinstance(value, tuple | list):
        for child in value:
            yield from _leaves(child)


def _snapshot(value: Any) -> list[np.ndarray]:
    return [leaf.copy() for leaf in _leaves(value)]


def _same(before: list[np.ndarray], value: Any) -> bool:
    after = list(_leaves(value))
    return len(before) == len(after) and all(
        np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        for a, b in zip(before, after, strict=True)
    )
