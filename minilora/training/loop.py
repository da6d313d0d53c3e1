"""The training loop: steps shared among threads, evaluations and checkpoints when they are due.

One loop serves pretraining, full fine-tuning and LoRA: they differ in which tree is trained.
Every random choice of step t comes from a generator seeded with (seed, t), so a resumed run
continues exactly as if it had not been stopped.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from minilora import tree
from minilora.adapters import dropout_masks
from minilora.backend import Array, Half, check_ids, namespace, to_device, to_host
from minilora.data import IGNORED, Data
from minilora.described import Described
from minilora.errors import MiniloraError
from minilora.evaluation import sum_nats
from minilora.keep import Plan
from minilora.network import Net, loss_and_grads
from minilora.optim import adamw, adamw_init, clip_by_global_norm, warmup_cosine
from minilora.settings import DERIVED, LARGEST_COUNT, Settings, check_sizes
from minilora.training.checkpoint import (
    History,
    State,
    checksum,
    load_checkpoint,
    save_checkpoint,
)
from minilora.training.ranks import Ranks
from minilora.tree import Tree
from minilora.workers import Workers

RATES = {"lora": 1e-2, "full": 1e-3}  # the default peak learning rate of each method


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How to train the adapters (`method` lora) or the base (full).

    A step reads `batch` sequences of `context` tokens; the first `short_steps` steps read as many
    tokens in sequences of `short_context`, which teach nearby positions sooner (Press et al. 2021,
    Shortformer, §4). `lr` is the peak (default: RATES). `warmup` (default: a tenth of the steps),
    `log_every`, `eval_every` and `checkpoint_every` are numbers of steps. `clip` bounds the
    gradient's global norm, `eval_tokens` the tokens that an evaluation reads; `threads` 0: one for
    each core. `recompute` keeps only each block's input for the backward pass and recomputes the
    rest. Raises MiniloraError for a value out of range.
    """

    foreign: ClassVar[Mapping[str, str]] = {  # transformers' names
        "learning_rate": "lr",
        "max_steps": "steps",
        "per_device_train_batch_size": "batch",
        "warmup_steps": "warmup",
        "adam_beta1": "beta1",
        "adam_beta2": "beta2",
        "max_grad_norm": "clip",
        "eval_steps": "eval_every",
        "save_steps": "checkpoint_every",
        "logging_steps": "log_every",
    }

    method: Literal["lora", "full"] = "lora"
    steps: int = 200
    batch: int = 8
    context: int = 256
    short_context: int = 128
    short_steps: int = 0
    lr: float = DERIVED  # RATES[method]
    warmup: int = DERIVED  # steps // 10
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0
    seed: int = 0
    threads: int = 0
    recompute: bool = False
    log_every: int = 10
    eval_every: int = 50
    eval_tokens: int = 32768
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in RATES:
            raise MiniloraError(f"method {self.method!r} is not one of lora, full")
        if self.lr is None:
            object.__setattr__(self, "lr", RATES[self.method])
        if self.warmup is None:
            object.__setattr__(self, "warmup", self.steps // 10)
        check_sizes(
            self, "steps", "batch", "context",
            "log_every", "eval_every", "eval_tokens", "checkpoint_every", largest=LARGEST_COUNT,
        )  # fmt: skip
        for name in ("warmup", "threads", "short_context", "short_steps"):
            if getattr(self, name) > LARGEST_COUNT:
                raise MiniloraError(
                    f"{name} {getattr(self, name)} is too large; the maximum is {LARGEST_COUNT:,}"
                )
        for name in ("warmup", "weight_decay", "seed", "threads", "short_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise MiniloraError(f"{name} {getattr(self, name)} is not a number of at least 0")
        if self.short_steps and self.short_context < 1:
            raise MiniloraError(
                f"short_context {self.short_context} is too small; the minimum is 1"
            )
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


@dataclass(frozen=True)
class Progress:
    """A report of the loop to its caller; losses in nats per token, `held_out` if just measured."""

    step: int
    steps: int
    loss: float
    held_out: float | None
    tokens_per_second: float
    seconds_left: float


class Snapshot(NamedTuple):
    """A run at an evaluation, for whoever watches it; to look at, not to change.

    `net` has the weights so far, on the device; `grads` are the trained tree's of the last step,
    clipped, and None before the first.
    """

    step: int
    net: Net
    grads: Tree | None
    history: History
    settings: TrainConfig


class Interrupted(KeyboardInterrupt):
    """Ctrl-C stopped training between two steps; `is_saved`: the state is in the run's folder."""

    def __init__(self, step: int, *, is_saved: bool) -> None:
        super().__init__(f" at step {step}{'; its state is saved' if is_saved else ''}")
        self.is_saved = is_saved


# --- one step ----------------------------------------------------------------------------------


def batch_loss_and_grads(
    workers: Workers,
    net: Net,
    tokens: np.ndarray,
    targets: np.ndarray,
    *,
    plan: Plan,
    masks: Mapping[str, np.ndarray] | None = None,
    device: str = "cpu",
    count: int | None = None,
) -> tuple[Array, Tree]:
    """The mean loss () of a batch (B, T) and the gradients of the trained tree, added over shards.

    The plan asks for the gradients of one tree. If the batch is part of a larger one, `count` is
    the number of targets that count in the whole.
    """
    counts = targets != IGNORED
    total_count = count or int(counts.sum())

    def of_shard(rows: slice) -> tuple[Array, Tree]:
        last = np.flatnonzero(counts[rows].any(axis=0)).max(initial=0)
        part = rows, slice(0, last + 1)  # what comes after the last target changes nothing
        loss, dbase, dlora = loss_and_grads(
            net,
            tokens=to_device(tokens[part], device),
            targets=to_device(targets[part], device),
            plan=plan,
            masks=masks and {p: to_device(mask[part], device) for p, mask in masks.items()},
            count=total_count,
        )
        return loss, dlora if plan.lora else dbase

    total: tuple[Array, Tree] | None = None
    for loss, grads in workers.map(of_shard, workers.shards(*tokens.shape)):
        total = (
            (loss, grads)
            if total is None
            else (total[0] + loss, tree.map_leaves(lambda a, b: a + b, total[1], grads))
        )
    assert total is not None  # a batch has at least one row
    return total


@contextmanager
def ctrl_c_sets_flag() -> Iterator[threading.Event]:
    """In the block a first Ctrl-C sets the event, so no step is interrupted; a second raises."""
    pressed = threading.Event()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is None:
        # Only the main thread may handle signals, and a handler that was not set from Python, shown
        # as None, could not be restored.
        yield pressed
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


@dataclass(frozen=True, repr=False)
class Trained(Described):
    """The result of training: the trained tree (on the host), the losses, and the time taken."""

    params: Tree
    history: History
    seconds: float
    tokens_per_second: float

    def _described(self) -> dict[str, str]:
        seconds, speed = f"{self.seconds:.0f} s", f"{self.tokens_per_second:,.0f} tokens/s"
        return {
            "Trained": f"{tree.count(self.params):,} parameters",
            "steps": f"{len(self.history.train):,} in {seconds}, {speed}",
            "held-out": self.history.change(),
        }


def train(
    net: Net,
    corpus: Data,
    *,
    settings: TrainConfig,
    folder: Path | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    resume: bool = False,
    device: str = "cpu",
    report: Callable[[Progress], None] = lambda progress: None,
    watch: Callable[[Snapshot], None] = lambda seen: None,
    ranks: Ranks | None = None,
) -> Trained:
    """Train the adapters on a frozen base (method `lora`), or the base without them (`full`).

    With a `folder`, which the caller has locked (see `held`), the state is saved there every
    `checkpoint_every` steps, and `resume` continues from it if it is there; `fingerprint` is
    `run_fingerprint`'s, if the caller has it. Several `ranks` share each batch and evaluation; only
    the first writes, reports and calls `watch`, after each evaluation. The net is not changed.
    Raises MiniloraError for text that is too short or of another vocabulary, a context beyond the
    base's, a batch with fewer rows than ranks, and a loss that is not finite (the last checkpoint
    stays); Interrupted on Ctrl-C, after saving.
    """
    ranks = ranks or Ranks()
    if settings.batch < ranks.size:
        raise MiniloraError(
            f"batch {settings.batch} is too small for {ranks.size} processes; each needs a sequence"
        )
    if settings.context > net.config.n_positions:
        raise MiniloraError(
            f"context {settings.context} exceeds the base's context of {net.config.n_positions}"
        )
    corpus.check(context=settings.context)
    if settings.method == "full" and isinstance(net.base["wte"], Half):
        raise MiniloraError("method 'full' trains the base, but a base in float16 stays frozen")
    if settings.method == "lora" and net.lora is None:
        raise MiniloraError("method 'lora' needs an adapter tree; lora_init makes one")
    for tokens in corpus.arrays():
        check_ids(tokens, net.config.vocab_size)
    if fingerprint is None:
        fingerprint = run_fingerprint(net, settings, corpus, device, ranks) if folder else {}
    with (
        Workers(settings.threads or ranks.threads(), device) as workers,
        ctrl_c_sets_flag() as stop,
        np.errstate(all="ignore"),  # as in Workers
    ):
        net = net.on(device)
        params = net.lora if settings.method == "lora" else net.base
        state = None
        if folder and resume:
            state = ranks.of_first(lambda: load_checkpoint(folder, fingerprint, params, device))
        if state is None:
            state = State(0, params, adamw_init(params), History())
        loop = Loop(net, corpus, settings, device, workers, ranks)
        return loop.finish(state, folder, fingerprint, stop, report, watch)


def run_fingerprint(
    net: Net, settings: TrainConfig, corpus: Data, device: str, ranks: Ranks
) -> dict[str, Any]:
    """What must match for a run to resume: settings, device, checksums of what it starts from.

    Raises MiniloraError if the ranks differ in any of it.
    """
    parts = dataclasses.asdict(net.config) | dataclasses.asdict(settings)
    if net.lora_config is not None and settings.method == "lora":
        parts |= dataclasses.asdict(net.lora_config)
        parts["checksum of the adapter"] = checksum(tree.flatten(to_host(net.lora)).values())
    parts["threads"] = settings.threads or ranks.threads()
    parts["processes"] = ranks.size
    parts["device"] = device
    parts["checksum of the base"] = checksum(tree.flatten(to_host(net.base)).values())
    parts["checksum of the text"] = checksum(corpus.arrays())
    if corpus.today is not None:
        parts["today"] = corpus.today
    ranks.check_equal(parts)
    return parts


@dataclass(frozen=True)
class Loop:
    """The constants of one training run; `finish` is the loop over its steps."""

    net: Net
    corpus: Data
    settings: TrainConfig
    device: str
    workers: Workers
    ranks: Ranks

    def finish(
        self,
        state: State,
        folder: Path | None,
        fingerprint: Mapping[str, Any],
        stop: threading.Event,
        report: Callable[[Progress], None],
        watch: Callable[[Snapshot], None],
    ) -> Trained:
        """Take the steps that are left, with reports, evaluations and checkpoints when due."""
        settings = self.settings
        started = time.perf_counter() - state.seconds
        if state.step == 0:
            state.history.held_out.append((0, self.held_out_loss(state)))
            self.show(watch, state, None)
        pending: list[Array] = []
        while state.step < settings.steps:
            state, loss_and_norm, grads = self.next_state(state)
            pending.append(loss_and_norm)
            step, last = state.step, state.step == settings.steps
            stopping = self.ranks.any(stop.is_set())
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
                    self.show(watch, state, grads)
                state.seconds = time.perf_counter() - started
                speed = self.tokens_per_step * step / state.seconds
                left = (settings.steps - step) * self.tokens_per_step / speed
                if self.ranks.rank == 0:
                    report(Progress(step, settings.steps, losses[-1], held_out, speed, left))
            del grads  # not beside the next step's
            if saving:
                check_finite("a trained weight", step, state.params)
            if folder and saving:
                self.save(folder, state, fingerprint)
            if stopping and not last:
                raise Interrupted(step, is_saved=folder is not None)
        speed = self.tokens_per_step * state.step / state.seconds
        return Trained(to_host(state.params), state.history, state.seconds, speed)

    @property
    def tokens_per_step(self) -> float:
        return self.corpus.tokens_in(self.settings.batch, self.settings.context)

    def save(self, folder: Path, state: State, fingerprint: Mapping[str, Any]) -> None:
        """Check that all ranks hold the same weights; then the first writes a checkpoint."""
        if self.ranks.size > 1:
            weights = checksum(tree.flatten(to_host(state.params)).values())
            self.ranks.check_equal({f"the checksum of the weights at step {state.step}": weights})
        self.ranks.of_first(lambda: save_checkpoint(folder, state, fingerprint))

    def with_params(self, params: Tree) -> Net:
        """The net with the trained tree in its place; full training has no adapters."""
        if self.settings.method == "lora":
            return dataclasses.replace(self.net, lora=params)
        return Net(params, self.net.config)

    def show(self, watch: Callable[[Snapshot], None], state: State, grads: Tree | None) -> None:
        """Let the caller see an evaluation, on the first of several ranks."""
        if self.ranks.rank == 0:
            net = self.with_params(state.params)
            watch(Snapshot(state.step, net, grads, state.history, self.settings))

    def next_state(self, state: State) -> tuple[State, Array, Tree]:
        """The state after one more step, its loss and gradient norm, (2,), and its gradients."""
        settings, step = self.settings, state.step + 1
        rng = np.random.default_rng([settings.seed, step])
        batch, context = settings.shape(step)
        tokens, targets = self.corpus.draw(
            rng, step=step, batch=batch, context=context, seed=settings.seed
        )
        net, lora = self.with_params(state.params), settings.method == "lora"
        masks = None
        if net.lora_config is not None:
            masks = dropout_masks(net.lora, net.lora_config, rng=rng, shape=tokens.shape)
        rows = self.ranks.share(batch)
        loss, grads = batch_loss_and_grads(
            self.workers,
            net,
            tokens[rows],
            targets[rows],
            plan=Plan(base=not lora, lora=lora, recompute=settings.recompute),
            masks=masks and {path: mask[rows] for path, mask in masks.items()},
            device=self.device,
            count=int((targets != IGNORED).sum()),
        )
        loss, grads = self.ranks.sum([loss, grads])
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
        return State(step, params, moments, state.history, state.seconds), loss_and_norm, grads

    def held_out_loss(self, state: State) -> float:
        """Nats per token on the held-out text, or on `eval_tokens` tokens spread over it."""
        batches = self.corpus.held_out_batches(
            context=self.settings.context, limit=self.settings.eval_tokens
        )
        nats_and_tokens = sum_nats(
            self.workers,
            self.with_params(state.params),
            batches[self.ranks.share(len(batches))],
            self.device,
        )
        total, predicted = map(sum, zip(*self.ranks.gather(nats_and_tokens), strict=True))
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
    """Raise MiniloraError, which names `what` and the step, unless all numbers are finite."""
    finite = [namespace(x).isfinite(x).all() for x in tree.flatten(values).values()]
    if not namespace(finite[0]).stack(finite).all():  # one copy from the device
        raise MiniloraError(
            f"{what} is not finite at step {step}: "
            + ("a lower learning rate usually helps; the last checkpoint is kept" if step
               else "the model's numbers overflow")
        )  # fmt: skip
