"""The register of every forward/backward pair, and the table that `minilora gradcheck` prints.

A row gives the shapes of a pair's arguments and makes its constants from a random generator, so the
table and the property tests share one register: a new pair needs one line here. Everything is
float64.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from minilora import keep, llama_ops, loss, ops
from minilora.adapters import TARGETS, LoRAConfig, dropout_mask, dropout_masks, lora_init
from minilora.backend import Array, to_device, to_host
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.gradcheck import Check, check_pair, check_tree, max_error
from minilora.keep import Plan
from minilora.llama import LlamaConfig, llama_init
from minilora.lora import (
    lora_backward,
    lora_embedding_backward,
    lora_embedding_forward,
    lora_forward,
)
from minilora.network import Net, loss_and_grads, net_logits
from minilora.tiles import TILE
from minilora.tree import Tree, flatten, map_leaves


class Sizes(NamedTuple):
    """Sizes for the shapes of a pair's arguments; `lead` holds the leading dimensions."""

    lead: tuple[int, ...] = (2, 3)
    C: int = 4
    O: int = 3
    R: int = 2
    V: int = 5
    H: int = 2

    def shape(self, letters: str) -> tuple[int, ...]:
        """The shape that a signature such as "...C" means: `...` is lead, letters are sizes."""
        sizes = {
            **self._asdict(),
            "B": math.prod(self.lead[:-1]),
            "T": self.lead[-1],
            "P": self.lead[-1] + 2,  # more positions than are used
            "Q": 3 * self.H * self.C,  # fused projections: q, k and v of H heads of width C
            "U": 4 * self.H * self.C,  # of 2 H heads of q, and H of k and of v
            "D": 6 * self.H * self.C,  # q, k and v of H heads of the even width 2C
        }
        lead = self.lead if letters.startswith("...") else ()
        return (*lead, *(sizes[letter] for letter in letters.removeprefix("...")))


Constants = Callable[[np.random.Generator, Sizes], dict[str, Any]]


