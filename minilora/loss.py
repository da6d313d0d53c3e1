"""The loss: the cross-entropy of logits, and head and cross-entropy in one, which stores no logits.

The pairs in one take the vocabulary a chunk at a time: `head_loss` for a table that is trained,
`frozen_head_loss` for one that is not and is then read once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from minilora.backend import Array, namespace
from minilora.ops import rows, sums

# --- cross-entropy -----------------------------------------------------------------------------


class CrossEntropyCache(NamedTuple):
    logits: Array
    lse: Array  # log Σ exp z of each row
    target: Array
    weight: Array


def cross_entropy_forward(
    logits: Array, *, targets: Array, ignore_index: int = -100, count: int | None = None
) -> tuple[Array, CrossEntropyCache]:
    """Mean negative log-likelihood in nats, Σ (log Σ exp z - z_target) / N [CE.1-2].

    (..., V), (...) -> (). N counts the targets that are not `ignore_index`, unless `count` gives it
    (a shard of a batch divides by the whole batch's). Every counted target must lie in [0, V).
    """
    xp = namespace(logits)
    z = rows(logits)
    target, weight = weigh(targets, z.dtype, ignore_index=ignore_index, count=count)
    top = z.max(axis=-1, keepdims=True)
    lse = xp.log(xp.exp(z - top).sum(axis=-1, keepdims=True))
    lse += top  # [CE.1] log Σ exp z
    z_target = xp.take_along_axis(z, target[:, None], axis=-1)
    loss = ((lse - z_target)[:, 0] * weight).sum()  # [CE.2] Σ (log Σ exp z - z_target) / N
    return loss, CrossEntropyCache(logits, lse, target, weight)


def cross_entropy_backward(dloss: Array | float, cache: CrossEntropyCache) -> tuple[Array]:
    """(dlogits,) of `cross_entropy_forward`; rows whose target is ignored get 0."""
    logits, lse, target, weight = cache
    xp = namespace(logits)
    dlogits = rows(logits) - lse
    xp.exp(dlogits, out=dlogits)  # p = softmax(z)
    dlogits[xp.arange(target.size), target] -= 1.0
    dlogits *= (weight * dloss)[:, None]  # [CE.3] dz = (p - onehot(target)) dloss / N
    return (dlogits.reshape(logits.shape),)


def weigh(
    targets: Array, dtype: Any, *, ignore_index: int, count: int | None
) -> tuple[Array, Array]:
    """Every row's target, 0 where it is ignored, and its weight in the mean, 1 / N or then 0.

    With N = 0 every weight is 0, and so are the loss and its gradients.
    """
    xp = namespace(targets)
    target = targets.reshape(-1)
    is_counted = target != ignore_index
    counted = is_counted.astype(dtype)
    divisor = xp.maximum(counted.sum(), 1.0) if count is None else float(count or math.inf)
    return xp.where(is_counted, target, 0), counted / divisor


# --- head and cross-entropy in one -------------------------------------------------------------

VOCAB_CHUNK = 2048  # tokens at a time


class Chunk(NamedTuple):
    """Some rows E of the table (V, C) and where they are; for each row of the batch whether its
    target is among them, and in which column of their logits (0 if it is not)."""

    place: slice
    E: Array
    has_target: Array
    column: Array


def vocabulary_chunks(table: Array, target: Array) -> Iterator[Chunk]:
    """The vocabulary, VOCAB_CHUNK tokens at a time."""
    for start in range(0, table.shape[0], VOCAB_CHUNK):
        place = slice(start, min(start + VOCAB_CHUNK, table.shape[0]))
        has_target = (target >= place.start) & (target < place.stop)
        column = namespace(target).where(has_target, target - start, 0)
        yield Chunk(place, table[place], has_target, column)


def exp_logits(x: Array, chunk: Chunk, top: Array) -> tuple[Array, Array, Array, Array]:
    """exp(z - top') of a chunk's logits z, top' being the largest so far, as top (N, 1) was before.

    With it z_target, where the chunk has it, top' itself, and exp(top - top'), by which a sum over
    the chunks before shrinks (Milakov & Gimelshein 2018, alg. 3).
    """
    xp = namespace(x)
    z = x @ chunk.E.T
    z_target = chunk.has_target * z[xp.arange(len(z)), chunk.column]
    higher = xp.maximum(top, z.max(axis=-1, keepdims=True))
    z -= higher
    xp.exp(z, out=z)
    return z, z_target, higher, xp.exp(top - higher)


class HeadLossCache(NamedTuple):
    x: Array
    table: Array
    target: Array
    weight: Array
    lse: Array  # log Σ exp z of each row, (N, 1)


def head_loss_forward(
    x: Array, table: Array, *, targets: Array, ignore_index: int = -100, count: int | None = None
) -> tuple[Array, HeadLossCache]:
    """`cross_entropy_forward` of `head_forward` [HL.1].  (..., C), (V, C) -> ()"""
    xp = namespace(x)
    target, weight = weigh(targets, x.dtype, ignore_index=ignore_index, count=count)
    top = xp.full((target.size, 1), -math.inf, dtype=x.dtype)
    total, z_target = xp.zeros_like(top), xp.zeros_like(top[:, 0])
    for chunk in vocabulary_chunks(table, target):
        p, z_chunk, top, shrink = exp_logits(rows(x), chunk, top)
        z_target += z_chunk
        total = total * shrink + sums(p)  # [HL.1] Σ exp(z - top)
    lse = xp.log(total) + top
    loss = ((lse[:, 0] - z_target) * weight).sum()
    return loss, HeadLossCache(x, table, target, weight, lse)


def head_loss_backward(dloss: Array | float, cache: HeadLossCache) -> tuple[Array, Array]:
    """dx, dtable of `head_loss_forward`, whose logits are recomputed."""
    x, table, target, weight, lse = cache
    xp = namespace(x)
    weight = (weight * dloss)[:, None]
    dx, dtable = xp.zeros_like(rows(x)), xp.empty_like(table)
    for place, E, has_target, column in vocabulary_chunks(table, target):
        dz = rows(x) @ E.T
        dz -= lse
        xp.exp(dz, out=dz)
        dz[xp.arange(target.size), column] -= has_target
        dz *= weight  # [HL.4] dz = (p - onehot(target)) dloss / N
        dx += dz @ E  # [HL.5] dx = Σ dz E
        xp.matmul(dz.T, rows(x), out=dtable[place])  # [HL.6] dE = dzᵀ x
    return dx.reshape(x.shape), dtable


class FrozenHeadLossCache(NamedTuple):
    expected: Array  # Σ_v p_v E_v, (..., C)
    table: Array
    target: Array
    weight: Array


def frozen_head_loss_forward(
    x: Array, *, table: Array, targets: Array, ignore_index: int = -100, count: int | None = None
) -> tuple[Array, FrozenHeadLossCache]:
    """`head_loss_forward` with a constant table, which is read once [HL.1-2].  (..., C) -> ()

    dx is made of Σ p_v E_v, which is summed beside Σ exp z, both relative to the largest logit so
    far.
    """
    xp = namespace(x)
    target, weight = weigh(targets, x.dtype, ignore_index=ignore_index, count=count)
    top = xp.full((target.size, 1), -math.inf, dtype=x.dtype)
    total, z_target = xp.zeros_like(top), xp.zeros_like(top[:, 0])
    expected = xp.zeros_like(rows(x))
    for chunk in vocabulary_chunks(table, target):
        p, z_chunk, top, shrink = exp_logits(rows(x), chunk, top)
        z_target += z_chunk
        total = total * shrink + sums(p)
        expected *= shrink
        expected += p @ chunk.E  # [HL.2] Σ exp(z - top) E
    loss = ((xp.log(total) + top)[:, 0] - z_target) * weight
    expected /= total
    return loss.sum(), FrozenHeadLossCache(expected.reshape(x.shape), table, target, weight)


def frozen_head_loss_backward(dloss: Array | float, cache: FrozenHeadLossCache) -> tuple[Array]:
    """(dx,) of `frozen_head_loss_forward`."""
    expected, table, target, weight = cache
    dx = rows(expected) - table[target]
    dx *= (weight * dloss)[:, None]  # [HL.3] dx = (Σ p_v E_v - E_target) dloss / N
    return (dx.reshape(expected.shape),)
