"""What a training step needs, by formula: parameters, bytes and FLOPs, for LoRA and in full.

Nothing is allocated here, so the sizes may be GPT-3's. A formula is a text such as "3 N C + N" over
the letters of docs/notation.md, and the same text is evaluated and printed. The table BLOCKS has
what differs between architectures. The functions named `kept_…` list what each pair's cache keeps,
other than parameters, which are there anyway, and token ids, a few bytes a row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from minilora.adapters import ATTENTION_TARGETS, LoRAConfig, adapted_paths, weight_of
from minilora.errors import MiniloraError
from minilora.formats.base import AnyConfig
from minilora.gpt2 import GPTConfig
from minilora.llama import LlamaConfig
from minilora.loss import VOCAB_CHUNK
from minilora.ops import QUERY_TILE, query_tiles
from minilora.settings import LARGEST_COUNT, Settings, check_sizes
from minilora.tiles import TILE
from minilora.workers import Workers, cores

SHAPES: dict[str, AnyConfig] = {
    "tiny": GPTConfig(512, 1024, n_embd=256, n_layer=4, n_head=4),
    "small": GPTConfig(12564, 1024, n_embd=384, n_layer=6, n_head=6),
    "distilgpt2": GPTConfig(n_embd=768, n_layer=6, n_head=12),
    "gpt2": GPTConfig(n_embd=768, n_layer=12, n_head=12),
    "gpt2-medium": GPTConfig(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPTConfig(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPTConfig(n_embd=1600, n_layer=48, n_head=25),
    "gpt3": GPTConfig(50257, 2048, n_embd=12288, n_layer=96, n_head=96),
    "smollm2": LlamaConfig(
        49152, 576, 1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=100000.0,
    ),
}  # fmt: skip
"""Named sizes: two for benchmarks, the GPT-2 family (Radford et al. 2019, table 2), GPT-3 (Brown et
al. 2020, table 2.1), and SmolLM2-135M (Allal et al. 2025), a Llama."""

ITEMSIZE = {"float16": 2, "float32": 4, "float64": 8}


def value_of(formula: str, sizes: Mapping[str, int]) -> int:
    """The value of a sum of products of sizes and whole numbers, such as "3 N C + N"."""
    return sum(
        math.prod(sizes[factor] if factor in sizes else int(factor) for factor in term.split())
        for term in formula.split("+")
    )


def sizes_of(config: AnyConfig) -> dict[str, int]:
    """The sizes of a model, by the letters of docs/notation.md."""
    sizes = {
        "C": config.n_embd, "H": config.n_head, "F": config.inner, "V": config.vocab_size,
        "n_positions": config.n_positions,
    }  # fmt: skip
    if isinstance(config, LlamaConfig):
        return {**sizes, "G": config.num_key_value_heads, "K": config.head_width}
    return {**sizes, "G": config.n_head, "K": config.n_embd // config.n_head}


# --- what differs between architectures ----------------------------------------------------------


class Stored(NamedTuple):
    """One array, or a few, that the cache of a pair keeps, and the formula for their size."""

    pair: str
    keeps: str
    formula: str


class Peak(NamedTuple):
    """What a backward pass allocates at a peak, and the block's weight gradients that then exist.

    Letters beside those of docs/notation.md: E entries of a GELU at a time, Q queries at a time, S
    rows of keys that the last tile of queries but one saw, and J = K / 2 pairs of a head that turn.
    """

    name: str
    allocates: str
    gradients: str


class Block(NamedTuple):
    """The formulas of an architecture: its parameters, what its blocks keep, and their peaks."""

    tables: str  # beside the linear maps and the norms
    norm_weights: str
    maps: dict[str, tuple[str, str]]  # (in, out) of a block's linear maps, in order
    has_biases: bool  # on every map
    norm: Stored  # the normalised input, frozen or not: dx is computed from it [LN.6, RMS.5]
    positions: tuple[Stored, ...]  # once for all blocks
    attention: Stored  # the weights P are recomputed [ATT.4-8]
    activation: Stored  # tanh is recomputed [GELU.4, SWIGLU.3]
    mlp_peak: Peak
    attention_peaks: tuple[Peak, ...]

    @property
    def mlp_maps(self) -> tuple[str, ...]:
        """The linear maps of the MLP, `down` the last."""
        return tuple(name for name in self.maps if name not in ATTENTION_TARGETS)


MLP = {"up": ("C", "F"), "down": ("F", "C")}
BLOCKS: dict[type, Block] = {
    GPTConfig: Block(
        tables="V C + n_positions C",
        norm_weights="2 C",
        maps={"qkv": ("C", "3 C"), "o": ("C", "C"), **MLP},
        has_biases=True,
        norm=Stored("layer norm", "x̂, 1/√(σ² + ε)", "N C + N"),
        positions=(),
        attention=Stored("attention", "q, k, v", "3 N C"),
        activation=Stored("GELU", "x", "N F"),
        mlp_peak=Peak("a GELU's backward", "2 N C + 2 N F + 2 E", "F C"),
        attention_peaks=(Peak("an attention's backward", "10 N C + S C + 3 H Q N", "2 C F + C C"),),
    ),
    LlamaConfig: Block(
        tables="V C",
        norm_weights="C",
        maps={"qkv": ("C", "H K + 2 G K"), "o": ("H K", "C"), "gate": ("C", "F"), **MLP},
        has_biases=False,
        norm=Stored("RMS norm", "x̂, 1/√(mean x² + ε)", "N C + N"),
        positions=(Stored("rotary", "cos, sin", "T K"),),
        attention=Stored("attention", "q, k, v", "N H K + 2 N G K"),
        activation=Stored("SwiGLU", "g, u", "2 N F"),
        mlp_peak=Peak("a gate's backward", "5 N C + 3 N F", "3 C F"),
        attention_peaks=(  # the gradients of g and u, and the two that add up to dh, still exist
            Peak(
                "an attention's backward",
                "5 N C + 2 N F + 2 N H K + 5 N G K + S G K + 3 G Q N",
                "3 C F + H K C",
            ),
            Peak("a rotation's backward", "5 N C + 2 N F + 7 N H J + 11 N G J", "3 C F + H K C"),
        ),
    ),
}


# --- parameters --------------------------------------------------------------------------------


def weight_shapes(config: AnyConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of the linear maps of a block, by name."""
    sizes, maps = sizes_of(config), BLOCKS[type(config)].maps
    return {name: (value_of(n, sizes), value_of(m, sizes)) for name, (n, m) in maps.items()}