class Pair(NamedTuple):
    """A forward/backward pair and how to call it.

    `arguments` gives the shape of each argument (see `Sizes.shape`), and `constants` makes the
    keyword arguments. `dropped` names the fields of the cache that are None in the backward pass
    (see `keep`), `frozen` the arguments that then have no gradient. Rows with larger `sizes`, which
    exceed a tile or a chunk, compare only `entries` entries of each argument.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    arguments: tuple[str, ...]
    constants: Constants = lambda rng, s: {}
    dropped: keep.Fields = {}
    frozen: tuple[str, ...] = ()
    sizes: Sizes = Sizes()
    entries: int | None = None

    def make(
        self, rng: np.random.Generator, sizes: Sizes | None = None
    ) -> tuple[list[Array], dict[str, Any]]:
        """Random arguments and constants for one call, float64."""
        sizes = sizes or self.sizes
        arguments = [rng.standard_normal(sizes.shape(letters)) for letters in self.arguments]
        return arguments, self.constants(rng, sizes)

    def thin(self, cache: Any) -> Any:
        """The cache without its dropped fields."""
        return keep.without(cache, self.dropped)


def _constant(**constants: Any) -> Constants:
    return lambda rng, s: constants


def _angles(rng: np.random.Generator, s: Sizes) -> dict[str, Any]:
    angle = rng.standard_normal((s.lead[-1], 1, s.C))
    return {"cos": np.cos(angle), "sin": np.sin(angle), "heads": 2 * s.H}


def _index(rng: np.random.Generator, s: Sizes) -> dict[str, Any]:
    return {"index": rng.integers(s.V, size=s.lead)}


def _mask(rng: np.random.Generator, s: Sizes) -> dict[str, Any]:
    return {"mask": dropout_mask(rng, s.shape("...C"), 0.4, np.float64)}


def _targets(rng: np.random.Generator, s: Sizes) -> dict[str, Any]:
    return {"targets": rng.integers(s.V, size=s.lead)}


def _some_targets(rng: np.random.Generator, s: Sizes) -> dict[str, Any]:
    targets = rng.integers(s.V, size=s.lead)
    return {"targets": np.where(rng.random(s.lead) < 0.3, -1, targets), "ignore_index": -1}


def _frozen_loss(rng: np.random.Generator, s: Sizes) -> dict[str, Any]:
    return {"table": rng.standard_normal(s.shape("VC")), **_some_targets(rng, s)}


def _scaled(rng: np.random.Generator, s: Sizes) -> dict[str, Any]:
    return {"scale": 8.0 / s.R}


MATMUL = (ops.matmul_forward, ops.matmul_backward, ("...C", "CO"))
LINEAR = (ops.linear_forward, ops.linear_backward, ("...C", "CO", "O"))
EMBEDDING = (ops.embedding_forward, ops.embedding_backward, ("VC",), _index)
POSITION = (ops.position_forward, ops.position_backward, ("...C", "PC"), _constant(offset=1))
AFFINE = (ops.affine_forward, ops.affine_backward, ("...C", "C", "C"))
# A large ε, so that its place in the equation matters and rows of nearly equal entries stay smooth.
NORMALISE = (ops.normalise_forward, ops.normalise_backward, ("...C",), _constant(eps=0.1))
LAYER_NORM = (
    ops.layer_norm_forward, ops.layer_norm_backward, ("...C", "C", "C"), _constant(eps=0.1)
)  # fmt: skip
RMS_NORMALISE = (
    llama_ops.rms_normalise_forward, llama_ops.rms_normalise_backward, ("...C",), _constant(eps=0.1)
)  # fmt: skip
SCALE = (llama_ops.scale_forward, llama_ops.scale_backward, ("...C", "C"))
RMS_NORM = (
    llama_ops.rms_norm_forward, llama_ops.rms_norm_backward, ("...C", "C"), _constant(eps=0.1)
)  # fmt: skip
GELU = (ops.gelu_forward, ops.gelu_backward, ("...C",))
ATTENTION = (ops.attention_forward, ops.attention_backward, ("BTQ",), lambda rng, s: {"heads": s.H})
GROUPED_ATTENTION = (
    ops.attention_forward, ops.attention_backward, ("BTU",),
    lambda rng, s: {"heads": 2 * s.H, "kv_heads": s.H},
)  # fmt: skip
HEAD = (ops.head_forward, ops.head_backward, ("...C", "VC"))
CROSS_ENTROPY = (loss.cross_entropy_forward, loss.cross_entropy_backward, ("...V",))
HEAD_LOSS = (loss.head_loss_forward, loss.head_loss_backward, ("...C", "VC"), _targets)
FROZEN_HEAD_LOSS = (
    loss.frozen_head_loss_forward, loss.frozen_head_loss_backward, ("...C",), _frozen_loss
)  # fmt: skip
LORA = (lora_forward, lora_backward, ("...C", "CR", "RO"))
LORA_EMBEDDING = (
    lora_embedding_forward, lora_embedding_backward, ("VR", "RC"),
    lambda rng, s: {**_scaled(rng, s), **_index(rng, s)},
)  # fmt: skip
TWO_TILES = Sizes(lead=(1, ops.QUERY_TILE + 2), C=2, H=1)
TWO_CHUNKS = Sizes(lead=(3,), C=2, V=loss.VOCAB_CHUNK + 2)

PAIRS: dict[str, Pair] = {
    "matmul": Pair(*MATMUL),
    "matmul, frozen": Pair(*MATMUL, dropped=keep.OF_WEIGHTS, frozen=("w",)),
    "matmul, no dx": Pair(*MATMUL, dropped=keep.OF_INPUTS, frozen=("x",)),
    "linear": Pair(*LINEAR),
    "linear, frozen": Pair(*LINEAR, dropped=keep.OF_WEIGHTS, frozen=("w", "b")),
    "linear, no dx": Pair(*LINEAR, dropped=keep.OF_INPUTS, frozen=("x",)),
    "embedding": Pair(*EMBEDDING),
    "embedding, frozen": Pair(*EMBEDDING, dropped=keep.OF_WEIGHTS, frozen=("table",)),
    "position": Pair(*POSITION),
    "position, frozen": Pair(*POSITION, dropped=keep.OF_WEIGHTS, frozen=("wpe",)),
    "normalise": Pair(*NORMALISE),
    "affine": Pair(*AFFINE),
    "affine, frozen": Pair(*AFFINE, dropped=keep.OF_WEIGHTS, frozen=("w", "b")),
    "layer norm": Pair(*LAYER_NORM),
    "layer norm, frozen": Pair(*LAYER_NORM, dropped=keep.OF_WEIGHTS, frozen=("w", "b")),
    "rms normalise": Pair(*RMS_NORMALISE),
    "scale": Pair(*SCALE),
    "scale, frozen": Pair(*SCALE, dropped=keep.OF_WEIGHTS, frozen=("w",)),
    "rms norm": Pair(*RMS_NORM),
    "rms norm, frozen": Pair(*RMS_NORM, dropped=keep.OF_WEIGHTS, frozen=("w",)),
    "gelu": Pair(*GELU),
    "gelu, two tiles": Pair(*GELU, sizes=Sizes(lead=(TILE + 2,), C=1), entries=20),
    "swiglu": Pair(llama_ops.swiglu_forward, llama_ops.swiglu_backward, ("...C", "...C")),
    "rotary": Pair(llama_ops.rotary_forward, llama_ops.rotary_backward, ("BTD",), _angles),
    "softmax": Pair(ops.softmax_forward, ops.softmax_backward, ("...C",)),
    "attend": Pair(
        ops.attend_forward,
        ops.attend_backward,
        ("HTC", "HTC", "HTC"),
        lambda rng, s: {"mask": ops.causal_mask(s.lead[-1], np.zeros(0))},
    ),
    "attention": Pair(*ATTENTION),
    "attention, two tiles": Pair(*ATTENTION, sizes=TWO_TILES, entries=40),
    "grouped attention": Pair(*GROUPED_ATTENTION),
    "grouped attention, two tiles": Pair(*GROUPED_ATTENTION, sizes=TWO_TILES, entries=40),
    "head": Pair(*HEAD),
    "head, frozen": Pair(*HEAD, dropped=keep.OF_WEIGHTS, frozen=("table",)),
    "cross-entropy": Pair(*CROSS_ENTROPY, _targets),
    "cross-entropy, targets ignored": Pair(*CROSS_ENTROPY, _some_targets),
    "cross-entropy, count given": Pair(
        *CROSS_ENTROPY, lambda rng, s: {**_some_targets(rng, s), "count": 7}
    ),
    "head and loss": Pair(*HEAD_LOSS),
    "head and loss, two chunks": Pair(*HEAD_LOSS, sizes=TWO_CHUNKS, entries=20),
    "head and loss, frozen": Pair(*FROZEN_HEAD_LOSS),
    "head and loss, frozen, two chunks": Pair(*FROZEN_HEAD_LOSS, sizes=TWO_CHUNKS),
    "dropout": Pair(ops.dropout_forward, ops.dropout_backward, ("...C",), _mask),
    "lora": Pair(*LORA, _scaled),
    "lora, frozen": Pair(*LORA, _scaled, dropped=keep.OF_FACTORS, frozen=("A", "B")),
    "lora, no dx": Pair(*LORA, _scaled, dropped=keep.OF_INPUTS, frozen=("x",)),
    "lora, rank-stabilised": Pair(*LORA, lambda rng, s: {"scale": 8.0 / math.sqrt(s.R)}),
    "lora, embedding": Pair(*LORA_EMBEDDING),
    "lora, embedding, frozen": Pair(*LORA_EMBEDDING, dropped=keep.OF_FACTORS, frozen=("A", "B")),
}


# Derivation pages that are not named after the pair.
PAGES = {
    "matmul": "linear",
    "position": "embedding",
    "normalise": "layer_norm",
    "affine": "layer_norm",
    "rms normalise": "rms_norm",
    "scale": "rms_norm",
    "softmax": "attention",
    "attend": "attention",
    "grouped attention": "attention",
    "cross-entropy": "head",
    "head and loss": "head",
}


def page_of(name: str) -> str:
    """The derivation page of a pair, or of another row of the table, by its name."""
    first = name.split(",")[0]
    return f"docs/derivations/{PAGES.get(first, first.replace(' ', '_'))}.md"


class Batch(NamedTuple):
    """The arguments of `loss_and_grads` other than the net and the plan: ids (B, T), and masks."""

    tokens: Array
    targets: Array
    masks: Mapping[str, Array] | None


def tiny_model(*, seed: int = 0) -> tuple[Net, Batch]:
    """Two small blocks of GPT-2, an adapter on every target with B not zero, and a batch for it."""
    config = GPTConfig(7, 5, n_embd=4, n_layer=2, n_head=2, n_inner=6, layer_norm_epsilon=0.1)
    base = gpt_init(config, seed=seed, dtype=np.float64)
    return _with_adapters(config, base, TARGETS, seed)


def tiny_llama(*, seed: int = 0) -> tuple[Net, Batch]:
    """Two small blocks of a Llama, two heads of q to each of k and v, with as many adapters."""
    config = LlamaConfig(
        vocab_size=7, hidden_size=4, intermediate_size=6, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=2, max_position_embeddings=5,
        rms_norm_eps=0.1,
    )  # fmt: skip
    base = llama_init(config, seed=seed, dtype=np.float64)
    return _with_adapters(config, base, (*TARGETS, "gate"), seed)


def _with_adapters(
    config: GPTConfig | LlamaConfig, base: Tree, adapted: tuple[str, ...], seed: int
) -> tuple[Net, Batch]:
    rng = np.random.default_rng(seed)
    lora_config = LoRAConfig(
        rank=2, alpha=1.0, targets=adapted, dropout=0.3, rank_pattern={"up": 1, "1.attn.q": 3}
    )

    def moved(x: Array) -> Array:
        return x + 0.3 * rng.standard_normal(x.shape)

    base = map_leaves(moved, base)
    lora = map_leaves(moved, lora_init(base, lora_config, seed=seed))
    tokens = rng.integers(config.vocab_size, size=(2, 4))
    targets = rng.integers(config.vocab_size, size=(2, 4))
    targets[1, 0] = -100
    masks = dropout_masks(lora, lora_config, rng=rng, shape=(2, 4))
    return Net(base, config, lora, lora_config), Batch(tokens, targets, masks)


def check_model(
    net: Net,
    batch: Batch,
    plan: Plan,
    *,
    seed: int = 0,
    entries: int | None = None,
    device: str = "cpu",
) -> list[Check]:
    """Compares the gradients of a whole model with central differences of its loss, leaf by leaf.

    Arrays are given on the host, trees in float64; the model computes on `device`. `entries` limits
    the entries compared per leaf. Raises `GradientError` as `check_tree` does.
    """
    net, batch = net.on(device), Batch(*_moved(list(batch), device))
    _, *gradients = loss_and_grads(net, **batch._asdict(), plan=plan)
    given = {name: g for name, g in zip(("base", "lora"), gradients, strict=True) if g is not None}
    trained = {name: getattr(net, name) for name in given}

    def loss_of(flat: dict[str, Array]) -> float:
        leaves = iter(flat.values())
        moved = map_leaves(lambda _: to_device(next(leaves), device), trained)
        logits = net_logits(replace(net, **moved), tokens=batch.tokens, masks=batch.masks)
        return float(loss.cross_entropy_forward(logits, targets=batch.targets)[0])

    return check_tree(
        loss_of, flatten(to_host(trained)), flatten(to_host(given)), seed=seed, entries=entries
    )


class Row(NamedTuple):
    """One line of the table."""

    name: str
    error: float  # the largest relative error
    entries: int  # entries compared
    seconds: float


def table(*, seed: int = 0, device: str = "cpu") -> Iterator[Row]:
    """The rows of `minilora gradcheck`, each as soon as it is computed.

    Every pair, the whole model of each architecture (base and adapters on every target, with
    dropout), and the LoRA factors alone, over a frozen base; all computed on `device`. Raises
    `GradientError` for a pair that breaks the law of the pairs.
    """
    options: dict[str, Any] = {"seed": seed, "device": device}
    model = tiny_model(seed=seed)
    both, factors = Plan(base=True, lora=True), Plan(lora=True)
    for name, pair in PAIRS.items():
        yield _row(name, lambda pair=pair: _check(pair, **options))  # type: ignore[misc]
    yield _row("model, base and LoRA", lambda: check_model(*model, both, **options))
    yield _row("model, LoRA factors", lambda: check_model(*model, factors, **options))
    llama = tiny_llama(seed=seed)
    yield _row("Llama, base and LoRA", lambda: check_model(*llama, both, **options))
    yield _row("Llama, LoRA factors", lambda: check_model(*llama, factors, **options))


def _check(pair: Pair, seed: int, device: str) -> list[Check]:
    arguments, constants = pair.make(np.random.default_rng(seed))
    if device != "cpu":
        pair = _computing_on(device, pair)
    return check_pair(
        pair.forward, pair.backward, arguments, constants,
        seed=seed, entries=pair.entries, frozen=pair.frozen, thin=pair.thin,
    )  # fmt: skip


def _computing_on(device: str, pair: Pair) -> Pair:
    """A pair that computes on the device but takes and returns host arrays, as gradcheck needs."""

    @functools.wraps(pair.forward)
    def forward(*arguments: Array, **constants: Any) -> tuple[Array, Any]:
        y, cache = pair.forward(*_moved(list(arguments), device), **_moved(constants, device))
        return to_host(y), cache

    def backward(dy: Array, cache: Any) -> tuple[Array | None, ...]:
        gradients = pair.backward(to_device(dy, device), cache)
        return tuple(None if gradient is None else to_host(gradient) for gradient in gradients)

    return pair._replace(forward=forward, backward=backward)


def _moved(tree: Tree, device: str) -> Tree:
    """The tree with its NumPy arrays on the device; other leaves, such as numbers, unchanged."""
    return map_leaves(
        lambda leaf: to_device(leaf, device) if isinstance(leaf, np.ndarray) else leaf, tree
    )


def _row(name: str, run: Callable[[], list[Check]]) -> Row:
    start = time.perf_counter()
    checks = run()
    seconds = time.perf_counter() - start
    return Row(name, max_error(checks), sum(check.entries for check in checks), seconds)
