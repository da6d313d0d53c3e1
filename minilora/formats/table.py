"""The table of an architecture's tensors: for each, its path in our tree and its form in a file.

A table is data beside `base`, which reads and writes all architectures by it. So are the fields of
a config.json that change the mathematics.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from minilora.adapters import weight_of
from minilora.errors import MiniloraError
from minilora.formats.tensors import Shape

HEAD = "lm_head.weight"  # in every architecture


class Stored(NamedTuple):
    """A tensor of a file: its path in our tree, its shape there, whether that is (out, in).

    q, k and v, where they are tensors of their own, have paths such as `blocks.0.attn.q.w`: they
    are columns of our `blocks.0.attn.qkv.w`.
    """

    path: str
    shape: Shape
    transposed: bool = False

    @property
    def ours(self) -> Shape:
        """Its shape in our tree."""
        return self.shape[::-1] if self.transposed else self.shape


def place(path: str, widths: tuple[int, int]) -> tuple[str, slice]:
    """The leaf of our tree that a path of a table is, or is part of, and which columns of it.

    `widths` are how many columns are q's, and how many k's and v's, as `qkv_widths` has them.
    """
    module, _, kind = path.rpartition(".")
    if module.rpartition(".")[2] not in ("q", "k", "v"):
        return path, slice(None)
    weight, columns = weight_of(module, *widths)
    return weight.removesuffix("w") + kind, columns


def require(
    document: Mapping[str, Any], accepted: Mapping[str, tuple[Any, ...]], where: object
) -> None:
    """Raise MiniloraError naming the first field that has none of its accepted values.

    The first of them is what transformers takes when the field is missing.
    """
    for name, values in accepted.items():
        value = document.get(name, values[0])
        if value not in values:
            raise MiniloraError(
                f"{where}: {name} is {reprlib.repr(value)}, which minilora does not compute; "
                f"expected {' or '.join(map(repr, values))}"
            )
