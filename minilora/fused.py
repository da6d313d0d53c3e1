"""Formulas of `ops` in place: the same, in one or two buffers, with fewer passes over memory.

The formula of the same name in `ops` is the definition, and a test compares the two. Without a
function here the formula itself is computed, a few percent slower.
"""

from __future__ import annotations

import numpy as np

from minilora.backend import Array


def gelu(x: Array, *, scale: float, cubic: float) -> Array:
    """½ x (1 + tanh u), u = (κ a x² + κ) x."""
    y = _tanh_u(x, x * x, scale, cubic)
    y += 1.0
    y *= x
    y *= 0.5
    return y


def gelu_gradient(dy: Array, x: Array, *, scale: float, cubic: float) -> Array:
    """dy ∘ ½ ((1 - tanh² u) x (3 κ a x² + κ) + tanh u + 1)."""
    square = x * x
    t = _tanh_u(x, square, scale, cubic)
    slope = 1.0 - t * t
    slope *= x
    square *= 3.0 * cubic * scale
    square += scale
    slope *= square
    slope += t
    slope += 1.0
    slope *= 0.5
    slope *= dy
    return slope


def _tanh_u(x: Array, square: Array, scale: float, cubic: float) -> Array:
    """tanh u, given x and x²."""
    u = square * (cubic * scale)
    u += scale
    u *= x
    return np.tanh(u, out=u)
