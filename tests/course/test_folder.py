"""Folders of files: a process for each, whatever it does; Gradescope's format and its zip."""

import ast
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest

from minilora.cli import main
from minilora.course.exercises import EXERCISES
from minilora.course.results import gradescope, write_autograder
from minilora.course.runner import check_folder
from minilora.course.skeleton import imports
from minilora.errors import MiniloraError

PLAIN = runpy.run_path(str(Path(__file__).parent / "plain.py"))["PLAIN"]

TWELVE = list(EXERCISES)[:12]


def solve(folder, *names):
    for name in names:
        source = "\n".join([*imports(EXERCISES[name]), PLAIN[name]])
        (folder / f"{name}.py").write_text(source, encoding="utf-8")


def verdicts(folder, *names, timeout=60.0):
    found = check_folder(folder, [EXERCISES[name] for name in names], timeout=timeout)
    return {verdict.name: verdict for verdict in found}


DEFINES_NONE = "{0}.py defines no function {0}_backward."
SAID = {  # by exercise: what its file does, and what is said of it
    "linear": ("while True: pass", "linear.py was still running after 8 seconds"),
    "affine": (
        "import os; print('{\"score\": 100}'); os._exit(0)",
        "affine.py ended its process (status 0)",
    ),
    "softmax": (
        "import os, signal; os.kill(os.getpid(), signal.SIGABRT)",
        "softmax.py ended its process (signal SIGABRT)",
    ),
    "embedding": (
        "import numpy; numpy.ones(50 * 2**30)",
        "MemoryError: Unable to allocate 400. GiB",
    ),
    "position": (
        "import pathlib, shutil; shutil.rmtree(HERE); shutil.rmtree(pathlib.Path.cwd())",
        DEFINES_NONE,
    ),
    "attend": (
        "import threading; threading.Thread(target=threading.Event().wait).start()",
        DEFINES_NONE,
    ),
    "normalise": (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'while True: pass'])",
        DEFINES_NONE,
    ),
    "layer_norm": ("import sys; sys.stdout.close(); sys.stdin.read(); input()", "EOFError"),
}
ON_LINUX = {"softmax", "embedding", "position"}  # its signals, limit of memory and open folders


def test_whatever_one_file_does_the_others_are_graded(tmp_path):
    said = {k: v for k, v in SAID.items() if sys.platform == "linux" or k not in ON_LINUX}
    solve(tmp_path, "dropout")
    for name, (does, _) in said.items():
        text = does.replace("HERE", repr(str(tmp_path)))
        (tmp_path / f"{name}.py").write_text(f"{text}\n", encoding="utf-8")
    (tmp_path / "head.py").write_bytes(b"\xff\xfe# not UTF-8")
    (tmp_path / "gelu.py").write_bytes(b"\xef\xbb\xbfdef gelu_backward(:\r\n")  # Notepad's
    names = (*said, "gelu", "head", "lora", "dropout")
    found = verdicts(tmp_path, *names, timeout=8.0)
    for name, (_, start) in said.items():
        text = found[name].failure.text()
        assert text.startswith(start.format(name)), text
    assert found["gelu"].failure.text().startswith("gelu.py, line 1: invalid syntax")
    assert "cannot be read as UTF-8" in found["head"].failure.text()
    assert found["lora"].failure.text() == "lora.py is missing."
    assert [found[name].points for name in names] == [0] * (len(names) - 1) + [1]
    if "position" in said:
        assert not tmp_path.exists()  # dropout.py was deleted, and is graded


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows tells no child's time")
def test_twelve_exercises_take_under_ten_seconds_of_two_cores(tmp_path):
    """By the time that the processes compute, whatever else the machine does meanwhile."""
    solve(tmp_path, *TWELVE)
    before = os.times()
    found = verdicts(tmp_path, *TWELVE)
    after = os.times()
    assert all(verdict.failure is None for verdict in found.values())
    user, system = (b - a for a, b in zip(before[2:4], after[2:4], strict=True))
    assert 0 < user + system < 2 * 10.0


