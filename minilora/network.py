"""The network of any architecture: embedding, blocks, last norm, head, loss, and all gradients.

Two trees go in: the base, every weight of the architecture, and the adapters, A and B at the same
places. A base may hold a table "head" (V, C); without it the head is tied, that is, logits are
computed with the embedding's table wte. Gradients come back as trees of the same structure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from minilora import gpt2, loss
from minilora.adapters import Adapters, LoRAConfig, placed_adapters
from minilora.backend import Array, to_device
from minilora.errors import MiniloraError
from minilora.keep import Plan, Restored, thin, wanted, without_output
from minilora.lora import AdaptedLinearCache
from minilora.ops import attention_forward, head_forward
from minilora.tree import Tree

AnyNet = TypeVar("AnyNet", bound="Net")
Attend = Callable[..., tuple[Array, Any]]
ARCHITECTURES: dict[type, Any] = {gpt2.GPTConfig: gpt2}  # the module of each: its pairs, its LAYOUT
INFERENCE, LORA = Plan(), Plan(lora=True)


@dataclass(frozen=True)
class Net:
    """A base with its sizes and, where `lora` is not None, an adapter on top.

    Raises MiniloraError for an adapter without its configuration.
    """

    base: Tree
    config: gpt2.GPTConfig
    lora: Tree | None = None
    lora_config: LoRAConfig | None = None

    def __post_init__(self) -> None:
        if self.lora is not None and self.lora_config is None:
            raise MiniloraError("adapters need their lora_config: it holds their scales")

    @property
    def head(self) -> Array:
        """The table (V, C) that logits are computed with."""
        return self.base["head"] if "head" in self.base else self.base["wte"]

    def on(self: AnyNet, device: str) -> AnyNet:
        """The same with its arrays on a device; what lies there already is not copied."""
        lora = None if self.lora is None else to_device(self.lora, device)
        return replace(self, base=to_device(self.base, device), lora=lora)

    def adapters(self, masks: Mapping[str, Array] | None) -> dict[str, Adapters]:
        """Every adapter at its place (see `placed_adapters`), each with its dropout mask."""
        lora, lora_config = self.lora or {}, self.lora_config or LoRAConfig()
        return placed_adapters(lora, lora_config, width=self.config.n_embd, masks=masks)

    @property
    def architecture(self) -> Any:
        """The module that has the pairs of this base's parts."""
        return ARCHITECTURES[type(self.config)]


# --- the trunk: all that lies below the head ---------------------------------------------------


class Checkpoint(NamedTuple):
    """What is kept of a block with recompute: its arguments, and the cache of its last map."""

    x: Array
    block: Tree
    adapters: Adapters
    last: AdaptedLinearCache


class TrunkCache(NamedTuple):
    """What the trunk keeps; of a block its thin cache, a Checkpoint or None, and its plan."""

    net: Net
    embedding: Any
    blocks: list[tuple[Any, Plan]]
    norm: Any


def trunk_forward(
    net: Net,
    *,
    tokens: Array,
    masks: Mapping[str, Array] | None = None,
    plan: Plan = INFERENCE,
    offset: int = 0,
    attends: Sequence[Attend] | None = None,
) -> tuple[Array, TrunkCache]:
    """The model up to its head, (B, T) token ids -> (B, T, C), and what the plan wants kept.

    `masks` are the adapters' dropout masks by LoRA path. The tokens stand at position `offset` and
    on. `attends` are the blocks' attentions where they are others than `attention_forward`. Raises
    MiniloraError for positions beyond n_positions.
    """
    end = offset + tokens.shape[-1]
    if end > net.config.n_positions:
        raise MiniloraError(f"{end} tokens exceed the model's context of {net.config.n_positions}")
    placed = net.adapters(masks)
    adapter = placed[""]["wte"].get("embedding")
    x, embedding = net.architecture.embed_forward(net.base, adapter, tokens=tokens, offset=offset)
    plan = plan._replace(below=plan.base or (plan.lora and adapter is not None))
    blocks = []
    for i in range(net.config.n_layer):
        attend = attention_forward if attends is None else attends[i]
        x, kept = _block_forward(x, net, i, placed[f"blocks.{i}"], plan, attend)
        blocks.append((kept, plan))
        plan = plan._replace(below=kept is not None)
    x, norm = net.architecture.norm_forward(x, net.base, config=net.config)
    norm = wanted(norm, plan) if plan.below else None
    return x, TrunkCache(net, wanted(embedding, plan), blocks, norm)


