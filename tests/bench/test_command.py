"""`minilora budget`: what it prints and writes, and what it refuses; the figures of `bench`."""

import json

import numpy as np
import pytest

from minilora import tree
from minilora.bench import command, peft
from minilora.bench.budget import scaled
from minilora.cli import main
from minilora.cli.register import COMMANDS
from minilora.formats import save_base
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.llama import LlamaConfig, llama_init

ROWS = {row.name: row for row in COMMANDS}


@pytest.fixture
def budget(tmp_path, capsys):
    """Run the command: what it prints, and the figures that it writes."""

    def run(*words):
        path = tmp_path / "figures.json"
        status = main(["budget", *map(str, words), "--json", str(path)])
        assert status == 0, capsys.readouterr().err
        return capsys.readouterr().out, json.loads(path.read_text(encoding="utf-8"))

    return run


def test_gpt3_with_rank_4_on_q_and_v_is_the_paper_s(budget):
    _, figures = budget(
        "--model", "gpt3", "--rank", 4, "--targets", "q,v", "--dtype", "float16"
    )  # fmt: skip
    assert set(figures) == {figure.name for figure in ROWS["budget"].figures}
    assert figures["trainable_parameters"] == 18_874_368
    assert figures["adapter_bytes"] == 37_748_736
    assert figures["gradients_bytes"] == figures["adapter_bytes"]
    assert figures["optimizer_bytes"] == 2 * figures["adapter_bytes"]
    assert figures["weights_bytes"] == 2 * figures["base_parameters"] == 349_208_518_656


def test_on_a_gpu_all_queries_are_there_at_once(budget):
    words = "--model", "gpt2", "--context", 1024
    cpu, gpu = (budget(*words, "--device", device)[1] for device in ("cpu", "cuda"))
    assert gpu["activations_bytes"] == cpu["activations_bytes"]
    assert gpu["forward_flops"] > cpu["forward_flops"]
    weights = 4 * 8 * 12 * 1024 * (1024 - 64)  # of one block, float32: those that a CPU never has
    assert gpu["peak_bytes"] > cpu["peak_bytes"] + weights


def test_full_fine_tuning_trains_the_base(budget):
    out, full = budget("--model", "gpt2", "--method", "full")
    assert full["trainable_parameters"] == full["base_parameters"] == 124_439_808
    assert full["adapter_bytes"] == 0
    _, lora = budget("--model", "gpt2")
    assert lora["peak_bytes"] < 0.5 * full["peak_bytes"]
    for figures in (full, lora):  # the table shows both, whichever is written
        for name in ("trainable_parameters", "base_parameters"):
            assert f"{figures[name]:,}" in out
        assert scaled(figures["peak_bytes"], "B") in out
        assert scaled(figures["activations_bytes"], "B") in out


def test_a_folder_s_shape_is_read_without_its_weights(budget, tmp_path):
    config = GPTConfig(11, 16, n_embd=8, n_layer=3, n_head=2, n_inner=20)
    save_base(tmp_path, gpt_init(config, seed=0), config)
    (tmp_path / "model.safetensors").unlink()
    words = ("--base", tmp_path, "--context", 16, "--rank", 2, "--targets", "1.mlp.up")
    out, figures = budget(*words)
    assert "3 blocks, width 8, 2 heads, vocabulary 11" in out
    assert figures["trainable_parameters"] == 2 * (8 + 20)

    document = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    document["tie_word_embeddings"] = False
    (tmp_path / "config.json").write_text(json.dumps(document), encoding="utf-8")
    assert budget(*words)[1]["base_parameters"] == figures["base_parameters"] + 11 * 8


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [(), ("qkv",), ("qkv", "o", "gate", "up", "down")], ids=str)
def test_a_llama_s_folder_is_counted_as_it_is(budget, tmp_path, tied, biased):
    config = LlamaConfig(11, 8, 12, 3, 4, 2, 16, rms_norm_eps=1e-5, head_dim=6)
    base = llama_init(config, seed=0)
    for block in base["blocks"]:
        for name, linear in (*block["attn"].items(), *block["mlp"].items()):
            if name in biased:
                linear["b"] = np.zeros(linear["w"].shape[1], np.float32)
    if not tied:
        base["head"] = base["wte"] + 1.0
    save_base(tmp_path, base, config)
    (tmp_path / "model.safetensors").unlink()
    words = ("--base", tmp_path, "--context", 16, "--rank", 2, "--targets", "k,gate")
    out, figures = budget(*words)
    assert "3 blocks, width 8, 4 heads (2 of k and v), vocabulary 11" in out
    assert figures["base_parameters"] == tree.count(base)
    assert figures["trainable_parameters"] == 3 * 2 * ((8 + 12) + (8 + 12))


