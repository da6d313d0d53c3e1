"""What inference holds at its peak: the residual stream and what one map makes of it."""

import numpy as np
import pytest
from helpers import peak_of

from minilora.adapters import TARGETS, LoRAConfig, lora_init
from minilora.evaluation import evaluate_tokens
from minilora.generate import new_cache, next_logits
from minilora.model import load_model
from minilora.network import Net, net_logits, trunk_forward
from minilora.workers import SHARD_TOKENS

RANK = 8


@pytest.fixture(scope="module")
def net():
    """The built-in base with an adapter on every target."""
    base = load_model()
    lora_config = LoRAConfig(rank=RANK, targets=TARGETS)
    return Net(base.base, base.config, lora_init(base.base, lora_config, seed=0), lora_config)


def most_at_once(net, N):
    """Bytes of what a forward pass needs of N tokens at its peak, inside the MLP.

    x and x' = x + h, and either the second layer norm's y with `up` and the update of `up`, or `up`
    and GELU; with each adapter's s x A.
    """
    C, F = net.config.n_embd, net.config.inner
    up, gelu = N * (3 * C + 2 * F), N * (2 * C + 2 * F)
    return 4 * (max(up, gelu) + N * RANK)


def half_an_array(net, N):
    """Half of one (B, T, C): for all that is small, like masks, tokens and Python's own objects.

    One array more than is counted would be above it.
    """
    return 4 * N * net.config.n_embd // 2


def tokens_of(net, *shape):
    return np.random.default_rng(0).integers(net.config.vocab_size, size=shape)


@pytest.mark.parametrize("f", [trunk_forward, net_logits])
def test_a_forward_pass_holds_the_stream_and_one_map(net, f):
    tokens = tokens_of(net, 4, 128)
    peak = peak_of(lambda: f(net, tokens=tokens))
    assert peak <= most_at_once(net, tokens.size) + half_an_array(net, tokens.size)


def test_an_evaluation_holds_the_stream_and_one_map(net):
    tokens = tokens_of(net, SHARD_TOKENS + 1)
    peak = peak_of(lambda: evaluate_tokens(net, tokens, text_bytes=len(tokens), threads=1))
    rows = SHARD_TOKENS // net.config.n_positions * net.config.n_positions
    assert peak <= most_at_once(net, rows) + half_an_array(net, rows)


def test_reading_a_prompt_holds_one_map_or_one_attention(net):
    """Keys and values have their place before. Beside x, qkv and y lie S, P and the mask."""
    T, C, heads = 500, net.config.n_embd, net.config.n_head
    tokens, cache = tokens_of(net, 1, T), new_cache(net, length=T)
    peak = peak_of(lambda: next_logits(net, tokens=tokens, cache=cache, position=0))
    attention = 4 * (T * (1 + 3 + 1) * C + (2 * heads + 1) * T * T)
    most = max(most_at_once(net, T), attention)
    assert peak <= most + half_an_array(net, T)


def test_reading_one_more_token_copies_no_keys(net):
    length = net.config.n_positions
    tokens, cache = tokens_of(net, 1, 1), new_cache(net, length=length)
    for kv in cache:
        kv.keys[:], kv.values[:] = 0, 0
    peak = peak_of(lambda: next_logits(net, tokens=tokens, cache=cache, position=length - 1))
    assert peak < cache[0].keys.nbytes / 4
