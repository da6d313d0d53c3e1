"""Every command that takes a base takes a Llama, and `convert` makes one of a GGUF file."""

import json
import re

import numpy as np
import pytest

from minilora import evaluation, load_model
from minilora.adapters import LoRAConfig, lora_init
from minilora.formats import load_base, save_adapter, save_base
from minilora.formats.tensors import read_tensors
from minilora.llama import Llama3Scaling, LlamaConfig, llama_init
from minilora.tree import flatten, map_leaves

CONFIG = LlamaConfig(
    256, 16, 24, 2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    rms_norm_eps=1e-5, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 16),
)  # fmt: skip
A_RUN = ("--steps", 4, "--batch", 2, "--context", 16, "--rank", 2, "--threads", 1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a byte-level Llama with scaled angles."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    weights = llama_init(CONFIG, seed=0)
    weights["wte"] *= 10.0
    save_base(folder, weights, CONFIG)
    return folder


def an_adapter(folder, *targets, seed=0):
    """Write an adapter whose factors are random, and so do something."""
    lora_config, rng = LoRAConfig(rank=2, targets=targets), np.random.default_rng(seed)
    lora = lora_init(llama_init(CONFIG, seed=0), lora_config, seed=0)
    lora = map_leaves(lambda x: 0.3 * rng.standard_normal(x.shape).astype(x.dtype), lora)
    save_adapter(folder, lora, lora_config, CONFIG)
    return folder


def adapter_tensors(folder):
    return read_tensors(folder / "adapter_model.safetensors")[0]


@pytest.mark.parametrize("targets", ["q,v", "gate,down,embedding", None])
def test_an_adapter_is_trained_and_used(cli, llama, text, tmp_path, targets):
    words = [] if targets is None else ["--targets", targets]
    result = cli("adapt", text, "--base", llama, *A_RUN, *words, "--out", "mine")
    assert result.status == 0, result.err
    assert ("equivalent ones on q_proj, k_proj and v_proj" in result.out) == (targets is None)
    tensors = adapter_tensors(tmp_path / "mine")
    found = {re.search(r"(\w+)\.lora_", name)[1] for name in tensors}
    wanted = (targets or "q,k,v,o,up,down").split(",")
    assert found == {"embed_tokens" if t == "embedding" else f"{t}_proj" for t in wanted}
    again = cli("adapt", text, "--base", llama, *A_RUN, *words, "--out", "mine", "--resume")
    assert "nothing was left to do" in again.out, again.err
    one = cli("evaluate", text, "--base", llama).out
    assert cli("evaluate", text, "--base", llama, "--adapter", "mine").out != one


def test_recompute_trains_the_same_adapter(cli, llama, text, tmp_path):
    for name, more in (("kept", []), ("recomputed", ["--recompute"])):
        words = ("--base", llama, *A_RUN, "--targets", "q,gate", "--out", name)
        assert cli("adapt", text, *words, *more).status == 0
    kept, recomputed = adapter_tensors(tmp_path / "kept"), adapter_tensors(tmp_path / "recomputed")
    for name, tensor in kept.items():
        np.testing.assert_allclose(recomputed[name], tensor, rtol=0, atol=1e-6, err_msg=name)


def test_a_run_that_was_stopped_goes_on_with_the_same_angles(cli, llama, text, tmp_path):
    """The scaling of the angles is among the settings that must be the same."""
    words = ("--base", llama, *A_RUN, "--targets", "q", "--out")
    assert cli("adapt", text, *words, "one").status == 0
    other = tmp_path / "other"
    save_base(other, load_base(llama)[0], LlamaConfig(**vars(CONFIG) | {"rope_scaling": None}))
    result = cli(
        "adapt", text, "--base", other, *A_RUN, "--targets", "q", "--out", "one", "--resume"
    )
    assert result.status == 2 and "rope_scaling [8.0, 1.0, 4.0, 16]" in result.err


def test_a_whole_llama_is_trained_and_opens(cli, llama, text, tmp_path):
    words = ("--base", llama, *A_RUN[:-4], "--method", "full", "--out", "full")
    assert cli("adapt", text, *words).status == 0
    base, config = load_base(tmp_path / "full")
    assert config == CONFIG
    before = flatten(load_base(llama)[0])
    same = [path for path, leaf in flatten(base).items() if np.array_equal(leaf, before[path])]
    assert not same, "every weight was trained"


def test_adapters_are_merged_and_mixed(cli, llama, tmp_path):
    first = an_adapter(tmp_path / "first", "qkv", "gate")
    second = an_adapter(tmp_path / "second", "q", "v", "down", seed=1)
    both = ("--base", llama, "--adapter", first, "--adapter", second)
    for command, figure in (
        ("merge", "merge_max_abs_difference"),
        ("mix", "mix_max_abs_difference"),
    ):
        result = cli(command, *both, "--out", command, "--json", "figures.json")
        assert result.status == 0, result.err
        assert json.loads((tmp_path / "figures.json").read_text())[figure] < 1e-4
    model, tokens = load_model(llama), np.arange(30)[None]
    expected = model.with_adapters_from(first, second).logits(tokens)
    assert np.abs(expected - model.logits(tokens)).max() > 0.1
    merged = load_model(tmp_path / "merge").logits(tokens)
    mixed = model.with_adapters_from(tmp_path / "mix").logits(tokens)
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-3)
    np.testing.assert_allclose(mixed, expected, rtol=0, atol=1e-3)


