"""The figures of the tutorials: a notebook shows them by itself, a program saves them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minilora.errors import MiniloraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "MINILORA_FIGURES"  # the variable that names another folder than ./figures


def show(figure: Figure, title: str) -> None:
    """Give a figure of pyplot its title; in a program save it too, and print where.

    The file is PROGRAM-NUMBER.png, in $MINILORA_FIGURES or else in ./figures. A figure of the same
    name from an earlier run is replaced. Raises MiniloraError where it cannot be written.
    """
    figure.suptitle(title, wrap=True)
    if "ipykernel" in sys.modules:  # a notebook, which shows it below the cell
        return
    folder = Path(os.environ.get(FOLDER) or "figures")
    path = folder / f"{Path(sys.argv[0]).stem}-{figure.number}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Title": title})
    except OSError as error:
        raise MiniloraError(
            f"cannot save a figure as {path} ({error.strerror}): ${FOLDER} names another folder"
        ) from error
    print(f"[{path}] {title}")
