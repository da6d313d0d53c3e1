"""Whatever a student's file does, its exercise gets one clear message, and is left as it was."""

import json

import numpy as np
import pytest

import minilora.course.check as checker
import minilora.lora
from minilora.course.check import PRINTED, check, graded
from minilora.course.exercises import EXERCISES
from minilora.course.skeleton import imports

LORA = EXERCISES["lora"]


@pytest.fixture(scope="module")
def plain(import_file):
    return import_file("tests/course/plain.py").PLAIN


def told(plain, *edits, first=""):
    """What is said of the plain solution with these edits; None if nothing."""
    source = "\n".join([*imports(LORA), first, plain["lora"]])
    for old, new in edits:
        assert old in source
        source = source.replace(old, new)
    failure = check(LORA, source).failure
    return failure and failure.text()


OWN = "This calls minilora's own lora_backward: write it yourself."
CALLED = "x, h, A, B, s = cache"


@pytest.mark.parametrize(
    ("first", "call"),
    [
        ("from minilora.lora import lora_backward as mine", "mine"),
        ("import minilora.lora as lora", "lora.lora_backward"),
        ("from minilora.pairs import PAIRS", "PAIRS['lora'].backward"),
        (
            "import functools, minilora.lora; f = functools.partial(minilora.lora.lora_backward)",
            "f",
        ),
        ("import sys", "sys._getframe(1).f_locals['exercise'].reference()['lora_backward']"),
    ],
)
def test_the_package_s_own_function_is_out_of_reach_under_any_name(plain, first, call):
    own = minilora.lora.lora_backward.__code__
    assert told(plain, (CALLED, f"return {call}(dy, cache)"), first=first).startswith(OWN)
    assert minilora.lora.lora_backward.__code__ is own


def test_no_right_result_is_in_the_frames_below_the_student_s():
    search = """
import sys
import numpy as np
def lora_backward(dy, cache):
    frame = sys._getframe()
    while frame is not None:
        for value in list(frame.f_locals.values()):
            if isinstance(value, dict) and {"dx", "dA", "dB"} == set(value):
                return tuple(value.values())
        frame = frame.f_back
    return np.ones_like(cache.x), cache.A + 5, cache.B + 5
"""
    verdict = check(LORA, search)
    assert verdict.points == 0


@pytest.mark.parametrize(
    ("first", "changed"),
    [
        ("import minilora.course.check as c; c.is_close = lambda a, b: True", "is_close"),
        ("import minilora.course.check as c; c.judge.__code__ = (lambda: 1).__code__", "judge"),
        ("from minilora.course.check import Verdict; Verdict.points = 9", "Verdict.points"),
        ("import minilora.lora as m; m.lora_forward = None", "minilora.lora.lora_forward"),
        ("np.allclose = lambda *a, **k: True", "numpy.allclose"),
        ("import builtins; builtins.isinstance = lambda *a: True", "builtins.isinstance"),
    ],
)  # fmt: skip
def test_a_changed_checker_is_named_and_put_right(plain, first, changed):
    before = checker.is_close, checker.judge.__code__, minilora.lora.lora_forward, np.allclose
    text = told(plain, first=first)
    assert f"{changed}, with which it is checked" in text
    after = checker.is_close, checker.judge.__code__, minilora.lora.lora_forward, np.allclose
    assert before == after
    assert told(plain) is None


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ("dA.tolist()", "dA is a list: return a NumPy array"),
        ("(0 * dA).astype(int)", "dA is an array of int64: return a NumPy array"),
        ("dA.astype(complex)", "dA is an array of complex128: return a NumPy array"),
        ("dA.astype(object)", "dA is an array of object: return a NumPy array"),
        ("dA.view(np.matrix)", "dA is a matrix: return a NumPy array"),
        ("np.ma.array(dA)", "dA is a MaskedArray: return a NumPy array"),
        ("7", "dA has the shape (), A has"),
        ("'dA'", "dA is a str: return a NumPy array"),
        ("dA * np.nan", "dA is NaN or infinite in the case"),
        ("dA.astype(np.float32)", "dA is float32 where float64 came in"),
        ("dA[None]", "dA has the right numbers in the shape"),
        ("dA.T", "dA is the transpose of the gradient"),
        ("dA[:, :1]", "dA has the shape"),
    ],
)  # fmt: skip
def test_a_result_of_another_kind_is_told(plain, new, expected):
    edit = ("dA = X.T @ g", f"dA = X.T @ g; dA = {new}")
    assert expected in told(plain, edit)


