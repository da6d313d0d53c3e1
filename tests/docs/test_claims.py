"""The figures of docs/claims.md and docs/budget.md: what is arithmetic is recomputed."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

import minilora
from minilora.adapters import LoRAConfig, adapters, lora_init
from minilora.bench.budget import SHAPES, Step, ledger, scaled, value_of
from minilora.cli import main
from minilora.tree import flatten

ROOT = Path(__file__).parents[2]
CLAIMS, BUDGET = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("claims", "budget")
)

PROSE = " ".join(CLAIMS.split())


def run(words):
    """What `minilora` prints for these words."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(word) for word in words]) == 0, words
    return out.getvalue()


@pytest.fixture
def figures(tmp_path):
    """The figures of `minilora budget OPTIONS`, of LoRA or of full fine-tuning."""

    def of(options, method="lora"):
        path = tmp_path / "figures.json"
        run(["budget", *options.split(), "--method", method, "--json", path])
        return json.loads(path.read_text(encoding="utf-8"))

    return of


def table(page, *header):
    """The rows of the one table of a page whose header begins with these cells."""
    found = []
    for text in re.findall(r"(?m)(?:^\|.*\|\n){2,}", page + "\n"):
        first, _, *rows = (
            [cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines()
        )
        if first[: len(header)] == list(header):
            found.append(rows)
    (rows,) = found
    return rows


def total_flops(figures):
    return figures["forward_flops"] + figures["backward_flops"]


# --- the ledger's page ---------------------------------------------------------------------------


def test_the_page_shows_what_the_command_prints():
    ((command, printed),) = re.findall(r"\$ minilora (budget .*)\n((?:.*\n)+?)```", BUDGET)
    assert run(command.split()) == printed


SHAPES_OF_PAGE = {
    name: "--model gpt3 --dtype float16" if name == "gpt3" else f"--model {name}"
    for name in ("distilgpt2", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt3")
}
SEQUENCE = {
    name: f"{options} --batch 1 --context {SHAPES[name].n_positions}"
    for name, options in SHAPES_OF_PAGE.items()
}


def test_parameters_of_the_models(figures):
    expected = []
    for name, options in SHAPES_OF_PAGE.items():
        found = figures(options)
        base, trained = found["base_parameters"], found["trainable_parameters"]
        expected.append([name, f"{base:,}", f"{trained:,}", f"{trained / base:.3%}"])
    assert table(BUDGET, "model", "base", "LoRA") == expected


def test_bytes_that_live_as_long_as_the_training(figures):
    expected = []
    for name, options in SHAPES_OF_PAGE.items():
        full, lora = figures(options, "full"), figures(options)
        states = (x["gradients_bytes"] + x["optimizer_bytes"] for x in (full, lora))
        row = [name, scaled(full["weights_bytes"], "B"), *(scaled(x, "B") for x in states)]
        expected.append(row)
    assert table(BUDGET, "model", "weights") == expected


def test_the_peaks(figures):
    expected = []
    for name, options in SEQUENCE.items():
        both = figures(options, "full"), figures(options)
        keys = ("activations_bytes", "peak_bytes")
        expected.append([name, *(scaled(x[key], "B") for key in keys for x in both)])
    assert table(BUDGET, "model", "activations, full") == expected


def test_flops_of_the_models(figures):
    expected = []
    for name, options in SEQUENCE.items():
        full, lora = (total_flops(figures(options, method)) for method in ("full", "lora"))
        expected.append([name, scaled(full, "FLOP"), scaled(lora, "FLOP"), f"{lora / full:.3f}"])
    assert table(BUDGET, "model", "full", "LoRA", "LoRA / full") == expected


def test_what_a_rank_adds_to_the_flops(figures):
    options = "--model gpt2-xl --rank {} --targets qkv,o,up,down --batch 8 --context 128"
    full = total_flops(figures(options.format(1), "full"))
    rows = table(BUDGET, "rank", "LoRA", "LoRA / full")
    assert [rank for rank, *_ in rows] == ["1", "64", "256", "1600"]
    for rank, *cells in rows:
        lora = total_flops(figures(options.format(rank)))
        assert cells == [scaled(lora, "FLOP"), f"{lora / full:.3f}"], rank
    assert f"fine-tuning takes {scaled(full, 'FLOP')}:" in " ".join(BUDGET.split())


def test_the_tables_of_distilgpt2():
    config = SHAPES["distilgpt2"]
    tables = (config.vocab_size + config.n_positions) * config.n_embd
    share = tables / Step(config, None).base_parameters
    assert f"they are {share:.0%} of".replace("%", " %") in " ".join(BUDGET.split())


def test_what_recomputing_saves(figures):
    saved = {}
    for method in ("lora", "full"):
        kept, with_recompute = (
            figures(f"--model gpt2{option}", method)["activations_bytes"]
            for option in ("", " --recompute")
        )
        saved[method] = 100 * (1 - with_recompute / kept)
    text = f"keeps {saved['lora']:.0f} % less with LoRA and {saved['full']:.0f} % less in full"
    assert text in " ".join(BUDGET.split())


def test_the_formulas_are_those_of_the_ledger():
    lora_config = LoRAConfig(rank=3, targets=("qkv", "o", "up", "down"), dropout=0.5)
    steps = [
        Step(SHAPES["tiny"], c) for c in (None, LoRAConfig(rank=3, targets=("qkv",)), lora_config)
    ]
    sizes = {**steps[0].sizes, "R": 3}
    in_ledger = {line.numbers for step in steps for line in ledger(step)}
    on_page = {row[1] for row in table(BUDGET, "what a pair keeps")}
    values = set()
    for formula in on_page:
        for inputs in "CF" if "I" in formula.split() else "C":
            values.add(value_of(formula, {**sizes, "I": sizes[inputs]}))
    assert values == in_ledger


# --- the claims ----------------------------------------------------------------------------------

MODELS = {
    "RoBERTa base": "--layers 12 --width 768",
    "RoBERTa large": "--layers 24 --width 1024 --heads 16",
    "DeBERTa XXL": "--layers 48 --width 1536 --heads 24",
    "GPT-2 medium": "--model gpt2-medium",
    "GPT-2 large": "--model gpt2-large",
    "GPT-3 175B": "--model gpt3",
}
GPT3 = "--model gpt3 --rank 4 --targets q,v --dtype float16"


def test_the_paper_s_counts(figures):
    rows = table(CLAIMS, "model, rank", "printed", "computed")
    assert len(rows) == 8
    for named, _, computed in rows:
        name, rank = named.rsplit(", ", 1)
        found = figures(f"{MODELS[name]} --rank {rank} --targets q,v")["trainable_parameters"]
        assert computed == f"{found:,}", named


def test_gpt3_s_checkpoints_and_memory(figures):
    full, lora = figures(GPT3, "full"), figures(GPT3)
    trained = [x["trainable_parameters"] for x in (full, lora)]
    ratio = f"{trained[0] / trained[1]:,.0f}"
    assert table(CLAIMS, "", "full", "LoRA", "ratio") == [
        ["trained numbers", *(f"{x:,}" for x in trained), ratio],
        ["their bytes in float16", *(scaled(2 * x, "B") for x in trained), ratio],
    ]
    for _, each, total in table(CLAIMS, "what is counted, GPT-3"):
        assert total == scaled(int(each) * full["base_parameters"], "B")
    state = lora["gradients_bytes"] + lora["optimizer_bytes"]
    assert f"LoRA's own gradients and moments are {scaled(state, 'B')}" in PROSE
    one = figures(f"{GPT3} --batch 1 --context 2048")["activations_bytes"]
    assert f"{scaled(one, 'B')} of activations for a single sequence" in PROSE
    share = total_flops(lora) / total_flops(full)
    assert f"LoRA takes {share:.3f} of the FLOPs" in PROSE
    options = f"{GPT3} --batch 8 --context 128 --recompute"
    share = total_flops(figures(options)) / total_flops(figures(options, "full"))
    again = 2 * 8 / 12  # per weight and token: all maps of a block but down, of 4 C² in 12 C²
    assert share == pytest.approx((2 + again + 2) / (2 + again + 4), abs=2e-3)
    reason = "minilora does not compute the last product of a block a second time, so its ratio is"
    assert f"{reason} {share:.3f} (" in PROSE
    eight = 8 * full["base_parameters"]
    assert f"The third is {eight / 2**40:.3f} TiB" in PROSE
    assert 6 * full["base_parameters"] < 1.2e12 < eight, "between the second row and the third"
    of_paper = 175_255.8e6
    more = of_paper / full["base_parameters"] - 1
    assert f"{more:.2%} more than".replace("%", " %") in PROSE
    assert f"with that count the ratio is {of_paper / trained[1]:,.0f}" in PROSE
    small = figures("--model gpt2 --rank 4 --targets q,v")
    times = small["base_parameters"] / small["trainable_parameters"]
    assert f"`: {times:.0f} times" in PROSE


def test_shares_of_learned_parameters(figures):
    for name, *shares in table(CLAIMS, "shape", "LoRA r=8 on qkv"):
        for share, targets in zip(shares, ("qkv", "qkv,o,up,down"), strict=True):
            found = figures(f"--model {name} --rank 8 --targets {targets}")
            assert share == f"{found['trainable_parameters'] / found['base_parameters']:.3%}"


def test_the_memory_of_gpt2_xl(figures):
    keys = ("weights_bytes", "adapter_bytes", "gradients_bytes", "optimizer_bytes")
    both = [figures("--model gpt2-xl", method) for method in ("full", "lora")]
    *rows, (_, *together) = table(CLAIMS, "", "full", "LoRA r=8 on qkv")
    for key, (_, *cells) in zip(keys, rows, strict=True):
        assert cells == [scaled(x[key], "B") for x in both]
    assert together == [scaled(sum(x[key] for key in keys), "B") for x in both]


def test_figures_that_need_no_model():
    assert f"43.1 / 32.5 = {43.1 / 32.5:.3f}" in PROSE
    assert f"{1 - 32.5 / 43.1:.1%}".replace("%", " %") + " less time" in PROSE
    assert f"a speedup of {1 / (1 - 0.76):.1f}" in PROSE
    assert f"65 / 150 is {65 / 150:.1%}".replace("%", " %") in PROSE
    assert f"{32.5 * 3600 * 1e7 / 1e12:.2f} \\cdot 10^{{12}}" in PROSE
    days = [f"{1e7 / gpus / 24:.0f} days on {gpus:,}" for gpus in (1024, 10_000)]
    assert f"are {days[0]} GPUs and {days[1]}," in PROSE
    assert f"is {6.91 / 0.32:.1f} times the 0.32" in PROSE
    assert f"and {6.91 / 0.02:.0f} times the 0.02" in PROSE


def test_gpt2_trains_more_than_a_percent_at_rank_16(figures):
    shares = []
    for rank in (8, 16):
        found = figures(f"--model gpt2 --rank {rank} --targets qkv,o,up,down")
        shares.append(found["trainable_parameters"] / found["base_parameters"])
    assert shares[0] < 0.01 < shares[1]


def test_an_adapter_s_update_is_of_low_rank_and_its_weight_is_not():
    base = minilora.load_model().base
    config = LoRAConfig(rank=3, targets=("qkv", "o", "up", "down"))
    rng = np.random.default_rng(0)
    for path, ab in adapters(lora_init(base, config, seed=0)).items():
        W = flatten(base)[f"{path}.w"]
        assert np.linalg.matrix_rank(W) == min(W.shape), path
        B = rng.standard_normal(ab["B"].shape)
        assert np.linalg.matrix_rank(ab["A"] @ B) == 3 < min(W.shape), path


def test_what_lora_recovers_is_what_the_base_s_card_says():
    card = (ROOT / "minilora" / "base" / "README.md").read_text(encoding="utf-8")
    for targets, share in (("r=2 on qkv, o, up, down", "78.2%"), ("r=7 on q, v", "55.8%")):
        rows = [row for row in table(card, "method") if row[0] == f"LoRA {targets}"]
        assert max(row[5] for row in rows) == share
        assert share.replace("%", " %") in PROSE and rows[0][3].replace("%", " %") in PROSE


# --- what docs/claims.py measures ----------------------------------------------------------------


@pytest.fixture(scope="module")
def script(import_file):
    return import_file("docs/claims.py")


def test_training_changes_adapters_alone(script):
    _, (_, _, _, base), (_, _, arrays, adapters) = script.frozen(quick=True)
    assert base == "0"
    assert adapters == arrays
    assert table(CLAIMS, "tree", "numbers")[0][3] == "0"


def test_cost_compares_whole_steps(script):
    header, *rows = script.cost(quick=True)
    assert [row[0] for row in rows] == ["tiny"]
    assert all(float(ratio) > 1 for ratio in rows[0][2:])
    assert len(table(CLAIMS, *header)) == 3


def test_switch_measures_what_the_page_shows(script):
    _, *rows = script.switch(quick=True)
    bytes_of = {name: int(size.replace(",", "")) for name, size, _ in rows if size}
    assert bytes_of["load an adapter"] < bytes_of["load a fine-tuned base"] / 50
    on_page = [row[0] for row in table(CLAIMS, "what", "bytes")]
    assert [row[0] for row in rows] == on_page


def test_similarity_of_subspaces(script):
    identity = np.eye(8)
    assert script.similarity(identity, identity, 2, 6) == pytest.approx(1.0)
    assert script.similarity(identity[:, :3], identity[:, 3:], 3, 5) == 0.0
    assert script.similarity(identity[:, :3], identity[:, 1:], 3, 4) == pytest.approx(2 / 3)
    assert script.projection_distance(identity[:, :3], identity[:, 1:4]) == pytest.approx(1.0)


def test_random_subspaces_have_the_baseline_s_similarity(script):
    for pair, mean, baseline, right, printed in list(script.random(quick=True))[1:]:
        assert float(mean) == pytest.approx(float(baseline), abs=0.01)
        if right:
            assert right == mean
        if pair in ("8, 8", "64, 64"):
            assert float(printed) < 0


def test_the_page_names_only_what_exists():
    for page in (CLAIMS, BUDGET):
        for path, test in re.findall(r"`((?:tests|docs|tutorials)/[\w/]+\.py)(?:::(\w+))?", page):
            text = (ROOT / path).read_text(encoding="utf-8")
            assert not test or f"def {test}(" in text, f"{path}::{test}"
        for anchor in re.findall(r"\]\(#([\w-]+)\)", page):
            assert f"\n({anchor})=\n" in page, anchor
