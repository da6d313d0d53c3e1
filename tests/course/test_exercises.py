"""The exercises: their files, what full marks are given for, and what is refused."""

import ast
import inspect
import runpy
from pathlib import Path

import pytest

from minilora.course import diagnosis
from minilora.course.check import UNWRITTEN, check, judge
from minilora.course.diagnosis import Guess
from minilora.course.exercises import EXERCISES, tags
from minilora.course.puzzles import ALL, PUZZLES
from minilora.course.skeleton import HINTS, imports, is_unpacking, skeleton, write_skeletons
from minilora.errors import MiniloraError

PLAIN = runpy.run_path(str(Path(__file__).parent / "plain.py"))["PLAIN"]

ROOT = Path(__file__).parents[2]
each = pytest.mark.parametrize("exercise", ALL.values(), ids=lambda e: e.name)


def own_source(exercise):
    """A student's file with the package's own functions in it, helpers and all."""
    names = (*exercise.helpers, *exercise.functions)
    functions = [inspect.unwrap(getattr(exercise.module, name)) for name in names]
    sources = [inspect.getsource(f).removeprefix("@entrywise\n") for f in functions]
    return "\n".join(["from __future__ import annotations", *imports(exercise), "", *sources])


@each
def test_the_package_s_own_bodies_score_full_marks(exercise):
    verdict = check(exercise, own_source(exercise))
    assert verdict.failure is None, verdict.failure.text()
    assert verdict.points == verdict.max_points == len(exercise.gradients())


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_solution_scores_full_marks(name):
    exercise = EXERCISES[name]
    verdict = check(exercise, "\n".join([*imports(exercise), PLAIN[name]]))
    assert verdict.failure is None, verdict.failure.text()


def test_every_exercise_has_a_plain_solution():
    assert list(PLAIN) == list(EXERCISES)


@each
def test_a_skeleton_is_refused_as_not_written(exercise):
    verdict = check(exercise, skeleton(exercise))
    assert verdict.failure.kind == "unwritten"
    assert verdict.failure.text() == f"{UNWRITTEN}."
    assert verdict.points == 0


@pytest.mark.parametrize("hints", HINTS)
@each
def test_no_line_of_a_body_is_in_a_skeleton(exercise, hints):
    given = {line.strip() for line in skeleton(exercise, hints).splitlines()}
    for name in (*exercise.functions, *exercise.helpers):
        (function,) = ast.parse(
            inspect.getsource(inspect.unwrap(getattr(exercise.module, name)))
        ).body
        for statement in function.body[1:]:
            if not is_unpacking(statement):
                lines = {line.strip() for line in ast.unparse(statement).splitlines()}
                assert not lines & given, name


@each
def test_a_skeleton_names_its_page_which_exists_and_its_equations(exercise):
    text = skeleton(exercise)
    assert exercise.page in text
    assert (ROOT / exercise.page).is_file()
    for tag, _ in tags(exercise):
        assert f"[{tag}]" in text
    assert "[LORA.4] d(xA) = s dy Bᵀ" in skeleton(EXERCISES["lora"], "equations")
    assert "LORA.4" not in skeleton(EXERCISES["lora"], "none")


def test_the_course_is_in_an_order_in_which_it_can_be_done():
    done = set()
    for exercise in ALL.values():
        assert set(exercise.needs) <= done, exercise.name
        done.add(exercise.name)
    assert len(PUZZLES) >= 10


def test_nothing_of_the_student_s_is_overwritten(tmp_path):
    mine = tmp_path / "lora.py"
    mine.write_text("mine", encoding="utf-8")
    written = write_skeletons(tmp_path, [EXERCISES["lora"], EXERCISES["gelu"]], "tags")
    assert written == {"lora": False, "gelu": True}
    assert mine.read_text(encoding="utf-8") == "mine"
    with pytest.raises(MiniloraError, match="is a file; expected a folder"):
        write_skeletons(mine, [EXERCISES["lora"]], "tags")


def of_lora(*edits):
    source = "\n".join([*imports(EXERCISES["lora"]), PLAIN["lora"]])
    for old, new in edits:
        assert old in source
        source = source.replace(old, new)
    return check(EXERCISES["lora"], source)


