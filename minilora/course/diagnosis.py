"""Naming the mistake: the hypothesis that gives the student's gradients in every case.

A sentence is given only if what it says reproduces the student's own numbers, and all that do
reproduce them are the same function on further cases. Otherwise it says at most in which cases the
gradient is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from minilora.course.cases import Case, Functions, Outputs, normal_cases
from minilora.course.edits import (
    Equation,
    computed,
    equations,
    hypotheses,
    is_close,
)
from minilora.course.exercises import Exercise
from minilora.course.mistakes import LESSONS, Lesson, Mistake


class Answer(NamedTuple):
    """A case, the student's outputs in it, and the right ones."""

    case: Case
    got: Outputs
    want: Outputs


class Observed(NamedTuple):
    """What a student's functions do: their answers, and the cases in which they raise an error."""

    functions: Functions
    answers: list[Answer]
    raising: list[Case]

    @staticmethod
    def of(exercise: Exercise, functions: Functions, seeds: tuple[int, ...] = (1,)) -> Observed:
        """The answers to cases of normal numbers."""
        answers, raising = list[Answer](), list[Case]()
        reference = exercise.reference()
        for case in normal_cases(exercise.tasks, seeds):
            want = case.outputs(reference)
            try:
                answers.append(Answer(case, case.outputs(functions), want))
            except Exception:
                raising.append(case)
        return Observed(functions, answers, raising)


class Found(NamedTuple):
    """The sentence, and how it was found: "exact", "where" or "none"."""

    kind: str
    sentence: str


class Guess(NamedTuple):
    """A hypothesis in general: its sentence, and what it gives."""

    sentence: str
    gives: Callable[[Answer], Outputs]  # raises what a wrong formula raises


def diagnosed(exercise: Exercise, observed: Observed, output: str | None) -> Found:
    """The sentence for what is wrong, first of all with this output."""
    answers = observed.answers
    wrong = [name for name in names_of(answers) if not _agrees(answers, name)]
    if not answers:
        return Found("none", "")
    if output is None or output not in wrong:
        output = wrong[0] if wrong else None
    if output is None:
        return Found("none", "")
    told = _exchanged(answers, wrong) or _of_form(answers, output)
    if told:
        return Found("exact", told)
    for names in dict.fromkeys((tuple(wrong), (output,))):
        for others in (True, False):  # first a guess that leaves right what is right
            found = _fitting(exercise, observed, names, others)
            if found:
                return Found("exact", found)
    found = _in_some_tasks(exercise, observed, output)
    if found:
        return Found("exact", found)
    where = _where(exercise, answers, output)
    return Found("where", where) if where else Found("none", "")


def names_of(answers: list[Answer]) -> list[str]:
    """The names of all outputs."""
    return list(dict.fromkeys(name for a in answers for name in (*a.want, *a.got)))


def _agrees(answers: list[Answer], name: str) -> bool:
    return all(is_close(a.got.get(name), a.want.get(name)) for a in answers)


def _in_some_tasks(exercise: Exercise, observed: Observed, output: str) -> str:
    """The sentence for an output that is right in all cases of some tasks, and wrong in others."""
    tasks = list(
        dict.fromkeys(a.case.name for a in observed.answers if a.want.get(output) is not None)
    )
    of_task = {name: [a for a in observed.answers if a.case.name == name] for name in tasks}
    wrong = [name for name, answers in of_task.items() if not _agrees(answers, output)]
    if len(wrong) == len(tasks):
        return ""
    answers = [a for name in wrong for a in of_task[name]]
    found = _fitting(exercise, observed._replace(answers=answers, raising=[]), (output,))
    cases = " and ".join(map(repr, wrong))
    right = " and ".join(repr(name) for name in tasks if name not in wrong)
    return f"Right in the case {right}; in the case {cases}: {found}" if found else ""


# --- the form ----------------------------------------------------------------------------------


def _exchanged(answers: list[Answer], wrong: list[str]) -> str:
    """Two outputs of which each is the other."""
    plain = [name for name in wrong if name.startswith("d") and "." not in name]
    for i, a in enumerate(plain):
        for b in plain[i + 1 :]:
            if all(
                is_close(v.got.get(a), v.want.get(b)) and is_close(v.got.get(b), v.want.get(a))
                for v in answers
            ):
                return (
                    f"{a} and {b} are exchanged: the gradients stand in the order of the arguments."
                )
    return ""


