"""Merging against PEFT's merge_and_unload, weight by weight, and what unmerging leaves behind."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.adapters import TARGETS, LoRAConfig
from minilora.cli import main
from minilora.errors import MiniloraError
from minilora.formats import save_base
from minilora.gpt2 import GPTConfig
from minilora.lora import merge, unmerge
from minilora.mixing import mix
from minilora.model import load_model
from minilora.network import Net, net_logits
from minilora.tree import flatten

pytestmark = pytest.mark.oracle

CONFIG = GPTConfig(vocab_size=11, n_positions=8, n_embd=12, n_layer=2, n_head=2, n_inner=20)
# Relative to each weight's largest entry: exact but for the order of additions, and rounding.
TOLERANCE = {np.float64: 1e-12, np.float32: 1e-6}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)

lora_configs = st.builds(
    LoRAConfig,
    rank=st.integers(1, 5),
    alpha=st.sampled_from([0.5, 3.0, 16.0]),
    targets=st.lists(
        st.sampled_from([target for target in TARGETS if target != "embedding"]),
        min_size=1,
        unique=True,
    ).map(tuple),
    rslora=st.booleans(),
    rank_pattern=st.sampled_from([{}, {r"blocks\.0\..*": 2}]),
    alpha_pattern=st.sampled_from([{}, {r"1\.\w+\.\w+": 5.0}]),
)


@each_dtype
@settings(max_examples=15)
@given(lora_config=lora_configs, seed=st.integers(0, 2**32 - 1))
def test_merged_weights_are_peft_s(twin, make_model, worst, dtype, lora_config, seed):
    net = make_model(CONFIG, lora_config, seed=seed, dtype=dtype)
    theirs = twin(net).merged()
    found = worst(merge(net.base, net.lora, lora_config), theirs)
    assert found.error < TOLERANCE[dtype], found
    assert worst(net.base, theirs).error > 1e-3, "the adapters do nothing"


@each_dtype
def test_unmerged_weights_differ_from_the_base_by_rounding_alone(twin, make_model, dtype):
    """By at most one unit in the last place of the merged weight, as PEFT's own do."""
    lora_config = LoRAConfig(rank=2, alpha=3.0, targets=("qkv", "o", "up", "down"))
    net = make_model(CONFIG, lora_config, seed=0, dtype=dtype)
    base, lora = net.base, net.lora
    merged = flatten(merge(base, lora, lora_config))
    restored = flatten(unmerge(merge(base, lora, lora_config), lora, lora_config))
    model = twin(net)
    model.model.merge_adapter()
    model.model.unmerge_adapter()
    for path, weight in flatten(base).items():
        unit = np.spacing(np.maximum(np.abs(merged[path]), np.abs(weight)))
        for whose, back in (("ours", restored[path]), ("PEFT", model.base[path].detach().numpy())):
            units = np.abs(back - weight) / unit
            assert units.max() <= 1.0, f"{whose}: {path} is {units.max()} units away"
    assert any(np.any(restored[path] != weight) for path, weight in flatten(base).items())


def test_a_merged_embedding_would_change_the_tied_head(twin, make_model):
    """PEFT merges into the table that the head shares, so its logits change; minilora refuses."""
    import torch

    lora_config = LoRAConfig(rank=2, targets=("embedding",))
    net = make_model(CONFIG, lora_config, seed=0, dtype=np.float64)
    tokens = np.arange(8)[None]
    model = twin(net)
    before = model(tokens).detach().numpy()
    merged = model.model.merge_and_unload()
    after = merged(input_ids=torch.from_numpy(tokens)).logits.detach().numpy()
    assert np.abs(after - before).max() > 1e-3
    with pytest.raises(MiniloraError, match="embedding"):
        merge(net.base, net.lora, lora_config)


