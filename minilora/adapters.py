"""Adapters as data: which weights have one, and how; their tree, initialisation, dropout masks.

The adapters are a tree beside the base's, sparse over the same places. What is computed with them
is in `lora`.

A LoRA path names one adapter: `embedding`, `blocks.{i}.attn.{qkv,q,k,v,o}` or
`blocks.{i}.mlp.{gate,up,down}`; only a Llama has `gate`.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np

from minilora.backend import Array, namespace
from minilora.errors import MiniloraError
from minilora.settings import DERIVED, Settings
from minilora.tree import Tree, flatten, unflatten

ATTENTION_TARGETS = ("qkv", "q", "k", "v", "o")
MLP_TARGETS = ("up", "down")
TARGETS = (*ATTENTION_TARGETS, *MLP_TARGETS, "embedding")  # of a GPT-2; a Llama has `gate`, too


# --- configuration -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LoRAConfig(Settings):
    """Which weights are adapted, and how; `alpha` is the rank unless given, so that s = 1.

    `targets` are names of TARGETS or regular expressions over LoRA paths; a pattern matches a
    whole path or its end after a dot, so `down` is every `mlp.down` and `0.attn.qkv` is one weight.
    The keys of `rank_pattern` and `alpha_pattern` match in the same way and the first that matches
    replaces `rank` or `alpha`. `dropout` is the probability of dropping an entry of x.
    """

    foreign: ClassVar[Mapping[str, str]] = {  # PEFT's names, and the paper's r
        "r": "rank",
        "lora_alpha": "alpha",
        "target_modules": "targets",
        "lora_dropout": "dropout",
        "use_rslora": "rslora",
    }

    rank: int = 8
    alpha: float = DERIVED  # the rank
    targets: tuple[str, ...] = ("qkv", "o", "up", "down")
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.targets, str):
            raise MiniloraError(f"targets is the text {self.targets!r}; expected a tuple of names")
        if not self.targets:
            raise MiniloraError(f"targets is empty; it names some of {', '.join(TARGETS)}")
        for name, rank in named(self.rank, self.rank_pattern, "rank"):
            if not isinstance(rank, int) or rank < 1:
                raise MiniloraError(f"{name} {rank} is not a whole number of at least 1")
            if rank >= 2**31:
                raise MiniloraError(f"{name} {rank} is too large; the limit is 2^31")
        if self.alpha is None:
            object.__setattr__(self, "alpha", self.rank)
        for name, alpha in named(self.alpha, self.alpha_pattern, "alpha"):
            if not (math.isfinite(alpha) and alpha > 0):
                raise MiniloraError(f"{name} {alpha} is not a positive number")
        if not 0.0 <= self.dropout < 1.0:
            raise MiniloraError(f"dropout {self.dropout} is not in [0, 1)")
        alpha = min((self.alpha, *self.alpha_pattern.values()))
        if alpha / max((self.rank, *self.rank_pattern.values())) < np.finfo(np.float32).tiny:
            raise MiniloraError(f"alpha {alpha} is too small: the scale alpha / rank would be 0")

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


def named(value: Any, pattern: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    """A setting and those of its pattern, each with what a message calls it."""
    return [(name, value), *((f"{name}_pattern {key!r}: {name}", v) for key, v in pattern.items())]


def matches(pattern: str, path: str) -> bool:
    """Whether a target or pattern key names a LoRA path: all of it, or its end after a dot.

    Raises MiniloraError for a pattern that is not a regular expression.
    """
    try:
        return compiled(rf"(?:.*\.)?(?:{pattern})").fullmatch(path) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise MiniloraError(
            f"the pattern {pattern!r} is not a regular expression: {error}"
        ) from None


@functools.lru_cache(maxsize=1024)
def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression, without a warning of what a later Python might make of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.compile(pattern)


def lora_paths(n_layer: int, *, mlp: Sequence[str] = MLP_TARGETS) -> list[str]:
    """Every LoRA path of a model of `n_layer` blocks, in the order of the forward pass.

    `mlp` names the linear maps of its MLPs.
    """
    block = [f"attn.{name}" for name in ATTENTION_TARGETS] + [f"mlp.{name}" for name in mlp]
    return ["embedding"] + [f"blocks.{i}.{name}" for i in range(n_layer) for name in block]


def adapted_paths(
    config: LoRAConfig, n_layer: int, *, mlp: Sequence[str] = MLP_TARGETS
) -> list[str]:
    """The LoRA paths that the configuration's targets name, in the order of the forward pass.

    Raises MiniloraError for an unknown name, and for a pattern (a target's or a pattern key) that
    matches nothing.
    """
    paths = lora_paths(n_layer, mlp=mlp)
    for target in config.targets:
        if not any(matches(target, path) for path in paths):
            what = "unknown target" if target.isidentifier() else "no weight matches the target"
            names = ", ".join((*ATTENTION_TARGETS, *mlp, "embedding"))
            raise MiniloraError(f"targets: {what} {target!r}; the targets are {names}")
    adapted = [path for path in paths if any(matches(t, path) for t in config.targets)]
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    for name, key in ((name, key) for name, keys in patterns.items() for key in keys):
        if not any(matches(key, path) for path in adapted):
            raise MiniloraError(
                f"{name}: {key!r} matches no adapted weight; these are {', '.join(adapted)}"
            )
    return adapted


def qkv_widths(base: Tree) -> tuple[int, int]:
    """How many columns of a fused weight qkv are q's, H K, and how many k's as well as v's, G K."""
    attn = base["blocks"][0]["attn"]
    q_width = attn["o"]["w"].shape[0]
    return q_width, (attn["qkv"]["w"].shape[1] - q_width) // 2


@functools.cache
def weight_of(path: str, q_width: int, kv_width: int | None = None) -> tuple[str, slice]:
    """Where the adapter at a LoRA path acts: the path of a base weight, and columns of it.

    Those of q, k and v are side by side in the fused weight qkv; `kv_width` is q's when None.
    """
    if path == "embedding":
        return "wte", slice(None)
    parent, _, name = path.rpartition(".")
    if name in ("q", "k", "v"):
        width = q_width if name == "q" or kv_width is None else kv_width
        start = {"q": 0, "k": q_width, "v": q_width + width}[name]
        return f"{parent}.qkv.w", slice(start, start + width)
    return f"{path}.w", slice(None)


# --- the adapter tree --------------------------------------------------------------------------


def lora_init(base: Tree, config: LoRAConfig, *, seed: int) -> Tree:
    """A fresh adapter tree for `base`: A random, B zero, so that training starts from the base.

    A ~ U(-1/√in, 1/√in), as PEFT and loralib have it; for the embedding, as there, A is zero and
    B ~ N(0, 1). Drawn on the host from `seed`; of the base's dtype. Raises MiniloraError for a
    target that names nothing and for a rank above the smaller side of its weight.
    """
    rng = np.random.default_rng(seed)
    weights, widths = flatten(base), qkv_widths(base)
    flat: dict[str, Array] = {}
    for path in adapted_paths(config, len(base["blocks"]), mlp=tuple(base["blocks"][0]["mlp"])):
        weight_path, columns = weight_of(path, *widths)
        weight, rank = weights[weight_path][:, columns], config.rank_of(path)
        n_in, n_out = weight.shape
        if rank > min(n_in, n_out):
            name = "rank" if rank == config.rank else "rank_pattern: rank"
            raise MiniloraError(
                f"{name} {rank} is above the smaller side of {path}, a weight of {n_in} × {n_out}"
            )
        if path == "embedding":
            A, B = np.zeros((n_in, rank)), rng.normal(size=(rank, n_out))
        else:
            bound = 1.0 / math.sqrt(n_in)
            A, B = rng.uniform(-bound, bound, size=(n_in, rank)), np.zeros((rank, n_out))
        xp = namespace(weight)
        flat[f"{path}.A"] = xp.asarray(A.astype(weight.dtype))
        flat[f"{path}.B"] = xp.asarray(B.astype(weight.dtype))
    return adapter_tree(flat, len(base["blocks"]))


def adapter_tree(flat: Mapping[str, Array], n_layer: int) -> Tree:
    """The tree of factors given by path, in which every one of `n_layer` blocks has its place."""
    tree = unflatten(flat)
    blocks = tree.get("blocks", [])
    return {**tree, "blocks": blocks + [{} for _ in range(n_layer - len(blocks))]}


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


def dropout_mask(rng: np.random.Generator, shape: tuple[int, ...], p: float, dtype: Any) -> Array:
    """A host array that is 0 with probability p and 1 / (1 - p) otherwise, so its mean is 1."""
    keep = rng.random(shape, dtype=np.float32) >= p
    return keep.astype(dtype) * np.asarray(1.0 / (1.0 - p), dtype=dtype)


# --- adapters ready for use --------------------------------------------------------------------


class Adapter(NamedTuple):
    """One adapter ready for use: its factors, its constants, and its columns of the weight."""

    A: Array
    B: Array
    scale: float
    mask: Array | None
    columns: slice


Adapters: TypeAlias = Mapping[str, dict[str, Adapter]]
"""The adapters of a block by linear map and by target: q, k and v lie on the map qkv."""


def placed_adapters(
    lora: Tree,
    config: LoRAConfig,
    widths: tuple[int, int],
    *,
    masks: Mapping[str, Array] | None = None,
) -> dict[str, Adapters]:
    """The adapters of each block by its path `blocks.{i}`; that of wte is outside, at "".

    `widths` are the base's `qkv_widths`, and `masks` the dropout masks by LoRA path.
    """
    placed: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    for path, factors in adapters(lora).items():
        weight, columns = weight_of(path, *widths)
        mask = None if masks is None else masks.get(path)
        adapter = Adapter(**factors, scale=config.scale_of(path), mask=mask, columns=columns)
        sublayer, _, linear = weight.removesuffix(".w").rpartition(".")
        placed[sublayer.rpartition(".")[0]][linear][path.rpartition(".")[2]] = adapter
    return placed
