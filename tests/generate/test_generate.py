"""Generation: the cache changes nothing, and the options do what they say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.adapters import LoRAConfig, lora_init
from minilora.errors import MiniloraError
from minilora.generate import distribution, generate, new_cache, next_logits
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.lora import merge
from minilora.network import Net, net_logits
from minilora.tree import map_leaves

CONFIG = GPTConfig(vocab_size=23, n_positions=16, n_embd=12, n_layer=3, n_head=3)
TARGETS = ("qkv", "q", "k", "v", "o", "up", "down")
PROMPT = [3, 1, 4, 1, 5]


def random_tree(tree, seed):
    """The tree with every entry drawn at random: no zero biases, no zero B."""
    rng = np.random.default_rng(seed)
    return map_leaves(lambda x: 0.4 * rng.standard_normal(x.shape).astype(x.dtype), tree)


NET = Net(random_tree(gpt_init(CONFIG, seed=0, dtype=np.float64), 0), CONFIG)


def adapted(*targets):
    """The net with adapters on these targets; without any it has none."""
    if not targets:
        return NET
    lora_config = LoRAConfig(rank=2, alpha=4.0, targets=targets)
    return Net(
        NET.base, CONFIG, random_tree(lora_init(NET.base, lora_config, seed=1), 1), lora_config
    )


def run(net=NET, **options):
    """The ids of a greedy continuation, unless the options say otherwise."""
    defaults = {"prompt_ids": PROMPT, "max_tokens": 8, "temperature": 0.0}
    return list(generate(net, **defaults | options))


# --- the cache ---------------------------------------------------------------------------------


@given(
    pieces=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    batch=st.integers(1, 3),
    targets=st.sets(st.sampled_from((*TARGETS, "embedding"))),
    seed=st.integers(0, 99),
)
def test_logits_with_the_cache_are_those_without(pieces, batch, targets, seed):
    net = adapted(*sorted(targets))
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, size=(batch, CONFIG.n_positions))
    expected = net_logits(net, tokens=tokens)
    cache = new_cache(net, length=CONFIG.n_positions, batch=batch)
    position = 0
    for size in pieces:
        piece = tokens[:, position : position + size]
        if not piece.size:
            break
        logits = next_logits(net, tokens=piece, cache=cache, position=position)
        position += piece.shape[1]
        np.testing.assert_allclose(
            logits, expected[:, position - 1], rtol=1e-12, atol=1e-12, err_msg=f"at {position}"
        )


def test_the_cache_keeps_the_dtype_of_the_base():
    net = Net(map_leaves(lambda x: x.astype(np.float32), NET.base), CONFIG)
    cache = new_cache(net, length=4)
    logits = next_logits(net, tokens=np.array([PROMPT[:4]]), cache=cache, position=0)
    assert cache[0].keys.dtype == logits.dtype == np.float32


# --- the text ----------------------------------------------------------------------------------


def reference_greedy(net, length):
    """The likeliest tokens by the whole model, read again from the last half when it is full."""
    window, new = list(PROMPT), []
    for _ in range(length):
        if len(window) > CONFIG.n_positions:
            window = (PROMPT + new)[-CONFIG.n_positions // 2 :]
        tokens = np.array([window])
        new.append(int(net_logits(net, tokens=tokens)[0, -1].argmax()))
        window.append(new[-1])
    return new


@pytest.mark.parametrize("targets", [(), *((target,) for target in TARGETS), ("embedding",)])
def test_greedy_is_the_likeliest_token_each_time(targets):
    text = run(adapted(*targets))
    assert text == reference_greedy(adapted(*targets), 8)
    assert all(type(token) is int for token in text)
    assert (text != run()) == bool(targets), "an adapter has to show in this text"


@pytest.mark.parametrize("positions", [1, 2, 7, 16])
def test_text_goes_on_beyond_the_context(positions):
    config = GPTConfig(**vars(CONFIG) | {"n_positions": positions})
    net = Net(NET.base | {"wpe": NET.base["wpe"][:positions]}, config)
    text = [PROMPT[0]]
    first = len(text)
    for _ in range(3 * positions + 2):
        if len(text) - first + 1 > positions:
            first = len(text) - max(1, positions // 2) + 1
        logits = net_logits(net, tokens=np.array([text[first - 1 :]]))
        text.append(int(logits[0, -1].argmax()))
    ids = run(net, prompt_ids=PROMPT[:1], max_tokens=3 * positions + 2)
    assert ids == text[1:]


def test_a_prompt_as_long_as_the_context_is_read_whole():
    prompt = list(range(CONFIG.n_positions))
    expected = net_logits(NET, tokens=np.array([prompt]))[0, -1].argmax()
    assert run(prompt_ids=prompt, max_tokens=1) == [expected]
    assert len(run(prompt_ids=prompt, max_tokens=20)) == 20


def test_merged_and_unmerged_adapters_write_the_same_text():
    net = adapted(*TARGETS)
    merged = Net(merge(net.base, net.lora, net.lora_config), CONFIG)
    options = {"temperature": 1.0, "max_tokens": 40, "seed": 5}
    assert run(net, **options) == run(merged, **options)


def test_the_seed_decides_the_text():
    options = {"temperature": 1.0, "max_tokens": 30}
    assert run(seed=1, **options) == run(seed=1, **options)
    assert run(seed=1, **options) != run(seed=2, **options)
    assert run(seed=1, temperature=0.0) == run(seed=2, temperature=0.0)


def test_tokens_come_one_at_a_time_and_no_more_than_asked():
    stream = generate(NET, prompt_ids=np.array(PROMPT), max_tokens=3)
    assert len([next(stream), next(stream), next(stream)]) == 3
    assert next(stream, None) is None
    assert run(max_tokens=0) == []


def test_neither_the_model_nor_the_prompt_changes():
    net = adapted(*TARGETS, "embedding")
    before = map_leaves(np.copy, [net.base, net.lora])
    prompt = np.array(PROMPT)
    run(net, prompt_ids=prompt)
    map_leaves(np.testing.assert_array_equal, [net.base, net.lora], before)
    assert prompt.tolist() == PROMPT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_ids": []}, "the prompt is empty"),
        ({"prompt_ids": [0] * 17}, "the prompt has 17 tokens, more than the context of 16"),
        ({"prompt_ids": [0, 23]}, "token id 23 is outside"),
        ({"prompt_ids": [-1]}, "token id -1 is outside"),
        ({"prompt_ids": [2**40]}, "token id 1099511627776 is outside"),
        ({"max_tokens": -1}, "max_tokens -1"),
        ({"temperature": -0.5}, "temperature -0.5"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"top_p": float("nan")}, "top_p nan"),
    ],
)
def test_a_bad_option_is_named_before_anything_is_computed(options, message):
    defaults = {"prompt_ids": PROMPT, "max_tokens": 8}
    with pytest.raises(MiniloraError, match=message):
        generate(NET, **defaults | options)  # not even the first token is asked for


# --- the distribution --------------------------------------------------------------------------

LOGITS = st.lists(st.floats(-20, 20), min_size=1, max_size=12).map(np.array)


@given(LOGITS, st.floats(0.1, 5))
def test_temperature_divides_the_logits(logits, temperature):
    p = distribution(logits, temperature=temperature)
    assert p.dtype == np.float64
    np.testing.assert_allclose(p.sum(), 1)
    np.testing.assert_allclose(
        np.log(p) - np.log(p.max()), (logits - logits.max()) / temperature, atol=1e-9
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(temperature):
    with pytest.raises(MiniloraError, match="logits are not finite"):
        distribution(np.array([0.0, np.nan, 1.0]), temperature=temperature)


@given(LOGITS)
def test_temperature_zero_is_the_likeliest_token(logits):
    p = distribution(logits, temperature=0.0, top_k=3, top_p=0.5)
    assert p[logits.argmax()] == 1 and np.count_nonzero(p) == 1


@given(LOGITS, st.integers(1, 14))
def test_top_k_keeps_the_k_likeliest(logits, top_k):
    full = distribution(logits, temperature=1.0)
    p = distribution(logits, temperature=1.0, top_k=top_k)
    kept = p > 0
    assert kept.sum() == min(top_k, logits.size)
    assert full[kept].min() >= full[~kept].max(initial=0)
    np.testing.assert_allclose(p[kept], full[kept] / full[kept].sum())


@given(LOGITS, st.floats(0.01, 1))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, top_p):
    full = distribution(logits, temperature=1.0)
    p = distribution(logits, temperature=1.0, top_p=top_p)
    kept = p > 0
    assert full[kept].min() >= full[~kept].max(initial=0)
    assert full[kept].sum() >= top_p - 1e-12
    assert full[kept].sum() - full[kept].min() < top_p + 1e-12, "one token fewer still reaches p"
    np.testing.assert_allclose(p[kept], full[kept] / full[kept].sum())


def test_top_k_and_top_p_by_hand():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3]))

    def kept(**options):
        return distribution(logits, temperature=1.0, **options).round(12).tolist()

    assert kept() == [0.1, 0.4, 0.2, 0.3]
    assert kept(top_k=1) == [0, 1, 0, 0]
    assert kept(top_k=2) == [0, round(4 / 7, 12), 0, round(3 / 7, 12)]
    assert kept(top_p=0.39) == [0, 1, 0, 0]
    assert kept(top_p=0.41) == [0, round(4 / 7, 12), 0, round(3 / 7, 12)]
    assert kept(top_p=1.0) == [0.1, 0.4, 0.2, 0.3]
    # top_p counts within what top_k has kept: 4/7 reaches 0.5, of 0.4 alone it would not
    assert kept(top_k=2, top_p=0.5) == [0, 1, 0, 0]


def test_a_set_whose_probability_equals_p_is_enough():
    logits = np.log([0.5, 0.25, 0.25])
    assert distribution(logits, temperature=1.0, top_p=0.5).tolist() == [1, 0, 0]


def test_equal_logits_keep_exactly_k():
    assert distribution(np.zeros(5), temperature=1.0, top_k=2).tolist() == [0.5, 0.5, 0, 0, 0]


def test_the_drawn_tokens_follow_the_distribution():
    config = GPTConfig(vocab_size=5, n_positions=2, n_embd=4, n_layer=1, n_head=1)
    net = Net(random_tree(gpt_init(config, seed=0, dtype=np.float64), 3), config)
    options = {"temperature": 0.5, "top_k": 3}
    expected = distribution(net_logits(net, tokens=np.array([[2]]))[0, -1], **options)
    options |= {"prompt_ids": [2], "max_tokens": 1}
    drawn = [run(net, **options, seed=i)[0] for i in range(1000)]
    counts = np.bincount(drawn, minlength=5)
    deviation = np.sqrt(1000 * expected * (1 - expected))
    assert (np.abs(counts - 1000 * expected) <= 4 * deviation).all(), (counts, 1000 * expected)


def test_the_tokens_of_one_text_are_drawn_independently():
    """Of a model that sees nothing but two equal logits, which is a fair coin."""
    config = GPTConfig(vocab_size=2, n_positions=1, n_embd=4, n_layer=1, n_head=1)
    coin = Net(map_leaves(np.zeros_like, gpt_init(config, seed=0)), config)
    text = run(coin, prompt_ids=[0], max_tokens=400, temperature=1.0, seed=3)
    assert 150 < sum(text) < 250
    assert 150 < np.count_nonzero(np.diff(text)) < 250


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_no_tokens_are_never_drawn(temperature):
    everywhere = {"max_tokens": 20, "temperature": temperature}
    likeliest = max(run(**everywhere))
    drawn = run(**everywhere, known=likeliest)
    assert drawn and max(drawn) < likeliest
    assert run(**everywhere, known=NET.config.vocab_size) == run(**everywhere)