@pytest.mark.parametrize(
    "new", ["np.asfortranarray(dA)", "np.broadcast_to(dA, dA.shape)", "np.repeat(dA, 2, 0)[::2]"]
)
def test_a_view_with_the_right_numbers_is_right(plain, new):
    assert told(plain, ("dA = X.T @ g", f"dA = X.T @ g; dA = {new}")) is None


def test_an_argument_changed_in_place_is_named_and_the_case_shown_as_it_was(plain):
    text = told(plain, ("g = s * dh", "g = s * dh; B[...] = 1000"))
    assert text.startswith("Your code changes 'cache' in place.")
    assert "1000" not in text


def test_a_buffer_that_every_call_returns_is_refused(plain):
    text = told(plain, ("dA = X.T @ g", "BUFFER[:] = [X.T @ g + len(BUFFER)]; dA = BUFFER[0]"),
                first="BUFFER = []")  # fmt: skip
    assert "dA" in text


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ("raise SystemExit(0)", "lora.py ends Python: take exit() out."),
        ("raise KeyboardInterrupt", "KeyboardInterrupt\n  line"),
        ("raise GeneratorExit", "GeneratorExit\n  line"),
        ("raise BaseException('no')", "BaseException: no\n  line"),
        ("raise Unprintable", "Unprintable\n  line"),
        ("lora_backward(dy, cache)", "RecursionError: maximum recursion depth exceeded"),
        ("raise MemoryError", "MemoryError\n  line"),
    ],
)
def test_an_error_is_told_with_the_student_s_line(plain, new, expected):
    unprintable = "class Unprintable(Exception):\n    def __str__(self): raise ValueError"
    assert told(plain, (CALLED, f"{CALLED}; {new}"), first=unprintable).startswith(expected)
    if "lora_backward" not in new:
        assert told(plain, first=f"{unprintable}\n{new}").startswith(expected)


def test_a_callable_of_any_kind_is_judged(plain):
    source = "\n".join([*imports(LORA), plain["lora"], "import functools",
                        "lora_backward = functools.partial(lora_backward)"])  # fmt: skip
    assert check(LORA, source).failure is None


def test_settings_of_numpy_do_not_last(plain):
    before = np.geterr()
    assert told(plain, first="np.seterr(all='raise')") is None
    assert told(plain, (CALLED, f"{CALLED}; np.seterr(all='raise')")) is None
    assert np.geterr() == before


def test_the_result_as_data_is_json_and_says_what_the_command_says(plain):
    source = "\n".join([*imports(LORA), plain["lora"].replace("h.T @ dY", "s * h.T @ dY")])
    found = graded("lora", f"print('x' * 10**7)\n{source}")
    assert found == json.loads(json.dumps(found, allow_nan=False)) | {
        "failure": found["failure"]
    }  # a tuple comes back as a list
    assert (found["name"], found["points"], found["max_points"]) == ("lora", 2, 3)
    assert found["right"] == {"dx": True, "dA": True, "dB": False}
    assert found["failure"]["sentence"] in found["text"]
    assert len(found["printed"]) < PRINTED + 100
    assert graded("lora", "\n".join([*imports(LORA), plain["lora"]]))["text"] == ""
    with pytest.raises(KeyError):
        graded("lore", source)
