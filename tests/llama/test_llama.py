"""Llama: its whole model's gradients, what is kept of it, its positions, its text."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import assert_trees_close, assert_trees_equal, moved

from minilora import llama
from minilora.adapters import LoRAConfig, dropout_masks, lora_init
from minilora.errors import MiniloraError
from minilora.generate import generate
from minilora.gradcheck import assert_close
from minilora.keep import Plan
from minilora.lora import merge
from minilora.network import Net, loss_and_grads, net_logits, trunk_forward
from minilora.pairs import Batch, check_model
from minilora.tree import flatten

BOTH, LORA = Plan(base=True, lora=True), Plan(lora=True)
TARGETS = ("q", "k", "v", "o", "gate", "up", "down", "embedding")
GROUPS = [(4, 4), (4, 2), (6, 1)]  # heads of q, and of k and v


def config_of(heads=4, kv_heads=2, **changes):
    sizes = {
        "vocab_size": 11, "hidden_size": 4 * heads, "intermediate_size": 10,
        "num_hidden_layers": 2, "max_position_embeddings": 8, "rms_norm_eps": 0.1,
    }  # fmt: skip
    return llama.LlamaConfig(
        **{**sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **changes}
    )


def a_llama(*targets, config=None, biases=False, head=False, dropout=0.0):
    """A net in float64 of which no number is as it was drawn, and a batch for it."""
    config = config or config_of()
    base = llama.llama_init(config, seed=0, dtype=np.float64)
    for block in base["blocks"] if biases else ():
        block["attn"]["qkv"]["b"] = np.zeros(block["attn"]["qkv"]["w"].shape[1])
    base = moved(base, 0)
    if head:
        base["head"] = np.random.default_rng(5).standard_normal(base["wte"].shape)
    lora_config = LoRAConfig(rank=2, alpha=3.0, targets=targets or TARGETS, dropout=dropout)
    lora = moved(lora_init(base, lora_config, seed=1), 1)
    rng = np.random.default_rng(2)
    tokens, goals = rng.integers(config.vocab_size, size=(2, 2, 5))
    masks = dropout_masks(lora, lora_config, rng=rng, shape=(2, 5))
    return Net(base, config, lora, lora_config), Batch(tokens, goals, masks)


@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_every_gradient_agrees_with_central_differences(heads):
    net, batch = a_llama(config=config_of(*heads), dropout=0.3)
    assert_close(check_model(net, batch, BOTH, entries=4))


def test_so_do_those_of_a_model_with_biases_and_a_head_of_its_own():
    """Qwen2 has biases on q, k and v; a Llama's head is seldom tied."""
    net, batch = a_llama(biases=True, head=True)
    checks = check_model(net, batch, BOTH, entries=4)
    assert_close(checks)
    names = {check.name for check in checks}
    assert {"base.blocks.0.attn.qkv.b", "base.head"} <= names


@pytest.mark.parametrize(
    "targets",
    [("q",), ("v",), ("o",), ("gate",), ("up",), ("down",), ("k", "up"), ("embedding",), TARGETS],
    ids="-".join,
)
def test_a_plan_changes_no_gradient(targets):
    """Neither a frozen base nor recomputing, wherever the pass ends; up to the head's sums."""
    net, batch = a_llama(*targets)
    _, dbase, dlora = loss_and_grads(net, **batch._asdict(), plan=BOTH)
    for plan in (LORA, LORA._replace(recompute=True)):
        assert_trees_close(loss_and_grads(net, **batch._asdict(), plan=plan)[2], dlora)
    again = loss_and_grads(net, **batch._asdict(), plan=BOTH._replace(recompute=True))
    assert_trees_equal(again[1], dbase)
    assert_trees_equal(again[2], dlora)
    assert flatten(dbase).keys() == flatten(net.base).keys()
    assert flatten(dlora).keys() == flatten(net.lora).keys()


def kept_of_the_lowest_block(*targets):
    net, batch = a_llama(*targets)
    return trunk_forward(net, tokens=batch.tokens, plan=LORA)[1].blocks[0]


def test_a_block_keeps_nothing_below_its_lowest_adapter():
    assert list(kept_of_the_lowest_block("down")) == ["gate", "up", "swiglu", "down"]
    assert list(kept_of_the_lowest_block("up")) == ["ln_2", "gate", "up", "swiglu", "down"]
    kept = kept_of_the_lowest_block("o")
    assert list(kept)[:3] == ["qkv", "rotary", "attention"]
    assert kept_of_the_lowest_block("q")["gate"].linear.x is None, "recomputed, and frozen"


