"""A mixture is the weighted sum of its adapters' updates, whatever they are made of."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import strict_cupy
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora
from minilora.adapters import TARGETS, LoRAConfig, adapted_paths, adapters, lora_init, weight_of
from minilora.errors import MiniloraError
from minilora.formats import save_adapter, save_base
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.lora import merge
from minilora.mixing import mix
from minilora.network import Net, net_logits
from minilora.tree import flatten, map_leaves

CONFIG = GPTConfig(vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2, n_inner=12)
BASE = gpt_init(CONFIG, seed=0, dtype=np.float64)
TOKENS = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(2, 5))


def an_adapter(targets, *, seed=0, dtype=np.float64, **options):
    """A trained-looking adapter and its configuration."""
    lora_config = LoRAConfig(**{"rank": 2, "alpha": 3.0, "targets": targets, **options})
    rng = np.random.default_rng(seed)
    lora = map_leaves(
        lambda x: rng.standard_normal(x.shape).astype(dtype), lora_init(BASE, lora_config, seed=0)
    )
    return lora, lora_config


def updates(lora, lora_config):
    """The dense update s A B of every base weight that has adapters, q, k, v in their columns."""
    dense = {}
    for path, ab in adapters(lora).items():
        weight, columns = weight_of(path, CONFIG.n_embd)
        update = dense.setdefault(weight, np.zeros_like(flatten(BASE)[weight]))
        update[:, columns] += lora_config.scale_of(path) * ab["A"] @ ab["B"]
    return dense


def weighted_sum(parts, weights):
    total = {}
    for part, weight in zip(parts, weights, strict=True):
        for path, update in updates(*part).items():
            total[path] = total.get(path, 0.0) + weight * update
    return total


def assert_is_the_weighted_sum(mixed, parts, weights):
    actual, expected = updates(*mixed), weighted_sum(parts, weights)
    assert set(actual) == set(expected)
    for path, update in expected.items():
        scale = sum(np.abs(updates(*part).get(path, 0.0)).max() for part in parts)
        np.testing.assert_allclose(actual[path], update, rtol=0, atol=1e-12 * scale, err_msg=path)


# --- exactness -----------------------------------------------------------------------------------

a_part = st.builds(
    an_adapter,
    st.lists(st.sampled_from([*TARGETS, r"1\.\w+\.\w+"]), min_size=1, unique=True).map(tuple),
    seed=st.integers(0, 2**32 - 1),
    rank=st.integers(1, 4),
    alpha=st.sampled_from([0.5, 3.0, 16.0]),
    rslora=st.booleans(),
)
a_weight = st.floats(-2.0, 2.0)


@settings(max_examples=30)
@given(st.lists(st.tuples(a_part, a_weight), min_size=1, max_size=4))
def test_the_mixture_of_any_adapters_is_the_weighted_sum_of_their_updates(weighted):
    parts, weights = zip(*weighted, strict=True)
    mixed, mixed_config = mix(parts, weights)
    assert_is_the_weighted_sum((mixed, mixed_config), parts, weights)
    assert list(adapters(mixed)) == adapted_paths(mixed_config, CONFIG.n_layer)
    assert len(mixed["blocks"]) == CONFIG.n_layer
    for path, ab in adapters(mixed).items():
        assert mixed_config.scale_of(path) == 1.0
        assert ab["A"].shape[1] == ab["B"].shape[0] == mixed_config.rank_of(path)


def test_ranks_alphas_and_patterns_of_each_adapter_are_kept():
    parts = [
        an_adapter(("qkv", "up"), rank=1, alpha=2.0, rank_pattern={r"0\.mlp\.up": 4}),
        an_adapter(("up", "o"), seed=1, rank=3, alpha_pattern={"o": 0.25}, rslora=True),
    ]
    mixed, mixed_config = mix(parts, [0.7, -0.3])
    assert_is_the_weighted_sum((mixed, mixed_config), parts, [0.7, -0.3])
    ranks = {path: ab["A"].shape[1] for path, ab in adapters(mixed).items()}
    assert ranks["blocks.0.mlp.up"] == 7 and ranks["blocks.1.mlp.up"] == 4
    assert ranks["blocks.0.attn.qkv"] == 1 and ranks["blocks.0.attn.o"] == 3


def logits(base, lora=None, lora_config=None):
    return net_logits(Net(base, CONFIG, lora, lora_config), tokens=TOKENS)


def test_a_mixture_computes_the_merged_sum():
    parts = [an_adapter(("q", "v", "down")), an_adapter(("qkv", "k", "o"), seed=1, rank=3)]
    mixed = mix(parts, [0.5, 0.25])
    total = weighted_sum(parts, [0.5, 0.25])
    summed = {path: w + total.get(path, 0.0) for path, w in flatten(BASE).items()}
    for path, weight in flatten(merge(BASE, *mixed)).items():
        np.testing.assert_allclose(weight, summed[path], rtol=0, atol=1e-12, err_msg=path)
    unmerged = logits(BASE, *mixed)
    np.testing.assert_allclose(unmerged, logits(merge(BASE, *mixed)), rtol=0, atol=1e-10)
    assert np.abs(unmerged - logits(BASE)).max() > 1e-3, "the adapters do nothing"


def test_a_mixture_of_embeddings_computes_their_sum():
    """The sum of two adapters on an embedding, seen in the rows that the model reads."""
    parts = [an_adapter(("embedding",)), an_adapter(("embedding", "q"), seed=1, rank=1)]
    mixed = mix(parts, [2.0, 0.5])
    assert_is_the_weighted_sum(mixed, parts, [2.0, 0.5])
    without = mix([parts[0], an_adapter(("q",))], [2.0, 0.0])
    assert np.abs(logits(BASE, *mixed) - logits(BASE, *without)).max() > 1e-3


@pytest.mark.parametrize("rslora", [False, True])
def test_one_adapter_with_weight_one_is_itself(rslora):
    part = an_adapter(TARGETS, rslora=rslora)
    np.testing.assert_allclose(logits(BASE, *mix([part], [1.0])), logits(BASE, *part), rtol=1e-10)


def test_opposite_weights_cancel():
    part = an_adapter(("qkv", "down"))
    np.testing.assert_allclose(
        logits(BASE, *mix([part, part], [1.0, -1.0])), logits(BASE), rtol=0, atol=1e-12
    )


# --- what averaging the factors would give -------------------------------------------------------


def test_averaging_the_factors_is_another_update():
    """½(A₁ + A₂) ½(B₁ + B₂) misses the sum's half by -¼ (A₁ - A₂)(B₁ - B₂) (MIX.4)."""
    parts = [an_adapter(("o",), seed=seed, alpha=2.0) for seed in (0, 1)]
    exact = updates(*mix(parts, [0.5, 0.5]))
    trees = [lora for lora, _ in parts]
    averaged = map_leaves(lambda *x: sum(x) / 2, *trees), parts[0][1]
    cross = map_leaves(lambda x, y: x - y, *trees), parts[0][1]
    for path, update in updates(*averaged).items():
        np.testing.assert_allclose(update - exact[path], -updates(*cross)[path] / 4, atol=1e-12)
        assert np.linalg.norm(update - exact[path]) > 0.3 * np.linalg.norm(exact[path])


