"""Functions that the course adds to the core's, to be written like them.

The numeric gradient in its plainest form, and RMSNorm, a pair of one's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minilora.backend import Array
from minilora.ops import dots, rows


def numeric_gradient(
    f: Callable[[Array], Array], x: Array, dy: Array, *, h: float = 2.0**-10
) -> Array:
    """The gradient of <dy, f(x)> in every entry of x, by central differences.

    dx_i = <dy, f(x + h e_i) - f(x - h e_i)> / 2h, where e_i is 1 at entry i and 0 elsewhere, and
    <a, b> is the sum of the products of their entries. x has any shape, and is left as it is.
    """
    dx = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        e = np.zeros_like(x)
        e[i] = h
        dx[i] = np.sum(dy * (f(x + e) - f(x - e))) / (2.0 * h)
    return dx


class RMSNormCache(NamedTuple):
    xhat: Array
    r: Array  # 1/√(mean x² + ε)
    w: Array


def rms_norm_forward(x: Array, w: Array, *, eps: float = 1e-5) -> tuple[Array, RMSNormCache]:
    """y = w ∘ x / √(mean(x²) + ε) along the last axis (Zhang & Sennrich 2019, eq. 4).

    (..., C), (C,) -> (..., C). The cache is what your backward pass needs, in any form.
    """
    r = 1.0 / np.sqrt(dots(x, x) / x.shape[-1] + eps)
    xhat = x * r
    return w * xhat, RMSNormCache(xhat, r, w)


def rms_norm_backward(dy: Array, cache: RMSNormCache) -> tuple[Array, Array]:
    """dx, dw of `rms_norm_forward`."""
    xhat, r, w = cache
    dxhat = dy * w
    dx = (dxhat - xhat * (dots(dxhat, xhat) / xhat.shape[-1])) * r
    return dx, rows(dy * xhat).sum(axis=0)
