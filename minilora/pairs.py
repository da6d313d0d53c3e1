"""The register of every forward/backward pair, and the table that `minilora gradcheck` prints.

Each pair comes with a function that makes its arguments from a random generator and a set of sizes,
so that the same register feeds the table and the property tests: whoever adds a pair adds one line
here. Everything is float64.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from minilora import ops
from minilora.backend import Array, to_device, to_host
from minilora.gpt import GPTConfig, gpt_forward, gpt_init, loss_and_grads
from minilora.gradcheck import Check, check_pair, check_tree, max_error
from minilora.lora import (
    TARGETS,
    LoRAConfig,
    dropout_masks,
    lora_backward,
    lora_embedding_backward,
    lora_embedding_forward,
    lora_forward,
    lora_init,
)
from minilora.tree import Tree, flatten, map_leaves


class Sizes(NamedTuple):
    """The sizes that a pair's arguments are made of; `lead` are the leading dimensions."""

    lead: tuple[int, ...] = (2, 3)
    C: int = 4
    O: int = 3
    R: int = 2
    V: int = 5
    H: int = 2

    def shape(self, letters: str) -> tuple[int, ...]:
        """The sides that a signature such as "...C" names: `...` is lead, a letter its size."""
        sizes = {
            **self._asdict(),
            "B": math.prod(self.lead[:-1]),
            "T": self.lead[-1],
            "P": self.lead[-1] + 2,  # positions: more than are used
            "Q": 3 * self.H * self.C,  # fused projections: q, k and v of H heads of width C
        }
        lead = self.lead if letters.startswith("...") else ()
        return (*lead, *(sizes[letter] for letter in letters.removeprefix("...")))


Constants = Callable[[np.random.Generator, Sizes], dict[str, Any]]


class Pair(NamedTuple):
    """A forward/backward pair and how to call it.

    `arguments` holds the shape of each (see `Sizes.shape`), `constants` makes the keyword
    arguments, and `frozen` names the arguments that then have no gradient.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    arguments: tuple[str, ...]
    constants: Constants = lambda rng, s: {}
    frozen: tuple[str, ...] = ()

    def make(
        self, rng: np.random.Generator, sizes: Sizes | None = None
    ) -> tuple[list[Array], dict[str, Any]]:
        """Random arguments and constants for one call, float64."""
        sizes = sizes or Sizes()
        arguments = [rng.standard_normal(sizes.shape(letters)) for letters in self.arguments]
        return arguments, self.constants(rng, sizes)


def _constant(**constants: Any) -> Constants:
    return lambda rng, s: constants


def _index(rng: np.random.Generator, s: Sizes) -> dict[str, Any]:
    return {"index": rng.integers(s.V, size=s.lead)}


def _mask(rng: np.random.Generator, s: Sizes) -> dict[str, Any]:
    return {"mask": ops.dropout_mask(rng, s.shape("...C"), 0.4, np.float64)}


def _targets(rng: np.random.Generator, s: Sizes) -> dict[str, Any]:
    return {"targets": rng.integers(s.V, size=s.lead)}


def _some_targets(rng: np.random.Generator, s: Sizes) -> dict[str, Any]:
    targets = rng.integers(s.V, size=s.lead)
    return {"targets": np.where(rng.random(s.lead) < 0.3, -1, targets), "ignore_index": -1}


def _given_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with a function that gives its input again, rather than the input, to keep."""

    @functools.wraps(forward)
    def given(x: Array, *parameters: Array, **constants: Any) -> Any:
        return forward(x, *parameters, again=lambda: x, **constants)

    return given


LINEAR = (ops.linear_forward, ops.linear_backward, ("...C", "CO", "O"))
POSITION = (ops.position_forward, ops.position_backward, ("...C", "PC"))
LAYER_NORM = (ops.layer_norm_forward, ops.layer_norm_backward, ("...C", "C", "C"))
HEAD = (ops.head_forward, ops.head_backward, ("...C", "VC"))
HEAD_LOSS = (ops.head_loss_forward, ops.head_loss_backward, ("...C", "VC"))
CROSS_ENTROPY = (ops.cross_entropy_forward, ops.cross_entropy_backward, ("...V",))
LORA = (lora_forward, lora_backward, ("...C", "CR", "RO"))

