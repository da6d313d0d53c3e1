"""The register of commands: the name of each, what it does, its options, and its figures.

This is the only place that lists them. `parser` builds the command line and its help from the
register, a command may write no figures but those of its row, and tests compare README with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from minilora.adapters import TARGETS as TARGET_NAMES
from minilora.adapters import LoRAConfig
from minilora.bench.budget import SHAPES
from minilora.cli import commands, course
from minilora.errors import MiniloraError
from minilora.training.loop import RATES, TrainConfig

ADAPTED, TRAINED = LoRAConfig(), TrainConfig()  # the defaults, which Python has, too
PRETRAINED = TrainConfig(
    method="full",
    steps=5600,
    context=512,
    short_steps=3400,
    lr=2e-3,
    warmup=100,
    weight_decay=0.1,
    beta2=0.98,
    eval_every=200,
    eval_tokens=65536,
    checkpoint_every=200,
)


class Option(NamedTuple):
    """An option or a positional argument: its flag, and the keywords of argparse's `add_argument`.

    Errors name arguments by `dest`; the command line puts the flag in its place.
    """

    flag: str
    keywords: dict[str, Any]

    @property
    def dest(self) -> str:
        """The name of the parsed argument."""
        return str(self.keywords.get("dest", self.flag.lstrip("-").replace("-", "_")))

    @property
    def help(self) -> str:
        """Its text in the help."""
        return str(self.keywords["help"])

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
    """A row of the register: `function` returns the exit status.

    `examples` are commands that run as they stand, except for the names of files. `parallel` says
    whether several processes may share the work.
    """

    name: str
    function: Callable[[argparse.Namespace], int]
    summary: str
    examples: tuple[str, ...]
    options: tuple[Option | Group | OneOf, ...]
    figures: tuple[Figure, ...]
    parallel: bool = False

    def every_option(self) -> Iterator[Option]:
        """All options, including those in groups."""
        for entry in self.options:
            yield from [entry] if isinstance(entry, Option) else entry.options

    def check(self, names: Iterable[str]) -> None:
        """Raise MiniloraError unless these are the names of this row's figures, in any order."""
        found = set(names)
        expected = {f.name for f in self.figures if f.always or f.name in found}
        if found != expected:
            raise MiniloraError(
                f"--json: expected the figures that the register lists for {self.name}; "
                f"missing or not among them: {', '.join(sorted(found ^ expected))}"
            )


def option(flag: str, help: str, **keywords: Any) -> Option:
    """An option; the keywords are those of argparse's `add_argument`."""
    return Option(flag, {"help": help, **keywords})


def figures_named(*names: str, note: str = "", always: bool = True) -> tuple[Figure, ...]:
    """Several figures with the same note."""
    return tuple(Figure(name, note, always) for name in names)


def listed(row: Iterable[Figure]) -> str:
    """The names of figures; neighbours with equal notes share one: `a, b (bytes), c`."""
    parts = []
    for note, those in groupby(row, key=lambda figure: figure.note):
        names = ", ".join(figure.name for figure in those)
        parts.append(f"{names} ({note})" if note else names)
    return ", ".join(parts)


