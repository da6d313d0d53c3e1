"""An output folder: one process holds it, and the next removes what a killed one left."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
import types
import zlib
from functools import partial
from pathlib import Path

import pytest
from helpers import Disk, Killed, bytes_of

from minilora.errors import MiniloraError
from minilora.formats.files import write_json
from minilora.formats.output import (
    DONE,
    LOCK,
    Hold,
    entries,
    held,
    new_folder,
    steady,
    write_folder,
)

HOLD = """
import sys
from pathlib import Path
from minilora.formats.output import new_folder
with new_folder(Path(sys.argv[1])) as write:
    write({"weights": [b"half"]})
    print("held", flush=True)
    sys.stdin.read()
"""
NEEDS_LINKS = pytest.mark.skipif(os.name != "posix", reason="links of POSIX systems")
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

    def take_late(lock, only_locked):
        if not taken:
            (tmp_path / LOCK).unlink()
        taken.append(lock)
        take(lock, only_locked)

    monkeypatch.setattr(output, "_take", take_late)
    with held(tmp_path) as hold:
        assert len(taken) == 2
        assert os.path.samestat(os.fstat(hold.lock.fileno()), (tmp_path / LOCK).stat())


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
        assert json.loads((tmp_path / LOCK).read_text())[0][0] == "config"
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


@pytest.mark.skipif(os.name != "posix", reason="files of POSIX systems")
def test_a_lock_that_leads_elsewhere_is_not_written_to(tmp_path):
    """A folder that came from somewhere may hold it, and seem to be empty."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to("../mine")
    with pytest.raises(MiniloraError, match="minilora-lock: it is not a plain file"):
        write_folder(tmp_path / "out", parts(NEW))
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / "out" / LOCK).unlink()
    os.mkfifo(tmp_path / "out" / LOCK)
    with pytest.raises(MiniloraError, match="minilora-lock: it is not a plain file"):
        write_folder(tmp_path / "out", parts(NEW))
    assert shown(tmp_path / "out") == {}


def test_a_write_into_a_held_folder_needs_no_lock_of_its_own(tmp_path):
    with held(tmp_path) as hold:
        hold.write({"config": [b"c"]})
        with pytest.raises(MiniloraError, match="another run is writing"), held(tmp_path):
            raise AssertionError("the hold ended with the write")
    assert [path.name for path in tmp_path.iterdir()] == ["config"]


# --- several files -----------------------------------------------------------------------------


def renaming_fails(monkeypatch, at, error):
    """The renaming number `at` fails; a killed process does nothing after it, either."""
    replace, unlink, count = os.replace, Path.unlink, [0]

    def replace_or_fail(source, target):
        count[0] += 1
        if count[0] == at or (count[0] > at and error is Killed):
            raise error
        replace(source, target)

    def unlink_or_fail(path, missing_ok=False):
        if count[0] >= at and error is Killed:
            raise error
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "replace", replace_or_fail)
    monkeypatch.setattr(Path, "unlink", unlink_or_fail)


OLD = {"weights": b"old weights", "other": b"old", "config": b"old config"}
NEW = {"weights": b"new weights", "more": b"new", "config": b"new config"}


@pytest.mark.parametrize("at", range(1, 7))
def test_a_renaming_that_fails_leaves_the_old_files(tmp_path, monkeypatch, at):
    """Two old files are set aside before three are renamed."""
    write_folder(tmp_path, {name: [data] for name, data in OLD.items()})
    with monkeypatch.context() as patched:
        renaming_fails(patched, at, PermissionError(13, "no"))
        if at == 6:
            write_folder(tmp_path, {name: [data] for name, data in NEW.items()})
        else:
            with pytest.raises(MiniloraError, match=rf"cannot write {tmp_path}.(\w+): no"):
                write_folder(tmp_path, {name: [data] for name, data in NEW.items()})
    assert bytes_of(tmp_path) == (OLD | NEW if at == 6 else OLD)


@pytest.mark.parametrize("at", range(1, 6))
def test_killed_amid_the_renamings_nothing_is_lost_and_nothing_is_mixed(tmp_path, monkeypatch, at):
    write_folder(tmp_path, {name: [data] for name, data in OLD.items()})
    with monkeypatch.context() as patched:
        renaming_fails(patched, at, Killed)
        with pytest.raises(Killed):
            write_folder(tmp_path, {name: [data] for name, data in NEW.items()})
    found = bytes_of(tmp_path)
    assert set(found.values()) >= set(OLD.values()) | set(NEW.values())
    if "config" in found:
        assert {name: found[name] for name in OLD} == OLD
    write_folder(tmp_path, {name: [data] for name, data in NEW.items()})
    assert bytes_of(tmp_path).items() >= NEW.items()


