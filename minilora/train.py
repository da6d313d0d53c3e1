"""The training loop: sharded steps, held-out evaluation, checkpoints and resuming.

One loop serves pretraining, full fine-tuning and LoRA: they differ in which tree is trained.
Every random choice of step t comes from a generator seeded with (seed, t), so a run that was
stopped goes on exactly as if it had not been.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minilora import tree
from minilora.backend import Array, namespace, to_device, to_host
from minilora.data import Corpus, check_ids, check_length, draw_batch, windows
from minilora.errors import MiniloraError
from minilora.formats.files import make_folder
from minilora.formats.tensors import read_tensors, write_tensors
from minilora.gpt import GPTConfig, gpt_logits, loss_and_grads
from minilora.lora import LoRAConfig, dropout_masks
from minilora.ops import cross_entropy_forward
from minilora.optim import Moments, adamw, adamw_init, clip_by_global_norm, warmup_cosine
from minilora.tree import Tree

SHARD_TOKENS = 1024  # a shard's arrays stay near the core's caches; larger ones are slower
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class TrainConfig:
    """How to train. `method` says which tree: the adapters (`lora`) or the base (`full`).

    `batch` sequences of `context` tokens a step; the first `short_steps` steps read as many tokens
    in sequences of `short_context`, from which nearby positions are learned sooner (Press et al.
    2021, Shortformer, §3); `warmup` in steps; `clip` bounds the gradient's
    global norm; `eval_every`, `log_every` and `checkpoint_every` in steps; `eval_tokens` bounds the
    held-out text that is read during training; `threads` share each batch (0: one for each core).
    """

    method: Literal["lora", "full"] = "lora"
    steps: int = 200
    batch: int = 8
    context: int = 256
    short_context: int = 0
    short_steps: int = 0
    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0
    seed: int = 0
    threads: int = 0
    log_every: int = 10
    eval_every: int = 100
    eval_tokens: int = 32768
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        if self.method not in ("lora", "full"):
            raise MiniloraError(f"method {self.method!r} is not one of lora, full")
        for name in ("steps", "batch", "context", "log_every", "eval_every", "eval_tokens",
                     "checkpoint_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise MiniloraError(f"{name} {getattr(self, name)} is too small; it is at least 1")
        for name in ("warmup", "weight_decay", "seed", "threads", "short_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise MiniloraError(f"{name} {getattr(self, name)} is not a number of at least 0")
        if self.short_steps and self.short_context < 1:
            raise MiniloraError(f"short_context {self.short_context} is too small")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise MiniloraError(f"{name} {getattr(self, name)} is not a positive number")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise MiniloraError(f"{name} {getattr(self, name)} is not in [0, 1)")

    def shape(self, step: int) -> tuple[int, int]:
        """(B, T) of a step's batch."""
        if step > self.short_steps or self.short_context > self.context:
            return self.batch, self.context
        return self.batch * self.context // self.short_context, self.short_context


@dataclass
class History:
    """Losses in nats per token: of every step's batch, and of the held-out text now and then."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """What the loop tells its caller after a logging step."""

    step: int
    steps: int
    loss: float
    held_out: float | None
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per token, the same in bits per byte of text, and the tokens predicted."""

    loss: float
    bits_per_byte: float
    tokens: int


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C between two steps, after its state was saved."""


# --- one step ----------------------------------------------------------------------------------


def cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on Windows and macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class Workers:
    """Threads that share a batch, each with single-threaded BLAS: NumPy frees the lock in both.

    The shards' gradients are added in the order of the shards, so results do not depend on timing.
    """

    def __init__(self, threads: int, device: str = "cpu") -> None:
        self.threads = 1 if device != "cpu" else threads or cores()

    def __enter__(self) -> Workers:
        from threadpoolctl import threadpool_limits

        self._limits = threadpool_limits(1 if self.threads > 1 else None, user_api="blas")
        # An overflow ends in a loss that is not finite, which is reported as such.
        self._pool = ThreadPoolExecutor(self.threads, initializer=np.seterr, initargs=("ignore",))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._limits.restore_original_limits()

    def shards(self, batch: int, context: int) -> list[slice]:
        """The batch's rows, split evenly: a multiple of the threads, of some SHARD_TOKENS each."""
        rounds = max(1, round(batch * context / (self.threads * SHARD_TOKENS)))
        edges = np.linspace(0, batch, min(batch, self.threads * rounds) + 1).astype(int).tolist()
        return [slice(start, stop) for start, stop in itertools.pairwise(edges)]

    def map(self, f: Callable[..., Any], *items: Any) -> Iterator[Any]:
        """`f` of every item, in their order."""
        return self._pool.map(f, *items)