def _of_form(answers: list[Answer], output: str) -> str:
    """What is wrong with the kind or the shape of an output, in every case where it is wrong."""
    if output.endswith(".refused"):
        return (
            "An adapter of the embedding is merged although the head is tied: raise MiniloraError."
        )
    wrong = [a for a in answers if not is_close(a.got.get(output), a.want.get(output))]
    needless = [a for a in wrong if a.want.get(output) is None]
    if needless:
        return (
            f"{output} must be None in the case {needless[0].case.name!r}: what it is made "
            "of is not in the cache, as nothing wants it."
        )
    absent = [a for a in wrong if a.got.get(output) is None]
    if absent:
        case = absent[0].case.name
        return f"{output} is None in the case {case!r}, where what it is made of is in the cache."
    if all(getattr(a.got[output], "dtype", None) == np.float32 for a in wrong) and all(
        np.shape(a.got[output]) == np.shape(a.want[output])
        and np.allclose(a.got[output], a.want[output], rtol=1e-5, atol=1e-5)
        for a in wrong
    ):
        return f"{output} is float32 where float64 came in: keep the dtype of what you are given."
    shapes = [(np.shape(a.got[output]), np.shape(a.want[output])) for a in wrong]
    off = [(got, want) for got, want in shapes if got != want]
    if not off:
        return ""
    got, want = off[-1]
    argument = output.removeprefix("d")
    if all(g == w[::-1] and is_close(np.transpose(a.got[output]), a.want[output])
           for (g, w), a in zip(shapes, wrong, strict=True)):  # fmt: skip
        return (
            f"{output} is the transpose of the gradient: it has the shape {got}, "
            f"{argument} has {want}."
        )
    is_flat = all(
        np.size(a.got[output]) == np.size(a.want[output])
        and is_close(np.reshape(a.got[output], np.shape(a.want[output])), a.want[output])
        for a in wrong
    )
    if is_flat:
        return (
            f"{output} has the right numbers in the shape {got}: reshape them to that of "
            f"{argument}, {want}."
        )
    return (
        f"{output} has the shape {got}, {argument} has {want}: a gradient has the shape of its "
        "argument."
    )


# --- hypotheses --------------------------------------------------------------------------------


def _fitting(
    exercise: Exercise, observed: Observed, names: tuple[str, ...], others: bool = False
) -> str:
    """The sentence of the first guess that gives these outputs in every case; "" if none does.

    And "" where another guess gives them too and is another function.
    """
    answers = observed.answers
    every = tuple(names_of(answers)) if others else names
    fitting = [g for g in guesses(exercise, names) if _fits(g, answers, names, every)]
    fitting = [g for g in fitting if _raises_alike(g, observed, exercise)]
    if not fitting:
        return ""
    first = fitting[0]
    for other in fitting[1:]:
        if not _same_function(first, other, exercise, names, {a.case.name for a in answers}):
            return ""
    return first.sentence


def _fits(
    guess: Guess, answers: list[Answer], names: tuple[str, ...], every: tuple[str, ...]
) -> bool:
    told = False
    for answer in answers:
        wanted = [n for n in names if answer.want.get(n) is not None]
        if not wanted:
            continue
        try:
            gives = guess.gives(answer)
        except Exception:
            return False
        for name in wanted:
            if name not in gives or not is_close(
                _like(gives[name], answer.want[name]), answer.got[name]
            ):
                return False
        for name in every:
            is_other = name in gives and answer.want.get(name) is not None and name not in names
            if is_other and not is_close(
                _like(gives[name], answer.want[name]), answer.got.get(name)
            ):
                return False
        told = told or bool(wanted)
    return told or not names


def _like(x: Any, want: Any) -> Any:
    """A result of the equations, which are of matrices, in the shape of the gradient."""
    if x is None:
        return None
    x = np.asarray(x)
    if x.shape == np.shape(want):
        return x
    if (
        x.size == np.size(want)
        and x.ndim == 2
        and np.ndim(want) > 2
        and x.shape[1] == want.shape[-1]
    ):
        return x.reshape(np.shape(want))
    if np.ndim(want) > 2 and x.ndim <= 2:
        try:
            return np.broadcast_to(x, (int(np.prod(want.shape[:-1])), want.shape[-1])).reshape(
                want.shape
            )
        except ValueError:
            return x
    try:
        return np.broadcast_to(x, np.shape(want))
    except ValueError:
        return x


def _raises_alike(guess: Guess, observed: Observed, exercise: Exercise) -> bool:
    """Whether the guess is an error wherever the student's code is one."""
    reference = exercise.reference()
    for case in observed.raising:
        try:
            guess.gives(Answer(case, {}, case.outputs(reference)))
        except Exception:
            continue
        return False
    return True