def test_averaging_b_is_exact_where_a_is_shared():
    (first, lora_config), (second, _) = (an_adapter(("o",), seed=seed) for seed in (0, 1))
    for block, other in zip(first["blocks"], second["blocks"], strict=True):
        other["attn"]["o"]["A"] = block["attn"]["o"]["A"]
    averaged = map_leaves(lambda x, y: (x + y) / 2, first, second)
    exact = updates(*mix([(first, lora_config), (second, lora_config)], [0.5, 0.5]))
    for path, update in updates(averaged, lora_config).items():
        np.testing.assert_allclose(update, exact[path], atol=1e-12)


# --- manners -------------------------------------------------------------------------------------


def test_mixing_is_pure_and_keeps_the_dtype():
    part = an_adapter(("qkv", "embedding"), dtype=np.float32)
    before = flatten(map_leaves(np.copy, part[0]))
    mixed, _ = mix([part, part], [0.5, 0.5])
    assert all(leaf.dtype == np.float32 for leaf in flatten(mixed).values())
    for leaf in flatten(mixed).values():
        leaf += 1.0
    for path, leaf in flatten(part[0]).items():
        assert np.array_equal(leaf, before[path]), path


def test_a_mixture_is_saved_and_loaded(tmp_path):
    parts = [an_adapter(("q", "v")), an_adapter(("qkv", "up"), seed=1, rank=3, rslora=True)]
    mixed, mixed_config = mix(parts, [0.5, 0.25])
    minilora.save_adapter(tmp_path / "mixed", mixed, mixed_config, CONFIG)
    loaded = minilora.load_adapter(tmp_path / "mixed", CONFIG, dtype=np.float64)
    np.testing.assert_allclose(logits(BASE, *loaded), logits(BASE, mixed, mixed_config), rtol=1e-10)