def test_a_text_is_continued_beyond_the_context(cli, llama):
    result = cli("generate", "hello", "--base", llama, "--tokens", 60, "--temperature", 0)
    assert result.status == 0 and len(result.out) > 5


def test_a_target_of_another_architecture_is_refused_with_those_that_exist(cli, llama, base, text):
    names = "qkv, q, k, v, o, {}up, down, embedding"
    for folder, target, more in ((llama, "c_attn", "gate, "), (base, "gate", "")):
        result = cli("adapt", text, "--base", folder, "--targets", target, "--out", "x")
        assert result.status == 2 and f"targets are {names.format(more)}" in result.lines[0]


def test_a_long_context_is_evaluated_in_windows(cli, llama, text, monkeypatch):
    """Of WINDOW tokens: each is predicted from at most so many before it."""
    whole = cli("evaluate", text, "--base", llama).out
    monkeypatch.setattr(evaluation, "WINDOW", 8)
    assert cli("evaluate", text, "--base", llama).out != whole
    monkeypatch.setattr(evaluation, "WINDOW", 32)
    assert cli("evaluate", text, "--base", llama).out == whole


# --- convert -----------------------------------------------------------------------------------


def test_a_gguf_file_becomes_a_base(cli, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf: install minilora[gguf]")
    from gguf_files import V, a_file

    a_file(tmp_path / "model.gguf")
    words = ("--tokens", 5, "--json", "text.json")
    result = cli("convert", "model.gguf", "base", "--json", "figures.json")
    assert result.status == 0 and "next: minilora generate --base base" in result.out, result.err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["tokens"] == V
    assert figures["bytes"] == (tmp_path / "base" / "model.safetensors").stat().st_size
    assert cli("generate", "hello", "--base", "base", *words).status == 0
    again = cli("convert", "model.gguf", "base")
    assert again.status == 2 and "base already holds config.json" in again.lines[0]
    half = cli("convert", "model.gguf", "half", "--dtype", "float16")
    assert half.status == 0 and (tmp_path / "half" / "config.json").exists()


def test_what_is_no_gguf_file_is_refused_in_one_line(cli, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf: install minilora[gguf]")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for name, message in (
        ("x.gguf", "x.gguf is no GGUF file"),
        ("y.gguf", "y.gguf does not exist"),
    ):
        result = cli("convert", name, "base")
        assert result.status == 2 and len(result.lines) == 1 and message in result.lines[0]
        assert not (tmp_path / "base").exists()
