"""The command line: `minilora COMMAND`, or `python -m minilora COMMAND`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from minilora.errors import MiniloraError

DATA_HELP = (
    "text to read: files, folders, `python` (the standard library of this Python) "
    "or `-` (standard input)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done. 1: a gradient check failed. 2: bad input, with one sentence saying what was expected.
    130: stopped by Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console may not know every character
            stream.reconfigure(errors="replace")
    try:
        arguments = parser().parse_args(argv)
        if arguments.json is not None:
            check_writable(arguments.json, "--json")
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


# --- parsers -----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The parser of every command; the reference of the command line is made from it."""
    root = Parser(
        prog="minilora",
        description="Low-rank adaptation of a GPT in plain NumPy, every gradient written by hand.",
        epilog="minilora COMMAND --help explains a command; `minilora demo` is the place to start.",
    )
    from minilora import __version__

    root.add_argument("--version", action="version", version=f"minilora {__version__}")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        run: Callable[[argparse.Namespace], int], name: str, summary: str, figures: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
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

    demo = command(
        demo_command,
        "demo",
        "watch the built-in model learn Python through LoRA, in about a minute",
        "those of adapt, and bits_per_byte_before, bits_per_byte_after, "
        "merge_max_abs_difference, gradcheck_max_relative_error",
    )
    demo.add_argument("--seed", type=natural, default=0, help="seed of everything random")
    demo.add_argument("--threads", type=natural, default=0, help=THREADS_HELP)
    demo.add_argument("--device", default="cpu", help=DEVICE_HELP)

    training_figures = (
        "loss_before, loss_after (nats per token, held-out text), trainable_parameters, "
        "base_parameters, adapter_bytes, seconds, tokens_per_second"
    )
    adapt = command(adapt_command, "adapt", "adapt a base to text", training_figures)
    adapt.add_argument("data", nargs="+", metavar="DATA", help=DATA_HELP)
    add_base(adapt)
    adapt.add_argument(
        "--method",
        choices=("lora", "full"),
        default="lora",
        help="train adapters on a frozen base, or the whole base",
    )
    add_lora(adapt)
    add_training(adapt, ADAPT_DEFAULTS)
    adapt.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="dtype in the file of a base (--method full)",
    )
    adapt.add_argument("--out", type=Path, default=Path("adapter"), help="folder for the result")

    pretrain = command(
        pretrain_command, "pretrain", "train a byte-level base from scratch", training_figures
    )
    pretrain.add_argument("data", nargs="+", metavar="DATA", help=DATA_HELP)
    pretrain.add_argument("--layers", type=int, default=6, help="number of blocks")
    pretrain.add_argument("--width", type=int, default=256, help="width of the model")
    pretrain.add_argument("--heads", type=int, default=4, help="attention heads in a block")
    add_training(pretrain, PRETRAIN_DEFAULTS)
    pretrain.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="dtype in the file"
    )
    pretrain.add_argument("--out", type=Path, default=Path("base"), help="folder for the base")

    evaluate = command(
        evaluate_command,
        "evaluate",
        "measure the loss of a model on text",
        "loss (nats per token), bits_per_byte, tokens",
    )
    evaluate.add_argument("data", nargs="+", metavar="DATA", help=DATA_HELP)
    add_base(evaluate)
    add_adapter(evaluate)
    evaluate.add_argument(
        "--held-out",
        action="store_true",
        help="only the part that adapt and pretrain hold out: the last 5%% of every file, "
        "and whole files of `python`",
    )
    evaluate.add_argument("--threads", type=natural, default=0, help=THREADS_HELP)
    evaluate.add_argument("--device", default="cpu", help=DEVICE_HELP)

    generate = command(
        generate_command, "generate", "continue a text", "text (the continuation), token_ids"
    )
    add_base(generate)
    add_adapter(generate)
    generate.add_argument(
        "--prompt",
        metavar="TEXT",
        help="the text to continue, or - for standard input (default: a new line)",
    )
    generate.add_argument("--tokens", type=int, default=300, help="how many tokens to add")
    generate.add_argument(
        "--temperature", type=float, default=0.8, help="0 always takes the likeliest token"
    )
    generate.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    generate.add_argument(
        "--top-p", type=float, help="draw from the likeliest tokens that reach probability p"
    )
    generate.add_argument("--seed", type=natural, default=0, help="seed of the draws")
    generate.add_argument("--device", default="cpu", help=DEVICE_HELP)

    merge = command(
        merge_command,
        "merge",
        "add an adapter into its base, giving a base as fast as the old",
        "merge_max_abs_difference, parameters, bytes",
    )
    add_base(merge)
    add_adapter(merge, required=True)
    merge.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="dtype in the file"
    )
    merge.add_argument("--out", type=Path, default=Path("merged"), help="folder for the base")

    gradcheck = command(
        gradcheck_command,
        "gradcheck",
        "hold every gradient against central differences in float64",
        "max_relative_error, pairs (name to error)",
    )
    gradcheck.add_argument("--seed", type=natural, default=0, help="seed of the random arguments")
    return root


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


