"""Token ids and end tokens are those of transformers, for every kind of folder that it reads."""

import itertools
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.errors import MiniloraError
from minilora.formats.tokenizer import load_tokenizer
from minilora.formats.tokenizer_json import KNOWN

pytestmark = pytest.mark.oracle

TEXT = (
    "the cat sat on the mat, 2024 times; I'll say it's naïve.\n\n\t def f(x):\n    return 日本 🙂"
)
ADDED = ["<|user|>", "<|bot|>", "[PAD]", "</s>", "the cat", "<new>"]
PIECES = ["<|endoftext|>", *ADDED, " <|user|> ", "<|user", "THE", "  ", "'ll", "é", "\ud800", "\0"]


def write_json(folder, name, document):
    (folder / name).write_text(json.dumps(document), encoding="utf-8")


def edit_json(folder, name, **fields):
    path = folder / name
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(folder, name, document | fields)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with vocab.json and merges.txt of 300 tokens, <|endoftext|> the first of them."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("trained")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([TEXT] * 3, 300, 1, special_tokens=["<|endoftext|>"])
    made.save_model(str(folder))
    write_json(folder, "config.json", {"model_type": "gpt2", "vocab_size": 310})
    return folder


def saved(folder, **options):
    """Replace a folder's tokenizer by what transformers saves with these options and tokens."""
    from transformers import AddedToken, GPT2TokenizerFast

    tokenizer = GPT2TokenizerFast.from_pretrained(folder, **options)
    tokenizer.add_tokens(["<|user|>", AddedToken("the cat", lstrip=True, normalized=True)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "eos_token": "</s>"})
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    tokenizer.save_pretrained(folder)
    return tokenizer


def older(folder):
    """The files of transformers 4's slow tokenizer, with its added tokens by id."""
    decoder = {
        "0": {"content": "<|endoftext|>", "special": True},
        "300": {"content": "<|user|>", "lstrip": True, "normalized": False, "special": False},
        "301": {"content": "the cat", "single_word": True, "normalized": True, "special": False},
        "302": {"content": "<new>", "rstrip": True, "normalized": False, "special": True},
    }
    fields = {"added_tokens_decoder": decoder, "additional_special_tokens": ["<|bot|>"]}
    write_json(folder, "tokenizer_config.json", {"add_prefix_space": True, **fields})


def lists(folder):
    """added_tokens.json and special_tokens_map.json."""
    write_json(folder, "added_tokens.json", {"<|user|>": 300, "</s>": 301, "<new>": 302})
    unknown = {"content": "<|endoftext|>", "lstrip": False, "rstrip": False, "normalized": True}
    roles = {"eos_token": "</s>", "unk_token": unknown, "pad_token": "[PAD]"}
    write_json(folder, "special_tokens_map.json", roles)


