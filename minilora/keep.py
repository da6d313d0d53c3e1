"""What is kept for a backward pass: the only place that knows of freezing and recomputing.

A forward pass returns all that its gradients are made of. Of a block, `Kept` drops what no wanted
gradient needs and what is cheaper to recompute than to store; it recomputes that when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from minilora import llama_ops, lora, ops
from minilora.adapters import Adapters
from minilora.tree import Tree


class Plan(NamedTuple):
    """The gradients that are wanted. Without any, as in inference, nothing is kept."""

    base: bool = False  # of the base's weights
    lora: bool = False  # of the adapters' factors
    recompute: bool = False  # of a block keep the input alone (Chen et al. 2016, §4)
    end: str | None = None  # the part of a block below which no gradient is wanted


Fields: TypeAlias = dict[type[Any], tuple[str, ...]]  # of caches, by what is made of them
OF_WEIGHTS: Fields = {
    **dict.fromkeys((ops.MatmulCache, ops.LinearCache), ("x",)),
    **dict.fromkeys((ops.AffineCache, llama_ops.ScaleCache, ops.HeadCache), ("x",)),
    ops.EmbeddingCache: ("table",),
    ops.PositionCache: ("wpe",),
}
OF_FACTORS: Fields = {lora.LoRACache: ("x", "h"), lora.LoRAEmbeddingCache: ("h", "A")}
OF_INPUTS: Fields = {ops.MatmulCache: ("w",), ops.LinearCache: ("w",), lora.LoRACache: ("A",)}
INPUTS: Fields = {ops.MatmulCache: ("x",), ops.LinearCache: ("x",), lora.LoRACache: ("x",)}


def without(cache: Any, fields: Fields) -> Any:
    """A cache with these fields None, in itself or in the caches that it is made of."""
    kind = type(cache)
    if kind in fields:
        parts = zip(kind._fields, cache, strict=True)
        return kind(*[None if name in fields[kind] else part for name, part in parts])
    if kind is dict:
        return {name: without(part, fields) for name, part in cache.items()}
    if isinstance(cache, tuple):
        return kind(*[without(part, fields) for part in cache])
    return cache


def unwanted(plan: Plan) -> Fields:
    """The cache fields that only gradients outside the plan need."""
    return ({} if plan.base else OF_WEIGHTS) | ({} if plan.lora else OF_FACTORS)


def ending_at_lowest(plan: Plan, adapters: Adapters, architecture: Any) -> Plan:
    """The plan of a block below which nothing is trained: its pass ends at its lowest adapter."""
    adapted = [name for name in architecture.READS if plan.lora and adapters[name]]
    return plan._replace(end=architecture.ENDS[adapted[0]]) if adapted else Plan()


class Kept(dict[str, Any]):
    """The caches of a block's parts by name: thinned when they are written, restored when read.

    `reads` names each linear map of the block, in order, and the part whose output it reads. Where
    that part has a method `output`, the map's input is not kept but recomputed with it.
    """

    def __init__(self, plan: Plan, reads: Mapping[str, str]) -> None:
        self.plan, self.reads, self.unwanted = plan, reads, unwanted(plan)

    def recompute(self, name: str) -> Any:
        """What recomputes the input of a linear map; None where the input itself is kept."""
        return getattr(self.get(self.reads.get(name, "")), "output", None)

    def __setitem__(self, name: str, part: Any) -> None:
        if not (self.plan.base or self.plan.lora):
            return
        if name == self.plan.end:
            self.clear()
        if self.reads.get(name) not in self.keys() - {self.plan.end}:  # the pass ends here
            part = without(part, OF_INPUTS)
        fields = INPUTS | self.unwanted if self.recompute(name) else self.unwanted
        super().__setitem__(name, without(part, fields))

    def __getitem__(self, name: str) -> Any:
        part, recompute = super().__getitem__(name), self.recompute(name)
        if recompute is None or not (self.plan.base or part.adapters):
            return part
        x, adapters = recompute(), {}
        linear = part.linear._replace(x=x) if self.plan.base else part.linear
        for target, adapter in part.adapters.items() if self.plan.lora else ():
            x_kept, _ = ops.dropout_forward(x, mask=adapter.dropout.mask)
            adapters[target] = adapter._replace(lora=adapter.lora._replace(x=x_kept))
        return part._replace(linear=linear, adapters=part.adapters | adapters)


def without_output(block: Tree, last: str) -> Tree:
    """A block with one column of its last map, so that recomputing it takes no time for its y."""
    sublayer = next(name for name, maps in block.items() if last in maps)
    column = {name: leaf[..., :1] for name, leaf in block[sublayer][last].items()}
    return {**block, sublayer: {**block[sublayer], last: column}}