def batch_loss_and_grads(
    workers: Workers,
    base: Tree,
    lora: Tree | None,
    tokens: np.ndarray,
    targets: np.ndarray,
    *,
    masks: Mapping[str, np.ndarray] | None = None,
    wrt: Literal["lora", "base"],
    config: GPTConfig,
    lora_config: LoRAConfig | None,
    device: str = "cpu",
) -> tuple[Array, Tree]:
    """The mean loss of a batch (B, T) and the gradients of the trained tree, shard by shard."""

    def of_shard(rows: slice) -> tuple[Array, Tree]:
        loss, dbase, dlora = loss_and_grads(
            base,
            lora,
            tokens=to_device(tokens[rows], device),
            targets=to_device(targets[rows], device),
            masks=masks and {p: to_device(mask[rows], device) for p, mask in masks.items()},
            config=config,
            lora_config=lora_config,
            wrt=wrt,
            count=tokens.size,
        )
        return loss, dlora if wrt == "lora" else dbase

    total: tuple[Array, Tree] | None = None
    for loss, grads in workers.map(of_shard, workers.shards(*tokens.shape)):
        total = (
            (loss, grads)
            if total is None
            else (total[0] + loss, tree.map_leaves(lambda a, b: a + b, total[1], grads))
        )
    assert total is not None  # a batch has at least one row
    return total


# --- evaluation --------------------------------------------------------------------------------


