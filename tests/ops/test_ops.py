"""Every operation against its definition, written here a second time and without haste."""

import math

import numpy as np
import pytest

from minilora import ops


def normal(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(actual, expected, **tolerance):
    np.testing.assert_allclose(actual, expected, **{"rtol": 1e-12, "atol": 1e-13, **tolerance})


def holds(cache, array):
    """Whether a cache, nested or not, keeps an array or a view of it."""
    if isinstance(cache, np.ndarray):
        return np.shares_memory(cache, array)
    return isinstance(cache, tuple) and any(holds(entry, array) for entry in cache)


# --- linear, head, embedding, position -----------------------------------------------------------


def test_linear():
    x, w, b = normal(2, 3, 4), normal(4, 5), normal(5)
    close(ops.linear_forward(x, w, b)[0], np.einsum("bti,io->bto", x, w) + b)


def test_head_is_a_product_with_the_transposed_table():
    x, wte = normal(2, 3, 4), normal(7, 4)
    close(ops.head_forward(x, wte)[0], np.einsum("btc,vc->btv", x, wte))


@pytest.mark.parametrize(
    ("pair", "arguments"),
    [
        ((ops.linear_forward, ops.linear_backward), (normal(2, 3, 4), normal(4, 5), normal(5))),
        ((ops.head_forward, ops.head_backward), (normal(2, 3, 4), normal(7, 4))),
        ((ops.position_forward, ops.position_backward), (normal(2, 3, 4), normal(5, 4))),
        (
            (ops.layer_norm_forward, ops.layer_norm_backward),
            (normal(2, 3, 4), normal(4), normal(4)),
        ),
    ],
    ids=["linear", "head", "position", "layer norm"],
)
def test_a_frozen_parameter_costs_nothing_and_changes_nothing_else(pair, arguments):
    forward, backward = pair
    y, cache = forward(*arguments)
    y_frozen, cache_frozen = forward(*arguments, frozen=True)
    dy = normal(*y.shape, seed=1)
    dx, *_ = backward(dy, cache)
    dx_frozen, *gradients = backward(dy, cache_frozen)

    assert np.array_equal(y_frozen, y)
    assert np.array_equal(dx_frozen, dx)
    assert gradients == [None] * (len(arguments) - 1)
    assert not holds(cache_frozen, arguments[0]), "the input of a frozen parameter is kept"


def test_holds_finds_what_an_unfrozen_linear_keeps():
    x, w, b = normal(2, 4), normal(4, 5), normal(5)
    assert holds(ops.linear_forward(x, w, b)[1], x)


def test_embedding_is_a_product_with_one_hot_rows():
    table, index = normal(5, 3), np.array([[4, 0, 4], [2, 4, 0]])
    one_hot = np.eye(5)[index]
    y, cache = ops.embedding_forward(table, index=index)
    close(y, one_hot @ table)
    dy = normal(*y.shape, seed=1)
    (dtable,) = ops.embedding_backward(dy, cache)
    close(dtable, np.einsum("btv,btc->vc", one_hot, dy))
    assert not dtable[[1, 3]].any(), "a row that was not used has a gradient"


def test_position_adds_the_rows_from_offset_on():
    x, wpe = normal(2, 3, 4), normal(9, 4)
    y, _ = ops.position_forward(x, wpe, offset=5)
    close(y, x + wpe[5:8])
    assert np.array_equal(ops.position_forward(x, wpe)[0], x + wpe[:3])


# --- layer norm, GELU ----------------------------------------------------------------------------


def test_layer_norm():
    x, w, b, eps = 3 * normal(2, 3, 5) + 2, normal(5, seed=1), normal(5, seed=2), 1e-5
    expected = np.empty_like(x)
    for row in np.ndindex(2, 3):
        mean = sum(x[row]) / 5
        variance = sum((x[row] - mean) ** 2) / 5
        expected[row] = w * (x[row] - mean) / math.sqrt(variance + eps) + b
    close(ops.layer_norm_forward(x, w, b)[0], expected)


def test_layer_norm_of_equal_entries_is_the_bias():
    x, w, b = np.full((2, 4), 7.0), normal(4), normal(4, seed=1)
    y, cache = ops.layer_norm_forward(x, w, b)
    close(y, np.broadcast_to(b, (2, 4)))
    dx, dw, _ = ops.layer_norm_backward(normal(2, 4, seed=2), cache)
    assert np.isfinite(dx).all()
    assert not dw.any()


def test_layer_norm_s_gradient_is_orthogonal_to_what_it_removes():
    x, w, b = normal(6, 8), normal(8), normal(8)
    _, cache = ops.layer_norm_forward(x, w, b, eps=0.0)
    dx, _, _ = ops.layer_norm_backward(normal(6, 8, seed=1), cache)
    close(dx.sum(axis=-1), 0)
    close((dx * x).sum(axis=-1), 0)


def test_gelu():
    x = np.linspace(-6, 6, 101)
    expected = [
        0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x
    ]
    close(ops.gelu_forward(x)[0], expected)
    exact = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x]
    close(ops.gelu_forward(x)[0], exact, atol=5e-4)


