"""Every small mistake in a backward pass is noticed: see mutate.py, which also runs on its own."""

import ast
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def mutate(import_file):
    return import_file("tests/mutation/mutate.py")


def codes(mutate):
    """The code of every function that is changed, by its name."""
    found = {}
    for module in mutate.MODULES:
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        for name in mutate.to_break(module, tree):
            _, function = mutate.owner_and_function(module, name)
            found[f"{module.__name__}.{name}"] = function.__code__
    return found


@pytest.fixture(scope="module")
def before(mutate):
    return codes(mutate)


@pytest.fixture(scope="module")
def results(mutate, before):
    return list(mutate.results())


def test_the_code_as_it_is_passes_every_check(mutate):
    """Or else a mutant would be killed by a check that never passes."""

    def unchanged(module: types.ModuleType) -> Iterator[object]:
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        for name, function in mutate.to_break(module, tree).items():
            function.decorator_list = []
            yield mutate.Mutant(module, name, "nothing", mutate.compiled(name, function))

    fates = {result.mutant.name: result.fate for result in mutate.results(make=unchanged)}
    assert len(fates) > 30
    assert set(fates.values()) == {"survived"}, fates


def test_every_backward_pass_is_mutated(mutate, results):
    mutated = {result.mutant.place for result in results}
    for module in mutate.MODULES:
        room = module.__name__.rpartition(".")[2]
        own = {
            f"{room}.{name}"
            for name, f in vars(module).items()
            if getattr(f, "__module__", "") == module.__name__
        }
        assert {place for place in own if place.endswith("_backward")} <= mutated
        assert any(place.startswith(f"{room}.") for place in mutated), room
    helpers = {"ops.split_heads", "ops.rows", "tiles.entrywise"}
    kept = {"keep.without", "keep.unwanted", "ops.GELUCache.output", "network.loss_and_grads"}
    assert helpers | kept <= mutated


def test_the_package_is_left_as_it_was(mutate, before, results):
    assert all(getattr(module, name) > small for module, name, small in mutate.TILES)
    assert codes(mutate) == before


def test_at_least_98_percent_are_killed(mutate, results):
    of_all, of_those_that_raise_nothing = mutate.shares(results)
    assert len(results) > 1500
    assert of_all >= 0.98
    assert of_those_that_raise_nothing >= 0.95


def test_every_survivor_is_explained(mutate, results):
    survivors = {result.mutant.name for result in results if result.fate == "survived"}
    unexplained = survivors - set(mutate.EXPLAINED)
    assert not unexplained, "\n".join(["no check notices:", *sorted(unexplained)])
    names = [result.mutant.name for result in results]
    stale = [name for name in mutate.EXPLAINED if names.count(name) != 1]
    assert not stale, "\n".join(["explained, but not one mutant:", *stale])


def test_a_word_that_is_in_no_name_is_said_to_be(mutate):
    with pytest.raises(SystemExit, match="no function to break has 'rsm' in its name"):
        mutate.main(["rsm"])


def test_the_readme_gives_the_numbers(results):
    killed = [result for result in results if result.fate != "survived"]
    text = " ".join((HERE.parents[1] / "README.md").read_text(encoding="utf-8").split())
    of_them = f"of {len(results):,} mutants {len(killed):,} are noticed"
    assert f"{of_them}, and each of the {len(results) - len(killed)} others" in text
