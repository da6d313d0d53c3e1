"""A Llama or a Qwen2 as transformers stores it: the fields of its configuration, its tensors.

It stores its linear weights (out, in), the transposes of ours, and q, k and v apart, which are
columns of one weight here. The two differ in their biases alone: Qwen2 has them on q, k and v.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError
from minilora.formats.files import field
from minilora.formats.table import HEAD, Stored, require
from minilora.llama import LinearScaling, Llama3Scaling, LlamaConfig
from minilora.tree import Tree

Config = LlamaConfig
# Names: of the whole model's tensors, of the embedding's table, of the blocks and of their number.
PREFIX, EMBEDDING, BLOCKS, N_LAYER = "model.", "embed_tokens.weight", "layers", "num_hidden_layers"
TIED = False  # where tie_word_embeddings is missing
FAN_IN_FAN_OUT = False  # what PEFT calls weights (in, out)
REWRITTEN = "the adapters on qkv were written as equivalent ones on q_proj, k_proj and v_proj"

# Fields that change the mathematics, with the values that mean what `llama` computes: see
# `require`. pretraining_tp is none of them: it cuts a product into parts whose sum is the same.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
}
# What transformers takes for a missing size: Llama's are LlamaConfig's own, but for k's and v's
# heads, which are as many as q's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": vars(LlamaConfig(rms_norm_eps=1e-6)) | {"num_key_value_heads": None},
    "qwen2": vars(LlamaConfig(rms_norm_eps=1e-6))
    | {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768},
}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
# The angles' frequencies, which older files hold; they follow from the configuration.
CONSTANT = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

MODULES = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
NORMS = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}


# --- names and shapes --------------------------------------------------------------------------


def qkv_widths(config: LlamaConfig) -> tuple[int, int]:
    """How many columns of qkv are q's, H K, and how many k's and v's, G K."""
    K = config.head_width
    return config.num_attention_heads * K, config.num_key_value_heads * K


def tensor_table(config: LlamaConfig, document: Mapping[str, Any]) -> dict[str, Stored]:
    """Every tensor of the model that a config.json describes, by name without PREFIX."""
    C, F, (Q, KV) = config.hidden_size, config.intermediate_size, qkv_widths(config)
    shapes = {
        **{"attn.q": (Q, C), "attn.k": (KV, C), "attn.v": (KV, C), "attn.o": (C, Q)},
        **{"mlp.gate": (F, C), "mlp.up": (F, C), "mlp.down": (C, F)},
    }
    has_bias = biased(document)
    table = {
        EMBEDDING: Stored("wte", (config.vocab_size, C)),
        "norm.weight": Stored("ln_f.w", (C,)),
    }
    for i in range(config.num_hidden_layers):
        for name, ours in NORMS.items():
            table[f"layers.{i}.{name}.weight"] = Stored(f"blocks.{i}.{ours}.w", (C,))
        for name, ours in MODULES.items():
            name, path, shape = f"layers.{i}.{name}", f"blocks.{i}.{ours}", shapes[ours]
            table[f"{name}.weight"] = Stored(f"{path}.w", shape, transposed=True)
            if ours in has_bias:
                table[f"{name}.bias"] = Stored(f"{path}.b", shape[:1])
    if not document.get("tie_word_embeddings", TIED):
        table[HEAD] = Stored("head", (config.vocab_size, C))
    return table


def biased(document: Mapping[str, Any]) -> set[str]:
    """The linear maps that have a bias; of Qwen2's the configuration says nothing."""
    qkv = {"attn.q", "attn.k", "attn.v"}
    if document.get("model_type") == "qwen2":
        return qkv
    attn = {*qkv, "attn.o"} if document.get("attention_bias") else set()
    return attn | ({"mlp.gate", "mlp.up", "mlp.down"} if document.get("mlp_bias") else set())


def kind(module: str) -> str:
    """The name that PEFT can know all modules of a kind by."""
    return module.rpartition(".")[2]


# --- configuration -----------------------------------------------------------------------------


