"""`minilora bench`: every measurement in a process of its own, and what they found, printed."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import minilora
from minilora.bench import peft
from minilora.bench.case import Case
from minilora.errors import MiniloraError

OURS = """\
import time; started = time.perf_counter()
import json, sys
from minilora.bench.case import Case
from minilora.bench.measure import measure
case = Case.from_json(sys.argv[1])
print(json.dumps(measure(case, started=started, floor=sys.argv[2] == "floor")))
"""
THEIRS = """\
import json, sys
from minilora.bench.case import Case
from minilora.bench.peft import measure_peft
print(json.dumps(measure_peft(Case.from_json(sys.argv[1]), attention=sys.argv[2])))
"""


def bench(case: Case, *, versus: str | None = None, rounds: int = 3) -> dict[str, Any]:
    """Measure, print, and return the figures.

    `versus` names another way to run the case, each in turn `rounds` times: `peft`, or `1` for one
    thread. Raises MiniloraError where that cannot be done, or when a process fails.
    """
    if versus == "peft":
        peft.check(case)
    found = in_process(OURS, case, "floor")
    figures = describe(case, found)
    report(case, figures)
    if versus == "peft":
        figures["versus_peft"] = versus_peft(case, rounds)
    elif versus == "1":
        figures["versus_one_thread"] = versus_one_thread(case, rounds)
    return figures


def in_process(program: str, case: Case, how: str) -> dict[str, Any]:
    """What one of the programs above says of a case, run by a new Python."""
    package = str(Path(minilora.__path__[0]).parent)
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", program, case.to_json(), how],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise MiniloraError(f"the measured process failed: {last}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def describe(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """The figures that --json writes."""
    median = statistics.median(found["seconds"])
    figures = {
        "what": case.what,
        "method": case.method,
        "batch": case.batch,
        "context": case.context,
        "rank": case.rank,
        "targets": list(case.targets),
        "device": case.device,
        "threads": case.threads,
        "steps": case.steps,
        "step_seconds_median": median,
        "step_seconds_minimum": min(found["seconds"]),
        "tokens_per_second": case.tokens / median,
        "peak_rss_bytes": found["peak_rss_bytes"],
        "import_seconds": found["import_seconds"],
        "first_step_seconds": found["first_step_seconds"],
    }
    for name in ("blas", "blas_kernel", "blas_threads"):
        if name in found:
            figures[name] = found[name]
    if "floor" in found:
        floor = statistics.median(found["floor"])
        figures |= {
            "floor_seconds": floor,
            "floor_seconds_minimum": min(found["floor"]),
            "floor_gflop": found["flops"] / 1e9,
            "step_to_floor": median / floor,
            "breakdown": found["breakdown"],
        }
    return figures | {"machine": f"{platform.machine()}, {os.cpu_count()} cores, "
                                 f"{platform.system()}"}  # fmt: skip


# --- side by side --------------------------------------------------------------------------------


def versus_peft(case: Case, rounds: int) -> dict[str, Any]:
    """Both of PEFT's attentions and ours in turn; PEFT's better one counts, for each figure."""
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        found.setdefault("minilora", []).append(in_process(OURS, case, "alone"))
        for attention in peft.ATTENTIONS:
            found.setdefault(f"peft, {attention}", []).append(in_process(THEIRS, case, attention))
    figures = side_by_side(case, found)
    ours = figures.pop("minilora")
    ratios = {
        name: ours[name] / min(theirs[name] for theirs in figures.values())
        for name in ("step_seconds_median", "peak_rss_bytes", "start_seconds")
    }
    print()
    print(f"step time      {ratios['step_seconds_median']:.3f} of PEFT's")
    print(f"peak memory    {ratios['peak_rss_bytes']:.3f} of PEFT's")
    print(f"start          {ratios['start_seconds']:.3f} of PEFT's (import and first step)")
    return {"minilora": ours, **figures, "ratios": ratios}


def versus_one_thread(case: Case, rounds: int) -> dict[str, Any]:
    """The case with its threads and with one thread, in turn."""
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for threads in (1, case.threads):
            found.setdefault(f"threads: {threads}", []).append(
                in_process(OURS, replace(case, threads=threads), "alone")
            )
    figures: dict[str, Any] = side_by_side(case, found)
    one, many = (figures[name]["step_seconds_median"] for name in found)
    figures["speedup"] = one / many
    print(f"\n{case.threads} threads are {one / many:.2f} times as fast as one")
    return figures


def side_by_side(case: Case, found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Print and return the figures of each of several ways over all rounds."""
    print(f"\n{'':<14} {'median':>10} {'minimum':>10} {'tokens/s':>10} {'peak':>10} {'import':>8} "
          f"{'first':>8}")  # fmt: skip
    figures = {}
    for name, rounds in found.items():
        seconds = [s for figures in rounds for s in figures["seconds"]]
        median = statistics.median(seconds)
        figures[name] = row = {
            "step_seconds_median": median,
            "step_seconds_minimum": min(seconds),
            "tokens_per_second": case.tokens / median,
            "peak_rss_bytes": statistics.median(r["peak_rss_bytes"] for r in rounds),
            "import_seconds": statistics.median(r["import_seconds"] for r in rounds),
            "first_step_seconds": statistics.median(r["first_step_seconds"] for r in rounds),
        }
        row["start_seconds"] = row["import_seconds"] + row["first_step_seconds"]
        print(f"{name:<14} {1e3 * median:>7.1f} ms {1e3 * min(seconds):>7.1f} ms "
              f"{row['tokens_per_second']:>10,.0f} {row['peak_rss_bytes'] / 2**20:>6,.0f} MiB "
              f"{row['import_seconds']:>6.2f} s {row['first_step_seconds']:>6.2f} s")  # fmt: skip
    return figures


