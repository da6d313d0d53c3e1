"""Folders of text: what is read, what is left out and why, and files that are no text at all."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import write_files

from minilora import texts
from minilora.adapters import LoRAConfig
from minilora.data import load_corpus, load_text
from minilora.errors import MiniloraError
from minilora.gpt2 import GPTConfig
from minilora.model import BUILT_IN, load_model
from minilora.texts import LeftOut, is_json_lines, read_documents, read_folder, summary
from minilora.tokenizer import ByteTokenizer
from minilora.training.loop import TrainConfig
from minilora.training.runs import adapt_in_folder, pretrain_in_folder

BYTES = ByteTokenizer()
RECORDS = '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'


def read(folder):
    """The names of the documents below a folder, and why each other file is left out."""
    documents, left_out = read_folder(folder)
    return [document.name for document in documents], dict(left_out)


def link(path, target, *, is_folder=False):
    try:
        path.symlink_to(target, target_is_directory=is_folder)
    except OSError:
        pytest.skip("links need a privilege here")


# --- encodings ---------------------------------------------------------------------------------

NOT_UTF_8 = {
    "not text": (
        b"\0",
        b"text\0text",
        "text".encode("utf-16-le"),
        b"\x89PNG\r\n\x1a\n\x00\x00",
        b"\x1f\x8b\x08\x01\xff",
        b"\x81 is no character of cp1252 \xe9",
    ),
    "in UTF-16": ("é".encode("utf-16"), b"\xfe\xff" + "é".encode("utf-16-be")),
    "in UTF-32": ("é".encode("utf-32"), b"\0\0\xfe\xff" + "é".encode("utf-32-be")),
    "perhaps in cp1252": ("naïve café".encode("cp1252"), "“é”\t\r\n".encode("cp1252"), b"\xef\xbb"),
}


@pytest.mark.parametrize(
    ("reason", "data"),
    [(reason, data) for reason, all_data in NOT_UTF_8.items() for data in all_data],
)
def test_what_is_not_utf_8_is_named_with_its_encoding_where_that_can_be_told(
    tmp_path, reason, data
):
    write_files(tmp_path, {"good.txt": "good", "sub/bad.txt": data})
    assert read(tmp_path) == (["good.txt"], {"sub/bad.txt": reason})
    with pytest.raises(MiniloraError) as error:
        read_documents(tmp_path / "sub" / "bad.txt")
    assert "bad.txt is not text in UTF-8" in str(error.value)
    assert (f"but {reason}; convert it first" in str(error.value)) == (reason != "not text")


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_has_nothing_to_leave_out(tmp_path, data):
    write_files(tmp_path, {"a.txt": "a", "empty.txt": data})
    assert read(tmp_path) == (["a.txt"], {})


def test_both_ways_of_loading_hand_on_what_was_left_out(tmp_path):
    write_files(
        tmp_path, {"one/a.txt": "some text" * 9, "one/b.bin": b"\0", "two.txt": "more text"}
    )
    sources = [str(tmp_path / "one"), tmp_path / "two.txt"]
    expected = (LeftOut(os.path.join(sources[0], "b.bin"), "not text"),)
    assert load_corpus(sources, BYTES).left_out == expected
    assert load_text(sources, BYTES).left_out == expected


def test_a_folder_with_nothing_but_what_is_left_out_says_so(tmp_path):
    write_files(tmp_path, {"a.bin": b"\0", "b.txt": "é".encode("utf-16")})
    with pytest.raises(MiniloraError, match=r"without text \(left out: 1 not text \(a.bin\); 1 in"):
        read_documents(str(tmp_path))


# --- what no text file is ----------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_among_the_files_is_not_waited_for(tmp_path):
    write_files(tmp_path, {"a.txt": "a"})
    os.mkfifo(tmp_path / "pipe.txt")
    link(tmp_path / "null.txt", "/dev/null")
    regular = "not a regular file"
    assert read(tmp_path) == (["a.txt"], {"pipe.txt": regular, "null.txt": regular})


def test_what_may_not_be_read_is_left_out(tmp_path, monkeypatch):
    """Refused here by the functions that read, since an administrator may read everything."""
    write_files(tmp_path, {"a.txt": "a", "secret.txt": "b", "sub/c.txt": "c"})

    def refusing(function, name):
        def refuse(path):
            if Path(path).name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return function(path)

        return refuse

    monkeypatch.setattr(Path, "read_bytes", refusing(Path.read_bytes, "secret.txt"))
    monkeypatch.setattr(os, "listdir", refusing(os.listdir, "sub"))
    denied = dict.fromkeys(("secret.txt", "sub"), "unreadable: Permission denied")
    assert read(tmp_path) == (["a.txt"], denied)


def test_a_file_that_vanishes_while_the_folder_is_read_is_left_out(tmp_path, monkeypatch):
    write_files(tmp_path, {"a.txt": "a", "b.txt": "b"})
    whole = texts.walk

    def walk(*args):
        yield from whole(*args)
        (tmp_path / "b.txt").unlink()

    monkeypatch.setattr(texts, "walk", walk)
    names, left_out = read(tmp_path)
    assert names == ["a.txt"] and left_out["b.txt"].startswith("unreadable: ")


# --- links -------------------------------------------------------------------------------------


def test_links_are_followed_and_nothing_is_read_twice(tmp_path):
    write_files(tmp_path, {"outside/deep/o.txt": "o", "in/z.txt": "z", "in/sub/y.txt": "y"})
    folder = tmp_path / "in"
    for name in ("a.txt", "zz.txt"):
        link(folder / name, folder / "z.txt")
    link(folder / "out", tmp_path / "outside", is_folder=True)
    link(folder / "sub" / "round", folder, is_folder=True)
    link(folder / "again", folder / "sub", is_folder=True)
    link(folder / "nowhere", folder / "missing")
    names, left_out = read(folder)
    assert names == ["out/deep/o.txt", "sub/y.txt", "z.txt"]
    assert left_out.pop("nowhere").startswith("unreadable: ")
    assert left_out == dict.fromkeys(
        ("a.txt", "again", "sub/round", "zz.txt"), "read under another path"
    )


def test_links_that_lead_to_each_other_end(tmp_path):
    write_files(tmp_path, {"a/a.txt": "a", "b/b.txt": "b"})
    link(tmp_path / "a" / "b", tmp_path / "b", is_folder=True)
    link(tmp_path / "b" / "a", tmp_path / "a", is_folder=True)
    assert read(tmp_path / "a") == (["a.txt", "b/b.txt"], {"b/a": "read under another path"})


# --- what minilora wrote -----------------------------------------------------------------------


def test_no_output_of_a_run_and_no_base_is_read_as_text(tmp_path):
    write_files(tmp_path, {"a.txt": "some text to learn" * 20, "more/b.txt": "more text" * 20})
    corpus = load_corpus(tmp_path, BYTES)
    assert corpus.files == 2 and corpus.left_out == ()
    settings = TrainConfig(steps=1, batch=1, context=8, warmup=0)
    adapt_in_folder(load_model(), corpus, LoRAConfig(rank=1), settings, tmp_path / "adapter")
    config = GPTConfig(256, 16, n_embd=4, n_layer=1, n_head=1)
    pretrain_in_folder(config, corpus, settings, tmp_path / "more" / "base")
    write_files(tmp_path, {"stopped/checkpoint.safetensors": b"\0", "stopped/notes": "of the run"})
    for name in ("README.md", "config.json", "model.safetensors"):
        write_files(tmp_path, {f"copied/{name}": (BUILT_IN / name).read_bytes()})
    write_files(tmp_path, {"copied/additional_chat_templates/a.jinja": "{{ text }}"})
    again = load_corpus(tmp_path, BYTES)
    assert np.array_equal(again.train, corpus.train)
    assert {entry.reason for entry in again.left_out} == {"of a model or a training run"}
    left_out = {Path(entry.name).relative_to(tmp_path).as_posix() for entry in again.left_out}
    assert left_out == {"adapter", "more/base", "stopped", "copied"}


def test_folders_of_text_within_that_of_a_run_are_read(tmp_path):
    write_files(tmp_path, {"training.json": "{}", "figures.txt": "no", "texts/a.txt": "a"})
    assert read(tmp_path) == (["texts/a.txt"], {".": "of a model or a training run"})


def test_a_configuration_alone_is_text(tmp_path):
    write_files(tmp_path, {"config.json": "{}", "tokenizer.json": "{}"})
    assert read(tmp_path) == (["config.json", "tokenizer.json"], {})


# --- JSON Lines --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", RECORDS),
        ("a.JSONL", "not even JSON"),
        ("a.ndjson", "{}\n"),
        ("a.txt", RECORDS),
        ("a", "\n\n" + RECORDS.replace("\n", "\n\n")),
        ("a.json", '{"a": 1}\n{"a": {"b": []}}'),
    ],
)
def test_json_lines_are_not_learned_as_text(tmp_path, name, text):
    write_files(tmp_path, {name: text, "good.txt": "good"})
    assert read(tmp_path) == (["good.txt"], {name: "in JSON Lines"})
    with pytest.raises(MiniloraError, match=f"{name} is in JSON Lines; expected text"):
        read_documents(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        '{"one": "object"}\n',
        json.dumps({"a": 1, "b": [2]}, indent=2),
        "{ a set in braces }\n{ another }\n",
        RECORDS + "and then prose\n",
        "[1]\n[2]\n",
        "1\n2\n",
        "{\n}\n",
        "{" * 100_000 + "\n{",
        "",
    ],
)
def test_text_that_only_looks_like_json_lines_is_text(text):
    assert not is_json_lines("a.txt", text)


def test_json_lines_are_text_where_they_are_piped(monkeypatch):
    from io import BytesIO
    from types import SimpleNamespace

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=BytesIO(RECORDS.encode())))
    assert read_documents("-")[0][0].text == RECORDS


# --- names and paths ---------------------------------------------------------------------------


def test_a_path_is_always_a_path(tmp_path, monkeypatch):
    write_files(tmp_path, {"python": "a file", "-": "another"})
    monkeypatch.chdir(tmp_path)
    for name, text in (("python", "a file"), ("-", "another")):
        assert load_text(Path("./") / name, BYTES).bytes == len(text)
    assert load_corpus([Path("python"), Path("-")], BYTES).name == "python -"


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are Unicode there")
def test_a_name_that_is_not_unicode_is_read_and_can_be_printed(tmp_path):
    write_files(tmp_path, {os.fsdecode(b"caf\xe9.txt"): "text", os.fsdecode(b"\xff.bin"): b"\0"})
    corpus = load_corpus(tmp_path, BYTES)
    assert corpus.files == 1
    assert summary(corpus.left_out).encode("utf-8").endswith(b"?.bin)")


def test_a_null_character_in_a_name_is_answered(tmp_path):
    with pytest.raises(MiniloraError, match="cannot read"):
        read_documents(str(tmp_path / "a\0b"))


def test_the_summary_counts_by_reason_and_names_the_first():
    left_out = [LeftOut(f"{i}.png", "not text") for i in range(5)] + [
        LeftOut("\x1b[2Jc", "in UTF-16")
    ]
    assert summary(left_out) == (
        "left out: 5 not text (0.png, 1.png, 2.png and 2 more); 1 in UTF-16 (?[2Jc)"
    )


def test_the_command_line_says_what_was_left_out_beside_its_results(tmp_path, capsys):
    from minilora.cli import main

    write_files(tmp_path, {"texts/a.txt": "some text " * 20, "texts/b.txt": "é".encode("cp1252")})
    assert main(["evaluate", str(tmp_path / "texts")]) == 0
    out, err = capsys.readouterr()
    assert "bits per byte" in out and "left out" not in out
    name = os.path.join(str(tmp_path / "texts"), "b.txt")
    assert err == f"minilora: left out: 1 perhaps in cp1252 ({name})\n"


@pytest.mark.skipif(os.name != "posix", reason="devices of POSIX systems")
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_device_is_no_text(device):
    """Of which one has no end."""
    with pytest.raises(MiniloraError, match=f"cannot read {device} .it is a device.; expected a"):
        read_documents(device)


def test_a_json_list_of_records_is_not_learned_as_text(tmp_path):
    write_files(
        tmp_path, {"a.json": '\ufeff[\r\n{"prompt": "a"}, {}]\n', "b.json": "[1]", "c": "[{"}
    )
    with pytest.raises(MiniloraError, match="a.json is a JSON list of records; expected text, or"):
        read_documents(tmp_path / "a.json")
    assert read(tmp_path) == (["b.json", "c"], {"a.json": "a JSON list of records"})
