"""Text to token ids and back: bytes, and what the `tokenizers` package knows."""

from __future__ import annotations

import codecs
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minilora.backend import check_ids
from minilora.errors import MiniloraError
from minilora.formats.files import shown


class Tokenizer(Protocol):
    """Text to token ids and back; ids are below `vocab_size`, the size of the base's vocabulary."""

    vocab_size: int
    end_of_text: int | None  # the token between documents, where there is one
    ends: frozenset[int]  # the tokens that end a text
    end_of_answer: int | None  # the token with which an answer is learned to end

    @property
    def known(self) -> int:
        """How many ids, from 0, are tokens; a base may have more rows than these."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, 1-D int32.

        Raises MiniloraError for an id outside the vocabulary: the tokenizer is another model's.
        """

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[np.ndarray]:
        """`encode` of every text; some tokenizers share the work among threads.

        Without `special`, the name of a special token in a text is text like any other.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises MiniloraError for an id outside the vocabulary.
        """

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text of token ids piece by piece as they come, never half a character.

        The pieces put together are `decode` of all the ids.
        """


NO_TEXT = 0xFF  # a byte that no text has in UTF-8


class ByteTokenizer:
    """The 256 byte values as tokens: any text is its UTF-8 bytes, with nothing to learn or load.

    Where the base names no token that ends a text, an answer ends with a byte that UTF-8 never has.
    """

    vocab_size = known = 256

    def __init__(self, ends: Sequence[int] = ()) -> None:
        self.end_of_text = ends[0] if ends else None
        self.end_of_answer: int | None = ends[0] if ends else NO_TEXT
        self.ends = frozenset(ends or [NO_TEXT])

    def __repr__(self) -> str:
        return "ByteTokenizer(256 tokens, each a byte of UTF-8)"

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of a text, 1-D int32."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[np.ndarray]:
        """`encode` of every text; no byte is special."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of bytes; those that are not UTF-8 become U+FFFD. Raises for an id above 255."""
        values = checked(ids, self.vocab_size)
        return values.astype(np.uint8).tobytes().decode("utf-8", "replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text of bytes as they come; the bytes of an unfinished character wait for the rest."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            if piece := decoder.decode(bytes(checked([token], self.vocab_size).tolist())):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest


class BPETokenizer:
    """A tokenizer of the `tokenizers` package, such as GPT-2's byte-level byte-pair encoding.

    The first of `ends` stands between documents, and any of them ends a text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, ends: Sequence[int], source: Path) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.end_of_text = self.end_of_answer = ends[0] if ends else None
        self.ends = frozenset(ends)
        self.source = source

    @property
    def known(self) -> int:
        """How many ids, from 0, are tokens."""
        return min(self.vocab_size, 1 + max(self.tokenizer.get_vocab().values(), default=-1))

    def __repr__(self) -> str:
        return f"BPETokenizer({self.vocab_size:,} tokens)"

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, 1-D int32. Raises for an id that the base lacks."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[np.ndarray]:
        """`encode` of every text, on all cores; without `special`, no text is a special token."""
        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        with contained(f"the tokenizer in {self.source} cannot encode the text"):
            with nullcontext() if special else self._without_special_tokens():
                encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            tokens = [np.array(encoding.ids, np.int64) for encoding in encodings]
        for ids in tokens:
            check_ids(ids, self.vocab_size)
        return [ids.astype(np.int32) for ids in tokens]

    @contextmanager
    def _without_special_tokens(self) -> Iterator[None]:
        """Within, no special token is found in a text."""
        before = self.tokenizer.encode_special_tokens
        self.tokenizer.encode_special_tokens = True
        try:
            yield
        finally:
            self.tokenizer.encode_special_tokens = before

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens included. Raises for an id that the base lacks."""
        values = checked(ids, self.vocab_size)
        with contained(f"the tokenizer in {self.source} cannot decode the tokens"):
            text: str = self.tokenizer.decode(values.tolist(), skip_special_tokens=False)
        return text

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text of token ids as they come; tokens that end within a character wait for the rest."""
        before: list[int] = []  # some tokenizers decode a token by the one before it
        new: list[int] = []
        piece = ""
        for token in ids:
            new += checked([token], self.vocab_size).tolist()
            piece = self.decode(before + new)[len(self.decode(before)) :]
            if piece and not piece.endswith("\ufffd"):
                yield piece
                before, new, piece = new, [], ""
        if piece:
            yield piece


def checked(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """Token ids as 1-D int64; MiniloraError for one that the vocabulary lacks, however large."""
    values = np.array([operator.index(token) for token in ids], object)
    check_ids(values, vocab_size)
    return values.astype(np.int64)


@contextmanager
def contained(what: str) -> Iterator[None]:
    """What the `tokenizers` package raises, its panics too, as a MiniloraError that begins so."""
    try:
        yield
    except BaseException as error:  # a panic is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError, MiniloraError)):
            raise
        raise MiniloraError(f"{what}: {shown(str(error))}") from None
