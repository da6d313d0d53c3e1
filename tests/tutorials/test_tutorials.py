"""Every tutorial runs as a student would run it; it ends in assertions of what it claims."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import minilora
from minilora.figures import show

ROOT = Path(__file__).parents[2]
PACKAGE = Path(minilora.__path__[0])
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))
each_tutorial = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


def test_there_are_tutorials():
    assert TUTORIALS


@each_tutorial
def test_a_tutorial_runs_without_a_warning_and_saves_its_figures(path, tmp_path):
    """In small, where it has a smaller size; `.ci/run` runs each in full."""
    text = path.read_text(encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(PACKAGE.parent),
            "PYTHONUTF8": "1",
            "MINILORA_SMALL": "1",
            "MINILORA_FIGURES": "",  # that is, ./figures
            "MPLBACKEND": "Agg",
        },
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert run.returncode == 0, f"{path.name} fails:\n{run.stdout}\n{run.stderr}"
    assert run.stdout, f"{path.name} prints nothing"
    assert "assert " in text, f"{path.name} asserts nothing"

    printed = dict(re.findall(r"^\[(.*\.png)\] (.*)$", run.stdout, re.M))
    assert len(printed) == text.count("plt.subplots("), f"{path.name} draws more than it shows"
    for number, (name, title) in enumerate(printed.items(), start=1):
        assert Path(name) == Path("figures", f"{path.stem}-{number}.png")
        with Image.open(tmp_path / name) as picture:
            assert picture.text["Title"] == title
            assert len(picture.convert("L").getcolors()) > 10, f"{name} is blank"
    left = [found for found in tmp_path.rglob("*") if found.is_file()]
    assert len(left) == len(printed), f"{path.name} leaves other files behind: {left}"


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
def test_the_titles_of_a_tutorial_s_figures_can_be_printed_on_any_terminal(path):
    titles = re.findall(r'^show\(\w+, f?"(.*)"\)$', path.read_text(encoding="utf-8"), re.M)
    assert titles and all(title.isascii() for title in titles), titles


@each_tutorial
def test_every_prediction_has_three_options_and_a_collapsed_answer(path):
    """One of the options, which the answer repeats, and why."""
    cells = path.read_text(encoding="utf-8").replace("\n# ", "\n").replace("\n#\n", "\n\n")
    questions = re.findall(r"^\*\*Predict\.\*\*(.*?)^</details>", cells, re.M | re.S)
    assert len(questions) == cells.count("**Predict.**") >= 2
    for question in questions:
        asked, _, answer = question.partition("\n\n<details><summary>Answer</summary>\n\n")
        assert asked.count("?") == 1, asked
        assert re.findall(r"\(([abc])\)", asked) == ["a", "b", "c"], asked
        assert re.match(r"\([abc]\) \S", answer), f"no option is the answer to {asked}"
        assert len(answer.split()) > 10, f"{answer} does not say why"


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """A figure as pyplot numbers them, in a program called lesson.py, and a folder for it."""
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(sys, "argv", ["lesson.py"])
    monkeypatch.setenv("MINILORA_FIGURES", str(tmp_path / "made" / "for it"))
    yield plt.figure(7)
    plt.close(7)


def test_a_program_saves_its_figure_and_prints_where(figure, tmp_path, capsys):
    show(figure, "A conclusion")
    path = tmp_path / "made" / "for it" / "lesson-7.png"
    assert path.exists() and capsys.readouterr().out == f"[{path}] A conclusion\n"
    assert figure.get_suptitle() == "A conclusion"


def test_a_notebook_shows_its_figure_and_saves_nothing(figure, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    show(figure, "A conclusion")
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""
    assert figure.get_suptitle() == "A conclusion"


def test_a_figure_that_cannot_be_saved_says_where(figure, tmp_path):
    (tmp_path / "made").write_text("no folder", encoding="utf-8")
    with pytest.raises(minilora.MiniloraError, match=r"lesson-7\.png .*MINILORA_FIGURES"):
        show(figure, "A conclusion")
