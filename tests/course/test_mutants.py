"""The mutants of tests/mutation as students' answers: each is refused, and most are named."""

import inspect
import types
import warnings
from collections import Counter

import pytest

from minilora.course.check import judge
from minilora.course.exercises import EXERCISES

# Equal to the original for a student, whose gradients alone are judged.
TILES = "How many queries a tile has changes no gradient."
EQUAL = {
    "ops.attention_backward: tile = min(QUERY_TILE, T) if namespace(dy) is np else T → "
    "tile = T": TILES,
    "ops.attention_backward: tile = min(QUERY_TILE, T) if namespace(dy) is np else T → "
    "tile = min(QUERY_TILE, T) if namespace(dy) is not np else T": TILES,
    "ops.attention_backward: tile = min(QUERY_TILE, T) if namespace(dy) is np else T → "
    "tile = min(QUERY_TILE, K) if namespace(dy) is np else T": TILES,
}  # fmt: skip
NAMED = ("exact", "place", "dtype")


def answers(exercise, mutant):
    """The exercise's functions with the mutant's code, in a namespace of their own."""
    space = dict(vars(mutant.module))
    for name in (*exercise.helpers, *exercise.functions):
        own = inspect.unwrap(getattr(exercise.module, name))
        code = mutant.code if name == mutant.function else own.__code__
        space[name] = types.FunctionType(code, space, name, own.__defaults__)
        space[name].__kwdefaults__ = own.__kwdefaults__
    return {name: space[name] for name in exercise.functions}


@pytest.mark.slow
def test_every_mutant_is_refused_and_most_are_named(import_file):
    mutate = import_file("tests/mutation/mutate.py")
    of_place = {
        f"{e.module.__name__.rpartition('.')[2]}.{name}": e
        for e in EXERCISES.values()
        for name in (*e.functions, *e.helpers)
    }
    kinds, accepted = Counter(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in mutate.MODULES:
            for mutant in mutate.mutants_of(module):
                exercise = of_place.get(mutant.place)
                if exercise is None or exercise.name == "merging":
                    continue
                failure = judge(exercise, answers(exercise, mutant)).failure
                if failure is None:
                    accepted.append(mutant.name)
                kinds[failure.kind if failure else "accepted"] += 1
    unexplained = set(accepted) - set(mutate.EXPLAINED) - set(EQUAL)
    assert not unexplained, "\n".join(sorted(unexplained))
    assert kinds.total() > 900
    quiet = kinds.total() - kinds["accepted"] - kinds["error"]
    assert sum(kinds[kind] for kind in NAMED) >= 0.75 * quiet, kinds
    assert kinds["none"] <= 0.08 * quiet, kinds