def test_gradescope_s_results(tmp_path):
    solve(tmp_path, "dropout", "lora")
    text = (tmp_path / "lora.py").read_text(encoding="utf-8")
    wrong = text.replace("dB = h.T @ dY", "dB = h.T @ dY / s")
    (tmp_path / "lora.py").write_text(wrong, encoding="utf-8")
    results = gradescope(list(verdicts(tmp_path, "dropout", "lora").values()))
    json.dumps(results, allow_nan=False)
    assert "score" not in results  # which would override the tests' own
    names = ["dropout: dx", "lora: dx", "lora: dA", "lora: dB"]
    assert [test["name"] for test in results["tests"]] == names
    assert [test["score"] for test in results["tests"]] == [1, 1, 1, 0]
    assert {test["visibility"] for test in results["tests"]} == {"visible"}
    assert "dB lacks the factor s" in results["tests"][-1]["output"]


def test_the_command(tmp_path, capsys):
    homework = tmp_path / "hw"
    assert main(["course", "new", str(homework), "--only", "lora", "dropout"]) == 0
    assert main(["course", "check", str(homework), "--only", "lora", "dropout"]) == 1
    assert "0 of 4 points" in capsys.readouterr().out
    solve(homework, "lora", "dropout")
    figures = tmp_path / "figures.json"
    only = ["--only", "lora", "dropout", "--json", str(figures)]
    assert main(["course", "check", str(homework), *only]) == 0
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert (found["points"], found["max_points"]) == (4, 4)
    assert set(found["exercises"]) == {"lora", "dropout"}
    assert main(["course"]) == 0
    assert "lora" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["check"], "course check: expected a folder after it"),
        (["check", "nowhere"], "nowhere is not a folder"),
        (["new", "hw", "--only", "lore"], "--only lore: no such exercise"),
        (["check", "hw", "--timeout", "0"], "--timeout 0: expected more than 0 seconds"),
        (["list", "hw"], "course list: expected no path after it"),
    ],
)
def test_a_mistake_in_the_command_is_one_sentence(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["course", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"minilora: {expected}")
    assert not list(tmp_path.iterdir())


# --- the autograder ------------------------------------------------------------------------------


def test_the_zip_is_what_gradescope_takes(tmp_path):
    first, second = tmp_path / "a.zip", tmp_path / "b.zip"
    for path in (first, second):
        write_autograder(path, [EXERCISES["lora"]], timeout=30.0, every=False)
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        for name in ("setup.sh", "run_autograder"):
            assert archive.getinfo(name).external_attr >> 16 & 0o777 == 0o755
            data = archive.read(name)
            assert data.startswith(b"#!") and b"\r" not in data
        assert b"--only lora" in archive.read("run_autograder")
    with pytest.raises(MiniloraError, match="exists already"):
        write_autograder(first, [EXERCISES["lora"]], timeout=30.0, every=False)


on_unix = pytest.mark.skipif(os.name == "nt", reason="Gradescope's scripts are for bash")


@pytest.fixture
def unpacked(tmp_path):
    """A folder like the platform's /autograder, with the zip's files and an empty submission."""
    path, root = tmp_path / "autograder.zip", tmp_path / "autograder"
    chosen = [EXERCISES[name] for name in ("linear", "gelu", "dropout", "lora")]
    write_autograder(path, chosen, timeout=60.0, every=False)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(root / "source")
    (root / "submission").mkdir()
    return root


def results_of(root):
    """The score of each test; NaN and Infinity, which are not JSON, are an error."""
    text = (root / "results" / "results.json").read_text(encoding="utf-8")
    results = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    for test in results["tests"]:
        assert 0 <= test["score"] <= test["max_score"] == 1
        assert test["status"] == ("passed" if test["score"] else "failed")
    assert sum(test["max_score"] for test in results["tests"]) == 8
    return {test["name"]: test["score"] for test in results["tests"]}


@pytest.mark.slow
@on_unix
def test_the_zip_grades_submissions_in_a_fresh_environment(unpacked, tmp_path):
    """Right, half-done and broken; without a network the packages are those of this environment."""
    venv.create(unpacked / "source" / "venv", with_pip=False)
    (site,) = (unpacked / "source" / "venv").glob("lib/python*/site-packages")
    here = [p for p in sys.path if p.endswith("site-packages")]
    (site / "here.pth").write_text("\n".join(here), encoding="utf-8")
    environment = {"PATH": os.environ["PATH"], "AUTOGRADER": str(unpacked)}
    script = ["bash", str(unpacked / "source" / "run_autograder")]

    def grade():
        done = subprocess.run(script, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return results_of(unpacked), done.stdout

    submission = unpacked / "submission"
    solve(submission, "linear", "gelu", "dropout", "lora")
    assert set(grade()[0].values()) == {1}
    (submission / "gelu.py").unlink()
    text = (submission / "lora.py").read_text(encoding="utf-8")
    (submission / "lora.py").write_text(text.replace("dB = h", "dB = s * h"), encoding="utf-8")
    scores, said = grade()
    assert [name for name, score in scores.items() if not score] == ["gelu: dx", "lora: dB"]
    assert grade() == (scores, said), "two runs differ"
    for name in ("linear", "dropout", "lora"):
        (submission / f"{name}.py").write_text("import os; os._exit(0)", encoding="utf-8")
    assert set(grade()[0].values()) == {0}


@pytest.mark.slow
@on_unix
def test_a_grader_that_is_killed_leaves_valid_results(unpacked):
    solve(unpacked / "submission", "linear")
    loop = "while True: pass"
    (unpacked / "submission" / "gelu.py").write_text(loop, encoding="utf-8")
    results = unpacked / "results.json"
    words = ["course", "check", str(unpacked / "submission"), "--gradescope", str(results)]
    command = [sys.executable, "-m", "minilora", *words, "--only", "linear", "gelu"]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], text=True,
                          stdout=subprocess.PIPE, start_new_session=True) as grader:  # fmt: skip
        assert grader.stdout.readline().startswith("right  linear")
        while '"score": 1' not in results.read_text(encoding="utf-8"):
            time.sleep(0.05)
        os.killpg(grader.pid, signal.SIGKILL)
    tests = json.loads(results.read_text(encoding="utf-8"))["tests"]
    assert [test["score"] for test in tests] == [1, 1, 1, 0]
    assert tests[-1]["output"] == "It was not graded: the grader was stopped before."


