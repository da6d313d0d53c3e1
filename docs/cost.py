"""Time and memory of a LoRA step as one size grows, compared with the formulas.

    python docs/cost.py measure              measures everything (some minutes on two cores)
    python docs/cost.py measure width rank   measures these sizes again and keeps the others
    python docs/cost.py draw                 the plots and the tables of docs/cost.md

One size varies; the others are those of `CENTRE`. The prediction of the time has two rates, both
measured at the centre: that of the matrix products alone, for the FLOPs of a step, and that of
everything else, for the numbers that element-wise work passes over. The prediction of the memory is
the peak of `minilora budget`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minilora.bench import budget
from minilora.bench.case import Case
from minilora.bench.command import OURS, Process
from minilora.formats.files import write_json
from minilora.generate import new_cache, next_logits
from minilora.gpt2 import gpt_init
from minilora.network import Net, net_logits

FIGURES = Path(__file__).parent / "figures"
MEASURED = FIGURES / "cost.json"
CENTRE = Case(budget.SHAPES["tiny"], steps=1)
ROUNDS = 5
SIZES: dict[str, tuple[int, ...]] = {
    "width": (64, 128, 256, 512, 1024),
    "depth": (1, 2, 4, 8, 16),
    "context": (64, 128, 256, 512, 1024),
    "batch": (2, 4, 8, 16, 32),
    "rank": (2, 8, 32, 128, 256),
    "vocabulary": (512, 2048, 8192, 32768),
}
PREFIXES = (16, 32, 64, 128, 256, 512, 1023)


def case_of(knob: str, size: int) -> Case:
    """The centre with one size changed; heads stay 64 wide."""
    config = CENTRE.config
    if knob == "width":
        return replace(CENTRE, config=replace(config, n_embd=size, n_head=size // 64))
    if knob == "depth":
        return replace(CENTRE, config=replace(config, n_layer=size))
    if knob == "vocabulary":
        return replace(CENTRE, config=replace(config, vocab_size=size))
    return replace(CENTRE, **{knob: size})


def formulas(case: Case) -> dict[str, int]:
    """FLOPs, numbers under element-wise work, and peak bytes.

    The numbers are those kept for the backward pass, the attention weights, and the logits.
    """
    config = case.config
    step = budget.Step(config, case.lora_config, case.batch, case.context)
    kept = sum(entry.numbers for entry in budget.ledger(step))
    weights = config.n_layer * config.n_head * case.batch * step.pairs
    return {
        "flops": budget.flops(step).total,
        "numbers": kept + weights + case.tokens * config.vocab_size,
        "predicted_bytes": budget.figures_of(replace(step, threads=case.threads))["peak_bytes"],
    }


# --- measuring -----------------------------------------------------------------------------------


def measure(knobs: Sequence[str]) -> None:
    """Measure the named sweeps and write them to the file, which keeps its others."""
    found = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    if not found or set(knobs) >= set(SIZES):
        found = centre()
    for knob in knobs:
        found[knob] = generation() if knob == "prefix" else sweep(knob)
        write_json(MEASURED, found)
        print(knob, *(f"{point['seconds']:.4f}" for point in found[knob]))


def centre() -> dict[str, Any]:
    """The machine, and the two rates."""
    with Process(OURS, replace(CENTRE, steps=20), "floor") as process:
        found = process.answer()
    sizes, floor = formulas(CENTRE), min(found["floor"])
    return {
        "blas": found["blas"],
        "blas_kernel": found["blas_kernel"],
        "threads": CENTRE.threads,
        "flops_per_second": sizes["flops"] / floor,
        "numbers_per_second": sizes["numbers"] / (min(found["seconds"]) - floor),
    }


def sweep(knob: str) -> list[dict[str, float]]:
    """Every size of one knob, in turn, each in its own process."""
    points: list[dict[str, float]] = []
    with ExitStack() as stack:
        processes = []
        for size in SIZES[knob]:
            process = stack.enter_context(Process(OURS, case_of(knob, size), "alone"))
            process.answer("0")
            processes.append(process)
        turns = [[min(process.answer("3")) for process in processes] for _ in range(ROUNDS)]
        seconds = np.min(turns, axis=0).tolist()  # the turn that nothing else disturbed
        for size, taken, process in zip(SIZES[knob], seconds, processes, strict=True):
            found = process.end()
            points.append({
                "size": size,
                "seconds": taken,
                "bytes": found["peak_rss_bytes"] - found["idle_rss_bytes"],
                **formulas(case_of(knob, size)),
            })  # fmt: skip
    return points


def generation() -> list[dict[str, float]]:
    """Seconds for the token after a prefix, with its keys and values kept and without."""
    config = CENTRE.config
    net = Net(gpt_init(config, seed=0), config)
    rng = np.random.default_rng(0)
    cache = new_cache(net, length=config.n_positions)
    for keys_values in cache:
        for x in keys_values:
            x[:] = rng.standard_normal(x.shape)

    def kept(prefix: int) -> None:
        token = np.array([[1]])
        next_logits(net, tokens=token, cache=cache, position=prefix)

    def afresh(prefix: int) -> None:
        net_logits(net, tokens=np.ones((1, prefix), np.int64))

    def seconds(run: Any, prefix: int, times: int) -> float:
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            run(prefix)
            taken.append(time.perf_counter() - start)
        return min(taken)

    return [
        {
            "size": prefix,
            "seconds": seconds(kept, prefix, 100),
            "afresh_seconds": seconds(afresh, prefix, 5),
        }
        for prefix in PREFIXES
    ]


# --- slopes --------------------------------------------------------------------------------------


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of values ~ sizes^p: the least-squares line through their logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def predicted_seconds(found: dict[str, Any], point: dict[str, float]) -> float:
    """The FLOPs and the element-wise work of a point, each at the centre's rate."""
    flops = point["flops"] / found["flops_per_second"]
    return flops + point["numbers"] / found["numbers_per_second"]


