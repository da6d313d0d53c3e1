"""Formulas of `ops` written into `out`: the same, in few buffers, with fewer passes over memory.

The formula of the same name in `ops` is the definition, and a test compares the two. Without a
function here the formula itself is computed, a few percent slower.
"""

from __future__ import annotations

import numpy as np

from minilora.backend import Array


def gelu(x: Array, *, scale: float, cubic: float, out: Array) -> None:
    """½ x (1 + tanh u), u = (κ a x² + κ) x."""
    y = np.multiply(x, x, out=out)
    y *= cubic * scale
    y += scale
    y *= x
    np.tanh(y, out=y)
    y += 1.0
    y *= x
    y *= 0.5


def gelu_gradient(dy: Array, x: Array, *, scale: float, cubic: float, out: Array) -> None:
    """dy ∘ ½ ((1 - tanh² u) x (3 κ a x² + κ) + tanh u + 1)."""
    square = x * x
    t = square * (cubic * scale)
    t += scale
    t *= x
    np.tanh(t, out=t)
    slope = np.multiply(t, t, out=out)
    np.subtract(1.0, slope, out=slope)
    slope *= x
    square *= 3.0 * cubic * scale
    square += scale
    slope *= square
    slope += t
    slope += 1.0
    slope *= 0.5
    slope *= dy
