"""Generation: the cache changes nothing, and the options do what they say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import MiniloraError
from minilora.generate import distribution, generate, new_cache, next_logits
from minilora.gpt import GPTConfig, gpt_init, gpt_logits
from minilora.lora import LoRAConfig, lora_init, merge
from minilora.tree import map_leaves

CONFIG = GPTConfig(vocab_size=23, n_positions=16, n_embd=12, n_layer=3, n_head=3)
TARGETS = ("qkv", "q", "k", "v", "o", "up", "down")
PROMPT = [3, 1, 4, 1, 5]


def random_tree(tree, seed):
    """The tree with every entry drawn at random: no zero biases, no zero B."""
    rng = np.random.default_rng(seed)
    return map_leaves(lambda x: 0.4 * rng.standard_normal(x.shape).astype(x.dtype), tree)


BASE = random_tree(gpt_init(CONFIG, seed=0, dtype=np.float64), 0)


def adapter(*targets):
    lora_config = LoRAConfig(rank=2, alpha=4.0, targets=targets)
    return random_tree(lora_init(BASE, lora_config, seed=1), 1), lora_config


def run(base=BASE, lora=None, **options):
    """The ids of a greedy continuation, unless the options say otherwise."""
    defaults = {"prompt_ids": PROMPT, "config": CONFIG, "max_tokens": 8, "temperature": 0.0}
    return list(generate(base, lora, **defaults | options))


# --- the cache ---------------------------------------------------------------------------------


@given(
    pieces=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    batch=st.integers(1, 3),
    targets=st.sets(st.sampled_from((*TARGETS, "embedding"))),
    seed=st.integers(0, 99),
)
def test_logits_with_the_cache_are_those_without(pieces, batch, targets, seed):
    lora, lora_config = adapter(*sorted(targets)) if targets else (None, None)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, size=(batch, CONFIG.n_positions))
    expected = gpt_logits(BASE, lora, tokens=tokens, config=CONFIG, lora_config=lora_config)
    cache = new_cache(BASE, CONFIG, length=CONFIG.n_positions, batch=batch)
    position = 0
    for size in pieces:
        piece = tokens[:, position : position + size]
        if not piece.size:
            break
        logits = next_logits(
            BASE,
            lora,
            tokens=piece,
            cache=cache,
            position=position,
            config=CONFIG,
            lora_config=lora_config,
        )
        position += piece.shape[1]
        np.testing.assert_allclose(
            logits, expected[:, position - 1], rtol=1e-12, atol=1e-12, err_msg=f"at {position}"
        )


def test_the_cache_keeps_the_dtype_of_the_base():
    base = map_leaves(lambda x: x.astype(np.float32), BASE)
    cache = new_cache(base, CONFIG, length=4)
    logits = next_logits(
        base, tokens=np.array([PROMPT[:4]]), cache=cache, position=0, config=CONFIG
    )
    assert cache[0].keys.dtype == logits.dtype == np.float32


def test_adapters_without_their_configuration_are_an_error():
    with pytest.raises(MiniloraError, match="adapters need their lora_config"):
        run(lora=adapter("qkv")[0])


# --- the text ----------------------------------------------------------------------------------


def reference_greedy(base, lora, lora_config, length):
    """The likeliest tokens by the whole model, read again from the last half when it is full."""
    window, new = list(PROMPT), []
    for _ in range(length):
        if len(window) > CONFIG.n_positions:
            window = (PROMPT + new)[-CONFIG.n_positions // 2 :]
        tokens = np.array([window])
        logits = gpt_logits(base, lora, tokens=tokens, config=CONFIG, lora_config=lora_config)
        new.append(int(logits[0, -1].argmax()))
        window.append(new[-1])
    return new


@pytest.mark.parametrize("targets", [(), *((target,) for target in TARGETS), ("embedding",)])
def test_greedy_is_the_likeliest_token_each_time(targets):
    lora, lora_config = adapter(*targets) if targets else (None, None)
    text = run(lora=lora, lora_config=lora_config)
    assert text == reference_greedy(BASE, lora, lora_config, 8)
    assert all(type(token) is int for token in text)
    assert (text != run()) == bool(targets), "an adapter has to show in this text"


@pytest.mark.parametrize("positions", [1, 2, 7, 16])
def test_text_goes_on_beyond_the_context(positions):
    config = GPTConfig(**vars(CONFIG) | {"n_positions": positions})
    base = BASE | {"wpe": BASE["wpe"][:positions]}
    text = [PROMPT[0]]
    first = len(text)
    for _ in range(3 * positions + 2):
        if len(text) - first + 1 > positions:
            first = len(text) - max(1, positions // 2) + 1
        logits = gpt_logits(base, tokens=np.array([text[first - 1 :]]), config=config)
        text.append(int(logits[0, -1].argmax()))
    ids = run(base, prompt_ids=PROMPT[:1], config=config, max_tokens=3 * positions + 2)
    assert ids == text[1:]


def test_a_prompt_as_long_as_the_context_is_read_whole():
    prompt = list(range(CONFIG.n_positions))
    expected = gpt_logits(BASE, tokens=np.array([prompt]), config=CONFIG)[0, -1].argmax()
    assert run(prompt_ids=prompt, max_tokens=1) == [expected]
    assert len(run(prompt_ids=prompt, max_tokens=20)) == 20


def test_merged_and_unmerged_adapters_write_the_same_text():
    lora, lora_config = adapter(*TARGETS)
    options = {"temperature": 1.0, "max_tokens": 40, "seed": 5}
    merged = run(merge(BASE, lora, lora_config), **options)
    assert run(lora=lora, lora_config=lora_config, **options) == merged


def test_the_seed_decides_the_text():
    options = {"temperature": 1.0, "max_tokens": 30}
    assert run(seed=1, **options) == run(seed=1, **options)
    assert run(seed=1, **options) != run(seed=2, **options)
    assert run(seed=1, temperature=0.0) == run(seed=2, temperature=0.0)


def test_tokens_come_one_at_a_time_and_no_more_than_asked():
    stream = generate(BASE, prompt_ids=np.array(PROMPT), config=CONFIG, max_tokens=3)
    assert len([next(stream), next(stream), next(stream)]) == 3
    assert next(stream, None) is None
    assert run(max_tokens=0) == []


def test_neither_the_model_nor_the_prompt_changes():
    lora, lora_config = adapter(*TARGETS, "embedding")
    before = map_leaves(np.copy, [BASE, lora])
    prompt = np.array(PROMPT)
    run(lora=lora, lora_config=lora_config, prompt_ids=prompt)
    map_leaves(np.testing.assert_array_equal, [BASE, lora], before)
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
    defaults = {"prompt_ids": PROMPT, "config": CONFIG, "max_tokens": 8}
    with pytest.raises(MiniloraError, match=message):
        generate(BASE, **defaults | options)  # not even the first token is asked for


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


def test_equal_logits_keep_exactly_k():
    assert distribution(np.zeros(5), temperature=1.0, top_k=2).tolist() == [0.5, 0.5, 0, 0, 0]


def test_the_drawn_tokens_follow_the_distribution():
    config = GPTConfig(vocab_size=5, n_positions=2, n_embd=4, n_layer=1, n_head=1)
    base = random_tree(gpt_init(config, seed=0, dtype=np.float64), 3)
    logits = gpt_logits(base, tokens=np.array([[2]]), config=config)[0, -1]
    expected = distribution(logits, temperature=0.5, top_k=3)
    options = {"prompt_ids": [2], "config": config, "max_tokens": 1}
    drawn = [run(base, **options, temperature=0.5, top_k=3, seed=i)[0] for i in range(1000)]
    counts = np.bincount(drawn, minlength=5)
    deviation = np.sqrt(1000 * expected * (1 - expected))
    assert (np.abs(counts - 1000 * expected) <= 4 * deviation).all(), (counts, 1000 * expected)
