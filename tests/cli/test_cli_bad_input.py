"""Bad input: one sentence that names it, status 2, no traceback, and nothing written."""

import json
import os
import re
import sys

import numpy as np
import pytest
from helpers import set_stdin

from minilora import tree
from minilora.adapters import LoRAConfig, lora_init
from minilora.formats import save_adapter, save_base
from minilora.formats.tensors import write_tensors
from minilora.gpt2 import GPTConfig, gpt_init

# --- text --------------------------------------------------------------------------------------

TEXTS = {
    "empty": (b"", 16, "data.txt is empty"),
    "a byte-order mark alone": (b"\xef\xbb\xbf", 16, "data.txt is empty"),
    "binary": (b"a\0b" * 100, 16, "data.txt is not text in UTF-8"),
    "UTF-16": (("a text " * 50).encode("utf-16"), 16, "data.txt is not text in UTF-8"),
    "Latin-1": ("é".encode("latin-1") * 100, 16, "data.txt is not text in UTF-8"),
    "shorter than the context": (b"x" * 20, 31, "19 tokens; a context of 31 needs at least 32"),
    "too short to hold anything out": (b"x" * 31, 29, "data.txt is too short: nothing"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_is_none_or_too_short(refused, quick, tmp_path, name):
    data, context, pattern = TEXTS[name]
    (tmp_path / "data.txt").write_bytes(data)
    quick[1] = "data.txt"
    refused(pattern, *quick, "--context", context)


@pytest.mark.parametrize("command", ["adapt", "evaluate", "pretrain"])
@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        ("missing.txt", r"cannot read missing\.txt \(No such file"),
        ("", "cannot read"),
        ("x" * 5000, "cannot read x+"),
        ("emptyfolder", "emptyfolder is a folder without text"),
    ],
    ids=["missing", "no name", "long name", "empty folder"],
)
def test_data_that_is_not_there(refused, tmp_path, base, command, data, pattern):
    (tmp_path / "emptyfolder").mkdir()
    words = [] if command == "pretrain" else ["--base", base]
    refused(pattern, command, data, *words)


def test_good_data_does_not_hide_bad(refused, quick):
    refused("missing", *quick[:2], "missing", *quick[2:])


@pytest.mark.parametrize(
    ("data", "pattern"),
    [(b"", "standard input is empty"), (b"\xff\xfe", "standard input is not text in UTF-8")],
)
def test_standard_input(refused, monkeypatch, base, data, pattern):
    set_stdin(monkeypatch, data)
    refused(pattern, "evaluate", "-", "--base", base)
    set_stdin(monkeypatch, data)
    refused(pattern, "generate", "--prompt", "-", "--base", base)


def test_a_text_too_short_to_evaluate(refused, tmp_path, base):
    (tmp_path / "one.txt").write_bytes(b"x")
    refused("one.txt has 1 tokens", "evaluate", "one.txt", "--base", base)
    (tmp_path / "short.txt").write_bytes(b"0123456789")
    refused(
        "the held-out part of short.txt has 0 tokens",
        *("evaluate", "short.txt", "--held-out", "--base", base),
    )


# --- options -----------------------------------------------------------------------------------

