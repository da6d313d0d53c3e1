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

from minilora.errors import MiniloraError

Scalar = TypeVar("Scalar", int, float, bool, str)

LIMIT = 100_000_000  # bytes of a file that is read whole, as safetensors has it for its header


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
    write_text(path, json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n")


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


def is_there(path: Path) -> bool:
    """Whether a folder has an entry of that name, be it a link to nothing."""
    return os.path.lexists(path)


def read_file(path: str | Path) -> bytes:
    """The bytes of a plain file; MiniloraError for any other, and for one above LIMIT."""
    path = check_file(path)
    try:
        with path.open("rb") as file:
            data = file.read(min(os.fstat(file.fileno()).st_size, LIMIT) + 1)
    except OSError as error:
        raise MiniloraError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > LIMIT:
        raise MiniloraError(f"{path} is larger than {LIMIT:,} bytes, the most that is read")
    return data


def read_text(path: str | Path, what: str = "text") -> str:
    """The UTF-8 text of a file; errors as in `read_file`, and for another encoding."""
    try:
        return read_file(path).decode("utf-8")
    except UnicodeDecodeError:
        raise MiniloraError(f"{path} is not UTF-8 text, expected {what}") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises MiniloraError as `read_file` does, and if the file is not UTF-8, not JSON, or no object.
    """
    text = read_text(path, "JSON")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MiniloraError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise MiniloraError(f'{path} holds no JSON object: expected {{ "name": value, … }}')
    return document


def shown(text: str, length: int = 200) -> str:
    """A text from a file as a message shows it: quoted where it has line ends and the like, cut."""
    start = text[:length]
    start = start if start.isprintable() else repr(start)
    return start if len(text) <= length else f"{start}… ({len(text):,} characters)"


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
