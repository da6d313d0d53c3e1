"""What the live page runs: one program for each press of a button, in a fresh interpreter.

    python run.py FOLDER

FOLDER holds `order.json` (what to do), `edit.py` (the student's text) and, for training,
`base.npz`. What there is to say goes to standard output, a JSON object on each line; what the
student's code prints goes to standard error.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import minilora
from minilora import fused, lora, ops, tree
from minilora.course.cases import (
    Functions,
    Inputs,
    Outputs,
    Task,
    named,
    normal_cases,
    pair_task,
    whole_cases,
)
from minilora.course.check import check, load, told
from minilora.course.exercises import EXERCISES, Exercise
from minilora.course.puzzles import ALL
from minilora.course.results import said
from minilora.course.skeleton import imports
from minilora.gpt2 import GPTConfig
from minilora.gradcheck import PAIR_TOLERANCE, TOLERANCE
from minilora.model import BUILT_IN, Model
from minilora.pairs import PAIRS, Sizes, table
from minilora.tokenizer import ByteTokenizer

MODULES = (ops, lora)
PROMPT = "def forward(x"
WRITTEN = 120  # tokens of text before and after training
SCALE = 2.0  # s of the adapters: with 1, a forgotten s would be no mistake
CALLS = 40  # of a function that is no exercise: so many, the smallest first


def say(kind: str, **message: Any) -> None:
    """One line for the page."""
    print(
        json.dumps({"kind": kind, **message}, ensure_ascii=False), file=sys.__stdout__, flush=True
    )


# --- what can be edited --------------------------------------------------------------------------


def exercise_of(entry: str) -> Exercise:
    """What an entry of the page's list asks for: `exercise-NAME`, or a function of MODULES."""
    name = entry.removeprefix("exercise-")
    if name != entry:
        return ALL[name]
    found = [exercise for exercise in EXERCISES.values() if name in exercise.functions]
    return found[0] if found else as_exercise(name)


def functions_of(module: ModuleType) -> list[str]:
    """The public functions of a module, in the order of its source."""
    nodes = ast.parse(inspect.getsource(module)).body
    names = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    return [name for name in names if not name.startswith("_")]


def package_text(exercise: Exercise) -> str:
    """The package's own functions as a student's file has them."""
    names = (*exercise.helpers, *exercise.functions)
    found = [inspect.getsource(inspect.unwrap(getattr(exercise.module, name))) for name in names]
    # Formulas without @entrywise, which would compute the package's faster form of them.
    bodies = [text[text.index("def ") :].rstrip() for text in found]
    lines = [line.partition("  #")[0] for line in imports(exercise) if "entrywise" not in line]
    head = "\n".join(["from __future__ import annotations", "", *lines])
    return "\n\n\n".join([head, *bodies]) + "\n"


def as_exercise(name: str) -> Exercise:
    """A function that no exercise asks for, such as a forward pass, as one more exercise.

    Its cases are the calls that the course's pairs and solutions make of it.
    """
    module = next(module for module in MODULES if hasattr(module, name))
    own = getattr(module, name)
    calls = sorted(recorded(own), key=size)

    def call(functions: Functions, inputs: Inputs) -> Outputs:
        bound = inspect.signature(own).bind(**inputs)
        result = functions[name](*bound.args, **bound.kwargs)
        if name.endswith("_forward"):
            y, cache = named(result, ["y", "cache"]).values()
            return parts("y", y) | parts("cache", cache)
        if name == "merged_heads":  # makes room, and says nothing about what is there
            result = [room.shape for room in result]
        return parts("result", result)

    task = Task(lambda rng, inputs: dict(inputs), call, tuple(calls[:CALLS]))  # type: ignore
    title = (inspect.getdoc(own) or "").partition("\n")[0]
    return Exercise(name, title, module, (name,), "", 0, (), {name: task})


def size(inputs: Inputs) -> int:
    """How many numbers there are in the arguments of a call."""
    return sum(np.size(part) for part in parts("", tuple(inputs.values())).values())


def recorded(own: Callable[..., Any]) -> list[Inputs]:
    """The calls of a function of the package in the course's cases, by their arguments' names."""
    found: list[Inputs] = []

    @functools.wraps(own)
    def recorder(*arguments: Any, **constants: Any) -> Any:
        bound = inspect.signature(own).bind(*arguments, **constants)
        found.append(copy.deepcopy(dict(bound.arguments)))
        return own(*arguments, **constants)

    with replaced({own: recorder}):
        pairs = {n: pair_task(pair) for n, pair in PAIRS.items() if pair.sizes == Sizes()}
        backward = {pair.backward.__name__: pair.backward for pair in PAIRS.values()}
        tasks = [(pairs, backward), *((e.tasks, e.reference()) for e in EXERCISES.values())]
        for of, functions in tasks:
            for case in (*whole_cases(of, seeds=1), *normal_cases(of)):
                case.outputs(functions)
    return found


def parts(name: str, value: Any) -> Outputs:
    """The arrays and numbers of a result, by their places in it."""
    if isinstance(value, slice):
        return {name: np.array([value.start, value.stop, value.step], np.float64)}  # None: NaN
    if isinstance(value, tuple | list | Iterator):
        named = value._asdict() if hasattr(value, "_asdict") else dict(enumerate(value))
        found = [parts(f"{name}.{key}", part) for key, part in named.items()]
        return {key: part for outputs in found for key, part in outputs.items()}
    return {name: value} if value is None or isinstance(value, np.ndarray | float | int) else {}


