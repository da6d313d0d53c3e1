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
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from minilora import kernels
from minilora.backend import Array, namespace

Cache: TypeAlias = Any
"""A tuple that only the backward pass of the same pair opens."""

Again: TypeAlias = Callable[[], Array]
"""Computes an array again that costs less to compute twice than to keep."""


def rows(x: Array) -> Array:
    """The matrix whose rows are the vectors along the last axis."""
    return x.reshape(-1, x.shape[-1])


def dots(x: Array, y: Array) -> Array:
    """The inner products of two arrays' vectors along the last axis.  (..., C) -> (..., 1)"""
    return namespace(x).einsum("...c,...c->...", x, y)[..., None]


def sums(x: Array) -> Array:
    """The sums of an array's vectors along the last axis.  (..., C) -> (..., 1)"""
    return namespace(x).einsum("...c->...", x)[..., None]


def made(x: Array | Again) -> Array:
    """An array that was kept, or is to be computed again."""
    return x() if callable(x) else x


BLOCK = 2**17  # entries at a time: what a few passes over them read and write stays in the cache


def entrywise(f: Callable[..., Array], *xs: Array) -> Array:
    """f of arrays of one shape, entry by entry: a block at a time, since f makes several passes."""
    flat = [x.reshape(-1) for x in xs]
    y = np.empty_like(flat[0])
    for start in range(0, y.size, BLOCK):
        block = slice(start, start + BLOCK)
        y[block] = f(*(x[block] for x in flat))
    return y.reshape(xs[0].shape)


# --- linear ------------------------------------------------------------------------------------


def linear_forward(
    x: Array,
    w: Array,
    b: Array,
    *,
    frozen: bool = False,
    needs_dx: bool = True,
    needs_y: bool = True,
    again: Again | None = None,
) -> tuple[Any, Cache]:
    """The affine map y = x W + b [LIN.1].  (..., I), (I, O), (O,) -> (..., O)

    Keeps W for dx, unless no dx is needed, and x for dW, unless W and b are frozen; or, in place of
    x, what computes it `again`. y is None where only the cache is needed.
    """
    cache = None if frozen else again or x, w if needs_dx else None
    if not needs_y:
        return None, cache
    y = rows(x) @ w  # [LIN.1]
    y += b
    return y.reshape(*x.shape[:-1], w.shape[1]), cache


def linear_backward(dy: Array, cache: Cache) -> tuple[Array | None, Array | None, Array | None]:
    """dx, dw, db of `linear_forward`; dw and db are None when frozen, dx when it is not needed."""
    x, w = cache
    dx = None
    if w is not None:
        dx = (rows(dy) @ w.T).reshape(*dy.shape[:-1], w.shape[0])  # [LIN.2] dx = dy Wᵀ
    if x is None:
        return dx, None, None
    dw = rows(made(x)).T @ rows(dy)  # [LIN.3] dW = xᵀ dy
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
    xhat = x - sums(x) / x.shape[-1]  # [LN.1] x - μ
    variance = dots(xhat, xhat) / x.shape[-1]  # [LN.2] σ² = mean (x - μ)²
    rstd = 1.0 / namespace(x).sqrt(variance + eps)
    xhat *= rstd  # [LN.3] x̂ = (x - μ) / √(σ² + ε)
    cache = xhat, rstd, w, b, frozen
    return layer_norm_again(cache), cache


def layer_norm_again(cache: Cache) -> Array:
    """y of `layer_norm_forward`."""
    xhat, _, w, b, _ = cache
    y = xhat * w  # [LN.4] y = w ∘ x̂ + b
    y += b
    return y


def layer_norm_backward(dy: Array, cache: Cache) -> tuple[Array, Array | None, Array | None]:
    """dx, dw, db of `layer_norm_forward`; dw and db are None when frozen.

    dx is dx̂ less its mean and less its part along x̂: what the two normalisations take out.
    """
    xhat, rstd, w, _, frozen = cache
    dx = dy * w  # [LN.5] dx̂ = dy ∘ w
    along = dots(dx, xhat) / dy.shape[-1]
    dx -= sums(dx) / dx.shape[-1]
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
    return gelu_again((x,)), (x,)


