"""A base as transformers stores GPT-2: a folder with config.json and model.safetensors.

Large models come in several files, with an index that says which tensor lies in which. GPT-2 stores
its linear weights (in, out), as we do, so nothing is transposed here.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import Array, to_host
from minilora.errors import MiniloraError
from minilora.formats.companions import companions
from minilora.formats.files import (
    Content,
    field,
    is_there,
    json_bytes,
    read_json,
    shown,
)
from minilora.formats.output import steady, write_folder
from minilora.formats.tensors import (
    Entry,
    Shape,
    check_shapes,
    is_equal,
    read_header,
    read_index,
    read_weight,
    tensor_parts,
)
from minilora.gpt2 import GPTConfig
from minilora.tree import Tree, flatten, unflatten

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PREFIX, HEAD = "transformer.", "lm_head.weight"

# Fields that change the mathematics, with the values that mean what `gpt` computes; the first is
# what transformers takes when the field is missing.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
}
# Other names that transformers takes for the same fields.
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# The causal mask, which older files hold as a constant of every block.
MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


# --- names and shapes --------------------------------------------------------------------------


def tensor_table(config: GPTConfig, *, tied: bool) -> dict[str, tuple[str, Shape]]:
    """For every tensor of a GPT-2, without `transformer.`: its path in our tree, and its shape."""
    C, F = config.n_embd, config.inner
    table: dict[str, tuple[str, Shape]] = {
        "wte.weight": ("wte", (config.vocab_size, C)),
        "wpe.weight": ("wpe", (config.n_positions, C)),
    }

    def add(name: str, path: str, *shape: int) -> None:
        table[f"{name}.weight"] = (f"{path}.w", shape)
        table[f"{name}.bias"] = (f"{path}.b", shape[-1:])

    for i in range(config.n_layer):
        add(f"h.{i}.ln_1", f"blocks.{i}.ln_1", C)
        add(f"h.{i}.attn.c_attn", f"blocks.{i}.attn.qkv", C, 3 * C)
        add(f"h.{i}.attn.c_proj", f"blocks.{i}.attn.o", C, C)
        add(f"h.{i}.ln_2", f"blocks.{i}.ln_2", C)
        add(f"h.{i}.mlp.c_fc", f"blocks.{i}.mlp.up", C, F)
        add(f"h.{i}.mlp.c_proj", f"blocks.{i}.mlp.down", F, C)
    add("ln_f", "ln_f", C)
    if not tied:
        table[HEAD] = ("head", (config.vocab_size, C))
    return table


# --- loading -----------------------------------------------------------------------------------


def load_base(folder: str | Path, *, dtype: Any = np.float32) -> tuple[Tree, GPTConfig]:
    """The base tree and its configuration from a folder in Hugging Face's GPT-2 layout.

    Every array is of `dtype`, float32 or float64, whatever the file holds. The tree has a "head"
    where tie_word_embeddings is false. Raises MiniloraError for a missing or damaged file, for a
    configuration that `gpt` does not compute (naming the field), for tensors that are missing, left
    over or of another shape (listing them), and for a tied head that differs from the embedding.
    """
    with steady(Path(folder), CONFIG):
        return _load_base(Path(folder), dtype)


def _load_base(folder: Path, dtype: Any) -> tuple[Tree, GPTConfig]:
    document = read_json(folder / CONFIG)
    config = read_config(document, folder / CONFIG)
    weights, entries = _read_entries(folder)
    tied = field(document, "tie_word_embeddings", bool, True, where=folder / CONFIG)
    tied_head = entries.pop(HEAD, None) if tied else None
    if tied_head is not None:  # safetensors' save_model keeps one of two names of a table
        entries.setdefault("wte.weight", tied_head)
    if not tied and HEAD not in entries:
        raise MiniloraError(f"{weights}: tie_word_embeddings is false, but there is no {HEAD}")

    blocks = len({name.split(".")[1] for name in entries if name.startswith("h.")})
    if config.n_layer != blocks:  # before a table of as many blocks as the configuration claims
        raise MiniloraError(
            f"{folder / CONFIG}: n_layer is {config.n_layer}, "
            f"but {weights.name} holds {blocks} blocks (tensors named h.0.…, h.1.…)"
        )
    table = tensor_table(config, tied=tied)
    check_shapes(
        f"{weights} does not hold the model that its {CONFIG} describes",
        {name: entry.shape for name, entry in entries.items()},
        {name: shape for name, (_, shape) in table.items()},
    )
    flat = {path: read_weight(entries[name], dtype) for name, (path, _) in table.items()}
    if tied_head is not None:
        _check_tied(tied_head, flat["wte"])
    return unflatten(flat), config


def _read_entries(folder: Path) -> tuple[Path, dict[str, Entry]]:
    """The file that says what a base holds, and that by name, without prefix and masks."""
    weights = folder / WEIGHTS
    if is_there(weights) or not is_there(folder / INDEX):
        refuse_pickled(weights, "AutoModelForCausalLM")
        found = read_header(weights)[0]
    else:
        weights = folder / INDEX
        found = read_index(weights)
    entries: dict[str, Entry] = {}
    for name, entry in found.items():
        short = name.removeprefix(PREFIX)  # only a GPT2LMHeadModel's names carry it
        if short in entries:
            raise MiniloraError(f"{entry.path} holds {shown(short)} twice, once with {PREFIX}")
        if not MASK.fullmatch(short):
            entries[short] = entry
    return weights, entries


def refuse_pickled(weights: Path, reader: str) -> None:
    """Say how to convert weights that are there in PyTorch's own format alone."""
    pickled = "pytorch_model.bin" if weights.name == WEIGHTS else weights.with_suffix(".bin").name
    found = sorted(path.name for path in weights.parent.glob(f"{pickled}*"))
    if found and not is_there(weights):
        raise MiniloraError(
            f"{weights} does not exist, and {found[0]} beside it can hold code, so that it is not "
            f"read; transformers' {reader}.from_pretrained(FOLDER).save_pretrained(FOLDER) "
            f"writes {weights.name}"
        )


