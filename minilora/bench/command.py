"""`minilora bench`: each measurement in a process of its own, and a table of their figures."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import minilora
from minilora.bench import peft
from minilora.bench.budget import adapter_shapes
from minilora.bench.case import Case
from minilora.errors import MiniloraError

OURS = """\
import time; started = time.perf_counter()
import sys
from minilora.bench.case import Case
from minilora.bench.measure import measure, questions
measure(Case.from_json(sys.argv[1]), questions(), started=started, how=sys.argv[2])
"""
THEIRS = """\
import sys
from minilora.bench.case import Case
from minilora.bench.measure import questions
from minilora.bench.peft import measure_peft, measure_products
case, how = Case.from_json(sys.argv[1]), sys.argv[2]
if how == "products":
    measure_products(case, questions())
else:
    measure_peft(case, questions(), attention=how)
"""

Ways: TypeAlias = dict[str, tuple[str, Case, str]]
"""Several ways to run a case, by name: a program, its case, and its argument `how`."""


def bench(case: Case, *, versus: str | None = None, rounds: int = 3) -> dict[str, Any]:
    """Measure a case, print its figures and return them, by the names that `--json` writes.

    `versus` names another way to run the case, timed in turn with it `rounds` times: `peft`, `1`
    (one thread) or `recompute`. Raises MiniloraError if that cannot be done, or if a process fails.
    """
    if rounds < 1:
        raise MiniloraError(f"rounds {rounds} is too small; the minimum is 1")
    adapter_shapes(case.config, case.lora_config)  # raises for an unknown target or a rank too high
    if versus == "peft":
        peft.check(case)
    with Process(OURS, case, "floor") as process:
        found = process.answer()
    figures = describe(case, found)
    print_measurement(case, figures)
    if versus == "peft":
        figures["versus_peft"] = versus_peft(case, rounds)
    elif versus == "1":
        names = f"threads: {case.threads}", "one thread"
        other = replace(case, threads=1)
        figures["versus_one_thread"] = versus_ours(case, other, names, rounds)
    elif versus == "recompute":
        names = "kept", "recomputed"
        other = replace(case, recompute=True)
        figures["versus_recompute"] = versus_ours(case, other, names, rounds)
    return figures


class Process:
    """A new Python that runs one of the programs above on a case."""

    def __init__(self, program: str, case: Case, how: str) -> None:
        package = str(Path(minilora.__path__[0]).parent)
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, case.to_json(), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"},
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with suppress(OSError):  # it may not have read what was written
                stream.close()  # type: ignore[union-attr]
        self.process.wait()

    def end(self) -> Any:
        """Its last answer, given when no more questions can come."""
        with suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        return self.answer()

    def answer(self, question: str | None = None) -> Any:
        """Its answer, JSON on one line, to a question or, without one, what it prints next.

        Raises MiniloraError with the last line of its standard error if it has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            if question is not None:
                self.process.stdin.write(question + "\n")
                self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, json.JSONDecodeError):
            self.process.wait()
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines()
            reason = lines[-1] if lines else f"exit status {self.process.returncode}"
            raise MiniloraError(f"the measured process failed: {reason}") from None


