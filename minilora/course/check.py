"""Checking one exercise: every gradient in every case, and one sentence on what is wrong.

`graded` takes the text of a student's file and returns what the student is told, as data. Nothing
here starts a process or a thread, so a browser can call it as well as the command.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import linecache
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from minilora import fused
from minilora.course.cases import (
    Case,
    Functions,
    Malformed,
    listed_inputs,
    normal_cases,
    shown,
    shrunk,
    whole_cases,
)
from minilora.course.diagnosis import Observed, diagnosed, shapes_told
from minilora.course.edits import is_close
from minilora.course.exercises import Exercise, point_of
from minilora.course.puzzles import ALL
from minilora.gradcheck import GradientError, _leaves, _same, _snapshot, assert_close, check_pair

UNWRITTEN = "Not written yet"
PRINTED = 2000  # characters of a student's output that are shown


class Failure(NamedTuple):
    """What is wrong: in one line, the smallest case found, and the sentence that names the mistake.

    `kind` is how the sentence was found: "unwritten", "exact", "where" (what separates right cases
    from wrong ones), "none", "error", "place" (an argument changed), "dtype" or "target".
    """

    kind: str
    what: str
    case: tuple[str, ...] = ()
    sentence: str = ""
    page: str = ""

    def text(self) -> str:
        """The failure as it is printed."""
        lines = [self.what]
        if self.case:
            lines += ["  the smallest case found:", *(f"    {line}" for line in self.case)]
        if self.sentence:
            lines.append(f"  → {self.sentence}")
        if self.page and self.kind != "unwritten":
            lines.append(f"  See {self.page}.")
        return "\n".join(lines)


class Verdict(NamedTuple):
    """The outcome for an exercise: which results are right, and what is wrong first, if any."""

    name: str
    right: dict[str, bool]
    failure: Failure | None = None
    printed: str = ""
    seconds: float = 0.0

    @property
    def points(self) -> int:
        """One for each right result."""
        return sum(self.right.values())

    @property
    def max_points(self) -> int:
        """One for each result."""
        return len(self.right)

    def document(self) -> dict[str, Any]:
        """The verdict as JSON has it."""
        failure = None if self.failure is None else self.failure._asdict()
        return {**self._asdict(), "failure": failure}


def refused(exercise: Exercise, failure: Failure) -> Verdict:
    """The verdict on what could not be judged: no points."""
    return Verdict(exercise.name, dict.fromkeys(exercise.gradients(), False), failure)


# --- a student's source ------------------------------------------------------------------------


def graded(name: str, source: str) -> dict[str, Any]:
    """The graded result of a student's text for the exercise or puzzle of this name, as data.

    `name`, `right` (by result, whether it is right), `failure` (None, or `kind`, `what`, `case`,
    `sentence` and `page`), `text` (the failure as the command prints it, or ""), `points`,
    `max_points`, `printed` (by the student's code) and `seconds`. Raises KeyError for another name.
    """
    verdict = check(ALL[name], source)
    text = "" if verdict.failure is None else verdict.failure.text()
    points = {"points": verdict.points, "max_points": verdict.max_points}
    return {**verdict.document(), "text": text, **points}


def check(exercise: Exercise, source: str, filename: str = "") -> Verdict:
    """The verdict on a student's file, by its text."""
    filename = filename or exercise.file
    printed = Shortened()
    out, err = contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed)
    with restored() as changed, out, err, np.errstate():
        found = _check(exercise, source, filename)
    if changed:
        what = f"{filename} changes {changed[0]}, with which it is checked: leave it as it is."
        found = Failure("error", what)
    verdict = refused(exercise, found) if isinstance(found, Failure) else found
    return verdict._replace(printed=printed.text())


def _check(exercise: Exercise, source: str, filename: str) -> Verdict | Failure:
    try:
        with out_of_reach(exercise):
            functions = load(exercise, source, filename)
        return judge(exercise, functions, source, filename)
    except SyntaxError as error:
        text = (error.text or "").strip()
        what = f"{filename}, line {error.lineno}: {error.msg}" + (f": {text}" if text else "")
        return Failure("error", what)
    except BaseException as error:
        return Failure("error", told(error, filename))