def test_a_point_is_given_for_each_gradient_that_is_right():
    verdict = of_lora(("dB = h.T @ dY", "dB = s * h.T @ dY"))
    assert verdict.right == {"dx": True, "dA": True, "dB": False}
    lines = verdict.failure.text().splitlines()
    assert lines[0] == "dB is wrong, in the case 'lora'."
    assert "    x = [[[1]]]" in lines and "    your dB = [[64]]" in lines
    assert "    the right dB = [[8]]" in lines
    assert lines[-2].startswith("  → dB has the factor s twice")
    assert lines[-1] == "  See docs/derivations/lora.md."


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (("    x, h, A, B, s = cache", "    x, h, A, B, s = ("), "lora.py, line"),
        (("dY @ B.T", "dY @ BT"), "NameError: name 'BT' is not defined"),
        (("dY @ B.T", "exit()"), "lora.py ends Python"),
        (("def lora_backward", "def lora"), "lora.py defines no function lora_backward."),
        (("x, h, A, B, s = cache", "return minilora.lora.lora_backward(dy, cache)"),
         "This calls minilora's own lora_backward: write it yourself."),
        (("return dx, dA, dB", "return [dx, dA, dB]"), "It must return the tuple (dx, dA, dB)"),
        (("dY @ B.T", "dY.astype(np.float32) @ B.T"), "dx is wrong"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_told(edit, expected):
    import minilora.lora

    own = minilora.lora.lora_backward
    verdict = of_lora(("import numpy as np", "import minilora.lora, numpy as np"), edit)
    assert verdict.failure.text().startswith(expected)
    assert minilora.lora.lora_backward is own


def test_printing_is_shown_but_cut():
    verdict = of_lora(("dh = dY @ B.T", "print('x' * 10**6); dh = dY @ B.T"))
    assert verdict.failure is None
    assert len(verdict.printed) < 2100 and "characters more" in verdict.printed


def test_two_runs_say_the_same():
    edit = ("dA = X.T @ g", "dA = X.T @ g / 3")
    assert of_lora(edit) == of_lora(edit)


def test_a_target_that_is_missed_is_told():
    puzzle = PUZZLES["thin_gradient"]
    source = "def thin_gradient(x, dy, B, scale):\n    return scale * (x.T @ dy) @ B.T\n"
    verdict = check(puzzle, source)
    assert verdict.failure.what == "Right, but not yet as asked."
    assert "numbers at once" in verdict.failure.sentence
    two_lines = "def merged_in_a_line(w, A, B, scale):\n    u = scale * A @ B\n    return w + u\n"
    verdict = check(PUZZLES["merged_in_a_line"], two_lines)
    assert verdict.failure.sentence == "Its body has 2 statements; one is asked."
    leaky = (
        "import numpy as np\ndef causal_weights(S):\n"
        "    p = np.exp(S - S.max(1, keepdims=True)) * np.tri(len(S), dtype=S.dtype)\n"
        "    return p / p.sum(1, keepdims=True)\n"
    )
    assert "later score of 10,000" in check(PUZZLES["causal_weights"], leaky).failure.sentence


def test_where_two_hypotheses_mean_different_things_none_is_given(monkeypatch):
    """Both give the student's numbers, but on further cases they differ."""

    def doubled(dy, cache):
        (y,) = cache
        return (2.0 * y * (dy - (dy * y).sum(axis=-1, keepdims=True)),)

    twice = Guess("It is there twice.", lambda v: {"dx": 2 * v.want["dx"]})
    seen = Guess("It is what you return.", lambda v: {"dx": v.got["dx"]})
    for guesses, sentence in (([twice], twice.sentence), ([twice, seen], "")):
        monkeypatch.setattr(diagnosis, "guesses", lambda *_, found=guesses: iter(found))
        assert (
            judge(EXERCISES["softmax"], {"softmax_backward": doubled}).failure.sentence == sentence
        )


def test_where_nothing_fits_nothing_is_said():
    verdict = judge(EXERCISES["softmax"], {"softmax_backward": lambda dy, cache: (dy * 0.123 + 1,)})
    assert verdict.failure.kind == "none" and verdict.failure.sentence == ""
