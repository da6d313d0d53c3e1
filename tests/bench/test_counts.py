"""Parameters and FLOPs by formula, against trees and products that are really there."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import tree
from minilora.adapters import TARGETS, LoRAConfig, lora_init
from minilora.bench.budget import SHAPES, Step, adapter_shapes, base_parameters, flops, value_of
from minilora.bench.products import recorded, recording
from minilora.errors import MiniloraError
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.keep import Plan
from minilora.network import Net, loss_and_grads

configs = st.builds(
    lambda vocab, positions, head, heads, layers, inner: GPTConfig(
        vocab, positions, n_embd=head * heads, n_layer=layers, n_head=heads, n_inner=inner
    ),
    st.integers(3, 9),
    st.integers(4, 9),
    st.integers(1, 3),
    st.integers(2, 3),
    st.integers(1, 3),
    st.none() | st.integers(3, 20),
)
lora_configs = st.builds(
    lambda rank, targets: LoRAConfig(rank=rank, targets=tuple(targets)),
    st.integers(1, 2),
    st.lists(st.sampled_from(TARGETS), min_size=1, unique=True),
)


def test_a_formula_is_a_sum_of_products():
    assert value_of("3 N C + N", {"N": 10, "C": 4}) == 130
    assert value_of("0", {}) == 0
    with pytest.raises(ValueError):
        value_of("N Q", {"N": 10})


@given(configs)
def test_a_base_holds_what_gpt_init_makes(config):
    base = gpt_init(config, seed=0)
    assert base_parameters(config) == tree.count(base)
    base["head"] = base["wte"].copy()
    assert base_parameters(config, tied=False) == tree.count(base)


@given(configs, lora_configs)
def test_adapters_hold_what_lora_init_makes(config, lora_config):
    lora = lora_init(gpt_init(config, seed=0), lora_config, seed=0)
    made = {
        path.removesuffix(".A"): (*a.shape, tree.flatten(lora)[path[:-1] + "B"].shape[1])
        for path, a in tree.flatten(lora).items()
        if path.endswith(".A")
    }
    assert adapter_shapes(config, lora_config) == made
    assert Step(config, lora_config, 1, 1).trainable_parameters == tree.count(lora)
    assert Step(config, None, 1, 1).trainable_parameters == base_parameters(config)


def test_ranks_by_pattern_count():
    config = GPTConfig(5, 4, n_embd=8, n_layer=3, n_head=2)
    patterns = {"1.attn.qkv": 5, "down": 1}
    lora_config = LoRAConfig(rank=2, targets=("qkv", "down"), rank_pattern=patterns)
    lora = lora_init(gpt_init(config, seed=0), lora_config, seed=0)
    assert Step(config, lora_config, 1, 1).adapter_parameters == tree.count(lora)


def test_a_rank_above_the_weight_is_refused_as_by_lora_init():
    with pytest.raises(MiniloraError, match=r"rank 300 is above .* blocks\.0\.attn\.o.* 256 × 256"):
        adapter_shapes(SHAPES["tiny"], LoRAConfig(rank=300, targets=("o",)))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("distilgpt2", 81_912_576),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_the_gpt2_family_has_the_sizes_of_its_published_files(name, parameters):
    assert base_parameters(SHAPES[name]) == parameters


# --- FLOPs ---------------------------------------------------------------------------------------


def products_of_a_step(config, lora_config, *, batch, context, recompute=False):
    """FLOPs of every matrix product that loss_and_grads really computes."""
    rng = np.random.default_rng(0)
    trees, full = {"base": gpt_init(config, seed=0)}, lora_config is None
    if not full:
        trees["lora"] = lora_init(trees["base"], lora_config, seed=0)
    tokens, targets = rng.integers(config.vocab_size, size=(2, batch, context))
    with recording(trees) as log:
        net = Net(config=config, lora_config=lora_config, **recorded(trees))
        plan = Plan(base=full, lora=not full, recompute=recompute)
        loss_and_grads(net, tokens=tokens, targets=targets, plan=plan)
    return sum(product.flops for item in log.items for product in item)


@given(
    configs,
    st.none() | lora_configs,
    st.integers(1, 3),
    st.integers(2, 4),
    st.booleans(),
)
def test_flops_are_those_of_the_products_of_a_step(config, lora_config, batch, context, recompute):
    step = Step(config, lora_config, batch, context, recompute=recompute)
    assert flops(step).total == products_of_a_step(
        config, lora_config, batch=batch, context=context, recompute=recompute
    )


def test_a_long_context_is_counted_by_its_blocks_of_queries():
    config, lora_config = GPTConfig(7, 160, n_embd=8, n_layer=2, n_head=2), LoRAConfig(rank=2)
    step = Step(config, lora_config, batch=2, context=150)
    assert step.pairs == 64 * 64 + 64 * 128 + 22 * 150
    assert flops(step).total == products_of_a_step(config, lora_config, batch=2, context=150)
    assert replace(step, device="cuda").pairs == 150 * 150


def test_blocks_below_the_lowest_adapter_have_no_backward_pass():
    config = GPTConfig(7, 8, n_embd=8, n_layer=3, n_head=2)
    lora_config = LoRAConfig(rank=2, targets=("2.mlp.up",))
    step = Step(config, lora_config, batch=2, context=5)
    assert flops(step).total == products_of_a_step(config, lora_config, batch=2, context=5)
    everywhere = Step(config, LoRAConfig(rank=2, targets=("up",)), batch=2, context=5)
    assert flops(step).backward < 0.5 * flops(everywhere).backward