class Missing(Exception):
    """A function that the file should define and does not, or that it should not call and does."""


def load(exercise: Exercise, source: str, filename: str) -> Functions:
    """The student's functions; raises what the file raises, and Missing."""
    lines = source.splitlines(keepends=True)
    linecache.cache[filename] = (len(source), None, lines, filename)
    space: dict[str, Any] = {"__name__": "submission", "__file__": filename}
    exec(compile(source, filename, "exec", dont_inherit=True), space)
    for name in exercise.functions:
        if not callable(space.get(name)):
            raise Missing(f"{filename} defines no function {name}.")
    return {name: space[name] for name in exercise.functions}


class Shortened(io.StringIO):
    """Takes what is printed, and keeps the first PRINTED characters; it cannot be closed."""

    left_out = 0

    def close(self) -> None:
        """Nothing, so that what was printed can still be read."""

    def write(self, text: str) -> int:
        """Keep what there is room for."""
        room = max(0, PRINTED - self.tell())
        super().write(text[:room])
        self.left_out += len(text) - min(room, len(text))
        return len(text)

    def text(self) -> str:
        """What was kept, and how much was not."""
        note = f"\n… and {self.left_out:,} characters more" if self.left_out else ""
        return self.getvalue().rstrip() + note


def told(error: BaseException, filename: str) -> str:
    """An exception in one line or two, with the student's own line."""
    if isinstance(error, Missing | Malformed):
        return str(error)
    if isinstance(error, SystemExit):
        return f"{filename} ends Python: take exit() out."
    what = type(error).__name__
    with contextlib.suppress(Exception):  # its own __str__ may fail
        what += f": {error}" if str(error) else ""
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == filename]
    return what + (f"\n  line {own[-1].lineno}: {own[-1].line}" if own else "")


# --- what a student may not have ---------------------------------------------------------------

ANSWER = """
def {name}(*_, **__):
    from minilora.course.check import Missing
    raise Missing("This calls minilora's own {name}: write it yourself.")
"""


@contextlib.contextmanager
def out_of_reach(exercise: Exercise) -> Iterator[None]:
    """Within, the package's own functions of an exercise raise Missing, whatever they are called.

    Their code is exchanged, so the register's rows and other modules' names refuse as well.
    """
    names = (*exercise.functions, *exercise.helpers)
    own = [inspect.unwrap(getattr(exercise.module, name)) for name in names]
    own += [getattr(fused, name) for name in names if hasattr(fused, name)]
    codes = [function.__code__ for function in own]
    try:
        for function in own:
            space: dict[str, Any] = {}
            exec(ANSWER.format(name=function.__name__), space)
            function.__code__ = space[function.__name__].__code__
        yield
    finally:
        for function, code in zip(own, codes, strict=True):
            function.__code__ = code


@contextlib.contextmanager
def restored() -> Iterator[list[str]]:
    """Gives a list that at the end names what was changed within, which is then undone.

    Watched are the names of minilora's modules and classes, and of NumPy and Python's own.
    """
    modules = list(sys.modules.items())
    watched: list[Any] = [module for name, module in modules if name.split(".")[0] == "minilora"]
    watched += [c for m in watched for c in vars(m).values()
                if isinstance(c, type) and c.__module__.startswith("minilora")]  # fmt: skip
    watched += [sys.modules[name] for name in ("numpy", "numpy.linalg", "builtins")]
    before = [
        (place, name, value, getattr(value, "__code__", None))
        for place in dict.fromkeys(watched)
        for name, value in vars(place).items()
    ]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for place, name, value, code in before:
            if vars(place).get(name, changed) is not value:
                changed.append(f"{place.__name__}.{name}")
                setattr(place, name, value)
            elif getattr(value, "__code__", None) is not code:
                changed.append(f"{place.__name__}.{name}")
                value.__code__ = code