PAIRS: dict[str, Pair] = {
    "linear": Pair(*LINEAR),
    "linear, frozen": Pair(*LINEAR, _constant(frozen=True), ("w", "b")),
    "linear, no dx": Pair(*LINEAR, _constant(needs_dx=False), ("x",)),
    "linear, input computed again": Pair(_given_again(ops.linear_forward), *LINEAR[1:]),
    "embedding": Pair(ops.embedding_forward, ops.embedding_backward, ("VC",), _index),
    "position": Pair(*POSITION, _constant(offset=1)),
    "position, frozen": Pair(*POSITION, _constant(frozen=True), ("wpe",)),
    # A large ε: its place in the equation then matters, and rows of equal entries stay smooth.
    "layer norm": Pair(*LAYER_NORM, _constant(eps=0.1)),
    "layer norm, frozen": Pair(*LAYER_NORM, _constant(eps=0.1, frozen=True), ("w", "b")),
    "gelu": Pair(ops.gelu_forward, ops.gelu_backward, ("...C",)),
    "softmax": Pair(ops.softmax_forward, ops.softmax_backward, ("...C",)),
    "attention": Pair(
        ops.attention_forward,
        ops.attention_backward,
        ("BTQ",),
        lambda rng, s: {"heads": s.H, "queries": 2},
    ),
    "residual": Pair(ops.residual_forward, ops.residual_backward, ("...C", "...C")),
    "head": Pair(*HEAD),
    "head, frozen": Pair(*HEAD, _constant(frozen=True), ("wte",)),
    "cross-entropy": Pair(*CROSS_ENTROPY, _targets),
    "cross-entropy, targets ignored": Pair(*CROSS_ENTROPY, _some_targets),
    "cross-entropy, count given": Pair(
        *CROSS_ENTROPY, lambda rng, s: {**_some_targets(rng, s), "count": 7}
    ),
    "head and loss": Pair(*HEAD_LOSS, lambda rng, s: {**_targets(rng, s), "chunk": 3}),
    "head and loss, frozen": Pair(
        *HEAD_LOSS,
        lambda rng, s: {**_some_targets(rng, s), "chunk": 3, "frozen": True},
        ("table",),
    ),
    "dropout": Pair(ops.dropout_forward, ops.dropout_backward, ("...C",), _mask),
    "lora": Pair(*LORA, lambda rng, s: {"scale": 8.0 / s.R}),
    "lora, no dx": Pair(*LORA, lambda rng, s: {"scale": 8.0 / s.R, "needs_dx": False}, ("x",)),
    "lora, input computed again": Pair(
        _given_again(lora_forward), *LORA[1:], lambda rng, s: {"scale": 8.0 / s.R}
    ),
    "lora, rank-stabilised": Pair(*LORA, lambda rng, s: {"scale": 8.0 / math.sqrt(s.R)}),
    "lora, dropout": Pair(*LORA, lambda rng, s: {"scale": 8.0 / s.R, **_mask(rng, s)}),
    "lora, embedding": Pair(
        lora_embedding_forward,
        lora_embedding_backward,
        ("VR", "RC"),
        lambda rng, s: {"scale": 8.0 / s.R, **_index(rng, s)},
    ),
}


# The pages whose names are not those of the pairs.
PAGES = {
    "position": "embedding",
    "softmax": "attention",
    "residual": "model",
    "cross-entropy": "head",
    "head and loss": "head",
}


def page_of(name: str) -> str:
    """The page that derives a pair of the register, or another row of the table, by its name."""
    first = name.split(",")[0]
    return f"docs/derivations/{PAGES.get(first, first.replace(' ', '_'))}.md"


class Case(NamedTuple):
    """A whole model with adapters and one batch: what `loss_and_grads` takes, in its names."""

    base: Tree
    lora: Tree
    tokens: Array
    targets: Array
    config: GPTConfig
    lora_config: LoRAConfig
    masks: Mapping[str, Array] | None