def evaluate_tokens(
    base: Tree,
    lora: Tree | None,
    tokens: np.ndarray,
    *,
    text_bytes: int,
    config: GPTConfig,
    lora_config: LoRAConfig | None = None,
    threads: int = 0,
    device: str = "cpu",
) -> Evaluation:
    """The model's loss on a stream of tokens that stands for `text_bytes` bytes of text.

    Consecutive windows of the base's whole context, so that every token but the very first is
    predicted exactly once. Raises MiniloraError below two tokens, for token ids outside the
    vocabulary, and for a loss that is not finite.
    """
    if len(tokens) < 2:
        raise MiniloraError(f"a text of {len(tokens)} tokens is too short: an evaluation needs two")
    check_ids(tokens, config.vocab_size)
    context = config.n_positions
    batches = windows(tokens, context=context, batch=max(1, SHARD_TOKENS // context))
    base, lora = to_device(base, device), to_device(lora, device) if lora else None
    with Workers(threads, device) as workers:
        total, predicted = sum_nats(workers, base, lora, batches, config, lora_config, device)
    if not math.isfinite(total):
        raise MiniloraError("the loss is not finite: the model's numbers overflow on this text")
    loss = total / predicted
    return Evaluation(loss, loss / math.log(2) * len(tokens) / text_bytes, predicted)


def sum_nats(
    workers: Workers,
    base: Tree,
    lora: Tree | None,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    config: GPTConfig,
    lora_config: LoRAConfig | None,
    device: str,
) -> tuple[float, int]:
    """The summed loss of batches (inputs, targets) in nats, and how many tokens they predict."""

    def nats(batch: tuple[np.ndarray, np.ndarray]) -> tuple[Array, int]:
        tokens, targets = (to_device(part, device) for part in batch)
        logits = gpt_logits(base, lora, tokens=tokens, config=config, lora_config=lora_config)
        return cross_entropy_forward(logits, targets=targets, count=1)[0], targets.size

    sums = [(float(loss), size) for loss, size in workers.map(nats, batches)]
    return sum(loss for loss, _ in sums), sum(size for _, size in sums)


def held_out_batches(
    tokens: np.ndarray, *, context: int, limit: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """All of a held-out stream in windows of `context`, or as many spread evenly as `limit` allows.

    The same windows at every call, so that losses during training can be compared.
    """
    context = min(context, len(tokens) - 1)
    rows = max(1, SHARD_TOKENS // context)
    if len(tokens) - 1 <= limit:
        return list(windows(tokens, context=context, batch=rows))
    starts = np.linspace(0, len(tokens) - 1 - context, max(1, limit // context)).astype(np.int64)
    spread = starts[:, None] + np.arange(context, dtype=np.int64)
    return [
        (tokens[spread[i : i + rows]], tokens[spread[i : i + rows] + 1])
        for i in range(0, len(spread), rows)
    ]


# --- checkpoints -------------------------------------------------------------------------------


@dataclass
class State:
    """All that a run needs to go on: the trained tree, AdamW's moments, the losses so far."""

    step: int
    params: Tree
    moments: Moments
    history: History
    seconds: float = 0.0


def save_checkpoint(folder: Path, state: State, settings: Mapping[str, Any]) -> None:
    """Write the state and the run's settings to one file, atomically."""
    trees = {"params": state.params, "m": state.moments.m, "v": state.moments.v}
    write_tensors(
        folder / CHECKPOINT,
        tree.flatten(to_host(trees)),
        {
            "step": str(state.step),
            "seconds": str(state.seconds),
            "settings": json.dumps(settings, sort_keys=True),
            "history": json.dumps(dataclasses.asdict(state.history)),
        },
    )


def load_checkpoint(
    folder: Path, settings: Mapping[str, Any], params: Tree, device: str = "cpu"
) -> State | None:
    """The state saved in a folder, its trees of the structure of `params`; None if there is none.

    Raises MiniloraError naming the first setting that differs from those of the saved run.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    flat, metadata = read_tensors(path)
    try:
        saved = json.loads(metadata["settings"])
        step, seconds = int(metadata["step"]), float(metadata["seconds"])
        history = History(
            **{
                name: [(int(s), float(loss)) for s, loss in curve]
                for name, curve in json.loads(metadata["history"]).items()
            }
        )
    except (KeyError, ValueError, TypeError) as error:
        raise MiniloraError(f"{path} is not a checkpoint of minilora's training") from error
    check_same_run(path, saved, settings)
    # A file of paths cannot tell of blocks without an adapter, so their places come from `params`.
    trees = dict.fromkeys(("params", "m", "v"), params)
    leaves = iter([flat[name] for name in tree.flatten(trees)])
    trees = to_device(tree.map_leaves(lambda _: next(leaves), trees), device)
    return State(step, trees["params"], Moments(trees["m"], trees["v"]), history, seconds)


def check_same_run(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise MiniloraError naming a setting in which two runs differ."""
    now = json.loads(json.dumps(now))
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            raise MiniloraError(
                f"{path} belongs to a run with {name} {saved.get(name)}, but this one has "
                f"{now.get(name)}; resume with the same settings or choose another folder"
            )


@contextmanager
def ctrl_c_sets_flag() -> Iterator[threading.Event]:
    """Within, a first Ctrl-C sets the event, so that a step is never cut in two; a second stops."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed  # only the main thread may handle signals
        return

    def handle(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


# --- the loop ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What training gives: the trained tree on the host, the losses, seconds and tokens/s."""

    params: Tree
    history: History
    seconds: float
    tokens_per_second: float


def train(
    base: Tree,
    lora: Tree | None,
    corpus: Corpus,
    *,
    config: GPTConfig,
    lora_config: LoRAConfig | None = None,
    settings: TrainConfig,
    folder: Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    report: Callable[[Progress], None] = lambda progress: None,
) -> Trained:
    """Train `lora` on a frozen `base` (method `lora`), or `base` itself (method `full`).

    With a `folder`, the state is saved there every `checkpoint_every` steps, and `resume` goes on
    from it, or starts afresh where there is none. Neither tree is changed. Raises MiniloraError for
    text that is too short or of another vocabulary, a context beyond the base's, or a loss that is
    not finite (the last checkpoint stays); Interrupted after Ctrl-C, the state being saved.
    """
    if settings.context > config.n_positions:
        raise MiniloraError(
            f"context {settings.context} exceeds the base's context of {config.n_positions}"
        )
    check_length(corpus.train, context=settings.context, name=f"the training part of {corpus.name}")
    if settings.method == "lora" and lora is None:
        raise MiniloraError("method 'lora' needs an adapter tree; lora_init makes one")
    if len(corpus.held_out) < 2:
        raise MiniloraError(f"{corpus.name} is too short: nothing of it can be held out")
    for tokens in (corpus.train, corpus.held_out):
        check_ids(tokens, config.vocab_size)
    fingerprint = run_fingerprint(base, config, lora_config, settings, corpus)
    base = to_device(base, device)
    params = to_device(lora, device) if settings.method == "lora" else base
    state = None
    if folder:
        make_folder(folder)
        state = load_checkpoint(folder, fingerprint, params, device) if resume else None
    if state is None:
        state = State(0, params, adamw_init(params), History())
    with (
        Workers(settings.threads, device) as workers,
        ctrl_c_sets_flag() as stop,
        np.errstate(all="ignore"),  # as in Workers
    ):
        loop = Loop(base, lora, corpus, config, lora_config, settings, device, workers)
        return loop.run(state, folder, fingerprint, stop, report)


def run_fingerprint(
    base: Tree,
    config: GPTConfig,
    lora_config: LoRAConfig | None,
    settings: TrainConfig,
    corpus: Corpus,
) -> dict[str, Any]:
    """What must be equal for a run to go on: the settings, and checksums of base and text."""
    parts = dataclasses.asdict(config) | dataclasses.asdict(settings)
    if lora_config is not None and settings.method == "lora":
        parts |= dataclasses.asdict(lora_config)
    parts["threads"] = settings.threads or cores()
    parts["checksum of the base"] = checksum(tree.flatten(to_host(base)).values())
    parts["checksum of the text"] = checksum([corpus.train, corpus.held_out])
    return parts


def checksum(arrays: Iterable[Array]) -> int:
    """CRC-32 of the arrays' bytes, one after the other."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return crc


@dataclass(frozen=True)
class Loop:
    """The constants of one training run; `run` is the loop over its steps."""

    base: Tree
    lora: Tree | None
    corpus: Corpus
    config: GPTConfig
    lora_config: LoRAConfig | None
    settings: TrainConfig
    device: str
    workers: Workers

    def run(
        self,
        state: State,
        folder: Path | None,
        fingerprint: Mapping[str, Any],
        stop: threading.Event,
        report: Callable[[Progress], None],
    ) -> Trained:
        """Steps until the last, with reports, evaluations and checkpoints when they are due."""
        settings = self.settings
        started = time.perf_counter() - state.seconds
        if state.step == 0:
            state.history.held_out.append((0, self.held_out_loss(state)))
        pending: list[Array] = []
        while state.step < settings.steps:
            state, loss_and_norm = self.step(state)
            pending.append(loss_and_norm)
            step, last, stopping = state.step, state.step == settings.steps, stop.is_set()
            saving = last or stopping or step % settings.checkpoint_every == 0
            evaluating = last or step % settings.eval_every == 0
            if saving or evaluating or step % settings.log_every == 0:
                losses = read_finite(pending, step)
                state.history.train += enumerate(losses, step - len(losses) + 1)
                pending = []
                held_out = None
                if evaluating:
                    held_out = self.held_out_loss(state)
                    state.history.held_out.append((step, held_out))
                state.seconds = time.perf_counter() - started
                speed = self.tokens_per_step * step / state.seconds
                left = (settings.steps - step) * self.tokens_per_step / speed
                report(Progress(step, settings.steps, losses[-1], held_out, speed, left))
            if saving:
                check_finite("a trained weight", step, state.params)
            if folder and saving:
                save_checkpoint(folder, state, fingerprint)
            if stopping and not last:
                saved = "; its state is saved, and --resume goes on from it" if folder else ""
                raise Interrupted(f" at step {step}{saved}")
        speed = self.tokens_per_step * state.step / state.seconds
        return Trained(to_host(state.params), state.history, state.seconds, speed)

    @property
    def tokens_per_step(self) -> int:
        return self.settings.batch * self.settings.context

    def trees(self, params: Tree) -> tuple[Tree, Tree | None]:
        """(base, lora) with the trained tree in its place."""
        return (self.base, params) if self.settings.method == "lora" else (params, None)

    def step(self, state: State) -> tuple[State, Array]:
        """The state after one more step, and its loss and gradient norm as an array (2,)."""
        settings, step = self.settings, state.step + 1
        rng = np.random.default_rng([settings.seed, step])
        batch, context = settings.shape(step)
        tokens, targets = draw_batch(self.corpus.train, batch=batch, context=context, rng=rng)
        base, lora = self.trees(state.params)
        masks = None
        if lora is not None and self.lora_config is not None:
            masks = dropout_masks(lora, self.lora_config, rng=rng, shape=(batch, context))
        loss, grads = batch_loss_and_grads(
            self.workers,
            base,
            lora,
            tokens,
            targets,
            masks=masks,
            wrt="lora" if lora is not None else "base",
            config=self.config,
            lora_config=self.lora_config,
            device=self.device,
        )
        grads, norm = clip_by_global_norm(grads, settings.clip)
        params, moments = adamw(
            state.params,
            grads,
            state.moments,
            step=step,
            lr=warmup_cosine(step, steps=settings.steps, peak=settings.lr, warmup=settings.warmup),
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay,
        )
        loss_and_norm = namespace(loss).stack([loss, norm])
        return State(step, params, moments, state.history, state.seconds), loss_and_norm

    def held_out_loss(self, state: State) -> float:
        """Nats per token on the held-out text, or on `eval_tokens` tokens spread over it."""
        batches = held_out_batches(
            self.corpus.held_out,
            context=self.settings.context,
            limit=self.settings.eval_tokens,
        )
        total, predicted = sum_nats(
            self.workers,
            *self.trees(state.params),
            batches,
            self.config,
            self.lora_config,
            self.device,
        )
        check_finite("the held-out loss", state.step, np.float64(total))
        return total / predicted


def read_finite(pending: list[Array], step: int) -> list[float]:
    """The losses of the steps up to `step`, read from the device in one copy.

    Raises MiniloraError at the first whose loss or gradient norm is not finite.
    """
    values = to_host(namespace(pending[0]).stack(pending))
    for at, loss_and_norm in enumerate(values, step - len(values) + 1):
        check_finite("the loss or its gradient", at, loss_and_norm)
    return [float(loss) for loss in values[:, 0]]


def check_finite(what: str, step: int, values: Tree) -> None:
    """Raise MiniloraError, naming what and the step, unless all the numbers are finite."""
    if not all(namespace(x).isfinite(x).all() for x in tree.flatten(values).values()):
        raise MiniloraError(
            f"{what} is not finite at step {step}: "
            + ("a lower learning rate usually helps; the last checkpoint is kept" if step
               else "the numbers of the model overflow")
        )  # fmt: skip