THREADS_HELP = "threads that share a batch (0: one for each core); results depend on their number"
DEVICE_HELP = "cpu, cuda (CuPy), or auto: cuda where it works"

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
ADAPT_LR = {"lora": 5e-3, "full": 1e-3}
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


def add_base(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--base",
        metavar="DIR",
        help="folder of a GPT-2 in Hugging Face's layout, or the name of one on its hub, such as "
        "openai-community/gpt2 (default: the built-in base)",
    )


def add_adapter(sub: argparse.ArgumentParser, *, required: bool = False) -> None:
    sub.add_argument(
        "--adapter", metavar="DIR", required=required, help="folder of an adapter in PEFT's layout"
    )


def add_lora(sub: argparse.ArgumentParser) -> None:
    from minilora.lora import TARGETS

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
    rates = ", ".join(f"{rate:g} for {method}" for method, rate in ADAPT_LR.items())
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
    group.add_argument("--seed", type=natural, default=0, help="seed of everything random")
    group.add_argument("--threads", type=natural, default=0, help=THREADS_HELP)
    group.add_argument("--device", default="cpu", help=DEVICE_HELP)
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in the output folder, or start it if there is none",
    )
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="draw both loss curves")


def natural(text: str) -> int:
    """The whole number of at least 0 that an option is."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


# --- commands ----------------------------------------------------------------------------------


def demo_command(args: argparse.Namespace) -> int:
    from minilora.demo import demo

    figures = demo(seed=args.seed, threads=args.threads, device=chosen_device(args))
    write_figures(args, figures)
    return 0


def adapt_command(args: argparse.Namespace) -> int:
    from minilora.data import load_corpus
    from minilora.lora import LoRAConfig, adapted_paths
    from minilora.model import load_model
    from minilora.runs import adapt_in_folder

    if args.lr is None:
        args.lr = ADAPT_LR[args.method]
    if args.method == "full" and args.dropout:
        raise MiniloraError("--dropout acts on the input of adapters; --method full has none")
    lora_config = LoRAConfig(
        rank=args.rank,
        alpha=args.rank if args.alpha is None else args.alpha,
        targets=targets_of(args.targets),
        dropout=args.dropout,
        rslora=args.rslora,
        rank_pattern=pairs_of(args.rank_pattern, int, "--rank-pattern"),
        alpha_pattern=pairs_of(args.alpha_pattern, float, "--alpha-pattern"),
    )
    settings = settings_of(args, method=args.method)
    device = chosen_device(args)
    model = load_model(args.base)
    corpus = load_corpus(args.data, model.tokenizer)
    with progress_bar(args, "adapt") as report:
        run = adapt_in_folder(
            model, corpus, lora_config, settings, args.out,
            dtype=args.dtype, resume=args.resume, device=device, report=report,
        )  # fmt: skip
    finish_training(args, run)
    if args.method == "lora":
        base = [] if args.base is None else ["--base", args.base]
        print_next("generate", *base, "--adapter", args.out)
        if any(matches_qkv_part(path) for path in adapted_paths(lora_config, model.config.n_layer)):
            print("the adapters of q, k and v were written as one equal adapter of c_attn")
    return 0


def matches_qkv_part(path: str) -> bool:
    """Whether a LoRA path is q, k or v, which PEFT's layout knows only as parts of c_attn."""
    return path.rpartition(".")[2] in ("q", "k", "v")


