"""The tokenizer of a base's folder, and the tokens that end a text, as transformers reads them.

A tokenizer is tokenizer.json, or GPT-2's vocab.json and merges.txt. Files beside it add tokens and
give tokens roles. transformers reads a GPT-2's folder with its class GPT2Tokenizer, unless
tokenizer_config.json names another; that class takes the vocabulary and the merges alone from
tokenizer.json.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError
from minilora.formats.files import is_there, read_json, read_text, shown
from minilora.formats.tokenizer_json import check_id, check_tokenizer_json
from minilora.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, contained

WHOLE, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
SETTINGS, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
CONFIG, GENERATION = "config.json", "generation_config.json"

END_OF_TEXT = "<|endoftext|>"  # the token that GPT-2 puts between documents
GPT2 = "GPT2Tokenizer"
# Tokens with a role, in the order in which transformers adds those that the vocabulary lacks.
ROLES = (
    *("bos_token", "eos_token", "unk_token", "sep_token"),
    *("pad_token", "cls_token", "mask_token"),
)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = dict[str, Any]
"""A token and how it is found in a text: its content and FLAGS, as the files have them."""


def load_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a base folder whose config.json says `vocab_size`.

    A base of 256 tokens without a tokenizer's files is byte-level. A file's truncation, padding and
    dropout are off. Raises MiniloraError for files that are missing, damaged, contradict each other
    or ask for what could hang or crash the `tokenizers` package, and when that is missing.
    """
    folder = Path(folder)
    config = _optional(folder / CONFIG)
    ends: list[int | None] = [*_end_ids(config, folder / CONFIG)]
    ends += _end_ids(_optional(folder / GENERATION), folder / GENERATION)
    whole, *parts = (is_there(folder / name) for name in (WHOLE, VOCAB, MERGES))
    if not whole and not all(parts):
        if vocab_size == ByteTokenizer.vocab_size and not any(parts):
            return ByteTokenizer(_inside(ends, vocab_size))
        raise MiniloraError(
            f"{folder} has {vocab_size} tokens but no tokenizer; expected tokenizer.json, "
            "or vocab.json and merges.txt"
        )
    try:
        import tokenizers
    except ImportError as error:
        raise MiniloraError(
            f"reading the tokenizer in {folder} needs the tokenizers package: "
            "pip install tokenizers"
        ) from error

    path = folder / (WHOLE if whole else VOCAB)
    settings = _settings(folder)
    document = read_json(path) if whole else _from_vocabulary(folder)
    document |= {"truncation": None, "padding": None, "post_processor": None}
    check_tokenizer_json(document, path)
    document["model"]["dropout"] = None
    if not (whole or _is_gpt2(settings, config, document)):
        raise MiniloraError(
            f"{folder} has no tokenizer.json, and {VOCAB} with {MERGES} are read as {GPT2} alone; "
            "its tokenizer_class or model_type is another"
        )
    added = _added_tokens(settings, document, folder)
    stated = settings.get("eos_token")
    if _is_gpt2(settings, config, document):
        settings = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT) | settings
        document = _as_gpt2(document, settings, path)
    with contained(f"cannot read a tokenizer from {path}"):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
        tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens"))
        _add_tokens(tokenizer, added, settings, folder)
        own = [(token["id"], token) for token in document.get("added_tokens") or []]
        _check_ids(tokenizer, [*own, *added.items()], folder)
        if stated is not None:
            content = _token(stated, folder / SETTINGS)["content"]
            ends = [tokenizer.token_to_id(content), *ends]
        elif not _inside(ends, vocab_size):
            ends = [tokenizer.token_to_id(END_OF_TEXT)]
    return BPETokenizer(tokenizer, vocab_size, _inside(ends, vocab_size), path)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if is_there(path) else {}


def _end_ids(document: Mapping[str, Any], path: Path) -> list[int]:
    """The ids that a configuration's eos_token_id names: none, one, or a list."""
    value = document.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(end) is int for end in ids):
        raise MiniloraError(
            f"{path}: eos_token_id is {reprlib.repr(value)}, expected a token id or a list of them"
        )
    return list(ids)


def _inside(ids: Iterable[int | None], vocab_size: int) -> list[int]:
    """Those that a model of this vocabulary can draw: a small one's file often says 50256."""
    return [i for i in ids if i is not None and 0 <= i < vocab_size]


# --- the vocabulary ----------------------------------------------------------------------------


def _from_vocabulary(folder: Path) -> dict[str, Any]:
    """vocab.json and merges.txt in the form of a tokenizer.json."""
    vocabulary = read_json(folder / VOCAB)
    lines = [line.removesuffix("\r") for line in read_text(folder / MERGES).split("\n")]
    merges = [line for line in lines if line and not line.startswith("#version")]
    for line in merges:
        if line.count(" ") != 1:
            raise MiniloraError(f"{folder / MERGES}: {shown(line)!r} is not two tokens and a space")
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    return {"model": model, "pre_tokenizer": {"type": "ByteLevel"}}


def _is_gpt2(
    settings: Mapping[str, Any], config: Mapping[str, Any], document: Mapping[str, Any]
) -> bool:
    """Whether transformers reads the folder with GPT2Tokenizer."""
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if named is None:
        return config.get("model_type", "gpt2") == "gpt2" and "merges" in document["model"]
    return str(named).removesuffix("Fast") == GPT2