BAD_ADAPT = [
    ("--rank 0 is not a whole number", "--rank", 0),
    ("--rank -3 is not a whole number", "--rank", -3),
    (r"--rank 17 is above the smaller side of .*qkv, a weight of 16 × 48", "--rank", 17),
    ("--rank: expected a whole number, not '2.5'", "--rank", 2.5),
    ("--alpha 0.0 is not a positive", "--alpha", 0),
    ("--alpha nan", "--alpha", "nan"),
    ("--alpha -inf", "--alpha=-inf"),
    ("--dropout 1.0 is not in", "--dropout", 1),
    ("--dropout -0.1", "--dropout", -0.1),
    ("--dropout nan", "--dropout", "nan"),
    (
        "--targets: unknown target 'attn'; the targets are qkv, q, k, v, o, up, down, emb",
        "--targets",
        "attn",
    ),
    ("--targets: unknown target 'c_attn'", "--targets", "qkv,c_attn"),
    (
        "--targets: no weight matches the target 'blocks.7.*the targets are qkv",
        "--targets",
        "blocks.7.attn.q",
    ),
    (r"'\(' is not a regular expression", "--targets", "("),
    ("--targets is empty", "--targets", ","),
    ("--targets is empty", "--targets", ""),
    ("--rank-pattern 'down' is not PATTERN=NUMBER", "--rank-pattern", "down"),
    ("--rank-pattern 'down=' is not", "--rank-pattern", "down="),
    ("--rank-pattern '=3' is not", "--rank-pattern", "=3"),
    ("--rank-pattern 'down=x' is not", "--rank-pattern", "down=x"),
    ("--rank-pattern 'down=1.5' is not", "--rank-pattern", "down=1.5"),
    ("--alpha-pattern 'down=x' is not", "--alpha-pattern", "down=x"),
    ("--rank-pattern 'down': rank 0 is not a whole number", "--rank-pattern", "down=0"),
    ("--rank-pattern: rank 99 is above", "--rank-pattern", "down=99"),
    (
        "--rank-pattern: 'embedding' matches no adapted weight; these are",
        "--rank-pattern",
        "embedding=2",
    ),
    ("--alpha-pattern: 'nothing' matches no adapted weight", "--alpha-pattern", "nothing=2"),
    (r"'\)' is not a regular expression", "--rank-pattern", ")=2"),
    ("--alpha-pattern 'down': alpha -2.0", "--alpha-pattern", "down=-2"),
    ("--steps 0 is too small", "--steps", 0),
    ("--steps -5 is too small", "--steps", -5),
    ("--batch 0 is too small", "--batch", 0),
    ("--context 0 is too small", "--context", 0),
    ("--context 33 exceeds the base's context of 32", "--context", 33),
    ("--lr 0.0 is not", "--lr", 0),
    ("--lr -1.0 is not", "--lr", -1),
    ("--lr nan is not", "--lr", "nan"),
    ("--lr inf is not", "--lr", "inf"),
    ("--lr: expected a number, not 'fast'", "--lr", "fast"),
    ("--clip 0.0 is not", "--clip", 0),
    ("--warmup -1 is not", "--warmup", -1),
    ("--weight-decay nan is not", "--weight-decay", "nan"),
    ("--beta2 1.0 is not in", "--beta2", 1),
    ("--eval-every 0 is too small", "--eval-every", 0),
    ("--eval-tokens 0 is too small", "--eval-tokens", 0),
    ("--checkpoint-every 0 is too small", "--checkpoint-every", 0),
    ("--log-every 0 is too small", "--log-every", 0),
    ("--seed: '-1' is not a whole number of at least 0", "--seed", -1),
    ("--seed: '1.5' is not", "--seed", 1.5),
    ("--seed", "--seed", "9" * 5000),
    ("--threads: '-1' is not", "--threads", -1),
    ("--device 'tpu' is not one of cpu, cuda, auto", "--device", "tpu"),
    ("--method: expected one of .*, not 'half'", "--method", "half"),
    ("--dropout is for adapters; --method full trains none", "--method", "full", "--dropout", 0.1),
    ("--json missing/figures.json: expected a file name", "--json", "missing/figures.json"),
    ("--json .: expected a file name", "--json", "."),
    ("--plot missing/x.png: expected a file name", "--plot", "missing/x.png"),
    ("--plot losses.txt: expected a name that ends in .png", "--plot", "losses.txt"),
    ("--base: missing/config.json does not exist; expected a base's folder", "--base", "missing"),
    ("there is no option --ranks; did you mean --rank\\? See minilora adapt --help", "--ranks=2"),
    ("--rank: expected a value", "--rank"),
]


@pytest.mark.parametrize("case", BAD_ADAPT, ids=lambda case: " ".join(map(str, case[1:]))[:40])
def test_adapt_refuses(refused, quick, case):
    pattern, *words = case
    refused(pattern, *quick, *words)


