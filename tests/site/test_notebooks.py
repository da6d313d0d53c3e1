"""The tutorials' notebooks: the same code in the same order, and they run."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.site

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def notebooks(import_file):
    return import_file("docs/notebooks.py")


def test_one_command_writes_a_valid_notebook_for_each_tutorial(notebooks, tmp_path):
    import nbformat

    command = [sys.executable, str(ROOT / "docs" / "notebooks.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    sources = sorted((ROOT / "tutorials").glob("*.py"))
    assert [path.stem for path in sorted(tmp_path.glob("*.ipynb"))] == [p.stem for p in sources]
    for source in sources:
        made = nbformat.read(tmp_path / f"{source.stem}.ipynb", as_version=4)
        nbformat.validate(made)
        assert made.cells[0].cell_type == "markdown"
        code = "\n".join(cell.source for cell in made.cells if cell.cell_type == "code")
        lines = source.read_text(encoding="utf-8").splitlines()
        in_source = [line for line in lines if line.strip() and not line.startswith("#")]
        in_notebook = [line for line in code.splitlines() if line.strip() and line[0] != "#"]
        assert in_notebook == in_source


def test_a_notebook_for_colab_installs_first(notebooks):
    made = notebooks.notebook(
        ROOT / "tutorials" / "00_lora_in_fifty_lines.py", install="minilora[plot]"
    )
    assert made.cells[0].source == '%pip install -q "minilora[plot]"'
    assert made.cells[1].cell_type == "markdown"


def test_a_notebook_runs(notebooks, tmp_path):
    from nbclient import NotebookClient

    made = notebooks.notebook(ROOT / "tutorials" / "00_lora_in_fifty_lines.py")
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(made, timeout=120, kernel_name="python3", resources=resources).execute()
    printed = [
        output.text
        for cell in made.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    ]
    assert any("loss" in text for text in printed)
