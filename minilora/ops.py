"""The transformer's mathematics: every operation as a forward/backward pair.

    y, cache      = f_forward(x, *parameters, *, constants)
    dx, *dparams  = f_backward(dy, cache)

Positional arguments are differentiable and get one gradient each, in the same order; keyword-only
arguments are constants. For a loss L, `dx` is dL/dx and has the shape and dtype of `x`. Rows are
examples and weights are stored (in, out), so a linear map reads y = x W + b. [TAGS] name equations
of docs/derivations.

A forward pass is its equation, and its cache names all that its gradients are made of. A backward
pass computes each gradient from what it finds there: where a field is None, so is the gradient.
What is not kept, because a weight is frozen or an input is recomputed, is decided in `keep`.

Shapes: B batch, T time, C width, H heads, K width of a head, F inner width, V vocabulary, R rank,
I inputs and O outputs of a linear map; `...` stands for any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from minilora.backend import Array, namespace
from minilora.tiles import entrywise

Gradient: TypeAlias = Array | None  # None where what it is made of is None in the cache
Attend: TypeAlias = Callable[..., tuple[Array, Any]]  # called as `attention_forward` is


def rows(x: Array) -> Array:
    """The matrix whose rows are the vectors along the last axis."""
    return x.reshape(-1, x.shape[-1])


def dots(x: Array, y: Array) -> Array:
    """The inner products of two arrays' vectors along the last axis.  (..., C) -> (..., 1)"""
    return namespace(x).einsum("...c,...c->...", x, y)[..., None]


def sums(x: Array) -> Array:
    """The sums of an array's vectors along the last axis.  (..., C) -> (..., 1)"""
    return namespace(x).einsum("...c->...", x)[..., None]


# --- linear ------------------------------------------------------------------------------------


class MatmulCache(NamedTuple):
    x: Array | None  # for dW
    w: Array | None  # for dx


def matmul_forward(x: Array, w: Array) -> tuple[Array, MatmulCache]:
    """The linear map without a bias, y = x W.  (..., I), (I, O) -> (..., O)"""
    y = rows(x) @ w
    return y.reshape(*x.shape[:-1], w.shape[1]), MatmulCache(x, w)


def matmul_backward(dy: Array, cache: MatmulCache) -> tuple[Gradient, Gradient]:
    """dx, dw of `matmul_forward`."""
    x, w = cache
    dx = dw = None
    if w is not None:
        dx = (rows(dy) @ w.T).reshape(*dy.shape[:-1], w.shape[0])  # [LIN.2] dx = dy Wᵀ
    if x is not None:
        dw = rows(x).T @ rows(dy)  # [LIN.3] dW = xᵀ dy
    return dx, dw


class LinearCache(NamedTuple):
    x: Array | None  # for dW and db
    w: Array | None  # for dx


def linear_forward(x: Array, w: Array, b: Array) -> tuple[Array, LinearCache]:
    """The affine map y = x W + b [LIN.1].  (..., I), (I, O), (O,) -> (..., O)"""
    y, _ = matmul_forward(x, w)
    y += b  # [LIN.1] y = x W + b
    return y, LinearCache(x, w)


def linear_backward(dy: Array, cache: LinearCache) -> tuple[Gradient, Gradient, Gradient]:
    """dx, dw, db of `linear_forward`."""
    dx, dw = matmul_backward(dy, MatmulCache(*cache))
    db = None if cache.x is None else rows(dy).sum(axis=0)  # [LIN.4] db = Σ_rows dy
    return dx, dw, db


# --- embeddings --------------------------------------------------------------------------------


class EmbeddingCache(NamedTuple):
    indices: Array
    table: Array | None  # for the shape of dtable


def embedding_forward(table: Array, *, index: Array) -> tuple[Array, EmbeddingCache]:
    """Rows of a table, y = table[index] [EMB.1].  (V, C), (...) -> (..., C)

    Every index must lie in [0, V), which a GPU does not check.
    """
    return table[index], EmbeddingCache(index, table)  # [EMB.1]


