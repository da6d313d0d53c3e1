"""The operations that a Llama has and GPT-2 has not, as forward/backward pairs like those of `ops`.

Its RMS norm, its gated MLP, its positions. Attention in groups of heads and the linear map without
a bias are in `ops`.
"""

from __future__ import annotations

from typing import NamedTuple

from minilora.backend import Array, namespace
from minilora.ops import Gradient, dots, rows
from minilora.tiles import entrywise

# --- RMS norm: normalise by the root mean square, then scale --------------------------------------


class RMSNormaliseCache(NamedTuple):
    xhat: Array  # rather than x: dx is made of it
    rrms: Array  # 1/√(mean x² + ε)


def rms_normalise_forward(x: Array, *, eps: float) -> tuple[Array, RMSNormaliseCache]:
    """x̂ = x / √(mean x² + ε) along the last axis [RMS.1-2] (Zhang & Sennrich 2019, eq. 4).

    (..., C) -> (..., C). `normalise_forward` without the mean.
    """
    rrms = 1.0 / namespace(x).sqrt(dots(x, x) / x.shape[-1] + eps)  # [RMS.1] 1/√(mean x² + ε)
    xhat = x * rrms  # [RMS.2] x̂ = x / √(mean x² + ε)
    return xhat, RMSNormaliseCache(xhat, rrms)


def rms_normalise_backward(dxhat: Array, cache: RMSNormaliseCache) -> tuple[Array]:
    """(dx,): dx̂ less its part along x̂, which the normalisation takes out."""
    xhat, rrms = cache
    dx = dxhat - xhat * (dots(dxhat, xhat) / dxhat.shape[-1])
    dx *= rrms  # [RMS.5] dx = (dx̂ - x̂ mean(dx̂ ∘ x̂)) / √(mean x² + ε)
    return (dx,)


class ScaleCache(NamedTuple):
    x: Array | None  # for dw
    w: Array


def scale_forward(x: Array, w: Array) -> tuple[Array, ScaleCache]:
    """y = w ∘ x [RMS.3].  (..., C), (C,) -> (..., C)"""
    return x * w, ScaleCache(x, w)  # [RMS.3] y = w ∘ x̂


def scale_backward(dy: Array, cache: ScaleCache) -> tuple[Array, Gradient]:
    """dx, dw of `scale_forward`."""
    x, w = cache
    dx = dy * w  # [RMS.4] dx̂ = dy ∘ w
    if x is None:
        return dx, None
    return dx, rows(dy * x).sum(axis=0)  # [RMS.6] dw = Σ_rows dy ∘ x̂


class RMSNormCache(NamedTuple):
    normalise: RMSNormaliseCache
    scale: ScaleCache

    def output(self) -> Array:
        """y of `rms_norm_forward`, recomputed."""
        return scale_forward(self.normalise.xhat, self.scale.w)[0]


def rms_norm_forward(x: Array, w: Array, *, eps: float) -> tuple[Array, RMSNormCache]:
    """y = w ∘ x̂: `scale_forward` of `rms_normalise_forward`.  (..., C), (C,) -> (..., C)"""
    xhat, normalise = rms_normalise_forward(x, eps=eps)
    y, scale = scale_forward(xhat, w)
    return y, RMSNormCache(normalise, scale)


def rms_norm_backward(dy: Array, cache: RMSNormCache) -> tuple[Array, Gradient]:
    """dx, dw of `rms_norm_forward`."""
    dxhat, dw = scale_backward(dy, cache.scale)
    (dx,) = rms_normalise_backward(dxhat, cache.normalise)
    return dx, dw


# --- SwiGLU ------------------------------------------------------------------------------------


class SwiGLUCache(NamedTuple):
    g: Array  # σ(g) is quick to recompute
    u: Array

    def output(self) -> Array:
        """y of `swiglu_forward`, recomputed."""
        return swiglu(self.g, self.u)


def swiglu_forward(g: Array, u: Array) -> tuple[Array, SwiGLUCache]:
    """y = g σ(g) ∘ u [SWIGLU.1-2] (Shazeer 2020, eq. 5).  (...), (...) -> (...)"""
    return swiglu(g, u), SwiGLUCache(g, u)


def swiglu_backward(dy: Array, cache: SwiGLUCache) -> tuple[Array, Array]:
    """dg, du of `swiglu_forward`."""
    g, u = cache
    return swiglu_gate_gradient(dy, g, u), swiglu(g, dy)  # [SWIGLU.5] du = g σ(g) ∘ dy


@entrywise
def swiglu(g: Array, u: Array) -> Array:
    """SwiGLU of every entry.  (...), (...) -> (...)"""
    s = 0.5 * (1.0 + namespace(g).tanh(0.5 * g))  # [SWIGLU.1] σ(g) = 1/(1 + e⁻ᵍ) = ½ (1 + tanh ½g)
    return g * s * u  # [SWIGLU.2] y = g σ(g) ∘ u


@entrywise
def swiglu_gate_gradient(dy: Array, g: Array, u: Array) -> Array:
    """dy times u times the slope of g σ(g).  (...), (...), (...) -> (...)"""
    s = 0.5 * (1.0 + namespace(g).tanh(0.5 * g))
    slope = s * (1.0 + g * (1.0 - s))  # [SWIGLU.3] d(g σ(g))/dg = σ (1 + g (1 - σ))
    return dy * u * slope  # [SWIGLU.4] dg = dy ∘ u ∘ d(g σ(g))/dg


# --- rotary positions --------------------------------------------------------------------------


class RotaryCache(NamedTuple):
    cos: Array
    sin: Array
    heads: int


def rotary_forward(qkv: Array, *, cos: Array, sin: Array, heads: int) -> tuple[Array, RotaryCache]:
    """Each pair (x_j, x_{j+K/2}) of q and k, turned by its angle (Su et al. 2021, eq. 34).

    [ROPE.1-2]  (B, T, (H + 2G) K), (T, 1, K/2) -> (B, T, (H + 2G) K). The first `heads` heads, H of
    q and G of k, are turned, and v is left as it is. The angle grows with the time t (see `llama`).
    """
    half = cos.shape[-1]
    x = qkv.reshape(*qkv.shape[:-1], -1, 2 * half)
    a, b = x[..., :heads, :half], x[..., :heads, half:]
    y = x.copy()
    y[..., :heads, :half] = a * cos - b * sin  # [ROPE.1] first entry of a pair
    y[..., :heads, half:] = b * cos + a * sin  # [ROPE.2] second entry
    return y.reshape(qkv.shape), RotaryCache(cos, sin, heads)


def rotary_backward(dy: Array, cache: RotaryCache) -> tuple[Array]:
    """(dqkv,) of `rotary_forward`: the transpose of a rotation is the rotation back."""
    cos, sin, heads = cache
    return (rotary_forward(dy, cos=cos, sin=-sin, heads=heads)[0],)  # [ROPE.3] by minus the angle
