"""A tokenizer.json checked before the `tokenizers` package is given it.

The package runs what the file asks for: a regular expression that backtracks without end or a
replacement that doubles a text thirty times hangs or ends the whole program, and no exception tells
of it. So what is not known to take time and memory in proportion to the text is refused by name.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError
from minilora.formats.files import shown

# The parts of a file, the name under which a Sequence holds a list of them, and the types that are
# read. Precompiled is left out: the package trusts its table, and no GPT has one.
SEQUENCE = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
TYPES: dict[str, tuple[str, ...]] = {
    "normalizer": (
        *("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "Strip"),
        *("Prepend", "Replace", "BertNormalizer", "ByteLevel"),
    ),
    "pre_tokenizer": (
        *("Sequence", "ByteLevel", "BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Digits"),
        *("Punctuation", "Metaspace", "CharDelimiterSplit", "UnicodeScripts", "FixedLength"),
        "Split",
    ),
    "decoder": (
        *("Sequence", "ByteLevel", "WordPiece", "BPEDecoder", "Metaspace", "ByteFallback", "Fuse"),
        *("Strip", "Replace", "CTC"),
    ),
    "model": ("BPE", "WordPiece", "WordLevel", "Unigram"),
}
MAX_ID = 2**31 - 1  # of int32
MAX_PARTS, MAX_GROWTH, MAX_AFFIX, MAX_WORD = 100, 16, 100, 1000


def check_tokenizer_json(document: Mapping[str, Any], path: Path) -> None:
    """Raise MiniloraError, naming the field, for what could hang, crash or exhaust the package."""
    for kind in SEQUENCE:
        parts = list(_parts(document.get(kind), kind, path))
        if len(parts) > MAX_PARTS:
            raise MiniloraError(f"{path}: {kind} has {len(parts)} parts, above {MAX_PARTS}")
        for part in parts:
            _check_part(part, kind, path)
        if kind != "pre_tokenizer" and math.prod(map(_growth, parts)) > MAX_GROWTH:
            raise MiniloraError(
                f"{path}: {kind} can make a text more than {MAX_GROWTH} times longer"
            )
    _check_model(document.get("model"), path)
    added = document.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise MiniloraError(f"{path}: added_tokens is no list of objects")
    for token in added:
        check_id(token.get("id"), f"{path}: added_tokens")


def check_id(value: Any, where: str) -> int:
    """A token id from a file; MiniloraError unless it is a whole number that int32 holds."""
    if type(value) is not int or not 0 <= value <= MAX_ID:
        raise MiniloraError(
            f"{where} has the id {reprlib.repr(value)}, expected a whole number below 2^31"
        )
    return value


def _parts(part: Any, kind: str, path: Path) -> Iterator[dict[str, Any]]:
    """A normalizer, pre_tokenizer or decoder with all that its Sequences hold."""
    if part is None:
        return
    if not isinstance(part, dict) or part.get("type") not in TYPES[kind]:
        named = part.get("type") if isinstance(part, dict) else part
        raise MiniloraError(
            f"{path}: {kind} is of type {reprlib.repr(named)}; minilora reads "
            f"{', '.join(sorted(TYPES[kind]))}"
        )
    yield part
    if part["type"] == "Sequence":
        inner = part.get(SEQUENCE[kind])
        if not isinstance(inner, list):
            raise MiniloraError(f"{path}: {kind} is a Sequence without a list {SEQUENCE[kind]}")
        for each in inner:
            yield from _parts(each, kind, path)


def _check_part(part: Mapping[str, Any], kind: str, path: Path) -> None:
    if part["type"] == "FixedLength" and not (type(part.get("length")) is int and part["length"]):
        raise MiniloraError(f"{path}: {kind}: FixedLength has no length of at least 1")
    if part["type"] not in ("Split", "Replace"):
        return
    pattern = part.get("pattern")
    words = [*pattern.items()] if isinstance(pattern, dict) and len(pattern) == 1 else [(None, "")]
    (form, text) = words[0]
    if form not in ("String", "Regex") or not isinstance(text, str) or not text:
        raise MiniloraError(f"{path}: {kind}: {part['type']} has no pattern, String or Regex")
    if form == "Regex" and not is_linear(text):
        raise MiniloraError(
            f"{path}: {kind}: minilora cannot tell that matching the pattern {shown(text)!r} takes "
            "no more than a moment; expected that of a well-known tokenizer, or one whose "
            "alternatives have no repeat before their ends"
        )
    if part["type"] == "Replace" and form == "Regex" and can_be_empty(text):
        raise MiniloraError(
            f"{path}: {kind}: Replace has the pattern {shown(text)!r}, which matches an empty text"
        )


def _growth(part: Mapping[str, Any]) -> float:
    """At most how many times longer a part makes a text."""
    if part["type"] == "Prepend":
        return 1.0 + len(str(part.get("prepend")))
    if part["type"] != "Replace":
        return 1.0
    pattern, content = part["pattern"], len(str(part.get("content")))
    return max(1.0, content / len(pattern["String"]) if "String" in pattern else 1.0 + content)


def _check_model(model: Any, path: Path) -> None:
    """The vocabulary's ids, and the lengths that every word is multiplied by."""
    if not isinstance(model, dict) or model.get("type", "BPE") not in TYPES["model"]:
        named = model.get("type") if isinstance(model, dict) else model
        raise MiniloraError(
            f"cannot read a tokenizer from {path}: model is of type {reprlib.repr(named)}, "
            f"expected one of {', '.join(sorted(TYPES['model']))}"
        )
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        for token, number in vocabulary.items():
            check_id(number, f"{path}: the token {shown(token)!r}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(str(model.get(name) or "")) > MAX_AFFIX:
            raise MiniloraError(f"{path}: {name} is longer than {MAX_AFFIX} characters")
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if prefix and isinstance(merges, list) and not all(_continues(m, prefix) for m in merges):
        raise MiniloraError(
            f"{path}: merges are of tokens that do not begin with continuing_subword_prefix, "
            f"{shown(str(prefix))!r}"
        )
    longest = model.get("max_input_chars_per_word", 0)
    if type(longest) is not int or longest > MAX_WORD:
        raise MiniloraError(
            f"{path}: max_input_chars_per_word is {reprlib.repr(longest)}, "
            f"expected a whole number of at most {MAX_WORD}"
        )


def _continues(merge: Any, prefix: Any) -> bool:
    """Whether the second token of a merge begins with the prefix, which the package cuts off."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    return isinstance(pair, list) and str(pair[-1:][0] if pair else "").startswith(str(prefix))


# --- regular expressions -----------------------------------------------------------------------

_ESCAPE = r"\\[sSdDwWnrt]|\\[pP]\{\^?\w+\}|\\[^\w\s]"
_CHARACTER = rf"(?:{_ESCAPE}|\[\^?(?:{_ESCAPE}|[^\\\[\]])+\]|[^\\()\[\]{{}}*+?|^$])"
_BOUNDED = r"(?:\?|\{\d(?:,\d)?\})"
_WORDS = r"\(\?i?:[\w' |]*\)"  # (?i:'s|'t|'re)
_ONE = rf"(?:{_CHARACTER}|{_WORDS})"
_ALTERNATIVE = (
    rf"(?:{_ONE}(?![?{{*+]))*(?:{_ONE}{_BOUNDED}(?:{_ONE}(?![?{{*+]))*){{0,3}}(?:{_CHARACTER}[*+])?"
)
LINEAR = re.compile(rf"{_ALTERNATIVE}(?:\|{_ALTERNATIVE})*")

_OPTIONAL = (
    rf"(?:{_ONE}(?:\?|\{{0(?:,\d)?\}})|{_CHARACTER}\*|\(\?i?:(?:[\w' |]*\|)?(?:\|[\w' |]*)?\))"
)
EMPTY = re.compile(rf"(?:{_ALTERNATIVE}\|)*{_OPTIONAL}*(?:\|{_ALTERNATIVE})*")

_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_O200K = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
KNOWN = {
    # GPT-2
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Llama 3 (cl100k) with and without its possessive repeats, and Qwen 2
    _ENDINGS + _LETTERS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES,
    _ENDINGS + r"|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+",
    _ENDINGS + _LETTERS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES,
    # o200k
    r"[^\r\n\p{L}\p{N}]?" + f"{_O200K[0]}*{_O200K[1]}+{_ENDINGS}?"
    r"|[^\r\n\p{L}\p{N}]?" + f"{_O200K[0]}+{_O200K[1]}*{_ENDINGS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES,
}


def is_linear(pattern: str) -> bool:
    """Whether a pattern is known to match in time that grows with the text alone.

    That is one of a well-known tokenizer, or one in which a repeat without bound ends its
    alternative: it cannot fail any more, so that the engine never goes back over what it took.
    """
    return pattern in KNOWN or (len(pattern) <= 1000 and LINEAR.fullmatch(pattern) is not None)


def can_be_empty(pattern: str) -> bool:
    """Whether a pattern that `is_linear` matches an empty text, too, where the package panics."""
    return pattern not in KNOWN and EMPTY.fullmatch(pattern) is not None
