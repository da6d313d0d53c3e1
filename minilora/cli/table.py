"""The table of commands: the name of each, what it does, its options, and its figures.

This is the only place that names them. `parser` makes the command line and its help from the table,
a command may write no other figures than those of its row, and tests compare README with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from minilora.adapters import TARGETS as TARGET_NAMES
from minilora.bench.budget import SHAPES
from minilora.cli import commands
from minilora.errors import MiniloraError


class Option(NamedTuple):
    """An option, in the words of argparse's `add_argument`."""

    flag: str
    keywords: dict[str, Any]

    def but(self, **keywords: Any) -> Option:
        """The same option with other keywords."""
        return self._replace(keywords=self.keywords | keywords)


class Group(NamedTuple):
    """Options under a title of their own in the help."""

    title: str
    options: tuple[Option, ...]


class OneOf(NamedTuple):
    """Options of which at most one may be given."""

    options: tuple[Option, ...]


class Figure(NamedTuple):
    """A figure that `--json` writes: its unit or meaning, and whether it is always written."""

    name: str
    note: str = ""
    always: bool = True


class Command(NamedTuple):
    """A row of the table: `run` returns the exit status, `parallel` allows several processes."""

    name: str
    run: Callable[[argparse.Namespace], int]
    summary: str
    options: tuple[Option | Group | OneOf, ...]
    figures: tuple[Figure, ...]
    parallel: bool = False

    def check(self, names: Iterable[str]) -> None:
        """Raise MiniloraError unless these are the names of this row's figures, in any order."""
        found = set(names)
        expected = {f.name for f in self.figures if f.always or f.name in found}
        if found != expected:
            raise MiniloraError(
                f"--json: expected the figures that the table of commands names for {self.name}; "
                f"missing or not among them: {', '.join(sorted(found ^ expected))}"
            )


def option(flag: str, help: str, **keywords: Any) -> Option:
    """An option; the keywords are those of argparse's `add_argument`."""
    return Option(flag, {"help": help, **keywords})


def figures(*names: str, note: str = "", always: bool = True) -> tuple[Figure, ...]:
    """Several figures with the same note."""
    return tuple(Figure(name, note, always) for name in names)


def listed(row: Iterable[Figure]) -> str:
    """The names of figures; neighbours with the same note share it: `a, b (bytes), c`."""
    parts = []
    for note, those in groupby(row, key=lambda figure: figure.note):
        names = ", ".join(figure.name for figure in those)
        parts.append(f"{names} ({note})" if note else names)
    return ", ".join(parts)


