"""Text from files, folders, standard input and Python's standard library, and what was left out.

In a folder only text is read; every other file is listed, with the reason.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import stat
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from minilora.errors import MiniloraError

PYTHON_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
NAMED = 3  # files that a summary names for each reason

NOT_TEXT, NOT_REGULAR = "not text", "not a regular file"
JSON_LINES, JSON_LIST = "in JSON Lines", "a JSON list of records"
READ_ALREADY, OF_A_MODEL = "read under another path", "of a model or a training run"
# A folder that holds all files of one of these sets is a model's or a training run's.
OF_MODELS = (
    {"adapter_config.json"},
    {"adapter_model.safetensors"},
    {"checkpoint.safetensors"},
    {"training.json"},
    {"config.json", "model.safetensors"},
    {"config.json", "model.safetensors.index.json"},
)
TEMPLATES = "additional_chat_templates"  # of a model, in a folder of their own
MARKS = {  # UTF-32's first: its little-endian mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
CONTROLS = bytes({*range(32), 127} - set(b"\t\n\v\f\r\x1b"))

Source: TypeAlias = str | os.PathLike[str]


class LeftOut(NamedTuple):
    """A file, or a folder with its files, that was not read, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Document:
    """One text and its origin: a path, or a path within a folder or the standard library."""

    name: str
    text: str


def read_documents(source: Source) -> tuple[list[Document], list[LeftOut]]:
    """The documents of one source, in the same order on every machine, and what was left out.

    A source is a file, a folder (every text file below it), `python` (the standard library of this
    interpreter, without its tests; a file or folder of that name is `./python` or a Path) or `-`
    (standard input). Newlines become `\\n` and a byte-order mark is dropped. Raises MiniloraError
    for a source that is missing, empty, or not UTF-8 text, and for a file of JSON Lines, which only
    standard input accepts; in a folder such files are left out.
    """
    if source == "python":
        return read_python()
    name = "standard input" if source == "-" else os.fspath(source)
    if source == "-":
        return [Document(name, check_text(sys.stdin.buffer.read(), name))], []
    if not os.path.isdir(name):
        text = check_text(read_bytes(Path(name)), name)
        if is_json_lines(name, text):
            raise MiniloraError(
                f"{name} is in JSON Lines; expected text (adapt, evaluate and load_records read "
                "records; as standard input, `-`, the lines are text)"
            )
        if is_json_list(text):
            raise MiniloraError(
                f"{name} is {JSON_LIST}; expected text, or records one a line, in JSON Lines "
                "(as standard input, `-`, it is text)"
            )
        return [Document(name, text)], []
    documents, left_out = read_folder(Path(name))
    if not documents:
        because = f" ({summary(left_out)})" if left_out else ""
        raise MiniloraError(f"{name} is a folder without text{because}; expected UTF-8 files in it")
    return documents, [LeftOut(os.path.join(name, path), reason) for path, reason in left_out]


# --- one file ----------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """The contents of a file or pipe; MiniloraError if it cannot be read, and for a device."""
    try:
        if path.is_char_device() or path.is_block_device():  # /dev/zero has no end
            raise OSError(errno.ENODEV, "it is a device")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or error
        raise MiniloraError(
            f"cannot read {path} ({reason}); expected a file, a folder, `python` or `-`"
        ) from error


def check_text(data: bytes, name: str) -> str:
    """`decode_text` of a source; MiniloraError if it is not text or is empty."""
    text = decode_text(data)
    if text is None:
        encoding = encoding_of(data)
        but = "" if encoding == NOT_TEXT else f" but {encoding}; convert it first"
        raise MiniloraError(f"{name} is not text in UTF-8{but}")
    if not text:
        raise MiniloraError(f"{name} is empty; expected text")
    return text


def decode_text(data: bytes) -> str | None:
    """UTF-8 bytes as text with `\\n` newlines and no byte-order mark; None for anything else."""
    if b"\0" in data:  # valid UTF-8, yet only binary files have it
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def encoding_of(data: bytes) -> str:
    """The encoding of data that is not UTF-8, by its byte-order mark or guessed, or NOT_TEXT."""
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return f"in {encoding}"
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return NOT_TEXT
    return NOT_TEXT if data.translate(None, CONTROLS) != data else "perhaps in cp1252"


