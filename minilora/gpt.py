"""GPT-2 (Radford et al. 2019) built of the pairs in `ops` and `lora`: block, model, loss.

Two trees go in. The base holds every weight under the name of the argument that takes it:

    {"wte", "wpe", "blocks": [{"ln_1": {"w", "b"}, "attn": {"qkv": {"w", "b"}, "o": …},
                               "ln_2": …, "mlp": {"up": …, "down": …}}], "ln_f": …}

and the adapters (see `lora`) hold A and B at the same places. A base may hold a table "head" (V, C)
beside them; without it the head is tied, that is, logits are computed with wte. Gradients come back
as trees of the same structure. Nothing here changes an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from minilora.backend import Array
from minilora.errors import MiniloraError
from minilora.lora import (
    ATTENTION_TARGETS,
    LoRAConfig,
    lora_backward,
    lora_embedding_backward,
    lora_embedding_forward,
    lora_forward,
    weight_of,
)
from minilora.ops import (
    Again,
    Cache,
    attention_backward,
    attention_forward,
    embedding_backward,
    embedding_forward,
    gelu_again,
    gelu_backward,
    gelu_forward,
    head_backward,
    head_forward,
    head_loss_backward,
    head_loss_forward,
    layer_norm_again,
    layer_norm_backward,
    layer_norm_forward,
    linear_backward,
    linear_forward,
    position_backward,
    position_forward,
    residual_backward,
    residual_forward,
)
from minilora.tree import Tree

LARGEST_SIZE = 2**24  # a product of two such sizes still counts bytes in 64 bits


@dataclass(frozen=True)
class GPTConfig:
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
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                raise MiniloraError(f"{name} {getattr(self, name)} is too small; it is at least 1")
            if getattr(self, name) > LARGEST_SIZE:
                raise MiniloraError(f"{name} {getattr(self, name)} is above {LARGEST_SIZE:,}")
        if not 0.0 < self.layer_norm_epsilon < math.inf:
            raise MiniloraError(f"layer_norm_epsilon {self.layer_norm_epsilon} is not positive")
        if self.inner < 1:
            raise MiniloraError(f"n_inner {self.n_inner} is too small; it is at least 1")
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


# --- a linear map with its adapters ------------------------------------------------------------


class Adapter(NamedTuple):
    """One adapter ready for use: its factors and its constants."""

    A: Array
    B: Array
    scale: float
    mask: Array | None
    columns: slice


def block_adapters(
    lora: Tree, block: int, width: int, config: LoRAConfig, masks: Mapping[str, Array]
) -> dict[str, Adapter]:
    """The adapters of one block by target name (`qkv`, `q`, …, `down`)."""
    found = {}
    for room, targets in lora["blocks"][block].items():
        for name, factors in targets.items():
            path = f"blocks.{block}.{room}.{name}"
            columns = weight_of(path, width)[1]
            found[name] = Adapter(
                **factors, scale=config.scale_of(path), mask=masks.get(path), columns=columns
            )
    return found


def adapted_linear_forward(
    x: Array,
    w: Array,
    b: Array,
    *,
    adapters: Mapping[str, Adapter],
    frozen: bool,
    needs_dx: bool = True,
    needs_y: bool = True,
    again: Again | None = None,
) -> tuple[Any, Cache]:
    """y = x W + b + Σ s (x A) B, each adapter on its own columns of y [ADAPT.1].

    (..., I), (I, O), (O,) -> (..., O). Keeps the caches of its parts, and in them not x but what
    computes it `again`, if given. y is None where only they are needed.
    """
    y, linear_cache = linear_forward(
        x, w, b, frozen=frozen, needs_dx=needs_dx, needs_y=needs_y, again=again
    )
    lora_caches = {}
    for name, (A, B, scale, mask, columns) in adapters.items():
        update, cache = lora_forward(
            x, A, B, scale=scale, mask=mask, needs_dx=needs_dx, again=again
        )
        if needs_y:
            y[..., columns] += update  # [ADAPT.1]
        lora_caches[name] = columns, cache
    return y, (linear_cache, lora_caches)


def adapted_linear_backward(dy: Array, cache: Cache) -> tuple[Any, Tree, Tree]:
    """dx, {"w": dw, "b": db}, {name: {"A": dA, "B": dB}} of `adapted_linear_forward`."""
    linear_cache, lora_caches = cache
    dx, dw, db = linear_backward(dy, linear_cache)
    dlora = {}
    for name, (columns, lora_cache) in lora_caches.items():
        dx_lora, dA, dB = lora_backward(dy[..., columns], lora_cache)
        if dx is not None:
            dx += dx_lora  # [ADAPT.2] dx = dy Wᵀ + Σ s (dy Bᵀ) Aᵀ
        dlora[name] = {"A": dA, "B": dB}
    return dx, {"w": dw, "b": db}, dlora


# --- block -------------------------------------------------------------------------------------


class BlockCache(NamedTuple):
    """What a block keeps: the caches of its parts, in the order of the forward pass.

    None for those that no gradient has to reach.
    """

    ln_1: Cache
    qkv: Cache
    attention: Cache
    o: Cache
    ln_2: Cache
    up: Cache
    gelu: Cache
    down: Cache


def block_forward(
    x: Array,
    block: Tree,
    adapters: Mapping[str, Adapter],
    *,
    config: GPTConfig,
    frozen: bool = False,
    attend: Callable[..., tuple[Array, Cache]] = attention_forward,
    needs_dx: bool = True,
    needs_y: bool = True,
) -> tuple[Any, Cache]:
    """x + attention(LN₁ x), then + MLP(LN₂ ·), as GPT-2 has it [BLOCK.1-2].  (B, T, C) -> (B, T, C)

    `attend` may be another attention than `attention_forward` (generation reads a cache). Of the
    linear maps' inputs only that of o is kept: what the layer norms and GELU keep makes the others
    again. Without `needs_dx` nothing is kept for what lies below the lowest adapter. y is None
    where only the cache is needed, which the last product does not add to.
    """
    eps = config.layer_norm_epsilon
    needs_dh = needs_dx or not adapters.keys().isdisjoint(ATTENTION_TARGETS)

    def linear(x: Array, room: str, name: str, targets: tuple[str, ...], **options: Any) -> Any:
        at_this_weight = {t: adapters[t] for t in targets if t in adapters}
        w, b = block[room][name]["w"], block[room][name]["b"]
        return adapted_linear_forward(x, w, b, adapters=at_this_weight, frozen=frozen, **options)

    h, ln_1 = layer_norm_forward(x, **block["ln_1"], eps=eps, frozen=frozen)
    again = partial(layer_norm_again, ln_1)
    h, qkv = linear(h, "attn", "qkv", ("qkv", "q", "k", "v"), needs_dx=needs_dx, again=again)
    h, attention = attend(h, heads=config.n_head)
    h, o = linear(h, "attn", "o", ("o",))
    x, _ = residual_forward(x, h)  # [BLOCK.1] x + Attn(LN₁ x)

    h, ln_2 = layer_norm_forward(x, **block["ln_2"], eps=eps, frozen=frozen)
    again = partial(layer_norm_again, ln_2)
    h, up = linear(h, "mlp", "up", ("up",), needs_dx=needs_dh, again=again)
    h, gelu = gelu_forward(h)
    again = partial(gelu_again, gelu)
    h, down = linear(h, "mlp", "down", ("down",), needs_y=needs_y, again=again)
    cache = BlockCache(ln_1, qkv, attention, o, ln_2, up, gelu, down)
    if not needs_dx:
        cache = cache._replace(ln_1=None)
    if not needs_dh:
        cache = cache._replace(qkv=None, attention=None, o=None, ln_2=None)
    if not needs_y:
        return None, cache
    x, _ = residual_forward(x, h)  # [BLOCK.2] x + MLP(LN₂ x)
    return x, cache


def block_backward(dy: Array, cache: Cache) -> tuple[Any, Tree, Tree]:
    """dx, the gradients of the block's weights (None where frozen) and of its adapters.

    Where dx is not needed it is None: the pass ends at qkv, or at up if no attention is adapted.
    """
    dx, dh = residual_backward(dy, ())
    dh, ddown, lora_down = adapted_linear_backward(dh, cache.down)
    (dh,) = gelu_backward(dh, cache.gelu)
    dh, dup, lora_up = adapted_linear_backward(dh, cache.up)
    lora_mlp = lora_up | lora_down
    if dh is None:
        return None, None, {"mlp": lora_mlp}
    dh, dw_2, db_2 = layer_norm_backward(dh, cache.ln_2)
    dx = dx + dh  # [BLOCK.3] dx = dy + the gradient through the MLP's branch

    dx, dh = residual_backward(dx, ())
    dh, do, lora_o = adapted_linear_backward(dh, cache.o)
    (dh,) = attention_backward(dh, cache.attention)
    dh, dqkv, lora_qkv = adapted_linear_backward(dh, cache.qkv)
    dlora = {"attn": lora_qkv | lora_o, "mlp": lora_mlp}
    dlora = {room: targets for room, targets in dlora.items() if targets}
    if dh is None:
        return None, None, dlora
    dh, dw_1, db_1 = layer_norm_backward(dh, cache.ln_1)
    dx = dx + dh  # [BLOCK.4] and through the attention's branch

    dblock = {
        "ln_1": {"w": dw_1, "b": db_1},
        "attn": {"qkv": dqkv, "o": do},
        "ln_2": {"w": dw_2, "b": db_2},
        "mlp": {"up": dup, "down": ddown},
    }
    return dx, dblock, dlora


# --- model -------------------------------------------------------------------------------------


class TrunkCache(NamedTuple):
    """What the model below its head keeps: the caches of its parts.

    Of a block that no gradient has to reach, None; of one that is computed again, the function that
    does it.
    """

    wte: Cache
    embedding_lora: Cache | None
    wpe: Cache
    blocks: list[Cache | Callable[[], tuple[Array, Cache]] | None]
    ln_f: Cache
    frozen: bool


class GPTCache(NamedTuple):
    """What the model keeps: the caches of its two parts, and whether the head is tied."""

    trunk: TrunkCache
    head: Cache
    tied: bool


def head_table(base: Tree) -> Array:
    """The table (V, C) that logits are computed with: `head` if the base has one, else `wte`."""
    return base["head"] if "head" in base else base["wte"]


def trunk_forward(
    base: Tree,
    lora: Tree | None = None,
    *,
    tokens: Array,
    config: GPTConfig,
    lora_config: LoRAConfig | None = None,
    masks: Mapping[str, Array] | None = None,
    frozen: bool = False,
    recompute: bool = False,
) -> tuple[Array, Cache]:
    """The model up to its head, (B, T) token ids -> (B, T, C), and its caches.

    `masks` are the adapters' dropout masks by LoRA path; `frozen` means that the base gets no
    gradients. Blocks below the lowest adapter of a frozen base keep nothing; with `recompute`, the
    others keep their input alone (Chen et al. 2016, §4). Raises MiniloraError when T exceeds
    n_positions, or when adapters come without their configuration.
    """
    if tokens.shape[-1] > config.n_positions:
        raise MiniloraError(
            f"{tokens.shape[-1]} tokens exceed the model's context of {config.n_positions}"
        )
    if lora is None:
        lora, lora_config = {"blocks": [{} for _ in base["blocks"]]}, LoRAConfig()
    if lora_config is None:
        raise MiniloraError("adapters need their lora_config: it holds their scales")

    x, wte = embedding_forward(base["wte"], index=tokens)
    embedding_lora = None
    if "embedding" in lora:
        scale = lora_config.scale_of("embedding")
        update, embedding_lora = lora_embedding_forward(
            **lora["embedding"], index=tokens, scale=scale
        )
        x += update
    x, wpe = position_forward(x, base["wpe"], frozen=frozen)

    reached = not frozen or embedding_lora is not None
    blocks: list[Cache | None] = []
    for i, block in enumerate(base["blocks"]):
        adapters = block_adapters(lora, i, config.n_embd, lora_config, masks or {})
        needs_dx, reached = reached, reached or bool(adapters)
        again = partial(
            block_forward, x, block, adapters, config=config, frozen=frozen, needs_dx=needs_dx
        )
        x, cache = again()
        if recompute:
            cache = partial(again, needs_y=False)
        blocks.append(cache if reached else None)

    x, ln_f = layer_norm_forward(x, **base["ln_f"], eps=config.layer_norm_epsilon, frozen=frozen)
    return x, TrunkCache(wte, embedding_lora, wpe, blocks, ln_f, frozen)


def trunk_backward(dx: Array, cache: Cache) -> tuple[Tree | None, Tree]:
    """dbase (None when frozen) and dlora of `trunk_forward`."""
    dx, dw_f, db_f = layer_norm_backward(dx, cache.ln_f)

    dblocks: list[Tree] = []
    dlora_blocks: list[Tree] = []
    for block_cache in reversed(cache.blocks):
        dblock: Tree = {}
        dblock_lora: Tree = {}
        if block_cache is not None:
            if callable(block_cache):
                _, block_cache = block_cache()
            dx, dblock, dblock_lora = block_backward(dx, block_cache)
        dblocks.insert(0, dblock)
        dlora_blocks.insert(0, dblock_lora)

    dlora: Tree = {}
    dx, dwpe = position_backward(dx, cache.wpe)
    if cache.embedding_lora is not None:
        dA, dB = lora_embedding_backward(dx, cache.embedding_lora)
        dlora["embedding"] = {"A": dA, "B": dB}
    dlora["blocks"] = dlora_blocks
    if cache.frozen:
        return None, dlora
    (dwte,) = embedding_backward(dx, cache.wte)
    dbase = {"wte": dwte, "wpe": dwpe, "blocks": dblocks, "ln_f": {"w": dw_f, "b": db_f}}
    return dbase, dlora


def gpt_forward(base: Tree, lora: Tree | None = None, **constants: Any) -> tuple[Array, Cache]:
    """Logits of every position, (B, T) token ids -> (B, T, V), and the caches of the whole model.

    Takes the constants of `trunk_forward`, and raises as it does.
    """
    x, trunk = trunk_forward(base, lora, **constants)
    logits, head = head_forward(x, head_table(base), frozen=trunk.frozen)
    return logits, GPTCache(trunk, head, tied="head" not in base)


def gpt_backward(dlogits: Array, cache: Cache) -> tuple[Tree | None, Tree]:
    """dbase (None when frozen) and dlora of `gpt_forward`."""
    dx, dhead = head_backward(dlogits, cache.head)
    dbase, dlora = trunk_backward(dx, cache.trunk)
    return with_head(dbase, dhead, tied=cache.tied), dlora


def with_head(dbase: Tree | None, dhead: Array | None, *, tied: bool) -> Tree | None:
    """The base's gradients with the head's, which is no table of its own where it is tied."""
    if dbase is None:
        return None
    if not tied:
        return {**dbase, "head": dhead}
    return {**dbase, "wte": dbase["wte"] + dhead}  # [GPT.1] dwte = as input + as head


def gpt_logits(
    base: Tree,
    lora: Tree | None = None,
    *,
    tokens: Array,
    config: GPTConfig,
    lora_config: LoRAConfig | None = None,
) -> Array:
    """Logits alone, (B, T) -> (B, T, V); see `gpt_forward`."""
    logits, _ = gpt_forward(
        base, lora, tokens=tokens, config=config, lora_config=lora_config, frozen=True
    )
    return logits


def loss_and_grads(
    base: Tree,
    lora: Tree | None = None,
    *,
    tokens: Array,
    targets: Array,
    config: GPTConfig,
    lora_config: LoRAConfig | None = None,
    wrt: Literal["lora", "base", "both"] = "lora",
    masks: Mapping[str, Array] | None = None,
    ignore_index: int = -100,
    count: int | None = None,
    recompute: bool = False,
) -> tuple[Array, Tree | None, Tree | None]:
    """The mean loss in nats per counted target, and its gradients: loss, dbase, dlora.

    `wrt` says which tree is trained; the other's gradient is None, and a frozen base costs neither
    memory nor products for weight gradients. `count` replaces the number of counted targets as the
    divisor, so that the losses and gradients of a batch's shards add up to the batch's. `recompute`
    keeps the input of each block alone and computes the rest again: less memory, more time, the
    same numbers.
    """
    if wrt != "base" and lora is None:
        raise MiniloraError(f"wrt={wrt!r} asks for gradients of adapters, but there are none")
    frozen = wrt == "lora"
    x, trunk = trunk_forward(
        base,
        lora,
        tokens=tokens,
        config=config,
        lora_config=lora_config,
        masks=masks,
        frozen=frozen,
        recompute=recompute,
    )
    loss, head = head_loss_forward(
        x,
        head_table(base),
        targets=targets,
        ignore_index=ignore_index,
        count=count,
        frozen=frozen,
    )
    del x  # what is needed of it lies in the caches
    dx, dhead = head_loss_backward(1.0, head)
    dbase, dlora = trunk_backward(dx, trunk)
    dbase = with_head(dbase, dhead, tied="head" not in base)
    return loss, dbase, (None if wrt == "base" else dlora)
