"""The command line as a process of its own: killed, interrupted, piped."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
from helpers import adapter_bytes

from minilora import start as start_of_command
from minilora.cli import main
from minilora.formats.card import CARD

STEPS = 40
# The child shares this machine with others: it may be slow, but it must end.
PATIENCE = 300
# Buffered, as output is by default: what a closed pipe refuses may then show at the exit only.
ENVIRONMENT = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}


def start(*words, cwd, code=None, **pipes):
    """Start `python -m minilora` with its output in pipes that hold a page or so."""
    command = [sys.executable, "-m", "minilora"] if code is None else [sys.executable, "-c", code]
    return subprocess.Popen(
        [*command, *map(str, words)],
        cwd=cwd,
        env=ENVIRONMENT | {"PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pipesize=4096,
        **pipes,
    )


def finish(process):
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
def command(base, text):
    """A run of many small steps that saves often."""
    return [
        *("adapt", text, "--base", base, "--steps", STEPS, "--batch", 2, "--context", 8),
        *("--rank", 1, "--targets", "q,down", "--dropout", 0.1, "--warmup", 1, "--threads", 2),
        *("--eval-every", 7, "--eval-tokens", 50, "--log-every", 1, "--checkpoint-every", 3),
    ]


@pytest.fixture
def whole(command, tmp_path, monkeypatch):
    """The files of the run that is never stopped, made in this process."""
    monkeypatch.chdir(tmp_path)
    assert main([*map(str, command), "--out", "whole"]) == 0
    return adapter_bytes(tmp_path / "whole")


def test_killed_at_random_moments_it_ends_in_the_same_bytes(command, whole, tmp_path):
    rng = random.Random(0)
    moments = [0, 1, *(rng.randrange(2, STEPS // 2) for _ in range(2))]  # lines read before
    for lines in moments:
        process = start(*command, "--resume", "--out", "out", cwd=tmp_path)
        for _ in range(lines):
            process.stderr.readline()
        process.kill()
        finish(process)
    status, out, err = finish(start(*command, "--resume", "--out", "out", cwd=tmp_path))
    assert status == 0, err
    assert "saved in out" in out
    assert adapter_bytes(tmp_path / "out") == whole
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [CARD, "adapter_config.json", "adapter_model.safetensors", "training.json"]


KILL_IN_REPLACE = """
import os, sys
replace, count, which = os.replace, 0, int(sys.argv.pop(1))
def kill_or_replace(source, target):
    global count
    count += 1
    if count == which:
        os._exit(9)
    replace(source, target)
os.replace = kill_or_replace
from minilora.cli import main
from minilora.formats.card import CARD
sys.exit(main(sys.argv[1:]))
"""


def test_killed_before_every_kind_of_renaming(command, whole, tmp_path):
    """14 checkpoints, the last at step 40, then the weights, configuration, card, and record."""
    killed = 0
    for which in (1, 2, 14, 15, 16, 17, 18):
        process = start(
            which, *command, "--resume", "--out", str(which), code=KILL_IN_REPLACE, cwd=tmp_path
        )
        killed += finish(process)[0] == 9
        assert main([*map(str, command), "--resume", "--out", str(which)]) == 0
        assert adapter_bytes(tmp_path / str(which)) == whole, f"killed before renaming {which}"
    assert killed == 7
    process = start(19, *command, "--out", "other", code=KILL_IN_REPLACE, cwd=tmp_path)
    assert finish(process)[0] == 0  # there is no 19th


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_ctrl_c_in_a_process(command, tmp_path, monkeypatch):
    """More steps than the pipe holds lines, so that the process is still at work when it comes."""
    monkeypatch.chdir(tmp_path)
    command = [*command, "--steps", 150, "--checkpoint-every", 1000]
    process = start(*command, "--out", "out", cwd=tmp_path)
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert status == 130, err
    assert err.splitlines()[-1].startswith("minilora: stopped at step ")
    assert "Traceback" not in err
    assert out == ""
    assert main([*map(str, command), "--out", "out", "--resume"]) == 0
    assert main([*map(str, command), "--out", "whole"]) == 0
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize("module", ["minilora.start", "numpy.version", "minilora.cli.commands"])
def test_ctrl_c_while_it_is_loaded(base, module, tmp_path):
    """With a list of what is imported, as it is, to know the moment."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "minilora", "evaluate", "-", "--base", base],
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell lets what it starts in the background, such as these tests, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while process.stderr.readline().split()[-1] != module.encode():
        pass
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    lines = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert (status, out, lines) == (130, "", ["minilora: stopped"])


@pytest.mark.parametrize(
    ("words", "original", "expected"),
    [
        (["-m", "x"], ["python", "-m", "minilora", "x"], True),
        (["-m"], ["python", "-W", "error", "-mminilora"], True),
        (["-m", "minilora"], ["python", "-m", "other", "minilora"], False),
        (["/usr/bin/minilora", "x"], ["python", "/usr/bin/minilora", "x"], True),
        (["minilora.py"], ["python", "minilora.py"], False),
        ([""], ["python"], False),
    ],
)
def test_only_the_command_line_is_stopped_so(monkeypatch, words, original, expected):
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert start_of_command.is_command() == expected


def test_once_it_is_loaded_ctrl_c_ends_in_order(base):
    before = signal.signal(signal.SIGINT, start_of_command.stop)
    try:
        assert main(["evaluate", "missing.txt", "--base", str(base)]) == 2
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_reader_that_goes_away_ends_generation_quietly(base, tmp_path):
    process = start("generate", "--base", base, "--tokens", 100000, cwd=tmp_path)
    assert len(process.stdout.read(10)) == 10
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=PATIENCE) == 141


def test_a_reader_that_never_reads_loses_no_figures(base, text, tmp_path):
    process = start("evaluate", text, "--base", base, "--json", "x.json", cwd=tmp_path)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=PATIENCE) == 0
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["tokens"] > 0


def test_the_module_and_the_command_are_one(base, text, tmp_path):
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="minilora") or (None,)
    if script is not None:
        assert script.load() is main
    process = start("evaluate", "-", "--base", base, cwd=tmp_path, stdin=subprocess.PIPE)
    process.stdin.write(text.read_bytes())
    status, out, err = finish(process)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["loss", "bits", "tokens"]


def test_bad_input_in_a_process(base, tmp_path):
    status, out, err = finish(start("evaluate", "missing.txt", "--base", base, cwd=tmp_path))
    assert (status, out) == (2, "")
    assert err.splitlines() == [
        "minilora: cannot read missing.txt (No such file or directory); "
        "expected a file, a folder, `python` or `-`"
    ]


def test_output_that_the_terminal_cannot_show_is_no_error(base, tmp_path):
    code = "import sys; from minilora.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.run(
        [sys.executable, "-c", code, "generate", "--base", str(base), "--prompt", "naïve…"],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        timeout=PATIENCE,
    )
    assert (process.returncode, process.stderr) == (0, b"")
    assert process.stdout.startswith(b"na?ve?")