def gelu_again(cache: Cache) -> Array:
    """y of `gelu_forward`."""
    (x,) = cache
    if namespace(x) is not np:
        return kernels.gelu_forward(x, GELU_SCALE, GELU_CUBIC)
    return entrywise(_gelu, x)


def gelu_backward(dy: Array, cache: Cache) -> tuple[Array]:
    """(dx,) of `gelu_forward`."""
    (x,) = cache
    if namespace(x) is not np:
        return (kernels.gelu_backward(dy, x, GELU_SCALE, GELU_CUBIC),)
    return (entrywise(_gelu_times_slope, dy, x),)


def _gelu(x: Array) -> Array:
    y = _gelu_tanh(x, x * x)
    y += 1.0
    y *= x
    y *= 0.5  # [GELU.2] y = ½ x (1 + tanh u)
    return y


def _gelu_times_slope(dy: Array, x: Array) -> Array:
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
    return slope


def _gelu_tanh(x: Array, square: Array) -> Array:
    """tanh u, given x and x²."""
    u = square * (GELU_CUBIC * GELU_SCALE)
    u += GELU_SCALE
    u *= x  # [GELU.1] u = √(2/π) (x + 0.044715 x³)
    return np.tanh(u, out=u)


# --- softmax and causal attention --------------------------------------------------------------


def softmax_forward(x: Array) -> tuple[Array, Cache]:
    """y = exp(x) / Σ exp(x) along the last axis [SM.1].  (..., T) -> (..., T)

    The row's maximum is subtracted first, which changes nothing but keeps exp finite. Keeps y.
    """
    xp = namespace(x)
    y = x - x.max(axis=-1, keepdims=True)
    xp.exp(y, out=y)
    y /= sums(y)  # [SM.1] y = exp(x - max x) / Σ exp(x - max x)
    return y, (y,)


def softmax_backward(dy: Array, cache: Cache) -> tuple[Array]:
    """(dx,) of `softmax_forward`."""
    (y,) = cache
    dx = dy - dots(dy, y)
    dx *= y  # [SM.2] dx = y ∘ (dy - Σ dy ∘ y)
    return (dx,)


QUERIES = 64  # at a time: none of them needs a weight for what comes after the last


class AttentionCache(NamedTuple):
    """What attention keeps: views (B, H, T, K) of the projections, and how many queries at a time.

    The weights P, which grow with T², are computed again.
    """

    q: Array
    k: Array
    v: Array
    queries: int


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


def causal_mask(n: int, like: Array) -> Array:
    """(n, n): row t is 0 where s ≤ t and -∞ where s > t."""
    xp = namespace(like)
    return xp.triu(xp.full((n, n), -math.inf, dtype=like.dtype), 1)


def causal_blocks(T: int, queries: int) -> Iterator[tuple[slice, slice]]:
    """All times t < T, some `queries` at a time, each with all the times s that they may see."""
    for start in range(0, T, queries):
        stop = min(start + queries, T)
        yield slice(start, stop), slice(0, stop)


def attention_weights(q: Array, k: Array, mask: Array) -> tuple[Array, Cache]:
    """P = softmax(q kᵀ / √K + mask), for the last n of m times [ATT.1-2]; and the softmax's cache.

    (..., n, K), (..., m, K), (n or more, n or more) -> (..., n, m)
    """
    n, K = q.shape[-2:]
    scores = (q * (1.0 / math.sqrt(K))) @ k.swapaxes(-1, -2)  # [ATT.1] S = q kᵀ / √K
    scores[..., -n:] += mask[:n, :n]  # among themselves no t sees s > t
    return softmax_forward(scores)  # [ATT.2] P = softmax(S + causal mask)