# --- the report ----------------------------------------------------------------------------------


def report(case: Case, figures: dict[str, Any]) -> None:
    """Print the figures of one measurement."""
    c = case.config
    what = {
        "step": f"{case.method} step, {case.batch} × {case.context} tokens",
        "evaluate": f"evaluation, {case.batch} × {case.context} tokens",
        "generate": f"generation of {case.context} tokens",
    }[case.what]
    if case.what == "step" and case.method == "lora":
        what += f", rank {case.rank} on {','.join(case.targets)}"
    print(f"{c.n_layer} blocks of width {c.n_embd}, vocabulary {c.vocab_size:,}: {what}")
    print(f"{figures['machine']}; threads: {case.threads}; {figures['blas']}, kernel "
          f"{figures['blas_kernel']}, {figures['blas_threads']} BLAS threads in each")  # fmt: skip
    print()
    print(f"time           {1e3 * figures['step_seconds_median']:.1f} ms (median of {case.steps}), "
          f"{1e3 * figures['step_seconds_minimum']:.1f} ms (minimum)")  # fmt: skip
    gflops = figures["floor_gflop"] / figures["floor_seconds"]
    print(f"floor          {1e3 * figures['floor_seconds']:.1f} ms for the matrix products alone "
          f"({figures['floor_gflop']:.1f} GFLOP, {gflops:.0f} GFLOP/s)")  # fmt: skip
    print(f"time / floor   {figures['step_to_floor']:.2f}")
    print(f"tokens/s       {figures['tokens_per_second']:,.0f}")
    print(f"peak memory    {figures['peak_rss_bytes'] / 2**20:,.0f} MiB resident")
    print(f"start          import {figures['import_seconds']:.2f} s, "
          f"first run {figures['first_step_seconds']:.2f} s")  # fmt: skip
    print(f"\n{'operation':<28} {'calls':>6} {'ms':>8} {'share':>6} {'products, ms':>13}")
    total = sum(row["seconds"] for row in figures["breakdown"])
    for row in figures["breakdown"]:
        products = f"{1e3 * row['products_seconds']:.2f}" if row["products_seconds"] else ""
        print(f"{row['operation']:<28} {row['calls']:>6} {1e3 * row['seconds']:>8.2f} "
              f"{row['seconds'] / total:>6.1%} {products:>13}")  # fmt: skip