class Changed(Exception):
    """An argument that was changed in place: its name."""


def guarded(exercise: Exercise, functions: Functions) -> Functions:
    """The functions, watched: they may not change an argument, nor call the package's own."""

    def watch(f: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **keywords: Any) -> Any:
            named = parameters(f, arguments, keywords)
            before = {name: _snapshot(value) for name, value in named.items()}
            with out_of_reach(exercise), np.errstate(all="ignore"):
                result = f(*arguments, **keywords)
            for name, value in named.items():
                if not _same(before[name], value):
                    with contextlib.suppress(ValueError):
                        for leaf, old in zip(_leaves(value), before[name], strict=True):
                            leaf[...] = old
                    raise Changed(name)
            return result

        return watched

    return {name: watch(f) for name, f in functions.items()}


def parameters(f: Callable[..., Any], arguments: Any, keywords: Any) -> Mapping[str, Any]:
    """The arguments of a call by their names, as far as the function takes them."""
    try:
        return inspect.signature(f).bind(*arguments, **keywords).arguments
    except (TypeError, ValueError):
        return {}


# --- judging functions -------------------------------------------------------------------------


class Raised(Exception):
    """What the student's code raised, its __cause__, in this case."""

    def __init__(self, case: Case) -> None:
        super().__init__(case.name)
        self.case = case


def judge(
    exercise: Exercise, functions: Functions, source: str = "", filename: str = ""
) -> Verdict:
    """The verdict on functions: cases of whole numbers, then of others, dtypes, and differences."""
    student, names = guarded(exercise, functions), exercise.gradients()
    with np.errstate(all="ignore"):
        try:
            wrong = first_wrong(exercise, student, whole_cases(exercise.tasks))
            wrong = wrong or first_wrong(exercise, student, normal_cases(exercise.tasks, (7,)))
        except Raised as raised:
            assert raised.__cause__ is not None
            failure = _raised(exercise, raised.__cause__, raised.case, student, filename)
            return refused(exercise, failure)
        points = {point_of(output) for output in wrong}
        if wrong:
            failure = _explained(exercise, student, wrong)
            return Verdict(exercise.name, {name: name not in points for name in names}, failure)
        for find in (_kept_float32, _overflowing, _differences):
            found = find(exercise, student)
            if found:
                return refused(exercise, found)
        missed = exercise.target(functions, source) if exercise.target else None
    right = dict.fromkeys(names, True)
    if missed is None:
        return Verdict(exercise.name, right)
    failure = Failure("target", "Right, but not yet as asked.", (), missed, exercise.page)
    return Verdict(exercise.name, {**right, names[-1]: False}, failure)


def first_wrong(exercise: Exercise, student: Functions, cases: Iterable[Case]) -> dict[str, Case]:
    """The outputs that are wrong, each with the first case; raises Raised.

    The student's come first: while they are computed, no right result is in memory.
    """
    wrong: dict[str, Case] = {}
    for case in cases:
        try:
            got = case.outputs(student)
        except BaseException as error:
            raise Raised(case) from error
        want = case.outputs(exercise.reference())
        for name in (*want, *(name for name in got if name not in want)):
            if not is_close(got.get(name), want.get(name)):
                wrong.setdefault(name, case)
        if len(wrong) == len(want):
            break
    return wrong


def _raised(
    exercise: Exercise, error: BaseException, case: Case, student: Functions, filename: str
) -> Failure:
    lines, page = tuple(listed_inputs(case)), exercise.page
    if isinstance(error, NotImplementedError) and UNWRITTEN in str(error):
        return Failure("unwritten", f"{UNWRITTEN}.", page=page)
    if isinstance(error, Malformed | Missing | SystemExit):
        return Failure("error", told(error, filename), page=page)
    if isinstance(error, Changed):
        sentence = (
            "Another part of the model still needs that array: `x *= s` writes into x, "
            "`x = x * s` makes a new one."
        )
        return Failure(
            "place", f"Your code changes {str(error)!r} in place.", lines, sentence, page
        )
    what = f"{told(error, filename)}\n  in the case {case.name!r}"
    found = diagnosed(exercise, Observed.of(exercise, student), None)
    if found.kind == "exact":
        return Failure("exact", what, lines, found.sentence, page)
    return Failure("error", what, lines, shapes_told(error, case), page)