def is_json_lines(name: str, text: str) -> bool:
    """Whether a text is JSON Lines: by its file's name, or because each line is a JSON object."""
    if name.lower().endswith((".jsonl", ".ndjson")):
        return True
    lines = [line for line in text.split("\n") if line.strip()] if text.lstrip()[:1] == "{" else []
    return len(lines) > 1 and all(map(is_json_object, lines))


def is_json_list(text: str) -> bool:
    """Whether a text is one JSON list of objects, as data sets come, too."""
    try:
        found = json.loads(text) if text.lstrip()[:1] == "[" else None
    except (ValueError, RecursionError):
        return False
    return isinstance(found, list) and found != [] and all(isinstance(x, dict) for x in found)


def is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


# --- folders -----------------------------------------------------------------------------------


def read_folder(
    folder: Path, suffix: str = "", skipped: Collection[str] = ()
) -> tuple[list[Document], list[LeftOut]]:
    """Every text file below a folder, sorted, by its path within the folder; and what is left out.

    Hidden files, `skipped` names, files without the suffix, and empty files are not listed.
    """
    documents: list[Document] = []
    left_out: list[LeftOut] = []
    for parts, found in sorted(walk(folder, skipped), key=lambda entry: entry[0]):
        name = "/".join(parts)
        if not name.endswith(suffix):
            continue
        text, reason = ("", found) if found else read_file(folder / name)
        if text:
            documents.append(Document(name, text))
        elif reason:
            left_out.append(LeftOut(name or ".", reason))
    return documents, left_out


def read_file(path: Path) -> tuple[str, str]:
    """The text of a file in a folder and no reason, or no text and why the file is left out."""
    try:
        data = path.read_bytes()
    except OSError as error:  # not readable, or deleted since it was listed
        return "", unreadable(error)
    text = decode_text(data)
    if text is None:
        return "", encoding_of(data)
    if is_json_lines(path.name, text):
        return "", JSON_LINES
    return ("", JSON_LIST) if is_json_list(text) else (text, "")


def unreadable(error: OSError) -> str:
    return f"unreadable: {error.strerror}"


def walk(folder: Path, skipped: Collection[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every file below a folder: the parts of its path, and the reason if it is left out, or "".

    Links are followed last, so that a file or folder is found by its own path first. Each place is
    visited once, so links cannot form an endless loop.
    """
    visited: set[str] = set()
    waiting: list[tuple[str, ...]] = [()]
    links: list[tuple[str, ...]] = []
    while waiting or links:
        parts = waiting.pop() if waiting else links.pop(0)
        path = folder.joinpath(*parts)
        try:
            place, kind = os.path.realpath(path), path.stat().st_mode
            names = sorted(os.listdir(path)) if stat.S_ISDIR(kind) else []
        except OSError as error:  # also a link to nothing
            yield parts, unreadable(error)
            continue
        if place in visited:
            yield parts, READ_ALREADY
        elif not stat.S_ISDIR(kind):
            yield parts, "" if stat.S_ISREG(kind) else NOT_REGULAR
        elif any(files <= set(names) for files in OF_MODELS):
            yield parts, OF_A_MODEL
            names = [name for name in names if (path / name).is_dir() and name != TEMPLATES]
        if place not in visited:
            visited.add(place)
            for name in names:
                if not (name.startswith(".") or name in skipped):
                    (links if (path / name).is_symlink() else waiting).append((*parts, name))


def read_python() -> tuple[list[Document], list[LeftOut]]:
    """The .py files of this interpreter's standard library, without tests and packages."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    documents, left_out = read_folder(folder, ".py", PYTHON_SKIPPED)
    if not documents:
        raise MiniloraError(f"the standard library has no .py files in {folder}")
    return documents, left_out


def summary(left_out: Iterable[LeftOut]) -> str:
    """One line: how many files were left out for each reason, and the names of the first."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out:
        shown = "".join(c if c.isprintable() else "?" for c in name)
        by_reason.setdefault(reason, []).append(shown)
    parts = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - NAMED} more" if names[NAMED:] else ""
        parts.append(f"{len(names)} {reason} ({', '.join(names[:NAMED])}{more})")
    return f"left out: {'; '.join(parts)}"