def embedding_backward(dy: Array, cache: EmbeddingCache) -> tuple[Gradient]:
    """(dtable,) of `embedding_forward`: each row gathers the gradients of all its uses."""
    indices, table = cache
    if table is None:
        return (None,)
    dtable = namespace(dy).zeros_like(table)
    namespace(dy).add.at(dtable, indices.reshape(-1), rows(dy))  # [EMB.2] dtable_v = Σ_{index=v} dy
    return (dtable,)


class PositionCache(NamedTuple):
    wpe: Array | None  # for the shape of dwpe
    offset: int


def position_forward(x: Array, wpe: Array, *, offset: int = 0) -> tuple[Array, PositionCache]:
    """Learned positions, x_t + wpe_{offset+t} [POS.1].  (B, T, C), (n_positions, C) -> (B, T, C)"""
    return x + wpe[offset : offset + x.shape[-2]], PositionCache(wpe, offset)  # [POS.1]


def position_backward(dy: Array, cache: PositionCache) -> tuple[Array, Gradient]:
    """dx, dwpe of `position_forward`; dx is dy itself."""
    wpe, offset = cache
    if wpe is None:
        return dy, None
    dwpe = namespace(dy).zeros_like(wpe)
    T = dy.shape[-2]
    dwpe[offset : offset + T] = dy.reshape(-1, T, dy.shape[-1]).sum(axis=0)  # [POS.2] Σ_B dy
    return dy, dwpe


# --- layer norm: normalise, then scale and shift -----------------------------------------------


class NormaliseCache(NamedTuple):
    xhat: Array  # rather than x: every gradient is made of it
    rstd: Array  # 1/√(σ² + ε)


def normalise_forward(x: Array, *, eps: float = 1e-5) -> tuple[Array, NormaliseCache]:
    """x̂ = (x - μ) / √(σ² + ε) along the last axis [LN.1-3] (Ba et al. 2016, eq. 4).

    (..., C) -> (..., C). μ and σ² are the mean and the (biased) variance of each row.
    """
    xhat = x - sums(x) / x.shape[-1]  # [LN.1] x - μ
    variance = dots(xhat, xhat) / x.shape[-1]  # [LN.2] σ² = mean (x - μ)²
    rstd = 1.0 / namespace(x).sqrt(variance + eps)
    xhat *= rstd  # [LN.3] x̂ = (x - μ) / √(σ² + ε)
    return xhat, NormaliseCache(xhat, rstd)


def normalise_backward(dxhat: Array, cache: NormaliseCache) -> tuple[Array]:
    """(dx,): dx̂ less its mean and less its part along x̂, what the two normalisations take out."""
    xhat, rstd = cache
    dx = dxhat - sums(dxhat) / dxhat.shape[-1]
    dx -= xhat * (dots(dxhat, xhat) / dxhat.shape[-1])
    dx *= rstd  # [LN.6] dx = (dx̂ - mean(dx̂) - x̂ mean(dx̂ ∘ x̂)) / √(σ² + ε)
    return (dx,)


class AffineCache(NamedTuple):
    x: Array | None  # for dw and db
    w: Array
    b: Array  # for `LayerNormCache.output`


def affine_forward(x: Array, w: Array, b: Array) -> tuple[Array, AffineCache]:
    """y = w ∘ x + b [LN.4].  (..., C), (C,), (C,) -> (..., C)"""
    y = x * w
    y += b  # [LN.4] y = w ∘ x̂ + b
    return y, AffineCache(x, w, b)


def affine_backward(dy: Array, cache: AffineCache) -> tuple[Array, Gradient, Gradient]:
    """dx, dw, db of `affine_forward`."""
    x, w, _ = cache
    dx = dy * w  # [LN.5] dx̂ = dy ∘ w
    if x is None:
        return dx, None, None
    dw = rows(dy * x).sum(axis=0)  # [LN.7] dw = Σ_rows dy ∘ x̂
    db = rows(dy).sum(axis=0)  # [LN.8] db = Σ_rows dy
    return dx, dw, db


