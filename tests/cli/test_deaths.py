"""Killed, refused or out of space at every file operation: nothing is lost, and a rerun works."""

from collections import Counter

import pytest
from helpers import Disk, Killed

from minilora.formats.files import HIDDEN
from minilora.formats.output import LOCK, held

HIDDEN_FILES = ".minilora-*.*"
MODES = ["killed", "refused", "full"]


@pytest.fixture
def commands(base, text, adapter, other_adapter):
    """Each command, its result's files with the configuration last, and how it is run again."""
    models = ["--base", base, "--adapter", adapter]
    small = ["--steps", 2, "--checkpoint-every", 1, "--eval-every", 2, "--eval-tokens", 50]
    tiny = ["--base", base, *small, "--batch", 1, "--context", 8, "--threads", 1]
    return {
        "adapt": (
            ["adapt", text, *tiny, "--rank", 1, "--targets", "o"],
            ["adapter_model.safetensors", "adapter_config.json"],
        ),
        "full": (
            ["adapt", text, *tiny, "--method", "full"],
            ["model.safetensors", "config.json"],
        ),
        "merge": (["merge", *models], ["model.safetensors", "config.json"]),
        "mix": (
            ["mix", *models, "--adapter", other_adapter],
            ["adapter_model.safetensors", "adapter_config.json"],
        ),
    }


def operations_of(cli, monkeypatch, words):
    """What a run that nothing happens to does to the disk, and the bytes of its result."""
    with monkeypatch.context() as patched:
        disk = Disk(patched)
        assert cli(*words).status == 0
    return disk.done


def visible(folder):
    """What a folder holds, but for what is marked as ours and hidden."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    return {name for name in names if name != LOCK and not HIDDEN.fullmatch(name)}


STRIDED = [pytest.param(13, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


@pytest.mark.parametrize("stride", STRIDED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["adapt", "full", "merge", "mix"])
def test_whatever_happens_at_a_file_operation_nothing_is_lost_and_a_rerun_works(
    cli, tmp_path, monkeypatch, commands, name, mode, stride
):
    words, files = commands[name]
    again = ["--resume"] if words[0] == "adapt" else []
    out = ["--out", "whole/out", "--json", "whole.json"]
    (tmp_path / "whole.json").write_bytes(b"old")
    done = operations_of(cli, monkeypatch, [*words, *out])
    whole = {file: (tmp_path / "whole" / "out" / file).read_bytes() for file in files}
    kinds = Counter(step.split()[0] for step in done)
    assert kinds.keys() >= {"open", "write", "flush", "fsync", "replace", "unlink", "mkdir"}
    last = [len(done) - 1, *(i for i, step in enumerate(done) if step.startswith("replace"))]
    for at in sorted({*range(MODES.index(mode), len(done), stride), *last}):
        where = f"{name} {mode} at {at} of {len(done)}: {done[at]}"
        folder = tmp_path / str(at) / "out"
        (tmp_path / "notes.tmp").write_bytes(b"mine")
        (tmp_path / "figures.json").write_bytes(b"old")
        (tmp_path / "figures.json.tmp").write_bytes(b"mine")
        run = [*words, "--out", f"{at}/out", "--json", "figures.json"]
        with monkeypatch.context() as patched:
            disk = Disk(patched, mode, at)
            try:
                result = cli(*run)
            except Killed:
                result = None
        disk.end_of_process()
        assert done[at].split()[0] == disk.done[at].split()[0], where
        assert (result is None) == (mode == "killed"), where

        # Never half: what says that a result is there stands beside the whole of it.
        if files[-1] in visible(folder):
            for file in files:
                assert (folder / file).read_bytes() == whole[file], where
        figures = (tmp_path / "figures.json").read_bytes()
        assert figures == b"old" or figures.endswith(b"}\n"), where
        if result is not None and result.status != 0:
            assert result.status == 2, where
            assert result.lines[-1].startswith("minilora: cannot "), f"{where}: {result.err}"
            assert not [p for p in tmp_path.rglob(HIDDEN_FILES) if "unlink" not in done[at]], where
            if words[0] != "adapt":
                assert not visible(folder), where

        # And a rerun ends as if nothing had happened.
        if result is None or result.status != 0:
            rerun = cli(*run, *again)
            assert rerun.status == 0, f"{where}: {rerun.err}"
            assert visible(folder) == {path.name for path in folder.iterdir()}, where
        with held(folder):  # the next command finds nothing there to remove
            assert visible(folder) >= set(files), where
        for file in files:
            assert (folder / file).read_bytes() == whole[file], where
        assert not {path.name for path in folder.iterdir()} & {"checkpoint.safetensors"}, where
        assert (tmp_path / "notes.tmp").read_bytes() == b"mine", where
        assert (tmp_path / "figures.json.tmp").read_bytes() == b"mine", where