def test_sizes_given_replace_the_shape_s(budget):
    words = ("--layers", 48, "--width", 1536, "--heads", 24, "--rank", 16, "--targets", "q,v")
    figures = budget(*words)[1]
    assert figures["trainable_parameters"] == 4_718_592
    other = budget(*words, "--vocabulary", 50258)[1]  # gpt2 has 50257 tokens
    assert other["base_parameters"] == figures["base_parameters"] + 1536


def test_sizes_given_replace_a_llama_s(budget):
    words = ("--model", "smollm2", "--targets", "q,v", "--rank", 4)
    (out, of_smollm2), (_, half) = budget(*words), budget(*words, "--layers", 15)
    assert "30 blocks, width 576, 9 heads (3 of k and v), vocabulary 49,152" in out
    assert half["trainable_parameters"] == of_smollm2["trainable_parameters"] / 2
    wide = budget(*words, "--width", 1152, "--heads", 18)[1]
    assert wide["trainable_parameters"] == 30 * 4 * ((1152 + 1152) + (1152 + 192))


def test_dropout_keeps_masks_and_threads_share_the_batch(budget):
    words = ("--model", "tiny", "--batch", 16, "--context", 256)
    alone = budget(*words)[1]["activations_bytes"]
    assert budget(*words, "--dropout", 0.1)[1]["activations_bytes"] > alone
    out, shared = budget(*words, "--threads", 2)
    assert "4 passes of up to 4 sequences, 2 of them at once" in out
    assert shared["activations_bytes"] == alone / 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "gpt4"], "not 'gpt4'"),
        (["--rank", "0"], "rank 0 is not a whole number of at least 1"),
        (["--rank", "769"], "rank 769 is above the smaller side of blocks.0.attn.qkv"),
        (["--targets", "key"], "unknown target 'key'"),
        (["--batch", "0"], "batch 0 is too small"),
        (["--batch", "9" * 400], "9 is too large; the maximum is 2,147,483,647"),
        (["--context", "1025"], "context 1025 exceeds the model's context of 1024"),
        (["--threads", "-1"], "is not a whole number of at least 0"),
        (["--base", "nowhere"], "nowhere"),
        (["--model", "tiny", "--base", "x"], "--base: cannot be combined with --model"),
        (["--width", "700"], "--width 700 is not a multiple of --heads 12"),
        (["--dropout", "1"], "dropout 1.0 is not in"),
        (["--targets", "gate"], "unknown target 'gate'"),
        (["--model", "smollm2", "--width", "700"], "--width 700 is not a multiple of --heads 9"),
        (["--model", "smollm2", "--heads", "8"], "--heads 8 is not a multiple of num_key_value"),
        (["--model", "smollm2", "--targets", "v", "--rank", "193"], "a weight of 576 × 192"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_bad_options_are_refused_in_a_sentence(capsys, words, message):
    assert main(["budget", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("minilora: ") and printed.err.count("\n") == 1
    assert message in printed.err


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.000 kB"),
        (37_748_736, "37.75 MB"),
        (999_960, "1.000 MB"),
        (349_208_518_656, "349.2 GB"),
        (1.5e21, "1500 EB"),
    ],
)
def test_numbers_are_shown_with_four_digits(value, text):
    assert scaled(value, "B") == text


# --- bench -------------------------------------------------------------------------------------


@pytest.mark.parametrize("versus", ["peft", "1", "recompute"])
def test_bench_writes_the_figures_of_its_options(tmp_path, monkeypatch, capsys, versus):
    """Those that are always there, and of the others the one that the option asks for."""
    monkeypatch.setattr(peft, "check", lambda case: None)
    monkeypatch.setattr(command, "versus_peft", lambda *args: {})
    monkeypatch.setattr(command, "versus_ours", lambda *args: {})
    words = "bench --batch 1 --context 2 --rank 1 --threads 1 --steps 1 --versus"
    assert main([*words.split(), versus, "--json", str(tmp_path / "x.json")]) == 0
    found = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    row, note = ROWS["bench"].figures, f"only with --versus {versus}"
    assert set(found) == {figure.name for figure in row if figure.always or figure.note == note}
    assert len(found) == 1 + sum(figure.always for figure in row)
