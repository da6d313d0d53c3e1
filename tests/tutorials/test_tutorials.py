"""Every tutorial runs as a student would run it; it ends in assertions of what it claims."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minilora

ROOT = Path(__file__).parents[2]
PACKAGE = Path(minilora.__path__[0])
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))
each_tutorial = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


def test_there_are_tutorials():
    assert TUTORIALS


@each_tutorial
def test_a_tutorial_runs_without_a_warning(path, tmp_path):
    """In small, where it has a smaller size; `.ci/run` runs each in full."""
    run = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(PACKAGE.parent),
            "PYTHONUTF8": "1",
            "MINILORA_SMALL": "1",
            "MPLBACKEND": "Agg",
        },
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert run.returncode == 0, f"{path.name} fails:\n{run.stdout}\n{run.stderr}"
    assert run.stdout, f"{path.name} prints nothing"
    assert "assert " in path.read_text(encoding="utf-8"), f"{path.name} asserts nothing"
    assert not list(tmp_path.iterdir()), f"{path.name} leaves files behind"


@each_tutorial
def test_what_a_tutorial_names_exists(path):
    """Tests, files, and equations by their tags."""
    text = path.read_text(encoding="utf-8")
    for file, test in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", text):
        assert (ROOT / file).exists(), file
        assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    for test in re.findall(r"`(test_\w+)`", text):
        assert f"def {test}(" in tests, test
    for file in re.findall(r"`((?:minilora|docs|tutorials)/[\w/.]+)`", text):
        assert (ROOT / file).exists(), file
    pages = (ROOT / "docs" / "derivations").glob("*.md")
    tags = {tag for page in pages for tag in re.findall(r"\\tag\{(.*?)\}", page.read_text("utf-8"))}
    assert set(re.findall(r"\[([A-Z]+\.\d+)\]", text)) <= tags


@each_tutorial
def test_a_tutorial_shows_and_saves_no_figure(path):
    """A notebook shows the figures by itself; a script has nobody to look at them."""
    text = path.read_text(encoding="utf-8")
    assert "plt.show(" not in text and "savefig(" not in text