def base_parameters(config: AnyConfig, *, tied: bool = True, biased: Collection[str] = ()) -> int:
    """The number of parameters of a base; `tied`: its head has no table of its own.

    `biased` names the linear maps of a Llama's block that have a bias.
    """
    sizes, parts = sizes_of(config), BLOCKS[type(config)]
    norm = value_of(parts.norm_weights, sizes)
    block = 2 * norm + sum(
        n_out * (n_in + (parts.has_biases or name in biased))
        for name, (n_in, n_out) in weight_shapes(config).items()
    )
    tables = parts.tables if tied else f"{parts.tables} + V C"
    return value_of(tables, sizes) + norm + config.n_layer * block


def adapters_on(linear: str) -> tuple[str, ...]:
    """The LoRA paths on a linear map such as `blocks.0.attn.qkv`; q, k and v lie on qkv."""
    parent, _, name = linear.rpartition(".")
    return (linear, *(f"{parent}.{third}" for third in "qkv" if name == "qkv"))


def adapter_shapes(config: AnyConfig, lora_config: LoRAConfig) -> dict[str, tuple[int, int, int]]:
    """(in, R, out) of every adapter by LoRA path: A is (in, R), B (R, out).

    Raises MiniloraError for a target that names nothing, and for a rank above the smaller side of
    its weight.
    """
    sizes, shapes = sizes_of(config), {}
    weights = {**weight_shapes(config), "wte": (config.vocab_size, config.n_embd)}
    widths = sizes["H"] * sizes["K"], sizes["G"] * sizes["K"]
    mlp = BLOCKS[type(config)].mlp_maps
    for path in adapted_paths(lora_config, config.n_layer, mlp=mlp):
        weight, columns = weight_of(path, *widths)
        n_in, n_out = weights[weight.split(".")[-2] if "." in weight else weight]
        n_out = len(range(n_out)[columns])
        rank = lora_config.rank_of(path)
        if rank > min(n_in, n_out):
            raise MiniloraError(
                f"rank {rank} is above the smaller side of {path}, a weight of {n_in} × {n_out}"
            )
        shapes[path] = n_in, rank, n_out
    return shapes


