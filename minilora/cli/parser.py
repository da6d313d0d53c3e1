"""The command line: `minilora COMMAND`, or `python -m minilora COMMAND`.

A command is one function here, which makes its parser and stands in `COMMANDS`, and one in
`commands`, which runs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np

from minilora.cli import commands
from minilora.errors import MiniloraError
from minilora.training import ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, as one where MPI runs several of us."""
    return ranks.as_one(lambda: answer(argv))


def answer(argv: Sequence[str] | None) -> int:
    """Run one command and return its exit status.

    0: done. 1: a gradient check failed. 2: bad input, with one sentence saying what was expected.
    130: stopped by Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console may not know every character
            stream.reconfigure(errors="replace")
    try:
        arguments = parser().parse_args(argv)
        if arguments.run not in (commands.adapt_command, commands.pretrain_command):
            ranks.check_alone()
        if arguments.json is not None:
            commands.check_writable(arguments.json, "--json")
        with np.errstate(all="ignore"):  # what overflows is told in a sentence, where it matters
            status = int(arguments.run(arguments))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as interrupt:
        print(f"minilora: stopped{interrupt}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError as error:
        print(f"minilora: not enough memory: {error}", file=sys.stderr)
        return 2
    except (MiniloraError, OSError) as error:
        print(f"minilora: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2


# --- the parser --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The parser of every command; the reference of the command line is made from it."""
    from minilora import __version__

    root = Parser(
        prog="minilora",
        description="Low-rank adaptation of a GPT in plain NumPy, every gradient written by hand.",
        epilog="minilora COMMAND --help explains a command; `minilora demo` is the place to start.",
    )
    root.add_argument("--version", action="version", version=f"minilora {__version__}")
    group = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(group)
    return root


