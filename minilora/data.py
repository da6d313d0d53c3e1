"""Text in, batches out: tokenizers, corpora and the windows for training and evaluation.

Everything here lives on the host and is NumPy: tokens are 1-D int32 arrays, and whatever is random
comes from the generator that the caller passes in.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from minilora.errors import MiniloraError
from minilora.texts import Document, LeftOut, Source, read_documents

END_OF_TEXT = "<|endoftext|>"  # the token that GPT-2 puts between documents


# --- Tokenizers --------------------------------------------------------------------------------


class Tokenizer(Protocol):
    """Text to token ids and back; ids are below `vocab_size`, the size of the base's vocabulary."""

    vocab_size: int
    end_of_text: int | None  # the token between documents, where the vocabulary has one

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, 1-D int32.

        Raises MiniloraError for an id outside the vocabulary: the tokenizer is another model's.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text; some tokenizers share the work among threads."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises MiniloraError for an id outside the vocabulary.
        """

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text of token ids piece by piece as they come, never half a character.

        The pieces put together are `decode` of all the ids.
        """


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raise MiniloraError unless every token id is in [0, vocab_size)."""
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise MiniloraError(
            f"token id {outside[0]} is outside the base's vocabulary of {vocab_size} tokens"
        )


class ByteTokenizer:
    """The 256 byte values as tokens: any text is its UTF-8 bytes, with nothing to learn or load."""

    vocab_size = 256
    end_of_text: int | None = None

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of a text, 1-D int32."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of bytes; those that are not UTF-8 become U+FFFD. Raises for an id above 255."""
        values = np.fromiter(ids, np.int64)
        check_ids(values, self.vocab_size)
        return values.astype(np.uint8).tobytes().decode("utf-8", "replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text of bytes as they come; the bytes of an unfinished character wait for the rest."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            check_ids(np.array([token]), self.vocab_size)
            if piece := decoder.decode(bytes([int(token)])):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest


class BPETokenizer:
    """A tokenizer of the `tokenizers` package, such as GPT-2's byte-level byte-pair encoding."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        end = tokenizer.token_to_id(END_OF_TEXT)
        self.end_of_text: int | None = end if end in range(vocab_size) else None

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, 1-D int32. Raises for an id that the base lacks."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text, on all cores."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        tokens = [np.array(encoding.ids, np.int32) for encoding in encodings]
        for ids in tokens:
            check_ids(ids, self.vocab_size)
        return tokens

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens included. Raises for an id that the base lacks."""
        values = np.fromiter(ids, np.int64)
        check_ids(values, self.vocab_size)
        text: str = self.tokenizer.decode(values.tolist(), skip_special_tokens=False)
        return text

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text of token ids as they come; tokens that end within a character wait for the rest."""
        before: list[int] = []  # some tokenizers decode a token by the one before it
        new: list[int] = []
        piece = ""
        for token in ids:
            new.append(int(token))
            piece = self.decode(before + new)[len(self.decode(before)) :]
            if piece and not piece.endswith("\ufffd"):
                yield piece
                before, new, piece = new, [], ""
        if piece:
            yield piece


def load_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a base folder whose config.json says `vocab_size`.

    It is read from `tokenizer.json`, or from `vocab.json` and `merges.txt` (GPT-2's files); a
    base of 256 tokens without these files is byte-level. Raises MiniloraError when the files are
    missing or damaged, or when the `tokenizers` package is.
    """
    whole, vocab, merges = (
        Path(folder) / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    if not whole.exists() and not (vocab.exists() and merges.exists()):
        if vocab_size == ByteTokenizer.vocab_size:
            return ByteTokenizer()
        raise MiniloraError(
            f"{folder} has {vocab_size} tokens but no tokenizer; expected tokenizer.json, "
            "or vocab.json and merges.txt"
        )
    try:
        import tokenizers
    except ImportError as error:
        raise MiniloraError(
            f"reading the tokenizer in {folder} needs the tokenizers package: "
            'pip install "minilora[hf]"'
        ) from error
    try:
        if whole.exists():
            tokenizer = tokenizers.Tokenizer.from_file(str(whole))
        else:
            model = tokenizers.models.BPE.from_file(str(vocab), str(merges))
            tokenizer = tokenizers.Tokenizer(model)
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = tokenizers.decoders.ByteLevel()
            if tokenizer.token_to_id(END_OF_TEXT) is not None:
                tokenizer.add_special_tokens([END_OF_TEXT])
    except Exception as error:  # the package raises nothing more specific
        files = whole if whole.exists() else f"{vocab} and {merges}"
        raise MiniloraError(f"cannot read a tokenizer from {files}: {error}") from error
    return BPETokenizer(tokenizer, vocab_size)


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


@dataclass(frozen=True)
class Corpus:
    """Text to train on and held-out text, each one stream of tokens."""

    train: np.ndarray  # 1-D int32
    held_out: np.ndarray  # 1-D int32
    train_bytes: int
    held_out_bytes: int
    files: int
    name: str
    left_out: tuple[LeftOut, ...] = ()  # the files in folders that were not read


def load_corpus(
    sources: Source | Sequence[Source], tokenizer: Tokenizer, *, held_out: float = 0.05
) -> Corpus:
    """Read sources (see `read_documents`) and hold out a share of each.

    Held out is the last `held_out` of the characters of every file; of `python`, whole files,
    chosen by a hash of their names, so that they are much the same on every machine.
    Raises MiniloraError for a bad source or a share outside [0, 1).
    """
    if not 0 <= held_out < 1:
        raise MiniloraError(f"held_out {held_out} is not in [0, 1)")
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