# --- the step to be budgeted -------------------------------------------------------------------


@dataclass(frozen=True)
class Step(Settings):
    """A training step of adapters or, without `lora_config`, of the whole base.

    With `threads` the batch is shared as in `train`; without, it is one call of `loss_and_grads`.
    `tied`: the base's head is its embedding. `recompute` is that of `Plan`. For any device but
    "cpu" the formulas are a GPU's. `biased` is that of `base_parameters`. Raises MiniloraError for
    sizes that cannot be run.
    """

    config: AnyConfig
    lora_config: LoRAConfig | None
    batch: int = 8
    context: int = 128
    dtype: str = "float32"
    threads: int | None = None
    tied: bool = True
    recompute: bool = False
    device: str = "cpu"
    biased: Collection[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "batch", "context", largest=LARGEST_COUNT)
        if self.context > self.config.n_positions:
            raise MiniloraError(
                f"context {self.context} exceeds the model's context of {self.config.n_positions}"
            )

    @property
    def parts(self) -> Block:
        """The formulas of the architecture."""
        return BLOCKS[type(self.config)]

    @property
    def trains_base(self) -> bool:
        """Whether the whole base is trained, without adapters."""
        return self.lora_config is None

    @property
    def dropout(self) -> float:
        """The probability of dropping an entry of an adapter's input."""
        return 0.0 if self.lora_config is None else self.lora_config.dropout

    @cached_property
    def adapters(self) -> dict[str, tuple[int, int, int]]:
        """(in, R, out) of every adapter by LoRA path."""
        return {} if self.lora_config is None else adapter_shapes(self.config, self.lora_config)

    @cached_property
    def base_parameters(self) -> int:
        """The number of parameters of the base."""
        return base_parameters(self.config, tied=self.tied, biased=self.biased)

    @property
    def adapter_parameters(self) -> int:
        """The number of parameters of the adapters."""
        return sum(rank * (n_in + n_out) for n_in, rank, n_out in self.adapters.values())

    @property
    def trainable_parameters(self) -> int:
        """The number of parameters that the step trains."""
        return self.base_parameters if self.trains_base else self.adapter_parameters

    @cached_property
    def lowest(self) -> int:
        """The lowest block that a gradient has to reach; n_layer if there is none."""
        if self.trains_base or "embedding" in self.adapters:
            return 0
        return min(int(path.split(".")[1]) for path in self.adapters)

    def ends_in(self, block: int) -> bool:
        """Whether the backward pass ends in this block, at the lowest adapter's map."""
        reaches_embedding = self.trains_base or "embedding" in self.adapters
        return block == self.lowest and not reaches_embedding

    def reaches_attention(self, block: int) -> bool:
        """Whether the backward pass reaches the attention of a block that it reaches."""
        attention = (f"blocks.{block}.attn.{target}" for target in ATTENTION_TARGETS)
        return not self.ends_in(block) or any(path in self.adapters for path in attention)

    def recomputes_input(self, block: int, linear: str) -> bool:
        """Whether this map's input, a norm's output, is recomputed for an adapter on it."""
        return any(path in self.adapters for path in adapters_on(f"blocks.{block}.{linear}"))

    @property
    def shards(self) -> list[int]:
        """The number of sequences in each pass: the whole batch, or the shards of the threads."""
        if self.threads is None:
            return [self.batch]
        shards = Workers(self.threads, self.device).shards(self.batch, self.context)
        return [shard.stop - shard.start for shard in shards]

    @property
    def queries(self) -> int:
        """How many queries an attention computes at a time."""
        return min(QUERY_TILE, self.context) if self.device == "cpu" else self.context

    @property
    def pairs(self) -> int:
        """How many entries P_ts a head computes per sequence: somewhat more than those of s ≤ t."""
        blocks = query_tiles(self.context, self.queries)
        return sum((t.stop - t.start) * s.stop for t, s in blocks)

    @property
    def passes(self) -> int:
        """How many passes run at once."""
        return 1 if self.threads is None else min(len(self.shards), self.threads or cores())

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the largest pass, by the letters of docs/notation.md."""
        batch, T = max(self.shards), self.context
        return {**sizes_of(self.config), "B": batch, "T": T, "N": batch * T}


# --- the ledger: what caches keep --------------------------------------------------------------


def kept_lora(
    name: str, n_in: str, rank: int, *, dropout: float, recomputed: bool
) -> Iterator[Stored]:
    """h, for dB [LORA.3]; with dropout, the mask [DROP.2]; and the input after it, for dA [LORA.5],
    unless the input is recomputed."""
    if dropout:
        yield Stored(f"dropout {name}", "mask", f"N {n_in}")
    if not recomputed:
        yield Stored(f"LoRA {name}", "x ∘ mask" if dropout else "x", f"N {n_in}")
    yield Stored(f"LoRA {name}", "h", f"N {rank}")


def kept_head_loss(*, frozen: bool) -> Iterator[Stored]:
    """Each row's weight in the mean, and what dx is computed from: Σ p E if the table is frozen
    [HL.3], else x and log Σ exp z, from which the logits are recomputed [HL.4]."""
    if frozen:
        yield Stored("head and loss", "Σ p E, weights", "N C + N")
    else:
        yield Stored("head and loss", "x, log Σ exp, weights", "N C + 2 N")


def kept_adapted_linear(step: Step, path: str, *, recomputed: bool = True) -> Iterator[Stored]:
    """For a linear map such as `blocks.0.attn.qkv` and its adapters: the input, for dW [LIN.3],
    unless W is frozen or the input is recomputed, and what the adapters keep."""
    name = path.rpartition(".")[2]
    n_in, _ = step.parts.maps[name]
    if step.trains_base and not recomputed:
        yield Stored(f"linear {name}", "x", f"N {n_in}")
    for adapter in adapters_on(path):
        if adapter in step.adapters:
            target, rank = adapter.rpartition(".")[2], step.adapters[adapter][1]
            yield from kept_lora(target, n_in, rank, dropout=step.dropout, recomputed=recomputed)


def kept_block(step: Step, block: int) -> Iterator[Stored]:
    """What the parts of a block keep without recompute, in the order of the forward pass.

    If the backward pass ends in this block, the parts below its lowest adapter keep nothing, except
    for the norm from which the adapter's input is recomputed.
    """
    if block < step.lowest:
        return
    path, parts = f"blocks.{block}", step.parts
    *from_norm, down = (f"mlp.{name}" for name in parts.mlp_maps)
    if not step.ends_in(block) or step.recomputes_input(block, "attn.qkv"):
        yield parts.norm
    if step.reaches_attention(block):
        yield from kept_adapted_linear(step, f"{path}.attn.qkv")
        yield parts.attention
        yield from kept_adapted_linear(step, f"{path}.attn.o", recomputed=False)
    if step.reaches_attention(block) or any(step.recomputes_input(block, m) for m in from_norm):
        yield parts.norm
    for name in from_norm:
        yield from kept_adapted_linear(step, f"{path}.{name}")
    yield parts.activation
    yield from kept_adapted_linear(step, f"{path}.{down}")


def kept_with_recompute(step: Step, block: int) -> Iterator[Stored]:
    """With recompute: the block's input, its dropout masks, and the h of an adapter on `down`,
    whose product is not recomputed."""
    lines = list(kept_block(step, block))
    if lines:
        yield Stored("block", "x", "N C")
    yield from (line for line in lines if is_mask(line) or line[:2] == ("LoRA down", "h"))


def keeps_positions(step: Step, block: int) -> bool:
    """Whether a block keeps what it knows of positions, to turn gradients or to be recomputed."""
    return block >= step.lowest and (step.recompute or step.reaches_attention(block))


class LedgerLine(NamedTuple):
    """A line of the ledger, evaluated, and its place.

    That is a block such as `blocks.3`, `embedding`, `positions`, `ln_f` or `head`.
    """

    place: str
    pair: str
    keeps: str
    formula: str
    numbers: int


def ledger(step: Step) -> list[LedgerLine]:
    """Everything that the caches of one pass keep at the end of its forward pass."""
    kept: list[tuple[str, Stored]] = []
    if "embedding" in step.adapters:
        rank = step.adapters["embedding"][1]
        kept += [("embedding", Stored("LoRA embedding", "h", f"N {rank}"))]
    for block in range(step.config.n_layer):
        lines = kept_with_recompute if step.recompute else kept_block
        kept += [(f"blocks.{block}", line) for line in lines(step, block)]
    if any(keeps_positions(step, block) for block in range(step.config.n_layer)):
        kept += [("positions", line) for line in step.parts.positions]
    kept += [("ln_f", step.parts.norm)]
    kept += [("head", line) for line in kept_head_loss(frozen=not step.trains_base)]
    return [LedgerLine(place, *line, value_of(line.formula, step.sizes)) for place, line in kept]


def is_mask(line: Stored | LedgerLine) -> bool:
    """Whether a line is a dropout mask, which is made before the step, for the whole batch."""
    return line.keeps == "mask"


def activation_bytes(step: Step, lines: list[LedgerLine]) -> int:
    """The bytes of these lines of the ledger, in all passes that run at once."""
    largest = max(step.shards)
    return ITEMSIZE[step.dtype] * sum(
        line.numbers * step.batch // largest if is_mask(line)
        else line.numbers * step.passes
        for line in lines
    )  # fmt: skip


# --- the peak ----------------------------------------------------------------------------------


def peaks_of_pass(step: Step) -> dict[str, int]:
    """How many numbers are allocated at the peaks of one pass, by the name of the peak.

    Parameters and the trunk's caches are not counted. The gradients of the base appear one after
    another, from the head to the first block, so most of them exist when the backward pass is in
    the first block.
    """
    full, parts, sizes = step.trains_base, step.parts, step.sizes
    sizes["Y"] = min(sizes["V"], VOCAB_CHUNK)  # logits at a time; the last chunk still exists
    sizes["Z"] = min(sizes["V"], 2 * VOCAB_CHUNK)
    sizes["E"] = min(TILE, sizes["N"] * sizes["F"])  # entries of a GELU at a time
    sizes["Q"], sizes["J"] = step.queries, sizes["K"] // 2
    sizes["S"] = sizes["B"] * max(0, step.context - step.queries)  # keys of the last tile but one

    def count(formula: str, gradients: str = "0") -> int:
        return value_of(f"{formula} + {gradients}" if full else formula, sizes)

    def at(peak: Peak) -> dict[str, int]:
        return {peak.name: there + count(peak.allocates, peak.gradients) + full * above}

    above = value_of(f"V C + {parts.norm_weights}", sizes)  # gradients, and those of blocks above
    above += (step.config.n_layer - 1) * sum(n * m for n, m in weight_shapes(step.config).values())
    recomputed = 0
    if step.recompute:
        recomputed = max(recomputed_cache(step, block) for block in range(step.config.n_layer))
    there = recomputed + step.adapter_parameters  # the adapters' gradients
    found = {
        "the loss": max(count("N Z"), count("N Y + N C")) + count("2 N C + N", "N C + N + V C")
    }
    found |= at(parts.mlp_peak)
    if any(path.endswith("mlp.down") for path in step.adapters):
        found["a down's backward"] = count(f"2 N C + {4 if step.dropout else 3} N F") + there
    if any(step.reaches_attention(block) for block in range(step.lowest, step.config.n_layer)):
        for peak in parts.attention_peaks:
            found |= at(peak)
    if full:
        tables = max(count("2 N C + V C"), count("N C + 2 V C")) if step.tied else 0
        found["the embedding's backward"] = step.base_parameters + tables
    return found


def recomputed_cache(step: Step, block: int) -> int:
    """With recompute, how many numbers a block's cache holds only during its backward pass."""
    kept = list(kept_with_recompute(step, block))
    lines = (line for line in kept_block(step, block) if line not in kept)
    return sum(value_of(line.formula, step.sizes) for line in lines)


