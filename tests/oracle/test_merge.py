"""Merging against PEFT's merge_and_unload, weight by weight, and what unmerging leaves behind."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.errors import MiniloraError
from minilora.gpt import GPTConfig, gpt_logits
from minilora.lora import TARGETS, LoRAConfig, merge, unmerge
from minilora.mix import mix
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
    base, lora = make_model(CONFIG, lora_config, seed=seed, dtype=dtype)
    theirs = twin(base, CONFIG, lora, lora_config).merged()
    found = worst(merge(base, lora, lora_config), theirs)
    assert found.error < TOLERANCE[dtype], found
    assert worst(base, theirs).error > 1e-3, "the adapters do nothing"


@each_dtype
def test_unmerged_weights_differ_from_the_base_by_rounding_alone(twin, make_model, dtype):
    """By at most one unit in the last place of the merged weight, as PEFT's own do."""
    lora_config = LoRAConfig(rank=2, alpha=3.0, targets=("qkv", "o", "up", "down"))
    base, lora = make_model(CONFIG, lora_config, seed=0, dtype=dtype)
    merged = flatten(merge(base, lora, lora_config))
    restored = flatten(unmerge(merge(base, lora, lora_config), lora, lora_config))
    model = twin(base, CONFIG, lora, lora_config)
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
    base, lora = make_model(CONFIG, lora_config, seed=0, dtype=np.float64)
    tokens = np.arange(8)[None]
    model = twin(base, CONFIG, lora, lora_config)
    before = model(tokens).detach().numpy()
    merged = model.model.merge_and_unload()
    after = merged(input_ids=torch.from_numpy(tokens)).logits.detach().numpy()
    assert np.abs(after - before).max() > 1e-3
    with pytest.raises(MiniloraError, match="embedding"):
        merge(base, lora, lora_config)


def test_a_mixture_is_peft_s_combination_by_concatenation(twin, make_model):
    """PEFT's add_weighted_adapter: "cat" gives the weighted sum, "linear" has the cross-terms."""
    lora_config = LoRAConfig(rank=2, alpha=3.0, targets=("qkv", "down", "embedding"))
    base, first = make_model(CONFIG, lora_config, seed=0, dtype=np.float64)
    _, second = make_model(CONFIG, lora_config, seed=1, dtype=np.float64)
    model = twin(base, CONFIG, first, lora_config)
    model.add_adapter(second, lora_config, name="second")

    def peft_logits(combination: str) -> np.ndarray:
        adapters = ["default", "second"]
        model.model.add_weighted_adapter(adapters, [0.7, 0.4], combination, combination)
        model.model.set_adapter(combination)
        return model(tokens).detach().numpy()

    tokens = np.arange(8)[None]
    mixed, mixed_config = mix([(first, lora_config), (second, lora_config)], [0.7, 0.4])
    ours = gpt_logits(base, mixed, tokens=tokens, config=CONFIG, lora_config=mixed_config)
    np.testing.assert_allclose(ours, peft_logits("cat"), rtol=0, atol=1e-11)
    assert np.abs(ours - peft_logits("linear")).max() > 1e-2