# --- the student's functions in the package ------------------------------------------------------


@contextlib.contextmanager
def replaced(functions: dict[Callable[..., Any], Callable[..., Any]]) -> Iterator[None]:
    """Within, other functions in place of the package's own: in its modules, in its register."""
    places = [
        (vars(module), name, value)
        for key, module in list(sys.modules.items())
        if key.partition(".")[0] == "minilora"
        for name, value in list(vars(module).items())
        if inspect.isfunction(value) and value in functions
    ]
    pairs = dict(PAIRS)
    try:
        for space, name, value in places:
            space[name] = functions[value]
        for name, pair in pairs.items():
            forward, backward = (functions.get(f, f) for f in (pair.forward, pair.backward))
            PAIRS[name] = pair._replace(forward=forward, backward=backward)
        yield
    finally:
        PAIRS.update(pairs)
        for space, name, value in places:
            space[name] = value


@contextlib.contextmanager
def with_edit(exercise: Exercise, text: str) -> Iterator[Functions]:
    """Within, the package computes with the student's functions; how often each was called."""
    calls = dict.fromkeys(exercise.functions, 0)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **constants: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **constants)

        return call

    students = load(exercise, text, exercise.file)
    own = exercise.reference()
    for name in exercise.functions:
        vars(fused).pop(name, None)  # which would be computed in place of the formula
    with replaced({own[name]: counted(name, f) for name, f in students.items()}):
        yield calls


# --- what the buttons do -------------------------------------------------------------------------


def do_check(order: dict[str, Any], folder: Path) -> None:
    """The verdict of the course."""
    verdict = check(exercise_of(order["entry"]), text_of(folder))
    empty = verdict.failure is not None and verdict.failure.kind == "unwritten"
    points = {"points": verdict.points, "max_points": verdict.max_points}
    say("verdict", right=verdict.failure is None, empty=empty, text=said(verdict), **points)


def do_table(order: dict[str, Any], folder: Path) -> None:
    """The table of `minilora gradcheck`, computed with the student's functions."""
    with with_edit(exercise_of(order["entry"]), text_of(folder)):
        for row in table():
            tolerance = TOLERANCE if row.name.startswith("model") else PAIR_TOLERANCE
            say("row", name=row.name, error=row.error, right=row.error <= tolerance)


def do_train(order: dict[str, Any], folder: Path) -> None:
    """LoRA on the built-in base with the student's functions: losses, text before and after."""
    steps, rank = order["steps"], order["rank"]
    model = base_model(folder)
    text = order["text"] or source_text(files("minilora"))
    corpus = minilora.corpus_from_text(text, model.tokenizer)
    config = minilora.LoRAConfig(rank=rank, alpha=SCALE * rank, targets=tuple(order["targets"]))
    settings = minilora.TrainConfig(
        steps=steps, batch=2, context=128, lr=order["lr"], warmup=steps // 5,
        log_every=1, eval_every=max(1, steps // 4), eval_tokens=1024, threads=1,
    )  # fmt: skip
    say("text", label="before", text=written(model))
    exercise = exercise_of(order["entry"])
    edit = with_edit(exercise, text_of(folder)) if order["edited"] else contextlib.nullcontext({})
    with edit as calls:
        adapted, trained = minilora.adapt(model, corpus, config, settings, report=report)
    say("text", label="after", text=written(adapted))
    say("trained", held_out=trained.history.held_out, calls=calls)


def report(progress: Any) -> None:
    """A step of training."""
    say("loss", step=progress.step, loss=progress.loss, held_out=progress.held_out)


def source_text(folder: Any) -> str:
    """The package's own source, as one text: the built-in base has read only English prose."""
    found = sorted(folder.iterdir(), key=lambda path: path.name)
    texts = [source_text(path) if path.is_dir() else path.read_text(encoding="utf-8")
             for path in found if path.is_dir() or path.name.endswith(".py")]  # fmt: skip
    return "".join(texts)


def base_model(folder: Path) -> Model:
    """The built-in base from plain arrays, of float16, as the page's build wrote them."""
    with np.load(folder / "base.npz") as arrays:
        flat = {name: arrays[name] for name in arrays.files}
    config = GPTConfig(**json.loads(flat.pop("config").tobytes()))
    base = tree.unflatten({name: array.astype(np.float32) for name, array in flat.items()})
    return Model(base, config, tokenizer=ByteTokenizer(), folder=BUILT_IN)


def written(model: Model) -> str:
    """A prompt, and how the model goes on."""
    return PROMPT + model.generate(PROMPT, max_tokens=WRITTEN, temperature=0.7, seed=3)


def text_of(folder: Path) -> str:
    """The student's text."""
    return (folder / "edit.py").read_text(encoding="utf-8")


def main(folder: Path) -> None:
    """Carry out the order; what a student's text can cause is told, with its line."""
    order = json.loads((folder / "order.json").read_text(encoding="utf-8"))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            {"check": do_check, "table": do_table, "train": do_train}[order["action"]](
                order, folder
            )
    except BaseException as error:
        say("error", text=told(error, exercise_of(order["entry"]).file))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
