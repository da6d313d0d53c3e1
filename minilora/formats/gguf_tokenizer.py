"""The tokenizer in a GGUF file as the files that `tokenizer` reads: byte-level BPE alone.

A GGUF file has a vocabulary and merges but of the rest only a name, `tokenizer.ggml.pre`, for the
way in which a text is cut before they apply. A wrong cut gives other tokens without a word, so that
a name that is not in the table here is refused: the model's own tokenizer.json can be given.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minilora.errors import MiniloraError
from minilora.formats.files import Content, field, json_bytes, read_file, read_json, shown
from minilora.formats.tokenizer import SETTINGS, WHOLE

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # values of tokenizer.ggml.token_type
ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Cut(NamedTuple):
    """How a text is cut into words, as tokenizer.json has it, and what goes with it."""

    pre_tokenizers: list[dict[str, Any]]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False
    adds_bos: bool = False  # where tokenizer.ggml.add_bos_token is missing


def byte_level(**options: Any) -> dict[str, Any]:
    """Bytes as characters and, unless `use_regex` is False, GPT-2's way of cutting before."""
    rest = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"type": "ByteLevel", **rest, **options}


def split(pattern: str) -> dict[str, Any]:
    """Every match of a pattern is a word."""
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False
    }  # fmt: skip


CUTS = {
    "gpt-2": Cut([byte_level()]),
    "smollm": Cut([{"type": "Digits", "individual_digits": True}, byte_level()]),
    "llama-bpe": Cut(
        [
            split(ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST),
            byte_level(use_regex=False),
        ],
        ignore_merges=True,
        adds_bos=True,
    ),
    "qwen2": Cut(
        [split(ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST), byte_level(use_regex=False)],
        normalizer={"type": "NFC"},
    ),
}


def tokens_of_roles(fields: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The ids of the tokens with which a text begins and ends, as a config.json has them."""
    names = ("bos", "eos", "eot", "eom", "padding")
    ids = {name: _id(fields, f"{name}_token_id", path) for name in names}
    ends = list(dict.fromkeys(i for i in (ids["eos"], ids["eot"], ids["eom"]) if i is not None))
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["padding"],
    }


def tokenizer_files(
    fields: Mapping[str, Any], vocab_size: int, path: Path, *, given: str | Path | None
) -> dict[str, Content]:
    """tokenizer.json, made from the fields or as it is given, and tokenizer_config.json.

    Raises MiniloraError for a tokenizer that is not known here, and for one that is given whose
    tokens are not the file's.
    """
    tokens = _strings(fields, "tokens", path)
    kinds = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise MiniloraError(f"{path}: tokenizer.ggml.token_type has no type for each token")
    while tokens and kinds[len(tokens) - 1] == UNUSED:  # names that a converter gave to spare rows
        tokens.pop()
    if len(tokens) > vocab_size:
        raise MiniloraError(f"{path} has {len(tokens)} tokens, but rows for {vocab_size} alone")
    if given is None:
        document = json.dumps(_document(fields, tokens, kinds, path), ensure_ascii=False).encode()
    else:
        _check_tokens(tokens, read_json(given), Path(given), path)
        document = read_file(given)
    return {WHOLE: [document], SETTINGS: [json_bytes(_settings(fields, tokens, path))]}


def _document(
    fields: Mapping[str, Any], tokens: list[str], kinds: list[int], path: Path
) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE whose way of cutting is known."""
    for name, known in (("model", ["gpt2"]), ("pre", [*CUTS])):
        value = fields.get(f"tokenizer.ggml.{name}")
        if value not in known:
            raise MiniloraError(
                f"{path}: tokenizer.ggml.{name} is {reprlib.repr(value)}, expected "
                f"{' or '.join(map(repr, known))}; for another tokenizer, give the model's own "
                "tokenizer.json (--tokenizer)"
            )
    cut = CUTS[fields["tokenizer.ggml.pre"]]
    merges = [merge.split(" ") for merge in _strings(fields, "merges", path)]
    for pair in merges:
        if len(pair) != 2:
            raise MiniloraError(
                f"{path}: tokenizer.ggml.merges holds {shown(' '.join(pair))!r}, "
                "expected two tokens with a space between"
            )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise MiniloraError(f"{path}: tokenizer.ggml.tokens holds a token twice")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **flags, "special": kind == CONTROL}
            for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": cut.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cut.pre_tokenizers},
        "post_processor": _with_ends(fields, tokens, cut, path),
        "decoder": byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": cut.ignore_merges,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _with_ends(
    fields: Mapping[str, Any], tokens: list[str], cut: Cut, path: Path
) -> dict[str, Any] | None:
    """What has transformers put a token before and after a text; None for neither."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    parts, special = [text], {}
    for name, default in (("bos", cut.adds_bos), ("eos", False)):
        adds = field(fields, f"tokenizer.ggml.add_{name}_token", bool, default, where=path)
        number = _id(fields, f"{name}_token_id", path)
        if adds and number is not None:
            token = _token(tokens, number, f"{name}_token_id", path)
            part = {"SpecialToken": {"id": token, "type_id": 0}}
            parts = [part, *parts] if name == "bos" else [*parts, part]
            special[token] = {"id": token, "ids": [number], "tokens": [token]}
    if not special:
        return None
    return {
        "type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": special
    }  # fmt: skip


def _settings(fields: Mapping[str, Any], tokens: list[str], path: Path) -> dict[str, Any]:
    """The tokenizer_config.json: tokens with a role, and the template of a conversation."""
    settings: dict[str, Any] = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for role, name in ROLES.items():
        if (number := _id(fields, name, path)) is not None:
            settings[role] = _token(tokens, number, name, path)
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = field(fields, "tokenizer.chat_template", str, "", where=path)
    return settings


def _check_tokens(tokens: list[str], document: dict[str, Any], given: Path, path: Path) -> None:
    """Raise MiniloraError unless a tokenizer.json has these tokens under these ids."""
    model = document.get("model")
    vocabulary: Any = model.get("vocab") if isinstance(model, dict) else None
    added = document.get("added_tokens") or []
    try:
        if isinstance(vocabulary, list):  # of a Unigram: [token, score]
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        ids = {**vocabulary, **{token["content"]: token["id"] for token in added}}
    except (TypeError, KeyError, ValueError):
        raise MiniloraError(f"{given} is no tokenizer.json: it has no vocabulary") from None
    for number, token in enumerate(tokens):
        if ids.get(token) != number:
            raise MiniloraError(
                f"{given} is not the tokenizer of {path}: the token {shown(token)!r} has the id "
                f"{ids.get(token)} there, and {number} in the model"
            )


def _strings(fields: Mapping[str, Any], name: str, path: Path) -> list[str]:
    values = fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise MiniloraError(f"{path} has no list of texts tokenizer.ggml.{name}")
    return list(values)


def _id(fields: Mapping[str, Any], name: str, path: Path) -> int | None:
    """The id of a token with a role, where the file names one."""
    name = f"tokenizer.ggml.{name}"
    return field(fields, name, int, 0, where=path) if name in fields else None


def _token(tokens: list[str], number: int, name: str, path: Path) -> str:
    if number >= len(tokens):
        raise MiniloraError(
            f"{path}: tokenizer.ggml.{name} is {number}, but there are {len(tokens)} tokens"
        )
    return tokens[number]
