"""What is kept for a backward pass: the only place that knows of freezing and recomputing.

A forward pass keeps all that its gradients are made of. `thin` drops what no wanted gradient needs
and what is cheaper to recompute than to store; `Restored` recomputes that when it is read. Of an
architecture's block they know READS, which names each linear map, in order, and the part whose
output it reads, and ENDS, which names for each the map where a pass ends that has to reach it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from minilora import lora, ops
from minilora.tree import Tree


class Plan(NamedTuple):
    """The gradients that are wanted. Without any, as in inference, nothing is kept."""

    base: bool = False  # of the base's weights
    lora: bool = False  # of the adapters' factors
    below: bool = False  # of a block's input, since something below it is trained
    recompute: bool = False  # of a block keep the input alone (Chen et al. 2016, §4)


Fields: TypeAlias = dict[type[Any], tuple[str, ...]]  # of caches, by what is made of them
OF_WEIGHTS: Fields = {
    **dict.fromkeys((ops.LinearCache, ops.AffineCache, ops.HeadCache), ("x",)),
    ops.EmbeddingCache: ("table",),
    ops.PositionCache: ("wpe",),
}
OF_FACTORS: Fields = {lora.LoRACache: ("x", "h"), lora.LoRAEmbeddingCache: ("h", "A")}
OF_INPUTS: Fields = {ops.LinearCache: ("w",), lora.LoRACache: ("A",)}
INPUTS: Fields = {ops.LinearCache: ("x",), lora.LoRACache: ("x",)}


def without(cache: Any, fields: Fields) -> Any:
    """A cache, or a dict of caches, with these fields None in all of its parts."""
    if isinstance(cache, dict):
        return {name: without(part, fields) for name, part in cache.items()}
    if not hasattr(cache, "_fields"):
        return cache
    dropped, parts = fields.get(type(cache), ()), zip(cache._fields, cache, strict=True)
    return type(cache)(*(None if name in dropped else without(x, fields) for name, x in parts))


def unwanted(plan: Plan) -> Fields:
    """The makings of gradients that the plan does not want."""
    return ({} if plan.base else OF_WEIGHTS) | ({} if plan.lora else OF_FACTORS)


def wanted(cache: Any, plan: Plan) -> Any:
    """A cache without what only gradients are made of that the plan does not want."""
    return without(cache, unwanted(plan))


def thin(cache: Any, plan: Plan, architecture: Any) -> Any:
    """What is kept of a block's cache; None if no wanted gradient lies in the block or below."""
    reads, parts = architecture.READS, {}
    for name, part in cache._asdict().items():
        recomputed = name in reads and hasattr(getattr(cache, reads[name]), "output")
        parts[name] = without(part, (INPUTS if recomputed else {}) | unwanted(plan))
    if not plan.below:
        adapted = [name for name in reads if plan.lora and parts[name].adapters]
        if not adapted:
            return None
        end, order = architecture.ENDS[adapted[0]], list(parts)
        parts[end] = without(parts[end], OF_INPUTS)
        kept = {*order[order.index(end) :], *(reads[name] for name in adapted)}
        parts |= dict.fromkeys(parts.keys() - kept)
    return type(cache)(**parts)


class Restored:
    """A block's thin cache, in which each linear map has its input again while it is read."""

    def __init__(self, cache: Any, plan: Plan, architecture: Any) -> None:
        self.cache, self.plan, self.reads = cache, plan, architecture.READS

    def __getattr__(self, name: str) -> Any:
        part = getattr(self.cache, name)
        source: Any = getattr(self.cache, self.reads[name]) if name in self.reads else None
        if not hasattr(source, "output") or not (self.plan.base or part.adapters):
            return part
        x, adapters = source.output(), {}
        for target, adapter in part.adapters.items():
            x_kept, _ = ops.dropout_forward(x, mask=adapter.dropout.mask)
            adapters[target] = adapter._replace(lora=adapter.lora._replace(x=x_kept))
        restored = part._replace(linear=part.linear._replace(x=x), adapters=adapters)
        return wanted(restored, self.plan)


def without_output(block: Tree, last: str) -> Tree:
    """A block with one column of its last map, so that recomputing it takes no time for its y."""
    sublayer = next(name for name, maps in block.items() if last in maps)
    w, b = block[sublayer][last]["w"], block[sublayer][last]["b"]
    return {**block, sublayer: {**block[sublayer], last: {"w": w[:, :1], "b": b[:1]}}}
