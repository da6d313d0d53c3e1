"""Killed, refused or out of space at every file operation: nothing is lost, and a rerun works."""

import errno
import os
from collections import Counter
from pathlib import Path

import pytest
from helpers import Killed

from minilora.formats.files import TEMPORARY
from minilora.formats.output import LOCK, held

NEEDS_SPACE = {"open", "write", "flush", "truncate", "fsync", "mkdir"}
TEMPORARIES = ".minilora-*.tmp"
MODES = ["killed", "refused", "full"]


class Disk:
    """Every change that the program makes to the disk, counted; at one of them something happens.

    `killed`: the process ends there, so that nothing later happens either. `refused`: this one
    operation fails. `full`: from there on, all that needs space fails.
    """

    def __init__(self, monkeypatch, mode="", at=-1):
        self.mode, self.at = mode, at
        self.done, self.files = [], []
        for name in ("mkdir", "rmdir", "unlink", "chmod"):
            monkeypatch.setattr(Path, name, self.counted(name, getattr(Path, name)))
        for name in ("replace", "fsync"):
            monkeypatch.setattr(os, name, self.counted(name, getattr(os, name)))
        opened = Path.open

        def open_counted(path, mode="r", *args, **options):
            if not set(mode) & set("wax+"):
                return opened(path, mode, *args, **options)
            self.step("open", path)
            self.files.append(CountedFile(self, opened(path, mode, *args, **options)))
            return self.files[-1]

        monkeypatch.setattr(Path, "open", open_counted)

    def counted(self, name, operation):
        def run(subject, *args, **options):
            self.step(name, subject)
            return operation(subject, *args, **options)

        return run

    def step(self, name, subject):
        index = len(self.done)
        self.done.append(f"{name} {getattr(subject, 'name', subject)}")
        if self.mode == "killed" and index >= self.at:
            raise Killed
        here = index == self.at and self.mode in ("refused", "full")
        if here or (self.mode == "full" and index > self.at >= 0 and name in NEEDS_SPACE):
            raise OSError(errno.ENOSPC, "No space left on device")

    def end_of_process(self):
        for file in self.files:
            file.file.close()


class CountedFile:
    """A file that is open for writing; a write at which something happens is done by half."""

    def __init__(self, disk, file):
        self.disk, self.file = disk, file

    def write(self, data):
        try:
            self.disk.step("write", self.file)
        except BaseException:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            raise
        return self.file.write(data)

    def flush(self):
        self.disk.step("flush", self.file)
        self.file.flush()

    def truncate(self, size):
        self.disk.step("truncate", self.file)
        return self.file.truncate(size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


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
    """What a folder holds, but for what is marked as ours and temporary."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    return {name for name in names if name != LOCK and not TEMPORARY.fullmatch(name)}


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
    refused_again = 0
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
            assert not [p for p in tmp_path.rglob(TEMPORARIES) if "unlink" not in done[at]], where
            if words[0] != "adapt":
                assert not visible(folder), where

        # And a rerun ends as if nothing had happened.
        if result is None or result.status != 0:
            rerun = cli(*run, *again)
            if rerun.status == 0:
                assert visible(folder) == {path.name for path in folder.iterdir()}, where
            else:  # all was there, but for the removal of the lock's empty file
                refused_again += 1
                assert "already holds" in rerun.err, f"{where}: {rerun.err}"
                assert done[at].startswith("unlink") and at >= len(done) - 1, where
        with held(folder):  # the next command finds nothing there to remove
            assert visible(folder) >= set(files), where
        for file in files:
            assert (folder / file).read_bytes() == whole[file], where
        assert not {path.name for path in folder.iterdir()} & {"checkpoint.safetensors"}, where
        assert (tmp_path / "notes.tmp").read_bytes() == b"mine", where
        assert (tmp_path / "figures.json.tmp").read_bytes() == b"mine", where
    assert refused_again <= (again == [] and mode == "killed")
