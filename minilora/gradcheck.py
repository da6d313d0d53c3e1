"""Numeric derivatives: the independent checker of every hand-written backward pass.

This module imports nothing of the package, so an error there cannot hide here. A gradient is
compared with central differences of the forward pass in float64, in two ways:

- entry by entry: one number per entry of an argument, which shows *where* a gradient is wrong;
- along one random direction through all arguments at once: one number that depends on every entry.

The output gradient dy is always random. With dy = 1 many wrong gradients look right: the softmax's
true gradient is then zero, and a layer norm without its third term passes.

Two kinds of correct gradients fail the check: those of a function that curves strongly within the
difference step, such as softmax(300 x), and those of a function whose intermediate values are much
larger than its outputs, so that rounding dominates: a layer norm of entries near 100,000, say.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Output: TypeAlias = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""Computes y from the arguments that are changed, by name; the others keep their values."""

DIRECTION = "(direction)"  # the name of the check along a random direction
# The truncation error, h⁴, equals the rounding error, ε / h, near h = ε^(1/5), and at a smaller h
# for a function of stronger curvature. With a power of two x ± h is nearly always exact, so h need
# not grow with x.
STEP = 2.0**-12
ROUNDING = 4.0 * float(np.finfo(np.float64).eps)  # error of an output of size 1, a few operations
PAIR_TOLERANCE = 1e-8  # for one pair; a backward pass computed in float32 exceeds it
TOLERANCE = 1e-6  # for a whole model: every layer adds to the rounding error of its loss


class GradientError(AssertionError):
    """A wrong gradient, or a pair that breaks the law of the pairs (see CONTRIBUTING.md)."""


class Check(NamedTuple):
    """The comparison of one argument's gradient with its numeric derivative."""

    name: str  # the argument, the path of a tree's leaf, or DIRECTION
    error: float  # the largest relative error of the entries compared
    tolerance: float  # the largest error allowed: PAIR_TOLERANCE, or TOLERANCE for a tree
    entries: int  # how many entries were compared
    worst: tuple[int, ...]  # the index of the entry with the largest error
    analytic: float  # the gradient there, as the backward pass gives it
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
    thin: Callable[[Any], Any] | None = None,
) -> list[Check]:
    """Compares every gradient of a forward/backward pair with central differences.

    Arguments are float64. `entries` limits the entries compared per argument (a random sample;
    None: all), `frozen` names the arguments whose gradient must be None, and `thin` turns the cache
    of the forward pass into that given to the backward pass, with None for what only frozen
    arguments need. Raises `GradientError` if the pair breaks the law of the pairs (a gradient is
    missing or has another shape or dtype than its argument, or a pass changes its inputs) and if an
    argument or the output is not float64; errors above a tolerance are left to `assert_close`.
    """
    constants = dict(constants or {})
    rng = np.random.default_rng(seed)
    names = list(inspect.signature(forward).parameters)[: len(arguments)]
    given = dict(zip(names, arguments, strict=True))
    _require_float64(given)

    before = _snapshot((arguments, constants))
    y, cache = forward(*arguments, **constants)
    _require(_same(before, (arguments, constants)), "the forward pass changed an argument")
    _require_float64({"the output": y})
    dy = np.asarray(rng.standard_normal(np.shape(y)))
    if thin is not None:
        cache = thin(cache)

    before = _snapshot((arguments, constants, dy, cache))
    gradients = backward(dy, cache)
    gradients_before = _snapshot(gradients)
    again = backward(dy, cache)
    _require(
        _same(before, (arguments, constants, dy, cache)),
        "the backward pass changed dy, an argument or its cache",
    )
    _require(_same(gradients_before, again), "the backward pass gave another result when repeated")

    _require(isinstance(gradients, tuple), "the backward pass must return a tuple")
    _require(
        len(gradients) == len(names),
        f"{len(gradients)} gradients for {len(names)} arguments {names}",
    )
    wanted = {}
    for name, gradient in zip(names, gradients, strict=True):
        if name in frozen:
            _require(gradient is None, f"d{name} must be None: {name} is frozen")
        else:
            wanted[name] = gradient

    def output(changed: Mapping[str, np.ndarray]) -> np.ndarray:
        return forward(*{**given, **changed}.values(), **constants)[0]

    return _compare(output, dy, given, wanted, rng, entries, PAIR_TOLERANCE)


