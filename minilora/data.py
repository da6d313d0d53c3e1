"""Text in, batches out: corpora and the windows for training and evaluation.

Everything here lives on the host and is NumPy: tokens are 1-D int32 arrays, and whatever is random
comes from the generator that the caller passes in.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilora.errors import MiniloraError
from minilora.tokenizer import Tokenizer

PYTHON_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


# --- Text --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """One text and where it came from: a path, or a path within the standard library."""

    name: str
    text: str


def read_documents(source: str) -> list[Document]:
    """The documents of one source, in an order that does not depend on the machine.

    A source is a file, a folder (every text file below it; hidden, empty and binary files are
    skipped), `python` (the standard library of this interpreter, without its tests; write
    `./python` for a file or folder of that name) or `-` (standard input). Newlines become `\\n`
    and a byte-order mark is dropped. Raises MiniloraError for a source that is missing or empty
    or, unless a folder led to it, not UTF-8 text.
    """
    if source == "python":
        return read_python()
    if source == "-":
        return [Document("standard input", check_text(sys.stdin.buffer.read(), "standard input"))]
    if not os.path.isdir(source):
        return [Document(source, check_text(read_bytes(Path(source)), source))]
    documents = read_folder(Path(source))
    if not documents:
        raise MiniloraError(f"{source} is a folder without text; expected UTF-8 files below it")
    return documents


def read_bytes(path: Path) -> bytes:
    """The contents of a file; MiniloraError where the system refuses."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise MiniloraError(
            f"cannot read {path} ({error.strerror}); expected a file, a folder, `python` or `-`"
        ) from error


def check_text(data: bytes, name: str) -> str:
    """`decode_text` of a source that must be text; MiniloraError where it is none or is empty."""
    text = decode_text(data)
    if text is None:
        raise MiniloraError(f"{name} is not text in UTF-8")
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


def read_folder(folder: Path, pattern: str = "*", skipped: Iterable[str] = ()) -> list[Document]:
    """Every text file below a folder, sorted, named by its path within the folder."""
    documents = []
    for parts in sorted(path.relative_to(folder).parts for path in folder.rglob(pattern)):
        path = folder.joinpath(*parts)
        if any(part.startswith(".") or part in skipped for part in parts) or not path.is_file():
            continue
        if text := decode_text(read_bytes(path)):
            documents.append(Document("/".join(parts), text))
    return documents


def read_python() -> list[Document]:
    """The .py files of this interpreter's standard library but for tests and packages."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    documents = read_folder(folder, "*.py", PYTHON_SKIPPED)
    if not documents:
        raise MiniloraError(f"the standard library has no .py files in {folder}")
    return documents


def join_documents(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """One stream of tokens, 1-D int32, and the number of UTF-8 bytes that they stand for.

    Between two documents stands the tokenizer's end-of-text token, which counts no byte, or a
    blank line where there is none.
    """
    if tokenizer.end_of_text is None:
        texts = [end_with_blank_line(text) for text in texts[:-1]] + list(texts[-1:])
    pieces = tokenizer.encode_batch(texts)
    if tokenizer.end_of_text is not None:
        end = np.array([tokenizer.end_of_text], np.int32)
        pieces = [piece for document in pieces for piece in (document, end)][:-1]
    tokens = np.concatenate([np.zeros(0, np.int32), *pieces])
    return tokens, sum(len(text.encode("utf-8")) for text in texts)


def end_with_blank_line(text: str) -> str:
    """The text with as many newlines added as make its last line blank."""
    return text + "\n" * (2 - min(2, len(text) - len(text.rstrip("\n"))))


# --- Corpora -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Text to train on and text kept apart to judge by, each one stream of tokens."""

    train: np.ndarray  # 1-D int32
    held_out: np.ndarray  # 1-D int32
    train_bytes: int
    held_out_bytes: int
    files: int
    name: str