def parts(contents):
    return {name: [data] for name, data in contents.items()}


def stopped_at(monkeypatch, mode, at, write):
    """Write on a disk where something happens at an operation; whether the write was stopped."""
    with monkeypatch.context() as patched:
        disk = Disk(patched, mode, at)
        try:
            write()
        except (Killed, MiniloraError):
            return True
        finally:
            disk.end_of_process()
    return len(disk.done) > at  # what was refused may change nothing


def shown(folder):
    """What a folder shows, but for what is hidden, as a reader finds it."""
    with steady(folder, "config"):
        names = [path for path in folder.rglob("*") if not path.name.startswith(".")]
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in names if p.is_file()}


BEFORE, AFTER = OLD | {"sub/a": b"old a"}, NEW | {"sub/b": b"new b", "other": b"old"}


STOPPED = [
    pytest.param("killed", "read", True, marks=NEEDS_LINKS),
    ("killed", "write", False),
    ("refused", "read", False),
    ("full", "write", False),
]


@pytest.mark.parametrize(("mode", "then", "linked"), STOPPED)
def test_stopped_at_any_operation_the_next_reader_or_writer_finds_all_or_nothing(
    tmp_path, monkeypatch, mode, then, linked
):
    """Also where one of the files is a link that leads to another name in the folder."""
    at = 0
    while True:
        folder = tmp_path / str(at)
        write_folder(folder, parts(BEFORE))
        if linked:
            (folder / "weights").rename(folder / "real")
            (folder / "weights").symlink_to("real")
        before, after = shown(folder), shown(folder) | AFTER | {"sub/a": b"old a"}
        after |= {"real": AFTER["weights"]} if linked else {}
        if not stopped_at(monkeypatch, mode, at, partial(write_folder, folder, parts(AFTER))):
            break
        if then == "read":
            assert shown(folder) in (before, after), at
        else:
            write_folder(folder, {"third": [b"3"]})
            assert shown(folder) in (before | {"third": b"3"}, after | {"third": b"3"}), at
        write_folder(folder, parts(AFTER))
        assert {p.name for p in folder.iterdir()} <= {*after, "sub", "third"}, at
        assert shown(folder).items() >= after.items(), at
        at += 1
    assert at > 30
    assert shown(folder) == after


def half_written(folder, monkeypatch):
    """A folder whose writer was killed with the old files aside and one of the new in place."""
    write_folder(folder, parts(OLD))
    with monkeypatch.context() as patched:
        renaming_fails(patched, 4, Killed)
        with pytest.raises(Killed):
            write_folder(folder, parts(NEW))
    assert "config" not in bytes_of(folder)


def test_killed_while_it_undoes_the_rest_is_undone_later(tmp_path, monkeypatch):
    half_written(tmp_path, monkeypatch)
    for at in range(12):
        if not stopped_at(monkeypatch, "killed", at, lambda: shown(tmp_path)):
            break
    assert 3 < at < 11
    assert shown(tmp_path) == OLD


def test_the_same_files_again_on_a_full_disk_are_not_lost(tmp_path, monkeypatch):
    """The old and the new are equal, and so are their checksums."""
    write_folder(tmp_path, parts(OLD))
    for at in range(3, 20):
        with monkeypatch.context() as patched, contextlib.suppress(MiniloraError):
            Disk(patched, "full", at)
            write_folder(tmp_path, parts(OLD))
        assert shown(tmp_path) == OLD, at


def test_a_disk_that_fails_where_the_new_files_are_to_stay_has_the_old_ones(tmp_path, monkeypatch):
    """Even if what marks them as done came down to the disk, and the process is killed then."""
    write_folder(tmp_path, parts(OLD))
    append = Hold._append

    def fail(hold, data):
        append(hold, data)
        if data == DONE:
            renaming_fails(monkeypatch, 1, Killed)
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Hold, "_append", fail)
        write_folder(tmp_path, parts(NEW))
    monkeypatch.undo()
    assert shown(tmp_path) == OLD