def peaks(step: Step) -> dict[str, int]:
    """The bytes allocated at the peaks of a step, by the name of the peak.

    Weights, adapters and AdamW's moments are not counted. Threads are assumed to reach the same
    peak together, which is the worst case.
    """
    itemsize, trained = ITEMSIZE[step.dtype], step.trainable_parameters
    kept = activation_bytes(step, [line for line in ledger(step) if line.place != "head"])
    if len(step.shards) > 1:  # the sum of the gradients, and the last ones added to it
        kept += 2 * itemsize * trained
    found = {
        place: kept + itemsize * step.passes * numbers
        for place, numbers in peaks_of_pass(step).items()
    }
    table = step.config.vocab_size * step.config.n_embd if step.trains_base else 0
    # The gradients, and the new parameters, m and v; or, at first, the table's and its temporaries.
    found["the update"] = itemsize * (trained + max(3 * trained, 4 * table))
    return found


# --- FLOPs -------------------------------------------------------------------------------------


class Flops(NamedTuple):
    """Floating-point operations of a step's matrix products, two for each multiply-and-add."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Of both passes."""
        return self.forward + self.backward


def flops(step: Step) -> Flops:
    """The FLOPs of the whole batch. A product y = x W of N rows takes 2 N I O.

    In the backward pass dx takes as many, and so does dW if W is trained. If the head is frozen its
    dx is computed with the loss, in the forward pass; otherwise the logits are recomputed.
    Element-wise work is not counted.
    """
    config, N = step.config, step.batch * step.context
    head = 2 * N * config.n_embd * config.vocab_size
    forward, backward = (head, 3 * head) if step.trains_base else (2 * head, 0)
    for block in range(config.n_layer):
        there = block_flops(step, block)
        forward += there.forward
        backward += there.backward
    if "embedding" in step.adapters:
        _, rank, n_out = step.adapters["embedding"]
        forward += 2 * N * rank * n_out
        backward += 4 * N * rank * n_out
    return Flops(forward, backward)