def natural(text: str) -> int:
    """The whole number of at least 0 that an option is."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


# --- options that commands share ---------------------------------------------------------------

DATA = option(
    "data",
    "text to read: files, folders, `python` (the standard library of this Python) "
    "or `-` (standard input)",
    nargs="+",
    metavar="DATA",
)
BASE = option(
    "--base",
    "folder of a GPT-2 in Hugging Face's layout, or the name of one on its hub, such as "
    "openai-community/gpt2 (default: the built-in base)",
    metavar="DIR",
)
ADAPTER = option(
    "--adapter",
    "folder of an adapter in PEFT's layout; may be repeated: the updates add up",
    action="append",
    default=[],
    metavar="DIR",
)
WEIGHT = option(
    "--weight",
    "factor of an adapter's update, one for each --adapter in their order (default: 1)",
    type=float,
    action="append",
)
METHOD = option(
    "--method",
    "train adapters on a frozen base, or the whole base",
    choices=("lora", "full"),
    default="lora",
)
RANK = option("--rank", "rank R of A and B", type=int, default=8)
TARGETS = option(
    "--targets",
    f"weights to adapt, separated by commas: {', '.join(TARGET_NAMES)}, "
    "or regular expressions over paths such as blocks.0.attn.qkv",
    default="qkv",
)
DROPOUT = option("--dropout", "dropout on the adapters' input", type=float, default=0.0)
BATCH = option("--batch", "sequences in a step", type=int, default=8)
CONTEXT = option("--context", "tokens in a sequence", type=int, default=128)
LR = option("--lr", "peak learning rate", type=float)
RATES = ", ".join(f"{rate:g} for {method}" for method, rate in commands.ADAPT_LR.items())
SEED = option("--seed", "seed of everything random", type=natural, default=0)
THREADS = option(
    "--threads",
    "threads that share a batch (0: one for each core); results depend on their number",
    type=natural,
    default=0,
)
DEVICE = option("--device", "cpu, cuda (CuPy), or auto: cuda where it works", default="cpu")
RECOMPUTE = option(
    "--recompute",
    "keep the input of each block alone and compute the rest again: less memory, "
    "some more time, the same result",
    action="store_true",
)
HALF = option(
    "--half",
    "on a GPU, keep the matrices of the frozen base in float16: half the memory",
    action="store_true",
)
DTYPE = option("--dtype", "dtype in the file", choices=("float32", "float16"), default="float32")
OUT = option("--out", "folder for the result", type=Path, default=Path("adapter"))

FRESH = commands.ADAPT_LORA
LORA = Group(
    "adapters (method lora)",
    (
        ADAPTER.but(
            help="folder of an adapter to train further: its rank, scale and targets stay, "
            "the optimiser starts afresh"
        ),
        RANK.but(default=None, help=f"rank R of A and B (default: {FRESH['rank']})"),
        option("--alpha", "s = alpha / rank (default: rank)", type=float),
        TARGETS.but(
            default=None,
            help=f"{TARGETS.keywords['help']} (default: {','.join(FRESH['targets'])})",
        ),
        option("--rslora", "s = alpha / √rank", action="store_true"),
        DROPOUT.but(default=None, help="dropout on the adapters' input (default: 0)"),
        *(
            option(
                f"--{name}-pattern",
                f"another {name} for the adapters whose path a pattern matches; may be repeated",
                action="append",
                default=[],
                metavar=f"PATTERN={letter}",
            )
            for name, letter in (("rank", "R"), ("alpha", "A"))
        ),
    ),
)


def training(
    lr: Option,
    *,
    steps: int,
    context: int,
    short_steps: int,
    warmup: int,
    weight_decay: float,
    beta2: float,
    every: int,
) -> Group:
    """The options of a training run, with the learning rate and the defaults of one command.

    `every`: steps between evaluations, and between checkpoints.
    """
    return Group(
        "training",
        (
            option("--steps", "optimiser steps", type=int, default=steps),
            BATCH,
            CONTEXT.but(default=context),
            lr,
            option(
                "--short-context",
                "tokens in a sequence of the first --short-steps steps",
                type=int,
                default=128,
            ),
            option(
                "--short-steps",
                "steps that read as many tokens in shorter sequences",
                type=int,
                default=short_steps,
            ),
            option(
                "--warmup",
                "steps in which the learning rate rises; a cosine follows",
                type=int,
                default=warmup,
            ),
            option(
                "--weight-decay",
                "AdamW's decoupled decay of matrices",
                type=float,
                default=weight_decay,
            ),
            option(
                "--beta2", "AdamW's decay of the squared gradient's mean", type=float, default=beta2
            ),
            option("--clip", "largest global gradient norm", type=float, default=1.0),
            option(
                "--eval-every",
                "steps between evaluations on held-out text",
                type=int,
                default=every,
            ),
            option(
                "--eval-tokens", "held-out tokens read by an evaluation", type=int, default=65536
            ),
            option("--checkpoint-every", "steps between checkpoints", type=int, default=every),
            option("--log-every", "steps between reports", type=int, default=10),
            SEED,
            THREADS,
            DEVICE,
            RECOMPUTE,
            option(
                "--resume",
                "go on with the run in the output folder, or start it if there is none",
                action="store_true",
            ),
            option("--plot", "draw both loss curves", type=Path, metavar="FILE.png"),
        ),
    )


# --- figures that commands share ---------------------------------------------------------------

TRAINING = (
    *figures("loss_before", "loss_after", note="nats per token, held-out text"),
    *figures("trainable_parameters", "base_parameters", "adapter_bytes"),
    *figures("seconds", "tokens_per_second"),
)
PROCESSES = figures(
    "processes",
    "allreduce_bytes",
    "allreduce_bytes_full",
    note="only with several processes",
    always=False,
)


# --- the table ---------------------------------------------------------------------------------

COMMANDS = (
    Command(
        "demo",
        commands.demo_command,
        "watch the built-in model learn Python through LoRA, in about a minute",
        options=(SEED, THREADS, DEVICE),
        figures=(
            *TRAINING,
            *figures("bits_per_byte_before", "bits_per_byte_after"),
            *figures("merge_max_abs_difference", "gradcheck_max_relative_error"),
        ),
    ),
    Command(
        "adapt",
        commands.adapt_command,
        "adapt a base to text",
        options=(
            DATA,
            BASE,
            METHOD,
            LORA,
            training(
                LR.but(help=f"peak learning rate (default: {RATES})"),
                steps=200,
                context=256,
                short_steps=0,
                warmup=20,
                weight_decay=0.0,
                beta2=0.999,
                every=50,
            ),
            HALF,
            DTYPE.but(help="dtype in the file of a base (--method full)"),
            OUT,
        ),
        figures=(*TRAINING, *PROCESSES),
        parallel=True,
    ),
    Command(
        "pretrain",
        commands.pretrain_command,
        "train a byte-level base from scratch",
        options=(
            DATA,
            option("--layers", "number of blocks", type=int, default=6),
            option("--width", "width of the model", type=int, default=256),
            option("--heads", "attention heads in a block", type=int, default=4),
            training(
                LR.but(default=2e-3),
                steps=5600,
                context=512,
                short_steps=3400,
                warmup=100,
                weight_decay=0.1,
                beta2=0.98,
                every=200,
            ),
            DTYPE,
            OUT.but(default=Path("base"), help="folder for the base"),
        ),
        figures=(*TRAINING, *PROCESSES),
        parallel=True,
    ),
    Command(
        "evaluate",
        commands.evaluate_command,
        "measure the loss of a model on text",
        options=(
            DATA,
            BASE,
            ADAPTER,
            WEIGHT,
            option(
                "--held-out",
                "only the part that adapt and pretrain hold out: the last 5%% of every file, "
                "and whole files of `python`",
                action="store_true",
            ),
            THREADS,
            DEVICE,
            HALF,
        ),
        figures=(Figure("loss", "nats per token"), *figures("bits_per_byte", "tokens")),
    ),
    Command(
        "generate",
        commands.generate_command,
        "continue a text",
        options=(
            BASE,
            ADAPTER,
            WEIGHT,
            option(
                "--prompt",
                "the text to continue, or - for standard input (default: a new line)",
                metavar="TEXT",
            ),
            option("--tokens", "how many tokens to add", type=int, default=300),
            option("--temperature", "0 always takes the likeliest token", type=float, default=0.8),
            option("--top-k", "draw from the k likeliest tokens", type=int),
            option(
                "--top-p", "draw from the likeliest tokens that reach probability p", type=float
            ),
            SEED.but(help="seed of the draws"),
            DEVICE,
            HALF,
        ),
        figures=(Figure("text", "the continuation"), Figure("token_ids")),
    ),
    Command(
        "merge",
        commands.merge_command,
        "add adapters into their base, giving a base as fast as the old",
        options=(
            BASE,
            ADAPTER.but(required=True),
            WEIGHT,
            DTYPE,
            DEVICE,
            OUT.but(default=Path("merged"), help="folder for the base"),
        ),
        figures=(
            Figure("merge_max_abs_difference", "of logits, with the adapters in use and merged"),
            Figure(
                "unmerge_max_abs_difference",
                "of weights, in the base and after subtracting the adapters from the merged file",
            ),
            *figures("parameters", "bytes"),
        ),
    ),
    Command(
        "mix",
        commands.mix_command,
        "write the weighted sum of adapters as one adapter",
        options=(
            BASE,
            ADAPTER.but(required=True),
            WEIGHT,
            OUT.but(default=Path("mixed"), help="folder for the adapter"),
        ),
        figures=(
            Figure("mix_max_abs_difference", "of logits, with the adapters in use and written"),
            *figures("parameters", "bytes"),
        ),
    ),
    Command(
        "gradcheck",
        commands.gradcheck_command,
        "compare every gradient with central differences in float64",
        options=(SEED.but(help="seed of the random arguments"), DEVICE),
        figures=(
            Figure("max_relative_error"),
            Figure("pairs", "name to error; null: not finite"),
        ),
    ),
    Command(
        "bench",
        commands.bench_command,
        "time a step, and the matrix products that it cannot do without",
        options=(
            option(
                "--shape",
                "4 blocks of width 256, 6 of 384, 12 of 768 or 24 of 1024; the weights are random",
                choices=("tiny", "small", "gpt2", "gpt2-medium"),
                default="tiny",
            ),
            option(
                "--what",
                "a step of training, the loss on a batch, or a text of --context tokens",
                choices=("step", "evaluate", "generate"),
                default="step",
            ),
            METHOD.but(help="what a step trains"),
            BATCH.but(help="sequences in a batch"),
            CONTEXT,
            RANK,
            TARGETS.but(help="weights to adapt, separated by commas"),
            THREADS.but(help="threads in all (0: one for each core)"),
            RECOMPUTE,
            option("--steps", "how many times it is timed", type=int, default=10),
            DEVICE,
            option(
                "--versus",
                "take turns with PyTorch, transformers and PEFT (and both libraries' products "
                "alone), with one thread, or with --recompute",
                choices=("peft", "1", "recompute"),
            ),
            option("--rounds", "turns, of --steps each, with --versus", type=int, default=3),
        ),
        figures=(
            *figures("shape", "what", "method", "batch", "context", "rank", "targets", "device"),
            *figures("threads", "steps", "recompute"),
            *figures("step_seconds_median", "step_seconds_minimum", "tokens_per_second"),
            *figures("floor_seconds", "floor_seconds_minimum", "floor_gflop", "step_to_floor"),
            *figures("machine", "peak_rss_bytes", "idle_rss_bytes", "page_faults"),
            *figures("import_seconds", "first_step_seconds"),
            *figures("blas", "blas_kernel", "blas_threads", "breakdown"),
            Figure("versus_peft", "only with --versus peft", always=False),
            Figure("versus_one_thread", "only with --versus 1", always=False),
            Figure("versus_recompute", "only with --versus recompute", always=False),
        ),
    ),
    Command(
        "budget",
        commands.budget_command,
        "work out by formula what a training step takes, LoRA beside full fine-tuning",
        options=(
            OneOf(
                (
                    option("--model", "a named shape", choices=tuple(SHAPES), default="gpt2"),
                    BASE.but(help="folder whose config.json gives the shape; no weights are read"),
                )
            ),
            *(
                option(f"--{size}", f"other {size} than the shape's", type=int)
                for size in ("layers", "width", "heads", "vocabulary")
            ),
            METHOD.but(help="whose figures --json writes"),
            RANK,
            TARGETS,
            DROPOUT,
            BATCH,
            CONTEXT,
            DTYPE.but(choices=("float16", "float32", "float64"), help="dtype of every array"),
            THREADS.but(
                default=None,
                help="threads that share the batch as in adapt, 0: one for each core "
                "(default: all of it in one pass)",
            ),
            RECOMPUTE,
            DEVICE.but(
                choices=("cpu", "cuda"), help="what the step would run on; a GPU is not needed"
            ),
        ),
        figures=(
            *figures("trainable_parameters", "base_parameters", "adapter_bytes"),
            *figures("weights_bytes", "gradients_bytes", "optimizer_bytes"),
            *figures("activations_bytes", "peak_bytes", "forward_flops", "backward_flops"),
        ),
    ),
)
