"""Times a training step of this checkout beside that of another one, which take turns.

    git worktree add ../other 65f72d7
    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python tests/versions/compare_speed.py ../other

Prints, for each shape and set of targets, this checkout's time and peak memory over the other's:
the median over pairs of fresh processes, since two processes of one program differ, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parents[2]
CASES = {"tiny": (20, 8, 128), "small": (5, 8, 128), "gpt2": (3, 4, 128)}  # steps a turn, B, T
TARGETS = (("qkv",), ("qkv", "o", "up", "down"))


class Process:
    """A fresh Python that runs a case with the package of one checkout."""

    def __init__(self, checkout: Path, case: str) -> None:
        program = "from minilora.bench.command import OURS; exec(OURS)"  # that checkout's
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, case, "alone"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout.resolve())},
        )  # fmt: skip
        self.seconds(0)

    def seconds(self, steps: int) -> list[float]:
        """The seconds of so many steps."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> dict[str, Any]:
        self.process.stdin.close()
        figures = json.loads(self.process.stdout.readline())
        self.process.wait()
        return figures


def compare(other: Path, case: Any, pairs: int, turns: int) -> tuple[list[float], list[float], str]:
    """Our time over the other's, and our peak memory over it, for each pair of processes."""
    times, peaks = [], []
    for pair in range(pairs):
        places = (HERE, other) if pair % 2 == 0 else (other, HERE)
        processes = {place: Process(place, case.to_json()) for place in places}
        ratios = []
        for _ in range(turns):
            seconds = {place: processes[place].seconds(case.steps) for place in places}
            ratios.append(median(seconds[HERE]) / median(seconds[other]))
        found = {place: process.end() for place, process in processes.items()}
        times.append(median(ratios))
        peaks.append(found[HERE]["peak_rss_bytes"] / found[other]["peak_rss_bytes"])
    return times, peaks, found[HERE]["blas_kernel"]


def main() -> None:
    from minilora.bench.budget import SHAPES
    from minilora.bench.case import Case

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="another checkout")
    parser.add_argument("--shapes", default=",".join(CASES))
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    for shape in args.shapes.split(","):
        steps, batch, context = CASES[shape]
        for targets in TARGETS:
            case = Case(SHAPES[shape], batch=batch, context=context, targets=targets, steps=steps)
            times, peaks, kernel = compare(args.other, case, args.pairs, args.turns)
            print(
                f"{shape:<6} {','.join(targets):<14} time {median(times):.3f} "
                f"({min(times):.3f} to {max(times):.3f}), memory {median(peaks):.3f} "
                f"({min(peaks):.3f} to {max(peaks):.3f}), kernel {kernel}",
                flush=True,
            )


if __name__ == "__main__":
    main()
