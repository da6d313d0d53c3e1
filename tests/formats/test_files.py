"""Writing in one step, and JSON that is not what it should be."""

import os
from pathlib import Path

import numpy as np
import pytest
from helpers import bytes_of

from minilora.errors import MiniloraError
from minilora.formats import files
from minilora.formats.output import write_folder


def test_text_and_json_are_written_as_they_are(tmp_path):
    files.write_text(tmp_path / "a.txt", "é\r\n\n")
    assert (tmp_path / "a.txt").read_bytes() == "é\r\n\n".encode()
    files.write_json(tmp_path / "a.json", {"b": 1, "a": [None, 2.5]})
    assert (tmp_path / "a.json").read_text().startswith('{\n  "a": [\n')
    assert files.read_json(tmp_path / "a.json") == {"a": [None, 2.5], "b": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.txt"]


def test_where_nothing_can_be_written_is_said(tmp_path):
    with pytest.raises(MiniloraError, match=r"cannot write .*missing.x\.json"):
        files.write_json(tmp_path / "missing" / "x.json", {})
    (tmp_path / "file").touch()
    with pytest.raises(MiniloraError, match=r"cannot make the folder .*file"):
        files.make_folder(tmp_path / "file" / "below")
    with pytest.raises(MiniloraError, match=r"cannot write .*nul"):
        files.write_text(tmp_path / "a\0b", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b'{"a": 1}}', "is not JSON"),
        (b"\xff\xfe{}", "is not UTF-8"),
        (b"[1]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", None),  # too long for int() in some versions of Python
    ],
)
def test_json_that_is_none(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    if message is None:
        try:
            assert files.read_json(path)["a"] > 0
        except MiniloraError as error:
            assert "is not JSON" in str(error)
        return
    with pytest.raises(MiniloraError, match=message) as caught:
        files.read_json(path)
    assert str(path) in str(caught.value)


def test_json_that_is_missing(tmp_path):
    with pytest.raises(MiniloraError, match=r"a\.json does not exist"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(MiniloraError, match="is not a file"):
        files.read_json(tmp_path)
    with pytest.raises(MiniloraError, match="nul|does not exist|cannot be read"):
        files.read_json(Path("a\0b"))


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -3], [1.0, True, "1", None, [1]]),
        (float, [1, 2.5, -1], [True, "1", None, float("nan"), float("inf"), 10**400]),
        (bool, [True, False], [0, 1, "true", None]),
        (str, ["", "a"], [1, None, ["a"]]),
    ],
)
def test_fields_are_of_their_kind(kind, good, bad):
    for value in good:
        assert type(files.field({"x": value}, "x", kind, kind(), where="f")) is kind
    assert files.field({}, "x", kind, kind(1), where="f") == kind(1)
    for value in bad:
        with pytest.raises(MiniloraError, match=r"^f\.json: x is .*, expected "):
            files.field({"x": value}, "x", kind, kind(), where="f.json")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX systems")
def test_files_may_be_read_by_whom_the_system_says(tmp_path):
    (tmp_path / "by_hand").write_bytes(b"")
    files.write_bytes(tmp_path / "by_us", b"")
    assert (tmp_path / "by_us").stat().st_mode == (tmp_path / "by_hand").stat().st_mode


def test_json_refuses_what_json_cannot_say(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_numpy_scalars_are_numbers_in_json(tmp_path):
    document = {
        "int": np.int64(3),
        "float": np.float32(0.5),
        "bool": np.True_,
        "list": [np.uint8(1)],
    }
    files.write_json(tmp_path / "x.json", document)
    assert files.read_json(tmp_path / "x.json") == {
        "int": 3,
        "float": 0.5,
        "bool": True,
        "list": [1],
    }
    with pytest.raises(TypeError, match="set is not JSON"):
        files.write_json(tmp_path / "x.json", {"set": {1}})


# --- one file ----------------------------------------------------------------------------------


def test_a_user_s_file_of_any_name_stays(tmp_path):
    (tmp_path / "x.bin.tmp").write_bytes(b"mine")
    files.write_bytes(tmp_path / "x.bin", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "x.bin": b"new",
        "x.bin.tmp": b"mine",
    }


def test_a_name_as_long_as_the_system_allows_is_written(tmp_path):
    path = tmp_path / ("n" * 255)
    files.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX systems")
@pytest.mark.parametrize("target", ["there", "not yet there"])
def test_a_link_stays_and_its_target_is_written(tmp_path, target):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "there").write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere" / target)
    files.write_bytes(link, b"new")
    assert link.is_symlink()
    assert (tmp_path / "elsewhere" / target).read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir() if path.name != "elsewhere"] == ["link"]


@pytest.mark.skipif(os.name != "posix", reason="files of POSIX systems")
def test_what_is_no_plain_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/null")):
        with pytest.raises(MiniloraError, match=rf"cannot write {path}: it is not a plain file"):
            files.write_bytes(path, b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_write_protected_file_is_not_replaced(tmp_path, monkeypatch):
    """The system would allow it, as renaming asks the folder alone; and root may do all."""
    (tmp_path / "x").write_bytes(b"kept")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(MiniloraError, match="cannot write .*x: it is write-protected"):
        files.write_bytes(tmp_path / "x", b"new")
    with pytest.raises(MiniloraError, match="cannot write .*x: it is write-protected"):
        write_folder(tmp_path, {"weights": [b"new"], "x": [b"new"]})
    files.write_bytes(tmp_path / "y", b"new")
    assert bytes_of(tmp_path) == {"x": b"kept", "y": b"new"}


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX systems")
def test_a_replaced_file_keeps_its_permissions(tmp_path):
    (tmp_path / "x").touch()
    (tmp_path / "x").chmod(0o640)
    files.write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
