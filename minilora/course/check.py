"""Checking one exercise: every gradient in every case, and one sentence on what is wrong.

Nothing here starts a process or a thread, so a browser can call `check` as well as the command.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from minilora.course.cases import (
    Case,
    Functions,
    Malformed,
    Outputs,
    listed_inputs,
    normal_cases,
    shown,
    shrunk,
    whole_cases,
)
from minilora.course.diagnosis import Observed, diagnosed, shapes_told
from minilora.course.edits import is_close
from minilora.course.exercises import Exercise, point_of
from minilora.gradcheck import GradientError, _same, _snapshot, assert_close, check_pair

UNWRITTEN = "Not written yet"
PRINTED = 2000  # characters of a student's output that are shown


class Failure(NamedTuple):
    """What is wrong: in one line, the smallest case found, and the sentence that names the mistake.

    `kind` is how the sentence was found: "unwritten", "exact", "where" (what separates right cases
    from wrong ones), "none", "error", "place" (an argument changed) or "dtype".
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


def refused(exercise: Exercise, failure: Failure) -> Verdict:
    """The verdict on what could not be judged: no points."""
    return Verdict(exercise.name, dict.fromkeys(exercise.gradients(), False), failure)


# --- a student's source ------------------------------------------------------------------------


def check(exercise: Exercise, source: str, filename: str = "") -> Verdict:
    """The verdict on a student's file, by its text."""
    filename = filename or exercise.file
    printed = Shortened()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        verdict = _check(exercise, source, filename)
    return verdict._replace(printed=printed.text())


def _check(exercise: Exercise, source: str, filename: str) -> Verdict:
    try:
        with blocked(places_of(exercise)):
            functions = load(exercise, source, filename)
        return judge(exercise, functions, source, filename)
    except SyntaxError as error:
        text = (error.text or "").strip()
        what = f"{filename}, line {error.lineno}: {error.msg}" + (f": {text}" if text else "")
        return refused(exercise, Failure("error", what))
    except Missing as error:
        return refused(exercise, Failure("error", str(error)))
    except SystemExit:
        return refused(exercise, Failure("error", f"{filename} ends Python: take exit() out."))
    except Exception as error:
        return refused(exercise, Failure("error", told(error, filename)))


class Missing(Exception):
    """A function that the file should define, and does not."""


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
    """Takes what is printed, and keeps the first PRINTED characters."""

    def __init__(self) -> None:
        super().__init__()
        self.left_out = 0

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
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == filename]
    return what + (f"\n  line {own[-1].lineno}: {own[-1].line}" if own else "")


# --- what a student may not have ---------------------------------------------------------------


@contextlib.contextmanager
def blocked(places: list[Place]) -> Iterator[None]:
    """Within, the package's own functions of an exercise are not to be had in these places."""
    for place in places:
        setattr(place.module, place.name, place.stub)
    try:
        yield
    finally:
        for place in places:
            setattr(place.module, place.name, place.own)


class Place(NamedTuple):
    """Where one of the package's own functions is found, and what takes its place."""

    module: Any
    name: str
    own: Any
    stub: Any


def places_of(exercise: Exercise) -> list[Place]:
    """Every place in the package where the exercise's own functions are found."""
    own = {
        name: getattr(exercise.module, name) for name in (*exercise.functions, *exercise.helpers)
    }
    stubs = {id(function): (function, _stub(name)) for name, function in own.items()}
    return [
        Place(module, name, *stubs[id(value)])
        for key, module in list(sys.modules.items())
        if key.split(".")[0] == "minilora" and module is not None
        for name, value in list(vars(module).items())
        if id(value) in stubs
    ]


def _stub(name: str) -> Callable[..., Any]:
    def not_yours(*_: Any, **__: Any) -> Any:
        raise Missing(f"This calls minilora's own {name}: write it yourself.")

    return not_yours


class Changed(Exception):
    """An argument that was changed in place: its name."""


def guarded(exercise: Exercise, functions: Functions) -> Functions:
    """The functions, watched: they may not change an argument, nor call the package's own."""

    places = places_of(exercise)

    def watch(f: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **keywords: Any) -> Any:
            named = dict(zip(parameters(f, len(arguments)), arguments, strict=True)) | keywords
            before = {name: _snapshot(value) for name, value in named.items()}
            with blocked(places):
                result = f(*arguments, **keywords)
            for name, value in named.items():
                if not _same(before[name], value):
                    raise Changed(name)
            return result

        return watched

    return {name: watch(f) for name, f in functions.items()}


def parameters(f: Callable[..., Any], count: int) -> list[str]:
    """The names of the first parameters of a function, made up where it does not tell."""
    code = getattr(f, "__code__", None)
    names = list(code.co_varnames[: code.co_argcount])[:count] if code else []
    return names + [f"argument {i + 1}" for i in range(len(names), count)]


# --- judging functions -------------------------------------------------------------------------


def judge(
    exercise: Exercise, functions: Functions, source: str = "", filename: str = ""
) -> Verdict:
    """The verdict on functions: cases of whole numbers, then dtypes, then the gradient check."""
    reference, student = exercise.reference(), guarded(exercise, functions)
    names = exercise.gradients()
    wrong: dict[str, Case] = {}
    with np.errstate(all="ignore"):
        for case in whole_cases(exercise.tasks):
            want = case.outputs(reference)
            try:
                got = case.outputs(student)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                return _raised(exercise, error, case, functions, filename)
            for name in point_of_all(got, want):
                if not is_close(got.get(name), want.get(name)):
                    wrong.setdefault(name, case)
            if len(wrong) == len(want):
                break
        if not wrong:
            wrong |= _on_normal_numbers(exercise, student)
        right = {name: not any(point_of(w) == name for w in wrong) for name in names}
        if wrong:
            return Verdict(exercise.name, right, _explained(exercise, student, wrong))
        failure = _kept_float32(exercise, student) or _differences(exercise, functions)
        if failure is None and exercise.target is not None:
            sentence = exercise.target(functions, source)
            if sentence:
                right[names[-1]] = False
                failure = Failure(
                    "target", "Right, but not yet as asked.", (), sentence, exercise.page
                )
        elif failure:
            right = dict.fromkeys(right, False)
    return Verdict(exercise.name, right, failure)


