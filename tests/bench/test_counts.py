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
from minilora.llama import LlamaConfig, llama_init
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
llama_configs = st.builds(
    lambda vocab, width, inner, layers, groups, shared, half: LlamaConfig(
        vocab, width, inner, layers, groups * shared, groups, 9, rms_norm_eps=0.1, head_dim=2 * half
    ),
    st.integers(3, 9),
    st.integers(2, 9),
    st.integers(3, 20),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 2),
)
biases = st.sets(st.sampled_from(["qkv", "o", "gate", "up", "down"]))


def lora_configs(*targets):
    return st.builds(
        lambda rank, targets: LoRAConfig(rank=rank, targets=tuple(targets)),
        st.integers(1, 2),
        st.lists(st.sampled_from(targets), min_size=1, unique=True),
    )


gpts = st.tuples(configs, lora_configs(*TARGETS))
llamas = st.tuples(llama_configs, lora_configs(*TARGETS, "gate"))


def base_of(config, biased=()):
    """A base, in a Llama with biases on these linear maps of each block."""
    if isinstance(config, GPTConfig):
        return gpt_init(config, seed=0)
    base = llama_init(config, seed=0)
    for block in base["blocks"]:
        for name, linear in (*block["attn"].items(), *block["mlp"].items()):
            if name in biased:
                linear["b"] = np.zeros(linear["w"].shape[1], np.float32)
    return base


def test_a_formula_is_a_sum_of_products():
    assert value_of("3 N C + N", {"N": 10, "C": 4}) == 130
    assert value_of("0", {}) == 0
    with pytest.raises(ValueError):
        value_of("N Q", {"N": 10})


@given(configs | llama_configs, biases)
def test_a_base_holds_what_its_init_makes(config, biased):
    base = base_of(config, biased)
    assert base_parameters(config, biased=biased) == tree.count(base)
    base["head"] = base["wte"].copy()
    assert base_parameters(config, biased=biased, tied=False) == tree.count(base)


@given(gpts | llamas)
def test_adapters_hold_what_lora_init_makes(case):
    config, lora_config = case
    lora = lora_init(base_of(config), lora_config, seed=0)
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
        ("smollm2", 134_515_008),
    ],
)
def test_named_shapes_have_the_sizes_of_its_published_files(name, parameters):
    assert base_parameters(SHAPES[name]) == parameters


# --- FLOPs ---------------------------------------------------------------------------------------


def products_of_a_step(config, lora_config, *, batch, context, recompute=False, biased=()):
    """FLOPs of every matrix product that loss_and_grads really computes."""
    rng = np.random.default_rng(0)
    trees, full = {"base": base_of(config, biased)}, lora_config is None
    if not full:
        trees["lora"] = lora_init(trees["base"], lora_config, seed=0)
    tokens, targets = rng.integers(config.vocab_size, size=(2, batch, context))
    with recording(trees) as log:
        net = Net(config=config, lora_config=lora_config, **recorded(trees))
        plan = Plan(base=full, lora=not full, recompute=recompute)
        loss_and_grads(net, tokens=tokens, targets=targets, plan=plan)
    return sum(product.flops for item in log.items for product in item)


@given(
    gpts | llamas | st.tuples(configs | llama_configs, st.none()),
    biases,
    st.integers(1, 3),
    st.integers(2, 4),
    st.booleans(),
)
def test_flops_are_those_of_the_products_of_a_step(case, biased, batch, context, recompute):
    config, lora_config = case
    step = Step(config, lora_config, batch, context, recompute=recompute, biased=biased)
    assert flops(step).total == products_of_a_step(
        config, lora_config, batch=batch, context=context, recompute=recompute, biased=biased
    )


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(7, 160, n_embd=8, n_layer=2, n_head=2),
        LlamaConfig(7, 8, 12, 2, 4, 2, 160, rms_norm_eps=0.1),
    ],
    ids=["GPT-2", "Llama"],
)
def test_a_long_context_is_counted_by_its_blocks_of_queries(config):
    lora_config = LoRAConfig(rank=2)
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
