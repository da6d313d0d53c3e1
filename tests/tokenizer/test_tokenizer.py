"""Bytes and byte-pair encodings: text to token ids and back, whole and piece by piece."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import MiniloraError
from minilora.formats.tokenizer import load_tokenizer
from minilora.tokenizer import ByteTokenizer, check_ids

TEXTS = ["", "plain", "naïve café", "日本語と🙂", "a\n\n  b\t\r\n", "I'll say it's 2024."]
BYTES = ByteTokenizer()
MERGES = ["h e", "l l", "he ll", "Ġ w", "Ġ Ġ"]  # Ġ stands for a space in GPT-2's files


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory):
    """GPT-2's two files with a vocabulary of 262: the bytes, five merges and the end of text."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("bpe")
    entries = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    entries += [merge.replace(" ", "") for merge in MERGES] + ["<|endoftext|>"]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "#version: 0.2\n" + "\n".join(MERGES) + "\n"
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bpe(bpe_folder):
    return load_tokenizer(bpe_folder, 262)


# --- bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, 256, 2**31, 2**63, 2**70, -(2**70)])
def test_ids_of_any_size_are_refused_in_a_sentence(token):
    for decode in (ByteTokenizer().decode, lambda ids: list(ByteTokenizer().stream(ids))):
        with pytest.raises(MiniloraError, match=f"token id {token} is outside"):
            decode([65, token])
        with pytest.raises(TypeError):
            decode([65.7])


@given(st.text())
def test_bytes_decode_to_the_text_they_encode(text):
    ids = BYTES.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert bytes(ids.tolist()) == text.encode("utf-8")
    assert BYTES.decode(ids) == text


@given(st.binary())
def test_streamed_bytes_are_the_decoded_bytes(data):
    assert "".join(BYTES.stream(data)) == BYTES.decode(data) == data.decode("utf-8", "replace")


def test_stream_never_emits_half_a_character():
    assert list(BYTES.stream(BYTES.encode("aé🙂b"))) == ["a", "é", "🙂", "b"]
    assert list(BYTES.stream("🙂".encode()[:3])) == ["\ufffd"]


def test_a_lone_surrogate_encodes_to_a_question_mark():
    assert BYTES.decode(BYTES.encode("a\ud800b")) == "a?b"


@pytest.mark.parametrize("bad", [-1, 256, 2**40])
def test_an_id_that_is_no_byte_is_an_error(bad):
    with pytest.raises(MiniloraError, match=f"token id {bad} is outside.* 256 tokens"):
        BYTES.decode([65, bad])
    with pytest.raises(MiniloraError, match=f"token id {bad} is outside.* 256 tokens"):
        list(BYTES.stream([65, bad]))


def test_check_ids_accepts_exactly_the_vocabulary():
    check_ids(np.arange(10), 10)
    check_ids(np.zeros(0, np.int32), 10)
    for bad in (-1, 10):
        with pytest.raises(MiniloraError, match=str(bad)):
            check_ids(np.array([0, bad]), 10)


# --- byte-pair encoding ------------------------------------------------------------------------


def test_merges_are_applied_in_order(bpe):
    merged = {name.replace(" ", ""): 256 + i for i, name in enumerate(MERGES)}
    ids = bpe.encode("hello w")
    assert ids.dtype == np.int32
    assert ids.tolist() == [merged["hell"], *bpe.encode("o").tolist(), merged["Ġw"]]


@pytest.mark.parametrize("text", TEXTS)
def test_bpe_decodes_to_the_text_it_encodes(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert "".join(bpe.stream(ids)) == text


@given(ids=st.lists(st.integers(0, 261), max_size=30))
def test_streamed_bpe_is_the_decoded_bpe(bpe, ids):
    assert "".join(bpe.stream(ids)) == bpe.decode(ids)


def test_bpe_stream_never_emits_half_a_character(bpe):
    assert list(bpe.stream(bpe.encode("é🙂b"))) == ["é", "🙂", "b"]


def test_words_whose_spaces_depend_on_the_word_before_stream_too(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"one": 0, "two": 1, "##s": 2}, unk_token="one")
    words = tokenizers.Tokenizer(model)
    words.decoder = tokenizers.decoders.WordPiece()
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, 3)
    assert list(tokenizer.stream([0, 1, 2, 0])) == ["one", " two", "s", " one"]
    assert tokenizer.decode([0, 1, 2, 0]) == "one twos one"


def test_a_batch_encodes_as_its_texts_do(bpe):
    for tokenizer in (BYTES, bpe):
        for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_the_end_of_text_is_one_token(bpe):
    assert bpe.end_of_text == 261
    assert bpe.encode("a<|endoftext|>b").tolist()[1] == 261
    assert bpe.decode([261]) == "<|endoftext|>"


def test_tokenizer_json_gives_the_same_ids(bpe, tmp_path):
    bpe.tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(tmp_path, 262)
    for text in TEXTS:
        np.testing.assert_array_equal(again.encode(text), bpe.encode(text))
    assert again.end_of_text == 261


def test_ids_beyond_the_base_are_an_error(bpe_folder):
    smaller = load_tokenizer(bpe_folder, 258)
    assert smaller.end_of_text is None
    with pytest.raises(MiniloraError, match="token id 258 is outside.* 258 tokens"):
        smaller.encode("hell")
    with pytest.raises(MiniloraError, match="token id 260 is outside.* 258 tokens"):
        smaller.decode([260])


# --- which tokenizer a folder has --------------------------------------------------------------


def test_a_folder_without_files_is_byte_level_at_256(tmp_path):
    assert isinstance(load_tokenizer(tmp_path, 256), ByteTokenizer)


@pytest.mark.parametrize("files", [[], ["vocab.json"], ["merges.txt"]])
def test_a_folder_without_tokenizer_is_an_error(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(MiniloraError, match="no tokenizer; expected tokenizer.json, or vocab.json"):
        load_tokenizer(tmp_path, 50257)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "tokenizer.json is not JSON"),
        ("not json", "tokenizer.json is not JSON"),
        ('{"model": {"type": "none"}}', "cannot read a tokenizer from .*tokenizer.json: model is"),
        ('{"model": {"type": "BPE"}}', "cannot read a tokenizer from .*tokenizer.json"),
    ],
)
def test_a_damaged_tokenizer_file_is_named(tmp_path, content, message):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(MiniloraError, match=message):
        load_tokenizer(tmp_path, 50257)


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MiniloraError, match="pip install tokenizers"):
        load_tokenizer(tmp_path, 50257)