@on_unix
def test_setup_sh_installs_python_where_an_image_has_none(unpacked):
    """With stand-ins for Python and apt-get that write down how they were called."""
    folder, log = unpacked / "bin", unpacked / "log.txt"
    folder.mkdir()
    scripts = {
        "python3": f'echo "python3 $*" >> {log}; case "$*" in *ensurepip*) exit 1;; esac\n'
        "[ -d venv ] || { mkdir -p venv/bin; cp $0 venv/bin/pip; }",
        "apt-get": f'echo "apt-get $*" >> {log}',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", str(unpacked / "source" / "setup.sh")], env=environment, check=True)
    said = log.read_text(encoding="utf-8").splitlines()
    assert [line for line in said if line.startswith("apt-get")] == [
        "apt-get update -qq", "apt-get install -qq -y python3 python3-venv"]  # fmt: skip
    assert said[-2] == "python3 -m venv venv" and "numpy>=2.0" in said[-1]


ENGINE = ("cases", "check", "diagnosis", "edits", "exercises", "given", "mistakes", "puzzles")


@pytest.mark.parametrize("name", ENGINE)
def test_the_engine_imports_no_process_and_no_thread(name):
    """So that it can run inside a browser."""
    path = Path(__file__).parents[2] / "minilora" / "course" / f"{name}.py"
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    first = {module.split(".")[0] for module in modules}
    assert not first & {"subprocess", "multiprocessing", "threading", "concurrent", "signal"}
    rest = {f"minilora.course.{room}" for room in ("runner", "results", "skeleton")}
    assert not modules & rest


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such limit")
def test_an_endless_loop_ends_even_when_nobody_waits_for_it():
    """As when the command that started it was killed."""
    code = (
        "from minilora.course.runner import limit\nlimit(-9)  # one second in all\nwhile True: pass"
    )
    ended = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert ended.returncode == -signal.SIGXCPU
