"""Classic mistakes, planted: each gets its own right sentence.

planted.txt has, for each exercise, changes of the plain solution: what is there (-), what the
student writes in its place (+), and the sentence (:), which a person has read.
"""

import runpy
from pathlib import Path

import pytest

from minilora.course.check import check
from minilora.course.exercises import EXERCISES
from minilora.course.skeleton import imports

PLAIN = runpy.run_path(str(Path(__file__).parent / "plain.py"))["PLAIN"]

AT_LEAST = {"lora": 20, "layer_norm": 20, "attention": 20}
QUICK = ("lora", "embedding")


def planted():
    found = {}
    lines = (Path(__file__).parent / "planted.txt").read_text(encoding="utf-8").split("\n")
    for line in lines:
        mark, text = line[:1], line[2:]
        if mark == "=":
            rows = found.setdefault(text.strip("= "), [])
        elif mark == "-":
            rows.append([text])
        elif mark in "+:" and mark:
            rows[-1].append(text)
    return found


PLANTED = planted()


def test_there_are_enough_and_no_two_get_the_same_sentence():
    assert list(PLANTED) == list(EXERCISES)
    for name, rows in PLANTED.items():
        sentences = [sentence for _, _, sentence in rows]
        assert len(rows) >= AT_LEAST.get(name, 10), name
        assert len(set(sentences)) == len(sentences), name


def told(name, old, new):
    """What a student is told for one change of the plain solution."""
    assert old in PLAIN[name], old
    source = "\n".join([*imports(EXERCISES[name]), PLAIN[name].replace(old, new)])
    failure = check(EXERCISES[name], source).failure
    if failure is None or failure.kind in ("error", "place", "dtype"):
        return failure and failure.what.splitlines()[0]
    return failure.sentence


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PLANTED]
)
def test_each_gets_its_sentence(name):
    wrong = [
        f"{old} → {new}\n    {found!r}\n    expected {sentence!r}"
        for old, new, sentence in PLANTED[name]
        if (found := told(name, old, new)) != sentence
    ]
    assert not wrong, "\n".join(wrong)
