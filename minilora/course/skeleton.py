"""Files to fill in, cut from the package's own source: all but the bodies of the functions."""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from pathlib import Path
from types import ModuleType

from minilora.course.check import UNWRITTEN
from minilora.course.exercises import Exercise, tags
from minilora.errors import MiniloraError
from minilora.formats.files import write_text

HINTS = ("none", "tags", "equations")


def skeleton(exercise: Exercise, hints: str = "tags") -> str:
    """The text of a student's file: imports, signatures, docstrings, the cache unpacked.

    `hints`: of the equations nothing, their tags, or what they say.
    """
    lines = [f'"""{exercise.title}.', ""]
    lines += textwrap.wrap(_introduction(exercise), 98)
    lines += ["", f"Derive it first: {exercise.page}", f"Check it: {_command(exercise)}", '"""', ""]
    lines += ["from __future__ import annotations", "", *imports(exercise)]
    for name in exercise.functions:
        lines += ["", "", *head(getattr(exercise.module, name))]
        if name == exercise.functions[-1]:
            lines += [f"    # {line}" for line in hinted(exercise, hints)]
        lines += [f'    raise NotImplementedError("{UNWRITTEN}")']
    return "\n".join(lines) + "\n"


def _introduction(exercise: Exercise) -> str:
    worth = len(exercise.gradients())
    points = f"{worth} point{'s' * (worth > 1)}: {', '.join(exercise.gradients())}."
    before = f" Comes after: {', '.join(exercise.needs)}." if exercise.needs else ""
    target = f" {exercise.aim}" if exercise.aim else ""
    return f"{points} About {exercise.minutes} minutes.{before}{target}"


def _command(exercise: Exercise) -> str:
    return f"minilora course check . --only {exercise.name}"


def hinted(exercise: Exercise, hints: str) -> list[str]:
    """The comments that say which equations are to be written."""
    found = tags(exercise)
    if hints == "none" or not found:
        return []
    if hints == "tags":
        return [f"The equations, in order: {', '.join(f'[{tag}]' for tag, _ in found)}"]
    return [f"[{tag}] {text}".rstrip() for tag, text in found]


def head(function: object) -> list[str]:
    """The lines of a function before its body; the unpacking of a cache belongs to them."""
    source = inspect.getsource(inspect.unwrap(function))  # type: ignore[arg-type]
    lines = source.splitlines()
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef)
    start = node.lineno - 1  # after the decorators
    first, *rest = node.body  # the docstring
    kept = rest[0] if rest and is_unpacking(rest[0]) else first
    return lines[start : kept.end_lineno]


def is_unpacking(statement: ast.stmt) -> bool:
    """Whether a statement takes the entries of a cache."""
    return isinstance(statement, ast.Assign) and ast.unparse(statement.value) == "cache"


def imports(exercise: Exercise) -> list[str]:
    """The import statements of what signatures and bodies use, but for the answer itself."""
    used: set[str] = set()
    for name in (*exercise.functions, *exercise.helpers):
        function = inspect.unwrap(getattr(exercise.module, name))
        tree = ast.parse(inspect.getsource(function))
        used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used -= {*exercise.functions, *exercise.helpers, *dir(builtins)}
    used |= {name.replace("_backward", "_forward") for name in exercise.functions
             if "_backward" in name} - set(exercise.functions)  # fmt: skip
    own, others = [], []
    statements = _import_statements(exercise.module)
    for name in sorted(used & set(vars(exercise.module))):
        if name in statements:
            others.append(statements[name])
        else:
            own.append(name)
    if "np" not in used:
        others.append("import numpy as np")
    found = sorted(set(others), key=lambda line: (line.startswith("from"), line))
    if own:
        found.append(f"from {exercise.module.__name__} import {', '.join(own)}")
    return [line for line in _merged(found) if "__future__" not in line]


def _import_statements(module: ModuleType) -> dict[str, str]:
    """How a module imports each name that it imports."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        for alias in getattr(node, "names", ()):
            name = alias.asname or alias.name
            said = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
            if isinstance(node, ast.Import):
                found[name] = f"import {said}"
            elif isinstance(node, ast.ImportFrom):
                found[name] = f"from {node.module} import {said}"
    return found


def _merged(lines: list[str]) -> list[str]:
    """Imports from one module on one line; unused ones are no fault of the student's."""
    names: dict[str, list[str]] = {}
    for line in lines:
        start, _, rest = line.partition(" import ")
        names.setdefault(start if rest else line, []).extend([rest] if rest else [])
    return [
        f"{k} import {', '.join(v)}  # noqa: F401" if v else f"{k}  # noqa: F401"
        for k, v in names.items()
    ]


def write_skeletons(folder: Path, exercises: list[Exercise], hints: str) -> dict[str, bool]:
    """A file for each exercise, where there is none; by name, whether it was written.

    Raises MiniloraError where the folder is no folder or cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise MiniloraError(f"{folder} is a file; expected a folder for the exercises")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MiniloraError(f"cannot make the folder {folder}: {error.strerror}") from error
    written = {}
    for exercise in exercises:
        path = folder / exercise.file
        written[exercise.name] = not path.exists()
        if written[exercise.name]:
            write_text(path, skeleton(exercise, hints))
    return written