@settings(max_examples=15)
@given(
    configs=st.lists(lora_configs, min_size=2, max_size=3),
    weights=st.lists(st.sampled_from([0.25, 0.7, 1.0, 3.0]), min_size=3, max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_mixture_is_peft_s_combination_by_concatenation(twin, make_model, configs, weights, seed):
    """PEFT's add_weighted_adapter: "cat" gives the weighted sum of any ranks, scales and targets.

    It wants them all on the same modules.
    """
    base = make_model(CONFIG, configs[0], seed=seed, dtype=np.float64).base
    same = {"targets": configs[0].targets, "rank_pattern": {}, "alpha_pattern": {}}
    configs = [replace(config, **same) for config in configs]
    configs[0] = replace(configs[0], rslora=False)  # PEFT gives the sum the first's, and so its √R
    parts = [
        (make_model(CONFIG, config, seed=seed + i, dtype=np.float64).lora, config)
        for i, config in enumerate(configs)
    ]
    weights = weights[: len(parts)]
    model = twin(Net(base, CONFIG, *parts[0]))
    names = ["default"]
    for i, part in enumerate(parts[1:]):
        names.append(f"adapter{i}")
        model.add_adapter(*part, name=names[-1])
    model.model.add_weighted_adapter(names, weights, "mixed", combination_type="cat")
    model.model.set_adapter("mixed")
    tokens = np.arange(8)[None]
    theirs = model(tokens).detach().numpy()
    ours = net_logits(Net(base, CONFIG, *mix(parts, weights)), tokens=tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * np.abs(theirs).max())
    plain = net_logits(Net(base, CONFIG), tokens=tokens)
    assert np.abs(ours - plain).max() > 1e-3, "the adapters do nothing"


def test_peft_s_linear_combination_has_the_cross_terms(twin, make_model):
    """The other combination averages the factors: another model."""
    lora_config = LoRAConfig(rank=2, alpha=3.0, targets=("qkv", "down", "embedding"))
    net = make_model(CONFIG, lora_config, seed=0, dtype=np.float64)
    first, second = net.lora, make_model(CONFIG, lora_config, seed=1, dtype=np.float64).lora
    model = twin(net)
    model.add_adapter(second, lora_config, name="second")

    def peft_logits(combination: str) -> np.ndarray:
        adapters = ["default", "second"]
        model.model.add_weighted_adapter(adapters, [0.7, 0.4], combination, combination)
        model.model.set_adapter(combination)
        return model(tokens).detach().numpy()

    tokens = np.arange(8)[None]
    mixed = mix([(first, lora_config), (second, lora_config)], [0.7, 0.4])
    ours = net_logits(Net(net.base, CONFIG, *mixed), tokens=tokens)
    np.testing.assert_allclose(ours, peft_logits("cat"), rtol=0, atol=1e-11)
    assert np.abs(ours - peft_logits("linear")).max() > 1e-2


@pytest.mark.filterwarnings("ignore")
def test_peft_loads_what_mix_writes(tmp_path, monkeypatch, make_model):
    """Adapters that PEFT made, mixed and merged by the commands, are what PEFT makes of them."""
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    import peft
    import torch
    from transformers import GPT2LMHeadModel

    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, vocab_size=256)
    net = make_model(config, None, seed=0, dtype=np.float32)
    save_base("base", net.base, config)
    model = GPT2LMHeadModel.from_pretrained("base")
    options = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    first = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "c_fc"], **options)
    second = peft.LoraConfig(
        r=2, lora_alpha=2, use_rslora=True, target_modules=["c_attn", "c_fc"], **options
    )
    model = peft.get_peft_model(model, first, adapter_name="first")
    model.add_adapter("second", second)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained("adapters")
    model.add_weighted_adapter(["first", "second"], [0.7, 0.3], "sum", combination_type="cat")
    model.set_adapter("sum")
    tokens = np.arange(8)[None]

    def logits_of(model: Any) -> np.ndarray:
        with torch.no_grad():
            return model.eval()(torch.from_numpy(tokens)).logits.numpy()

    expected = logits_of(model)
    words = [*("--base", "base"), *("--adapter", "adapters/first", "--weight", "0.7")]
    words += ["--adapter", "adapters/second", "--weight", "0.3"]
    assert main(["mix", *words]) == 0
    assert main(["merge", *words]) == 0
    mixed = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained("base"), "mixed")
    merged = GPT2LMHeadModel.from_pretrained("merged")
    close = {"rtol": 0, "atol": 1e-5 * np.abs(expected).max()}
    np.testing.assert_allclose(logits_of(mixed), expected, **close)
    np.testing.assert_allclose(logits_of(merged), expected, **close)
    np.testing.assert_allclose(load_model("base", "mixed").logits(tokens), expected, **close)
    alone = logits_of(GPT2LMHeadModel.from_pretrained("base"))
    assert np.abs(expected - alone).max() > 0.1