def table(found: dict[str, Any]) -> str:
    """Every sweep's slopes, predicted and measured, as Markdown."""
    lines = [
        "| size | from | to | time: predicted | measured | memory: predicted | measured |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for knob in SIZES:
        points = found[knob]
        sizes = [point["size"] for point in points]
        columns = (
            [predicted_seconds(found, point) for point in points],
            *(
                [point[name] for point in points]
                for name in ("seconds", "predicted_bytes", "bytes")
            ),
        )
        slopes = [slope(sizes, values) for values in columns]
        cells = [knob, f"{sizes[0]:,}", f"{sizes[-1]:,}", *(f"{p:.2f}" for p in slopes)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- drawing -------------------------------------------------------------------------------------

MEASURED_COLOUR, PREDICTED_COLOUR, INK = "#1f83d6", "#e0701a", "#7f868d"  # on white and on black


def draw(found: dict[str, Any]) -> None:
    """The plots of docs/cost.md."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "svg.hashsalt": "minilora", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": INK,
        "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
    })  # fmt: skip
    panels = {
        "time": ("seconds", lambda p: p["seconds"], lambda p: predicted_seconds(found, p)),
        "memory": ("MB", lambda p: p["bytes"] / 1e6, lambda p: p["predicted_bytes"] / 1e6),
    }
    for name, (unit, measured, predicted) in panels.items():
        figure, axes = plt.subplots(2, 3, figsize=(8.4, 5.2), layout="constrained", sharey=True)
        for axis, knob in zip(axes.flat, SIZES, strict=True):
            sizes = [point["size"] for point in found[knob]]
            for label, value, style in (
                ("measured", measured, {"color": MEASURED_COLOUR, "marker": "o"}),
                ("predicted", predicted, {"color": PREDICTED_COLOUR, "linestyle": "--"}),
            ):
                values = [value(point) for point in found[knob]]
                axis.plot(
                    sizes, values, label=f"{label}, slope {slope(sizes, values):.2f}", **style
                )
            log_axes(axis, sizes, knob)
            axis.legend(frameon=False, fontsize=8)
        for axis in axes[:, 0]:
            axis.set_ylabel(unit)
        save(figure, f"cost_{name}.svg")

    figure, axis = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    sizes = [point["size"] for point in found["prefix"]]
    for label, name, style in (
        ("read afresh", "afresh_seconds", {"color": PREDICTED_COLOUR, "marker": "s"}),
        ("keys and values kept", "seconds", {"color": MEASURED_COLOUR, "marker": "o"}),
    ):
        axis.plot(sizes, [1e3 * point[name] for point in found["prefix"]], label=label, **style)
    log_axes(axis, sizes, "tokens before")
    axis.set_ylabel("ms for the next token")
    axis.legend(frameon=False)
    save(figure, "cost_generation.svg")


def log_axes(axis: Any, sizes: Sequence[int], label: str) -> None:
    """Logarithmic axes whose marks are the sizes."""
    from matplotlib.ticker import LogLocator

    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_xlabel(label)
    axis.grid(True)


def save(figure: Any, name: str) -> None:
    """An SVG without a background, the same bytes for the same data."""
    figure.savefig(FIGURES / name, transparent=True, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "draw"))
    parser.add_argument("knobs", nargs="*", choices=[*SIZES, "prefix", []])
    arguments = parser.parse_args()
    if arguments.what == "measure":
        measure(arguments.knobs or [*SIZES, "prefix"])
    else:
        found = json.loads(MEASURED.read_text(encoding="utf-8"))
        draw(found)
        print(table(found))


if __name__ == "__main__":
    main()