def sizes(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of the LlamaConfig that a config.json means, as transformers reads it.

    Raises MiniloraError naming the field whose value is no size or asks for another mathematics.
    """
    require(document, REQUIRED, path)
    for name in ("attention_bias", "mlp_bias"):
        field(document, name, bool, False, where=path)
    given = {**DEFAULTS[document["model_type"]], **document}
    if given["num_key_value_heads"] is None:
        given["num_key_value_heads"] = given["num_attention_heads"]
    names = SIZES if given["head_dim"] is None else (*SIZES, "head_dim")
    values: dict[str, Any] = {name: field(given, name, int, 0, where=path) for name in names}
    values["rms_norm_eps"] = field(given, "rms_norm_eps", float, 0.0, where=path)
    if document["model_type"] == "qwen2":
        _refuse_windows(document, values, path)
    return values | _rotary(document, values, path)


def _refuse_windows(document: Mapping[str, Any], sizes: Mapping[str, Any], path: Path) -> None:
    """Raise MiniloraError where some of Qwen2's blocks attend to a window of the past alone."""
    kinds = document.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    ):
        raise MiniloraError(
            f"{path}: layer_types is {reprlib.repr(kinds)}, of which minilora computes "
            "full_attention alone"
        )
    if kinds is not None or not field(document, "use_sliding_window", bool, False, where=path):
        return
    first = field(document, "max_window_layers", int, 28, where=path)
    window = document.get("sliding_window", 4096)
    if window is not None and first < sizes["num_hidden_layers"]:
        raise MiniloraError(
            f"{path}: use_sliding_window is True with sliding_window {reprlib.repr(window)} from "
            f"block {first} on, which minilora does not compute; expected False"
        )


# The ways of scaling the angles, by their rope_type: ours, and the names of its numbers there.
SCALINGS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "default": (lambda: None, ()),
    "linear": (LinearScaling, ("factor",)),
    "llama3": (
        Llama3Scaling,
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
}


def _rotary(
    document: Mapping[str, Any], sizes: Mapping[str, Any], path: Path
) -> dict[str, float | LinearScaling | Llama3Scaling | None]:
    """θ and its scaling: of rope_parameters, or of the older rope_theta and rope_scaling."""
    name = "rope_scaling" if document.get("rope_scaling") else "rope_parameters"
    rope, where = document.get(name) or {}, f"{path}: {name}"
    if not isinstance(rope, dict):
        raise MiniloraError(f"{where} is {reprlib.repr(rope)}, expected an object")
    older = field(document, "rope_theta", float, 10000.0, where=path)
    theta = field(rope, "rope_theta", float, older, where=where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise MiniloraError(
            f"{where}: rope_type is {reprlib.repr(kind)}, which minilora does not compute; "
            f"expected {' or '.join(map(repr, SCALINGS))}"
        )
    scaling, names = SCALINGS[kind]
    require(rope, {"partial_rotary_factor": (None, 1.0)}, where)
    for key in rope:
        if key not in ("rope_theta", "rope_type", "type", "partial_rotary_factor", *names):
            require(rope, {key: (None,)}, where)
    original = "original_max_position_embeddings"
    given = {original: sizes["max_position_embeddings"], **rope}
    if original in document:  # as in transformers, this counts more
        given[original] = document[original]
    for key in names:
        if key not in given:
            raise MiniloraError(f"{where}: {key} is missing, which the rope_type {kind!r} needs")
    numbers = (field(given, k, int if k == original else float, 0, where=where) for k in names)
    return {"rope_theta": theta, "rope_scaling": scaling(*numbers)}


def fresh_document(base: Tree, config: LlamaConfig) -> dict[str, Any]:
    """The fields of transformers' configuration that say what `llama` computes with a base."""
    block, maps = base["blocks"][0], {"attn.qkv": "attn.q", "mlp.gate": "mlp.gate"}
    linear = {f"{part}.{name}": x for part in ("attn", "mlp") for name, x in block[part].items()}
    with_bias = {maps.get(name, name) for name, weights in linear.items() if "b" in weights}
    kind = "qwen2" if with_bias & {"attn.q", "attn.o"} == {"attn.q"} else "llama"
    return config_document(config, kind, tied="head" not in base, with_bias=with_bias)


def config_document(
    config: LlamaConfig, kind: str, *, tied: bool, with_bias: Collection[str]
) -> dict[str, Any]:
    """The config.json of a model of this kind, the model_type, some of whose maps have a bias.

    The settings of the positions stand there in the new and, for older programs, the old spelling.
    """
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    for name, (ours, keys) in SCALINGS.items():
        if scaling is not None and type(scaling) is ours:
            rope = {"rope_type": name, **dict(zip(keys, scaling, strict=True))}
    biases = {} if kind == "qwen2" else {
        "attention_bias": "attn.q" in with_bias, "mlp_bias": "mlp.gate" in with_bias
    }  # fmt: skip
    return {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        # What transformers computes in; the file may be in float16 to be small.
        "dtype": "float32",
        "eos_token_id": None,
        "hidden_act": "silu",
        "model_type": kind,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        "rope_scaling": None if scaling is None else rope,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": tied,
        **{name: getattr(config, name) for name in SIZES},
        **({} if config.head_dim is None else {"head_dim": config.head_dim}),
        **biases,
    }
