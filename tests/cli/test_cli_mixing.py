"""Several adapters on one base: in use together, mixed into one, merged and unmerged."""

import json

import numpy as np
import pytest

from minilora import load_adapter, load_base, load_model, mix, save_adapter, save_base, unmerge
from minilora.adapters import LoRAConfig, adapters, lora_init, weight_of
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.tree import flatten

WEIGHTS = (0.7, -0.4)


@pytest.fixture
def both(base, adapter, other_adapter):
    """The options that name the base and both adapters with their weights."""
    options = ["--base", base]
    for folder, weight in zip((adapter, other_adapter), WEIGHTS, strict=True):
        options += ["--adapter", folder, "--weight", weight]
    return options


@pytest.fixture
def parts(base, adapter, other_adapter):
    """Both adapters with their configurations."""
    config = load_base(base)[1]
    return [load_adapter(folder, config) for folder in (adapter, other_adapter)]


@pytest.fixture
def figures(cli):
    """Run a command that must succeed, and read what it writes."""

    def run(*words):
        result = cli(*words, "--json", "x.json")
        assert result.status == 0, result.err
        with open("x.json", encoding="utf-8") as file:
            return json.load(file)

    return run


def dense(lora, lora_config):
    """s A B of every adapted weight, summed in float64."""
    updates = {}
    for path, ab in adapters(lora).items():
        weight, columns = weight_of(path, 16)
        A, B = (ab[name].astype(np.float64) for name in "AB")
        n_out = {"qkv": 48, "up": 64}.get(weight.split(".")[-2], 16)
        update = updates.setdefault(weight, np.zeros((len(A), n_out)))
        update[:, columns] += lora_config.scale_of(path) * A @ B
    return updates


# --- in use together -----------------------------------------------------------------------------


def test_evaluate_is_the_loss_of_the_weighted_sum(figures, both, base, parts, text):
    found = figures("evaluate", text, *both)
    summed = flatten(load_base(base)[0])
    for part, weight in zip(parts, WEIGHTS, strict=True):
        for path, update in dense(*part).items():
            summed[path] = (summed[path] + weight * update).astype(np.float32)
    model = load_model(base)
    for path, weight in flatten(model.base).items():
        weight[...] = summed[path]
    save_base("summed", model.base, model.config)
    expected = figures("evaluate", text, "--base", "summed")
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for others in (both[:4], both[:2]):
        assert abs(figures("evaluate", text, *others)["loss"] - found["loss"]) > 1e-3


def test_without_weights_each_adapter_counts_once(figures, both, text):
    words = [word for word in both if word not in ("--weight", *WEIGHTS)]
    once = figures("evaluate", text, *words)
    ones = [1 if word in WEIGHTS else word for word in both]
    assert once == figures("evaluate", text, *ones)
    assert once != figures("evaluate", text, *both)


def test_options_may_come_in_any_order(figures, both, text):
    weights = [word for weight in WEIGHTS for word in ("--weight", weight)]
    folders = [word for word in both if word not in weights]
    assert figures("evaluate", text, *weights, *folders) == figures("evaluate", text, *both)


def test_generate_speaks_with_the_sum(figures, both):
    words = ("--tokens", 40, "--temperature", 0)
    found = figures("generate", *both, *words)
    assert figures("mix", *both)["parameters"] > 0
    assert found == figures("generate", *both[:2], "--adapter", "mixed", *words)
    assert found != figures("generate", *both[:4], *words)


# --- mixed into one ------------------------------------------------------------------------------


def test_mix_writes_the_weighted_sum_as_one_adapter(figures, both, base, parts):
    found = figures("mix", *both)
    assert found["mix_max_abs_difference"] < 1e-6
    mixed, mixed_config = load_adapter("mixed", load_base(base)[1])
    assert found["parameters"] == sum(factor.size for factor in flatten(mixed).values())
    updates = [dense(*part) for part in parts]
    for path, update in dense(mixed, mixed_config).items():
        expected = sum(w * u[path] for w, u in zip(WEIGHTS, updates, strict=True) if path in u)
        np.testing.assert_allclose(update, expected, rtol=0, atol=1e-6, err_msg=path)
    assert dense(mixed, mixed_config).keys() == updates[0].keys() | updates[1].keys()


