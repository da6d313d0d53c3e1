"""What a run shows while it goes: a progress bar or plain lines, and a plot of its losses."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from minilora.errors import MiniloraError
from minilora.formats.files import write_bytes
from minilora.training.checkpoint import History
from minilora.training.loop import Progress

# By the end of the name, what is written into the file: no date.
PLOTS: dict[str, dict[str, None]] = {
    ".png": {},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}


class ProgressBar:
    """A tqdm bar on a terminal; elsewhere a plain line for each report. Both go to stderr.

    Use it as the `report` of `train`; leaving the `with` block closes the bar.
    """

    def __init__(self, steps: int, what: str) -> None:
        self.steps, self.what = steps, what
        self.held_out: float | None = None
        self.bar: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, progress: Progress) -> None:
        """Show a report of the training loop."""
        if progress.held_out is not None:
            self.held_out = progress.held_out
        figures = f"loss {progress.loss:.3f}"
        if self.held_out is not None:
            figures += f", held-out {self.held_out:.3f}"
        figures += f", {progress.tokens_per_second:,.0f} tokens/s"
        figures += f", {time_left(progress.seconds_left)} left"
        if sys.stderr.isatty():
            if self.bar is None:
                self.bar = self.new_bar()
            self.bar.n = progress.step
            self.bar.set_postfix_str(figures)
        else:
            line = f"{self.what}: step {progress.step}/{self.steps}, {figures}"
            print(line, file=sys.stderr, flush=True)

    def new_bar(self) -> Any:
        """A bar, drawn from the first report on, so that an error before it stands alone.

        tqdm's own estimate of the time left would be wrong after a resume.
        """
        from tqdm import tqdm

        return tqdm(
            total=self.steps,
            desc=self.what,
            dynamic_ncols=True,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
        )


def time_left(seconds: float) -> str:
    """A duration as h:mm:ss or m:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def check_plot(path: Path) -> None:
    """Raise MiniloraError unless `path` can be drawn; called before a run that ends in a plot."""
    if path.suffix.lower() not in PLOTS:
        raise MiniloraError(f"--plot {path}: expected a name that ends in {', '.join(PLOTS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MiniloraError("--plot needs matplotlib: pip install 'minilora[plot]'") from error


def plot_losses(history: History, path: str | Path, *, title: str) -> None:
    """Draw the training and held-out losses (nats per token) against the step; PNG, SVG or PDF."""
    path = Path(path)
    check_plot(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(title, parse_math=False)  # a file's name may hold a $
    if history.train:
        steps, losses = zip(*history.train, strict=True)
        axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training batch")
        if len(losses) >= 20:
            axes.plot(steps, smoothed(losses), color="#2171b5", label="training, smoothed")
    steps, losses = zip(*history.held_out, strict=True)
    axes.plot(steps, losses, color="#d94801", marker="o", markersize=3, label="held out")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn, kind = io.BytesIO(), path.suffix.lower()
    with rc_context({"svg.hashsalt": "minilora"}):
        figure.savefig(drawn, dpi=150, format=kind.lstrip("."), metadata=PLOTS[kind])
    write_bytes(path, drawn.getvalue())


def smoothed(losses: tuple[float, ...], decay: float = 0.95) -> list[float]:
    """An exponential running mean, corrected for its start."""
    mean, weight, means = 0.0, 0.0, []
    for loss in losses:
        mean = decay * mean + (1.0 - decay) * loss
        weight = decay * weight + (1.0 - decay)
        means.append(mean / weight)
    return means
