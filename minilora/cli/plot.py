"""The plot of a run's losses."""

from __future__ import annotations

import io
from pathlib import Path

from minilora.errors import MiniloraError
from minilora.formats.files import write_bytes
from minilora.training.checkpoint import History

# The formats by suffix, and the metadata that keeps the date out of the file.
PLOTS: dict[str, dict[str, None]] = {
    ".png": {},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}


def check_plot(path: Path) -> None:
    """Raise MiniloraError unless a plot can be drawn there; called before the run."""
    if path.suffix.lower() not in PLOTS:
        raise MiniloraError(f"--plot {path}: expected a name that ends in {' or '.join(PLOTS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MiniloraError("--plot needs matplotlib: pip install matplotlib") from error


def plot_losses(history: History, path: str | Path, *, title: str) -> None:
    """Draw the training and held-out losses (nats per token) by step, as PNG, SVG or PDF.

    Raises MiniloraError for another suffix, without matplotlib, and if the file cannot be written.
    """
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
    """The exponential moving average, corrected for its start."""
    mean, weight, means = 0.0, 0.0, []
    for loss in losses:
        mean = decay * mean + (1.0 - decay) * loss
        weight = decay * weight + (1.0 - decay)
        means.append(mean / weight)
    return means