def _explained(exercise: Exercise, student: Functions, wrong: dict[str, Case]) -> Failure:
    """The smallest case of the first output that is wrong, and the sentence that says why."""
    output = next(iter(wrong))

    def both(case: Case) -> tuple[Any, Any]:
        got = case.outputs(student).get(output)
        return got, case.outputs(exercise.reference()).get(output)

    def fails(case: Case) -> bool:
        try:
            return not is_close(*both(case))
        except Exception:
            return False

    case = shrunk(wrong[output], fails)
    got, want = both(case)
    others = dict.fromkeys(point_of(name) for name in wrong if point_of(name) != point_of(output))
    also = f"; so {'is' if len(others) == 1 else 'are'} {' and '.join(others)}" if others else ""
    where = f", in the case {case.name!r}" if len(exercise.tasks) > 1 else ""
    what = f"{output} is wrong{where}{also}."
    numbers = (f"your {output} = {shown(got)}", f"the right {output} = {shown(want)}")
    found = diagnosed(exercise, Observed.of(exercise, student), output)
    lines = (*listed_inputs(case), *numbers)
    return Failure(found.kind, what, lines, found.sentence, exercise.page)


def _single(exercise: Exercise, factor: float = 1.0) -> Iterator[Case]:
    """A case of each task in float32, its entries times a factor."""
    for name, task in exercise.tasks.items():
        inputs = task.make(np.random.default_rng(3), task.sizes[-1])
        for key, x in inputs.items():
            if isinstance(x, np.ndarray) and x.dtype == np.float64:
                inputs[key] = np.float32(1.0 if key == "mask" else factor) * x.astype(np.float32)
        yield Case(name, task, inputs)


def _kept_float32(exercise: Exercise, student: Functions) -> Failure | None:
    """Models are of float32: a float64 there doubles the memory of all that is made of it."""
    for case in _single(exercise):
        got, want = case.outputs(student), case.outputs(exercise.reference())
        for output, right in want.items():
            dtype = getattr(got[output], "dtype", None)
            if getattr(right, "dtype", None) == np.float32 and dtype != np.float32:
                what = f"{output} is {dtype} where float32 came in ({case.name})."
                sentence = (
                    "A new array is float64 unless told otherwise: np.zeros_like(x), or "
                    "dtype=x.dtype; and a NumPy number such as np.sqrt(2) makes float32 float64."
                )
                return Failure("dtype", what, (), sentence, exercise.page)
    return None


def _overflowing(exercise: Exercise, student: Functions) -> Failure | None:
    """Entries near 300, whose exponential float32 cannot hold."""
    for case in _single(exercise, 300.0):
        got, want = case.outputs(student), case.outputs(exercise.reference())
        for output, right in want.items():
            if (
                right is not None
                and np.isfinite(right).all()
                and not np.isfinite(got[output]).all()
            ):
                what = f"{output} is not finite for entries near 300 ({case.name})."
                sentence = "exp overflows: subtract the row's maximum, or log Σ exp, before it."
                return Failure("dtype", what, (), sentence, exercise.page)
    return None


def _differences(exercise: Exercise, student: Functions) -> Failure | None:
    """The package's own verdict: central differences of its forward pass."""
    for pair in exercise.pairs:
        arguments, constants = pair.make(np.random.default_rng(11))
        try:
            checks = check_pair(
                pair.forward, student[exercise.functions[0]], arguments, constants, entries=5,
                frozen=pair.frozen, thin=pair.thin,
            )  # fmt: skip
            assert_close(checks)
        except GradientError as error:
            return Failure("none", f"The gradient check refuses it: {error}.", page=exercise.page)
    return None
