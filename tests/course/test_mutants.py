"""Every function of an exercise, broken in every small way: each is refused, and most are named."""

import inspect
import types
import warnings
from collections import Counter
from pathlib import Path

import pytest

from minilora.course.check import judge
from minilora.course.exercises import EXERCISES

# The mutants (-) that are equal to the original for a student, whose results alone are judged, and
# why (=).
EQUAL = {
    line[2:]
    for line in (Path(__file__).parent / "equal.txt").read_text(encoding="utf-8").splitlines()
    if line.startswith("- ")
}
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


def judged(mutate):
    """Every mutant of every exercise with its failure, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for exercise in EXERCISES.values():
            for mutant in mutate.mutants_of(
                exercise.module, *exercise.functions, *exercise.helpers
            ):
                yield exercise, mutant, judge(exercise, answers(exercise, mutant)).failure


@pytest.mark.slow
def test_every_mutant_is_refused_and_most_are_named(import_file):
    mutate = import_file("tests/mutation/mutate.py")
    kinds, accepted, of_exercise = Counter(), set(), Counter()
    for exercise, mutant, failure in judged(mutate):
        if failure is None:
            accepted.add(mutant.name)
        kinds[failure.kind if failure else "accepted"] += 1
        of_exercise[exercise.name] += 1
    unexplained = accepted - set(mutate.EXPLAINED) - EQUAL
    assert not unexplained, "\n".join(sorted(unexplained))
    stale = EQUAL - accepted
    assert not stale, "\n".join(["explained, but refused or no mutant:", *sorted(stale)])
    assert set(of_exercise) == set(EXERCISES)
    assert kinds.total() > 1300
    quiet = kinds.total() - kinds["accepted"] - kinds["error"]
    assert sum(kinds[kind] for kind in NAMED) >= 0.75 * quiet, kinds
    assert kinds["none"] <= 0.08 * quiet, kinds
