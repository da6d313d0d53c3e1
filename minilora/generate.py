"""Text from a model, token by token, with the keys and values of earlier tokens kept.

Causal attention lets no token look ahead, so the keys and values of a token never change once they
are computed. Kept in a cache, they leave one token's work per new token: the same linear maps
whatever the length, and one row of attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from minilora.adapters import qkv_widths
from minilora.backend import Array, check_ids, namespace, to_host
from minilora.errors import MiniloraError
from minilora.network import Net, trunk_forward
from minilora.ops import (
    attend_forward,
    causal_mask,
    groups,
    head_forward,
    merged_heads,
    split_heads,
)


def generate(
    net: Net,
    *,
    prompt_ids: Sequence[int] | Array,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    known: int | None = None,
) -> Iterator[int]:
    """The `max_tokens` token ids that continue a prompt, each as soon as it is drawn.

    `temperature`, `top_k` and `top_p` shape the distribution (see `distribution`); temperature 0
    always takes the likeliest token. Ids from `known` on, of rows that are no tokens, are never
    drawn. When the context of n_positions tokens is full, its last half becomes the prompt and the
    text continues from there. Raises MiniloraError, before anything is computed, for a prompt that
    is empty, longer than the context or outside the vocabulary, and for an option out of its range.
    """
    prompt, context = np.asarray(prompt_ids, np.int64), net.config.n_positions
    if prompt.size == 0:
        raise MiniloraError("the prompt is empty; it needs at least one token")
    if prompt.size > context:
        raise MiniloraError(
            f"the prompt has {prompt.size} tokens, more than the context of {context}"
        )
    check_ids(prompt, net.config.vocab_size)
    if max_tokens < 0:
        raise MiniloraError(f"max_tokens {max_tokens} is negative; the minimum is 0")
    if not temperature >= 0:
        raise MiniloraError(f"temperature {temperature} is not a number of at least 0")
    if top_k is not None and top_k < 1:
        raise MiniloraError(f"top_k {top_k} is too small; the minimum is 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise MiniloraError(f"top_p {top_p} is not in (0, 1]")

    def tokens() -> Iterator[int]:
        rng = np.random.default_rng(seed)
        cache = new_cache(net, length=min(context, prompt.size + max_tokens))
        text = prompt.tolist()
        unread, position = text, 0
        for _ in range(max_tokens):
            if position + len(unread) > context:
                unread, position = text[-max(1, context // 2) :], 0
            logits = next_logits(net, tokens=np.array([unread]), cache=cache, position=position)
            position += len(unread)
            logits = to_host(logits)[0, :known]
            p = distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
            unread = [int(p.argmax() if temperature == 0 else rng.choice(p.size, p=p))]
            text += unread
            yield unread[0]

    return tokens()


# --- the model with its past -------------------------------------------------------------------


class KeyValues(NamedTuple):
    """The keys and values of one block, (B, G, length, K): written once, at their positions."""

    keys: Array
    values: Array


def new_cache(net: Net, *, length: int, batch: int = 1) -> list[KeyValues]:
    """Room for the keys and values of `length` positions in every block, not yet filled."""
    wte, (q_width, kv_width) = net.base["wte"], qkv_widths(net.base)
    K = q_width // net.config.n_head
    shape = (batch, kv_width // K, length, K)
    empty = partial(namespace(wte).empty, shape, dtype=wte.dtype)
    return [KeyValues(empty(), empty()) for _ in range(net.config.n_layer)]


def next_logits(net: Net, *, tokens: np.ndarray, cache: list[KeyValues], position: int) -> Array:
    """Logits of the token after `tokens`, which stand at `position` and on.  (B, T) -> (B, V)

    `net_logits` at the last position, given that the cache holds the keys and values of all the
    positions before; those of `tokens` are added to it. The token ids are on the host.
    """
    wte = net.base["wte"]
    mask = causal_mask(tokens.shape[1], wte)
    attends = [partial(cached_attention, cache=kv, position=position, mask=mask) for kv in cache]
    index = namespace(wte).asarray(tokens)
    x, _ = trunk_forward(net, tokens=index, offset=position, attends=attends)
    return head_forward(x[:, -1], net.head)[0]


def cached_attention(
    qkv: Array,
    *,
    heads: int,
    kv_heads: int | None = None,
    cache: KeyValues,
    position: int,
    mask: Array,
) -> tuple[Array, None]:
    """`attention_forward` [ATT.1-3] for the tokens at `position` and on.

    (B, T, (H + 2G) K) -> (B, T, H K). Writes their keys and values into the cache and attends to
    all that it then holds.
    """
    q, k, v = split_heads(qkv, heads, kv_heads)
    end = position + q.shape[-2]
    cache.keys[:, :, position:end] = k
    cache.values[:, :, position:end] = v
    y, y_heads = merged_heads(q)
    keys, values = cache.keys[:, :, :end], cache.values[:, :, :end]
    for h in groups(q, k):
        y_heads[:, h], _ = attend_forward(q[:, h], keys, values, mask=mask)  # [ATT.1-3]
    return y, None


# --- the choice of a token ---------------------------------------------------------------------


def distribution(
    logits: np.ndarray, *, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> np.ndarray:
    """The probabilities that the next token is drawn from, float64.  (V,) -> (V,)

    softmax(logits / temperature), all on the likeliest token at temperature 0. top_k keeps the k
    likeliest tokens (Fan et al. 2018); top_p keeps of these the smallest set of likeliest ones
    whose probability reaches p (Holtzman et al. 2020). What is kept is scaled to sum to 1. Raises
    MiniloraError for logits that are not finite.
    """
    logits = logits.astype(np.float64)
    if not np.isfinite(logits).all():
        raise MiniloraError("the logits are not finite: the model's numbers overflow on this text")
    if temperature == 0:
        p = np.zeros_like(logits)
        p[logits.argmax()] = 1.0
        return p
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    if top_k is None and top_p is None:
        return p
    likeliest = np.argsort(-p, kind="stable")
    if top_k is not None:
        p[likeliest[top_k:]] = 0.0
        p /= p.sum()
    if top_p is not None:
        kept = 1 + np.searchsorted(p[likeliest].cumsum(), top_p)
        p[likeliest[kept:]] = 0.0
        p /= p.sum()
    return p