def attention_forward(qkv: Array, *, heads: int, queries: int = QUERIES) -> tuple[Array, Cache]:
    """Causal multi-head attention of fused projections [ATT.1-3] (Vaswani et al. 2017, eq. 1).

    (B, T, 3C) -> (B, T, C): in each head, y_t is the average of v_s over s ≤ t, weighted by
    softmax(q_t k_sᵀ / √K). Keeps q, k and v; P is there for some `queries` at a time, on a GPU for
    all. Raises ValueError unless H divides C.
    """
    xp = namespace(qkv)
    q, k, v = split_heads(qkv, heads)
    T, K = q.shape[-2:]
    queries = min(queries, T) if xp is np else T
    mask = causal_mask(queries, qkv)
    y, y_heads = merged_heads(qkv[..., : heads * K], heads)
    for t, s in causal_blocks(T, queries):
        P, _ = attention_weights(q[..., t, :], k[..., s, :], mask)
        xp.matmul(P, v[..., s, :], out=y_heads[..., t, :])  # [ATT.3] y = P v
    return y, AttentionCache(q, k, v, queries)


def attention_backward(dy: Array, cache: Cache) -> tuple[Array]:
    """(dqkv,) of `attention_forward`. Where P is 0 by the mask, so is dS."""
    q, k, v, queries = cache
    B, heads, T, K = q.shape
    xp = namespace(dy)
    mask = causal_mask(queries, dy)
    dy_heads = dy.reshape(B, T, heads, K).transpose(0, 2, 1, 3)
    dqkv = xp.zeros((B, T, 3 * heads * K), dtype=dy.dtype)
    dq, dk, dv = split_heads(dqkv, heads)
    for t, s in causal_blocks(T, queries):
        P, softmax_cache = attention_weights(q[..., t, :], k[..., s, :], mask)
        dv[..., s, :] += P.swapaxes(-1, -2) @ dy_heads[..., t, :]  # [ATT.4] dv = Pᵀ dy
        dP = dy_heads[..., t, :] @ v[..., s, :].swapaxes(-1, -2)  # [ATT.5] dP = dy vᵀ
        (dS,) = softmax_backward(dP, softmax_cache)  # [ATT.6] dS = P ∘ (dP - Σ dP ∘ P)
        xp.matmul(dS, k[..., s, :], out=dq[..., t, :])
        dk[..., s, :] += dS.swapaxes(-1, -2) @ q[..., t, :]
    dq *= 1.0 / math.sqrt(K)  # [ATT.7] dq = dS k / √K
    dk *= 1.0 / math.sqrt(K)  # [ATT.8] dk = dSᵀ q / √K
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
    z = rows(logits)
    target, weight = weigh(targets, z.dtype, ignore_index=ignore_index, count=count)
    top = z.max(axis=-1, keepdims=True)
    lse = xp.log(xp.exp(z - top).sum(axis=-1, keepdims=True))
    lse += top  # [CE.1] log Σ exp z
    z_target = xp.take_along_axis(z, target[:, None], axis=-1)
    loss = ((lse - z_target)[:, 0] * weight).sum()  # [CE.2] Σ (log Σ exp z - z_target) / N
    return loss, (logits, lse, target, weight)


def weigh(
    targets: Array, dtype: Any, *, ignore_index: int, count: int | None
) -> tuple[Array, Array]:
    """Every row's target, 0 where it is ignored, and its weight in the mean, 1 / N or then 0."""
    xp = namespace(targets)
    target = targets.reshape(-1)
    is_counted = target != ignore_index
    counted = is_counted.astype(dtype)
    divisor = float(count) if count is not None else xp.maximum(counted.sum(), 1.0)
    return xp.where(is_counted, target, 0), counted / divisor


def cross_entropy_backward(dloss: Array | float, cache: Cache) -> tuple[Array]:
    """(dlogits,) of `cross_entropy_forward`; rows whose target is ignored get 0."""
    logits, lse, target, weight = cache
    xp = namespace(logits)
    dlogits = rows(logits) - lse
    xp.exp(dlogits, out=dlogits)  # p = softmax(z)
    dlogits[xp.arange(target.size), target] -= 1.0
    dlogits *= (weight * dloss)[:, None]  # [CE.3] dz = (p - onehot(target)) dloss / N
    return (dlogits.reshape(logits.shape),)


# --- the head and the loss in one --------------------------------------------------------------

VOCABULARY = 2048  # tokens at a time