def tiny_model(*, seed: int = 0) -> Case:
    """Two small blocks with an adapter on every target, none of them at its start (B is not 0)."""
    rng = np.random.default_rng(seed)
    config = GPTConfig(7, 5, n_embd=4, n_layer=2, n_head=2, n_inner=6, layer_norm_epsilon=0.1)
    lora_config = LoRAConfig(
        rank=2, alpha=1.0, targets=TARGETS, dropout=0.3, rank_pattern={"up": 1, "1.attn.q": 3}
    )

    def moved(x: Array) -> Array:
        return x + 0.3 * rng.standard_normal(x.shape)

    base = map_leaves(moved, gpt_init(config, seed=seed, dtype=np.float64))
    lora = map_leaves(moved, lora_init(base, lora_config, seed=seed))
    tokens = rng.integers(config.vocab_size, size=(2, 4))
    targets = rng.integers(config.vocab_size, size=(2, 4))
    targets[1, 0] = -100
    masks = dropout_masks(lora, lora_config, rng=rng, shape=(2, 4))
    return Case(base, lora, tokens, targets, config, lora_config, masks)


def check_model(
    model: Case,
    *,
    wrt: Literal["lora", "base", "both"],
    seed: int = 0,
    entries: int | None = None,
    device: str = "cpu",
) -> list[Check]:
    """Compares the gradients of a whole model with central differences of its loss, leaf by leaf.

    The arrays are on the host, the trees float64; the model computes on the device. `entries`
    limits the entries compared per leaf.
    """
    constants = _moved(model._asdict(), device)
    base, lora, targets = (constants.pop(name) for name in ("base", "lora", "targets"))
    _, *gradients = loss_and_grads(base, lora, targets=targets, **constants, wrt=wrt)
    given = {name: g for name, g in zip(("base", "lora"), gradients, strict=True) if g is not None}
    trees = {"base": base, "lora": lora}
    trained = trees if wrt == "both" else {wrt: trees[wrt]}

    def loss(flat: dict[str, Array]) -> float:
        leaves = iter(flat.values())
        moved = map_leaves(lambda _: to_device(next(leaves), device), trained)
        logits, _ = gpt_forward(**{**trees, **moved}, **constants)
        return float(ops.cross_entropy_forward(logits, targets=targets)[0])

    return check_tree(
        loss, flatten(to_host(trained)), flatten(to_host(given)), seed=seed, entries=entries
    )


class Row(NamedTuple):
    """One line of the table."""

    name: str
    error: float  # the largest relative error
    entries: int  # entries compared
    seconds: float


def table(*, seed: int = 0, device: str = "cpu") -> Iterator[Row]:
    """The rows of `minilora gradcheck`, each as soon as it is known.

    Every pair, the whole model (base and adapters on every target, with dropout), and the LoRA
    factors alone, over a frozen base; all computed on the device.
    """
    options: dict[str, Any] = {"seed": seed, "device": device}
    model = tiny_model(seed=seed)
    for name, pair in PAIRS.items():
        yield _row(name, lambda pair=pair: _check(pair, **options))  # type: ignore[misc]
    yield _row("model, base and LoRA", lambda: check_model(model, wrt="both", **options))
    yield _row("model, LoRA factors", lambda: check_model(model, wrt="lora", **options))


def _check(pair: Pair, seed: int, device: str) -> list[Check]:
    arguments, constants = pair.make(np.random.default_rng(seed))
    if device != "cpu":
        pair = _computing_on(device, pair)
    return check_pair(
        pair.forward, pair.backward, arguments, constants, seed=seed, frozen=pair.frozen
    )


def _computing_on(device: str, pair: Pair) -> Pair:
    """The pair for arrays of the host, which gradcheck works with; its cache is on the device."""

    @functools.wraps(pair.forward)
    def forward(*arguments: Array, **constants: Any) -> tuple[Array, Any]:
        y, cache = pair.forward(*_moved(list(arguments), device), **_moved(constants, device))
        return to_host(y), cache

    def backward(dy: Array, cache: Any) -> tuple[Array | None, ...]:
        gradients = pair.backward(to_device(dy, device), cache)
        return tuple(None if gradient is None else to_host(gradient) for gradient in gradients)

    return pair._replace(forward=forward, backward=backward)


def _moved(tree: Tree, device: str) -> Tree:
    """The tree with its NumPy arrays on the device; any other leaf, a number say, as it is."""
    return map_leaves(
        lambda leaf: to_device(leaf, device) if isinstance(leaf, np.ndarray) else leaf, tree
    )


def _row(name: str, run: Callable[[], list[Check]]) -> Row:
    start = time.perf_counter()
    checks = run()
    seconds = time.perf_counter() - start
    return Row(name, max_error(checks), sum(check.entries for check in checks), seconds)
