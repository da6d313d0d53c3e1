"""Files replaced in one step, and JSON read with clear errors."""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import secrets
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from minilora.errors import MiniloraError
from minilora.settings import plain

Scalar = TypeVar("Scalar", int, float, bool, str)

Content: TypeAlias = "Sequence[bytes | memoryview]"
"""What a file is to hold, in pieces: nothing is left to go wrong but the writing itself."""

# A file that is being written (tmp), and an old one set aside until the new one stays (old).
HIDDEN = re.compile(r"\.minilora-[0-9a-f]{16}\.(tmp|old)")
HOUR = 3600.0  # seconds
LIMIT = 100_000_000  # bytes of a file that is read whole, as safetensors has it for its header


# --- writing -----------------------------------------------------------------------------------


def write_file(path: str | Path, content: Content) -> None:
    """Replace a file in one step: at every moment, it is the old one or the new one.

    A link stays and its target is replaced. Raises MiniloraError where the system refuses to write,
    and for what is no plain file.
    """
    with errors_naming(Path(path)):
        target = Path(os.path.realpath(path))
        with written_beside(target, content) as temporary:
            os.replace(temporary, target)
        flush_folder(target.parent)


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


@contextmanager
def written_beside(target: Path, content: Content) -> Iterator[Path]:
    """What is to become a file, written and flushed beside it; at the end it is gone.

    It has the permissions of the file that is there. A killed process leaves it behind, under a
    name that nobody else would choose, and whoever writes there an hour later or more removes it.
    """
    if target.exists() and not target.is_file():
        raise MiniloraError(f"cannot write {target}: it is not a plain file")
    if target.exists() and not os.access(target, os.W_OK):  # which renaming would not ask
        raise MiniloraError(f"cannot write {target}: it is write-protected")
    remove_temporaries(target.parent, older_than=HOUR)
    path = target.with_name(hidden_name("tmp"))
    try:
        with path.open("xb") as file:
            if target.exists():
                path.chmod(target.stat().st_mode)
            for part in content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def hidden_name(kind: str) -> str:
    """A file name of our own, as HIDDEN describes them, that no file has yet."""
    return f".minilora-{secrets.token_hex(8)}.{kind}"


def remove_temporaries(folder: Path, *, older_than: float = 0.0) -> None:
    """Remove temporary files of some age in seconds, as far as the system allows it."""
    with suppress(OSError):
        for path in [*folder.iterdir()]:
            if HIDDEN.fullmatch(path.name) and path.suffix == ".tmp":
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime >= older_than:
                        path.unlink()


def flush_folder(folder: Path) -> None:
    """Have the system write down what a folder's files are called, where it can be asked to."""
    with suppress(OSError):  # Windows opens no folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: str | Path, data: bytes) -> None:
    """`write_file` of these bytes."""
    write_file(path, [data])


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
    """Whether a folder has an entry of that name, even a broken link."""
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


def file_checksum(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    crc = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            crc = zlib.crc32(part, crc)
    return crc


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
