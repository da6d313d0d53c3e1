"""The cases that an exercise is checked on: small whole numbers first, so that one can follow them.

A task says how the functions of an exercise are called in one situation: with frozen weights, say.
Its inputs are arrays, numbers and whatever else the call needs, by name; its outputs are gradients
by name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from minilora.backend import Array
from minilora.pairs import Pair, Sizes

Inputs: TypeAlias = dict[str, Any]
Outputs: TypeAlias = dict[str, Any]  # a gradient, or None where none is wanted
Functions: TypeAlias = Mapping[str, Callable[..., Any]]


class Malformed(Exception):
    """What a function returned is not what its docstring says: the sentence that says why."""


class Task(NamedTuple):
    """One way to call an exercise's functions: what they are given, and what they return.

    `call` raises Malformed where the result has another form. The calls are of these `sizes`, the
    smallest first.
    """

    make: Callable[[Any, Sizes], Inputs]
    call: Callable[[Functions, Inputs], Outputs]
    sizes: tuple[Sizes, ...]


class Case(NamedTuple):
    """One call: of a task, by its name, with these inputs."""

    name: str
    task: Task
    inputs: Inputs

    def outputs(self, functions: Functions) -> Outputs:
        """What the functions give."""
        return self.task.call(functions, self.inputs)


SIZES = (
    Sizes((1, 1), 1, 1, 1, 1, 1),
    Sizes((1, 1), 2, 1, 1, 2, 1),
    Sizes((1, 1), 1, 2, 1, 2, 1),
    Sizes((1, 2), 1, 1, 1, 2, 1),
    Sizes((1, 2), 2, 2, 1, 2, 1),
    Sizes((1, 2), 2, 3, 1, 3, 1),
    Sizes((2, 2), 2, 2, 2, 2, 1),
    Sizes((1, 5), 3, 2, 1, 3, 1),
    Sizes((3, 2), 3, 2, 2, 3, 2),
    Sizes((2, 3), 4, 3, 2, 5, 2),
    Sizes((3, 2), 3, 4, 2, 5, 3),
    Sizes((2, 3), 3, 3, 3, 3, 2),
)


class SmallIntegers:
    """A random generator whose normal numbers are whole ones from -2 to 2."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def standard_normal(self, size: Any = None) -> Array:
        """Whole numbers as float64."""
        return self.rng.integers(-2, 3, size=size).astype(np.float64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rng, name)


def whole_cases(tasks: Mapping[str, Task], seeds: int = 2) -> Iterator[Case]:
    """Cases of whole numbers of every task, the smallest first."""
    yield from _cases(tasks, SmallIntegers, range(seeds))


def normal_cases(tasks: Mapping[str, Task], seeds: Sequence[int] = (0,)) -> Iterator[Case]:
    """Cases of normal numbers, where two different formulas never agree by chance."""
    yield from _cases(tasks, np.random.default_rng, seeds)


def _cases(
    tasks: Mapping[str, Task], generator: Callable[[int], Any], seeds: Sequence[int]
) -> Iterator[Case]:
    for i in range(max(len(task.sizes) for task in tasks.values())):
        for seed in seeds:
            for name, task in tasks.items():
                if i < len(task.sizes):
                    rng = generator(1000 * i + seed)
                    yield Case(name, task, task.make(rng, task.sizes[i]))


def whole(rng: Any, shape: tuple[int, ...]) -> Array:
    """The generator's normal numbers."""
    return np.asarray(rng.standard_normal(shape))


# --- tasks of pairs ----------------------------------------------------------------------------


def pair_task(pair: Pair) -> Task:
    """The call of a pair's backward pass, with what its forward pass keeps."""
    backward = pair.backward.__name__
    names = argument_names(pair)
    dy = next(iter(inspect.signature(pair.backward).parameters))

    def make(rng: Any, sizes: Sizes) -> Inputs:
        arguments, constants = pair.make(rng, sizes)
        y, _ = pair.forward(*arguments, **constants)
        return {
            **dict(zip(names, arguments, strict=True)),
            **constants,
            dy: whole(rng, np.shape(y)),
        }

    def call(functions: Functions, inputs: Inputs) -> Outputs:
        constants = {k: v for k, v in inputs.items() if k not in names and k != dy}
        _, cache = pair.forward(*(inputs[name] for name in names), **constants)
        gradients = functions[backward](inputs[dy], pair.thin(cache))
        return named(gradients, [f"d{name}" for name in names])

    return Task(make, call, SIZES if pair.sizes == Sizes() else (pair.sizes,))


def argument_names(pair: Pair) -> list[str]:
    """The names of the arguments that have a gradient."""
    return list(inspect.signature(pair.forward).parameters)[: len(pair.arguments)]


def named(result: Any, names: Sequence[str]) -> Outputs:
    """The results of a function by their names; Malformed where they are not a tuple of so many."""
    listed = f"({', '.join(names)}{',' if len(names) == 1 else ''})"
    if not isinstance(result, tuple):
        article = "None" if result is None else f"a value of type {type(result).__name__}"
        one = " `return dx` returns an array, `return (dx,)` a tuple of one." * (len(names) == 1)
        raise Malformed(f"It must return the tuple {listed}, but it returns {article}.{one}")
    if len(result) != len(names):
        raise Malformed(
            f"It must return {len(names)} results, {listed}, but it returns {len(result)}."
        )
    return dict(zip(names, result, strict=True))


# --- the smallest case -------------------------------------------------------------------------


def shrunk(case: Case, fails: Callable[[Case], bool], tries: int = 150) -> Case:
    """The case with as many zeros and ones in its arrays as it still fails with."""
    for name, array in case.inputs.items():
        if name == "mask" or not (isinstance(array, np.ndarray) and array.dtype.kind == "f"):
            continue
        for index in np.ndindex(array.shape):
            for value in (0.0, 1.0):
                old = case.inputs[name]
                if tries == 0 or old[index] in (0.0, value):
                    break
                smaller = old.copy()
                smaller[index] = value
                tried = case._replace(inputs={**case.inputs, name: smaller})
                tries -= 1
                if fails(tried):
                    case = tried
                    break
    return case


# --- in print ----------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value on one line: whole numbers without a point, others to five digits."""
    if value is None or isinstance(value, str | bool):
        return str(value)
    if isinstance(value, slice):
        return f"{value.start}:{value.stop}"
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biuf":
        return f"an array of {value.dtype}"
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return f"a {type(value).__name__}"
    if array.size > 40:
        return f"an array of shape {array.shape}"
    return _listed(array)


def _listed(array: Array) -> str:
    if array.ndim:
        return f"[{', '.join(_listed(row) for row in array)}]"
    number = float(array)
    if not math.isfinite(number):
        return str(number)
    return f"{0.0 if abs(number) < 1e-12 else number:.5g}"


def listed_inputs(case: Case) -> list[str]:
    """The inputs of a case, a line each."""
    return [f"{name} = {shown(value)}" for name, value in case.inputs.items()]
