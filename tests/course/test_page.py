"""The page for students shows what is really printed."""

import json
import re
from pathlib import Path

from minilora.cli import main
from minilora.course.exercises import EXERCISES
from minilora.course.puzzles import ALL, PUZZLES
from minilora.course.skeleton import skeleton

PAGE = (Path(__file__).parents[2] / "docs" / "course.md").read_text(encoding="utf-8")


def test_the_page_counts_exercises_puzzles_and_points():
    points = sum(len(exercise.gradients()) for exercise in ALL.values())
    text = " ".join(PAGE.split())
    assert f"{len(EXERCISES)} exercises" in text and f"{len(PUZZLES)} puzzles" in text
    assert f"worth {points} points" in text


def test_the_page_shows_a_skeleton():
    assert f"```python\n{skeleton(EXERCISES['lora'])}```" in PAGE


def test_the_page_shows_a_failure(tmp_path, capsys):
    body = """\
    dB = scale * h.T @ rows(dy) if h is not None else None
    dxA = scale * rows(dy) @ B.T
    dA = None if x is None else rows(x).T @ dxA
    dx = None if A is None else (dxA @ A.T).reshape(*dy.shape[:-1], len(A))
    return dx, dA, dB
"""
    empty = '    raise NotImplementedError("Not written yet")\n'
    text = skeleton(EXERCISES["lora"]).replace(empty, body)
    (tmp_path / "lora.py").write_text(text, encoding="utf-8")
    assert main(["course", "check", str(tmp_path), "--only", "lora"]) == 1
    command = "$ minilora course check hw --only lora\n"
    assert f"```console\n{command}{capsys.readouterr().out}```" in PAGE


def test_the_workflow_of_the_page_is_the_command_of_the_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hw").mkdir()
    (words,) = re.findall(r"- run: minilora (course check .*)", PAGE)
    assert main(words.split()) == 1
    assert "numeric_gradient.py is missing." in capsys.readouterr().out
    points = json.loads((tmp_path / "points.json").read_text(encoding="utf-8"))
    assert (points["points"], set(points["exercises"])) == (0, set(ALL))
