"""Files replaced in one step, and JSON read with clear errors."""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minilora.errors import MiniloraError

Scalar = TypeVar("Scalar", int, float, bool, str)


# --- writing -----------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary `NAME.tmp` to write to, flushed and renamed to `path` when the block succeeds.

    Whoever reads `path` finds the old file or the new one, never a part, even if the program is
    killed here; a block that fails leaves nothing behind. Raises MiniloraError where the system
    refuses to write.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors writes files that only their owner can read
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise MiniloraError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace the file in one step."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Replace the file in one step by UTF-8 text, its line ends as they are."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, document: Mapping[str, Any]) -> None:
    """Replace the file in one step by a JSON object with sorted keys, two spaces deep."""
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False, default=plain)
    write_text(path, text + "\n")


def plain(value: Any) -> Any:
    """A NumPy scalar as the number that it is, which JSON can hold; TypeError for anything else."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def make_folder(path: str | Path) -> Path:
    """The folder, made with its parents where it is missing; MiniloraError where it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MiniloraError(f"cannot make the folder {path}: {error.strerror or error}") from error
    return Path(path)


# --- reading -----------------------------------------------------------------------------------


def check_file(path: str | Path) -> Path:
    """The path of an existing file; MiniloraError where there is none, or not a plain file."""
    path = Path(path)
    try:
        if path.is_file():
            return path
        problem = "is not a file" if path.exists() else "does not exist"
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        problem = f"cannot be read: {error}"
    raise MiniloraError(f"{path} {problem}")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises MiniloraError if the file is missing, not UTF-8, not JSON, or no object.
    """
    path = check_file(path)
    try:
        document = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise MiniloraError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise MiniloraError(f"{path} is not UTF-8 text, expected JSON") from None
    except (ValueError, RecursionError) as error:
        raise MiniloraError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise MiniloraError(f'{path} holds no JSON object: expected {{ "name": value, … }}')
    return document


def field(
    document: Mapping[str, Any], name: str, kind: type[Scalar], default: Scalar, *, where: object
) -> Scalar:
    """A field of the JSON object found at `where`, or its default.

    Raises MiniloraError unless the value is of `kind`; a float is any finite number, a bool no int.
    """
    value = document.get(name, default)
    if kind is float and type(value) is int:
        with suppress(OverflowError):
            value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise MiniloraError(f"{where}: {name} is {reprlib.repr(value)}, expected {names[kind]}")
    return value