def test_merged_is_unmerged():
    net, batch = a_llama("q", "k", "v", "o", "gate", "up", "down")
    merged = Net(merge(net.base, net.lora, net.lora_config), net.config)
    logits = [net_logits(each, tokens=batch.tokens) for each in (net, merged)]
    np.testing.assert_allclose(*logits, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_text_with_a_cache_is_the_text_without_it(heads):
    net, _ = a_llama(config=config_of(*heads))
    text = [1, 2, 3]
    for _ in range(5):
        text.append(int(net_logits(net, tokens=np.array([text]))[0, -1].argmax()))
    assert list(generate(net, prompt_ids=[1, 2, 3], max_tokens=5, temperature=0.0)) == text[3:]


def test_a_token_s_logits_do_not_depend_on_later_ones_but_on_where_it_stands():
    net, batch = a_llama()
    whole = net_logits(net, tokens=batch.tokens)
    np.testing.assert_allclose(net_logits(net, tokens=batch.tokens[:, :3]), whole[:, :3])
    turned = net_logits(net, tokens=np.roll(batch.tokens, 1, axis=1))
    assert not np.allclose(turned[:, -1], whole[:, -2])


def test_the_frequencies_fall_from_one_radian_by_powers_of_theta():
    config = config_of(head_dim=8, rope_theta=10000.0)
    np.testing.assert_allclose(llama.frequencies(config), [1.0, 0.1, 0.01, 0.001])


LLAMA_3 = llama.Llama3Scaling(factor=32.0, low=1.0, high=4.0, original=8192)


def divisors(scaling):
    """What the scaling divides each frequency of Llama 3.2 by."""
    plain = config_of(head_dim=64, rope_theta=500_000.0)
    return llama.frequencies(plain) / llama.frequencies(replace(plain, rope_scaling=scaling))


def test_the_scaled_frequencies_of_llama_3():
    """Pairs 0 to 14 as before, 18 and on a 32nd, and three between (transformers' values)."""
    np.testing.assert_allclose(divisors(LLAMA_3)[:15], 1.0)
    np.testing.assert_allclose(divisors(LLAMA_3)[15:18], [1.6513, 3.2923, 9.6667], rtol=1e-4)
    np.testing.assert_allclose(divisors(LLAMA_3)[18:], 32.0)


def test_linear_scaling_divides_every_frequency():
    np.testing.assert_allclose(divisors(llama.LinearScaling(4.0)), 4.0)


def test_heads_may_be_wider_or_narrower_than_their_share():
    config = config_of(heads=4, kv_heads=2, hidden_size=30, head_dim=16)
    attn = llama.llama_init(config, seed=0)["blocks"][0]["attn"]
    assert attn["qkv"]["w"].shape == (30, 4 * 16 + 2 * 2 * 16)
    assert attn["o"]["w"].shape == (4 * 16, 30)
    assert_close(check_model(*a_llama(config=config), BOTH, entries=2))


def test_positions_are_computed_in_float64_and_rounded_once():
    config = config_of(head_dim=8)
    tables = llama.positions(config, 3, offset=100_000, like=np.zeros(0, np.float32))
    angle = (100_000 + np.arange(3))[:, None, None] * llama.frequencies(config)
    assert tables["cos"].dtype == tables["sin"].dtype == np.float32
    assert np.array_equal(tables["cos"], np.cos(angle).astype(np.float32))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers 0 is too small"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of"),
        ({"hidden_size": 18}, "hidden_size 18 is not a multiple of num_attention_heads 4"),
        ({"head_dim": 0}, "head_dim 0 is too small"),
        ({"head_dim": 5}, "heads of width 5 have no pairs"),
        ({"vocab_size": 2**25}, "vocab_size 33554432 is too large; the maximum is 16,777,216"),
        ({"rope_scaling": llama.LinearScaling(0.0)}, "has a number that is not positive"),
        ({"rope_scaling": LLAMA_3._replace(high=1.0)}, "has a low that is not below its high"),
        ({"rope_theta": 0.0}, "rope_theta 0.0 is not a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan is not a positive number"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(MiniloraError, match=message):
        config_of(**changes)