def add_command(
    group: Any, name: str, run: Callable[[argparse.Namespace], int], *, summary: str, figures: str
) -> argparse.ArgumentParser:
    """The parser of a new command, which `run` carries out; figures is what --json writes."""
    sub: argparse.ArgumentParser = group.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=HelpFormatter,
    )
    sub.set_defaults(run=run)
    sub.add_argument(
        "--json", type=Path, metavar="FILE", help=f"write the figures there: {figures}"
    )
    return sub


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the options in one sentence, as all errors are reported."""

    def error(self, message: str) -> NoReturn:
        raise MiniloraError(f"{message}; {self.prog} --help lists what is expected")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults to the help, but for those that are not there; N and X stand for numbers."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        absent = action.default is None or action.default is False or action.default == []
        return action.help if absent else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        letters: dict[Any, str] = {int: "N", natural: "N", float: "X", Path: "DIR"}
        return letters.get(action.type) or super()._get_default_metavar_for_optional(action)


# --- a parser for each command -----------------------------------------------------------------

TRAINING_FIGURES = (
    "loss_before, loss_after (nats per token, held-out text), trainable_parameters, "
    "base_parameters, adapter_bytes, seconds, tokens_per_second"
)


def add_demo(group: Any) -> None:
    sub = add_command(
        group,
        "demo",
        commands.demo_command,
        summary="watch the built-in model learn Python through LoRA, in about a minute",
        figures="those of adapt, and bits_per_byte_before, bits_per_byte_after, "
        "merge_max_abs_difference, gradcheck_max_relative_error",
    )
    add_seed(sub)
    add_threads(sub)
    add_device(sub)


def add_adapt(group: Any) -> None:
    sub = add_command(
        group,
        "adapt",
        commands.adapt_command,
        summary="adapt a base to text",
        figures=TRAINING_FIGURES,
    )
    add_data(sub)
    add_base(sub)
    sub.add_argument(
        "--method",
        choices=("lora", "full"),
        default="lora",
        help="train adapters on a frozen base, or the whole base",
    )
    add_lora(sub)
    add_training(sub, ADAPT_DEFAULTS)
    add_half(sub)
    add_dtype(sub, "dtype in the file of a base (--method full)")
    add_out(sub, "adapter", "folder for the result")


def add_pretrain(group: Any) -> None:
    sub = add_command(
        group,
        "pretrain",
        commands.pretrain_command,
        summary="train a byte-level base from scratch",
        figures=TRAINING_FIGURES,
    )
    add_data(sub)
    sub.add_argument("--layers", type=int, default=6, help="number of blocks")
    sub.add_argument("--width", type=int, default=256, help="width of the model")
    sub.add_argument("--heads", type=int, default=4, help="attention heads in a block")
    add_training(sub, PRETRAIN_DEFAULTS)
    add_dtype(sub)
    add_out(sub, "base", "folder for the base")


def add_evaluate(group: Any) -> None:
    sub = add_command(
        group,
        "evaluate",
        commands.evaluate_command,
        summary="measure the loss of a model on text",
        figures="loss (nats per token), bits_per_byte, tokens",
    )
    add_data(sub)
    add_base(sub)
    add_adapters(sub)
    sub.add_argument(
        "--held-out",
        action="store_true",
        help="only the part that adapt and pretrain hold out: the last 5%% of every file, "
        "and whole files of `python`",
    )
    add_threads(sub)
    add_device(sub)
    add_half(sub)


def add_generate(group: Any) -> None:
    sub = add_command(
        group,
        "generate",
        commands.generate_command,
        summary="continue a text",
        figures="text (the continuation), token_ids",
    )
    add_base(sub)
    add_adapters(sub)
    sub.add_argument(
        "--prompt",
        metavar="TEXT",
        help="the text to continue, or - for standard input (default: a new line)",
    )
    sub.add_argument("--tokens", type=int, default=300, help="how many tokens to add")
    sub.add_argument(
        "--temperature", type=float, default=0.8, help="0 always takes the likeliest token"
    )
    sub.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    sub.add_argument(
        "--top-p", type=float, help="draw from the likeliest tokens that reach probability p"
    )
    add_seed(sub, "seed of the draws")
    add_device(sub)
    add_half(sub)


def add_merge(group: Any) -> None:
    sub = add_command(
        group,
        "merge",
        commands.merge_command,
        summary="add adapters into their base, giving a base as fast as the old",
        figures="merge_max_abs_difference (of logits, with the adapters in use and merged), "
        "unmerge_max_abs_difference (of weights, in the base and after subtracting the adapters "
        "from the merged file), parameters, bytes",
    )
    add_base(sub)
    add_adapters(sub, required=True)
    add_dtype(sub)
    add_device(sub)
    add_out(sub, "merged", "folder for the base")


def add_mix(group: Any) -> None:
    sub = add_command(
        group,
        "mix",
        commands.mix_command,
        summary="write the weighted sum of adapters as one adapter",
        figures="mix_max_abs_difference (of logits, with the adapters in use and written), "
        "parameters, bytes",
    )
    add_base(sub)
    add_adapters(sub, required=True)
    add_out(sub, "mixed", "folder for the adapter")


def add_gradcheck(group: Any) -> None:
    sub = add_command(
        group,
        "gradcheck",
        commands.gradcheck_command,
        summary="hold every gradient against central differences in float64",
        figures="max_relative_error, pairs (name to error; null: not finite)",
    )
    add_seed(sub, "seed of the random arguments")
    add_device(sub)


def add_bench(group: Any) -> None:
    sub = add_command(
        group,
        "bench",
        commands.bench_command,
        summary="time a step, and the matrix products that it cannot do without",
        figures="step_seconds_median, floor_seconds, tokens_per_second, peak_rss_bytes, "
        "blas_kernel, threads, breakdown, and more",
    )
    sub.add_argument(
        "--shape",
        choices=("tiny", "small", "gpt2", "gpt2-medium"),
        default="tiny",
        help="4 blocks of width 256, 6 of 384, 12 of 768 or 24 of 1024; the weights are random",
    )
    sub.add_argument(
        "--what",
        choices=("step", "evaluate", "generate"),
        default="step",
        help="a step of training, the loss on a batch, or a text of --context tokens",
    )
    sub.add_argument(
        "--method", choices=("lora", "full"), default="lora", help="what a step trains"
    )
    sub.add_argument("--batch", type=int, default=8, help="sequences in a batch")
    sub.add_argument("--context", type=int, default=128, help="tokens in a sequence")
    sub.add_argument("--rank", type=int, default=8, help="rank R of A and B")
    sub.add_argument("--targets", default="qkv", help="weights to adapt, separated by commas")
    sub.add_argument(
        "--threads", type=natural, default=0, help="threads in all (0: one for each core)"
    )
    add_recompute(sub)
    sub.add_argument("--steps", type=int, default=10, help="how many times it is timed")
    add_device(sub)
    sub.add_argument(
        "--versus",
        choices=("peft", "1", "recompute"),
        help="take turns with PyTorch, transformers and PEFT (and both libraries' products alone), "
        "with one thread, or with --recompute",
    )
    sub.add_argument("--rounds", type=int, default=3, help="turns, of --steps each, with --versus")


def add_budget(group: Any) -> None:
    from minilora.adapters import TARGETS
    from minilora.bench.budget import SHAPES

    sub = add_command(
        group,
        "budget",
        commands.budget_command,
        summary="work out by formula what a training step takes, LoRA beside full fine-tuning",
        figures="those of --method: trainable_parameters, base_parameters, adapter_bytes, "
        "weights_bytes, gradients_bytes, optimizer_bytes, activations_bytes, peak_bytes, "
        "forward_flops, backward_flops",
    )
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--model", choices=SHAPES, default="gpt2", help="a named shape")
    which.add_argument(
        "--base",
        metavar="DIR",
        help="folder whose config.json gives the shape; no weights are read",
    )
    for name in ("layers", "width", "heads", "vocabulary"):
        sub.add_argument(f"--{name}", type=int, help=f"other {name} than the shape's")
    sub.add_argument(
        "--method", choices=("lora", "full"), default="lora", help="whose figures --json writes"
    )
    sub.add_argument("--rank", type=int, default=8, help="rank R of A and B")
    sub.add_argument(
        "--targets",
        default="qkv",
        help=f"weights to adapt, separated by commas: {', '.join(TARGETS)}, "
        "or regular expressions over paths such as blocks.0.attn.qkv",
    )
    sub.add_argument("--dropout", type=float, default=0.0, help="dropout on the adapters' input")
    sub.add_argument("--batch", type=int, default=8, help="sequences in a step")
    sub.add_argument("--context", type=int, default=128, help="tokens in a sequence")
    sub.add_argument(
        "--dtype",
        choices=("float16", "float32", "float64"),
        default="float32",
        help="dtype of every array",
    )
    sub.add_argument(
        "--threads",
        type=natural,
        help="threads that share the batch as in adapt, 0: one for each core "
        "(default: all of it in one pass)",
    )
    add_recompute(sub)
    sub.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="what the step would run on; a GPU is not needed",
    )


COMMANDS = (
    add_demo,
    add_adapt,
    add_pretrain,
    add_evaluate,
    add_generate,
    add_merge,
    add_mix,
    add_gradcheck,
    add_bench,
    add_budget,
)


# --- options that commands share ---------------------------------------------------------------

Options: TypeAlias = argparse._ActionsContainer  # a parser, or a group of its options

ADAPT_DEFAULTS: dict[str, Any] = {
    "steps": 200,
    "batch": 8,
    "context": 256,
    "short_context": 128,
    "short_steps": 0,
    "lr": None,
    "warmup": 20,
    "weight_decay": 0.0,
    "beta2": 0.999,
    "eval_every": 50,
    "checkpoint_every": 50,
}
PRETRAIN_DEFAULTS: dict[str, Any] = {
    "steps": 5600,
    "batch": 8,
    "context": 512,
    "short_context": 128,
    "short_steps": 3400,
    "lr": 2e-3,
    "warmup": 100,
    "weight_decay": 0.1,
    "beta2": 0.98,
    "eval_every": 200,
    "checkpoint_every": 200,
}


def add_data(sub: Options) -> None:
    sub.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="text to read: files, folders, `python` (the standard library of this Python) "
        "or `-` (standard input)",
    )


def add_base(sub: Options) -> None:
    sub.add_argument(
        "--base",
        metavar="DIR",
        help="folder of a GPT-2 in Hugging Face's layout, or the name of one on its hub, such as "
        "openai-community/gpt2 (default: the built-in base)",
    )


def add_adapters(sub: Options, *, required: bool = False) -> None:
    sub.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR",
        required=required,
        help="folder of an adapter in PEFT's layout; may be repeated: the updates add up",
    )
    sub.add_argument(
        "--weight",
        type=float,
        action="append",
        help="factor of an adapter's update, one for each --adapter in their order (default: 1)",
    )


def add_lora(sub: argparse.ArgumentParser) -> None:
    from minilora.adapters import TARGETS

    group = sub.add_argument_group("adapters (method lora)")
    group.add_argument("--rank", type=int, default=2, help="rank R of A and B")
    group.add_argument("--alpha", type=float, default=None, help="s = alpha / rank (default: rank)")
    group.add_argument(
        "--targets",
        default="qkv,o,up,down",
        help=f"weights to adapt, separated by commas: {', '.join(TARGETS)}, "
        "or regular expressions over paths such as blocks.0.attn.qkv",
    )
    group.add_argument("--rslora", action="store_true", help="s = alpha / √rank")
    group.add_argument("--dropout", type=float, default=0.0, help="dropout on the adapters' input")
    for name, kind in (("rank", "R"), ("alpha", "A")):
        group.add_argument(
            f"--{name}-pattern",
            action="append",
            default=[],
            metavar=f"PATTERN={kind}",
            help=f"another {name} for the adapters whose path a pattern matches; may be repeated",
        )


def add_training(sub: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    group = sub.add_argument_group("training")

    def option(name: str, kind: type, text: str) -> None:
        default = defaults[name]
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text)

    option("steps", int, "optimiser steps")
    option("batch", int, "sequences in a step")
    option("context", int, "tokens in a sequence")
    rates = ", ".join(f"{rate:g} for {method}" for method, rate in commands.ADAPT_LR.items())
    option("lr", float, "peak learning rate" + ("" if defaults["lr"] else f" (default: {rates})"))
    option("short_context", int, "tokens in a sequence of the first --short-steps steps")
    option("short_steps", int, "steps that read as many tokens in shorter sequences")
    option("warmup", int, "steps in which the learning rate rises; a cosine follows")
    option("weight_decay", float, "AdamW's decoupled decay of matrices")
    option("beta2", float, "AdamW's decay of the squared gradient's mean")
    group.add_argument("--clip", type=float, default=1.0, help="largest global gradient norm")
    option("eval_every", int, "steps between evaluations on held-out text")
    group.add_argument(
        "--eval-tokens", type=int, default=65536, help="held-out tokens read by an evaluation"
    )
    option("checkpoint_every", int, "steps between checkpoints")
    group.add_argument("--log-every", type=int, default=10, help="steps between reports")
    add_seed(group)
    add_threads(group)
    add_device(group)
    add_recompute(group)
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in the output folder, or start it if there is none",
    )
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="draw both loss curves")


def add_seed(sub: Options, text: str = "seed of everything random") -> None:
    sub.add_argument("--seed", type=natural, default=0, help=text)


def add_threads(sub: Options) -> None:
    sub.add_argument(
        "--threads",
        type=natural,
        default=0,
        help="threads that share a batch (0: one for each core); results depend on their number",
    )


def add_device(sub: Options) -> None:
    sub.add_argument(
        "--device", default="cpu", help="cpu, cuda (CuPy), or auto: cuda where it works"
    )


def add_recompute(sub: Options) -> None:
    sub.add_argument(
        "--recompute",
        action="store_true",
        help="keep the input of each block alone and compute the rest again: less memory, "
        "some more time, the same result",
    )


def add_half(sub: Options) -> None:
    sub.add_argument(
        "--half",
        action="store_true",
        help="on a GPU, keep the matrices of the frozen base in float16: half the memory",
    )


def add_dtype(sub: Options, text: str = "dtype in the file") -> None:
    sub.add_argument("--dtype", choices=("float32", "float16"), default="float32", help=text)


def add_out(sub: Options, default: str, text: str) -> None:
    sub.add_argument("--out", type=Path, default=Path(default), help=text)


def natural(text: str) -> int:
    """The whole number of at least 0 that an option is."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)
