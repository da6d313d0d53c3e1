"""Fused kernels for a GPU: one pass over memory where plain array code makes several.

Each computes what the function of the same name in `ops` or `optim` does in plain code, which is
its reference. A kernel is CUDA C++ for one entry; `T` is the arrays' dtype. CuPy compiles it at its
first use and keeps it. The constants come as Python floats, computed in float64.
"""

from __future__ import annotations

import functools
from typing import Any

from minilora.backend import Array, namespace

# name: (inputs, outputs, what is done for each entry)
SOURCES = {
    "gelu": (
        "T x, T scale, T cubic",
        "T y",
        """
        T u = scale * (x + cubic * x * x * x);  // [GELU.1]
        y = T(0.5) * x * (T(1) + tanh(u));  // [GELU.2]
        """,
    ),
    "gelu_gradient": (
        "T dy, T x, T scale, T cubic",
        "T dx",
        """
        T t = tanh(scale * (x + cubic * x * x * x));
        T slope = scale * (T(1) + T(3) * cubic * x * x);  // [GELU.3] du/dx
        dx = dy * T(0.5) * (T(1) + t + x * (T(1) - t * t) * slope);  // [GELU.4-5]
        """,
    ),
    "swiglu": (
        "T g, T u",
        "T y",
        """
        T s = T(0.5) * (T(1) + tanh(T(0.5) * g));  // [SWIGLU.1]
        y = g * s * u;  // [SWIGLU.2]
        """,
    ),
    "swiglu_gate_gradient": (
        "T dy, T g, T u",
        "T dg",
        """
        T s = T(0.5) * (T(1) + tanh(T(0.5) * g));
        dg = dy * u * s * (T(1) + g * (T(1) - s));  // [SWIGLU.3-4]
        """,
    ),
    # gain1 is 1 - β₁ and gain2 is 1 - β₂: the differences are exact only in float64.
    "adamw": (
        "T p, T g, T m, T v, T beta1, T gain1, T beta2, T gain2, "
        "T correction, T eps, T rate, T keep",
        "T p_new, T m_new, T v_new",
        """
        T mean = beta1 * m + gain1 * g;  // [ADAMW.1]
        T square = beta2 * v + gain2 * g * g;  // [ADAMW.2]
        T root = sqrt(square * correction);  // [ADAMW.3]
        p_new = keep * p - rate * mean / (root + eps);  // [ADAMW.4-5]
        m_new = mean;
        v_new = square;
        """,
    ),
}


@functools.cache
def kernel(cupy: Any, name: str) -> Any:
    """The kernel of that name, a callable over arrays of one shape and dtype."""
    return cupy.ElementwiseKernel(*SOURCES[name], f"minilora_{name}")


def gelu(x: Array, *, scale: float, cubic: float) -> Array:
    """y = ½ x (1 + tanh u), u = κ (x + a x³) [GELU.1-2].  (...) -> (...)"""
    return kernel(namespace(x), "gelu")(x, scale, cubic)


def gelu_gradient(dy: Array, x: Array, *, scale: float, cubic: float) -> Array:
    """dy times GELU's slope at x [GELU.3-5].  (...), (...) -> (...)"""
    return kernel(namespace(x), "gelu_gradient")(dy, x, scale, cubic)


def swiglu(g: Array, u: Array) -> Array:
    """y = g σ(g) ∘ u [SWIGLU.1-2].  (...), (...) -> (...)"""
    return kernel(namespace(g), "swiglu")(g, u)


def swiglu_gate_gradient(dy: Array, g: Array, u: Array) -> Array:
    """dy times u times the slope of g σ(g) [SWIGLU.3-4].  (...), (...), (...) -> (...)"""
    return kernel(namespace(g), "swiglu_gate_gradient")(dy, g, u)


def adamw(
    p: Array, g: Array, m: Array, v: Array,
    step: int, lr: float, beta1: float, beta2: float, eps: float, decay: float,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """New p, m and v after one step of AdamW [ADAMW.1-5]; `decay` is η λ, or 0 for a vector."""
    return kernel(namespace(p), "adamw")(
        p, g, m, v, beta1, 1.0 - beta1, beta2, 1.0 - beta2,
        1.0 / (1.0 - beta2**step), eps, lr / (1.0 - beta1**step), 1.0 - decay,
    )  # fmt: skip