def check_tree(
    loss: Callable[[dict[str, np.ndarray]], float],
    tree: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
    entries: int | None = None,
) -> list[Check]:
    """Compares the gradients of a scalar loss in every leaf of a flat tree (path to array).

    `entries` limits the entries compared per leaf. Raises `GradientError` if the paths of tree and
    gradients differ, if a gradient has another shape or dtype than its leaf, and if a leaf or the
    loss is not float64.
    """
    difference = sorted(set(tree) ^ set(gradients))
    _require(not difference, f"leaves and gradients differ in {difference}")

    def output(changed: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.asarray(loss({**tree, **changed}))

    _require_float64({**tree, "the loss": output({})})
    rng = np.random.default_rng(seed)
    in_order = {path: gradients[path] for path in tree}
    return _compare(output, np.array(1.0), tree, in_order, rng, entries, TOLERANCE)


def assert_close(checks: Sequence[Check], tolerance: float | None = None) -> None:
    """Raises `GradientError` that shows the worst entry of each check above its tolerance.

    A `tolerance` replaces those of the checks.
    """
    wrong = []
    for c in checks:
        allowed = c.tolerance if tolerance is None else tolerance
        if not c.error <= allowed:
            wrong.append(
                f"d{c.name}{list(c.worst) if c.worst else ''} is {c.analytic:.12g}, "
                f"central differences give {c.numeric:.12g} (relative error {c.error:.1e}, "
                f"{c.entries} entries compared, tolerance {allowed:.0e})"
            )
    if wrong:
        raise GradientError("\n".join(wrong))


def max_error(checks: Sequence[Check]) -> float:
    """The largest relative error of the checks."""
    return max(check.error for check in checks)


def _compare(
    output: Output,
    dy: np.ndarray,
    given: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    rng: np.random.Generator,
    entries: int | None,
    tolerance: float,
) -> list[Check]:
    """Checks every gradient entry by entry, then all together along one random direction."""
    checks = []
    for name, gradient in gradients.items():
        x = given[name]
        _require(gradient is not None, f"d{name} is None, but {name} is not frozen")
        _require(
            np.shape(gradient) == x.shape and gradient.dtype == x.dtype,
            f"d{name} is {gradient.dtype}{np.shape(gradient)}, but {name} is {x.dtype}{x.shape}",
        )
        index = _chosen(x, rng, entries)
        numeric, rounding = np.array([_derivative(output, dy, name, x, i) for i in index]).T
        analytic = np.array([gradient[i] for i in index])
        error = relative_error(analytic, numeric, rounding)
        worst = int(np.argmax(error))
        values = float(analytic[worst]), float(numeric[worst])
        checks.append(
            Check(name, float(error[worst]), tolerance, len(index), index[worst], *values)
        )
    return [*checks, _along_a_direction(output, dy, given, gradients, rng, tolerance)]


def _along_a_direction(
    output: Output,
    dy: np.ndarray,
    given: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    rng: np.random.Generator,
    tolerance: float,
) -> Check:
    """Checks all gradients with one number, the derivative along a random direction of length 1."""
    direction = {name: rng.standard_normal(given[name].shape) for name in gradients}
    length = np.sqrt(sum(np.sum(v * v) for v in direction.values()))
    direction = {name: v / length for name, v in direction.items()}
    products = np.array([np.sum(gradients[name] * v) for name, v in direction.items()])
    along, rounding = _central(
        lambda t: output({name: given[name] + t * v for name, v in direction.items()}), dy
    )
    total = float(np.sum(products))
    floor = 1e-2 * float(np.sum(np.abs(products)))  # the products may nearly cancel
    error = relative_error(np.array([total]), np.array([along]), rounding, floor)
    return Check(DIRECTION, float(error[0]), tolerance, 1, (), total, along)


def _chosen(x: np.ndarray, rng: np.random.Generator, entries: int | None) -> list[tuple[int, ...]]:
    """The indices of the entries to compare: all of them, or a random sample."""
    chosen = np.arange(x.size)
    if entries is not None and entries < x.size:
        chosen = np.sort(rng.choice(x.size, entries, replace=False))
    return [tuple(int(i) for i in np.unravel_index(flat, x.shape)) for flat in chosen]


def relative_error(
    analytic: np.ndarray, numeric: np.ndarray, rounding: np.ndarray | float, floor: float = 0.0
) -> np.ndarray:
    """|analytic - numeric| over the larger of the two, entry by entry; infinite if not finite.

    The divisor is at least `floor`, and at least a hundredth of the largest numeric entry: at a
    tolerance of 1e-8 an entry of any size may be wrong by 1e-10 of the largest. It is also at least
    rounding / PAIR_TOLERANCE, so that an error no larger than `rounding`, which a difference cannot
    resolve, counts as PAIR_TOLERANCE at most.
    """
    floor = max(floor, 1e-2 * float(np.max(np.abs(numeric))))
    scale = np.maximum(np.abs(analytic), np.abs(numeric))
    scale = np.maximum(scale, np.maximum(floor, rounding / PAIR_TOLERANCE))
    with np.errstate(invalid="ignore"):
        error = np.abs(analytic - numeric) / scale
    return np.where(np.isfinite(error), error, np.inf)


def _derivative(
    output: Output,
    dy: np.ndarray,
    name: str,
    x: np.ndarray,
    index: tuple[int, ...],
) -> tuple[float, float]:
    """d<dy, y>/dx for one entry of the argument x called `name`, and its rounding error."""

    def moved(t: float) -> np.ndarray:
        changed = x.copy()
        changed[index] += t
        return output({name: changed})

    return _central(moved, dy)


def _central(f: Callable[[float], np.ndarray], dy: np.ndarray) -> tuple[float, float]:
    """d<dy, f(t)>/dt at 0 by the fourth-order central difference, and its rounding error.

    The truncation error is O(h⁴). The outputs are subtracted before they are multiplied by dy and
    summed, so outputs that do not depend on t cancel exactly. Each of the others has a rounding
    error of about ε|y|, which the division by h magnifies; as dy is random, the squares of these
    errors add. One output of size 4 is added for the rounding of intermediate values when the
    output itself is small: of the logits when the loss is near 0, say.
    """
    h, y = STEP, f(STEP)
    change = 8.0 * (y - f(-h)) - (f(2 * h) - f(-2 * h))
    derivative = float(np.sum(dy * change)) / (12.0 * h)
    size = np.hypot(4.0 * np.max(np.abs(dy)), np.linalg.norm((dy * y)[change != 0.0]))
    return derivative, float(size) * ROUNDING / h


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise GradientError(message)


def _require_float64(values: Mapping[str, Any]) -> None:
    for name, x in values.items():
        dtype = np.asarray(x).dtype
        _require(dtype == np.float64, f"central differences need float64; {name} is {dtype}")


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