BAD_GENERATE = [
    ("prompt has 33 tokens, more than the context of 32", "--prompt", "x" * 33),
    ("prompt has 34 tokens", "--prompt", "é" * 17),
    ("the prompt is empty", "--prompt", ""),
    ("--top-p 2.0 is not in", "--top-p", 2),
    ("--top-p 0.0 is not in", "--top-p", 0),
    ("--top-p nan is not in", "--top-p", "nan"),
    ("--top-k 0 is too small", "--top-k", 0),
    ("--temperature -1.0 is not", "--temperature", -1),
    ("--temperature nan is not", "--temperature", "nan"),
    ("--tokens -1 is negative", "--tokens", -1),
    ("--seed: '-1' is not", "--seed", -1),
    (
        "--adapter: missing is not a folder; expected one with adapter_config",
        "--adapter",
        "missing",
    ),
    ("--json missing/x.json", "--json", "missing/x.json"),
    ("unexpected argument .surplus.; see minilora generate --help", "a text", "surplus"),
    ("TEXT and --prompt mean the same; expected one", "a text", "--prompt", "another"),
]


@pytest.mark.parametrize("case", BAD_GENERATE, ids=lambda case: " ".join(map(str, case[1:]))[:40])
def test_generate_refuses(refused, base, case):
    pattern, *words = case
    refused(pattern, "generate", "--base", base, *words)


OTHERS = [
    ("--: expected a command first, such as demo; see minilora --help", "--"),
    ("there is no command 'train'; did you mean pretrain\\? See minilora --help", "train"),
    ("there is no command 'adpt'; did you mean adapt\\? See minilora --help", "adpt"),
    ("there is no command 'gen'", "help", "gen"),
    ("there is no option --base; see minilora gradcheck --help", "gradcheck", "--base", "x"),
    (
        "adapters: 1, weights: 2; expected a --weight for each --adapter",
        "mix",
        "--adapter",
        "x",
        "--weight",
        1,
        "--weight",
        2,
    ),
    ("--seed: '-1' is not", "gradcheck", "--seed", -1),
    ("--seed: '-1' is not", "demo", "--seed", -1),
    ("--device 'x' is not one of cpu, cuda, auto", "demo", "--device", "x"),
    ("expected DATA; see minilora adapt --help", "adapt"),
    ("expected DATA", "evaluate"),
    ("expected DATA", "pretrain"),
    ("expected --adapter", "merge"),
    ("expected --adapter", "mix"),
    ("--weight: expected a number, not 'much'", "merge", "--adapter", "x", "--weight", "much"),
    ("--device 'x' is not one of cpu, cuda, auto", "merge", "--adapter", "x", "--device", "x"),
    ("--device 'x' is not one of cpu, cuda, auto", "gradcheck", "--device", "x"),
    ("--threads: 'two' is not", "evaluate", "python", "--threads", "two"),
]


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: " ".join(map(str, case[1:])) or "nothing")
def test_other_commands_refuse(refused, case):
    refused(*case)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("--width 7 is not a multiple of --heads 2", ["--width", 7, "--heads", 2]),
        ("--layers 0 is too small", ["--layers", 0]),
        ("--heads -1 is too small", ["--heads", -1]),
        ("has 3937 tokens; a context of 9999 needs", ["--context", 9999, "--width", 4]),
        ("--dtype: expected one of .*, not 'int8'", ["--dtype", "int8"]),
        ("--context: expected a whole number, not 'long'", ["--context", "long"]),
    ],
)
def test_pretrain_refuses(refused, text, pattern, words):
    refused(pattern, "pretrain", text, *words)


