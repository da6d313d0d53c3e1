"""The transformer's mathematics: every operation as a forward/backward pair.

    y, cache      = f_forward(x, *parameters, *, constants)
    dx, *dparams  = f_backward(dy, cache)

Positional arguments are differentiable and get one gradient each, in the same order; keyword-only
arguments are constants. For a loss L, `dx` is dL/dx and has the shape and dtype of `x`. Rows are
examples and weights are stored (in, out), so a linear map reads y = x W + b. The cache holds what
the backward pass needs and nothing else. A frozen parameter's gradient is None: neither it nor the
input that it alone would need is computed or kept. [TAGS] name equations of docs/derivations.

Shapes: B batch, T time, C width, H heads, K width of a head, F inner width, V vocabulary, R rank,
I inputs and O outputs of a linear map; `...` stands for any leading dimensions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from minilora.backend import Array, namespace

Cache: TypeAlias = Any
"""A tuple that only the backward pass of the same pair opens."""


def rows(x: Array) -> Array:
    """The matrix whose rows are the vectors along the last axis."""
    return x.reshape(-1, x.shape[-1])


# --- linear ------------------------------------------------------------------------------------


def linear_forward(x: Array, w: Array, b: Array, *, frozen: bool = False) -> tuple[Array, Cache]:
    """The affine map y = x W + b [LIN.1].  (..., I), (I, O), (O,) -> (..., O)

    Keeps W for dx, and x for dW unless W and b are frozen.
    """
    y = rows(x) @ w  # [LIN.1]
    y += b
    return y.reshape(*x.shape[:-1], w.shape[1]), (None if frozen else x, w)


def linear_backward(dy: Array, cache: Cache) -> tuple[Array, Array | None, Array | None]:
    """dx, dw, db of `linear_forward`; dw and db are None when frozen."""
    x, w = cache
    dx = (rows(dy) @ w.T).reshape(*dy.shape[:-1], w.shape[0])  # [LIN.2] dx = dy Wᵀ
    if x is None:
        return dx, None, None
    dw = rows(x).T @ rows(dy)  # [LIN.3] dW = xᵀ dy
    db = rows(dy).sum(axis=0)  # [LIN.4] db = Σ_rows dy
    return dx, dw, db


# --- embeddings --------------------------------------------------------------------------------


def embedding_forward(table: Array, *, index: Array) -> tuple[Array, Cache]:
    """Rows of a table, y = table[index] [EMB.1].  (V, C), (...) -> (..., C)

    Keeps the index, and the table for its shape. Every index must lie in [0, V), which a GPU does
    not check.
    """
    return table[index], (index, table)


def embedding_backward(dy: Array, cache: Cache) -> tuple[Array]:
    """(dtable,) of `embedding_forward`: each row gathers the gradients of all its uses."""
    index, table = cache
    dtable = namespace(dy).zeros_like(table)
    namespace(dy).add.at(dtable, index.reshape(-1), rows(dy))  # [EMB.2] dtable_v = Σ_{index=v} dy
    return (dtable,)


def position_forward(
    x: Array, wpe: Array, *, offset: int = 0, frozen: bool = False
) -> tuple[Array, Cache]:
    """Learned positions, y_t = x_t + wpe_{offset+t} [POS.1].  (B, T, C), (P, C) -> (B, T, C)

    Keeps only the table, for its shape.
    """
    T = x.shape[-2]
    return x + wpe[offset : offset + T], (None if frozen else wpe, offset)


def position_backward(dy: Array, cache: Cache) -> tuple[Array, Array | None]:
    """dx, dwpe of `position_forward`; dwpe is None when frozen."""
    wpe, offset = cache
    if wpe is None:
        return dy, None
    dwpe = namespace(dy).zeros_like(wpe)
    T = dy.shape[-2]
    dwpe[offset : offset + T] = dy.reshape(-1, T, dy.shape[-1]).sum(axis=0)  # [POS.2] Σ_B dy
    return dy, dwpe


# --- layer norm --------------------------------------------------------------------------------


def layer_norm_forward(
    x: Array, w: Array, b: Array, *, eps: float = 1e-5, frozen: bool = False
) -> tuple[Array, Cache]:
    """y = w ∘ x̂ + b, x̂ = (x - μ) / √(σ² + ε) along the last axis [LN.1-4] (Ba et al. 2016, eq. 4).

    (..., C), (C,), (C,) -> (..., C). μ and σ² are the mean and the (biased) variance of each row.
    Keeps x̂ and 1/√(σ² + ε) rather than x: they are what every gradient is made of.
    """
    xhat = x - x.mean(axis=-1, keepdims=True)  # [LN.1] x - μ
    variance = (xhat * xhat).mean(axis=-1, keepdims=True)  # [LN.2] σ² = mean (x - μ)²
    rstd = 1.0 / namespace(x).sqrt(variance + eps)
    xhat *= rstd  # [LN.3] x̂ = (x - μ) / √(σ² + ε)
    y = xhat * w  # [LN.4] y = w ∘ x̂ + b
    y += b
    return y, (xhat, rstd, w, frozen)


def layer_norm_backward(dy: Array, cache: Cache) -> tuple[Array, Array | None, Array | None]:
    """dx, dw, db of `layer_norm_forward`; dw and db are None when frozen.

    dx is dx̂ less its mean and less its part along x̂: what the two normalisations take out.
    """
    xhat, rstd, w, frozen = cache
    dx = dy * w  # [LN.5] dx̂ = dy ∘ w
    along = (dx * xhat).mean(axis=-1, keepdims=True)
    dx -= dx.mean(axis=-1, keepdims=True)
    dx -= xhat * along
    dx *= rstd  # [LN.6] dx = (dx̂ - mean(dx̂) - x̂ mean(dx̂ ∘ x̂)) / √(σ² + ε)
    if frozen:
        return dx, None, None
    dw = rows(dy * xhat).sum(axis=0)  # [LN.7] dw = Σ_rows dy ∘ x̂
    db = rows(dy).sum(axis=0)  # [LN.8] db = Σ_rows dy
    return dx, dw, db


# --- GELU --------------------------------------------------------------------------------------

GELU_SCALE = math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715


def gelu_forward(x: Array) -> tuple[Array, Cache]:
    """y = ½ x (1 + tanh u), u = √(2/π) (x + 0.044715 x³) [GELU.1-2] (Hendrycks & Gimpel 2016, §2).

    (...) -> (...). The tanh form, as GPT-2 has it. Keeps x alone: tanh u is quick to compute again.
    """
    y = _gelu_tanh(x, x * x)
    y += 1.0
    y *= x
    y *= 0.5  # [GELU.2] y = ½ x (1 + tanh u)
    return y, (x,)


def gelu_backward(dy: Array, cache: Cache) -> tuple[Array]:
    """(dx,) of `gelu_forward`."""
    (x,) = cache
    square = x * x
    t = _gelu_tanh(x, square)
    slope = 1.0 - t * t  # tanh' u
    slope *= x
    square *= 3.0 * GELU_CUBIC * GELU_SCALE
    square += GELU_SCALE  # [GELU.3] du/dx = √(2/π) (1 + 3 · 0.044715 x²)
    slope *= square
    slope += t
    slope += 1.0
    slope *= 0.5  # [GELU.4] dy/dx = ½ (1 + tanh u) + ½ x (1 - tanh² u) du/dx
    slope *= dy  # [GELU.5] dx = dy ∘ dy/dx
    return (slope,)


def _gelu_tanh(x: Array, square: Array) -> Array:
    """tanh u, given x and x²."""
    u = square * (GELU_CUBIC * GELU_SCALE)
    u += GELU_SCALE
    u *= x  # [GELU.1] u = √(2/π) (x + 0.044715 x³)
    return namespace(x).tanh(u, out=u)


# --- softmax and causal attention --------------------------------------------------------------


def softmax_forward(x: Array) -> tuple[Array, Cache]:
    """y = exp(x) / Σ exp(x) along the last axis [SM.1].  (..., T) -> (..., T)

    The row's maximum is subtracted first, which changes nothing but keeps exp finite. Keeps y.
    """
    xp = namespace(x)
    y = x - x.max(axis=-1, keepdims=True)
    xp.exp(y, out=y)
    y /= y.sum(axis=-1, keepdims=True)  # [SM.1] y = exp(x - max x) / Σ exp(x - max x)
    return y, (y,)


def softmax_backward(dy: Array, cache: Cache) -> tuple[Array]:
    """(dx,) of `softmax_forward`."""
    (y,) = cache
    dx = dy * y
    dx -= y * dx.sum(axis=-1, keepdims=True)  # [SM.2] dx = y ∘ (dy - Σ dy ∘ y)
    return (dx,)


class AttentionCache(NamedTuple):
    """What attention keeps: views (B, H, T, K) of the projections, and the weights (B, H, T, T)."""

    q: Array
    k: Array
    v: Array
    softmax: Cache


def split_heads(qkv: Array, heads: int) -> tuple[Array, Array, Array]:
    """Views q, k, v (B, H, T, K) of the fused projections (B, T, 3C); C = H K."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.reshape(B, T, 3, heads, C3 // (3 * heads)).transpose(2, 0, 3, 1, 4)
    return q, k, v


