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


def swiglu(g: Array, u: Array, *, out: Array) -> None:
    """½ (1 + tanh ½g) g u."""
    y = np.multiply(g, 0.5, out=out)
    np.tanh(y, out=y)
    y += 1.0
    y *= 0.5
    y *= g
    y *= u


def swiglu_gate_gradient(dy: Array, g: Array, u: Array, *, out: Array) -> None:
    """dy u s ((1 - s) g + 1), s = ½ (1 + tanh ½g)."""
    s = g * 0.5
    np.tanh(s, out=s)
    s += 1.0
    s *= 0.5
    slope = np.subtract(1.0, s, out=out)
    slope *= g
    slope += 1.0
    slope *= s
    slope *= u
    slope *= dy


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