def read_config(document: Mapping[str, Any], path: Path) -> GPTConfig:
    """The GPTConfig that a config.json means, as transformers reads it.

    Raises MiniloraError naming the field whose value is no size or asks for another mathematics.
    """
    for name, accepted in REQUIRED.items():
        value = document.get(name, accepted[0])
        if value not in accepted:
            raise MiniloraError(
                f"{path}: {name} is {reprlib.repr(value)}, which minilora does not compute; "
                f"expected {' or '.join(map(repr, accepted))}"
            )
    for other, name in ALIASES.items():
        if {name, other} <= document.keys() and document[name] != document[other]:
            raise MiniloraError(
                f"{path}: {name} is {reprlib.repr(document[name])}, but {other}, which is another "
                f"name of it, {reprlib.repr(document[other])}"
            )
    sizes = {ALIASES.get(name, name): value for name, value in document.items()}
    names = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"]
    if sizes.get("n_inner") is not None:
        names.append("n_inner")
    small = GPTConfig()  # GPT-2 small, transformers' default too
    values = {name: field(sizes, name, int, getattr(small, name), where=path) for name in names}
    epsilon = field(document, "layer_norm_epsilon", float, small.layer_norm_epsilon, where=path)
    try:
        return GPTConfig(**values, layer_norm_epsilon=epsilon)
    except MiniloraError as error:
        raise MiniloraError(f"{path}: {error}") from None


def _check_tied(head: Entry, wte: Array) -> None:
    """Refuse a file whose two tables differ although its configuration says that they are one."""
    if not is_equal(head, wte):
        raise MiniloraError(
            f"{head.path}: {HEAD} differs from wte.weight, but {CONFIG} says that they are tied; "
            "expected tie_word_embeddings false for a head of its own"
        )


# --- saving ------------------------------------------------------------------------------------


def save_base(
    folder: str | Path,
    base: Tree,
    config: GPTConfig,
    *,
    dtype: Any = np.float32,
    like: str | Path | None = None,
) -> None:
    """Write a base as a folder that transformers opens as GPT2LMHeadModel, in `dtype`.

    `like` is the folder of the base that it was made from: all that its config.json says and that
    still holds, and its tokenizer's and generation's files, are carried over. Only files of the
    names written are replaced, all or none. Raises MiniloraError for a weight that `dtype` cannot
    hold, a `like` of other sizes, and where the system refuses to read or write.
    """
    write_folder(folder, base_files(base, config, dtype=dtype, like=like))


def base_files(
    base: Tree,
    config: GPTConfig,
    *,
    dtype: Any = np.float32,
    like: str | Path | None = None,
) -> dict[str, Content]:
    """The files that `save_base` writes, by name, the configuration last."""
    carried = {} if like is None else companions(Path(like))
    document = _config_document(config, tied="head" not in base, like=like)
    weights, tied = flatten(to_host(base)), "head" not in base
    tensors = {}
    for name, (path, _) in tensor_table(config, tied=tied).items():
        name = name if name == HEAD else PREFIX + name
        with np.errstate(over="ignore"):
            tensors[name] = weights[path].astype(dtype, copy=False)
        if not np.isfinite(tensors[name]).all():
            raise MiniloraError(
                f"{path} holds numbers that are not finite in {np.dtype(dtype)}; nothing was saved"
            )
    return {
        **{name: [data] for name, data in carried.items()},
        WEIGHTS: tensor_parts(tensors, {"format": "pt"}),
        CONFIG: [json_bytes(document)],
    }


def _config_document(
    config: GPTConfig, *, tied: bool, like: str | Path | None = None
) -> dict[str, Any]:
    """The fields of the config.json in `like`, but for those that describe the new weights.

    Where there is none, the fields of transformers' GPT2Config that say what `gpt` computes.
    """
    path = None if like is None else Path(like) / CONFIG
    if path is None or not is_there(path):
        return _fresh_document(config, tied=tied)
    document = read_json(path)
    if read_config(document, path) != config:
        raise MiniloraError(f"{path} describes a base of other sizes than the one to save")
    try:
        json.dumps(document, allow_nan=False)
    except ValueError:
        raise MiniloraError(f"{path} holds a number that is not finite") from None
    document.pop("torch_dtype", None)  # the older name of dtype
    if document.get("tie_word_embeddings", True) != tied:
        document["tie_word_embeddings"] = tied
    new = _fresh_document(config, tied=tied)
    return document | {name: new[name] for name in ("architectures", "dtype", "model_type")}


def _fresh_document(config: GPTConfig, *, tied: bool) -> dict[str, Any]:
    return {
        "activation_function": "gelu_new",
        "add_cross_attention": False,
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        # What transformers computes in; the file may be in float16 to be small.
        "dtype": "float32",
        "embd_pdrop": 0.0,
        "eos_token_id": None,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "model_type": "gpt2",
        "n_ctx": config.n_positions,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_inner": config.n_inner,
        "n_layer": config.n_layer,
        "n_positions": config.n_positions,
        "reorder_and_upcast_attn": False,
        "resid_pdrop": 0.0,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": tied,
        "vocab_size": config.vocab_size,
    }