def test_mixing_loses_no_digit_that_float32_has(figures, both, base, parts):
    """Powers of two scale without rounding, so the factors written are those of the parts."""
    folders = [word for word in both if word not in ("--weight", *WEIGHTS)]
    figures("mix", *folders, "--weight", 0.5, "--weight", -4)
    mixed, _ = load_adapter("mixed", load_base(base)[1])
    (first, config), (second, other) = ((adapters(part[0]), part[1]) for part in parts)
    for path, ab in adapters(mixed).items():
        A = [part[path]["A"] for part in (first, second) if path in part]
        np.testing.assert_array_equal(ab["A"], np.concatenate(A, axis=1), err_msg=path)
        rank = config.rank_of(path)
        B = first[path]["B"] * np.float32(0.5 * config.scale_of(path))
        np.testing.assert_array_equal(ab["B"][:rank], B, err_msg=path)
        if path in second:
            B = second[path]["B"] * np.float32(-4 * other.scale_of(path))
            np.testing.assert_allclose(ab["B"][rank:], B, rtol=1e-7, err_msg=path)


def test_one_adapter_is_mixed_by_scaling_it(figures, both, adapter, text):
    figures("mix", *both[:4], "--weight", 0.25)
    scaled = figures("evaluate", text, *both[:2], "--adapter", "mixed")
    assert scaled == figures("evaluate", text, *both[:4], "--weight", 0.25)
    assert scaled != figures("evaluate", text, *both[:4])


def test_adapters_of_the_embedding_are_mixed_too(figures, cli, base, text):
    weights, config = load_base(base)
    lora_config = LoRAConfig(rank=2, targets=("embedding",))
    for seed in range(2):
        lora = lora_init(weights, lora_config, seed=seed)
        lora["embedding"]["A"][:] = np.random.default_rng(seed).normal(size=(256, 2))
        save_adapter(f"e{seed}", lora, lora_config, config)
    words = ("--base", base, "--adapter", "e0", "--adapter", "e1")
    figures("mix", *words)
    together = figures("evaluate", text, *words)
    mixed = figures("evaluate", text, "--base", base, "--adapter", "mixed")
    assert mixed["loss"] == pytest.approx(together["loss"], rel=1e-6)
    assert cli("merge", *words).status == 2


def test_the_next_command_uses_the_mixture(cli, both):
    result = cli("mix", *both)
    (line,) = (line for line in result.out.splitlines() if line.startswith("next: minilora "))
    assert cli(*line.removeprefix("next: minilora ").split()).status == 0


# --- merged and unmerged -------------------------------------------------------------------------