def limits(folder):
    """What ordinary calls with truncation and padding leave in tokenizer.json."""
    saved(folder)
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    edit_json(folder, "tokenizer.json", truncation=cut, padding=pad)
    edit_json(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def split_by(pattern):
    def write(folder):
        saved(folder)
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        parts = [split | {"invert": False}, {"type": "ByteLevel", "use_regex": False}]
        parts[1] |= {"add_prefix_space": False, "trim_offsets": True}
        sequence = {"type": "Sequence", "pretokenizers": parts}
        edit_json(folder, "tokenizer.json", pre_tokenizer=sequence, normalizer={"type": "NFKC"})
        edit_json(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")

    return write


FOLDERS = {
    "vocab.json": lambda folder: None,
    "tokenizer.json": saved,
    "a space before": lambda folder: saved(folder, add_prefix_space=True),
    "split special tokens": lambda folder: saved(folder, split_special_tokens=True),
    "added_tokens_decoder": older,
    "added_tokens.json": lists,
    "truncation": limits,
    **{f"pattern {i}": split_by(pattern) for i, pattern in enumerate([*sorted(KNOWN), r"\d|\s+"])},
}


@pytest.fixture(scope="module", params=FOLDERS)
def pair(request, trained, tmp_path_factory):
    """Our tokenizer of a folder, and transformers'."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("folder") / "base"
    shutil.copytree(trained, folder)
    FOLDERS[request.param](folder)
    return load_tokenizer(folder, 310), AutoTokenizer.from_pretrained(folder)


def same_ids(ours, theirs, text):
    expected = theirs.encode(text, add_special_tokens=False)
    np.testing.assert_array_equal(ours.encode(text), expected, err_msg=repr(text))
    decoded = theirs.decode(expected, clean_up_tokenization_spaces=False)
    assert ours.decode(expected) == decoded, repr(text)


@given(text=st.lists(st.sampled_from(PIECES) | st.text(max_size=9), max_size=9).map("".join))
@settings(max_examples=100)
def test_the_ids_are_those_of_transformers(pair, text):
    ours, theirs = pair
    shown = text.encode("utf-8", "replace").decode("utf-8")  # transformers takes no lone surrogates
    np.testing.assert_array_equal(ours.encode(text), ours.encode(shown))
    same_ids(ours, theirs, shown)


def test_a_long_text_and_the_end_of_text_are_those_of_transformers(pair):
    ours, theirs = pair
    for text in (TEXT * 50, *ADDED, " ".join(ADDED), " " * 3000 + "\n" * 3000 + "a" * 3000):
        same_ids(ours, theirs, text)
    assert ours.end_of_text == theirs.eos_token_id
    assert ours.ends == {theirs.eos_token_id}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalizer", {"type": "Lowercase"}),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("model", {"ignore_merges": True}),
    ],
)
def test_a_file_that_versions_of_transformers_read_differently_is_refused(
    trained, tmp_path, field, value
):
    folder = tmp_path / "base"
    shutil.copytree(trained, folder)
    saved(folder)
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    edit_json(folder, "tokenizer.json", **{field: (document[field] or {}) | value})
    with pytest.raises(MiniloraError, match=rf"{field}.* GPT2Tokenizer, .*PreTrainedTokenizerFast"):
        load_tokenizer(folder, 310)


# --- where a text ends -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "generation"),
    list(itertools.product([None, 4, [4], [4, 9]], ["absent", None, 4, [7, 4]])),
)
def test_a_text_ends_where_that_of_transformers_does(tmp_path, config, generation):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from minilora.model import complete, load_model

    torch.manual_seed(3)
    sizes = {"vocab_size": 256, "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}
    made = transformers.GPT2Config(**sizes, eos_token_id=config, bos_token_id=None)
    model = transformers.GPT2LMHeadModel(made)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    with torch.no_grad():  # so that few tokens are ever drawn
        model.transformer.wte.weight[12:] *= 0.01
    model.save_pretrained(tmp_path)
    if generation == "absent":
        (tmp_path / "generation_config.json").unlink()
    else:
        edit_json(tmp_path, "generation_config.json", eos_token_id=generation)
    ours, theirs = load_model(tmp_path), transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    stated = [value for value in (config, generation) if value not in (None, "absent")]
    ends = {end for value in stated for end in (value if isinstance(value, list) else [value])}
    assert ours.tokenizer.ends == (ends or {0xFF})  # without one, a byte that no text has
    option = {"eos_token_id": sorted(ends)}  # what only one file says ends a text here, too
    if stated and generation in ("absent", config):
        option = {}
    lengths = set()
    for start in range(12):
        prompt = torch.tensor([[start]])
        option |= {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
        ids = theirs.generate(prompt, max_new_tokens=40, do_sample=False, **option)[0, 1:].tolist()
        found = list(complete(ours, chr(start), max_tokens=40, temperature=0.0))
        assert found == list(itertools.takewhile(lambda token: token not in ends, ids))
        assert len(ids) == min(40, len(found) + 1)
        lengths.add(len(found))
    assert not ends or min(lengths) < 40