def trunk_backward(dx: Array, cache: TrunkCache) -> tuple[Tree, Tree]:
    """dbase and dlora of `trunk_forward`; what the plan does not want is None in them."""
    net, embedding, blocks, norm = cache
    dnorm: Tree = {}
    if norm is not None:
        dx, dnorm = net.architecture.norm_backward(dx, norm)
    dblocks: list[Tree] = []
    dlora_blocks: list[Tree] = []
    for kept, plan in reversed(blocks):
        dblock: Tree = {}
        dadapters: Tree = {}
        if kept is not None:
            dx, dblock, dadapters = _block_backward(dx, net, kept, plan)
        dblocks.insert(0, dblock)
        dlora_blocks.insert(0, {name: part for name, part in dadapters.items() if part})
    dembedding, dadapter = {}, {}
    if dx is not None:
        dembedding, dadapter = net.architecture.embed_backward(dx, embedding)
    dlora = {"embedding": dadapter} if dadapter else {}
    return {**dembedding, "blocks": dblocks, **dnorm}, {**dlora, "blocks": dlora_blocks}


def _block_forward(
    x: Array, net: Net, i: int, adapters: Adapters, plan: Plan, attend: Attend
) -> tuple[Array, Any]:
    """y of block i, and what is kept of it; its whole cache is gone on return."""
    block, architecture = net.base["blocks"][i], net.architecture
    y, cache = architecture.block_forward(x, block, adapters, config=net.config, attend=attend)
    kept = thin(cache, plan, architecture)
    if plan.recompute and kept is not None:
        kept = Checkpoint(x, block, adapters, getattr(kept, list(architecture.READS)[-1]))
    return y, kept


def _block_backward(dy: Array, net: Net, kept: Any, plan: Plan) -> tuple[Any, Tree, Tree]:
    """dx, dblock and dadapters of a block, from what was kept of it."""
    architecture, name = net.architecture, list(net.architecture.READS)[-1]
    if isinstance(kept, Checkpoint):
        x, block, adapters, last = kept
        block, adapters = without_output(block, name), {**adapters, name: {}}
        _, kept = architecture.block_forward(
            x, block, adapters, config=net.config, attend=attention_forward
        )
        kept = thin(kept._replace(**{name: last}), plan, architecture)
    return architecture.block_backward(dy, Restored(kept, plan, architecture))


# --- the whole model ---------------------------------------------------------------------------


def net_logits(net: Net, *, tokens: Array, masks: Mapping[str, Array] | None = None) -> Array:
    """Logits of every position, (B, T) token ids -> (B, T, V). Nothing is kept."""
    x, _ = trunk_forward(net, tokens=tokens, masks=masks)
    return head_forward(x, net.head)[0]


def loss_and_grads(
    net: Net,
    *,
    tokens: Array,
    targets: Array,
    plan: Plan = LORA,
    masks: Mapping[str, Array] | None = None,
    ignore_index: int = -100,
    count: int | None = None,
) -> tuple[Array, Tree | None, Tree | None]:
    """The mean loss in nats per counted target, and the gradients that the plan wants.

    loss, dbase, dlora; a tree that is not wanted is None, and a frozen base costs neither memory
    nor products for weight gradients. `count` replaces the number of counted targets as the
    divisor, so that the losses and gradients of a batch's shards add up to the batch's. Raises
    MiniloraError for a plan that wants gradients of adapters that are not there.
    """
    if plan.lora and net.lora is None:
        raise MiniloraError("the plan wants gradients of adapters, but there are none")
    x, trunk = trunk_forward(net, tokens=tokens, masks=masks, plan=plan)
    batch: dict[str, Any] = {"targets": targets, "ignore_index": ignore_index, "count": count}
    head: Any
    if plan.base:
        mean, head = loss.head_loss_forward(x, net.head, **batch)
        dx, dhead = loss.head_loss_backward(1.0, head)
    else:
        mean, head = loss.frozen_head_loss_forward(x, table=net.head, **batch)
        (dx,) = loss.frozen_head_loss_backward(1.0, head)
    del x, head  # what is still needed lies in the trunk's cache
    dbase, dlora = trunk_backward(dx, trunk)
    if plan.base and "head" in net.base:
        dbase = {**dbase, "head": dhead}
    elif plan.base:
        dbase = {**dbase, "wte": dbase["wte"] + dhead}  # [GPT.1] dwte = as input + as head
    return mean, dbase if plan.base else None, dlora if plan.lora else None
