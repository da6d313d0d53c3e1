"""Every operation against its definition, written here a second time and without haste."""

import math

import numpy as np
import pytest
from helpers import close, normal

from minilora import fused, llama_ops, ops, tiles

# --- linear, head, embedding, position -----------------------------------------------------------


def test_linear():
    x, w, b = normal(2, 3, 4), normal(4, 5), normal(5)
    close(ops.linear_forward(x, w, b)[0], np.einsum("bti,io->bto", x, w) + b)


def test_head_is_a_product_with_the_transposed_table():
    x, wte = normal(2, 3, 4), normal(7, 4)
    close(ops.head_forward(x, wte)[0], np.einsum("btc,vc->btv", x, wte))


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


GELU = {"scale": ops.GELU_SCALE, "cubic": ops.GELU_CUBIC}
FUSED = {  # where the formula is, the arrays that it takes, the one inside tanh, and its constants
    "gelu": (ops, 1, 0, GELU),
    "gelu_gradient": (ops, 2, 1, GELU),
    "swiglu": (llama_ops, 2, 0, {}),
    "swiglu_gate_gradient": (llama_ops, 3, 1, {}),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_formula_equals_the_printed_one(name, dtype):
    """Up to the rounding of another order of products: a few units in the last place."""
    module, count, inside, constants = FUSED[name]
    formula = getattr(module, name)
    xs = [normal(1000, seed=seed, dtype=dtype) for seed in range(count)]
    x = xs[inside]
    x *= 3
    x[:4] = [0.0, 12.0, -12.0, 1e3]
    printed = formula.__wrapped__(*xs, **constants)
    in_place = np.empty_like(x)
    getattr(fused, name)(*xs, **constants, out=in_place)
    assert printed.dtype == in_place.dtype == dtype
    ulp = np.finfo(dtype).eps
    # 1 + tanh u and 1 - tanh² u cancel far out, so an error is one of the size of x, not of y.
    np.testing.assert_allclose(in_place, printed, rtol=4 * ulp, atol=16 * ulp * np.abs(x[4:]).max())
    assert np.array_equal(formula(*xs, **constants), in_place), "the fused form is not used"


def test_a_formula_without_a_fused_form_is_computed_as_printed(monkeypatch):
    x, cache = normal(3, 7), ops.GELUCache(normal(3, 7))
    y, (dx,) = ops.gelu_forward(x)[0], ops.gelu_backward(normal(3, 7, seed=1), cache)
    monkeypatch.delattr(fused, "gelu")
    monkeypatch.delattr(fused, "gelu_gradient")
    close(ops.gelu_forward(x)[0], y)
    close(ops.gelu_backward(normal(3, 7, seed=1), cache)[0], dx)


@pytest.mark.parametrize("size", [tiles.TILE, tiles.TILE + 1, 3 * tiles.TILE - 5])
def test_gelu_beyond_a_tile_is_gelu_entry_by_entry(size):
    """Each part written, and from its own entries; the parts here are none of the tiles."""
    x, dy = normal(size), normal(size, seed=1)
    y, cache = ops.gelu_forward(x)
    (dx,) = ops.gelu_backward(dy, cache)
    for part in np.array_split(np.arange(size), 7):
        close(y[part], ops.gelu_forward(x[part])[0])
        close(dx[part], ops.gelu_backward(dy[part], ops.GELUCache(x[part]))[0])


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


@pytest.mark.parametrize("tile", [1, 2, 3, 6, 7, 8])
def test_attention_by_tiles_of_queries_is_that_of_all_at_once(tile, monkeypatch):
    monkeypatch.setattr(ops, "QUERY_TILE", tile)
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

    y, cache = ops.attention_forward(qkv, heads=H)
    close(y, np.einsum("bhts,bhsc->bthc", P, v).reshape(y.shape))
    (dqkv,) = ops.attention_backward(dy, cache)
    close(dqkv, np.stack([dq, dk, dv]).transpose(1, 3, 0, 2, 4).reshape(qkv.shape))


def test_tiles_of_queries_leave_out_what_none_of_them_sees():
    assert [(t.start, t.stop, s.start, s.stop) for t, s in ops.query_tiles(7, 3)] == [
        (0, 3, 0, 3), (3, 6, 0, 6), (6, 7, 0, 7),
    ]  # fmt: skip
    assert len(list(ops.query_tiles(ops.QUERY_TILE, ops.QUERY_TILE))) == 1


def test_attention_is_attend_in_every_head():
    qkv, dy = normal(2, 5, 3 * 2 * 4), normal(2, 5, 2 * 4, seed=1)
    q, k, v = ops.split_heads(qkv, 2)
    y_heads, attend = ops.attend_forward(q, k, v, mask=ops.causal_mask(5, qkv))
    dqkv = np.empty_like(qkv)
    for gradient, part in zip(
        ops.attend_backward(dy.reshape(2, 5, 2, 4).swapaxes(1, 2), attend),
        ops.split_heads(dqkv, 2),
        strict=True,
    ):
        part[:] = gradient
    y, cache = ops.attention_forward(qkv, heads=2)
    close(y, y_heads.swapaxes(1, 2).reshape(y.shape))
    close(ops.attention_backward(dy, cache)[0], dqkv)


def test_the_last_queries_see_every_earlier_key():
    """With a past of m - n keys, which no mask of n times touches."""
    q, k, v = (normal(2, 5, 4, seed=seed) for seed in range(3))
    y, _ = ops.attend_forward(q, k, v, mask=ops.causal_mask(5, q))
    last, _ = ops.attend_forward(q[:, 3:], k, v, mask=ops.causal_mask(9, q))
    close(last, y[:, 3:])


def test_recomputed_outputs_are_the_same_bit_for_bit():
    y, cache = ops.layer_norm_forward(normal(3, 4), normal(4, seed=1), normal(4, seed=2))
    assert np.array_equal(cache.output(), y)
    y, cache = ops.gelu_forward(normal(3, 4))
    assert np.array_equal(cache.output(), y)


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


@pytest.mark.parametrize("tile", [2, 64])
def test_no_score_however_large_reaches_the_past(tile, monkeypatch):
    """The last key lies far out on the side of an earlier query, which must not see it."""
    monkeypatch.setattr(ops, "QUERY_TILE", tile)
    qkv = normal(1, 4, 12)
    huge = qkv.copy()
    huge[:, 3, 4:8] = 1e6 * np.sign(qkv[:, 2, :4])
    y, y_huge = (ops.attention_forward(x, heads=1)[0] for x in (qkv, huge))
    assert np.array_equal(y_huge[:, :3], y[:, :3])


def test_heads_that_do_not_divide_the_width_raise():
    with pytest.raises(ValueError, match="reshape"):
        ops.attention_forward(normal(1, 2, 12), heads=3)
