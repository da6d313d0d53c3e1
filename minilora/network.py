"""The network of any architecture: embedding, blocks, last norm, head, loss, and all gradients.

Two trees go in: the base, every weight of the architecture, and the adapters, A and B at the same
places. A base without a table "head" (V, C) is tied: logits are computed with the embedding's
table wte. Gradients come back as trees of the same structure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from minilora import gpt2, llama, loss
from minilora.adapters import Adapters, LoRAConfig, placed_adapters, qkv_widths
from minilora.backend import Array, check_ids, to_device
from minilora.errors import MiniloraError
from minilora.keep import Kept, Plan, ending_at_lowest, unwanted, without, without_output
from minilora.lora import AdaptedLinearCache
from minilora.ops import Attend, Gradient, attention_forward, head_forward
from minilora.tree import Tree

AnyNet = TypeVar("AnyNet", bound="Net")
ARCHITECTURES: dict[type, Any] = {gpt2.GPTConfig: gpt2, llama.LlamaConfig: llama}
INFERENCE, LORA = Plan(), Plan(lora=True)


@dataclass(frozen=True)
class Net:
    """A base with its sizes and perhaps adapters; MiniloraError where these lack `lora_config`."""

    base: Tree = field(repr=False)
    config: gpt2.GPTConfig | llama.LlamaConfig
    lora: Tree | None = field(default=None, repr=False)
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
        return placed_adapters(lora, lora_config, qkv_widths(self.base), masks=masks)

    @property
    def architecture(self) -> Any:
        """The module of the base's architecture, for its pairs and for what `keep` must know."""
        return ARCHITECTURES[type(self.config)]


# --- the trunk, which is all below the head, then the whole ------------------------------------


class Checkpoint(NamedTuple):
    """What is kept of a block with recompute: its arguments, and the cache of its last map."""

    x: Array
    block: Tree
    adapters: Adapters
    constants: dict[str, Any]
    last: AdaptedLinearCache


class TrunkCache(NamedTuple):
    """What the trunk keeps; of a part that no backward pass reaches, None."""

    net: Net
    embedding: Any
    blocks: list[Kept | Checkpoint | None]
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
    MiniloraError for positions beyond n_positions, and on a CPU for ids outside the vocabulary.
    """
    check_ids(tokens, net.config.vocab_size)
    if (end := offset + tokens.shape[-1]) > net.config.n_positions:
        raise MiniloraError(f"{end} tokens exceed the model's context of {net.config.n_positions}")
    placed, architecture = net.adapters(masks), net.architecture
    adapter = placed[""]["wte"].get("embedding")
    x, embedding = architecture.embed_forward(net.base, adapter, tokens=tokens, offset=offset)
    positions = architecture.positions(net.config, tokens.shape[-1], offset=offset, like=x)
    below = plan.base or (plan.lora and adapter is not None)
    blocks = []
    for i, block in enumerate(net.base["blocks"]):
        adapters = {name: placed[f"blocks.{i}"][name] for name in architecture.READS}
        attend = attention_forward if attends is None else attends[i]
        block_plan = plan if below else ending_at_lowest(plan, adapters, architecture)
        constants = {"plan": block_plan, **positions}
        x, kept = _block_forward(x, block, adapters, net, attend, constants)
        blocks.append(kept)
        below = kept is not None
    x, norm = architecture.norm_forward(x, net.base, config=net.config)
    norm = without(norm, unwanted(plan)) if below else None
    return x, TrunkCache(net, without(embedding, unwanted(plan)), blocks, norm)


def trunk_backward(dx: Gradient, cache: TrunkCache) -> tuple[Tree, Tree]:
    """dbase and dlora of `trunk_forward`; what the plan does not want is None in them."""
    net, embedding, blocks, norm = cache
    dblocks: list[Tree] = []
    dlora_blocks: list[Tree] = []
    dx, dnorm = (dx, {}) if norm is None else net.architecture.norm_backward(dx, norm)
    for kept in reversed(blocks):
        dx, dblock, dadapters = (dx, {}, {}) if kept is None else _block_backward(dx, net, kept)
        dblocks.insert(0, dblock)
        dlora_blocks.insert(0, {name: part for name, part in dadapters.items() if part})
    dembedding, dadapter = net.architecture.embed_backward(dx, embedding)
    dlora = {"embedding": dadapter} if dadapter else {}
    return {**dembedding, "blocks": dblocks, **dnorm}, {**dlora, "blocks": dlora_blocks}


def _block_forward(
    x: Array, block: Tree, adapters: Adapters, net: Net, attend: Attend, constants: dict[str, Any]
) -> tuple[Array, Kept | Checkpoint | None]:
    """y of a block, and what is kept of it."""
    y, cache = net.architecture.block_forward(
        x, block, adapters, config=net.config, attend=attend, **constants
    )
    if constants["plan"].recompute:
        last = cache.get(net.architecture.LAST)
        return y, Checkpoint(x, block, adapters, constants, last)
    return y, cache or None


def _block_backward(dy: Gradient, net: Net, kept: Kept | Checkpoint) -> tuple[Gradient, Tree, Tree]:
    """dx, dblock and dadapters of a block, from what was kept of it."""
    architecture, last = net.architecture, net.architecture.LAST
    if isinstance(kept, Checkpoint):
        x, block, adapters, constants, last_part = kept
        block, adapters = without_output(block, last), {**adapters, last: {}}
        constants = {"config": net.config, "attend": attention_forward, **constants}
        cache: Kept = architecture.block_forward(x, block, adapters, **constants)[1]
        cache.update({last: last_part})
        return architecture.block_backward(dy, cache)
    return architecture.block_backward(dy, kept)


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

    loss, dbase, dlora; an unwanted tree is None, and a frozen base costs neither memory nor
    products for weight gradients. `count` replaces the number of counted targets as the divisor, so
    that a batch's shards add up to the batch. Raises MiniloraError for wanted adapters that are not
    there, targets not of the tokens' shape and, on a CPU, ids outside the vocabulary.
    """
    if plan.lora and net.lora is None:
        raise MiniloraError("the plan wants gradients of adapters, but there are none")
    if targets.shape != tokens.shape:
        raise MiniloraError(f"targets are of shape {targets.shape}, tokens of {tokens.shape}")
    check_ids(targets, net.config.vocab_size, name="target", ignored=ignore_index)
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
