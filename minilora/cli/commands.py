"""What each command does: options in, files and figures out, and the exit status.

A command is one function here and one row of `register`, which lists its options and its figures.
Imports are inside the functions, so that `minilora --help` and mistyped options are answered at
once.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError


def demo_command(args: argparse.Namespace) -> int:
    from minilora.cli.demo import demo
    from minilora.training.loop import Interrupted

    try:
        figures = demo(seed=args.seed, threads=args.threads, device=chosen_device(args))
    except Interrupted as stop:  # its folder is gone
        raise KeyboardInterrupt(str(stop).partition(";")[0]) from None
    write_figures(args, figures)
    return 0


def adapt_command(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from minilora.adapters import LoRAConfig, adapted_paths
    from minilora.cli.run_report import RunReport, sampled
    from minilora.formats.peft import rewritten
    from minilora.model import load_model
    from minilora.training.progress import ProgressBar
    from minilora.training.ranks import find_ranks
    from minilora.training.runs import adapt_in_folder

    check_run(args)
    ranks = find_ranks()
    if args.method == "full" and args.dropout:
        raise MiniloraError("--dropout is for adapters; --method full trains none")
    if args.method == "full" and args.half:
        raise MiniloraError("--half is for a frozen base; --method full trains it")
    given = lora_options(args)
    lora_config = LoRAConfig(**given)
    settings = settings_of(args, method=args.method)
    device = chosen_device(args)
    model = load_model(args.base)
    if args.adapter:
        if len(args.adapter) > 1:
            raise MiniloraError(
                f"--adapter: expected one to train further, not {len(args.adapter)}; "
                "`minilora mix` makes one of several"
            )
        model = model.with_adapters_from(*args.adapter)
        lora_config = replace(model.lora_config or lora_config, **given)
    if args.half:
        model = model.on(device, half=True)
    corpus = training_data(args, model)
    page = None
    if args.report is not None:
        page = RunReport(args.report.resolve(), model, args.data, args.sample)
    with ProgressBar(args.steps, "adapt") as report:

        def watch(seen: Any) -> None:
            if page:
                page.watch(seen)
            if args.sample is not None:
                text = page.samples[-1][1] if page else sampled(model, seen, args.sample)
                report.say(f"step {seen.step}: {args.sample}{text}")

        run = adapt_in_folder(
            model, corpus, lora_config, settings, args.out, dtype=args.dtype,
            resume=args.resume, device=device, report=report, watch=watch, ranks=ranks,
        )  # fmt: skip
    if ranks.rank > 0:
        return 0  # rank 0 reports
    finish_training(args, run)
    if args.adapter:
        print(f"trained further from {args.adapter[0]}, with a fresh optimiser")
    if args.method == "lora":
        print_next("generate", *base_option(args), "--adapter", args.out)
        mlp = tuple(model.base["blocks"][0]["mlp"])
        paths = adapted_paths(lora_config, model.config.n_layer, mlp=mlp)
        if told := rewritten(paths, model.config):
            print(told)
    return 0


def training_data(args: argparse.Namespace, model: Any) -> Any:
    """The text or records that `adapt` trains on; prints what is left out and what counts."""
    from minilora.data import load_corpus
    from minilora.records.corpus import are_records, load_records
    from minilora.training.runs import date_of_run

    if not are_records(args.data):
        if args.loss is not None:
            raise MiniloraError("--loss is for records, files in JSON Lines; DATA is text")
        corpus = load_corpus(args.data, model.tokenizer)
        print_left_out(corpus.left_out)
        return corpus
    records = load_records(
        args.data, model, context=args.context,
        loss=args.loss or "answer", today=date_of_run(args.out) if args.resume else None,
    )  # fmt: skip
    print_left_out(records.left_out)
    for line in records.described():
        print(f"minilora: {line}", file=sys.stderr)
    return records


def lora_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of LoRAConfig that the options of `adapt` set."""
    found = {
        "rank": args.rank,
        "alpha": args.alpha,
        "targets": None if args.targets is None else targets_of(args.targets),
        "dropout": args.dropout,
        "rslora": args.rslora or None,
        "rank_pattern": pairs_of(args.rank_pattern, int, "--rank-pattern") or None,
        "alpha_pattern": pairs_of(args.alpha_pattern, float, "--alpha-pattern") or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def pretrain_command(args: argparse.Namespace) -> int:
    from minilora.data import load_corpus
    from minilora.gpt2 import GPTConfig
    from minilora.tokenizer import ByteTokenizer
    from minilora.training.progress import ProgressBar
    from minilora.training.ranks import find_ranks
    from minilora.training.runs import pretrain_in_folder

    check_run(args)
    ranks = find_ranks()
    settings = settings_of(args, method="full")
    sizes = {name: getattr(args, name) for name in ("n_embd", "n_layer", "n_head")}
    config = GPTConfig(ByteTokenizer.vocab_size, args.context, **sizes)
    device = chosen_device(args)
    corpus = load_corpus(args.data, ByteTokenizer())
    print_left_out(corpus.left_out)
    with ProgressBar(args.steps, "pretrain") as report:
        run = pretrain_in_folder(
            config, corpus, settings, args.out,
            dtype=args.dtype, resume=args.resume, device=device, report=report, ranks=ranks,
        )  # fmt: skip
    if ranks.rank > 0:
        return 0  # rank 0 reports
    finish_training(args, run)
    print_next("generate", "--base", args.out)
    return 0


def evaluate_command(args: argparse.Namespace) -> int:
    from minilora.records.corpus import are_records

    device = chosen_device(args)
    model = chosen_model(args)
    if args.half:
        model = model.on(device, half=True)
    evaluate = evaluate_records if are_records(args.data) else evaluate_text
    figures = evaluate(args, model, device)
    write_figures(args, figures)
    print_figures(figures)
    return 0


def evaluate_text(args: argparse.Namespace, model: Any, device: str) -> dict[str, Any]:
    """The figures of `evaluate` for text."""
    from minilora.data import check_length, load_corpus, load_text
    from minilora.evaluation import evaluate_tokens

    name = " ".join(args.data)
    if args.held_out:
        corpus = load_corpus(args.data, model.tokenizer)
        tokens, text_bytes, left_out = corpus.held_out, corpus.held_out_bytes, corpus.left_out
        name = f"the held-out part of {name}"
    else:
        tokens, text_bytes, left_out = load_text(args.data, model.tokenizer)
    print_left_out(left_out)
    check_length(tokens, context=1, name=name)
    result = evaluate_tokens(
        model, tokens, text_bytes=text_bytes, threads=args.threads, device=device
    )
    return {"loss": result.loss, "bits_per_byte": result.bits_per_byte, "tokens": result.tokens}


def evaluate_records(args: argparse.Namespace, model: Any, device: str) -> dict[str, Any]:
    """The figures of `evaluate` for records: the loss on the answers, and exact match."""
    from minilora.records.corpus import load_records
    from minilora.records.match import judge

    records = load_records(
        args.data, model, context=model.config.n_positions,
        held_out=0.05 if args.held_out else 0.0,
    )  # fmt: skip
    print_left_out(records.left_out)
    examples = records.held_out if args.held_out else records.train
    found = judge(model, examples, threads=args.threads, device=device)
    figures = found._asdict()
    exact = figures.pop("exact")
    return figures | ({"exact_match": exact / found.asked} if found.asked else {})


def generate_command(args: argparse.Namespace) -> int:
    from minilora.model import complete
    from minilora.texts import read_documents

    device = chosen_device(args)
    model = chosen_model(args).on(device, half=args.half)
    if args.text is not None and args.prompt is not None:
        raise MiniloraError("TEXT and --prompt mean the same; expected one of them, not both")
    prompt = next((text for text in (args.text, args.prompt) if text is not None), "\n")
    if prompt == "-":
        prompt = read_documents("-")[0][0].text
    drawn = complete(
        model, prompt, max_tokens=args.max_tokens, temperature=args.temperature,
        top_k=args.top_k, top_p=args.top_p, seed=args.seed,
    )  # fmt: skip
    token_ids: list[int] = []

    def remembered() -> Any:
        for token in drawn:
            token_ids.append(token)
            yield token

    text = ""
    write_faint(prompt)
    for piece in model.tokenizer.stream(remembered()):
        print(piece, end="", flush=True)
        text += piece
        if args.json is None and getattr(sys.stdout, "is_gone", False):
            break  # nobody is reading
    print()
    write_figures(args, {"text": text, "token_ids": token_ids})
    return 0


def play_command(args: argparse.Namespace) -> int:
    from minilora.cli.play import Draws, play

    device = chosen_device(args)
    model = chosen_model(args).on(device, half=args.half)
    draws = Draws(args.max_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    play(model, draws, read=typed_line)
    return 0


def write_faint(text: str) -> None:
    """Write a text that is not part of the result: on a terminal in faint letters."""
    write = getattr(sys.stdout, "write_faint", sys.stdout.write)
    write(text)
    sys.stdout.flush()


def typed_line() -> str:
    """A line from standard input, with line editing on a terminal; EOFError after the last."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):  # none on Windows, whose terminal has such keys itself
            import readline  # noqa: F401
        return input("> ")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def merge_command(args: argparse.Namespace) -> int:
    from minilora import tree
    from minilora.formats.base import base_files
    from minilora.formats.output import new_folder
    from minilora.lora import unmerge
    from minilora.model import load_model
    from minilora.training.runs import BASE_WEIGHTS

    device = chosen_device(args)
    with new_folder(args.out) as write:
        model = chosen_model(args).on(device)
        before = probe_logits(model)
        merged = model.merged().base
        write(base_files(merged, model.config, dtype=args.dtype, like=model.folder))
        saved = load_model(args.out).on(device)
        restored = unmerge(saved.base, model.lora, model.lora_config)
        figures = {
            "merge_max_abs_difference": largest_difference(before, probe_logits(saved)),
            "unmerge_max_abs_difference": largest_difference(model.base, restored),
            "parameters": tree.count(saved.base),
            "bytes": (args.out / BASE_WEIGHTS).stat().st_size,
        }
        write_figures(args, figures)
    print_figures(figures)
    print_next("generate", "--base", args.out)
    return 0


def mix_command(args: argparse.Namespace) -> int:
    from minilora import tree
    from minilora.formats.card import card_file
    from minilora.formats.output import new_folder
    from minilora.formats.peft import adapter_files
    from minilora.training.runs import ADAPTER_WEIGHTS

    with new_folder(args.out) as write:
        model = chosen_model(args)
        before = probe_logits(model)
        lora, lora_config, base_name = model.lora, model.lora_config, model.base_name
        weights = args.weight or [1.0] * len(args.adapter)
        parts = [f"{w:g} × {name}" for w, name in zip(weights, args.adapter, strict=True)]
        files = adapter_files(lora, lora_config, model.config, base_name=base_name)
        write(card_file(args.out, base_name, {"the sum of": parts}) | files)
        saved = model.with_adapters_from(args.out)
        figures = {
            "mix_max_abs_difference": largest_difference(before, probe_logits(saved)),
            "parameters": tree.count(saved.lora),
            "bytes": (args.out / ADAPTER_WEIGHTS).stat().st_size,
        }
        write_figures(args, figures)
    print_figures(figures)
    print_next("generate", *base_option(args), "--adapter", args.out)
    return 0


def convert_command(args: argparse.Namespace) -> int:
    from minilora import tree
    from minilora.formats.gguf import convert
    from minilora.model import load_model
    from minilora.training.runs import BASE_WEIGHTS

    convert(args.gguf, args.out, tokenizer=args.tokenizer, dtype=args.dtype)
    model = load_model(args.out)
    figures = {
        "parameters": tree.count(model.base),
        "tokens": model.tokenizer.known,
        "bytes": (args.out / BASE_WEIGHTS).stat().st_size,
    }
    write_figures(args, figures)
    print_figures(figures)
    print_next("generate", "--base", args.out)
    return 0


def gradcheck_command(args: argparse.Namespace) -> int:
    from minilora.gradcheck import PAIR_TOLERANCE, TOLERANCE, GradientError
    from minilora.pairs import PAIRS, page_of, table

    device = chosen_device(args)
    print(f"{'pair':<33} {'max relative error':>18} {'entries':>8} {'seconds':>8}")
    errors, wrong = {}, False
    try:
        for row in table(seed=args.seed, device=device):
            errors[row.name] = row.error
            right = row.error <= (PAIR_TOLERANCE if row.name in PAIRS else TOLERANCE)
            verdict = "" if right else f"   ABOVE: see {page_of(row.name)}"
            wrong = wrong or not right
            cells = f"{row.error:>18.1e} {row.entries:>8} {row.seconds:>8.3f}"
            print(f"{row.name:<33} {cells}{verdict}")
    except GradientError as error:  # a gradient is missing, or has the wrong shape or dtype
        print(f"minilora: {error}", file=sys.stderr)
        return 1
    worst = max(errors, key=lambda name: errors[name])
    print(
        f"\nlargest: {errors[worst]:.1e} ({worst}); allowed: {PAIR_TOLERANCE:.0e} for a pair, "
        f"{TOLERANCE:.0e} for a model"
    )
    known = {name: error if math.isfinite(error) else None for name, error in errors.items()}
    write_figures(args, {"max_relative_error": known[worst], "pairs": known})
    return 1 if wrong else 0


def bench_command(args: argparse.Namespace) -> int:
    from minilora.bench.budget import SHAPES
    from minilora.bench.case import Case
    from minilora.bench.command import bench
    from minilora.workers import cores

    case = Case(
        config=SHAPES[args.shape],
        what=args.what,
        method=args.method,
        batch=args.batch,
        context=args.context,
        rank=args.rank,
        targets=targets_of(args.targets),
        threads=args.threads or cores(),
        steps=args.steps,
        recompute=args.recompute,
        device=chosen_device(args),
    )
    figures = bench(case, versus=args.versus, rounds=args.rounds)
    write_figures(args, {"shape": args.shape, **figures})
    return 0


def budget_command(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from minilora.adapters import LoRAConfig
    from minilora.bench.budget import SHAPES, Step, budget_lines, figures_of, read_shape, resized

    name, config, tied, biased = args.model, SHAPES[args.model], True, set[str]()
    if args.base is not None:
        name, (config, tied, biased) = args.base, read_shape(args.base)
    config = resized(config, args.n_layer, args.n_embd, args.n_head, args.vocab_size)
    lora_config = LoRAConfig(args.rank, targets=targets_of(args.targets), dropout=args.dropout)
    lora = Step(
        config, lora_config, args.batch, args.context, args.dtype, args.threads, tied,
        args.recompute, args.device, biased,
    )  # fmt: skip
    full = replace(lora, lora_config=None)
    print(*budget_lines(name, lora, full), sep="\n")
    write_figures(args, figures_of(lora if args.method == "lora" else full))
    return 0


# --- what commands share -----------------------------------------------------------------------


def settings_of(args: argparse.Namespace, *, method: str) -> Any:
    """The TrainConfig of the training options."""
    import dataclasses

    from minilora.training.loop import TrainConfig

    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    return TrainConfig(**{**given, "method": method})


def chosen_device(args: argparse.Namespace) -> str:
    """The device to use; prints which it is for --device auto."""
    from minilora.backend import resolve_device

    device = resolve_device(args.device)
    if args.device == "auto":
        print(f"device: {device}", file=sys.stderr)
    if device == "cpu" and getattr(args, "half", False):
        raise MiniloraError("--half needs --device cuda: NumPy multiplies float16 far more slowly")
    return device


def chosen_model(args: argparse.Namespace) -> Any:
    """The Model of --base, with the weighted sum of --adapter and --weight."""
    from minilora.model import load_model

    if args.weight is not None and len(args.weight) != len(args.adapter):
        raise MiniloraError(
            f"adapters: {len(args.adapter)}, weights: {len(args.weight)}; "
            "expected a --weight for each --adapter"
        )
    model = load_model(args.base)
    if args.adapter:
        model = model.with_adapters_from(*args.adapter, weights=args.weight)
    return model


def probe_logits(model: Any) -> Any:
    """The logits of a model on random tokens, (1, T, V); MiniloraError unless they are finite."""
    import numpy as np

    length = min(64, model.config.n_positions)
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=(1, length))
    logits = model.logits(tokens)
    if not np.isfinite(logits).all():
        raise MiniloraError("the logits are not finite: the model's numbers overflow")
    return logits


def largest_difference(ours: Any, theirs: Any) -> float:
    """The largest absolute difference between two arrays or trees, entry by entry."""
    from minilora.tree import flatten

    pairs = zip(flatten(ours).values(), flatten(theirs).values(), strict=True)
    return max(float(abs(a - b).max()) for a, b in pairs)


def base_option(args: argparse.Namespace) -> list[str]:
    """The option --base as typed, for the command that comes next."""
    return [] if args.base is None else ["--base", args.base]


def targets_of(text: str) -> tuple[str, ...]:
    """The names and patterns between commas; a comma in braces, as in {1,3}, separates nothing."""
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


def print_left_out(left_out: Sequence[Any]) -> None:
    """Print to standard error which files in folders were not read, and why."""
    from minilora.texts import summary

    if left_out:
        print(f"minilora: {summary(left_out)}", file=sys.stderr)


def check_run(args: argparse.Namespace) -> None:
    """Raise MiniloraError, before any work, for a folder of another run or an impossible plot."""
    from minilora.training.checkpoint import CHECKPOINT
    from minilora.training.runs import RECORD

    if args.plot is not None:
        from minilora.cli.plot import check_plot

        check_plot(args.plot)
    if not args.resume and (args.out / RECORD).exists():
        raise MiniloraError(
            f"--out {args.out} holds a finished run; name another folder with --out"
        )
    if not args.resume and (args.out / CHECKPOINT).exists():
        raise MiniloraError(
            f"--out {args.out} holds an unfinished run; continue it with --resume, "
            "or name another folder with --out"
        )


def finish_training(args: argparse.Namespace, run: Any) -> None:
    """Write, draw and print the result of a training run."""
    write_figures(args, run.figures)
    if args.plot is not None:
        from minilora.cli.plot import plot_losses

        more = f" and {len(args.data) - 1} more" if args.data[1:] else ""
        name = (Path(args.data[0]).name or args.data[0]).encode("utf-8", "replace").decode("utf-8")
        plot_losses(run.history, args.plot, title=name + more)
    if len(run.history.train) > 1 and getattr(sys.stdout, "isatty", bool)():
        from minilora.cli.run_report import sparkline

        print(f"{'training loss':<26} {sparkline([loss for _, loss in run.history.train])}")
    if run.was_finished:
        print(f"{args.out} holds this run, which is finished; nothing was left to do")
    print_figures(run.figures)
    print(f"saved in {args.out}")


def print_figures(figures: dict[str, Any]) -> None:
    """Print figures, one a line."""
    for name, value in figures.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        print(f"{name.replace('_', ' '):<26} {shown}")


def print_next(*words: object) -> None:
    """Print the command that comes next."""
    print("next:", command_line(*words))


def command_line(*words: object) -> str:
    """A command of minilora as it is typed, quoted where the shell needs it."""
    texts = ["minilora", *map(str, words)]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def check_outputs(args: argparse.Namespace) -> None:
    """Raise MiniloraError, before any work, if --json, --plot or --report cannot be written.

    They may not replace what the command reads, or each other, or be in the folder of --out. Links
    are followed: what counts, and is written, is the file behind them.
    """
    taken: dict[Path, str] = {}
    for option in ("json", "plot", "report"):
        path = getattr(args, option, None)
        if path is None:
            continue
        name, file = f"--{option} {path}", plain_file(path)
        if file is None:
            raise MiniloraError(f"{name}: expected a file name in an existing folder")
        if file in taken:
            raise MiniloraError(f"{name} is also the file of --{taken[file]}; expected another")
        if "out" in args and lies_in(file, args.out):
            raise MiniloraError(f"{name} is in the folder of --out; expected a file elsewhere")
        for source in sources_of(file, args):
            if file.exists() and lies_in(file, source):
                raise MiniloraError(f"{name} would replace what is read from {source}")
            if lies_in(file, source):
                raise MiniloraError(
                    f"{name} would be read from {source} the next time; expected a file elsewhere"
                )
        taken[file] = option


def plain_file(path: Path) -> Path | None:
    """The file behind a path, existing or not; None for a folder, a device, or our own output."""
    try:
        file = path.resolve()
        is_plain = file.is_file() and not is_output(file) or not path.exists()
        return file if is_plain and file.parent.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, a loop of links
        return None


def sources_of(file: Path, args: argparse.Namespace) -> list[str]:
    """What a command reads: its data and, for a file named like a model's, its models."""
    from minilora.formats.companions import COMPANIONS

    data = [source for source in getattr(args, "data", []) if source not in ("python", "-")]
    is_model_s = file.name in (*COMPANIONS, "config.json", "adapter_config.json")
    endings = (".safetensors", ".safetensors.index.json", ".jinja")
    if not is_model_s and not file.name.endswith(endings):
        return data
    base = getattr(args, "base", None)
    return [*data, *getattr(args, "adapter", []), *([] if base is None else [base])]


def lies_in(file: Path, folder: str | Path) -> bool:
    """Whether a resolved path is this file or folder, or is in it."""
    return Path(folder).resolve() in (file, *file.parents)


def is_output(file: Path) -> bool:
    """Whether standard output or standard error goes to this file, such as /dev/stdout."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(file.stat(), os.fstat(descriptor)):
                return True
    return False


def write_figures(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Write the figures to the file of --json, if given: those that the register lists."""
    if args.json is not None:
        from minilora.formats.files import write_json

        args.command.check(figures)
        write_json(args.json.resolve(), figures)  # not the link, if it is one
