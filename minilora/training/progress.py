"""The progress of a training run: a bar on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilora.training.loop import Progress


class ProgressBar:
    """A tqdm bar on a terminal or in a notebook, elsewhere a line for each report; on stderr.

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
        text = f"loss {progress.loss:.3f}"
        if self.held_out is not None:
            text += f", held-out {self.held_out:.3f}"
        text += f", {progress.tokens_per_second:,.0f} tokens/s"
        text += f", {time_left(progress.seconds_left)} left"
        if is_watched():
            if self.bar is None:
                self.bar = self.new_bar()
            self.bar.n = progress.step
            self.bar.set_postfix_str(text)
        else:
            line = f"{self.what}: step {progress.step}/{self.steps}, {text}"
            print(line, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Show a text above the bar, or between the lines."""
        if self.bar is not None:
            self.bar.clear()
        print(text, file=sys.stderr, flush=True)
        if self.bar is not None:
            self.bar.refresh()

    def new_bar(self) -> Any:
        """The bar; made at the first report, so that an earlier error is printed alone.

        It does not show tqdm's estimate of the time left, which is wrong after a resume.
        """
        from tqdm import tqdm

        return tqdm(
            total=self.steps,
            desc=self.what,
            dynamic_ncols=True,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
        )


def is_watched() -> bool:
    """Whether standard error is shown as it is written: on a terminal or in a notebook."""
    if sys.stderr is not None and sys.stderr.isatty():
        return True
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


def time_left(seconds: float) -> str:
    """A duration as h:mm:ss or m:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