def pretrain_command(args: argparse.Namespace) -> int:
    from minilora.data import ByteTokenizer, load_corpus
    from minilora.gpt import GPTConfig
    from minilora.runs import pretrain_in_folder

    settings = settings_of(args, method="full")
    sizes = {"n_embd": args.width, "n_layer": args.layers, "n_head": args.heads}
    try:
        config = GPTConfig(ByteTokenizer.vocab_size, args.context, **sizes)
    except MiniloraError as error:
        raise MiniloraError(f"--width, --layers, --heads: {error}") from None
    device = chosen_device(args)
    corpus = load_corpus(args.data, ByteTokenizer())
    with progress_bar(args, "pretrain") as report:
        run = pretrain_in_folder(
            config, corpus, settings, args.out,
            dtype=args.dtype, resume=args.resume, device=device, report=report,
        )  # fmt: skip
    finish_training(args, run)
    print_next("generate", "--base", args.out)
    return 0


def evaluate_command(args: argparse.Namespace) -> int:
    from minilora.data import check_length, load_corpus, load_text
    from minilora.model import evaluate_stream, load_model

    device = chosen_device(args)
    model = load_model(args.base, args.adapter)
    name = " ".join(args.data)
    if args.held_out:
        corpus = load_corpus(args.data, model.tokenizer)
        tokens, text_bytes = corpus.held_out, corpus.held_out_bytes
        name = f"the held-out part of {name}"
    else:
        tokens, text_bytes = load_text(args.data, model.tokenizer)
    check_length(tokens, context=1, name=name)
    result = evaluate_stream(model, tokens, text_bytes, threads=args.threads, device=device)
    figures = {
        "loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
    }
    write_figures(args, figures)
    print_figures(figures)
    return 0


def generate_command(args: argparse.Namespace) -> int:
    from minilora.data import read_documents
    from minilora.model import complete, load_model

    device = chosen_device(args)
    model = load_model(args.base, args.adapter).on(device)
    prompt = "\n" if args.prompt is None else args.prompt
    if prompt == "-":
        prompt = read_documents("-")[0].text
    drawn = complete(
        model, prompt, max_tokens=args.tokens, temperature=args.temperature,
        top_k=args.top_k, top_p=args.top_p, seed=args.seed,
    )  # fmt: skip
    token_ids: list[int] = []

    def remembered() -> Any:
        for token in drawn:
            token_ids.append(token)
            yield token

    text = ""
    print(prompt, end="", flush=True)
    for piece in model.tokenizer.stream(remembered()):
        print(piece, end="", flush=True)
        text += piece
    print()
    write_figures(args, {"text": text, "token_ids": token_ids})
    return 0


def merge_command(args: argparse.Namespace) -> int:
    import numpy as np

    from minilora import tree
    from minilora.formats import save_base
    from minilora.model import load_model
    from minilora.runs import BASE_WEIGHTS, claim_folder, copy_tokenizer

    claim_folder(args.out, resume=False)
    model = load_model(args.base, args.adapter)
    merged = model.merged()
    save_base(args.out, merged.base, merged.config, dtype=args.dtype)
    copy_tokenizer(model.folder, args.out)
    saved = load_model(args.out)
    rng = np.random.default_rng(0)
    tokens = rng.integers(model.config.vocab_size, size=(1, min(64, model.config.n_positions)))
    figures = {
        "merge_max_abs_difference": float(
            np.abs(model.logits(tokens) - saved.logits(tokens)).max()
        ),
        "parameters": tree.count(merged.base),
        "bytes": (args.out / BASE_WEIGHTS).stat().st_size,
    }
    write_figures(args, figures)
    print_figures(figures)
    print_next("generate", "--base", args.out)
    return 0