def test_merge_adds_the_sum_into_the_weights(figures, both, base, text):
    found = figures("merge", *both)
    assert 0 < found["merge_max_abs_difference"] < 1e-4
    merged = figures("evaluate", text, "--base", "merged")
    assert merged["loss"] == pytest.approx(figures("evaluate", text, *both)["loss"], rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_merge_measures_what_unmerging_leaves(figures, both, base, parts, dtype):
    found = figures("merge", *both, "--dtype", dtype)
    merged, weights = load_base("merged")[0], flatten(load_base(base)[0])
    restored = flatten(unmerge(merged, *mix(parts, WEIGHTS)))
    worst = max(np.abs(restored[path] - weight).max() for path, weight in weights.items())
    assert found["unmerge_max_abs_difference"] == pytest.approx(float(worst))
    unit = {"float32": 1e-6, "float16": 1e-2}[dtype]
    assert unit / 1e3 < worst < unit


def test_a_merged_base_is_unmerged_by_the_opposite_weights(figures, both, base):
    figures("merge", *both)
    opposite = [-word if word in WEIGHTS else word for word in both[2:]]
    figures("merge", "--base", "merged", *opposite, "--out", "restored")
    weights, restored = (flatten(load_base(folder)[0]) for folder in (base, "restored"))
    for path, weight in weights.items():
        np.testing.assert_allclose(restored[path], weight, rtol=0, atol=1e-6, err_msg=path)


# --- in Python -----------------------------------------------------------------------------------


def test_switching_shares_the_base_and_changes_nothing_of_it(base, adapter, other_adapter):
    model = load_model(base)
    before = {path: weight.copy() for path, weight in flatten(model.base).items()}
    tokens = np.arange(20)[None]
    first, second = (model.with_adapters_from(folder) for folder in (adapter, other_adapter))
    assert first.base is second.base is model.base
    np.testing.assert_array_equal(
        first.logits(tokens), load_model(base, adapter).logits(tokens), strict=True
    )
    assert np.abs(first.logits(tokens) - second.logits(tokens)).max() > 0.1
    back = second.with_adapters_from(adapter)
    np.testing.assert_array_equal(back.logits(tokens), first.logits(tokens))
    for path, weight in flatten(model.base).items():
        np.testing.assert_array_equal(weight, before[path], err_msg=path)


def test_one_adapter_with_weight_one_stays_as_it_is(base, adapter):
    """With its own scale and to the last bit: training could go on from it."""
    model = load_model(base)
    lora, lora_config = load_adapter(adapter, model.config)
    for weights in (None, [1.0]):
        found = model.with_adapters_from(adapter, weights=weights)
        assert found.lora_config == lora_config
        for path, factor in flatten(lora).items():
            np.testing.assert_array_equal(flatten(found.lora)[path], factor, err_msg=path)


def test_adapters_have_the_dtype_of_the_base(base, adapter, other_adapter):
    model = load_model(base, dtype=np.float64).with_adapters_from(adapter, other_adapter)
    assert {leaf.dtype for leaf in flatten(model.lora).values()} == {np.dtype(np.float64)}


# --- bad input -----------------------------------------------------------------------------------

COMMANDS = (["merge"], ["mix"], ["generate"], ["evaluate", "text.txt"])
BAD_WEIGHTS = [
    ("adapters: 2, weights: 1; expected a --weight for each --adapter", 1),
    ("adapters: 2, weights: 3", 1, 2, 3),
    ("--weight nan is not a finite number", 1, "nan"),
    ("--weight -inf is not a finite number", "-inf", 1),
    (r"adapter 2, blocks.0.*: B times 1\.\d+e\+200, its weight and scale, is not", 1, 1e200),
]


@pytest.mark.parametrize("case", BAD_WEIGHTS, ids=lambda case: " ".join(map(str, case[1:])))
@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_weights_that_do_not_fit_are_refused(refused, both, text, tmp_path, command, case):
    (tmp_path / "text.txt").write_bytes(text.read_bytes())
    pattern, *weights = case
    words = [word for word in both if word not in ("--weight", *WEIGHTS)]
    refused(pattern, *command, *words, *(f"--weight={weight}" for weight in weights))


def test_a_weight_without_an_adapter_is_refused(refused, base):
    refused("adapters: 0, weights: 1", "generate", "--base", base, "--weight", 1)


@pytest.mark.parametrize("command", COMMANDS[:3], ids=lambda words: words[0])
def test_adapters_of_different_bases_are_refused(refused, base, adapter, tmp_path, command):
    config = GPTConfig(vocab_size=256, n_positions=32, n_embd=16, n_layer=3, n_head=2)
    lora_config = LoRAConfig(rank=2, targets=("o",))
    lora = lora_init(gpt_init(config, seed=0), lora_config, seed=0)
    save_adapter(tmp_path / "foreign", lora, lora_config, config)
    words = ("--base", base, "--adapter", adapter, "--adapter", "foreign")
    refused(r"foreign.*was made for another base.*h\.2\.", *command, *words)


def test_a_sum_that_overflows_is_refused_before_anything_is_written(refused, both):
    words = [1e36 if word in WEIGHTS else word for word in both]
    for command in ("merge", "mix"):
        refused("the logits are not finite", command, *words)