def natural(text: str) -> int:
    """The value of an option that is a whole number of at least 0, such as a seed."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


# --- options that commands share ---------------------------------------------------------------

DATA = option(
    "data",
    "text to read: files, folders, `python` (the standard library of this Python) "
    "or `-` (standard input); or records, files in JSON Lines",
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
    "factor of an adapter's update, one for each --adapter, in the same order (default: 1)",
    type=float,
    action="append",
)
METHOD = option(
    "--method",
    "train adapters on a frozen base, or the whole base",
    choices=("lora", "full"),
    default=TRAINED.method,
)
RANK = option("--rank", "rank R of A and B", type=int, default=8)
TARGETS = option(
    "--targets",
    f"weights to adapt, separated by commas: {', '.join(TARGET_NAMES)}, of a Llama also gate, "
    "or regular expressions over paths such as blocks.0.attn.qkv",
    default="qkv",
)
DROPOUT = option("--dropout", "dropout on the adapters' input", type=float, default=ADAPTED.dropout)
BATCH = option("--batch", "sequences in a step", type=int, default=TRAINED.batch)
CONTEXT = option("--context", "tokens in a sequence", type=int, default=128)
LR = option("--lr", "peak learning rate", type=float)
RATE_OF_METHODS = ", ".join(f"{rate:g} for {method}" for method, rate in RATES.items())
WARMUP = option("--warmup", "steps in which the learning rate rises; a cosine follows", type=int)
SEED = option("--seed", "seed of everything random", type=natural, default=0)
THREADS = option(
    "--threads",
    "threads that share a batch (0: one for each core); results depend on their number",
    type=natural,
    default=0,
)
DEVICE = option("--device", "cpu, cuda (CuPy), or auto: cuda if it works", default="cpu")
RECOMPUTE = option(
    "--recompute",
    "keep only the input of each block and recompute the rest: less memory, "
    "somewhat more time, the same result",
    action="store_true",
)
HALF = option(
    "--half",
    "on a GPU, keep the matrices of the frozen base in float16: half the memory",
    action="store_true",
)
DTYPE = option("--dtype", "dtype in the file", choices=("float32", "float16"), default="float32")
OUT = option("--out", "folder for the result", type=Path, default=Path("adapter"))

DRAWS = (
    option("--tokens", "how many tokens to add", dest="max_tokens", type=int, default=300),
    option(
        "--temperature",
        "how random the draws are; 0 always takes the likeliest token",
        type=float,
        default=0.8,
    ),
    option("--top-k", "draw from the k likeliest tokens", type=int),
    option(
        "--top-p",
        "draw from the fewest likeliest tokens whose probabilities reach p in sum",
        type=float,
    ),
    SEED.but(help="seed of the draws"),
    DEVICE,
    HALF,
)

LORA = Group(
    "adapters (method lora)",
    (
        ADAPTER.but(
            help="folder of an adapter to train further: it keeps its rank, scale and targets, "
            "the optimiser starts afresh"
        ),
        RANK.but(default=None, help=f"{RANK.help} (default: {ADAPTED.rank})"),
        option("--alpha", "scale s = alpha / rank (default: rank)", type=float),
        TARGETS.but(default=None, help=f"{TARGETS.help} (default: {','.join(ADAPTED.targets)})"),
        option("--rslora", "rank-stabilised: scale s = alpha / √rank", action="store_true"),
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


def training(defaults: TrainConfig, lr: Option, warmup: Option) -> Group:
    """The options of a training run."""
    return Group(
        "training",
        (
            option("--steps", "optimiser steps", type=int, default=defaults.steps),
            BATCH,
            CONTEXT.but(default=defaults.context),
            lr,
            option(
                "--short-context",
                "tokens in a sequence during the first --short-steps steps",
                type=int,
                default=defaults.short_context,
            ),
            option(
                "--short-steps",
                "first steps, which read as many tokens in sequences of --short-context",
                type=int,
                default=defaults.short_steps,
            ),
            warmup,
            option(
                "--weight-decay",
                "AdamW's decoupled weight decay, on matrices only",
                type=float,
                default=defaults.weight_decay,
            ),
            option(
                "--beta2",
                "AdamW's decay rate of the mean of squared gradients",
                type=float,
                default=defaults.beta2,
            ),
            option(
                "--clip",
                "global norm above which the gradients are scaled down",
                type=float,
                default=defaults.clip,
            ),
            option(
                "--eval-every",
                "steps between evaluations on held-out text",
                type=int,
                default=defaults.eval_every,
            ),
            option(
                "--eval-tokens",
                "held-out tokens read by an evaluation",
                type=int,
                default=defaults.eval_tokens,
            ),
            option(
                "--checkpoint-every",
                "steps between checkpoints",
                type=int,
                default=defaults.checkpoint_every,
            ),
            option("--log-every", "steps between reports", type=int, default=defaults.log_every),
            SEED,
            THREADS,
            DEVICE,
            RECOMPUTE,
            option(
                "--resume",
                "continue the run in the output folder, or start one if there is none",
                action="store_true",
            ),
            option(
                "--plot",
                "draw the training and held-out losses as PNG, SVG or PDF",
                type=Path,
                metavar="FILE.png",
            ),
        ),
    )


# --- figures that commands share ---------------------------------------------------------------

TRAINING = (
    *figures_named("loss_before", "loss_after", note="nats per token, held-out text"),
    *figures_named("trainable_parameters", "base_parameters", "adapter_bytes"),
    *figures_named("seconds", "tokens_per_second"),
)
PROCESSES = figures_named(
    "processes",
    "allreduce_bytes",
    "allreduce_bytes_full",
    note="only with several processes",
    always=False,
)


# --- the register ------------------------------------------------------------------------------

COMMANDS = (
    Command(
        "demo",
        commands.demo_command,
        "watch the built-in model learn Python through LoRA, in about a minute",
        examples=("minilora demo",),
        options=(SEED, THREADS, DEVICE),
        figures=(
            *TRAINING,
            *figures_named("bits_per_byte_before", "bits_per_byte_after"),
            *figures_named("merge_max_abs_difference", "gradcheck_max_relative_error"),
        ),
    ),
    Command(
        "adapt",
        commands.adapt_command,
        "train an adapter, or the whole base, on text or records",
        examples=(
            "minilora adapt notes.txt --out my-adapter",
            "minilora adapt questions.jsonl --steps 100 --out my-adapter",
            "minilora adapt python --rank 4 --targets q,v --steps 400 --plot losses.png",
        ),
        options=(
            DATA,
            BASE,
            METHOD,
            option(
                "--loss",
                "for records: count the loss on the answers or on all tokens (default: answer)",
                choices=("answer", "all"),
            ),
            LORA,
            training(
                TRAINED,
                LR.but(help=f"{LR.help} (default: {RATE_OF_METHODS})"),
                WARMUP.but(help=f"{WARMUP.help} (default: a tenth of the steps)"),
            ),
            option(
                "--sample",
                "show how the model continues this text, at the start and at each evaluation",
                metavar="TEXT",
            ),
            option(
                "--report",
                "write a page about the run to this file, again at each evaluation: losses, "
                "samples, settings, gradients and updates of each adapter",
                type=Path,
                metavar="FILE.html",
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
        examples=(
            "minilora pretrain books/ --out base",
            "minilora pretrain text.txt --layers 2 --width 64 --context 128 --steps 500",
        ),
        options=(
            DATA.but(help=DATA.help.partition(";")[0]),
            option("--layers", "number of blocks", dest="n_layer", type=int, default=6),
            option("--width", "width of the model", dest="n_embd", type=int, default=256),
            option("--heads", "attention heads in a block", dest="n_head", type=int, default=4),
            training(
                PRETRAINED,
                LR.but(default=PRETRAINED.lr),
                WARMUP.but(default=PRETRAINED.warmup),
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
        "measure the loss of a model on text or records, and its answers to records",
        examples=(
            "minilora evaluate notes.txt",
            "minilora evaluate questions.jsonl --adapter my-adapter",
            "minilora evaluate python --held-out --adapter my-adapter",
        ),
        options=(
            DATA,
            BASE,
            ADAPTER,
            WEIGHT,
            option(
                "--held-out",
                "only the part that adapt and pretrain hold out: the last 5%% of every file; "
                "of `python`, whole files; of records, whole records",
                action="store_true",
            ),
            THREADS,
            DEVICE,
            HALF,
        ),
        figures=(
            Figure("loss", "nats per token"),
            *figures_named("bits_per_byte", "tokens"),
            *figures_named("records", "asked", "exact_match", note="only of records", always=False),
        ),
    ),
    Command(
        "generate",
        commands.generate_command,
        "continue a text",
        examples=(
            'minilora generate "Once upon a time"',
            'minilora generate "class " --adapter my-adapter --temperature 0.5 --tokens 100',
        ),
        options=(
            option(
                "text",
                "the text to continue, or - for standard input (default: a new line)",
                nargs="?",
                metavar="TEXT",
            ),
            option("--prompt", "the same as TEXT", metavar="TEXT"),
            BASE,
            ADAPTER,
            WEIGHT,
            *DRAWS,
        ),
        figures=(Figure("text", "the continuation"), Figure("token_ids")),
    ),
    Command(
        "play",
        commands.play_command,
        "prompt a model, or chat with it, line by line; it stays loaded",
        examples=("minilora play", "minilora play --adapter my-adapter --temperature 0"),
        options=(BASE, ADAPTER, WEIGHT, *DRAWS),
        figures=(),
    ),
    Command(
        "merge",
        commands.merge_command,
        "add adapters into the weights of their base",
        examples=(
            "minilora merge --adapter my-adapter --out merged",
            "minilora merge --adapter first --weight 0.7 --adapter second --weight 0.3",
        ),
        options=(
            BASE,
            ADAPTER.but(required=True),
            WEIGHT,
            DTYPE,
            DEVICE,
            OUT.but(default=Path("merged"), help="folder for the base"),
        ),
        figures=(
            Figure("merge_max_abs_difference", "of logits, before and after merging"),
            Figure(
                "unmerge_max_abs_difference",
                "of weights, in the base and in the merged file after subtracting the adapters",
            ),
            *figures_named("parameters", "bytes"),
        ),
    ),
    Command(
        "mix",
        commands.mix_command,
        "write the weighted sum of adapters as one adapter",
        examples=(
            "minilora mix --adapter first --adapter second --out both",
            "minilora mix --adapter first --weight 1 --adapter second --weight -0.5",
        ),
        options=(
            BASE,
            ADAPTER.but(required=True),
            WEIGHT,
            OUT.but(default=Path("mixed"), help="folder for the adapter"),
        ),
        figures=(
            Figure("mix_max_abs_difference", "of logits, before and after writing the sum"),
            *figures_named("parameters", "bytes"),
        ),
    ),
    Command(
        "convert",
        commands.convert_command,
        "make a base of a GGUF file, as llama.cpp has its models",
        examples=("minilora convert model.gguf my-base",),
        options=(
            option("gguf", "the file: a Llama or a Qwen2", type=Path, metavar="FILE"),
            option("out", "folder for the base", type=Path, metavar="DIR"),
            option(
                "--tokenizer",
                "the model's tokenizer.json, where the file's own tokenizer is not known",
                type=Path,
                metavar="FILE",
            ),
            DTYPE,
        ),
        figures=figures_named("parameters", "tokens", "bytes"),
    ),
    Command(
        "gradcheck",
        commands.gradcheck_command,
        "compare every gradient with central differences in float64",
        examples=(
            "minilora gradcheck",
            "minilora gradcheck --seed 1 --json errors.json",
        ),
        options=(SEED.but(help="seed of the random arguments"), DEVICE),
        figures=(
            Figure("max_relative_error"),
            Figure("pairs", "name to error; null: not finite"),
        ),
    ),
    Command(
        "bench",
        commands.bench_command,
        "time a step, and its matrix products alone",
        examples=(
            "minilora bench --shape small --rank 8",
            "minilora bench --versus 1 --rounds 5",
            "minilora bench --shape smollm2 --batch 4 --targets q,v --versus peft",
        ),
        options=(
            option(
                "--shape",
                "4 blocks of width 256, 6 of 384, 12 of 768 or 24 of 1024, or a Llama's 30 of 576; "
                "the weights are random",
                choices=("tiny", "small", "gpt2", "gpt2-medium", "smollm2"),
                default="tiny",
            ),
            option(
                "--what",
                "a training step, the loss on a batch, or the generation of --context tokens",
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
                "time in turn with PyTorch, transformers and PEFT (and the matrix products of "
                "both), with one thread, or with --recompute",
                choices=("peft", "1", "recompute"),
            ),
            option("--rounds", "turns of --steps runs each, with --versus", type=int, default=3),
        ),
        figures=(
            *figures_named(
                "shape", "what", "method", "batch", "context", "rank", "targets", "device"
            ),
            *figures_named("threads", "steps", "recompute"),
            *figures_named("step_seconds_median", "step_seconds_minimum", "tokens_per_second"),
            *figures_named(
                "floor_seconds", "floor_seconds_minimum", "floor_gflop", "step_to_floor"
            ),
            *figures_named("machine", "peak_rss_bytes", "idle_rss_bytes", "page_faults"),
            *figures_named("import_seconds", "first_step_seconds"),
            *figures_named("blas", "blas_kernel", "blas_threads", "breakdown"),
            Figure("versus_peft", "only with --versus peft", always=False),
            Figure("versus_one_thread", "only with --versus 1", always=False),
            Figure("versus_recompute", "only with --versus recompute", always=False),
        ),
    ),
    Command(
        "budget",
        commands.budget_command,
        "compute by formula what a training step needs, LoRA beside full fine-tuning",
        examples=(
            "minilora budget --model gpt3 --rank 4 --targets q,v --context 2048",
            "minilora budget --base my-base --method full",
        ),
        options=(
            OneOf(
                (
                    option("--model", "a named shape", choices=tuple(SHAPES), default="gpt2"),
                    BASE.but(help="folder whose config.json gives the shape; no weights are read"),
                )
            ),
            *(
                option(f"--{size}", f"{what} (default: the shape's)", dest=dest, type=int)
                for size, what, dest in (
                    ("layers", "number of blocks", "n_layer"),
                    ("width", "width of the model", "n_embd"),
                    ("heads", "attention heads in a block", "n_head"),
                    ("vocabulary", "tokens in the vocabulary", "vocab_size"),
                )
            ),
            METHOD.but(help="the method whose figures --json writes"),
            RANK,
            TARGETS,
            DROPOUT,
            BATCH,
            CONTEXT,
            DTYPE.but(choices=("float16", "float32", "float64"), help="dtype of every array"),
            THREADS.but(
                default=None,
                help="threads that share the batch as in adapt (0: one for each core; "
                "default: the whole batch in one pass)",
            ),
            RECOMPUTE,
            DEVICE.but(
                choices=("cpu", "cuda"), help="what the step would run on; no GPU is needed"
            ),
        ),
        figures=(
            *figures_named("trainable_parameters", "base_parameters", "adapter_bytes"),
            *figures_named("weights_bytes", "gradients_bytes", "optimizer_bytes"),
            *figures_named("activations_bytes", "peak_bytes", "forward_flops", "backward_flops"),
        ),
    ),
    Command(
        "course",
        course.course_command,
        "exercises: write the backward passes yourself, and have them checked",
        examples=(
            "minilora course list",
            "minilora course new homework",
            "minilora course check homework --only lora layer_norm",
            "minilora course autograder autograder.zip",
        ),
        options=(
            option(
                "action",
                "list the exercises; make files to fill in (new DIR); check them (check DIR); "
                "write an autograder for Gradescope (autograder OUT.zip)",
                choices=course.ACTIONS,
                metavar="action",
                nargs="?",
                default="list",
            ),
            option("path", "the folder, or the zip", type=Path, nargs="?", metavar="path"),
            option("--only", "only these exercises", nargs="+", metavar="NAME"),
            option(
                "--hints",
                "new: what the files show of the equations",
                choices=("none", "tags", "equations"),
                default="tags",
            ),
            option("--timeout", "check: seconds for each exercise", type=float, default=60.0),
            option(
                "--gradescope",
                "check: write the results to this file for Gradescope",
                type=Path,
                metavar="FILE",
            ),
        ),
        figures=(
            Figure("max_points"),
            *figures_named("points", "exercises", note="only of check", always=False),
        ),
    ),
)