def block_flops(step: Step, block: int) -> Flops:
    """The FLOPs of one block; below the lowest adapter there is no backward pass."""
    config, N = step.config, step.batch * step.context
    shapes = weight_shapes(config)
    weights = {name: 2 * N * n_in * n_out for name, (n_in, n_out) in shapes.items()}
    sizes = sizes_of(config)
    attention = 2 * step.batch * step.pairs * sizes["H"] * sizes["K"]  # each of its products
    adapters = {
        path.rpartition(".")[2]: (2 * N * rank * n_in, 2 * N * rank * n_out)
        for path, (n_in, rank, n_out) in step.adapters.items()
        if path.startswith(f"blocks.{block}.")
    }
    forward = sum(weights.values()) + 2 * attention + sum(map(sum, adapters.values()))
    if block < step.lowest:
        return Flops(forward, 0)
    backward = (2 if step.trains_base else 1) * sum(weights.values())  # dx, dW
    backward += 5 * attention + 2 * sum(map(sum, adapters.values()))
    if step.recompute:  # of its last map one column, and not the adapter on it
        backward += forward - weights["down"] + 2 * N * config.inner
        backward -= sum(adapters.get("down", ()))
    if step.ends_in(block):
        backward -= weights["qkv"]  # its dx, which nothing below needs
        if step.reaches_attention(block):
            backward -= sum(products[0] for name, products in adapters.items() if name in "qkv")
        else:
            backward -= 5 * attention + weights["o"]
            for name in step.parts.mlp_maps[:-1]:
                backward -= weights[name] + adapters.get(name, (0, 0))[0]
    return Flops(forward, backward)


