"""GPT-2 (Radford et al. 2019): its sizes, its weights, and its block forwards and backwards.

The base holds every weight under the name of the argument that takes it, and the adapters (see
`lora`) hold A and B at the same places:

    {"wte", "wpe", "blocks": [{"ln_1": {"w", "b"}, "attn": {"qkv": {"w", "b"}, "o": …},
                               "ln_2": …, "mlp": {"up": …, "down": …}}], "ln_f": …}
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minilora import ops
from minilora.adapters import Adapter, Adapters
from minilora.backend import Array
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


@dataclass(frozen=True)
class GPTConfig(Settings):
    """The sizes of a GPT-2, by their names in Hugging Face's config.json; GPT-2 small by default.

    n_inner is the MLP's width, 4 n_embd when None. Raises MiniloraError for impossible sizes.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        if not 0.0 < self.layer_norm_epsilon < math.inf:
            raise MiniloraError(f"layer_norm_epsilon {self.layer_norm_epsilon} is not positive")
        if self.inner < 1:
            raise MiniloraError(f"n_inner {self.n_inner} is too small; the minimum is 1")
        if self.n_embd % self.n_head:
            raise MiniloraError(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: "
                "the heads share the width equally"
            )

    @property
    def inner(self) -> int:
        """F, the width inside the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner


def gpt_init(config: GPTConfig, *, seed: int, dtype: Any = np.float32) -> Tree:
    """A base tree to pretrain: weights N(0, 0.02²), biases 0, layer norms 1 and 0; on the host.

    The two projections that feed the residual stream start smaller, by 1/√(2 n_layer)
    (Radford et al. 2019, §2.3).
    """
    rng = np.random.default_rng(seed)
    C, F = config.n_embd, config.inner

    def normal(n_in: int, n_out: int, std: float = 0.02) -> Array:
        x = np.empty((n_in, n_out), dtype)
        for part in np.array_split(x, 1 + n_in // 1024):  # drawn in float64, never all at once
            part[:] = std * rng.standard_normal(part.shape)
        return x

    def linear(n_in: int, n_out: int, std: float = 0.02) -> Tree:
        return {"w": normal(n_in, n_out, std=std), "b": np.zeros(n_out, dtype)}

    def layer_norm() -> Tree:
        return {"w": np.ones(C, dtype), "b": np.zeros(C, dtype)}

    residual_std = 0.02 / math.sqrt(2 * config.n_layer)

    def block() -> Tree:
        return {
            "ln_1": layer_norm(),
            "attn": {"qkv": linear(C, 3 * C), "o": linear(C, C, residual_std)},
            "ln_2": layer_norm(),
            "mlp": {"up": linear(C, F), "down": linear(F, C, residual_std)},
        }

    return {
        "wte": normal(config.vocab_size, C),
        "wpe": normal(config.n_positions, C),
        "blocks": [block() for _ in range(config.n_layer)],
        "ln_f": layer_norm(),
    }


# --- embedding and last norm -------------------------------------------------------------------


class EmbedCache(NamedTuple):
    wte: ops.EmbeddingCache
    lora: LoRAEmbeddingCache | None
    wpe: ops.PositionCache


def embed_forward(
    base: Tree, adapter: Adapter | None, *, tokens: Array, offset: int = 0
) -> tuple[Array, EmbedCache]:
    """The tokens' rows of wte and of its update, and the positions from `offset` on.

    (B, T) token ids -> (B, T, C)
    """
    x, wte = ops.embedding_forward(base["wte"], index=tokens)
    lora = None
    if adapter is not None:
        A, B, scale = adapter.A, adapter.B, adapter.scale
        update, lora = lora_embedding_forward(A, B, index=tokens, scale=scale)
        x += update
    x, wpe = ops.position_forward(x, base["wpe"], offset=offset)
    return x, EmbedCache(wte, lora, wpe)


def embed_backward(dx: Array, cache: EmbedCache) -> tuple[Tree, Tree]:
    """dwte and dwpe, and dA and dB where there is an adapter, of `embed_forward`."""
    dx, dwpe = ops.position_backward(dx, cache.wpe)
    (dwte,) = ops.embedding_backward(dx, cache.wte)
    if cache.lora is None:
        return {"wte": dwte, "wpe": dwpe}, {}
    dA, dB = lora_embedding_backward(dx, cache.lora)
    return {"wte": dwte, "wpe": dwpe}, {"A": dA, "B": dB}


def norm_forward(x: Array, base: Tree, *, config: GPTConfig) -> tuple[Array, ops.LayerNormCache]:
    """The layer norm before the head.  (..., C) -> (..., C)"""
    return ops.layer_norm_forward(x, **base["ln_f"], eps=config.layer_norm_epsilon)


def norm_backward(dy: Array, cache: ops.LayerNormCache) -> tuple[Array, Tree]:
    """dx and the weights' gradients of `norm_forward`."""
    dx, dw, db = ops.layer_norm_backward(dy, cache)
    return dx, {"ln_f": {"w": dw, "b": db}}


