"""The tutorials as notebooks, for Jupyter and for Colab.

    pip install ".[docs]"
    python docs/notebooks.py                       into tutorials/, beside their sources
    python docs/notebooks.py --colab --out DIR     each with a first cell that installs minilora

A notebook is made anew from its source whenever it is wanted, and never committed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jupytext
import nbformat

TUTORIALS = Path(__file__).parents[1] / "tutorials"
PACKAGE = "minilora[plot]"


def notebook(source: Path, *, install: str | None = None) -> nbformat.NotebookNode:
    """The notebook of a tutorial; with `install`, its first cell installs that by pip."""
    made = jupytext.read(source, fmt="py:percent")
    if install:
        made.cells.insert(0, nbformat.v4.new_code_cell(f'%pip install -q "{install}"'))
    for number, cell in enumerate(made.cells):
        cell["id"] = (
            f"cell-{number}"  # instead of a random one, so that equal sources give equal files
        )
    made.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    return made


def main(argv: list[str] | None = None) -> None:
    """Write every notebook and say where it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=TUTORIALS, help="folder for the notebooks")
    parser.add_argument("--colab", action="store_true", help="begin with a cell that installs")
    parser.add_argument(
        "--install", default=PACKAGE, metavar="SPEC", help=f"what that cell installs: {PACKAGE}"
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for source in sorted(TUTORIALS.glob("*.py")):
        path = args.out / f"{source.stem}.ipynb"
        nbformat.write(notebook(source, install=args.install if args.colab else None), path)
        print(path)


if __name__ == "__main__":
    main()
