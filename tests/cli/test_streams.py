"""Closed, broken and missing streams: the work is done, and the exit status says whether it was."""

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

from minilora.cli import main

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the shell is POSIX's")
ADAPTER = "adapter/adapter_model.safetensors"


def shell(line, *words, cwd):
    """The exit status of a shell's line in which `$M` is a command of minilora."""
    command = shlex.join([sys.executable, "-m", "minilora", *map(str, words)])
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; M() {{ {command} \"$@\"; }}; {line}"],
        cwd=cwd, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "Traceback" not in result.stderr + result.stdout, result.stderr
    assert "Exception ignored" not in result.stderr, result.stderr
    return result.returncode


@pytest.mark.parametrize("line", ["M 2>&1 | head -1", "M >&-", "M 2>&-", "M <&-", "M >&- 2>&- <&-"])
def test_training_goes_on_to_its_end_whoever_listens(quick, tmp_path, line):
    assert shell(line, *quick, "--checkpoint-every", 1, cwd=tmp_path) == 0
    assert (tmp_path / ADAPTER).is_file()
    assert not (tmp_path / "adapter" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("line", ["M | head -c 1", "M >&-"])
def test_figures_that_nobody_read_are_no_success(base, text, tmp_path, line):
    """A reader that takes one byte may have it before the rest is written, or not."""
    words = ("generate", "--base", base, "--tokens", 3000, "--temperature", 0)
    assert shell(line, *words, cwd=tmp_path) == 141
    assert shell(line, *words, "--json", "x.json", cwd=tmp_path) == 0
    found = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert len(found["token_ids"]) == 3000


def test_a_full_disk_behind_the_output_is_told(base, text, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    assert shell("M > /dev/full", "evaluate", text, "--base", base, cwd=tmp_path) == 2


def test_gradcheck_checks_all_whoever_reads(tmp_path, monkeypatch):
    """A reader that goes after the first line: every row is computed, and it is no success."""
    checked = []

    def rows(*, seed, device):
        from minilora.pairs import Row

        for name in ("linear", "gelu"):
            checked.append(name)
            yield Row(name, 0.0, 1, 0.0)

    monkeypatch.setattr("minilora.pairs.table", rows)

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    with contextlib.redirect_stdout(Gone()):
        assert main(["gradcheck"]) == 141
    assert checked == ["linear", "gelu"]


def test_a_windowed_program_has_no_streams(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main([*map(str, quick)]) == 0
    assert (tmp_path / ADAPTER).is_file()
    assert main(["evaluate", "-"]) == 2  # an empty standard input
    assert sys.stdout is None


def test_a_handler_that_python_cannot_name_is_left_alone(quick, cli, monkeypatch):
    """A program that set it from C: Python's getsignal answers None."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("the handler was replaced"))
    assert cli(*quick).status == 0


# --- --json and --plot -------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_an_output_does_not_replace_an_input(refused, quick, base, tmp_path, option):
    (tmp_path / "data.png").write_bytes(quick[1].read_bytes())
    (tmp_path / "link.png").symlink_to("data.png")
    words = [quick[0], "data.png", *quick[2:], option]
    refused(f"{option} data.png would replace what is read from data.png", *words, "data.png")
    refused(f"{option} link.png would replace", *words, "link.png")
    refused(f"{option} .* would replace what is read from .*base", *words, base / "config.json")


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_an_output_is_not_among_the_data_of_the_next_run(refused, cli, quick, tmp_path, option):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "a.txt").write_bytes(quick[1].read_bytes())
    words = [quick[0], "data", *quick[2:], option]
    refused(f"{option} data/x.svg would be read from data the next", *words, "data/x.svg")
    refused("would be read from data the next time", *words, "data/sub/new.png")
    refused("would be read from data", "evaluate", "data", "--json", "data/new.json")


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_an_output_is_not_among_the_results(refused, quick, tmp_path, option):
    (tmp_path / "out").mkdir()
    words = (*quick, "--out", "out", option)
    refused(f"{option} out/x.png is in the folder of --out", *words, "out/x.png")
    refused(f"{option} out.* expected a file name", *words, "out")


def test_two_outputs_are_two_files(refused, quick, tmp_path):
    (tmp_path / "link.png").symlink_to("x.png")
    refused("--plot x.png is also the file of --json", *quick, "--json", "x.png", "--plot", "x.png")
    words = (*quick, "--json", "link.png", "--plot", "x.png")
    refused("--plot x.png is also the file of --json", *words)


def test_a_link_stays_and_its_file_is_written(cli, base, text, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "x.json").symlink_to("figures/real.json")
    assert cli("evaluate", text, "--base", base, "--json", "x.json").status == 0
    assert (tmp_path / "x.json").is_symlink()
    assert json.loads((tmp_path / "figures" / "real.json").read_text(encoding="utf-8"))["loss"]


def test_a_name_that_no_file_can_have_is_said(refused, base, text):
    refused(
        "--json a\\\\x00b: expected a file name", "evaluate", text, "--base", base, "--json", "a\0b"
    )


@pytest.mark.parametrize("line", ["M --json /dev/stdout > log", "M --json /dev/null"])
def test_a_device_is_not_replaced(base, text, tmp_path, line):
    if not os.path.exists("/dev/stdout"):
        pytest.skip("no /dev/stdout")
    assert shell(line, "evaluate", text, "--base", base, cwd=tmp_path) == 2
    assert os.path.islink("/dev/stdout")


def test_data_named_in_no_encoding_can_be_plotted(cli, quick, tmp_path):
    pytest.importorskip("matplotlib")
    name = os.fsdecode(b"caf\xe9.txt")
    try:
        (tmp_path / name).write_bytes(quick[1].read_bytes())
    except OSError:
        pytest.skip("this file system refuses the name")
    assert cli(quick[0], name, *quick[2:], "--plot", "x.png").status == 0
