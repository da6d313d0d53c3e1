"""Several adapters on one base: their exact weighted sum, as one adapter.

To switch between adapters no weight is changed: `model.with_adapter(lora, lora_config)` is another
model that shares the base's arrays, so many can be loaded at once. This module is for using several
adapters together. Equations (MIX.1-3) are those of docs/mixing.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from minilora.adapters import MLP_TARGETS, LoRAConfig, adapter_tree, adapters, lora_paths
from minilora.backend import Array, namespace
from minilora.errors import MiniloraError
from minilora.tree import Tree


def mix(
    parts: Sequence[tuple[Tree, LoRAConfig]], weights: Sequence[float]
) -> tuple[Tree, LoRAConfig]:
    """One adapter whose update is Σ wᵢ sᵢ Aᵢ Bᵢ (MIX.1), and its configuration, with scale 1.

    The factors are concatenated: A = [A₁ … Aₙ] (in, ΣR), B = [w₁ s₁ B₁; …; wₙ sₙ Bₙ] (ΣR, out), so
    A B is the weighted sum itself, whereas (Σ wᵢ Aᵢ)(Σ wᵢ Bᵢ) would also multiply each A by every
    other adapter's B. Weights may be negative; ranks, scales and targets may differ. An adapter on
    qkv stays separate from those on its columns q, k, v. The arguments are not changed. Raises
    MiniloraError for a weight that is missing or not finite, for a product that overflows, and for
    adapters whose shapes show that their bases differ.
    """
    check_weights(len(parts), weights)
    n_layer = len(parts[0][0]["blocks"])
    paths = lora_paths(n_layer, mlp=("gate", *MLP_TARGETS))  # of any base
    stacks: dict[str, tuple[list[Array], list[Array]]] = {path: ([], []) for path in paths}
    for number, ((lora, config), weight) in enumerate(zip(parts, weights, strict=True), start=1):
        if len(lora["blocks"]) != n_layer:
            raise MiniloraError(
                f"adapter {number} is for a base of {len(lora['blocks'])} blocks, "
                f"the first for one of {n_layer}; expected adapters of the same base"
            )
        for path, ab in adapters(lora).items():
            As, Bs = stacks[path]
            _check_fit(f"adapter {number}, {path}", ab, config.rank_of(path), As, Bs)
            As.append(ab["A"])
            Bs.append(_scaled(ab["B"], weight * config.scale_of(path), f"adapter {number}, {path}"))

    flat: dict[str, Array] = {}
    ranks: dict[str, int] = {}
    for path, (As, Bs) in stacks.items():
        if As:
            xp = namespace(As[0])
            flat[f"{path}.A"] = xp.concatenate(As, axis=1)  # (MIX.2) A = [A₁ … Aₙ]
            flat[f"{path}.B"] = xp.concatenate(Bs, axis=0)  # (MIX.3) B = [w₁ s₁ B₁; …; wₙ sₙ Bₙ]
            ranks[re.escape(path)] = len(flat[f"{path}.B"])
    return adapter_tree(flat, n_layer), _unscaled(ranks)


def check_weights(adapters: int, weights: Sequence[float]) -> None:
    """Raise MiniloraError unless there are adapters and a finite weight for each."""
    if adapters == 0:
        raise MiniloraError("there are no adapters to mix; expected at least one")
    if adapters != len(weights):
        raise MiniloraError(
            f"adapters: {adapters}, weights: {len(weights)}; expected a weight for each adapter"
        )
    for weight in weights:
        if not math.isfinite(weight):
            raise MiniloraError(f"weight {weight} is not a finite number")


def _check_fit(
    name: str, ab: dict[str, Array], rank: int, As: list[Array], Bs: list[Array]
) -> None:
    """Raise MiniloraError unless A and B are of this rank and fit the earlier ones' weight."""
    A, B = ab["A"], ab["B"]
    if A.shape[1] != rank or B.shape[0] != rank:
        raise MiniloraError(
            f"{name}: A {A.shape} and B {B.shape} are not of rank {rank}, that of its configuration"
        )
    if As and (A.shape[0], B.shape[1]) != (As[0].shape[0], Bs[0].shape[1]):
        raise MiniloraError(
            f"{name} is for a weight of {A.shape[0]} × {B.shape[1]}, an earlier one for a weight "
            f"of {As[0].shape[0]} × {Bs[0].shape[1]}; expected adapters of the same base"
        )


def _scaled(B: Array, factor: float, name: str) -> Array:
    """B times a factor; MiniloraError if the product overflows."""
    with np.errstate(over="ignore"):
        scaled: Array = B * factor
    if not namespace(B).isfinite(scaled).all():
        raise MiniloraError(f"{name}: B times {factor:g}, its weight and scale, is not finite")
    return scaled


def _unscaled(ranks: dict[str, int]) -> LoRAConfig:
    """A configuration with these ranks, by escaped path, and α = R, so that s = 1."""
    rank = max(ranks.values(), default=1)
    others = {path: r for path, r in ranks.items() if r != rank}
    return LoRAConfig(
        rank=rank,
        alpha=float(rank),
        targets=tuple(ranks),
        rank_pattern=others,
        alpha_pattern={path: float(r) for path, r in others.items()},
    )
