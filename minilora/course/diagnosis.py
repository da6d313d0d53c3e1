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
from minilora.course.edits import Equation, computed, hypotheses, is_close, is_plain
from minilora.course.exercises import Exercise
from minilora.course.mistakes import LESSONS, Lesson


class Answer(NamedTuple):
    """A case, the student's outputs in it, and the right ones."""

    case: Case
    got: Outputs
    want: Outputs

    def is_right(self, name: str) -> bool:
        """Whether an output is."""
        return is_close(self.got.get(name), self.want.get(name))


class Observed(NamedTuple):
    """What a student's functions do: their answers, and the cases in which they raise an error."""

    answers: list[Answer]
    raising: list[Case]

    @staticmethod
    def of(exercise: Exercise, functions: Functions) -> Observed:
        """The answers to cases of normal numbers."""
        answers, raising = list[Answer](), list[Case]()
        for case in normal_cases(exercise.tasks, (1,)):
            try:
                got = case.outputs(functions)
            except Exception:
                raising.append(case)
            else:
                answers.append(Answer(case, got, case.outputs(exercise.reference())))
        return Observed(answers, raising)


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
    wrong = [name for name in names_of(answers) if not all(a.is_right(name) for a in answers)]
    if not wrong:
        return Found("none", "")
    if output not in wrong:
        output = wrong[0]
    told = _exchanged(answers, wrong) or _of_form(answers, output)
    for names in dict.fromkeys((tuple(wrong), (output,))):
        for others in (True, False):  # first a guess that leaves right what is right
            told = told or _fitting(exercise, observed, names, others)
    told = told or _in_some_tasks(exercise, answers, output)
    if told:
        return Found("exact", told)
    where = _where(answers, output) or _not_finite(answers, output)
    return Found("where", where) if where else Found("none", "")


def names_of(answers: list[Answer]) -> list[str]:
    """The names of all outputs."""
    return list(dict.fromkeys(name for a in answers for name in (*a.want, *a.got)))


def _in_some_tasks(exercise: Exercise, answers: list[Answer], output: str) -> str:
    """The sentence for an output that is right in all cases of some tasks, and wrong in others."""
    of_task: dict[str, list[Answer]] = {}
    for a in answers:
        of_task.setdefault(a.case.name, []).append(a)
    tasks = [
        name for name, own in of_task.items() if any(a.want.get(output) is not None for a in own)
    ]
    right = [name for name in tasks if all(a.is_right(output) for a in of_task[name])]
    wrong = [name for name in tasks if name not in right]
    if not right:
        return ""
    seen = Observed([a for name in wrong for a in of_task[name]], [])
    found = _fitting(exercise, seen, (output,))
    right_in, wrong_in = (" and ".join(map(repr, names)) for names in (right, wrong))
    return f"Right in the case {right_in}; in the case {wrong_in}: {found}" if found else ""


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


REFUSED = {
    "merged.refused": "An adapter of the embedding is merged although the head is tied",
    "unmerged.refused": "An adapter of the embedding is unmerged although the head is tied",
    "refused.weights": "Fewer weights than adapters are taken",
    "refused.infinite": "A weight that is infinite is taken",
    "refused.blocks": "Adapters of bases with different numbers of blocks are mixed",
    "refused.sides": "Adapters of weights with different sides are mixed",
}


def _of_form(answers: list[Answer], output: str) -> str:
    """What is wrong with the kind or the shape of an output, in every case where it is wrong."""
    if output in REFUSED:
        return f"{REFUSED[output]}: raise MiniloraError."
    wrong = [a for a in answers if not a.is_right(output)]
    for a in wrong:
        if a.want.get(output) is None:
            return (
                f"{output} must be None in the case {a.case.name!r}: what it is made of is not in "
                "the cache, as nothing wants it."
            )
    for a in wrong:
        if a.got.get(output) is None:
            return (
                f"{output} is None in the case {a.case.name!r}, where what it is made of is in the "
                "cache."
            )
    both = [(a.got[output], a.want[output]) for a in wrong]
    for got, want in both:
        if is_plain(want) and not is_plain(got):
            kind = f"an array of {got.dtype}" if type(got) is np.ndarray else f"a {_kind(got)}"
            return f"{output} is {kind}: return a NumPy array of the dtype of what you are given."
    if all(
        np.dtype(getattr(got, "dtype", float)) == np.float32
        and np.shape(got) == np.shape(want)
        and np.allclose(got, want, rtol=1e-5, atol=1e-5)
        for got, want in both
    ):
        return f"{output} is float32 where float64 came in: keep the dtype of what you are given."
    off = [(np.shape(got), np.shape(want)) for got, want in both if np.shape(got) != np.shape(want)]
    if not off:
        return ""
    shape, argument = off[-1][0], f"{output.removeprefix('d')} has {off[-1][1]}"
    if all(is_close(np.transpose(got), want) for got, want in both):
        return f"{output} is the transpose of the gradient: it has the shape {shape}, {argument}."
    if all(
        np.size(got) == np.size(want) and is_close(np.reshape(got, np.shape(want)), want)
        for got, want in both
    ):
        return (
            f"{output} has the right numbers in the shape {shape}: reshape them to that of "
            f"{argument.replace(' has', ',')}."
        )
    return f"{output} has the shape {shape}, {argument}: a gradient has the shape of its argument."


