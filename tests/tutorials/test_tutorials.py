"""Every tutorial runs as a student would run it; it ends in assertions of what it claims."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import minilora

PACKAGE = Path(minilora.__path__[0])
TUTORIALS = sorted((Path(__file__).parents[2] / "tutorials").glob("*.py"))


def test_there_are_tutorials():
    assert TUTORIALS


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_without_a_warning(path, tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert run.returncode == 0, f"{path.name} fails:\n{run.stdout}\n{run.stderr}"
    assert run.stdout, f"{path.name} prints nothing"
    assert "assert " in path.read_text(encoding="utf-8"), f"{path.name} asserts nothing"