class LayerNormCache(NamedTuple):
    normalise: NormaliseCache
    affine: AffineCache

    def output(self) -> Array:
        """y of `layer_norm_forward`, recomputed."""
        return affine_forward(self.normalise.xhat, self.affine.w, self.affine.b)[0]


def layer_norm_forward(
    x: Array, w: Array, b: Array, *, eps: float = 1e-5
) -> tuple[Array, LayerNormCache]:
    """y = w ∘ x̂ + b: `affine_forward` of `normalise_forward`.  (..., C), (C,), (C,) -> (..., C)"""
    xhat, normalise = normalise_forward(x, eps=eps)
    y, affine = affine_forward(xhat, w, b)
    return y, LayerNormCache(normalise, affine)


def layer_norm_backward(dy: Array, cache: LayerNormCache) -> tuple[Array, Gradient, Gradient]:
    """dx, dw, db of `layer_norm_forward`."""
    dxhat, dw, db = affine_backward(dy, cache.affine)
    (dx,) = normalise_backward(dxhat, cache.normalise)
    return dx, dw, db


# --- GELU --------------------------------------------------------------------------------------

GELU_SCALE = math.sqrt(2.0 / math.pi)  # κ
GELU_CUBIC = 0.044715  # a


class GELUCache(NamedTuple):
    x: Array  # tanh u is quick to recompute

    def output(self) -> Array:
        """y of `gelu_forward`, recomputed."""
        return gelu(self.x, scale=GELU_SCALE, cubic=GELU_CUBIC)


def gelu_forward(x: Array) -> tuple[Array, GELUCache]:
    """y = ½ x (1 + tanh u), u = κ (x + a x³) [GELU.1-2] (Hendrycks & Gimpel 2016, §2).

    (...) -> (...). The tanh form, as GPT-2 has it: κ = √(2/π), a = 0.044715.
    """
    return gelu(x, scale=GELU_SCALE, cubic=GELU_CUBIC), GELUCache(x)


def gelu_backward(dy: Array, cache: GELUCache) -> tuple[Array]:
    """(dx,) of `gelu_forward`."""
    return (gelu_gradient(dy, cache.x, scale=GELU_SCALE, cubic=GELU_CUBIC),)


@entrywise
def gelu(x: Array, *, scale: float, cubic: float) -> Array:
    """GELU of every entry.  (...) -> (...)"""
    u = scale * (x + cubic * x * x * x)  # [GELU.1] u = κ (x + a x³)
    return 0.5 * x * (1.0 + namespace(x).tanh(u))  # [GELU.2] y = ½ x (1 + tanh u)


@entrywise
def gelu_gradient(dy: Array, x: Array, *, scale: float, cubic: float) -> Array:
    """dy times GELU's slope at x.  (...), (...) -> (...)"""
    t = namespace(x).tanh(scale * (x + cubic * x * x * x))
    du = scale * (1.0 + 3.0 * cubic * x * x)  # [GELU.3] du/dx = κ (1 + 3 a x²)
    slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * du  # [GELU.4] dy/dx, by the product rule
    return dy * slope  # [GELU.5] dx = dy ∘ dy/dx


# --- softmax and causal attention --------------------------------------------------------------


class SoftmaxCache(NamedTuple):
    y: Array


def softmax_forward(x: Array) -> tuple[Array, SoftmaxCache]:
    """y = exp(x) / Σ exp(x) along the last axis [SM.1].  (..., T) -> (..., T)

    The row's maximum is subtracted first, which changes nothing but keeps exp finite.
    """
    y = x - x.max(axis=-1, keepdims=True)
    namespace(x).exp(y, out=y)
    y /= sums(y)  # [SM.1] y = exp(x - max x) / Σ exp(x - max x)
    return y, SoftmaxCache(y)


def softmax_backward(dy: Array, cache: SoftmaxCache) -> tuple[Array]:
    """(dx,) of `softmax_forward`."""
    (y,) = cache
    dx = dy - dots(dy, y)
    dx *= y  # [SM.2] dx = y ∘ (dy - Σ dy ∘ y)
    return (dx,)


