"""Low-rank adaptation (Hu et al. 2021): the pair, its configuration, its start, and merging.

A frozen weight W (in, out) gains an update of rank R, W + s A B, of which only A (in, R) and
B (R, out) are trained. The paper writes W, B, A as the transposes of these.

The adapters are a second tree, sparse over the base's own paths; a LoRA path names one adapter:
`embedding`, `blocks.{i}.attn.{qkv,q,k,v,o}` or `blocks.{i}.mlp.{up,down}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minilora.backend import Array, namespace
from minilora.errors import MiniloraError
from minilora.ops import (
    Again,
    Cache,
    dropout_backward,
    dropout_forward,
    dropout_mask,
    made,
    rows,
)
from minilora.tree import Tree, flatten, unflatten

ATTENTION_TARGETS = ("qkv", "q", "k", "v", "o")
MLP_TARGETS = ("up", "down")
TARGETS = (*ATTENTION_TARGETS, *MLP_TARGETS, "embedding")


# --- the pair ----------------------------------------------------------------------------------


class LoRACache(NamedTuple):
    """What the LoRA pair keeps: its (dropped) input, or what computes it; the small h = s x A."""

    x: Array | Again
    h: Array
    A: Array
    B: Array
    scale: float
    dropout: Cache | None
    needs_dx: bool


def lora_forward(
    x: Array,
    A: Array,
    B: Array,
    *,
    scale: float,
    mask: Array | None = None,
    needs_dx: bool = True,
    again: Again | None = None,
) -> tuple[Array, Cache]:
    """The low-rank update y = s (x ∘ mask) A B [LORA.1-2] (Hu et al. 2021, eq. 3).

    (..., I), (I, R), (R, O) -> (..., O). The mask is a dropout mask for x, or None. Keeps the
    input, which a frozen W would not need, or what computes it `again`, and h = s x A (..., R),
    which is small. Without `needs_dx` its gradient is None: below the lowest adapter nothing is
    trained.
    """
    dropout = None
    if mask is not None:
        x, dropout = dropout_forward(x, mask=mask)
        again = None
    h = rows(x) @ A
    h *= scale  # [LORA.1] h = s x A
    y = h @ B  # [LORA.2] y = h B
    cache = LoRACache(again or x, h, A, B, scale, dropout, needs_dx)
    return y.reshape(*x.shape[:-1], B.shape[1]), cache


def lora_backward(dy: Array, cache: Cache) -> tuple[Array | None, Array, Array]:
    """dx, dA, dB of `lora_forward`: with dW = xᵀ dy, they are s dW Bᵀ and s Aᵀ dW, never via dW."""
    x, h, A, B, scale, dropout, needs_dx = cache
    leading, dy = dy.shape[:-1], rows(dy)
    dB = h.T @ dy  # [LORA.3] dB = hᵀ dy
    dxA = dy @ B.T
    dxA *= scale  # [LORA.4] d(xA) = s dy Bᵀ
    dA = rows(made(x)).T @ dxA  # [LORA.5] dA = xᵀ d(xA)
    if not needs_dx:
        return None, dA, dB
    dx = (dxA @ A.T).reshape(*leading, A.shape[0])  # [LORA.6] dx = d(xA) Aᵀ
    if dropout is not None:
        (dx,) = dropout_backward(dx, dropout)
    return dx, dA, dB


def lora_embedding_forward(
    A: Array, B: Array, *, index: Array, scale: float
) -> tuple[Array, Cache]:
    """The update of an embedding table, y = s A[index] B [LORA.7].  (V, R), (R, C) -> (..., C)

    The LoRA pair for the one-hot rows that an embedding multiplies. Keeps h = s A[index].
    """
    h = A[index] * scale
    return h @ B, (index, h, A, B, scale)


def lora_embedding_backward(dy: Array, cache: Cache) -> tuple[Array, Array]:
    """dA, dB of `lora_embedding_forward`."""
    index, h, A, B, scale = cache
    dB = rows(h).T @ rows(dy)  # [LORA.8] dB = hᵀ dy
    drows = rows(dy) @ B.T
    drows *= scale
    dA = namespace(dy).zeros_like(A)
    namespace(dy).add.at(dA, index.reshape(-1), drows)  # [LORA.9] dA_v = Σ_{index=v} s dy Bᵀ
    return dA, dB


# --- configuration -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LoRAConfig:
    """Which weights are adapted, and how.

    `targets` are names of TARGETS or regular expressions over LoRA paths; a pattern matches a
    whole path or its end after a dot, so `down` is every `mlp.down` and `0.attn.qkv` is one weight.
    The keys of `rank_pattern` and `alpha_pattern` match in the same way and the first that matches
    replaces `rank` or `alpha`. `dropout` is the probability of dropping an entry of x.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ("qkv",)
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise MiniloraError(f"targets is the text {self.targets!r}; expected a tuple of names")
        if not self.targets:
            raise MiniloraError(f"targets is empty; it names some of {', '.join(TARGETS)}")
        for rank in (self.rank, *self.rank_pattern.values()):
            if not isinstance(rank, int) or rank < 1:
                raise MiniloraError(f"rank {rank} is not a whole number of at least 1")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not (math.isfinite(alpha) and alpha > 0):
                raise MiniloraError(f"alpha {alpha} is not a positive number")
        if not 0.0 <= self.dropout < 1.0:
            raise MiniloraError(f"dropout {self.dropout} is not in [0, 1)")

    def rank_of(self, path: str) -> int:
        """R of the adapter at a LoRA path."""
        return next((r for key, r in self.rank_pattern.items() if matches(key, path)), self.rank)

    def alpha_of(self, path: str) -> float:
        """α of the adapter at a LoRA path."""
        return next((a for key, a in self.alpha_pattern.items() if matches(key, path)), self.alpha)

    def scale_of(self, path: str) -> float:
        """s = α / R (Hu et al. 2021, §4.1), or α / √R for rsLoRA (Kalajdzievski 2023)."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rslora else rank)


def matches(pattern: str, path: str) -> bool:
    """Whether a target or pattern key names a LoRA path: all of it, or its end after a dot.

    Raises MiniloraError for a pattern that is not a regular expression.
    """
    try:
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", path) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise MiniloraError(
            f"the pattern {pattern!r} is not a regular expression: {error}"
        ) from None


def lora_paths(n_layer: int) -> list[str]:
    """Every LoRA path of a model of `n_layer` blocks, in the order of the forward pass."""
    block = [f"attn.{name}" for name in ATTENTION_TARGETS] + [f"mlp.{name}" for name in MLP_TARGETS]
    return ["embedding"] + [f"blocks.{i}.{name}" for i in range(n_layer) for name in block]


def adapted_paths(config: LoRAConfig, n_layer: int) -> list[str]:
    """The LoRA paths that the configuration's targets name, in the order of the forward pass.

    Raises MiniloraError for an unknown name, and for a pattern (a target's or a pattern key) that
    matches nothing.
    """
    paths = lora_paths(n_layer)
    for target in config.targets:
        if not any(matches(target, path) for path in paths):
            what = "unknown target" if target.isidentifier() else "no weight matches the target"
            raise MiniloraError(f"{what} {target!r}; the targets are {', '.join(TARGETS)}")
    adapted = [path for path in paths if any(matches(t, path) for t in config.targets)]
    for key in (*config.rank_pattern, *config.alpha_pattern):
        if not any(matches(key, path) for path in adapted):
            raise MiniloraError(
                f"the pattern {key!r} matches no adapted weight; these are {', '.join(adapted)}"
            )
    return adapted


# --- the adapter tree --------------------------------------------------------------------------


def weight_of(path: str, width: int) -> tuple[str, slice]:
    """Where the adapter at a LoRA path acts: the path of a base weight, and columns of it.

    q, k and v are the three thirds, `width` columns each, of the fused weight qkv.
    """
    if path == "embedding":
        return "wte", slice(None)
    parent, _, name = path.rpartition(".")
    if name in ("q", "k", "v"):
        third = "qkv".index(name)
        return f"{parent}.qkv.w", slice(third * width, (third + 1) * width)
    return f"{path}.w", slice(None)


def lora_init(base: Tree, config: LoRAConfig, *, seed: int) -> Tree:
    """A fresh adapter tree for `base`: A random, B zero, so that training starts from the base.

    A ~ U(-1/√in, 1/√in), as PEFT and loralib have it; for the embedding, as there, A is zero and
    B ~ N(0, 1). Drawn on the host from `seed`; of the base's dtype. Raises MiniloraError for a
    target that names nothing and for a rank above the smaller side of its weight.
    """
    rng = np.random.default_rng(seed)
    weights, width = flatten(base), base["wte"].shape[1]
    flat: dict[str, Array] = {}
    for path in adapted_paths(config, len(base["blocks"])):
        weight_path, columns = weight_of(path, width)
        weight, rank = weights[weight_path][:, columns], config.rank_of(path)
        n_in, n_out = weight.shape
        if rank > min(n_in, n_out):
            raise MiniloraError(
                f"rank {rank} is above the smaller side of {path}, a weight of {n_in} × {n_out}"
            )
        if path == "embedding":
            A, B = np.zeros((n_in, rank)), rng.normal(size=(rank, n_out))
        else:
            bound = 1.0 / math.sqrt(n_in)
            A, B = rng.uniform(-bound, bound, size=(n_in, rank)), np.zeros((rank, n_out))
        xp = namespace(weight)
        flat[f"{path}.A"] = xp.asarray(A.astype(weight.dtype))
        flat[f"{path}.B"] = xp.asarray(B.astype(weight.dtype))
    tree = unflatten(flat)
    blocks = tree.get("blocks", [])
    tree["blocks"] = blocks + [{} for _ in range(len(base["blocks"]) - len(blocks))]
    return tree


def adapters(lora: Tree) -> dict[str, dict[str, Array]]:
    """The adapters of a tree, {"A": (in, R), "B": (R, out)} by LoRA path."""
    found: dict[str, dict[str, Array]] = {}
    for path, factor in flatten(lora).items():
        adapter, _, name = path.rpartition(".")
        found.setdefault(adapter, {})[name] = factor
    return found


def dropout_masks(
    lora: Tree, config: LoRAConfig, *, rng: np.random.Generator, shape: tuple[int, int]
) -> dict[str, Array] | None:
    """A dropout mask (B, T, in) for the input of every adapter, by LoRA path; host.

    `shape` is (B, T). The embedding has none: its input is an index. None if nothing is dropped.
    """
    if config.dropout == 0.0:
        return None
    return {
        path: dropout_mask(rng, (*shape, len(ab["A"])), config.dropout, ab["A"].dtype)
        for path, ab in adapters(lora).items()
        if path != "embedding"
    }


# --- merging -----------------------------------------------------------------------------------


def merge(base: Tree, lora: Tree, config: LoRAConfig) -> Tree:
    """The base with every update added, W + s A B [LORA.10] (Hu et al. 2021, §4.1); a new tree.

    Equal to the unmerged model up to rounding, and as fast as the base. An adapter of the embedding
    cannot be merged where the head is tied, as that would change with it: this raises
    MiniloraError.
    """
    return _with_updates(base, lora, config, sign=1.0)


def unmerge(base: Tree, lora: Tree, config: LoRAConfig) -> Tree:
    """The inverse of `merge`, W - s A B, up to rounding."""
    return _with_updates(base, lora, config, sign=-1.0)


def _with_updates(base: Tree, lora: Tree, config: LoRAConfig, *, sign: float) -> Tree:
    weights, width = flatten(base), base["wte"].shape[1]
    merged: dict[str, Any] = dict(weights)
    for path, ab in adapters(lora).items():
        if path == "embedding" and "head" not in base:
            raise MiniloraError(
                "an adapter of the embedding cannot be merged: the tied head shares its table, "
                "which the adapter leaves as it is; use the adapter unmerged"
            )
        weight_path, columns = weight_of(path, width)
        if merged[weight_path] is weights[weight_path]:
            merged[weight_path] = weights[weight_path].copy()
        update = ab["A"] @ ab["B"]
        update *= sign * config.scale_of(path)
        merged[weight_path][:, columns] += update  # [LORA.10] W + s A B
    return unflatten(merged)