def test_what_somebody_put_into_a_half_written_folder_stays(tmp_path, monkeypatch):
    half_written(tmp_path, monkeypatch)
    (tmp_path / "config").write_bytes(b"from a backup")
    assert shown(tmp_path) == OLD | {"config": b"from a backup"}
    assert {path.name for path in tmp_path.iterdir()} == set(OLD)


def test_a_reader_leaves_what_it_need_not_undo(tmp_path, monkeypatch):
    """A new folder whose writer was killed after the renamings, and which somebody has changed."""
    with pytest.raises(Killed), new_folder(tmp_path) as write:
        write(parts(NEW))
        renaming_fails(monkeypatch, 0, Killed)
        raise Killed
    monkeypatch.undo()
    (tmp_path / "config").write_bytes(b"changed")
    assert shown(tmp_path) == NEW | {"config": b"changed"}
    with held(tmp_path):
        pass
    assert shown(tmp_path) == {"config": b"changed"}


def test_a_reader_leaves_the_work_of_a_living_writer(tmp_path):
    write_folder(tmp_path, parts(OLD))
    with held(tmp_path) as hold, hold.replaced(parts(NEW)):
        (tmp_path / "more").unlink()
        assert shown(tmp_path)["weights"] == NEW["weights"]


def test_a_file_that_goes_while_it_is_compared_is_not_the_new_one(tmp_path, monkeypatch):
    write_folder(tmp_path, parts(OLD))
    with held(tmp_path) as hold, hold.replaced(parts(NEW)), monkeypatch.context() as patched:

        def gone(path):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

        patched.setattr("minilora.formats.output.file_checksum", gone)
        assert shown(tmp_path)["weights"] == NEW["weights"]


def test_a_reader_undoes_nothing_where_the_system_knows_no_locks(tmp_path, monkeypatch):
    half_written(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    assert "config" not in shown(tmp_path)
    write_folder(tmp_path, {})
    assert shown(tmp_path) == OLD


@NEEDS_LINKS
def test_a_reader_undoes_nothing_outside_of_its_folder(tmp_path, monkeypatch):
    """A folder from elsewhere may hold any note and any link."""
    (tmp_path / "outside").write_bytes(b"mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config").symlink_to("../outside")
    aside = LEFT.replace("tmp", "old")
    (folder / aside).write_bytes(b"old")
    notes = [["config", None, zlib.crc32(b"mine")], ["weights", aside, 0]]
    (folder / LOCK).write_text(json.dumps(notes))
    with pytest.raises(MiniloraError, match="left half-written .*config is a link"):
        shown(folder)
    assert (tmp_path / "outside").read_bytes() == b"mine"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX systems")
def test_a_half_written_folder_that_nobody_may_change_is_not_read(tmp_path, monkeypatch):
    half_written(tmp_path, monkeypatch)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(MiniloraError, match="left half-written .*cannot write .*Permission denied"):
        shown(tmp_path)


def test_a_folder_that_is_written_while_it_is_read_is_said(tmp_path):
    write_folder(tmp_path, parts(OLD))
    said = pytest.raises(MiniloraError, match="was written to while it was read")
    with said, steady(tmp_path, "config"):
        write_folder(tmp_path, parts(NEW))


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "", ".", "a\0"])
def test_a_note_of_no_file_of_the_folder_counts_for_nothing(tmp_path, name):
    (tmp_path / LOCK).write_text(json.dumps([[name, None, 1], ["gone", None, 1]]))
    assert shown(tmp_path) == {}
    assert (tmp_path / LOCK).exists()  # nothing was to be undone


def test_temporary_files_of_an_hour_ago_go_with_the_next_write_there(tmp_path):
    """A killed process left them; a living one has its own for less than a moment."""
    for name, age in {LEFT: 7200, LEFT.replace("0", "1"): 60, ".minilora-notes.tmp": 7200}.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_json(tmp_path / "figures.json", {})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {LEFT.replace("0", "1"), ".minilora-notes.tmp", "figures.json"}


def test_a_part_that_cannot_be_written_leaves_every_file_as_it_was(tmp_path):
    write_folder(tmp_path, {name: [data] for name, data in OLD.items()})
    with pytest.raises(TypeError):
        write_folder(tmp_path, {"weights": [b"new"], "config": [b"new", 3.0]})
    assert bytes_of(tmp_path) == OLD