def _kind(x: object) -> str:
    return type(x).__name__


def _not_finite(answers: list[Answer], output: str) -> str:
    """Whether an output is NaN or infinite where it should not be."""
    for a in answers:
        got, want = a.got.get(output), a.want.get(output)
        if (
            got is not None
            and want is not None
            and np.isfinite(want).all()
            and not np.isfinite(got).all()
        ):
            return (
                f"{output} is NaN or infinite in the case {a.case.name!r}: look for a division by "
                "0, for ∞ − ∞, or for the root or logarithm of a number that is not positive."
            )
    return ""


# --- hypotheses --------------------------------------------------------------------------------


def _fitting(
    exercise: Exercise, observed: Observed, names: tuple[str, ...], others: bool = False
) -> str:
    """The sentence of the first guess that gives these outputs in every case; "" if none does.

    And "" where another guess gives them too and is another function.
    """
    every = tuple(names_of(observed.answers)) if others else names
    fitting = [g for g in guesses(exercise, names) if _fits(g, observed.answers, names, every)]
    fitting = [g for g in fitting if _raises_alike(g, observed, exercise)]
    if not fitting:
        return ""
    tasks = {a.case.name: a.case.task for a in observed.answers}
    for case in normal_cases(tasks, (5,)):
        want = case.outputs(exercise.reference())
        results = [_given(guess, Answer(case, want, want)) for guess in fitting]
        for name in names:
            if want.get(name) is not None:
                first, *rest = (_like(result.get(name), want[name]) for result in results)
                if not all(is_close(first, other) for other in rest):
                    return ""
    return fitting[0].sentence


def _given(guess: Guess, answer: Answer) -> Outputs:
    """What a guess gives; nothing where it raises."""
    try:
        return guess.gives(answer)
    except Exception:
        return {}


def _fits(
    guess: Guess, answers: list[Answer], names: tuple[str, ...], every: tuple[str, ...]
) -> bool:
    """Whether a guess gives the student's outputs `names`, and where it can those of `every`."""
    told = False
    for answer in answers:
        if all(answer.want.get(name) is None for name in names):
            continue
        gives, told = _given(guess, answer), True
        for name in dict.fromkeys((*names, *every)):
            if answer.want.get(name) is None or (name not in gives and name not in names):
                continue
            mine = _like(gives.get(name), answer.want[name])
            if name not in gives or not is_close(mine, answer.got.get(name)):
                return False
    return told or not names


def _like(x: Any, want: Any) -> Any:
    """A result of the equations, which are of matrices, in the shape of the gradient."""
    if x is None:
        return None
    x, shape = np.asarray(x), np.shape(want)
    try:
        if len(shape) > 2 and x.ndim <= 2:
            return np.broadcast_to(x, (np.prod(shape[:-1], dtype=int), shape[-1])).reshape(shape)
        return np.broadcast_to(x, shape)
    except ValueError:
        return x


def _raises_alike(guess: Guess, observed: Observed, exercise: Exercise) -> bool:
    """Whether the guess is an error wherever the student's code is one."""
    return not any(
        _given(guess, Answer(case, {}, case.outputs(exercise.reference())))
        for case in observed.raising
    )


def guesses(exercise: Exercise, names: tuple[str, ...]) -> Iterator[Guess]:
    """All guesses at outputs that are wrong: classic mistakes first, then the general ones."""
    lesson = LESSONS.get(exercise.name)
    if lesson is None:  # a puzzle
        yield from _general(exercise, names)
        return
    for program, sentence in lesson.classics():
        yield Guess(sentence, _by_program(lesson, program))
    yield from _general(exercise, names)
    case = next(normal_cases(exercise.tasks))
    known = tuple(k for k, v in lesson.bind(case.inputs).items() if not callable(v))
    subject = "Your result is"
    if len(names) == 1:
        subject = f"Your {names[0]} is"
    elif 1 < len(names) < 5:
        subject = f"Your {', '.join(names[:-1])} and {names[-1]} are"
    letters = tuple(lesson.letters.items())
    for h in hypotheses(lesson.equations, known, letters, lesson.factors):
        yield Guess(f"{subject} what {h.where} gives {h.words}.", _by_program(lesson, h.program))


