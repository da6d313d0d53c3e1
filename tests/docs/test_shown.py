"""What the pages for a course show is what the programs print: solutions, live edits, slides.

Two kinds of blocks are run, each with the block of output that follows it:

- `console`: commands, after `$`; a `diff` block before it is done to a copy of the repository.
- `python`: a program, run at the end of the tutorial that its first line names, if it names one.

The lines shown must be among those printed, in their order. "…" stands for lines, or for the rest
of one, that are left out. Whole numbers must be equal; others within one unit of the last digit
that is shown, or of a tenth where the page says "about".
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import minilora

ROOT = Path(__file__).parents[2]
PACKAGE = Path(minilora.__path__[0])
PAGES = [ROOT / "docs" / name for name in ("teaching.md", "solutions.md")]
PAGES += sorted((ROOT / "docs" / "slides").glob("*.md"))
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^ *```$", re.M | re.S)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
TAIL = "…"


class Shown(NamedTuple):
    """Something to run and the lines that it must print."""

    place: str
    edit: str
    code: str
    output: str
    is_about: bool


def shown_on(page):
    """Everything that a page shows the output of."""
    text = page.read_text(encoding="utf-8")
    blocks = [
        (text.count("\n", 0, found.start()) + 1, found.start(), found.end(), found[2],
         re.sub(f"^{found[1]}", "", found[3], flags=re.M))
        for found in FENCE.finditer(text)
    ]  # fmt: skip
    for i, (line, start, _, language, code) in enumerate(blocks):
        place, edit = f"{page.stem}-{line}", ""
        if i and blocks[i - 1][3] == "diff" and text[blocks[i - 1][2] : start].isspace():
            start, edit = blocks[i - 1][1], blocks[i - 1][4]
        about = "about" in text[:start].rstrip().rpartition("\n\n")[2]
        if language == "console" and "$ python " in code:
            command, _, output = code.removeprefix("$ python ").partition("\n")
            yield Shown(place, edit, command, output, about)
        elif language == "python" and i + 1 < len(blocks) and not blocks[i + 1][3]:
            assert text[blocks[i][2] : blocks[i + 1][1]].isspace(), place
            yield Shown(place, "", code, blocks[i + 1][4], about)


SHOWN = [shown for page in PAGES for shown in shown_on(page)]
each_shown = pytest.mark.parametrize("shown", SHOWN, ids=[shown.place for shown in SHOWN])


def is_same(shown, printed, is_about=False):
    """Whether a line that a page shows is one that was printed."""
    head, has_tail = shown.partition(TAIL)[:2]
    head, printed = " ".join(head.split()), " ".join(printed.split())
    numbers, found = NUMBER.findall(head), NUMBER.findall(printed)
    words = [" ".join(word.split()) for word in NUMBER.split(head)]
    others = [" ".join(word.split()) for word in NUMBER.split(printed)]
    if has_tail:
        found, others = found[: len(numbers)], others[: len(words)]
        others[-1:] = [others[-1][: len(words[-1])]] if others else []
    if words != others or len(numbers) != len(found):
        return False
    return all(is_near(a, b, is_about) for a, b in zip(numbers, found, strict=True))


def is_near(shown, printed, is_about):
    shown, printed = shown.replace(",", ""), printed.replace(",", "")
    if shown == printed:
        return True
    digits, _, power = shown.partition("e")
    if "." not in digits and not power:
        return False
    unit = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
    room = max(1.01 * unit, 0.1 * abs(float(shown)) if is_about else 0.0)
    return abs(float(shown) - float(printed)) <= room


def missing(output, printed, is_about=False):
    """The first line of a page's output that was not printed after the ones before; or None."""
    left = iter(printed.splitlines())
    for line in output.splitlines():
        if line.strip() in ("", TAIL):
            continue
        if not any(is_same(line, other, is_about) for other in left):
            return line
    return None


def changes(edit):
    """Of each file that a diff names after `---`: its path, the lines as they are and as edited."""
    for path, lines in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", edit, re.M | re.S):
        old, new = (
            "".join(f"{line[1:]}\n" for line in lines.splitlines() if line[:1] != sign)
            for sign in "+-"
        )
        yield path, old, new


def run(arguments, folder):
    """What Python prints in a folder, whose minilora it imports."""
    told = {"PYTHONPATH": str(folder), "MINILORA_SMALL": "1", "MPLBACKEND": "Agg"}
    told |= {"PYTHONUTF8": "1", "MINILORA_FIGURES": str(folder / "figures"), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**os.environ, **told}, timeout=600,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
    )  # fmt: skip
    return done.stdout


@pytest.fixture
def copy(tmp_path):
    """The repository, as far as an exercise changes it."""
    shutil.copytree(PACKAGE, tmp_path / "minilora", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "tutorials", "docs/derivations"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.slow
@each_shown
def test_what_a_page_shows_is_what_is_printed(shown, copy):
    for path, old, new in changes(shown.edit):
        text = (copy / path).read_text(encoding="utf-8")
        (copy / path).write_text(text.replace(old, new), encoding="utf-8", newline="\n")
    if shown.code.startswith(("tests/", "tutorials/", "-m ")):
        printed = run(shlex.split(shown.code), copy)
    else:
        tutorial = re.match(r"# after (tutorials/\S+)", shown.code)
        before = (copy / tutorial[1]).read_text(encoding="utf-8") if tutorial else ""
        (copy / "program.py").write_text(before + "\n" + shown.code, encoding="utf-8")
        printed = run(["program.py"], copy)
    line = missing(shown.output, printed, shown.is_about)
    assert line is None, f"{shown.place} shows {line!r}, but printed was\n{printed}"


@each_shown
def test_the_lines_that_a_shown_edit_changes_are_there_once(shown):
    assert shown.output.strip(), f"{shown.place} shows nothing"
    for path, old, new in changes(shown.edit):
        text = (PACKAGE.parent if path.startswith("minilora/") else ROOT).joinpath(path)
        assert text.read_text(encoding="utf-8").count(old) == 1, f"{path} has not once\n{old}"
        assert old != new


def test_lines_are_compared_by_their_numbers():
    assert is_same("loss 1.23 after 3", "loss  1.236 after 3")
    assert not is_same("loss 1.23 after 3", "loss 1.25 after 3")
    assert is_same("loss 1.23 after 3", "loss 1.25 after 3", is_about=True)
    assert not is_same("loss 1.23 after 3", "loss 1.23 after 4", is_about=True)
    assert is_same("1,024 of 2.1e-05 …", "1,024 of 2.11e-05 and 7")
    assert not is_same("dA[0] is wrong", "dB[0] is wrong")
    assert is_same("FAILED tests/a.py…", "FAILED tests/a.py::test_b - E")
    assert missing("b 1\n…\nc", "a\nb 1\nx\nc\n") is None
    assert missing("c\nb 1", "a\nb 1\nx\nc\n") == "b 1"