def gradcheck_command(args: argparse.Namespace) -> int:
    from minilora.gradcheck import TOLERANCE, GradientError
    from minilora.pairs import table

    print(f"{'pair':<28} {'max relative error':>18} {'entries':>8} {'seconds':>8}")
    errors = {}
    try:
        for row in table(seed=args.seed):
            errors[row.name] = row.error
            verdict = "" if row.error <= TOLERANCE else "   ABOVE"
            figures = f"{row.error:>18.1e} {row.entries:>8} {row.seconds:>8.3f}"
            print(f"{row.name:<28} {figures}{verdict}")
    except GradientError as error:  # a gradient of the wrong shape or dtype, or one missing
        print(f"minilora: {error}", file=sys.stderr)
        return 1
    worst = max(errors, key=lambda name: errors[name])
    print(f"\nlargest: {errors[worst]:.1e} ({worst}); each must be at most {TOLERANCE:.0e}")
    write_figures(args, {"max_relative_error": errors[worst], "pairs": errors})
    return 0 if errors[worst] <= TOLERANCE else 1


# --- what commands share -----------------------------------------------------------------------


def settings_of(args: argparse.Namespace, *, method: str) -> Any:
    """The TrainConfig that the training options ask for."""
    import dataclasses

    from minilora.train import TrainConfig

    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    return TrainConfig(**{**given, "method": method})


def chosen_device(args: argparse.Namespace) -> str:
    """The device to use; says so where it was a choice."""
    from minilora.backend import resolve_device

    device = resolve_device(args.device)
    if args.device == "auto":
        print(f"device: {device}", file=sys.stderr)
    return device


def targets_of(text: str) -> tuple[str, ...]:
    """The names and patterns between the commas, but for commas in braces: {1,3} is one repeat."""
    names = re.split(r",(?![^{}]*\})", text)
    return tuple(name.strip() for name in names if name.strip())


def pairs_of(entries: list[str], kind: Callable[[str], Any], option: str) -> dict[str, Any]:
    """{pattern: value} of entries PATTERN=VALUE; MiniloraError naming the option otherwise."""
    pairs = {}
    for entry in entries:
        pattern, equals, value = entry.rpartition("=")
        try:
            pairs[pattern] = kind(value)
        except ValueError:
            equals = ""
        if not equals or not pattern:
            raise MiniloraError(f"{option} {entry!r} is not PATTERN=NUMBER, such as down=4")
    return pairs


def progress_bar(args: argparse.Namespace, what: str) -> Any:
    """The reports of a training run; a plot that cannot be drawn is noticed before it starts."""
    from minilora.report import ProgressBar, check_plot

    if args.plot is not None:
        check_writable(args.plot, "--plot")
        check_plot(args.plot)
    return ProgressBar(args.steps, what)


def finish_training(args: argparse.Namespace, run: Any) -> None:
    """Print, draw and write what a training run gave."""
    write_figures(args, run.figures)
    if args.plot is not None:
        from minilora.report import plot_losses

        more = f" and {len(args.data) - 1} more" if args.data[1:] else ""
        plot_losses(run.history, args.plot, title=(Path(args.data[0]).name or args.data[0]) + more)
    if run.was_finished:
        print(f"{args.out} holds this run, finished; nothing was left to do")
    print_figures(run.figures)
    print(f"saved in {args.out}")


def print_figures(figures: dict[str, Any]) -> None:
    """Print named figures, one to a line."""
    for name, value in figures.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        print(f"{name.replace('_', ' '):<26} {shown}")


def print_next(*words: object) -> None:
    """Say which command comes next."""
    quoted = (f'"{word}"' if " " in str(word) else str(word) for word in words)
    print("next: minilora", *quoted)


def check_writable(path: Path, option: str) -> None:
    """Raise MiniloraError, before any work, when a file could not be written there."""
    replaceable = path.is_file() or not path.exists()  # not a folder, nor a device
    if not replaceable or not path.absolute().parent.is_dir():
        raise MiniloraError(f"{option} {path}: expected a file name in an existing folder")


def write_figures(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Write the figures as one flat JSON object, where --json asks for it."""
    if args.json is not None:
        from minilora.formats.files import write_json

        write_json(args.json, figures)