# --- block -------------------------------------------------------------------------------------


def positions(config: GPTConfig, T: int, *, offset: int = 0, like: Array) -> dict[str, Array]:
    """What a block must know of positions: nothing, as they are in the embedding."""
    return {}


READS = {"qkv": "ln_1", "o": "attention", "up": "ln_2", "down": "gelu"}  # see `keep.Kept`
ENDS = {"qkv": "ln_1", "o": "qkv", "up": "ln_2", "down": "up"}  # see `keep.ending_at_lowest`
LAST = "down"  # of its output only y is made


def block_forward(
    x: Array, block: Tree, adapters: Adapters, *, config: GPTConfig, plan: Plan, attend: ops.Attend
) -> tuple[Array, Kept]:
    """x + Attn(LN₁ x), then + MLP(LN₂ ·), as GPT-2 has it [BLOCK.1-2].  (B, T, C) -> (B, T, C)

    `attend` is `ops.attention_forward` or another attention: generation has one with a past.
    """
    eps, attn, mlp = config.layer_norm_epsilon, block["attn"], block["mlp"]
    cache = Kept(plan, READS)
    h, cache["ln_1"] = ops.layer_norm_forward(x, **block["ln_1"], eps=eps)
    h, cache["qkv"] = adapted_linear_forward(h, **attn["qkv"], adapters=adapters["qkv"])
    h, cache["attention"] = attend(h, heads=config.n_head)
    h, cache["o"] = adapted_linear_forward(h, **attn["o"], adapters=adapters["o"])
    x = x + h  # [BLOCK.1] x + Attn(LN₁ x)
    h, cache["ln_2"] = ops.layer_norm_forward(x, **block["ln_2"], eps=eps)
    h, cache["up"] = adapted_linear_forward(h, **mlp["up"], adapters=adapters["up"])
    h, cache["gelu"] = ops.gelu_forward(h)
    h, cache["down"] = adapted_linear_forward(h, **mlp["down"], adapters=adapters["down"])
    return x + h, cache  # [BLOCK.2] x + MLP(LN₂ x)


def block_backward(dy: Array, cache: Kept) -> tuple[ops.Gradient, Tree, Tree]:
    """dx, dblock, dadapters of `block_forward`; where no dx is wanted the pass ends early."""
    dh, ddown, down = adapted_linear_backward(dy, cache["down"])
    (dh,) = ops.gelu_backward(dh, cache["gelu"])
    dh, dup, up = adapted_linear_backward(dh, cache["up"])
    dblock, dadapters = {"mlp": {"up": dup, "down": ddown}}, {"mlp": up | down}
    if dh is None:
        return None, dblock, dadapters
    dh, dw, db = ops.layer_norm_backward(dh, cache["ln_2"])
    dblock = {"ln_2": {"w": dw, "b": db}, **dblock}
    dx = dy + dh  # [BLOCK.3] dx = dy + the gradient through the MLP
    dh, do, o = adapted_linear_backward(dx, cache["o"])
    (dh,) = ops.attention_backward(dh, cache["attention"])
    dh, dqkv, qkv = adapted_linear_backward(dh, cache["qkv"])
    dblock = {"attn": {"qkv": dqkv, "o": do}, **dblock}
    dadapters = {"attn": qkv | o, **dadapters}
    if dh is None:
        return None, dblock, dadapters
    dh, dw, db = ops.layer_norm_backward(dh, cache["ln_1"])
    dblock = {"ln_1": {"w": dw, "b": db}, **dblock}
    return dx + dh, dblock, dadapters  # [BLOCK.4] and through the attention
