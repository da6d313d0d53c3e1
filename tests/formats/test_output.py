"""An output folder: one process holds it, and the next removes what a killed one left."""

import errno
import json
import os
import subprocess
import sys
import types

import pytest

from minilora.errors import MiniloraError
from minilora.formats.files import write_folder
from minilora.formats.output import LOCK, entries, held, new_folder

HOLD = """
import sys
from pathlib import Path
from minilora.formats.output import new_folder
with new_folder(Path(sys.argv[1])) as write:
    write({"weights": [b"half"]})
    print("held", flush=True)
    sys.stdin.read()
"""
LEFT = ".minilora-0123456789abcdef.tmp"


@pytest.fixture
def other_process(tmp_path):
    """Another process that holds the folder `out` and has written `weights` there."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"held"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_changes_nothing(tmp_path, other_process):
    folder = tmp_path / "out"
    with pytest.raises(MiniloraError, match=f"another run is writing to {folder}"), held(folder):
        raise AssertionError("two hold the folder")
    other_process.stdin.close()
    assert other_process.wait(timeout=60) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["weights"]


def test_a_killed_process_holds_nothing_and_its_half_goes(tmp_path, other_process):
    other_process.kill()
    other_process.wait(timeout=60)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {LOCK, "weights"}
    with held(tmp_path / "out"):
        assert entries(tmp_path / "out") == []


def test_a_second_in_the_same_process_is_refused(tmp_path):
    refused = pytest.raises(MiniloraError, match="another run is writing")
    with held(tmp_path), refused, held(tmp_path):
        raise AssertionError("two hold the folder")
    with held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_made_goes_if_nothing_came_of_it(tmp_path):
    folder = tmp_path / "a" / "b" / "c"
    with pytest.raises(RuntimeError), held(folder):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), held(folder):
        (folder / "checkpoint").touch()
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["checkpoint"]
    with held(folder):
        pass
    assert folder.exists()


def test_what_fails_takes_back_what_it_wrote(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(RuntimeError), new_folder(folder) as write:
        write({"weights": [b"w"], "config": [b"c"]})
        raise RuntimeError
    assert not folder.exists()


def test_only_ours_is_removed(tmp_path):
    """A lock's file that names others, or is damaged, removes nothing else."""
    (tmp_path / "mine.txt").write_text("mine")
    folder = tmp_path / "out"
    for noted in ("", "{", "[1, null]", '{"a": 1}', "[" * 100_000, '["../mine.txt", "", "."]'):
        folder.mkdir(exist_ok=True)
        (folder / "user.tmp").write_text("mine")
        (folder / ".minilora-notes.tmp").write_text("mine")
        (folder / LEFT).write_text("ours")
        (folder / LOCK).write_text(noted)
        with held(folder):
            pass
        names = {path.name for path in folder.iterdir()}
        assert names == {"user.tmp", ".minilora-notes.tmp"}, noted
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_files_of_the_desktop_do_not_make_a_folder_full(tmp_path):
    (tmp_path / ".DS_Store").touch()
    with new_folder(tmp_path) as write:
        write({"config": [b"c"]})
    assert entries(tmp_path) == ["config"]
    with pytest.raises(MiniloraError, match="already holds config"), new_folder(tmp_path):
        pass


def test_the_lock_of_an_owner_that_just_left_is_taken_anew(tmp_path, monkeypatch):
    """It removes its file between our opening and our locking: the lock must be on a new one."""
    from minilora.formats import output

    take, taken = output._take, []

    def take_late(lock):
        if not taken:
            (tmp_path / LOCK).unlink()
        taken.append(lock)
        take(lock)

    monkeypatch.setattr(output, "_take", take_late)
    with held(tmp_path) as lock:
        assert len(taken) == 2
        assert os.path.samestat(os.fstat(lock.fileno()), (tmp_path / LOCK).stat())


@pytest.mark.skipif(os.name != "posix", reason="fcntl of POSIX systems")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_drive_without_locks_can_be_written_to(tmp_path, monkeypatch, number):
    import fcntl

    def refuse(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with new_folder(tmp_path) as write:
        write({"config": [b"c"]})
    assert entries(tmp_path) == ["config"]


def test_a_system_without_locks_can_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as in WebAssembly
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    with new_folder(tmp_path) as write:
        write({"config": [b"c"]})
    assert [path.name for path in tmp_path.iterdir()] == ["config"]


def test_windows_locks_a_byte_that_nobody_reads(tmp_path, monkeypatch):
    """With a stand-in for its module: what is called, and what a refusal says."""
    calls = []

    def locking(descriptor, mode, count):
        calls.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, count))
        if len(calls) > 1:
            raise PermissionError(errno.EACCES, "Permission denied")

    msvcrt = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    monkeypatch.setattr("minilora.formats.output.sys", types.SimpleNamespace(platform="win32"))
    with new_folder(tmp_path) as write:
        write({"config": [b"c"]})
        assert json.loads((tmp_path / LOCK).read_text()) == ["config"]
        with pytest.raises(MiniloraError, match="another run is writing"), held(tmp_path):
            pass
    assert calls == [(1 << 30, 2, 1)] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["config"]


def test_a_file_where_the_lock_or_the_folder_should_be_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MiniloraError, match="file is a file"), held(tmp_path / "file"):
        pass
    (tmp_path / "out" / LOCK).mkdir(parents=True)
    with pytest.raises(MiniloraError, match="cannot write .*minilora-lock"), held(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / LOCK).is_dir()


def test_a_write_into_a_held_folder_needs_no_lock_of_its_own(tmp_path):
    with held(tmp_path):
        write_folder(tmp_path, {"config": [b"c"]})
    assert [path.name for path in tmp_path.iterdir()] == ["config"]