def _as_gpt2(
    document: Mapping[str, Any], settings: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """The tokenizer that GPT2Tokenizer makes of a file's vocabulary and merges.

    Older versions of transformers take the rest of the file too, so that a file whose rest would
    change the tokens is refused.
    """
    model, split = document["model"], document.get("pre_tokenizer") or {}
    dropped = {
        "normalizer": document.get("normalizer"),
        "pre_tokenizer": split.get("type") != "ByteLevel" or not split.get("use_regex", True),
        "model.type": model.get("type", "BPE") != "BPE",
        **{
            f"model.{name}": model.get(name)
            for name in (
                *("continuing_subword_prefix", "end_of_word_suffix"),
                *("byte_fallback", "ignore_merges"),
            )
        },
    }
    for name, differs in dropped.items():
        if differs:
            raise MiniloraError(
                f"{path}: {name} is not that of {GPT2}, with which transformers reads this folder; "
                f"to have it used, {SETTINGS} must name the tokenizer_class PreTrainedTokenizerFast"
            )
    prefix = settings.get("add_prefix_space") or False
    if type(prefix) is not bool:
        raise MiniloraError(
            f"{path.with_name(SETTINGS)}: add_prefix_space is {reprlib.repr(prefix)}, "
            "expected true or false"
        )
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": model.get("vocab"), "merges": model.get("merges")},
        "pre_tokenizer": byte_level | {"add_prefix_space": prefix},
        "decoder": byte_level | {"add_prefix_space": True},
    }


# --- added tokens ------------------------------------------------------------------------------


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json if it has no added_tokens_decoder."""
    settings = _optional(folder / SETTINGS)
    if "added_tokens_decoder" not in settings:
        settings |= _optional(folder / SPECIAL)
    return settings


def _added_tokens(
    settings: Mapping[str, Any], document: Mapping[str, Any], folder: Path
) -> dict[int, Token]:
    """The added tokens by id: of tokenizer_config.json or, if it is older, of the other files."""
    listed = settings.get("added_tokens_decoder")
    path = folder / SETTINGS
    if listed is not None:
        if not isinstance(listed, dict) or not all(key.isdecimal() for key in listed):
            raise MiniloraError(f"{path}: added_tokens_decoder is no object of tokens by id")
        by_id = {int(key[:20]): _token(value, path) for key, value in listed.items()}
    else:
        special = {token["content"] for token in _special(settings, path)}
        by_id = {}
        for content, number in _optional(folder / ADDED).items():
            flag = content in special
            token = {"content": content, "normalized": not flag, "special": flag}
            by_id[check_id(number, f"{folder / ADDED}: {shown(content)!r}")] = token
        for token in document.get("added_tokens") or []:
            by_id[token["id"]] = _token(token, folder / WHOLE)
    for number in by_id:
        check_id(number, f"{path}: added_tokens_decoder")
    return by_id


def _special(settings: Mapping[str, Any], path: Path) -> list[Token]:
    """The tokens that have a role, and the extra special ones, in transformers' order."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if not isinstance(extra, (list, dict)):
        raise MiniloraError(f"{path}: extra_special_tokens is {reprlib.repr(extra)}, no list")
    own = [name for name in settings if name.endswith("_token") and name not in ROLES]
    values = [settings[name] for name in ROLES if settings.get(name) is not None]
    values += [settings[name] for name in own if isinstance(settings[name], (str, dict))]
    values += extra.values() if isinstance(extra, dict) else extra
    return [_token(value, path) | {"special": True} for value in values]


def _token(value: Any, path: Path) -> Token:
    """A token from a file: a text, which is a special token, or an object with its FLAGS."""
    if isinstance(value, str):
        return {"content": value, "special": True, "normalized": False}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise MiniloraError(
            f"{path} has the token {reprlib.repr(value)}, expected a text or an object with content"
        )
    token = {name: value[name] for name in FLAGS if name in value}
    if not all(type(flag) is bool for flag in token.values()):
        raise MiniloraError(f"{path}: {', '.join(FLAGS)} of a token are true or false")
    return {"normalized": not token.get("special", False)} | token | {"content": value["content"]}


def _add_tokens(
    tokenizer: Any, added: Mapping[int, Token], settings: Mapping[str, Any], folder: Path
) -> None:
    """Add the tokens that a tokenizer lacks, in transformers' order."""
    import tokenizers

    there = tokenizer.get_added_tokens_decoder().values()
    known = {repr(token) for token in there}
    contents = {token.content for token in there}
    special = _special(settings, folder / SETTINGS)
    named = {token["content"] for token in special}
    wanted = []
    for _, token in sorted(added.items()):
        made = tokenizers.AddedToken(**token)
        if repr(made) not in known:
            promoted = token | {"special": token.get("special", False) or made.content in named}
            wanted.append(tokenizers.AddedToken(**promoted))
            contents.add(made.content)
    wanted += [tokenizers.AddedToken(**t) for t in special if t["content"] not in contents]
    tokenizer.add_tokens(wanted)


def _check_ids(tokenizer: Any, stated: Iterable[tuple[int, Token]], folder: Path) -> None:
    """Raise MiniloraError if an added token has another id than the files say."""
    for number, token in stated:
        content = token["content"]
        if content and tokenizer.token_to_id(content) != number:
            raise MiniloraError(
                f"the files in {folder} say that the added token {shown(content)!r} has the id "
                f"{number}, but after their vocabulary it has {tokenizer.token_to_id(content)}"
            )