def merged_heads(like: Array, heads: int) -> tuple[Array, Array]:
    """A new array (B, T, C) and its view (B, H, T, K), to be filled head by head."""
    B, T, C = like.shape
    merged = namespace(like).empty((B, T, C), dtype=like.dtype)
    return merged, merged.reshape(B, T, heads, C // heads).transpose(0, 2, 1, 3)


def attention_forward(qkv: Array, *, heads: int) -> tuple[Array, Cache]:
    """Causal multi-head attention of fused projections [ATT.1-3] (Vaswani et al. 2017, eq. 1).

    (B, T, 3C) -> (B, T, C): in each head, y_t is the average of v_s over s ≤ t, weighted by
    softmax(q_t k_sᵀ / √K). Keeps q, k, v and the weights. Raises ValueError unless H divides C.
    """
    xp = namespace(qkv)
    q, k, v = split_heads(qkv, heads)
    T, K = q.shape[-2:]
    scores = q @ k.swapaxes(-1, -2)
    scores *= 1.0 / math.sqrt(K)  # [ATT.1] S = q kᵀ / √K
    scores += xp.triu(xp.full((T, T), -math.inf, dtype=qkv.dtype), 1)  # no t looks at s > t
    att, softmax_cache = softmax_forward(scores)  # [ATT.2] P = softmax(S + causal mask)
    y, y_heads = merged_heads(qkv[..., : heads * K], heads)
    xp.matmul(att, v, out=y_heads)  # [ATT.3] y = P v
    return y, AttentionCache(q, k, v, softmax_cache)


def attention_backward(dy: Array, cache: Cache) -> tuple[Array]:
    """(dqkv,) of `attention_forward`. Where P is 0 by the mask, so is dS."""
    q, k, v, softmax_cache = cache
    (att,) = softmax_cache
    B, heads, T, K = q.shape
    xp = namespace(dy)
    dy_heads = dy.reshape(B, T, heads, K).transpose(0, 2, 1, 3)
    dqkv = xp.empty((B, T, 3 * heads * K), dtype=dy.dtype)
    dq, dk, dv = split_heads(dqkv, heads)
    xp.matmul(att.swapaxes(-1, -2), dy_heads, out=dv)  # [ATT.4] dv = Pᵀ dy
    datt = dy_heads @ v.swapaxes(-1, -2)  # [ATT.5] dP = dy vᵀ
    (dscores,) = softmax_backward(datt, softmax_cache)  # [ATT.6] dS = P ∘ (dP - Σ dP ∘ P)
    dscores *= 1.0 / math.sqrt(K)
    xp.matmul(dscores, k, out=dq)  # [ATT.7] dq = dS k / √K
    xp.matmul(dscores.swapaxes(-1, -2), q, out=dk)  # [ATT.8] dk = dSᵀ q / √K
    return (dqkv,)


# --- residual ----------------------------------------------------------------------------------


def residual_forward(x: Array, branch: Array) -> tuple[Array, Cache]:
    """y = x + branch [RES.1] (He et al. 2015, eq. 1).  (...), (...) -> (...)    Keeps nothing."""
    return x + branch, ()


def residual_backward(dy: Array, cache: Cache) -> tuple[Array, Array]:
    """dx, dbranch of `residual_forward`: the same array twice, so neither may be changed."""
    () = cache
    return dy, dy  # [RES.2] dx = dbranch = dy


# --- the tied vocabulary product and the loss --------------------------------------------------


def head_forward(x: Array, wte: Array, *, frozen: bool = False) -> tuple[Array, Cache]:
    """Logits against the embedding table, y = x wteᵀ [HEAD.1] (Press & Wolf 2017, §3).

    (..., C), (V, C) -> (..., V). Keeps wte, and x unless frozen.
    """
    y = rows(x) @ wte.T  # [HEAD.1]
    return y.reshape(*x.shape[:-1], wte.shape[0]), (None if frozen else x, wte)


def head_backward(dy: Array, cache: Cache) -> tuple[Array, Array | None]:
    """dx, dwte of `head_forward`; dwte is None when frozen."""
    x, wte = cache
    dx = (rows(dy) @ wte).reshape(*dy.shape[:-1], wte.shape[1])  # [HEAD.2] dx = dy wte
    if x is None:
        return dx, None
    return dx, rows(dy).T @ rows(x)  # [HEAD.3] dwte = dyᵀ x


def cross_entropy_forward(
    logits: Array, *, targets: Array, ignore_index: int = -100, count: int | None = None
) -> tuple[Array, Cache]:
    """Mean negative log-likelihood in nats, Σ (log Σ exp z - z_target) / N [CE.1-2].

    (..., V), (...) -> (). N counts the targets that are not `ignore_index`, unless `count` gives it
    (a shard of a batch divides by the whole batch's). No target counted: the loss is 0. Keeps the
    logits and each row's log Σ exp. Every counted target must lie in [0, V).
    """
    xp = namespace(logits)
    z, target = rows(logits), targets.reshape(-1)
    counted = target != ignore_index
    target = xp.where(counted, target, 0)
    counted = counted.astype(z.dtype)
    top = z.max(axis=-1, keepdims=True)
    lse = xp.log(xp.exp(z - top).sum(axis=-1, keepdims=True))
    lse += top  # [CE.1] log Σ exp z
    weight = counted / (float(count) if count is not None else xp.maximum(counted.sum(), 1.0))
    z_target = xp.take_along_axis(z, target[:, None], axis=-1)
    loss = ((lse - z_target)[:, 0] * weight).sum()  # [CE.2] Σ (log Σ exp z - z_target) / N
    return loss, (logits, lse, target, weight)


def cross_entropy_backward(dloss: Array | float, cache: Cache) -> tuple[Array]:
    """(dlogits,) of `cross_entropy_forward`; rows whose target is ignored get 0."""
    logits, lse, target, weight = cache
    xp = namespace(logits)
    dlogits = rows(logits) - lse
    xp.exp(dlogits, out=dlogits)  # p = softmax(z)
    dlogits[xp.arange(target.size), target] -= 1.0
    dlogits *= (weight * dloss)[:, None]  # [CE.3] dz = (p - onehot(target)) dloss / N
    return (dlogits.reshape(logits.shape),)


# --- dropout -----------------------------------------------------------------------------------


def dropout_mask(rng: np.random.Generator, shape: tuple[int, ...], p: float, dtype: Any) -> Array:
    """A host array that is 0 with probability p and 1 / (1 - p) otherwise, so its mean is 1."""
    keep = rng.random(shape, dtype=np.float32) >= p
    return keep.astype(dtype) * np.asarray(1.0 / (1.0 - p), dtype=dtype)


def dropout_forward(x: Array, *, mask: Array) -> tuple[Array, Cache]:
    """y = x ∘ mask [DROP.1] (Srivastava et al. 2014, §4, scaled in training).  (...) -> (...)

    Keeps the mask, which is drawn outside (see `dropout_mask`): the pair itself is deterministic.
    """
    return x * mask, (mask,)


def dropout_backward(dy: Array, cache: Cache) -> tuple[Array]:
    """(dx,) of `dropout_forward`."""
    (mask,) = cache
    return (dy * mask,)  # [DROP.2] dx = dy ∘ mask