class VocabularyPart(NamedTuple):
    """Some rows E of the table (V, C) and where they are; for each row of the batch whether its
    target is among them, and in which column of their logits (0 if it is not)."""

    part: slice
    E: Array
    has_target: Array
    column: Array


def vocabulary_parts(table: Array, target: Array, chunk: int) -> Iterator[VocabularyPart]:
    """The vocabulary, `chunk` tokens at a time."""
    for start in range(0, table.shape[0], chunk):
        part = slice(start, min(start + chunk, table.shape[0]))
        has_target = (target >= part.start) & (target < part.stop)
        column = namespace(target).where(has_target, target - start, 0)
        yield VocabularyPart(part, table[part], has_target, column)


class HeadLossCache(NamedTuple):
    """What the loss keeps: the table, each row's target and its weight in the mean; and either x
    (..., C) and log Σ exp z (N, 1) or, where the table is frozen, Σ_v p_v E_v (..., C)."""

    x: Array | None
    table: Array
    target: Array
    weight: Array
    lse: Array | None
    expected: Array | None
    chunk: int


def head_loss_forward(
    x: Array,
    table: Array,
    *,
    targets: Array,
    ignore_index: int = -100,
    count: int | None = None,
    frozen: bool = False,
    chunk: int = VOCABULARY,
) -> tuple[Array, Cache]:
    """`cross_entropy_forward` of `head_forward`, `chunk` tokens of V at a time [HL.1-2].

    (..., C), (V, C) -> (). The logits are never there as a whole. A frozen table is read once: the
    sum that dx is made of, Σ p_v E_v, is taken beside that of exp z, both relative to the largest
    logit so far (Milakov & Gimelshein 2018, alg. 3). Otherwise the backward pass computes the
    logits again.
    """
    xp = namespace(x)
    x_rows = rows(x)
    target, weight = weigh(targets, x.dtype, ignore_index=ignore_index, count=count)
    n = xp.arange(target.size)
    top = xp.full((target.size, 1), -math.inf, dtype=x.dtype)
    total, z_target = xp.zeros_like(top), xp.zeros_like(top[:, 0])
    expected = xp.zeros_like(x_rows) if frozen else None
    for _, E, has_target, column in vocabulary_parts(table, target, chunk):
        z = x_rows @ E.T
        z_target += has_target * z[n, column]
        higher = xp.maximum(top, z.max(axis=-1, keepdims=True))
        z -= higher
        xp.exp(z, out=z)
        shrink = xp.exp(top - higher)
        total = total * shrink + sums(z)  # [HL.1] Σ exp(z - top)
        if expected is not None:
            expected *= shrink
            expected += z @ E  # [HL.2] Σ exp(z - top) E
        top = higher
    lse = xp.log(total) + top
    loss = ((lse[:, 0] - z_target) * weight).sum()
    if expected is None:
        return loss, HeadLossCache(x, table, target, weight, lse, None, chunk)
    expected /= total
    expected = expected.reshape(x.shape)
    return loss, HeadLossCache(None, table, target, weight, None, expected, chunk)


def head_loss_backward(dloss: Array | float, cache: Cache) -> tuple[Array, Array | None]:
    """dx, dtable of `head_loss_forward`; dtable is None when frozen."""
    x, table, target, weight, lse, expected, chunk = cache
    weight = (weight * dloss)[:, None]
    if expected is not None:
        dx = rows(expected) - table[target]
        dx *= weight  # [HL.3] dx = (Σ p_v E_v - E_target) dloss / N
        return dx.reshape(expected.shape), None
    xp = namespace(x)
    x_rows, n = rows(x), xp.arange(target.size)
    dx, dtable = xp.zeros_like(x_rows), xp.empty_like(table)
    for part, E, has_target, column in vocabulary_parts(table, target, chunk):
        dz = x_rows @ E.T
        dz -= lse
        xp.exp(dz, out=dz)
        dz[n, column] -= has_target
        dz *= weight  # [HL.4] dz = (p - onehot(target)) dloss / N
        dx += dz @ E  # [HL.5] dx = Σ dz E
        xp.matmul(dz.T, x_rows, out=dtable[part])  # [HL.6] dE = dzᵀ x
    return dx.reshape(x.shape), dtable


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