def load_corpus(
    sources: str | Sequence[str], tokenizer: Tokenizer, *, held_out: float = 0.05
) -> Corpus:
    """Read sources (see `read_documents`) and keep a share of each apart.

    Held out is the last `held_out` of the characters of every file; of `python`, whole files,
    chosen by a hash of their names, so that about the same share is apart on every machine.
    Raises MiniloraError for a bad source or a share outside [0, 1).
    """
    if not 0 <= held_out < 1:
        raise MiniloraError(f"held_out {held_out} is not in [0, 1)")
    sources = [sources] if isinstance(sources, str) else sources
    train: list[str] = []
    apart: list[str] = []
    files = 0
    for source in sources:
        documents = read_documents(source)
        split = split_files if source == "python" else split_tails
        source_train, source_apart = split(documents, held_out)
        train += source_train
        apart += source_apart
        files += len(documents)
    train_tokens, train_bytes = join_documents(train, tokenizer)
    apart_tokens, apart_bytes = join_documents(apart, tokenizer)
    return Corpus(
        train_tokens, apart_tokens, train_bytes, apart_bytes, files, " ".join(map(str, sources))
    )


def split_tails(documents: Sequence[Document], held_out: float) -> tuple[list[str], list[str]]:
    """Texts for training and texts held out: the last characters of every document."""
    train, apart = [], []
    for document in documents:
        cut = len(document.text) - int(len(document.text) * held_out)
        train.append(document.text[:cut])
        apart.append(document.text[cut:])
    return [text for text in train if text], [text for text in apart if text]


def split_files(documents: Sequence[Document], held_out: float) -> tuple[list[str], list[str]]:
    """Texts for training and texts held out: whole documents, in the order of a hash of their name.

    The hash makes the choice the same on every machine, and much the same for every Python.
    """
    names = sorted((document.name for document in documents), key=name_hash)
    sizes = {document.name: len(document.text) for document in documents}
    room = held_out * sum(sizes.values())
    apart = set()
    for name in names:
        if sizes[name] <= room:
            apart.add(name)
            room -= sizes[name]
    return (
        [document.text for document in documents if document.name not in apart],
        [document.text for document in documents if document.name in apart],
    )


def name_hash(name: str) -> bytes:
    """Bytes that depend on nothing but the name."""
    import hashlib  # brings a library of megabytes that nothing else here needs

    return hashlib.sha256(name.encode("utf-8")).digest()


def load_text(sources: str | Sequence[str], tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """All the text of the sources as one stream of tokens, and its number of bytes."""
    sources = [sources] if isinstance(sources, str) else sources
    texts = [document.text for source in sources for document in read_documents(source)]
    return join_documents(texts, tokenizer)


# --- Batches -----------------------------------------------------------------------------------


def check_length(tokens: np.ndarray, *, context: int, name: str) -> None:
    """Raise MiniloraError unless there is one whole window with its targets."""
    if len(tokens) < context + 1:
        raise MiniloraError(
            f"{name} has {len(tokens)} tokens; a context of {context} needs at least {context + 1}"
        )


def draw_batch(
    tokens: np.ndarray, *, batch: int, context: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Random windows and the same windows one token later: (inputs, targets), int32 (B, T)."""
    starts = rng.integers(0, len(tokens) - context, size=batch)
    positions = starts[:, None] + np.arange(context)
    return tokens[positions], tokens[positions + 1]


def windows(
    tokens: np.ndarray, *, context: int, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Consecutive windows: every token but the very first is a target exactly once.

    Yields (inputs, targets), int32 (B, T) with B at most `batch`; what is left after the last
    whole window comes as a (1, rest) batch of its own. Fewer than two tokens yield nothing.
    """
    inputs, targets = tokens[:-1], tokens[1:]
    whole = len(inputs) // context
    for first in range(0, whole, batch):
        part = slice(first * context, min(first + batch, whole) * context)
        yield inputs[part].reshape(-1, context), targets[part].reshape(-1, context)
    rest = slice(whole * context, None)
    if targets[rest].size:
        yield inputs[None, rest], targets[None, rest]