def attention_weights(q: Array, k: Array, *, mask: Array) -> Array:
    """P = softmax(q kᵀ / √K + mask), for the last n of m times [ATT.1-2].

    (..., n, K), (..., m, K), (n or more, n or more) -> (..., n, m). The mask is among the last n.
    """
    n, K = q.shape[-2:]
    S = (q * (1.0 / math.sqrt(K))) @ k.swapaxes(-1, -2)  # [ATT.1] S = q kᵀ / √K
    S[..., -n:] += mask[:n, :n]
    return softmax_forward(S)[0]  # [ATT.2] P = softmax(S + causal mask)


class AttendCache(NamedTuple):
    q: Array
    k: Array
    v: Array
    P: Array


def attend_forward(q: Array, k: Array, v: Array, *, mask: Array) -> tuple[Array, AttendCache]:
    """y = softmax(q kᵀ / √K + mask) v [ATT.1-3] (Vaswani et al. 2017, eq. 1), in every head.

    (..., n, K), (..., m, K), (..., m, K) -> (..., n, K): y_t is the average of v_s, weighted by P.
    """
    P = attention_weights(q, k, mask=mask)
    return P @ v, AttendCache(q, k, v, P)  # [ATT.3] y = P v


def attend_backward(dy: Array, cache: AttendCache) -> tuple[Array, Array, Array]:
    """dq, dk, dv of `attend_forward`. Where P is 0 by the mask, so is dS."""
    q, k, v, P = cache
    dv = P.swapaxes(-1, -2) @ dy  # [ATT.4] dv = Pᵀ dy
    dP = dy @ v.swapaxes(-1, -2)  # [ATT.5] dP = dy vᵀ
    (dS,) = softmax_backward(dP, SoftmaxCache(P))  # [ATT.6] dS = P ∘ (dP - Σ dP ∘ P)
    dS *= 1.0 / math.sqrt(q.shape[-1])
    dq = dS @ k  # [ATT.7] dq = dS k / √K
    dk = dS.swapaxes(-1, -2) @ q  # [ATT.8] dk = dSᵀ q / √K
    return dq, dk, dv


QUERY_TILE = 64  # queries at a time; keys after a tile's last query are masked, so never computed


def query_tiles(T: int, tile: int) -> Iterator[tuple[slice, slice]]:
    """All times t < T, a tile at a time, each with all the times s that they may see."""
    for start in range(0, T, tile):
        stop = min(start + tile, T)
        yield slice(start, stop), slice(0, stop)


def causal_mask(n: int, like: Array) -> Array:
    """(n, n): row t is 0 where s ≤ t and -∞ where s > t."""
    xp = namespace(like)
    return xp.triu(xp.full((n, n), -math.inf, dtype=like.dtype), 1)


def split_heads(qkv: Array, heads: int, kv_heads: int | None = None) -> tuple[Array, Array, Array]:
    """Views q (B, H, T, K) and k, v (B, G, T, K) of the fused projections (B, T, (H + 2G) K)."""
    B, T, _ = qkv.shape
    G = kv_heads or heads
    x = qkv.reshape(B, T, heads + 2 * G, -1).transpose(0, 2, 1, 3)
    return x[:, :heads], x[:, heads : heads + G], x[:, heads + G :]


def groups(q: Array, k: Array) -> list[slice]:
    """Of H heads of q, each time as many as k has, of other groups: every (H / G)-th."""
    M, rest = divmod(q.shape[1], k.shape[1])
    if rest:
        raise ValueError(f"{k.shape[1]} heads of k and v cannot share {q.shape[1]} of q equally")
    return [slice(m, None, M) for m in range(M)]


def merged_heads(q: Array) -> tuple[Array, Array]:
    """A new array (B, T, C) and its view (B, H, T, K) of q's shape, to be filled head by head."""
    B, H, T, K = q.shape
    merged = namespace(q).empty((B, T, H * K), dtype=q.dtype)
    return merged, merged.reshape(B, T, H, K).transpose(0, 2, 1, 3)


