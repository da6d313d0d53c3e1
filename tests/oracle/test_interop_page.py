"""The interop page runs as it stands, from top to bottom in an empty folder.

Needs the extra `oracle`; run with -m oracle.
"""

import re
import shlex
from pathlib import Path

import pytest

from minilora.cli import main

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PAGE = Path(__file__).parents[2] / "docs" / "interop.md"


def test_the_page_runs(tmp_path, monkeypatch):
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```(python|sh)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    shown = text.count("```console\n")  # what needs a download is not run
    assert len(blocks) == text.count("```") // 2 - shown == 10
    names = {}
    for block in blocks:
        kind, source = block.groups()
        if kind == "python":
            lines_above = text[: block.start(2)].count("\n")
            exec(compile("\n" * lines_above + source, str(PAGE), "exec"), names)
            continue
        for line in source.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "minilora" and main(arguments) == 0, line
