"""The floor holds the products of a step: each of them, in its shape, and nothing else."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.bench import budget
from minilora.bench.case import Case
from minilora.bench.measure import products_of, random_model
from minilora.bench.products import (
    Operand,
    Product,
    Recorded,
    prepare,
    recorded,
    recording,
    repeat,
    repeat_timed,
)
from minilora.gpt2 import GPTConfig
from minilora.keep import Plan
from minilora.llama import LlamaConfig
from minilora.network import Net, loss_and_grads
from minilora.tree import flatten
from minilora.workers import Workers

CONFIG = GPTConfig(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2, n_inner=12)
LLAMA = LlamaConfig(11, 8, 12, 2, 4, 2, 16, rms_norm_eps=1e-5)


def items_of(case):
    """The products of each shard of a case."""
    model = random_model(case)
    return products_of(case, model), model


def all_of(case):
    return [product for products in items_of(case)[0] for product in products]


@st.composite
def cases(draw):
    config = draw(st.sampled_from([CONFIG, LLAMA]))
    names = ["qkv", "q", "v", "o", "up", "down", *(["gate"] if config is LLAMA else [])]
    targets = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    return Case(
        config,
        method=draw(st.sampled_from(["lora", "full"])),
        batch=draw(st.integers(1, 4)),
        context=draw(st.integers(1, 16)),
        rank=draw(st.integers(1, 4)),  # a Llama's v has 4 columns
        targets=tuple(targets),
        threads=draw(st.integers(1, 3)),
    )


@given(cases())
def test_a_steps_products_take_the_flops_of_the_formula(case):
    lora_config = case.lora_config if case.method == "lora" else None
    step = budget.Step(case.config, lora_config, case.batch, case.context)
    assert sum(product.flops for product in all_of(case)) == budget.flops(step).total


@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_shard_is_recorded_for_itself(method):
    case = Case(CONFIG, method=method, batch=5, context=8, threads=2)
    (outside, *items), _ = items_of(case)
    assert outside == []
    rows = [shard.stop - shard.start for shard in Workers(2).shards(5, 8)]
    assert rows == [2, 3]
    for count, products in zip(rows, items, strict=True):
        alone = all_of(replace(case, batch=count, threads=1))
        assert [(p.a.shape, p.b.shape) for p in products] == [(p.a.shape, p.b.shape) for p in alone]


def test_an_evaluation_has_the_products_of_the_forward_pass():
    case = Case(CONFIG, what="evaluate", batch=2, context=8, threads=1)
    step = budget.Step(CONFIG, None, 2, 8)
    assert sum(product.flops for product in all_of(case)) == budget.flops(step).forward


def test_a_generation_reads_every_token_once():
    """Except for attention, whose products are those of one row for each token."""
    case = Case(CONFIG, what="generate", context=6, threads=1)
    heads = [p for p in all_of(case) if p.b.shape == (8, 11)]
    assert [p.a.shape for p in heads] == [(1, 8)] * 6
    weights = {(8, 24), (8, 8), (8, 12), (12, 8)}
    rows = [p.a.shape[0] for p in all_of(case) if p.b.shape in weights]
    assert rows == [8] * 8 + [1] * 8 * 5  # the prompt's 8 tokens, then one by one


def test_recording_changes_no_bit():
    case = Case(CONFIG, batch=2, context=8)
    model = random_model(case)
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(11, size=(2, 2, 8))
    batch = {"tokens": tokens, "targets": targets, "plan": Plan(base=True, lora=True)}
    constants = {"config": CONFIG, "lora_config": case.lora_config}
    plain = loss_and_grads(Net(**model, **constants), **batch)
    with recording(model) as log:
        noted = loss_and_grads(Net(**recorded(model), **constants), **batch)
    assert log.items[0]
    assert float(plain[0]) == float(noted[0])
    for ours, theirs in zip(plain[1:], noted[1:], strict=True):
        for path, x in flatten(ours).items():
            assert np.array_equal(x, flatten(theirs)[path]), path


def test_nothing_is_recorded_outside():
    x = np.ones((2, 2)).view(Recorded)
    with recording({}) as log:
        pass
    assert type(x @ x) is Recorded
    assert log.items == [[]]
    with pytest.raises(TypeError, match="einsum is a product that is not recorded"):
        np.einsum("ij,jk", x, x)
    assert np.einsum("ij,ij->i", x, x).tolist() == [2.0, 2.0]


def test_a_product_is_repeated_with_the_weight_itself_and_in_the_same_layout():
    weights = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}
    x = np.ones((2, 5, 4), np.float32)
    with recording(weights, lambda: "here") as log:
        w = recorded(weights)["w"]
        y = x @ w.T[:, :2]
        np.matmul(y.swapaxes(-1, -2), x, out=np.empty((2, 2, 4), np.float32))
    first, second = log.items[0]
    assert first.shape == (2, 5, 2)
    assert first.flops == 2 * 2 * 5 * 2 * 4
    assert second.a.transposed and not second.b.transposed
    ((one, two),) = prepare(log.items, "cpu")
    assert np.shares_memory(one.b, weights["w"])
    assert one.b.shape == (4, 2) and one.b.strides == (4, 16)
    assert not np.shares_memory(one.a, x)
    assert two.a.shape == (2, 2, 5) and two.a.strides[-2:] == (4, 8)
    assert two.out.shape == (2, 2, 4) and two.out.flags.c_contiguous
    for run in (repeat, partial(repeat_timed, wait=lambda: None)):
        one.out[:] = two.out[:] = 0.0
        done = run([one, two])
        np.testing.assert_array_equal(one.out, one.a @ one.b)
        np.testing.assert_array_equal(two.out, two.a @ two.b)
    assert list(done) == ["here"] and done["here"] > 0.0


def test_results_share_memory_with_no_operand():
    items, _ = items_of(Case(CONFIG, method="full", batch=2, context=8, threads=2))
    ready = prepare(items, "cpu")
    assert len(ready) == 2
    for products in ready:
        for p in products:
            assert not np.may_share_memory(p.a, p.out)
            assert not np.may_share_memory(p.b, p.out)
    ours, theirs = ({id(p.out) for p in products} for products in ready)
    assert not ours & theirs, "two threads would write the same memory"


def test_flops_of_a_stack_count_each_of_its_products():
    a, b = (
        Operand(shape, False, np.dtype(np.float32), None) for shape in ((3, 1, 2, 5), (4, 5, 7))
    )
    product = Product("", a, b)
    assert product.shape == (3, 4, 2, 7)
    assert product.flops == 2 * 3 * 4 * 2 * 5 * 7
