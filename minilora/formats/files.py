"""Files replaced together or not at all, and JSON read with clear errors."""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from minilora.errors import MiniloraError
from minilora.settings import plain

Scalar = TypeVar("Scalar", int, float, bool, str)

Content: TypeAlias = "Sequence[bytes | memoryview]"
"""What a file is to hold, in pieces: nothing is left to go wrong but the writing itself."""

TEMPORARY = re.compile(r"\.minilora-[0-9a-f]{16}\.tmp")
LIMIT = 100_000_000  # bytes of a file that is read whole, as safetensors has it for its header


# --- writing -----------------------------------------------------------------------------------


def write_folder(folder: str | Path, files: Mapping[str, Content]) -> None:
    """Write files of a folder, made where it is missing, as `write_files` does; other files stay.

    The last should be the one without which no reader opens the folder: its configuration.
    """
    folder = make_folder(folder)
    write_files({folder / name: content for name, content in files.items()})


def write_files(files: Mapping[Path, Content]) -> None:
    """Replace files, all or none: all are written and flushed before the first is renamed.

    A link stays and its target is replaced. One file is the old or the new one at every moment; of
    several, the old are set aside before, the last first, and come back if a renaming fails: a
    program killed amid the renamings leaves the last one missing, never a mixture that a reader
    would take. Raises MiniloraError where the system refuses to write, and for what is no plain
    file.
    """
    with ExitStack() as temporaries, ExitStack() as undo:
        written, aside = {}, []
        for path, content in files.items():
            with errors_naming(path):
                target = Path(os.path.realpath(path))
                written[path] = target, temporaries.enter_context(_temporary(target))
                _write(*written[path], content)
        for path, (target, _) in reversed(list(written.items()) if len(files) > 1 else []):
            with errors_naming(path):
                if target.exists():
                    aside.append(_temporary_name(target))
                    os.replace(target, aside[-1])
                    undo.callback(os.replace, aside[-1], target)
        for path, (target, temporary) in written.items():
            with errors_naming(path):
                os.replace(temporary, target)
                if len(files) > 1:
                    undo.callback(target.unlink)
        undo.pop_all()
        for old in aside:
            with suppress(OSError):
                old.unlink()
        for folder in {target.parent for target, _ in written.values()}:
            _flush_folder(folder)


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """What the system refuses to do with a file becomes a MiniloraError that names it."""
    try:
        yield
    except MiniloraError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        problem = getattr(error, "strerror", None) or error
        raise MiniloraError(f"cannot write {path}: {problem}") from error


def _temporary_name(target: Path) -> Path:
    """A path beside a file that nobody else has."""
    return target.with_name(f".minilora-{secrets.token_hex(8)}.tmp")


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A new file beside another, under a name of its own; at the end it is gone."""
    path = _temporary_name(target)
    path.open("xb").close()
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _write(target: Path, temporary: Path, content: Content) -> None:
    """Write and flush what is to become a file, with the permissions of the one that is there."""
    if target.exists():
        if not target.is_file():
            raise MiniloraError(f"cannot write {target}: it is not a plain file")
        temporary.chmod(target.stat().st_mode)
    with temporary.open("r+b") as file:
        for part in content:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Have the system write down what a folder's files are called, where it can be asked to."""
    with suppress(OSError):  # Windows opens no folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace one file, as `write_files` does."""
    write_files({Path(path): [data]})


def write_text(path: str | Path, text: str) -> None:
    """Replace one file by UTF-8 text, its line ends as they are."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, document: Mapping[str, Any]) -> None:
    """Replace one file by a JSON object, as `json_bytes` has it."""
    write_bytes(path, json_bytes(document))


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """A JSON object as UTF-8 text with sorted keys, two spaces deep."""
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False, default=json_number)
    return f"{text}\n".encode()


def json_number(value: Any) -> Any:
    """A NumPy scalar as the number that it is, which JSON can hold; TypeError for anything else."""
    if (number := plain(value)) is value:
        raise TypeError(f"{type(value).__name__} is not JSON")
    return number


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
