"""What is kept for a backward pass: the only place that knows of freezing and recomputing.

A forward pass keeps all that its gradients are made of. `thin` drops what no wanted gradient needs
and what is cheaper to recompute than to store; `Restored` recomputes that when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from minilora.lora import LoRACache, LoRAEmbeddingCache
from minilora.ops import (
    AffineCache,
    EmbeddingCache,
    HeadCache,
    LinearCache,
    PositionCache,
    dropout_forward,
)
from minilora.tree import Tree


class Plan(NamedTuple):
    """The gradients that are wanted. Without any, as in inference, nothing is kept."""

    base: bool = False  # of the base's weights
    lora: bool = False  # of the adapters' factors
    below: bool = False  # of this block's input, since something below is trained
    recompute: bool = False  # of a block keep the input alone (Chen et al. 2016, §4)


class Layout(NamedTuple):
    """What has to be known of an architecture's block; its cache names the parts in order."""

    reads: Mapping[str, str]  # each linear map, in order: the part whose output it reads
    ends: Mapping[str, str]  # each linear map: the one where a pass ends that has to reach it

    @property
    def last(self) -> str:
        """The last linear map, whose output only the block's y is made of."""
        return list(self.reads)[-1]


Fields: TypeAlias = dict[type[Any], list[str]]
"""Fields by the type of cache, to be None where what is made of them is not wanted."""

WEIGHTS: Fields = {  # the gradients of weights
    LinearCache: ["x"],
    AffineCache: ["x"],
    HeadCache: ["x"],
    EmbeddingCache: ["table"],
    PositionCache: ["wpe"],
}
FACTORS: Fields = {LoRACache: ["x", "h"], LoRAEmbeddingCache: ["h", "A"]}  # those of A and B
INPUTS: Fields = {LinearCache: ["w"], LoRACache: ["A"]}  # those of inputs
RESTORED: Fields = {LinearCache: ["x"], LoRACache: ["x"]}  # and what `Restored` recomputes


def without(cache: Any, fields: Fields) -> Any:
    """A cache, or a dict of caches, in which these fields are None, in all of its parts."""
    if isinstance(cache, dict):
        return {name: without(part, fields) for name, part in cache.items()}
    if not hasattr(cache, "_fields"):
        return cache
    parts = {name: without(getattr(cache, name), fields) for name in cache._fields}
    return cache._replace(**parts | dict.fromkeys(fields.get(type(cache), [])))


def wanted(cache: Any, plan: Plan) -> Any:
    """A cache without what only gradients need that the plan does not want."""
    cache = cache if plan.base else without(cache, WEIGHTS)
    return cache if plan.lora else without(cache, FACTORS)


def thin(cache: Any, plan: Plan, layout: Layout) -> Any:
    """What is kept of a block's cache; None if no wanted gradient lies in the block or below."""
    cache = wanted(cache, plan)
    for name, source in layout.reads.items():
        if hasattr(getattr(cache, source), "output"):
            cache = cache._replace(**{name: without(getattr(cache, name), RESTORED)})
    if plan.below:
        return cache
    adapted = [name for name in layout.reads if plan.lora and getattr(cache, name).adapters]
    if not adapted:
        return None
    end, order = layout.ends[adapted[0]], cache._fields  # below `end` no gradient is wanted
    kept = {*order[order.index(end) :], *(layout.reads[name] for name in adapted)}
    cache = cache._replace(**{end: without(getattr(cache, end), INPUTS)})
    return cache._replace(**dict.fromkeys(set(order) - kept))


class Restored:
    """A block's thin cache, in which each linear map has its input again while it is read."""

    def __init__(self, cache: Any, plan: Plan, layout: Layout) -> None:
        self.cache, self.plan, self.reads = cache, plan, layout.reads

    def __getattr__(self, name: str) -> Any:
        part = getattr(self.cache, name)
        source: Any = getattr(self.cache, self.reads[name]) if name in self.reads else None
        if not hasattr(source, "output") or not (self.plan.base or part.adapters):
            return part
        x, adapters = source.output(), {}
        for target, adapter in part.adapters.items():
            x_kept, _ = dropout_forward(x, mask=adapter.dropout.mask)
            adapters[target] = adapter._replace(lora=adapter.lora._replace(x=x_kept))
        part = part._replace(linear=part.linear._replace(x=x), adapters=adapters)
        return wanted(part, self.plan)


def without_output(block: Tree, last: str) -> Tree:
    """A block with one column of its last map: to recompute what lies before, at no cost for y."""
    return {
        name: {**maps, last: {"w": maps[last]["w"][:, :1], "b": maps[last]["b"][:1]}}
        if last in maps
        else maps
        for name, maps in block.items()
    }
