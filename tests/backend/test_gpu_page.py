"""The page on GPUs: its program runs, its messages are the program's, and its names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_the_program_runs(capsys):
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)
    names = {}
    exec(program, names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["context 128", "context 512", "context 1024"]
    batches = [int(line.split()[-1]) for line in lines]
    assert batches == sorted(batches, reverse=True)
    for batch, context in zip(batches, (128, 512, 1024), strict=True):
        assert names["peak_bytes"](batch, context) <= 0.9 * 24e9
        assert names["peak_bytes"](2 * batch, context) > 0.9 * 24e9


def test_the_messages_are_those_of_the_program():
    messages = re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.M)
    source = (ROOT / "minilora" / "backend.py").read_text(encoding="utf-8")
    assert len(messages) == 4
    for message in messages:
        assert message in source, message


@pytest.mark.parametrize("path", re.findall(r"`((?:minilora|tests)/[\w/.]+)`", PAGE))
def test_a_file_that_is_named_exists(path):
    assert (ROOT / path).exists()
