"""Llama (Touvron et al. 2023): its sizes, its weights, and its block forwards and backwards.

The base holds every weight under the name of the argument that takes it, and the adapters (see
`lora`) hold A and B at the same places:

    {"wte", "blocks": [{"ln_1": {"w"}, "attn": {"qkv": {"w"}, "o": {"w"}},
                        "ln_2": {"w"}, "mlp": {"gate": {"w"}, "up": …, "down": …}}], "ln_f": {"w"}}

Parts that GPT-2 has too are called as there. What differs: positions turn q and k in every block
instead of being added once, RMS norms instead of layer norms, a gate in the MLP, fewer heads of k
and v than of q, no biases. Where a "b" stands beside a "w", as in qkv of Qwen2, it is added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minilora import llama_ops, ops
from minilora.adapters import Adapter, Adapters
from minilora.backend import Array, namespace
from minilora.errors import MiniloraError
from minilora.keep import Kept, Plan
from minilora.lora import (
    LoRAEmbeddingCache,
    adapted_linear_backward,
    adapted_linear_forward,
    lora_embedding_backward,
    lora_embedding_forward,
)
from minilora.settings import Settings, check_sizes
from minilora.tree import Tree


class LinearScaling(NamedTuple):
    """Every angle is divided by `factor` (Chen et al. 2023, §2.3)."""

    factor: float


class Llama3Scaling(NamedTuple):
    """Slow angles are divided by `factor`: those of fewer than `low` turns in `original` times.

    Those of more than `high` turns stay as they are, and between the two they change over (as in
    `apply_scaling` of Meta's code for Llama 3.1).
    """

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True)
class LlamaConfig(Settings):
    """The sizes of a Llama, by their names in Hugging Face's config.json; Llama 1's by default.

    `rms_norm_eps` is always given, as it is not the same in all. `rope_scaling` is for contexts
    longer than the one first trained on. `head_dim` is hidden_size / num_attention_heads when None.
    Raises MiniloraError for impossible sizes.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    max_position_embeddings: int = 2048
    rms_norm_eps: float = field(kw_only=True)
    rope_theta: float = 10000.0
    rope_scaling: LinearScaling | Llama3Scaling | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(
            self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
        )  # fmt: skip
        if self.num_attention_heads % self.num_key_value_heads:
            raise MiniloraError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}, which serve as many each"
            )
        if self.head_dim is not None:
            check_sizes(self, "head_dim")
        elif self.hidden_size % self.num_attention_heads:
            raise MiniloraError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}, and there is no head_dim"
            )
        if self.head_width % 2:
            raise MiniloraError(
                f"heads of width {self.head_width} have no pairs of entries to turn"
            )
        for name in ("rms_norm_eps", "rope_theta"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise MiniloraError(f"{name} {getattr(self, name)} is not a positive number")
        scaling = self.rope_scaling
        if not all(0.0 < number < math.inf for number in scaling or ()):
            raise MiniloraError(f"rope_scaling {scaling} has a number that is not positive")
        if isinstance(scaling, Llama3Scaling) and not scaling.low < scaling.high:
            raise MiniloraError(f"rope_scaling {scaling} has a low that is not below its high")

    @property
    def head_width(self) -> int:
        """K, the width of a head."""
        if self.head_dim is None:
            return self.hidden_size // self.num_attention_heads
        return self.head_dim

    @property
    def n_positions(self) -> int:
        return self.max_position_embeddings

    @property
    def n_embd(self) -> int:
        return self.hidden_size

    @property
    def n_layer(self) -> int:
        return self.num_hidden_layers

    @property
    def n_head(self) -> int:
        return self.num_attention_heads

    @property
    def inner(self) -> int:
        """F, the width inside the MLP."""
        return self.intermediate_size


def llama_init(config: LlamaConfig, *, seed: int, dtype: Any = np.float32) -> Tree:
    """A base tree to pretrain: weights N(0, 0.02²), norms 1, a tied head; on the host."""
    rng = np.random.default_rng(seed)
    C, F, K = config.hidden_size, config.intermediate_size, config.head_width
    H, G = config.num_attention_heads, config.num_key_value_heads

    def linear(n_in: int, n_out: int) -> Tree:
        return {"w": (0.02 * rng.standard_normal((n_in, n_out))).astype(dtype)}

    def norm() -> Tree:
        return {"w": np.ones(C, dtype)}

    def block() -> Tree:
        return {
            "ln_1": norm(),
            "attn": {"qkv": linear(C, (H + 2 * G) * K), "o": linear(H * K, C)},
            "ln_2": norm(),
            "mlp": {"gate": linear(C, F), "up": linear(C, F), "down": linear(F, C)},
        }

    wte = linear(config.vocab_size, C)["w"]
    return {
        "wte": wte,
        "blocks": [block() for _ in range(config.num_hidden_layers)],
        "ln_f": norm(),
    }


# --- embedding and last norm -------------------------------------------------------------------


class EmbedCache(NamedTuple):
    wte: ops.EmbeddingCache
    lora: LoRAEmbeddingCache | None


def embed_forward(
    base: Tree, adapter: Adapter | None, *, tokens: Array, offset: int = 0
) -> tuple[Array, EmbedCache]:
    """The tokens' rows of wte and of its update, wherever they stand.

    (B, T) token ids -> (B, T, C)
    """
    x, wte = ops.embedding_forward(base["wte"], index=tokens)
    if adapter is None:
        return x, EmbedCache(wte, None)
    update, lora = lora_embedding_forward(adapter.A, adapter.B, index=tokens, scale=adapter.scale)
    x += update
    return x, EmbedCache(wte, lora)


def embed_backward(dx: Array, cache: EmbedCache) -> tuple[Tree, Tree]:
    """dwte, and dA and dB where there is an adapter, of `embed_forward`."""
    (dwte,) = ops.embedding_backward(dx, cache.wte)
    if cache.lora is None:
        return {"wte": dwte}, {}
    dA, dB = lora_embedding_backward(dx, cache.lora)
    return {"wte": dwte}, {"A": dA, "B": dB}


def norm_forward(
    x: Array, base: Tree, *, config: LlamaConfig
) -> tuple[Array, llama_ops.RMSNormCache]:
    """The RMS norm before the head.  (..., C) -> (..., C)"""
    return llama_ops.rms_norm_forward(x, **base["ln_f"], eps=config.rms_norm_eps)


def norm_backward(dy: Array, cache: llama_ops.RMSNormCache) -> tuple[Array, Tree]:
    """dx and the weight's gradient of `norm_forward`."""
    dx, dw = llama_ops.rms_norm_backward(dy, cache)
    return dx, {"ln_f": {"w": dw}}


# --- positions ---------------------------------------------------------------------------------


def frequencies(config: LlamaConfig) -> np.ndarray:
    """The angle ω by which each pair turns from one time to the next, in float64.  () -> (K/2,)

    Scaled as `rope_scaling` says.
    """
    K = config.head_width
    omega = config.rope_theta ** (-np.arange(0, K, 2) / K)  # [ROPE.4] ω_j = θ^(-2j/K)
    match config.rope_scaling:
        case LinearScaling(factor):
            return omega / factor
        case Llama3Scaling(factor, low, high, original):
            turns = original * omega / (2.0 * math.pi)
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return omega * (kept + (1.0 - kept) / factor)
    return omega


def positions(config: LlamaConfig, T: int, *, offset: int = 0, like: Array) -> dict[str, Array]:
    """Cosine and sine of every angle, at `offset` and the T - 1 times after it.  () -> (T, 1, K/2)

    Computed in float64 and then of the dtype of `like`.
    """
    angle = np.arange(offset, offset + T)[:, None, None] * frequencies(config)
    xp = namespace(like)
    cos, sin = (xp.asarray(f(angle).astype(like.dtype)) for f in (np.cos, np.sin))
    return {"cos": cos, "sin": sin}


# --- block -------------------------------------------------------------------------------------


READS = {  # see `keep.Kept`
    "qkv": "ln_1", "o": "attention", "gate": "ln_2", "up": "ln_2", "down": "swiglu"
}  # fmt: skip
ENDS = {  # see `keep.ending_at_lowest`
    "qkv": "ln_1", "o": "qkv", "gate": "ln_2", "up": "ln_2", "down": "gate"
}  # fmt: skip
LAST = "down"  # of its output only y is made


def block_forward(
    x: Array,
    block: Tree,
    adapters: Adapters,
    *,
    config: LlamaConfig,
    plan: Plan,
    attend: ops.Attend,
    cos: Array,
    sin: Array,
) -> tuple[Array, Kept]:
    """x + Attn(RMS₁ x), then + MLP(RMS₂ ·), as Llama has it.  (B, T, C) -> (B, T, C)

    `attend` is `ops.attention_forward` or another attention: generation has one with a past.
    """
    eps, attn, mlp = config.rms_norm_eps, block["attn"], block["mlp"]
    H, G = config.num_attention_heads, config.num_key_value_heads
    cache = Kept(plan, READS)
    h, cache["ln_1"] = llama_ops.rms_norm_forward(x, **block["ln_1"], eps=eps)
    h, cache["qkv"] = adapted_linear_forward(h, **attn["qkv"], adapters=adapters["qkv"])
    h, cache["rotary"] = llama_ops.rotary_forward(h, cos=cos, sin=sin, heads=H + G)
    h, cache["attention"] = attend(h, heads=H, kv_heads=G)
    h, cache["o"] = adapted_linear_forward(h, **attn["o"], adapters=adapters["o"])
    x = x + h  # x + Attn(RMS₁ x)
    h, cache["ln_2"] = llama_ops.rms_norm_forward(x, **block["ln_2"], eps=eps)
    g, cache["gate"] = adapted_linear_forward(h, **mlp["gate"], adapters=adapters["gate"])
    u, cache["up"] = adapted_linear_forward(h, **mlp["up"], adapters=adapters["up"])
    h, cache["swiglu"] = llama_ops.swiglu_forward(g, u)
    h, cache["down"] = adapted_linear_forward(h, **mlp["down"], adapters=adapters["down"])
    return x + h, cache  # x + MLP(RMS₂ x)


def block_backward(dy: Array, cache: Kept) -> tuple[ops.Gradient, Tree, Tree]:
    """dx, dblock, dadapters of `block_forward`; where no dx is wanted the pass ends early."""
    dh, ddown, down = adapted_linear_backward(dy, cache["down"])
    dg, du = llama_ops.swiglu_backward(dh, cache["swiglu"])
    dh_up, dup, up = adapted_linear_backward(du, cache["up"])
    dh_gate, dgate, gate = adapted_linear_backward(dg, cache["gate"])
    dblock = {"mlp": {"gate": dgate, "up": dup, "down": ddown}}
    dadapters = {"mlp": gate | up | down}
    if dh_up is None:
        return None, dblock, dadapters
    dh = dh_up + dh_gate  # up and gate read the same h
    dh, dw = llama_ops.rms_norm_backward(dh, cache["ln_2"])
    dblock = {"ln_2": {"w": dw}, **dblock}
    dx = dy + dh  # dx = dy + the gradient through the MLP
    dh, do, o = adapted_linear_backward(dx, cache["o"])
    (dh,) = ops.attention_backward(dh, cache["attention"])
    (dh,) = llama_ops.rotary_backward(dh, cache["rotary"])
    dh, dqkv, qkv = adapted_linear_backward(dh, cache["qkv"])
    dblock = {"attn": {"qkv": dqkv, "o": do}, **dblock}
    dadapters = {"attn": qkv | o, **dadapters}
    if dh is None:
        return None, dblock, dadapters
    dh, dw = llama_ops.rms_norm_backward(dh, cache["ln_1"])
    dblock = {"ln_1": {"w": dw}, **dblock}
    return dx + dh, dblock, dadapters  # and through the attention