# --- errors --------------------------------------------------------------------------------------


def of_another_base(n_layer=2, n_embd=8, targets=("o",)):
    config = GPTConfig(vocab_size=11, n_positions=6, n_embd=n_embd, n_layer=n_layer, n_head=2)
    lora_config = LoRAConfig(rank=2, targets=targets)
    return lora_init(gpt_init(config, seed=0, dtype=np.float64), lora_config, seed=0), lora_config


@pytest.mark.parametrize(
    "parts, weights, message",
    [
        ([], [], "no adapters to mix"),
        ([an_adapter(("o",))], [0.5, 0.5], "adapters: 1, weights: 2"),
        ([an_adapter(("o",))], [float("nan")], "weight nan"),
        ([an_adapter(("o",))], [float("inf")], "weight inf"),
        ([an_adapter(("o",)), of_another_base(n_layer=3)], [1, 1], "adapter 2 .* 3 blocks"),
        (
            [an_adapter(("o",)), of_another_base(n_embd=12)],
            [1, 1],
            r"adapter 2, blocks\.0\.attn\.o is for a weight of 12 × 12, "
            "an earlier one for a weight of 8 × 8",
        ),
        (
            [(an_adapter(("o",))[0], LoRAConfig(rank=3, targets=("o",)))],
            [1],
            r"adapter 1, blocks\.0\.attn\.o: A \(8, 2\) and B \(2, 8\) are not of rank 3",
        ),
        (
            [an_adapter(("qkv",)), an_adapter(("o",), dtype=np.float32)],
            [1, 1e39],
            r"adapter 2, blocks\.0\.attn\.o: B times 1\.5e\+39, its weight and scale, is not",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(parts, weights, message):
    with pytest.raises(MiniloraError, match=message):
        mix(parts, weights)


# --- the page ------------------------------------------------------------------------------------


def test_the_equations_of_the_code_are_those_of_the_page():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "mixing.md").read_text(encoding="utf-8")
    tags = re.findall(r"\\tag\{(MIX\.\d)\}", page)
    assert tags == ["MIX.1", "MIX.2", "MIX.3", "MIX.4"]
    code = (root / "minilora" / "mixing.py").read_text(encoding="utf-8")
    assert {f"MIX.{i}" for i in (1, 2, 3)} <= set(re.findall(r"MIX\.\d", code)) <= set(tags)


# --- on a device ---------------------------------------------------------------------------------


def test_a_model_on_a_device_takes_its_adapters_there(tmp_path, monkeypatch):
    """With the stand-in for CuPy, whose arrays refuse to meet those of the host."""
    monkeypatch.setitem(sys.modules, "cupy", strict_cupy.CUPY)
    config = GPTConfig(vocab_size=256, n_positions=6, n_embd=8, n_layer=2, n_head=2, n_inner=12)
    save_base(tmp_path / "base", gpt_init(config, seed=0), config)
    for seed in range(2):
        lora, lora_config = an_adapter(("qkv", "down"), seed=seed, dtype=np.float32)
        save_adapter(tmp_path / str(seed), lora, lora_config, config)
    model = minilora.load_model(tmp_path / "base")
    there = model.on("cuda")
    assert (model.device, there.device) == ("cpu", "cuda")
    folders = [tmp_path / "0", tmp_path / "1"]
    mixed = there.with_adapters_from(*folders, weights=[0.5, 2.0])
    expected = model.with_adapters_from(*folders, weights=[0.5, 2.0]).logits(TOKENS)
    np.testing.assert_allclose(mixed.logits(TOKENS), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mixed.merged().logits(TOKENS), expected, rtol=1e-4, atol=1e-4)
    one = there.with_adapters_from(folders[0])
    again = there.with_adapter(*minilora.mix([(one.lora, one.lora_config)], [2.0]))
    scaled = model.with_adapters_from(folders[0], weights=[2.0]).logits(TOKENS)
    np.testing.assert_allclose(again.logits(TOKENS), scaled, rtol=1e-5, atol=1e-5)
