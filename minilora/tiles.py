"""Formulas for every entry of an array, applied to a tile of entries at a time.

NumPy passes over memory once for each arithmetic sign. On a tile that fits the core's cache these
passes are cheap, so a formula may be written as it is printed. Where `fused` (NumPy) or `kernels`
(CuPy) has a function of the formula's name, that one is computed instead: the same in fewer passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from minilora import fused, kernels
from minilora.backend import Array, namespace

TILE = 2**17  # entries: few enough for the cache, and enough that threads seldom wait for the GIL


def entrywise(formula: Callable[..., Array]) -> Callable[..., Array]:
    """The formula, written for whole arrays of one shape, for arrays of any size.

    Positional arguments are arrays, keyword arguments constants.
    """
    name = formula.__name__

    @functools.wraps(formula)
    def apply(*xs: Array, **constants: float) -> Array:
        if namespace(xs[0]) is not np:
            return getattr(kernels, name, formula)(*xs, **constants)
        in_place = getattr(fused, name, None)
        flat = [x.reshape(-1) for x in xs]
        y = np.empty_like(flat[0])
        for start in range(0, y.size, TILE):
            tile = slice(start, start + TILE)
            parts = [x[tile] for x in flat]
            if in_place is None:
                y[tile] = formula(*parts, **constants)
            else:
                in_place(*parts, **constants, out=y[tile])
        return y.reshape(xs[0].shape)

    return apply
