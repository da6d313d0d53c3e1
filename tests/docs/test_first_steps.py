"""The table of the first steps in docs/derivations/lora.md is what the code below it prints."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "derivations" / "lora.md"


def test_the_table_is_what_the_code_prints(capsys):
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(import.*?)^```", text, re.DOTALL | re.MULTILINE)
    exec(compile(code, str(PAGE), "exec"), {})
    printed = [row.split("|")[1:-1] for row in capsys.readouterr().out.splitlines()]
    assert len(printed) == 6
    for row in printed:
        (shown,) = re.findall(rf"^\|{row[0]}\|(.*)\|$", text, re.MULTILINE)
        for found, expected in zip(row[1:], shown.split("|"), strict=True):
            # another BLAS may round the last digit the other way
            assert abs(float(found) - float(expected)) < 0.0021, (row, shown)