def describe(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """The figures that --json writes."""
    seconds, floor = found["seconds"], found["floor"]
    return {
        "what": case.what,
        "method": case.method,
        "batch": case.batch,
        "context": case.context,
        "rank": case.rank,
        "targets": list(case.targets),
        "device": case.device,
        "threads": case.threads,
        "steps": case.steps,
        "recompute": case.recompute,
        "step_seconds_median": median(seconds),
        "step_seconds_minimum": min(seconds),
        "tokens_per_second": case.tokens / median(seconds),
        "floor_seconds": median(floor),
        "floor_seconds_minimum": min(floor),
        "floor_gflop": found["flops"] / 1e9,
        "step_to_floor": median(s / f for s, f in zip(seconds, floor, strict=True)),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        **{name: found[name] for name in (
            "peak_rss_bytes", "idle_rss_bytes", "page_faults", "import_seconds",
            "first_step_seconds", "blas", "blas_kernel", "blas_threads", "breakdown",
        )},
    }  # fmt: skip


# --- side by side --------------------------------------------------------------------------------


def versus_peft(case: Case, rounds: int) -> dict[str, Any]:
    """Time minilora and PEFT, with each of its attentions, in turn; figures and ratios.

    Every ratio is to the better of PEFT's two figures. That of the times is a product of three: our
    step to its matrix products, these to the same products in PyTorch, and those to PEFT's step.
    """
    ways: Ways = {"minilora": (OURS, case, "alone")}
    for attention in peft.ATTENTIONS:
        ways[f"peft, {attention}"] = (THEIRS, case, attention)
    ways["products"] = OURS, case, "products"
    ways["products, torch"] = THEIRS, case, "products"
    by_way = side_by_side(case, ways, rounds)
    ours, *theirs, products, products_in_torch = by_way.values()
    ratios = {
        "step_seconds": max(ratio(ours, their) for their in theirs),
        "step_to_products": ratio(ours, products),
        "products": ratio(products, products_in_torch),
        "products_to_step": max(ratio(products_in_torch, their) for their in theirs),
        **{name: ours[name] / min(their[name] for their in theirs)
           for name in ("peak_rss_bytes", "start_seconds")},
    }  # fmt: skip
    print(f"""
time           {ratios["step_seconds"]:.3f} of PEFT's, about the product of
               {ratios["step_to_products"]:.2f}   our step to our matrix products
             × {ratios["products"]:.2f}   our matrix products to PyTorch's
             × {ratios["products_to_step"]:.2f}   PyTorch's matrix products to PEFT's step
peak memory    {ratios["peak_rss_bytes"]:.3f} of PEFT's
start          {ratios["start_seconds"]:.3f} of PEFT's (import and first run)""")
    return {**by_way, "ratios": ratios}


def versus_ours(case: Case, other: Case, names: tuple[str, str], rounds: int) -> dict[str, Any]:
    """Time the case and another of ours in turn; figures, and the other's ratios to the case's."""
    ways: Ways = {name: (OURS, c, "alone") for name, c in zip(names, (case, other), strict=True)}
    by_way = side_by_side(case, ways, rounds)
    ours, theirs = (by_way[name] for name in names)
    ratios = {
        "step_seconds": ratio(theirs, ours),
        "peak_rss_bytes": theirs["peak_rss_bytes"] / ours["peak_rss_bytes"],
    }
    print(f"\n{names[1]}: {ratios['step_seconds']:.2f} times the time of {names[0]}, "
          f"{ratios['peak_rss_bytes']:.2f} times the peak memory")  # fmt: skip
    return {**by_way, "ratios": ratios}


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The ratio of our time to theirs, the median over the turns."""
    return median(a / b for a, b in zip(ours["turns"], theirs["turns"], strict=True))


def side_by_side(case: Case, ways: Ways, rounds: int) -> dict[str, dict[str, Any]]:
    """Time the case in several ways in turn; print and return the figures of each, by its name."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in ways}
    with ExitStack() as stack:
        processes: dict[str, Process] = {}
        for name, way in ways.items():
            processes[name] = stack.enter_context(Process(*way))
            processes[name].answer("0")  # answered when it is ready: they start one at a time
        for _ in range(rounds):
            for name, process in processes.items():
                seconds[name].append(process.answer(str(case.steps)))
        found = {name: process.end() for name, process in processes.items()}

    print(f"\n{'':<15}{'median':>12}{'minimum':>12}{'tokens/s':>10}{'peak':>12}{'import':>9}"
          f"{'first run':>11}")  # fmt: skip
    by_way: dict[str, dict[str, Any]] = {}
    for name in ways:
        every = [s for turn in seconds[name] for s in turn]
        start = found[name]["import_seconds"] + found[name]["first_step_seconds"]
        by_way[name] = {
            "step_seconds_median": median(every),
            "step_seconds_minimum": min(every),
            "turns": [median(turn) for turn in seconds[name]],
            "tokens_per_second": case.tokens / median(every),
            "start_seconds": start,
            **found[name],
        }
        print(f"{name:<15}{1e3 * median(every):>9.1f} ms{1e3 * min(every):>9.1f} ms"
              f"{case.tokens / median(every):>10,.0f}"
              f"{found[name]['peak_rss_bytes'] / 2**20:>8,.0f} MiB"
              f"{found[name]['import_seconds']:>7.2f} s"
              f"{found[name]['first_step_seconds']:>9.2f} s")  # fmt: skip
    return by_way


# --- what is printed -----------------------------------------------------------------------------


def print_measurement(case: Case, figures: dict[str, Any]) -> None:
    """Print the figures of one measurement."""
    c = case.config
    what = {
        "step": f"{case.method} step, {case.batch} × {case.context} tokens",
        "evaluate": f"evaluation, {case.batch} × {case.context} tokens",
        "generate": f"generation of {case.context} tokens",
    }[case.what]
    if case.what == "step" and case.method == "lora":
        what += f", rank {case.rank} on {','.join(case.targets)}"
    what += ", blocks recomputed" if case.recompute else ""
    gflops = figures["floor_gflop"] / figures["floor_seconds"]
    peak, idle = (figures[name] / 2**20 for name in ("peak_rss_bytes", "idle_rss_bytes"))
    print(f"""\
{c.n_layer} blocks of width {c.n_embd}, vocabulary {c.vocab_size:,}: {what}
{figures["machine"]}, {case.threads} threads; {figures["blas"]}, kernel {figures["blas_kernel"]}, \
BLAS threads: {figures["blas_threads"]}

time           {1e3 * figures["step_seconds_median"]:.1f} ms (median of {case.steps}), \
{1e3 * figures["step_seconds_minimum"]:.1f} ms (minimum)
floor          {1e3 * figures["floor_seconds"]:.1f} ms, the matrix products alone: \
{figures["floor_gflop"]:.1f} GFLOP, {gflops:.0f} GFLOP/s
time / floor   {figures["step_to_floor"]:.2f}
tokens/s       {figures["tokens_per_second"]:,.0f}
peak memory    {peak:,.0f} MiB resident, of which {idle:.0f} MiB before the model was made
page faults    {figures["page_faults"]:,} in one run
start          import {figures["import_seconds"]:.2f} s, \
first run {figures["first_step_seconds"]:.2f} s

{"operation":<28}{"calls":>7}{"ms":>9}{"share":>8}{"products, ms":>14}""")
    total = sum(row["seconds"] for row in figures["breakdown"])
    for row in figures["breakdown"]:
        products = f"{1e3 * row['products_seconds']:.2f}" if row["products_seconds"] else ""
        print(f"{row['operation']:<28}{row['calls']:>7}{1e3 * row['seconds']:>9.2f}"
              f"{row['seconds'] / total:>8.1%}{products:>14}")  # fmt: skip