def _same_function(
    a: Guess, b: Guess, exercise: Exercise, names: tuple[str, ...], tasks: set[str]
) -> bool:
    """Whether two guesses agree on cases that neither has seen."""
    reference = exercise.reference()
    for case in normal_cases({k: t for k, t in exercise.tasks.items() if k in tasks}, (5,)):
        want = case.outputs(reference)
        answer = Answer(case, want, want)
        results = []
        for guess in (a, b):
            try:
                results.append(guess.gives(answer))
            except Exception:
                results.append({})
        for name in names:
            if want.get(name) is not None:
                x, y = (_like(r.get(name), want[name]) for r in results)
                if not is_close(x, y):
                    return False
    return True


def guesses(exercise: Exercise, names: tuple[str, ...]) -> Iterator[Guess]:
    """All guesses at outputs that are wrong: classic mistakes first, then the general ones."""
    lesson = LESSONS.get(exercise.name)
    if lesson is not None:
        yield from _classic(exercise.name, lesson)
    yield from _general(exercise, names)
    if lesson is not None:
        case = next(normal_cases(exercise.tasks))
        known = tuple(k for k, v in lesson.bind(case.inputs).items() if not callable(v))
        for h in hypotheses(lesson.equations, known, tuple(lesson.letters.items()), lesson.scalars):
            subject = "Your result" if len(names) != 1 else f"Your {names[0]}"
            if len(names) > 1:
                subject = (
                    f"Your {', '.join(names[:-1])} and {names[-1]}" if len(names) < 5 else subject
                )
            verb = "are" if len(names) > 1 and len(names) < 5 else "is"
            yield Guess(
                f"{subject} {verb} what {h.where} gives {h.words}.", _by_program(lesson, h.program)
            )


def _classic(name: str, lesson: Lesson) -> Iterator[Guess]:
    for mistake in lesson.mistakes:
        tag = (
            f" [{mistake.tag}]"
            if mistake.tag and f"[{mistake.tag}]" not in mistake.sentence
            else ""
        )
        yield Guess(mistake.sentence + tag, _by_program(lesson, replaced(lesson, mistake)))


def replaced(lesson: Lesson, mistake: Mistake) -> tuple[Equation, ...]:
    """The exercise's equations with the mistake's in their places."""
    new = {e.name: e for e in equations(mistake.equation)}
    program = tuple(new.pop(e.name, e) for e in equations(lesson.equations))
    assert not new, f"{', '.join(new)}: no equation of that name"
    return program


def _by_program(lesson: Lesson, program: tuple[Equation, ...]) -> Callable[[Answer], Outputs]:
    def gives(answer: Answer) -> Outputs:
        found = computed(program, lesson.bind(answer.case.inputs))
        return {
            name: found[name.replace(".", "_")]
            for name in answer.want
            if name.replace(".", "_") in found
        }

    return gives


def _general(exercise: Exercise, names: tuple[str, ...]) -> Iterator[Guess]:
    """Guesses that need no equation: exchanged, zero, another's, an argument itself."""
    if not names:
        return
    case = next(normal_cases(exercise.tasks))
    outputs = list(case.outputs(exercise.reference()))
    listed = " and ".join(names) if len(names) < 4 else "The results"
    be = "is" if len(names) == 1 else "are"
    if len(names) == 2:
        a, b = names
        yield Guess(
            f"{a} and {b} are exchanged.",
            lambda v: {a: v.want[b], b: v.want[a]},
        )
    yield Guess(
        f"{listed} {be} zero everywhere.",
        lambda v: {n: 0 * v.want[n] for n in names if v.want[n] is not None},
    )
    yield Guess(
        f"{listed} {'has' if len(names) == 1 else 'have'} the wrong sign.",
        lambda v: {n: -v.want[n] for n in names if v.want[n] is not None},
    )
    if len(names) > 1:
        return
    (name,) = names
    for other in outputs:
        if other != name:
            yield Guess(
                f"What you return as {name} is {other}: the gradients stand in the order of the "
                "arguments.",
                lambda v, other=other: {name: v.want[other]},  # type: ignore[misc]
            )
    for given in case.inputs:
        yield Guess(
            f"{name} is {given} itself.",
            lambda v, given=given: {name: v.case.inputs[given]},  # type: ignore[misc]
        )
    argument = name.removeprefix("d")
    if argument in case.inputs and argument != name:
        yield Guess(
            f"{name} was added to {argument} itself: a gradient starts at zero.",
            lambda v: {name: v.want[name] + v.case.inputs[argument]},
        )
    for word, turned in _TURNED.items():
        yield Guess(f"{name} {word}.", lambda v, turned=turned: {name: turned(v.want[name])})  # type: ignore[misc]


