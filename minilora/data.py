"""Text in, batches out: corpora and the windows for training and evaluation.

Everything here lives on the host and is NumPy: tokens are 1-D int32 arrays, and whatever is random
comes from the generator that the caller passes in.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from minilora.described import Described
from minilora.errors import MiniloraError
from minilora.texts import Document, LeftOut, Source, read_documents
from minilora.tokenizer import Tokenizer
from minilora.workers import SHARD_TOKENS

IGNORED = -100  # as a target: the loss does not count it

Batch = tuple[np.ndarray, np.ndarray]  # inputs and targets, each int32 (B, T)


class Data(Protocol):
    """What training reads: a Corpus, or Records."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def today(self) -> str | None:
        """The date, where it is part of what is read."""

    def check(self, *, context: int) -> None:
        """Raise MiniloraError where it cannot be read in a context, or nothing is held out."""

    def arrays(self) -> Iterable[np.ndarray]:
        """All that is read, by which a run knows its data again."""

    def draw(
        self, rng: np.random.Generator, *, step: int, batch: int, context: int, seed: int
    ) -> Batch:
        """The batch of a step, which depends on the seed and the step alone."""

    def tokens_in(self, batch: int, context: int) -> float:
        """How many inputs a batch has, padding aside: on average, where they differ."""

    def held_out_batches(self, *, context: int, limit: int) -> list[Batch]:
        """The held-out part, or as much of it as has `limit` inputs: the same at every call."""


# --- Streams -----------------------------------------------------------------------------------


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


@dataclass(frozen=True, repr=False)
class Corpus(Described):
    """Text to train on and held-out text, each one stream of tokens."""

    train: np.ndarray  # 1-D int32
    held_out: np.ndarray  # 1-D int32
    train_bytes: int
    held_out_bytes: int
    files: int
    name: str
    left_out: tuple[LeftOut, ...] = ()  # the files in folders that were not read
    today: str | None = None

    def _described(self) -> dict[str, str]:
        left_out = f", {len(self.left_out):,} left out" if self.left_out else ""
        return {
            "Corpus": reprlib.repr(self.name),
            "files": f"{self.files:,} read{left_out}",
            "training": f"{len(self.train):,} tokens, {self.train_bytes:,} bytes",
            "held-out": f"{len(self.held_out):,} tokens, {self.held_out_bytes:,} bytes",
        }

    def check(self, *, context: int) -> None:
        """Raise MiniloraError for text that is too short to train on, or to hold out."""
        check_length(self.train, context=context, name=f"the training part of {self.name}")
        if len(self.held_out) < 2:
            raise MiniloraError(f"{self.name} is too short: nothing of it can be held out")

    def arrays(self) -> list[np.ndarray]:
        """Both streams."""
        return [self.train, self.held_out]

    def draw(
        self, rng: np.random.Generator, *, step: int, batch: int, context: int, seed: int
    ) -> Batch:
        """Random windows (see `draw_batch`), from the generator of the step."""
        return draw_batch(self.train, batch=batch, context=context, rng=rng)

    def tokens_in(self, batch: int, context: int) -> float:
        """The tokens of a batch."""
        return batch * context

    def held_out_batches(self, *, context: int, limit: int) -> list[Batch]:
        """Windows of the held-out text (see the function of this name)."""
        return held_out_batches(self.held_out, context=context, limit=limit)


def load_corpus(
    sources: Source | Sequence[Source], tokenizer: Tokenizer, *, held_out: float = 0.05
) -> Corpus:
    """Read sources (see `read_documents`) and hold out a share of each.

    Held out is the last `held_out` of the characters of every file; of `python`, whole files,
    chosen by a hash of their names, so that they are much the same on every machine.
    Raises MiniloraError for a bad source or a share outside [0, 1).
    """
    check_share(held_out)
    sources = as_list(sources)
    train: list[str] = []
    apart: list[str] = []
    files = 0
    left_out: list[LeftOut] = []
    for source in sources:
        documents, not_read = read_documents(source)
        left_out += not_read
        split = split_files if source == "python" else split_tails
        source_train, source_apart = split(documents, held_out)
        train += source_train
        apart += source_apart
        files += len(documents)
    train_tokens, train_bytes = join_documents(train, tokenizer)
    apart_tokens, apart_bytes = join_documents(apart, tokenizer)
    name = " ".join(map(str, sources))
    return Corpus(
        train_tokens, apart_tokens, train_bytes, apart_bytes, files, name, tuple(left_out)
    )


def as_list(sources: Source | Sequence[Source]) -> Sequence[Source]:
    """Several sources, or the only one."""
    return [sources] if isinstance(sources, str | os.PathLike) else sources


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

    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()


def corpus_from_text(
    text: str, tokenizer: Tokenizer, *, held_out: float = 0.05, name: str = "the text"
) -> Corpus:
    """A corpus of one text in memory; the last `held_out` of its characters are held out.

    Raises MiniloraError for an empty text or a share outside [0, 1).
    """
    check_share(held_out)
    if not text:
        raise MiniloraError(f"{name} is empty; expected text")
    train, apart = split_tails([Document(name, text)], held_out)
    train_tokens, train_bytes = join_documents(train, tokenizer)
    apart_tokens, apart_bytes = join_documents(apart, tokenizer)
    return Corpus(train_tokens, apart_tokens, train_bytes, apart_bytes, 1, name)


def check_share(held_out: float) -> None:
    """Raise MiniloraError unless the share that is held out is in [0, 1)."""
    if not 0 <= held_out < 1:
        raise MiniloraError(f"held_out {held_out} is not in [0, 1)")


class Text(NamedTuple):
    """All the text of some sources as one stream of tokens, and how many UTF-8 bytes that is."""

    tokens: np.ndarray  # 1-D int32
    bytes: int
    left_out: tuple[LeftOut, ...]  # the files in folders that were not read


def load_text(sources: Source | Sequence[Source], tokenizer: Tokenizer) -> Text:
    """All the text of the sources (see `read_documents`), nothing of it held out."""
    read = [read_documents(source) for source in as_list(sources)]
    tokens, size = join_documents([d.text for documents, _ in read for d in documents], tokenizer)
    return Text(tokens, size, tuple(entry for _, left_out in read for entry in left_out))


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


def held_out_batches(tokens: np.ndarray, *, context: int, limit: int) -> list[Batch]:
    """All of a held-out stream in windows of `context`, or as many spread evenly as `limit` allows.

    The same windows at every call, so that losses during training can be compared.
    """
    context = min(context, len(tokens) - 1)
    rows = max(1, SHARD_TOKENS // context)
    if len(tokens) - 1 <= limit:
        return list(windows(tokens, context=context, batch=rows))
    starts = np.linspace(0, len(tokens) - 1 - context, max(1, limit // context)).astype(np.int64)
    spread = starts[:, None] + np.arange(context, dtype=np.int64)
    return [
        (tokens[spread[i : i + rows]], tokens[spread[i : i + rows] + 1])
        for i in range(0, len(spread), rows)
    ]