def point_of_all(got: Outputs, want: Outputs) -> list[str]:
    """The names of both, in the order of the right ones."""
    return [*want, *(name for name in got if name not in want)]


def _on_normal_numbers(exercise: Exercise, student: Functions) -> dict[str, Case]:
    """The outputs that are wrong for normal numbers only."""
    found: dict[str, Case] = {}
    for case in normal_cases(exercise.tasks, (7,)):
        want, got = case.outputs(exercise.reference()), case.outputs(student)
        for name in point_of_all(got, want):
            if not is_close(got.get(name), want.get(name)):
                found.setdefault(name, case)
    return found


def _raised(
    exercise: Exercise, error: BaseException, case: Case, functions: Functions, filename: str
) -> Verdict:
    lines = tuple(listed_inputs(case))
    if isinstance(error, NotImplementedError) and UNWRITTEN in str(error):
        return refused(exercise, Failure("unwritten", f"{UNWRITTEN}.", page=exercise.page))
    if isinstance(error, Malformed | Missing):
        return refused(exercise, Failure("error", str(error), page=exercise.page))
    if isinstance(error, Changed):
        what = f"Your code changes {str(error)!r} in place."
        sentence = (
            "Another part of the model still needs that array: `x *= s` writes into x, "
            "`x = x * s` makes a new one."
        )
        return refused(exercise, Failure("place", what, lines, sentence, exercise.page))
    what = f"{told(error, filename)}\n  in the case {case.name!r}"
    observed = Observed.of(exercise, guarded(exercise, functions))
    found = diagnosed(exercise, observed, None) if observed.answers else None
    sentence = found.sentence if found and found.kind == "exact" else shapes_told(error, case)
    kind = "exact" if found and found.kind == "exact" else "error"
    return refused(exercise, Failure(kind, what, lines, sentence, exercise.page))


def _explained(exercise: Exercise, student: Functions, wrong: dict[str, Case]) -> Failure:
    """The smallest case of the first output that is wrong, and the sentence that says why."""
    output = next(iter(wrong))
    reference = exercise.reference()

    def fails(case: Case) -> bool:
        try:
            got, want = case.outputs(student), case.outputs(reference)
        except Exception:
            return False
        return not is_close(got.get(output), want.get(output))

    case = shrunk(wrong[output], fails)
    got, want = case.outputs(student).get(output), case.outputs(reference).get(output)
    points = list(dict.fromkeys(point_of(name) for name in wrong))
    others = [name for name in points if name != point_of(output)]
    also = f"; so {'is' if len(others) == 1 else 'are'} {' and '.join(others)}" if others else ""
    where = f", in the case {case.name!r}" if len(exercise.tasks) > 1 else ""
    numbers = (
        *listed_inputs(case),
        f"your {output} = {shown(got)}",
        f"the right {output} = {shown(want)}",
    )
    found = diagnosed(exercise, Observed.of(exercise, student), output)
    return Failure(
        found.kind, f"{output} is wrong{where}{also}.", numbers, found.sentence, exercise.page
    )


def _kept_float32(exercise: Exercise, student: Functions) -> Failure | None:
    """Models are of float32: a float64 there doubles the memory of all that is made of it."""
    for name, task in exercise.tasks.items():
        inputs = task.make(np.random.default_rng(3), task.sizes[-1])
        single = {
            k: x.astype(np.float32) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x
            for k, x in inputs.items()
        }
        want, got = task.call(exercise.reference(), single), task.call(student, single)
        for output, right in want.items():
            dtype = getattr(got[output], "dtype", None)
            if getattr(right, "dtype", None) == np.float32 and dtype != np.float32:
                what = f"{output} is {dtype} where float32 came in ({name})."
                sentence = (
                    "A new array is float64 unless told otherwise: np.zeros_like(x), or "
                    "dtype=x.dtype; and a NumPy number such as np.sqrt(2) makes float32 float64."
                )
                return Failure("dtype", what, (), sentence, exercise.page)
        large = {
            k: np.float32(300.0) * x
            if isinstance(x, np.ndarray) and x.dtype == np.float32 and k != "mask"
            else x
            for k, x in single.items()
        }
        for output, right in task.call(exercise.reference(), large).items():
            found = task.call(student, large)[output]
            if right is not None and np.isfinite(right).all() and not np.isfinite(found).all():
                what = f"{output} is not finite for entries near 300 ({name})."
                sentence = "exp overflows: subtract the row's maximum, or log Σ exp, before it."
                return Failure("dtype", what, (), sentence, exercise.page)
    return None


def _differences(exercise: Exercise, functions: Functions) -> Failure | None:
    """The package's own verdict: central differences of its forward pass."""
    for pair in exercise.pairs:
        arguments, constants = pair.make(np.random.default_rng(11))
        backward = functions[exercise.functions[0]]
        try:
            checks = check_pair(
                pair.forward, backward, arguments, constants, entries=5,
                frozen=pair.frozen, thin=pair.thin,
            )  # fmt: skip
            assert_close(checks)
        except GradientError as error:
            return Failure("none", f"The gradient check refuses it: {error}.", page=exercise.page)
    return None