_TURNED: dict[str, Callable[[Any], Any]] = {
    "is transposed": np.transpose,
    "has its rows in reverse order": lambda x: x[::-1],
    "is one larger in every entry": lambda x: x + 1,
    "has lost its sign: all entries are positive": np.abs,
    "is rounded to whole numbers": np.round,
    "is correct only in its first row, and zero elsewhere": lambda x: np.where(_first(x), x, 0),
}


def _first(x: Any) -> Any:
    mask = np.zeros(np.shape(x), bool)
    if np.ndim(x):
        mask[0] = True
    return mask


# --- what separates right from wrong -----------------------------------------------------------


class Feature(NamedTuple):
    """Something that a case may have, in words that follow "is right"."""

    words: str
    has: Callable[[Case], bool]


def _size(case: Case, name: str, axis: int) -> int:
    x = case.inputs.get(name)
    return int(x.shape[axis]) if isinstance(x, np.ndarray) and x.ndim > axis else 0


def _main(case: Case) -> Any:
    return next(x for x in case.inputs.values() if isinstance(x, np.ndarray) and x.ndim)


FEATURES = (
    Feature("only for a single row (T = 1 and one sequence)",
            lambda c: np.prod(_main(c).shape[:-1]) == 1),
    Feature("only for T = 1", lambda c: _main(c).ndim > 1 and _main(c).shape[-2] == 1),
    Feature("only for a single sequence", lambda c: _main(c).ndim > 2 and _main(c).shape[0] == 1),
    Feature("only for rows of one entry", lambda c: _main(c).shape[-1] == 1),
    Feature("only for a square weight", lambda c: any(
        _size(c, name, 0) == _size(c, name, 1) > 0 for name in ("w", "table"))),
    Feature("only for rank 1", lambda c: _size(c, "B", 0) == 1),
    Feature("only for one head", lambda c: c.inputs.get("heads") == 1),
    Feature("only where no index comes twice", lambda c: "index" in c.inputs
            and len(np.unique(c.inputs["index"])) == c.inputs["index"].size),
    Feature("only where no target is ignored", lambda c: "targets" in c.inputs
            and not (c.inputs["targets"] == c.inputs.get("ignore_index", -100)).any()),
    Feature("only for T up to 64, where all queries are one tile",
            lambda c: _main(c).ndim > 1 and _main(c).shape[-2] <= 64),
    Feature("only where the offset is 0", lambda c: c.inputs.get("offset") == 0),
)  # fmt: skip


def _where(exercise: Exercise, answers: list[Answer], output: str) -> str:
    """What the cases have in which the output is right, and the others have not; "" if nothing."""
    telling = [a for a in answers if a.want.get(output) is not None and np.any(a.want[output])]
    right = {id(a): is_close(a.got.get(output), a.want[output]) for a in telling}
    if not any(right.values()):
        return ""
    for feature in FEATURES:
        if all(feature.has(a.case) == right[id(a)] for a in telling):
            return f"{output} is right {feature.words}."
    by_task: dict[str, list[bool]] = {}
    for a in telling:
        by_task.setdefault(a.case.name, []).append(right[id(a)])
    good = [name for name, k in by_task.items() if all(k)]
    bad = [name for name, k in by_task.items() if not all(k)]
    if good and bad:
        right_in, wrong_in = (" and ".join(map(repr, names)) for names in (good, bad))
        return f"{output} is right in the case {right_in}, wrong in {wrong_in}: compare the two."
    for feature in FEATURES:
        if all(right[id(a)] for a in telling if feature.has(a.case)) and any(
            feature.has(a.case) for a in telling
        ):
            words = feature.words.removeprefix("only ")
            return f"{output} is right {words}, and wrong in some other cases."
    return ""


def shapes_told(error: BaseException, case: Case) -> str:
    """The shapes, where the error is about them."""
    words = ("matmul", "broadcast", "shape", "dimension", "axis", "axes", "aligned")
    if not isinstance(error, ValueError | IndexError) or not any(w in str(error) for w in words):
        return ""
    shapes = ", ".join(f"{k} {np.shape(x)}" for k, x in case.inputs.items() if np.ndim(x))
    return (
        f"The shapes are {shapes}: write them below your equation, and see which factor is to be "
        "transposed, or which sum is missing."
    )