# --- figures -----------------------------------------------------------------------------------


def figures_of(step: Step) -> dict[str, int]:
    """The figures that --json writes; `peak_bytes` is everything allocated at the largest peak."""
    itemsize = ITEMSIZE[step.dtype]
    weights, adapters = itemsize * step.base_parameters, itemsize * step.adapter_parameters
    trained = itemsize * step.trainable_parameters
    cost = flops(step)
    return {
        "trainable_parameters": step.trainable_parameters,
        "base_parameters": step.base_parameters,
        "adapter_bytes": adapters,
        "weights_bytes": weights,
        "gradients_bytes": trained,
        "optimizer_bytes": 2 * trained,
        "activations_bytes": activation_bytes(step, ledger(step)),
        "peak_bytes": weights + adapters + 2 * trained + max(peaks(step).values()),
        "forward_flops": cost.forward,
        "backward_flops": cost.backward,
    }


# --- the table that `minilora budget` prints ---------------------------------------------------


def scaled(value: float, unit: str) -> str:
    """Four digits and a decimal prefix: 37.75 MB, 3.501 TFLOP."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if value < 999.95 or prefix == "E":
            break
        value /= 1000
    digits = 0 if not prefix else max(0, 3 - len(str(int(value))) + 1)
    return f"{value:.{digits}f} {prefix}{unit}"


def aligned(label: str, *cells: str) -> str:
    """A line of the table: a label and right-aligned cells."""
    return f"{label:<38}" + "".join(f" {cell:>18}" for cell in cells)


HEADER = ("LoRA", "full")
BYTES = {
    "weights": "weights_bytes",
    "adapters": "adapter_bytes",
    "gradients": "gradients_bytes",
    "AdamW's moments": "optimizer_bytes",
    "activations": "activations_bytes",
    "peak": "peak_bytes",
}


def budget_lines(name: str, lora: Step, full: Step) -> Iterator[str]:
    """The lines of the table: LoRA beside full fine-tuning, then the ledger."""
    config, lora_config = lora.config, lora.lora_config
    assert lora_config is not None
    G = lora.sizes["G"]
    shared = "" if config.n_head == G else f" ({G} of k and v)"
    yield (
        f"{name}: {config.n_layer} blocks, width {config.n_embd}, {config.n_head} heads"
        f"{shared}, vocabulary {config.vocab_size:,}"
    )
    yield (
        f"a step of {lora.batch} × {lora.context} tokens in {lora.dtype}; "
        f"LoRA of rank {lora_config.rank} on {', '.join(lora_config.targets)}"
    )
    if len(lora.shards) > 1:
        yield (
            f"shared: {len(lora.shards)} passes of up to {max(lora.shards)} sequences, "
            f"{lora.passes} of them at once"
        )
    steps, found = (lora, full), (figures_of(lora), figures_of(full))
    yield "\n" + aligned("", *HEADER)
    for key in ("base_parameters", "trainable_parameters"):
        yield aligned(key.replace("_", " "), *(f"{x[key]:,}" for x in found))
    yield aligned(
        "  of the base", *(f"{x['trainable_parameters'] / x['base_parameters']:.3%}" for x in found)
    )
    for label, key in BYTES.items():
        yield aligned(label, *(scaled(x[key], "B") for x in found))
    yield aligned("  during", *(largest_peak(step) for step in steps))
    for key in ("forward_flops", "backward_flops"):
        yield aligned(key.replace("_flops", ""), *(scaled(x[key], "FLOP") for x in found))
    yield aligned("  in all", *(scaled(flops(step).total, "FLOP") for step in steps))

    yield "\n" + aligned("what caches keep, N = B T", "formula", *HEADER)
    for (what, formula), amounts in compared(steps, lambda e: (f"{e.pair}: {e.keeps}", e.formula)):
        yield aligned(what, formula, *amounts)
    yield "\n" + aligned("the same by layer", *HEADER)
    by_layer = compared(steps, lambda e: e.place)
    for amounts, places in itertools.groupby(by_layer, key=lambda found: found[1]):
        first, *others = (place for place, _ in places)
        yield aligned(f"each of {first} to {others[-1]}" if others else first, *amounts)


def compared(
    steps: tuple[Step, Step], key: Callable[[LedgerLine], Any]
) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """The bytes of LoRA and of full by a key of the ledger's lines; full's order, then LoRA's."""
    lora, full = (ledger(step) for step in steps)
    for value in dict.fromkeys(map(key, full + lora)):
        yield (
            value,
            tuple(
                scaled(activation_bytes(step, [e for e in entries if key(e) == value]), "B")
                for step, entries in zip(steps, (lora, full), strict=True)
            ),
        )