def test_gelu_far_out_is_the_identity_and_zero():
    x = np.array([1e3, -1e3], np.float32)
    with np.errstate(all="raise"):
        y, cache = ops.gelu_forward(x)
        (dx,) = ops.gelu_backward(np.ones_like(x), cache)
    assert y.tolist() == [1e3, 0]
    assert dx.tolist() == [1, 0]


# --- softmax, attention --------------------------------------------------------------------------


def test_softmax():
    x = normal(2, 3, 5)
    close(ops.softmax_forward(x)[0], np.exp(x) / np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_of_huge_logits_is_finite(dtype):
    x = np.array([[1e30, 0.0, -1e30], [88888.0, 88888.0, 0.0]], dtype)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        y, cache = ops.softmax_forward(x)
        (dx,) = ops.softmax_backward(np.ones_like(y), cache)
    assert y.tolist() == [[1, 0, 0], [0.5, 0.5, 0]]
    assert not dx.any()


def attention_by_loops(qkv, heads):
    """Equation 1 of Vaswani et al. for every head and position on its own, past only."""
    B, T, C3 = qkv.shape
    C = C3 // 3
    K = C // heads
    y = np.empty((B, T, C))
    for b in range(B):
        for h in range(heads):
            columns = slice(h * K, (h + 1) * K)
            q, k, v = (qkv[b, :, third * C : (third + 1) * C][:, columns] for third in range(3))
            for t in range(T):
                weights = [math.exp(q[t] @ k[s] / math.sqrt(K)) for s in range(t + 1)]
                total = sum(weights)
                y[b, t, columns] = sum(w / total * v[s] for s, w in enumerate(weights))
    return y


@pytest.mark.parametrize(
    ("B", "T", "heads", "K"), [(2, 5, 2, 3), (1, 4, 1, 4), (2, 1, 3, 2), (1, 6, 4, 1)]
)
def test_attention_equals_the_plain_loops(B, T, heads, K):
    qkv = normal(B, T, 3 * heads * K)
    close(ops.attention_forward(qkv, heads=heads)[0], attention_by_loops(qkv, heads))


@pytest.mark.parametrize("queries", [1, 2, 3, 6, 7, 8])
def test_attention_by_blocks_of_queries_is_that_of_all_at_once(queries):
    B, T, H, K = 2, 7, 3, 4
    qkv, dy = normal(B, T, 3 * H * K), normal(B, T, H * K, seed=1)
    q, k, v = np.moveaxis(qkv.reshape(B, T, 3, H, K), (2, 3), (0, 2))
    dy_heads = dy.reshape(B, T, H, K).swapaxes(1, 2)
    S = np.where(np.tri(T) == 1, np.einsum("bhtc,bhsc->bhts", q, k) / math.sqrt(K), -np.inf)
    P = np.exp(S) / np.exp(S).sum(-1, keepdims=True)
    dP = np.einsum("bhtc,bhsc->bhts", dy_heads, v)
    dS = P * (dP - (dP * P).sum(-1, keepdims=True)) / math.sqrt(K)
    dq, dk = np.einsum("bhts,bhsc->bhtc", dS, k), np.einsum("bhts,bhtc->bhsc", dS, q)
    dv = np.einsum("bhts,bhtc->bhsc", P, dy_heads)

    y, cache = ops.attention_forward(qkv, heads=H, queries=queries)
    close(y, np.einsum("bhts,bhsc->bthc", P, v).reshape(y.shape))
    (dqkv,) = ops.attention_backward(dy, cache)
    close(dqkv, np.stack([dq, dk, dv]).transpose(1, 3, 0, 2, 4).reshape(qkv.shape))


def test_blocks_of_queries_leave_out_what_none_of_them_sees():
    assert [(t.start, t.stop, s.start, s.stop) for t, s in ops.causal_blocks(7, 3)] == [
        (0, 3, 0, 3), (3, 6, 0, 6), (6, 7, 0, 7),
    ]  # fmt: skip
    assert len(list(ops.causal_blocks(ops.QUERIES, ops.QUERIES))) == 1


def test_what_is_computed_again_is_the_same_bit_for_bit():
    y, cache = ops.layer_norm_forward(normal(3, 4), normal(4, seed=1), normal(4, seed=2))
    assert np.array_equal(ops.layer_norm_again(cache), y)
    y, cache = ops.gelu_forward(normal(3, 4))
    assert np.array_equal(ops.gelu_again(cache), y)


def test_attention_does_not_see_the_future():
    qkv = normal(2, 6, 12)
    changed = qkv.copy()
    changed[:, 4:] += 10
    y, cache = ops.attention_forward(qkv, heads=2)
    assert np.array_equal(ops.attention_forward(changed, heads=2)[0][:, :4], y[:, :4])

    dy = normal(*y.shape, seed=1)
    dy[:, 4:] = 0
    (dqkv,) = ops.attention_backward(dy, cache)
    assert not dqkv[:, 4:].any(), "an output of the past has a gradient in the future"
    (dqkv_changed,) = ops.attention_backward(dy, ops.attention_forward(changed, heads=2)[1])
    close(dqkv_changed, dqkv)


def test_heads_that_do_not_divide_the_width_raise():
    with pytest.raises(ValueError, match="reshape"):
        ops.attention_forward(normal(1, 2, 12), heads=3)


# --- cross-entropy -------------------------------------------------------------------------------


def cross_entropy(logits, targets, **constants):
    loss, cache = ops.cross_entropy_forward(logits, targets=targets, **constants)
    return loss, ops.cross_entropy_backward(1.0, cache)[0]


def test_cross_entropy_is_the_mean_of_the_counted_rows():
    logits, targets = normal(2, 3, 5), np.array([[4, -100, 0], [1, 1, -100]])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    counted = [(b, t) for b, t in np.ndindex(2, 3) if targets[b, t] != -100]
    loss, dlogits = cross_entropy(logits, targets)
    close(loss, -sum(math.log(p[row][targets[row]]) for row in counted) / 4)
    for row in np.ndindex(2, 3):
        expected = (p[row] - np.eye(5)[targets[row]]) / 4 if row in counted else 0
        close(dlogits[row], expected)


def test_cross_entropy_of_equal_logits_is_log_v():
    loss, _ = cross_entropy(np.zeros((3, 7)), np.array([0, 3, 6]))
    close(loss, math.log(7))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cross_entropy_of_huge_logits_is_finite(dtype):
    logits = np.array([[1e3, 0, -1e3], [-1e3, 1e3, 1e3]], dtype)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        loss, dlogits = cross_entropy(logits, np.array([1, 2]))
    close(loss, (1e3 + math.log(2)) / 2, rtol=1e-6)
    close(dlogits, [[0.5, -0.5, 0], [0, 0.25, -0.25]], rtol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_the_head_and_the_loss_in_one_are_those_one_after_the_other(chunk, frozen):
    """For parts of every size, logits far apart, and targets in each part, some of them ignored."""
    x, table = 10.0 * normal(2, 4, 3), normal(7, 3)
    targets = np.array([[0, 6, -1, 3], [2, -1, 1, 5]])
    constants = {"targets": targets, "ignore_index": -1, "count": 11}
    logits, head = ops.head_forward(x, table)
    expected_loss, loss_cache = ops.cross_entropy_forward(logits, **constants)
    expected_dx, expected_dtable = ops.head_backward(
        *ops.cross_entropy_backward(0.7, loss_cache), head
    )
    loss, cache = ops.head_loss_forward(x, table, **constants, chunk=chunk, frozen=frozen)
    dx, dtable = ops.head_loss_backward(0.7, cache)
    close(loss, expected_loss)
    close(dx, expected_dx)
    if frozen:
        assert dtable is None
    else:
        close(dtable, expected_dtable)


def test_cross_entropy_without_a_counted_target_is_zero():
    loss, dlogits = cross_entropy(normal(2, 3), np.array([-100, -100]))
    assert loss == 0
    assert dlogits.shape == (2, 3)
    assert not dlogits.any()


def test_ignore_index_may_be_an_existing_token():
    logits = normal(3, 4)
    loss, dlogits = cross_entropy(logits, np.array([0, 2, 0]), ignore_index=0)
    alone, dalone = cross_entropy(logits[1:2], np.array([2]))
    close(loss, alone)
    close(dlogits, np.stack([np.zeros(4), dalone[0], np.zeros(4)]))


def test_with_the_whole_count_the_shards_of_a_batch_add_up():
    logits, targets = normal(6, 5), np.array([1, -100, 2, 4, 0, -100])
    loss, dlogits = cross_entropy(logits, targets)
    halves = [cross_entropy(logits[s], targets[s], count=4) for s in (slice(0, 2), slice(2, 6))]
    close(sum(loss for loss, _ in halves), loss)
    close(np.concatenate([dlogits for _, dlogits in halves]), dlogits)


# --- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dropout_mask(p, dtype):
    mask = ops.dropout_mask(np.random.default_rng(0), (100, 100), p, dtype)
    assert mask.dtype == dtype
    assert set(np.unique(mask)) <= {dtype(0), dtype(1 / (1 - p))}
    assert abs((mask == 0).mean() - p) < 0.02
    again = ops.dropout_mask(np.random.default_rng(0), (100, 100), p, dtype)
    assert np.array_equal(mask, again)
