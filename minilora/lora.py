"""Low-rank adaptation (Hu et al. 2021): the pairs, the adapted linear map, and merging.

A frozen weight W (in, out) gains an update of rank R, W + s A B, of which only A (in, R) and
B (R, out) are trained. The paper writes W, B, A as the transposes of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from minilora import ops
from minilora.adapters import Adapter, LoRAConfig, adapters, qkv_widths, weight_of
from minilora.backend import Array, namespace
from minilora.errors import MiniloraError
from minilora.ops import Gradient, rows
from minilora.tree import Tree, flatten, unflatten

# --- the pair ----------------------------------------------------------------------------------


class LoRACache(NamedTuple):
    x: Array | None  # for dA
    h: Array | None  # for dB: s x A, (N, R)
    A: Array | None  # for dx
    B: Array
    scale: float


def lora_forward(x: Array, A: Array, B: Array, *, scale: float) -> tuple[Array, LoRACache]:
    """The low-rank update y = s x A B [LORA.1-2] (Hu et al. 2021, eq. 3).

    (..., I), (I, R), (R, O) -> (..., O)
    """
    h = rows(x) @ A
    h *= scale  # [LORA.1] h = s x A
    y = h @ B  # [LORA.2] y = h B
    return y.reshape(*x.shape[:-1], B.shape[1]), LoRACache(x, h, A, B, scale)


def lora_backward(dy: Array, cache: LoRACache) -> tuple[Gradient, Gradient, Gradient]:
    """dx, dA, dB of `lora_forward`: with dW = xᵀ dy, they are s dW Bᵀ and s Aᵀ dW, never via dW."""
    x, h, A, B, scale = cache
    dx = dA = dB = None
    dxA = rows(dy) @ B.T
    dxA *= scale  # [LORA.4] d(xA) = s dy Bᵀ
    if h is not None:
        dB = h.T @ rows(dy)  # [LORA.3] dB = hᵀ dy
    if x is not None:
        dA = rows(x).T @ dxA  # [LORA.5] dA = xᵀ d(xA)
    if A is not None:
        dx = (dxA @ A.T).reshape(*dy.shape[:-1], A.shape[0])  # [LORA.6] dx = d(xA) Aᵀ
    return dx, dA, dB


class LoRAEmbeddingCache(NamedTuple):
    indices: Array
    h: Array | None  # for dB: s A[index]
    A: Array | None  # for the shape of dA
    B: Array
    scale: float


def lora_embedding_forward(
    A: Array, B: Array, *, index: Array, scale: float
) -> tuple[Array, LoRAEmbeddingCache]:
    """The update of an embedding table, y = s A[index] B [LORA.7].  (V, R), (R, C) -> (..., C)

    The LoRA pair for the one-hot rows that an embedding multiplies.
    """
    h = A[index] * scale
    return h @ B, LoRAEmbeddingCache(index, h, A, B, scale)  # [LORA.7] y = s A[index] B


def lora_embedding_backward(dy: Array, cache: LoRAEmbeddingCache) -> tuple[Gradient, Gradient]:
    """dA, dB of `lora_embedding_forward`."""
    indices, h, A, B, scale = cache
    dA = dB = None
    if h is not None:
        dB = rows(h).T @ rows(dy)  # [LORA.8] dB = hᵀ dy
    if A is not None:
        drows = scale * (rows(dy) @ B.T)
        dA = namespace(dy).zeros_like(A)
        namespace(dy).add.at(dA, indices.reshape(-1), drows)  # [LORA.9] dA_v = Σ_{index=v} s dy Bᵀ
    return dA, dB


# --- a linear map with its adapters ------------------------------------------------------------


class AdapterCache(NamedTuple):
    dropout: ops.DropoutCache
    lora: LoRACache
    columns: slice


class AdaptedLinearCache(NamedTuple):
    linear: ops.MatmulCache | ops.LinearCache
    adapters: dict[str, AdapterCache]


def adapted_linear_forward(
    x: Array, w: Array, b: Array | None = None, *, adapters: Mapping[str, Adapter]
) -> tuple[Array, AdaptedLinearCache]:
    """y = x W + b + Σ s (x ∘ mask) A B, each adapter on its own columns of y [ADAPT.1].

    (..., I), (I, O), (O,) or None -> (..., O)
    """
    y, linear = ops.matmul_forward(x, w) if b is None else ops.linear_forward(x, w, b)
    caches = {}
    for name, (A, B, scale, mask, columns) in adapters.items():
        x_kept, dropout = ops.dropout_forward(x, mask=mask)
        update, lora = lora_forward(x_kept, A, B, scale=scale)
        y[..., columns] += update  # [ADAPT.1] y = x W + b + Σ s x A B
        caches[name] = AdapterCache(dropout, lora, columns)
    return y, AdaptedLinearCache(linear, caches)


def adapted_linear_backward(
    dy: Array, cache: AdaptedLinearCache
) -> tuple[Any, Tree, dict[str, Tree]]:
    """dx, {"w": dw, "b": db}, {name: {"A": dA, "B": dB}}; "b" where there is a bias."""
    if isinstance(cache.linear, ops.MatmulCache):
        dx, dw = ops.matmul_backward(dy, cache.linear)
        dlinear = {"w": dw}
    else:
        dx, dw, db = ops.linear_backward(dy, cache.linear)
        dlinear = {"w": dw, "b": db}
    dadapters = {}
    for name, (dropout, lora, columns) in cache.adapters.items():
        dx_lora, dA, dB = lora_backward(dy[..., columns], lora)
        dadapters[name] = {"A": dA, "B": dB}
        if dx is not None and dx_lora is not None:
            (dx_lora,) = ops.dropout_backward(dx_lora, dropout)
            dx += dx_lora  # [ADAPT.2] dx = dy Wᵀ + Σ s (dy Bᵀ) Aᵀ
    return dx, dlinear, dadapters


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
    weights, widths = flatten(base), qkv_widths(base)
    merged: dict[str, Any] = dict(weights)
    for path, ab in adapters(lora).items():
        if path == "embedding" and "head" not in base:
            raise MiniloraError(
                "an adapter of the embedding cannot be merged: the tied head shares its table, "
                "which the adapter leaves as it is; use the adapter unmerged"
            )
        weight_path, columns = weight_of(path, *widths)
        if merged[weight_path] is weights[weight_path]:
            merged[weight_path] = weights[weight_path].copy()
        update = ab["A"] @ ab["B"]
        update *= sign * config.scale_of(path)
        merged[weight_path][:, columns] += update  # [LORA.10] W + s A B
    return unflatten(merged)