class AttentionCache(NamedTuple):
    q: Array  # (B, H, T, K); P, which grows with T², is recomputed
    k: Array  # (B, G, T, K), like v
    v: Array


def attention_forward(
    qkv: Array, *, heads: int, kv_heads: int | None = None
) -> tuple[Array, AttentionCache]:
    """Causal multi-head attention of fused projections: `attend_forward` in each head.

    (B, T, (H + 2G) K) -> (B, T, H K). Each of the G = `kv_heads` heads of k and v serves a group of
    H / G heads of q (Ainslie et al. 2023); None: as many as `heads`. A tile of queries at a time,
    on a GPU all. Raises ValueError unless G divides H and the heads divide the width.
    """
    q, k, v = split_heads(qkv, heads, kv_heads)
    T = q.shape[-2]
    tile = min(QUERY_TILE, T) if namespace(qkv) is np else T
    mask = causal_mask(tile, qkv)
    y, y_heads = merged_heads(q)
    for h in groups(q, k):
        for t, s in query_tiles(T, tile):
            y_heads[:, h, t], _ = attend_forward(q[:, h, t], k[:, :, s], v[:, :, s], mask=mask)
    return y, AttentionCache(q, k, v)


def attention_backward(dy: Array, cache: AttentionCache) -> tuple[Array]:
    """(dqkv,) of `attention_forward`: each tile adds to the gradients of the keys it sees."""
    q, k, v = cache
    B, H, T, K = q.shape
    G = k.shape[1]
    tile = min(QUERY_TILE, T) if namespace(dy) is np else T
    mask = causal_mask(tile, dy)
    dy = dy.reshape(B, T, H, K).transpose(0, 2, 1, 3)
    dqkv = namespace(dy).zeros((B, T, (H + 2 * G) * K), dtype=dy.dtype)
    dq, dk, dv = split_heads(dqkv, H, G)
    for h in groups(q, k):
        for t, s in query_tiles(T, tile):
            P = attention_weights(q[:, h, t], k[:, :, s], mask=mask)
            attend = AttendCache(q[:, h, t], k[:, :, s], v[:, :, s], P)
            dq[:, h, t], dk_tile, dv_tile = attend_backward(dy[:, h, t], attend)
            dk[:, :, s] += dk_tile
            dv[:, :, s] += dv_tile
    return (dqkv,)


# --- the vocabulary product ---------------------------------------------------------------------


class HeadCache(NamedTuple):
    x: Array | None  # for dtable
    table: Array


def head_forward(x: Array, table: Array) -> tuple[Array, HeadCache]:
    """Logits against the embedding table, y = x wteᵀ [HEAD.1] (Press & Wolf 2017, §3).

    (..., C), (V, C) -> (..., V)
    """
    y = rows(x) @ table.T  # [HEAD.1] y = x wteᵀ
    return y.reshape(*x.shape[:-1], table.shape[0]), HeadCache(x, table)


def head_backward(dy: Array, cache: HeadCache) -> tuple[Array, Gradient]:
    """dx, dtable of `head_forward`."""
    x, table = cache
    dx = (rows(dy) @ table).reshape(*dy.shape[:-1], table.shape[1])  # [HEAD.2] dx = dy wte
    if x is None:
        return dx, None
    return dx, rows(dy).T @ rows(x)  # [HEAD.3] dwte = dyᵀ x


# --- dropout -----------------------------------------------------------------------------------


class DropoutCache(NamedTuple):
    mask: Array | None


def dropout_forward(x: Array, *, mask: Array | None) -> tuple[Array, DropoutCache]:
    """y = x ∘ mask [DROP.1] (Srivastava et al. 2014, §4, scaled in training).  (...) -> (...)

    The mask is drawn outside (see `adapters`): the pair is deterministic. None drops nothing.
    """
    return x if mask is None else x * mask, DropoutCache(mask)  # [DROP.1]


def dropout_backward(dy: Array, cache: DropoutCache) -> tuple[Array]:
    """(dx,) of `dropout_forward`."""
    (mask,) = cache
    return (dy if mask is None else dy * mask,)  # [DROP.2] dx = dy ∘ mask