def largest_peak(step: Step) -> str:
    """The name of the largest peak of a step."""
    found = peaks(step)
    return max(found, key=lambda place: found[place])


# --- other shapes ------------------------------------------------------------------------------


FIELDS: dict[type, tuple[str, str, str, str]] = {
    GPTConfig: ("n_layer", "n_embd", "n_head", "vocab_size"),
    LlamaConfig: ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"),
}


def resized(
    config: AnyConfig,
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    vocabulary: int | None = None,
) -> AnyConfig:
    """The configuration with the given sizes in place of its own.

    Raises MiniloraError for impossible sizes, which it calls by GPT-2's names.
    """
    fields = FIELDS[type(config)]
    given = zip(fields, (layers, width, heads, vocabulary), strict=True)
    changes: dict[str, Any] = {name: size for name, size in given if size is not None}
    try:
        return replace(config, **changes)
    except MiniloraError as error:
        message = str(error)
        for name, known in zip(fields, FIELDS[GPTConfig], strict=True):
            message = message.replace(name, known)
        raise MiniloraError(message) from None


def read_shape(folder: str | Path) -> tuple[AnyConfig, bool, set[str]]:
    """The sizes in a folder's config.json, whether its head is tied, and its maps with a bias.

    Raises MiniloraError as `load_base` does; weights are not read and need not exist.
    """
    from minilora.formats.base import CONFIG, LAYOUT_OF, is_tied, read_config
    from minilora.formats.files import read_json

    path = Path(folder) / CONFIG
    document = read_json(path)
    config = read_config(document, path)
    table = LAYOUT_OF[type(config)].tensor_table(resized(config, layers=1), document)
    biases = [stored.path.split(".") for stored in table.values() if stored.path.endswith(".b")]
    biased = {"qkv" if name in "qkv" else name for *_, name, _ in biases}
    return config, is_tied(document, path), biased & BLOCKS[type(config)].maps.keys()
