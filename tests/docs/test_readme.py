"""README: what it quotes is the code, what it counts is there, and its program runs."""

import inspect
import re
from pathlib import Path

import numpy as np

import minilora
from minilora import gradcheck, lora

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUOTED, CHECK, PROGRAM = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)


def test_the_quoted_function_is_the_whole_of_it():
    assert inspect.getsource(lora.lora_backward) == QUOTED


def test_the_files_for_one_sitting_have_as_many_lines_as_it_says():
    names, lines = re.search(
        r"written in this way\. (.*?), some ([\d,]+)\s+lines.*one sitting", README, re.S
    ).groups()
    paths = [ROOT / "minilora" / f"{name}.py" for name in re.findall(r"`(\w+)`", names)]
    assert len(paths) == 6
    counted = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    assert abs(counted - int(lines.replace(",", ""))) <= 50, counted


def test_the_comparison_prints_what_it_shows(capsys):
    exec(CHECK, {})
    (shown,) = re.findall(r"^```\n(dA\[0,0\].*?)^```", README, re.M | re.S)
    assert capsys.readouterr().out == shown


def test_every_link_to_a_file_leads_to_one():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    for link in (link for link in links if not link.startswith("http")):
        assert (ROOT / link).exists(), link


def test_the_tolerances_are_those_of_the_checker():
    pair, model = re.search(
        r"should a pair exceed (\S+) or a model (\S+)\.$", README, re.M
    ).groups()
    assert (float(pair), float(model)) == (gradcheck.PAIR_TOLERANCE, gradcheck.TOLERANCE)


def test_its_program_runs(tmp_path, monkeypatch, capsys):
    """For two steps and on one window of held-out text."""
    monkeypatch.chdir(tmp_path)
    assert "steps=120," in PROGRAM
    names = {}
    exec(PROGRAM.replace("steps=120,", "steps=2, eval_tokens=128,"), names)
    assert len(capsys.readouterr().out.splitlines()) > 1
    adapted, config = minilora.load_adapter("my-adapter", names["model"].config)
    assert config.rank == 2 and adapted["blocks"]

    called = re.search(r"`(minilora\.loss_and_grads\(.*?)`", README)[1]
    tokens = np.arange(8)[None]
    options = {**names, "tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    _, dbase, dlora = eval(called.replace("…", "{}").format("tokens", "targets"), options)
    assert dbase is None and dlora["blocks"]
    plans = re.findall(r"`(?:plan=minilora\.)?(Plan\(.*?\))`", README)
    assert len(plans) == 2
    for written in plans:
        options["plan"] = eval(written, {"Plan": minilora.Plan})
        arguments = {name: options[name] for name in ("tokens", "targets", "plan")}
        _, dbase, dlora = minilora.loss_and_grads(names["adapted"], **arguments)
        assert (dbase is not None, dlora is not None) == (True, "lora" in written)