def _by_program(lesson: Lesson, program: tuple[Equation, ...]) -> Callable[[Answer], Outputs]:
    def gives(answer: Answer) -> Outputs:
        found = computed(program, lesson.bind(answer.case.inputs))
        by_name = {name: found.get(name.replace(".", "_")) for name in answer.want}
        return {name: x for name, x in by_name.items() if name.replace(".", "_") in found}

    return gives


def _general(exercise: Exercise, names: tuple[str, ...]) -> Iterator[Guess]:
    """Guesses that need no equation: exchanged, zero, another's, an argument itself."""
    if not names:
        return

    def turned(f: Callable[[Any], Any]) -> Callable[[Answer], Outputs]:
        return lambda v: {n: f(v.want[n]) for n in names if v.want[n] is not None}

    one, name = len(names) == 1, names[0]
    listed = " and ".join(names) if len(names) < 4 else "The results"
    if len(names) == 2:
        yield Guess(
            f"{listed} are exchanged.",
            lambda v: {names[0]: v.want[names[1]], names[1]: v.want[names[0]]},
        )
    yield Guess(f"{listed} {'is' if one else 'are'} zero everywhere.", turned(lambda x: 0 * x))
    yield Guess(f"{listed} {'has' if one else 'have'} the wrong sign.", turned(lambda x: -x))
    if not one:
        return
    case = next(normal_cases(exercise.tasks))
    for other in case.outputs(exercise.reference()):
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
    for word, f in _TURNED.items():
        yield Guess(f"{name} {word}.", turned(f))


_TURNED: dict[str, Callable[[Any], Any]] = {
    "is transposed": np.transpose,
    "has its rows in reverse order": lambda x: x[::-1],
    "is one larger in every entry": lambda x: x + 1,
    "has lost its sign: all entries are positive": np.abs,
    "is rounded to whole numbers": np.round,
    "is correct only in its first row, and zero elsewhere": lambda x: np.concatenate(
        [x[:1], 0 * x[1:]]
    ),
}


# --- what separates right from wrong -----------------------------------------------------------


def _size(case: Case, name: str, axis: int) -> int:
    x = case.inputs.get(name)
    return int(x.shape[axis]) if isinstance(x, np.ndarray) and x.ndim > axis else 0


def _shape(case: Case) -> tuple[int, ...]:
    """The shape of the first array."""
    return next(x.shape for x in case.inputs.values() if isinstance(x, np.ndarray) and x.ndim)


# What a case may have, in words that follow "is right".
FEATURES: dict[str, Callable[[Case], Any]] = {
    "only for a single row (T = 1 and one sequence)": lambda c: np.prod(_shape(c)[:-1]) == 1,
    "only for T = 1": lambda c: _shape(c)[-2:-1] == (1,),
    "only for a single sequence": lambda c: len(_shape(c)) > 2 and _shape(c)[0] == 1,
    "only for rows of one entry": lambda c: _shape(c)[-1] == 1,
    "only for a square weight": lambda c: any(
        _size(c, name, 0) == _size(c, name, 1) > 0 for name in ("w", "table")),
    "only for rank 1": lambda c: _size(c, "B", 0) == 1,
    "only for one head": lambda c: c.inputs.get("heads") == 1,
    "only where no index comes twice": lambda c: "index" in c.inputs
        and len(np.unique(c.inputs["index"])) == c.inputs["index"].size,
    "only where no target is ignored": lambda c: "targets" in c.inputs
        and not (c.inputs["targets"] == c.inputs.get("ignore_index", -100)).any(),
    "only for T up to 64, where all queries are one tile":
        lambda c: len(_shape(c)) > 1 and _shape(c)[-2] <= 64,
    "only where the offset is 0": lambda c: c.inputs.get("offset") == 0,
}  # fmt: skip


def _where(answers: list[Answer], output: str) -> str:
    """What the cases have in which the output is right, and the others have not; "" if nothing."""
    telling = [a for a in answers if a.want.get(output) is not None and np.any(a.want[output])]
    right = [a.is_right(output) for a in telling]
    if not any(right):
        return ""
    has = {words: [bool(f(a.case)) for a in telling] for words, f in FEATURES.items()}
    for words, cases in has.items():
        if cases == right:
            return f"{output} is right {words}."
    by_task: dict[str, list[bool]] = {}
    for a, is_right in zip(telling, right, strict=True):
        by_task.setdefault(a.case.name, []).append(is_right)
    good = " and ".join(repr(name) for name, own in by_task.items() if all(own))
    bad = " and ".join(repr(name) for name, own in by_task.items() if not all(own))
    if good and bad:
        return f"{output} is right in the case {good}, wrong in {bad}: compare the two."
    for words, cases in has.items():
        of_them = [is_right for is_right, here in zip(right, cases, strict=True) if here]
        if of_them and all(of_them):
            return (
                f"{output} is right {words.removeprefix('only ')}, and wrong in some other cases."
            )
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
