"""Sources, the held-out part, and the streams that documents are joined into."""

import sysconfig

import numpy as np
import pytest
from helpers import set_stdin, write_files
from hypothesis import given
from hypothesis import strategies as st

from minilora.data import (
    join_documents,
    load_corpus,
    load_text,
    split_files,
    split_tails,
)
from minilora.errors import MiniloraError
from minilora.texts import Document, read_documents
from minilora.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
DOCUMENTS = st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=8).map(
    lambda texts: [Document(f"{i}.txt", text) for i, text in enumerate(texts)]
)


class WordTokenizer:
    """One token for each word, and 0 between documents: a tokenizer with an end of text."""

    vocab_size = 100
    end_of_text = 0

    def encode_batch(self, texts):
        return [np.array([len(word) for word in text.split()], np.int32) for text in texts]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of 40 files that repeat one word each, beside what is left out."""
    folder = tmp_path / "lib"
    write_files(folder, {f"room{i % 3}/file{i}.py": f"word{i}\n" * 10 for i in range(40)})
    write_files(folder, {f"{room}/x.py": "no" for room in ("test", "site-packages", "a/tests")})
    write_files(folder, {"readme.txt": "no"})
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})


# --- sources -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"one\r\ntwo\rthree\n", "one\ntwo\nthree\n"),
        (b"\xef\xbb\xbfmarked", "marked"),
        ("é🙂".encode(), "é🙂"),
        (b"  spaces kept \n\n\n", "  spaces kept \n\n\n"),
    ],
)
def test_a_file_is_read_as_text(tmp_path, monkeypatch, data, text):
    write_files(tmp_path, {"a.txt": data})
    path = str(tmp_path / "a.txt")
    assert read_documents(path) == ([Document(path, text)], [])
    set_stdin(monkeypatch, data)
    assert read_documents("-") == ([Document("standard input", text)], [])


def test_a_folder_gives_its_text_files_sorted(tmp_path):
    files = {
        "b.txt": "b",
        "a/z.md": "z",
        "a/deep/y.py": "y",
        "a.txt": "a",
        "empty.txt": "",
        "mark.txt": b"\xef\xbb\xbf",
        ".hidden.txt": "no",
        ".git/config": "no",
        "picture.png": b"\x89PNG\xff\xfe",
        "zeros.bin": b"\0\0text",
    }
    write_files(tmp_path, files)
    documents, _ = read_documents(str(tmp_path))
    assert [document.name for document in documents] == ["a/deep/y.py", "a/z.md", "a.txt", "b.txt"]
    assert [document.text for document in documents] == ["y", "z", "a", "b"]


def test_a_hidden_folder_that_is_named_is_read(tmp_path):
    write_files(tmp_path, {".notes/a.txt": "a"})
    assert len(read_documents(str(tmp_path / ".notes"))[0]) == 1


def test_python_is_the_standard_library_without_tests():
    documents, _ = read_documents("python")
    names = [document.name for document in documents]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not [name for name in names if skipped & set(name.split("/"))]
    train, apart = (sum(map(len, texts)) for texts in split_files(documents, 0.05))
    assert 0.045 < apart / (train + apart) < 0.055


def test_python_the_file_is_reached_by_its_path(tmp_path, monkeypatch, library):
    write_files(tmp_path, {"python": "a file"})
    monkeypatch.chdir(tmp_path)
    assert read_documents("./python")[0][0].text == "a file"
    assert len(read_documents("python")[0]) == 40


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"cannot read .*missing.txt .*; expected a file, a folder"),
        ("empty.txt", b"", "empty.txt is empty; expected text"),
        ("mark.txt", b"\xef\xbb\xbf", "mark.txt is empty; expected text"),
        ("latin.txt", "é".encode("latin-1"), "latin.txt is not text in UTF-8"),
        ("utf16.txt", "text".encode("utf-16-le"), "utf16.txt is not text in UTF-8"),
        ("folder/picture.png", b"\xff", "folder is a folder without text"),
    ],
)
def test_a_bad_source_is_named(tmp_path, name, content, message):
    if content is not None:
        write_files(tmp_path, {name: content})
    source = str(tmp_path / name.split("/")[0])
    for load in (load_corpus, load_text):
        with pytest.raises(MiniloraError, match=message):
            load([source], BYTES)


@pytest.mark.parametrize(("data", "message"), [(b"", "is empty"), (b"\xff", "not text in UTF-8")])
def test_bad_standard_input_is_named(monkeypatch, data, message):
    set_stdin(monkeypatch, data)
    with pytest.raises(MiniloraError, match=f"standard input {message}|input is {message}"):
        read_documents("-")


def test_a_standard_library_without_sources_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(MiniloraError, match="standard library has no .py files"):
        read_documents("python")


# --- the split ---------------------------------------------------------------------------------


@given(documents=DOCUMENTS, share=st.floats(0, 0.99))
def test_tails_and_heads_make_up_every_file(documents, share):
    for document in documents:
        train, apart = split_tails([document], share)
        assert "".join(train + apart) == document.text
        size = len(document.text)
        assert sum(map(len, apart)) == int(size * share), "the last share of the characters"


@given(documents=DOCUMENTS, share=st.floats(0, 0.99))
def test_whole_files_go_to_one_side(documents, share):
    train, apart = split_files(documents, share)
    texts = [document.text for document in documents]
    assert sorted(train + apart) == sorted(texts)
    assert sum(map(len, apart)) <= share * sum(map(len, texts))
    assert split_files(documents, share) == (train, apart)


@given(documents=DOCUMENTS, share=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_the_files_held_out_do_not_depend_on_their_order(documents, share, seed):
    shuffled = [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]
    assert sorted(split_files(documents, share)[1]) == sorted(split_files(shuffled, share)[1])


def test_python_holds_out_whole_files(library):
    corpus = load_corpus(["python"], BYTES, held_out=0.2)
    assert corpus.files == 40
    train = set(BYTES.decode(corpus.train).split())
    held_out = set(BYTES.decode(corpus.held_out).split())
    assert train | held_out == {f"word{i}" for i in range(40)}
    assert not train & held_out
    assert 4 <= len(held_out) <= 8


def test_the_same_files_are_held_out_on_every_machine():
    documents = [Document(f"file{i}.py", f"{i}") for i in range(10)]
    assert split_files(documents, 0.3)[1] == ["0", "5", "6"]


def test_the_held_out_part_is_cut_between_characters(tmp_path):
    write_files(tmp_path, {"a.txt": "é" * 101})
    corpus = load_corpus([str(tmp_path / "a.txt")], BYTES)
    assert BYTES.decode(corpus.train) == "é" * 96
    assert BYTES.decode(corpus.held_out) == "é" * 5
    assert (corpus.train_bytes, corpus.held_out_bytes) == (192, 10)


def test_every_file_has_its_own_tail_held_out(tmp_path):
    write_files(tmp_path, {"a.txt": "a" * 95 + "A" * 5, "b/c.txt": "b" * 190 + "B" * 10})
    corpus = load_corpus([str(tmp_path)], BYTES)
    assert BYTES.decode(corpus.train) == "a" * 95 + "\n\n" + "b" * 190
    assert BYTES.decode(corpus.held_out) == "A" * 5 + "\n\n" + "B" * 10
    assert corpus.files == 2
    assert corpus.name == str(tmp_path)
    assert corpus.train.dtype == corpus.held_out.dtype == np.int32


def test_sources_keep_their_order(tmp_path):
    write_files(tmp_path, {"a.txt": "a" * 20, "b.txt": "b" * 20})
    sources = [str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]
    corpus = load_corpus(sources, BYTES)
    assert BYTES.decode(corpus.train) == "b" * 19 + "\n\n" + "a" * 19
    assert BYTES.decode(corpus.held_out) == "b\n\na"
    assert corpus.name == " ".join(sources)


def test_a_single_source_may_be_a_string(tmp_path):
    write_files(tmp_path, {"a.txt": "some text"})
    path = str(tmp_path / "a.txt")
    assert load_corpus(path, BYTES).files == 1
    assert load_text(path, BYTES)[1] == 9


def test_nothing_is_held_out_at_a_share_of_zero(tmp_path):
    write_files(tmp_path, {"a.txt": "a" * 100})
    corpus = load_corpus([str(tmp_path)], BYTES, held_out=0.0)
    assert (corpus.train.size, corpus.held_out.size, corpus.held_out_bytes) == (100, 0, 0)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_outside_its_range_is_an_error(tmp_path, share):
    with pytest.raises(MiniloraError, match=r"held_out .* is not in \[0, 1\)"):
        load_corpus([str(tmp_path)], BYTES, held_out=share)


# --- streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "stream"),
    [
        ([], ""),
        (["one"], "one"),
        (["one\n\n\n"], "one\n\n\n"),
        (["one", "two"], "one\n\ntwo"),
        (["one\n", "two\n", "three\n"], "one\n\ntwo\n\nthree\n"),
        (["one\n\n\n", "two"], "one\n\n\ntwo"),
    ],
)
def test_a_blank_line_stands_between_documents(texts, stream):
    tokens, size = join_documents(texts, BYTES)
    assert BYTES.decode(tokens) == stream
    assert size == len(stream) == tokens.size


def test_the_end_of_text_stands_between_documents_and_counts_no_byte():
    tokens, size = join_documents(["a bb\n", "ccc", "é"], WordTokenizer())
    assert tokens.tolist() == [1, 2, 0, 3, 0, 1]
    assert tokens.dtype == np.int32
    assert size == len("a bb\n") + len("ccc") + 2


def test_load_text_is_everything_as_it_is(tmp_path):
    write_files(tmp_path, {"a.txt": "début\r\n" * 10, "b.txt": "end"})
    tokens, size, _ = load_text([str(tmp_path / "a.txt")], BYTES)
    assert BYTES.decode(tokens) == "début\n" * 10
    assert size == 70
    tokens, size, _ = load_text([str(tmp_path)], BYTES)
    assert BYTES.decode(tokens) == "début\n" * 10 + "\nend"
    assert size == 74
