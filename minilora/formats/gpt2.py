"""A GPT-2 as transformers stores it: the fields of its configuration, the table of its tensors.

It stores its linear weights (in, out), as we do, so nothing is transposed here.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError
from minilora.formats.files import field
from minilora.formats.table import HEAD, Stored, require
from minilora.gpt2 import GPTConfig
from minilora.tree import Tree

Config = GPTConfig
# Names: of the whole model's tensors, of the embedding's table, of the blocks and of their number.
PREFIX, EMBEDDING, BLOCKS, N_LAYER = "transformer.", "wte.weight", "h", "n_layer"
TIED = True  # where tie_word_embeddings is missing
FAN_IN_FAN_OUT = True  # what PEFT calls weights (in, out)
REWRITTEN = "the adapters on q, k and v were written as one equivalent adapter on c_attn"

# Fields that change the mathematics, with the values that mean what `gpt2` computes: see `require`.
REQUIRED: dict[str, tuple[Any, ...]] = {
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
CONSTANT = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


# --- names and shapes --------------------------------------------------------------------------


def qkv_widths(config: GPTConfig) -> tuple[int, int]:
    """How many columns of qkv are q's, and how many k's and v's."""
    return config.n_embd, config.n_embd


def tensor_table(config: GPTConfig, document: Mapping[str, Any]) -> dict[str, Stored]:
    """Every tensor of the GPT-2 that a config.json describes, by name without PREFIX."""
    C, F = config.n_embd, config.inner
    table = {
        EMBEDDING: Stored("wte", (config.vocab_size, C)),
        "wpe.weight": Stored("wpe", (config.n_positions, C)),
    }

    def add(name: str, path: str, *shape: int) -> None:
        table[f"{name}.weight"] = Stored(f"{path}.w", shape)
        table[f"{name}.bias"] = Stored(f"{path}.b", shape[-1:])

    for i in range(config.n_layer):
        add(f"h.{i}.ln_1", f"blocks.{i}.ln_1", C)
        add(f"h.{i}.attn.c_attn", f"blocks.{i}.attn.qkv", C, 3 * C)
        add(f"h.{i}.attn.c_proj", f"blocks.{i}.attn.o", C, C)
        add(f"h.{i}.ln_2", f"blocks.{i}.ln_2", C)
        add(f"h.{i}.mlp.c_fc", f"blocks.{i}.mlp.up", C, F)
        add(f"h.{i}.mlp.c_proj", f"blocks.{i}.mlp.down", F, C)
    add("ln_f", "ln_f", C)
    if not document.get("tie_word_embeddings", TIED):
        table[HEAD] = Stored("head", (config.vocab_size, C))
    return table


def kind(module: str) -> str:
    """The name that PEFT can know all modules of a kind by: `c_proj` alone would be two kinds."""
    return module.split(".", 3)[-1]


# --- configuration -----------------------------------------------------------------------------


def sizes(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of the GPTConfig that a config.json means, as transformers reads it.

    Raises MiniloraError naming the field whose value is no size or asks for another mathematics.
    """
    require(document, REQUIRED, path)
    for other, name in ALIASES.items():
        if {name, other} <= document.keys() and document[name] != document[other]:
            raise MiniloraError(
                f"{path}: {name} is {reprlib.repr(document[name])}, but {other}, another name of "
                f"it, is {reprlib.repr(document[other])}"
            )
    given = {ALIASES.get(name, name): value for name, value in document.items()}
    names = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"]
    if given.get("n_inner") is not None:
        names.append("n_inner")
    small = GPTConfig()  # GPT-2 small, transformers' default too
    values = {name: field(given, name, int, getattr(small, name), where=path) for name in names}
    epsilon = field(document, "layer_norm_epsilon", float, small.layer_norm_epsilon, where=path)
    return {**values, "layer_norm_epsilon": epsilon}


def fresh_document(base: Tree, config: GPTConfig) -> dict[str, Any]:
    """The fields of transformers' GPT2Config that say what `gpt2` computes with a base."""
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
        "tie_word_embeddings": "head" not in base,
        "vocab_size": config.vocab_size,
    }
