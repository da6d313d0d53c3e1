"""Text to token ids and back: bytes, and the tokenizers of Hugging Face's folders."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minilora.errors import MiniloraError

END_OF_TEXT = "<|endoftext|>"  # the token that GPT-2 puts between documents


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
