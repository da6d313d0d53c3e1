"""AdamW, clipping by global norm, and the learning-rate schedule, over trees of parameters."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from minilora import kernels, tree
from minilora.backend import Array, namespace
from minilora.tree import Tree


class Moments(NamedTuple):
    """AdamW's state: running means of the gradient (m) and of its square (v), trees as `params`."""

    m: Tree
    v: Tree


def adamw_init(params: Tree) -> Moments:
    """Zero moments with the shapes and dtypes of `params`."""

    def zeros(p: Array) -> Array:
        return namespace(p).zeros_like(p)

    return Moments(tree.map_leaves(zeros, params), tree.map_leaves(zeros, params))


def adamw(
    params: Tree,
    grads: Tree,
    moments: Moments,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Tree, Moments]:
    """One AdamW step (Loshchilov & Hutter 2019, alg. 2): new parameters and moments.

    `step` counts from 1, for the bias correction (Kingma & Ba 2015, alg. 1). The decay is decoupled
    from the gradient, multiplied by `lr` as in PyTorch, and applied to matrices only, not to biases
    and layer norms. The arguments are not changed.
    """
    new = tree.map_leaves(
        lambda p, g, m, v: _adamw_leaf(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay),
        params,
        grads,
        moments.m,
        moments.v,
    )
    parts = (tree.map_leaves(lambda leaf, i=i: leaf[i], new) for i in range(3))
    params, m, v = parts
    return params, Moments(m, v)


def _adamw_leaf(
    p: Array, g: Array, m: Array, v: Array,
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> tuple[Array, Array, Array]:  # fmt: skip
    decay = lr * weight_decay if p.ndim >= 2 else 0.0
    if namespace(p) is not np:
        return kernels.adamw(p, g, m, v, step, lr, beta1, beta2, eps, decay)
    m = beta1 * m
    m += (1.0 - beta1) * g  # [ADAMW.1] m = β₁ m + (1 - β₁) g
    v = beta2 * v
    v += (1.0 - beta2) * (g * g)  # [ADAMW.2] v = β₂ v + (1 - β₂) g²
    update = v * (1.0 / (1.0 - beta2**step))  # [ADAMW.3] v̂ = v / (1 - β₂ᵗ)
    np.sqrt(update, out=update)
    update += eps
    np.divide(m, update, out=update)
    update *= lr / (1.0 - beta1**step)  # [ADAMW.4] η m̂ / (√v̂ + ε), m̂ = m / (1 - β₁ᵗ)
    p = p * (1.0 - decay)
    p -= update  # [ADAMW.5] θ = θ - η λ θ - η m̂ / (√v̂ + ε)
    return p, m, v


def global_norm(grads: Tree) -> Array:
    """The Euclidean norm of all gradients as one vector: an array (), on their device."""
    squares = [(g * g).sum() for g in tree.flatten(grads).values()]
    return namespace(squares[0]).sqrt(sum(squares))


def clip_by_global_norm(grads: Tree, max_norm: float) -> tuple[Tree, Array]:
    """Gradients scaled down to a global norm of at most `max_norm`, and the norm before, ().

    Pascanu et al. 2013, alg. 1; the scale is min(1, max_norm / (norm + 1e-6)), as in PyTorch.
    """
    norm = global_norm(grads)
    scale = namespace(norm).minimum(1.0, max_norm / (norm + 1e-6))  # [CLIP.1]
    return tree.map_leaves(lambda g: g * scale, grads), norm


def warmup_cosine(step: int, *, steps: int, peak: float, warmup: int, floor: float = 0.1) -> float:
    """The learning rate of a step from 1 to `steps`: a linear rise to `peak`, then a cosine decay.

    `warmup` is the number of steps of the rise; `floor` is the last rate as a fraction of the peak
    (Loshchilov & Hutter 2017, eq. 5, without restarts).
    """
    if step <= warmup:
        return peak * step / warmup
    done = (step - warmup) / (steps - warmup)
    return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done)))  # [SCHED.1]