def test_cuda_without_cupy(refused, quick, base, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    refused(r"cuda needs CuPy: pip install", *quick, "--device", "cuda")
    refused(r"cuda needs CuPy", "generate", "--base", base, "--device", "cuda")
    refused(r"cuda needs CuPy", "evaluate", text, "--base", base, "--device", "cuda")
    refused(r"cuda needs CuPy", "merge", "--adapter", "x", "--base", base, "--device", "cuda")
    refused(r"cuda needs CuPy", "gradcheck", "--device", "cuda")
    refused(r"cuda needs CuPy", "demo", "--device", "cuda")


def test_a_plot_without_matplotlib_is_refused_before_training(refused, quick, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(r"--plot needs matplotlib: pip install matplotlib", *quick, "--plot", "x.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes with names")
@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_of_another_kind_is_not_replaced(refused, quick, tmp_path, option):
    """A pipe stands for what must not become a file: /dev/null, for instance."""
    os.mkfifo(tmp_path / "pipe.png")
    refused(f"{option} pipe.png: expected a file name", *quick, option, "pipe.png")
    assert (tmp_path / "pipe.png").is_fifo()


# --- the output folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_an_output_folder_with_something_else(refused, quick, tmp_path, base, adapter, resume):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine", encoding="utf-8")
    refused("full already holds notes.txt; expected a new", *quick, "--out", "full", *resume)
    refused("base already holds config.json", *quick, "--out", base, *resume)
    refused("adapter already holds", *quick, "--out", adapter, *resume)
    refused(r"\. already holds full", *quick, "--out", ".", *resume)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    refused("file is a file", *quick, "--out", "file", *resume)
    refused("cannot make the folder file", *quick, "--out", "file/below", *resume)
    refused("x{300}", *quick, "--out", "x" * 300, *resume)


@pytest.mark.parametrize("command", ["merge", "mix"])
def test_merging_and_mixing_refuse_a_folder_with_something_else(refused, base, adapter, command):
    words = (command, "--base", base, "--adapter", adapter, "--out")
    refused("base already holds config.json", *words, base)
    refused("adapter already holds", *words, adapter)


def test_merging_an_embedding_adapter_is_refused(refused, tmp_path, base):
    config = GPTConfig(vocab_size=256, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    lora_config = LoRAConfig(rank=2, targets=("embedding", "qkv"))
    lora = lora_init(gpt_init(config, seed=0), lora_config, seed=0)
    save_adapter(tmp_path / "embedding", lora, lora_config, config)
    refused("embedding cannot be merged", "merge", "--base", base, "--adapter", "embedding")


# --- damaged and foreign files -----------------------------------------------------------------


@pytest.fixture
def broken_base(tmp_path, base):
    """A copy of the base to be damaged."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes), encoding="utf-8")


BROKEN = {
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "model.safetensors does not exist",
    ),
    "empty weights": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "model.safetensors is no safetensors file",
    ),
    "truncated weights": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-5]
        ),
        "model.safetensors is no safetensors file, or a damaged one",
    ),
    "foreign weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(500)),
        "model.safetensors is no safetensors file",
    ),
    "another model's weights": (
        lambda f: write_tensors(f / "model.safetensors", {"encoder.w": np.zeros((2, 2))}),
        "model.safetensors holds 0 blocks",
    ),
    "a pickle": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04K\x01."),
        "no safetensors file",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "no JSON": (lambda f: (f / "config.json").write_text("{", encoding="utf-8"), "is not JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]", encoding="utf-8"), "no JSON object"),
    "another architecture": (
        lambda f: change_config(f, model_type="mamba"),
        "model_type is 'mamba'",
    ),
    "another width": (
        lambda f: change_config(f, n_embd=32),
        r"wte\.weight is \(256, 16\), expected \(256, 32\)",
    ),
    "a width that is no number": (lambda f: change_config(f, n_embd="16"), "n_embd is '16'"),
    "another vocabulary": (lambda f: change_config(f, vocab_size=300), r"expected \(300, 16\)"),
    "a bad tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}", encoding="utf-8"),
        "tokenizer",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_base_that_is_damaged(refused, text, broken_base, name):
    spoil, pattern = BROKEN[name]
    spoil(broken_base)
    refused(pattern, "evaluate", text, "--base", broken_base)


def test_a_base_without_its_tokenizer(refused, tmp_path, text):
    config = GPTConfig(vocab_size=300, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    save_base(tmp_path / "other", gpt_init(config, seed=0), config)
    refused("other has 300 tokens but no tokenizer", "evaluate", text, "--base", "other")


def test_an_adapter_of_another_base(refused, tmp_path, base, text, adapter):
    config = GPTConfig(vocab_size=256, n_positions=32, n_embd=24, n_layer=2, n_head=2)
    save_base(tmp_path / "wide", gpt_init(config, seed=0), config)
    tensor = r"transformer\.h\.0\.attn\.c_attn\.lora_A\.weight is \(2, 16\), expected \(2, 24\)"
    for command in (["evaluate", text], ["generate"], ["merge"]):
        refused(
            f"adapter_model.safetensors was made for another base.*{tensor}",
            *(*command, "--base", "wide", "--adapter", adapter),
        )
    config = GPTConfig(vocab_size=256, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    save_base(tmp_path / "flat", gpt_init(config, seed=0), config)
    refused(r"h\.1\.", "generate", "--base", "flat", "--adapter", adapter)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"<html>not found</html>"),
        lambda path: path.write_bytes(b""),
    ],
    ids=["truncated", "foreign", "empty"],
)
def test_an_adapter_that_is_damaged(refused, tmp_path, base, adapter, spoil):
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for path in adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spoil(folder / "adapter_model.safetensors")
    refused(
        "adapter_model.safetensors is no safetensors file",
        *("generate", "--base", base, "--adapter", folder),
    )


def test_a_base_given_as_an_adapter_and_the_other_way_round(refused, base, adapter, text):
    refused("adapter_config.json does not exist", "generate", "--base", base, "--adapter", base)
    refused("config.json does not exist", "evaluate", text, "--base", adapter)


# --- numbers and machines ------------------------------------------------------------------------


@pytest.fixture
def overflowing(tmp_path):
    """A base of finite weights whose logits are not."""
    config = GPTConfig(vocab_size=256, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    weights = gpt_init(config, seed=0)
    weights["wte"] *= 100.0
    weights["ln_f"]["w"][:] = 3e38
    assert all(np.isfinite(leaf).all() for leaf in tree.flatten(weights).values())
    save_base(tmp_path / "overflowing", weights, config)
    return "overflowing"


def test_a_base_that_overflows(refused, overflowing, text):
    refused("the loss is not finite", "evaluate", text, "--base", overflowing, "--json", "x.json")


def test_a_base_that_overflows_is_not_adapted(cli, quick, overflowing, tmp_path):
    result = cli(*quick, "--base", overflowing, "--json", "x.json")
    assert result.status == 2
    assert len(result.lines) == 1
    assert "held-out loss is not finite at step 0" in result.err
    assert not (tmp_path / "x.json").exists()


def test_a_rate_that_is_too_high(cli, quick, tmp_path):
    result = cli(*quick, "--lr", 1e30, "--warmup", 0, "--json", "x.json", "--checkpoint-every", 1)
    assert result.status == 2
    assert re.match(r"minilora: .* is not finite at step \d: a lower", result.lines[-1])
    assert all(line.startswith("adapt: step ") for line in result.lines[:-1])
    assert not (tmp_path / "x.json").exists()
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("Unable to allocate 9 TiB"), "not enough memory: Unable to allocate 9 TiB"),
        (OSError(28, "No space left on device", "x"), "No space left on device: 'x'"),
    ],
)
def test_a_machine_that_is_too_small(cli, base, text, monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("minilora.model.load_base", fail, raising=False)
    monkeypatch.setattr("minilora.formats.load_base", fail)
    result = cli("evaluate", text, "--base", base)
    assert result.status == 2
    assert result.lines == [line for line in result.lines if message in line]
    assert len(result.lines) == 1


def test_a_name_with_a_newline_stays_on_one_line(refused, base):
    refused("a b", "evaluate", "a\nb", "--base", base)
