"""The operations that a Llama has and GPT-2 has not, compared with plain sums and other views."""

import numpy as np
import pytest
from helpers import normal

from minilora import llama_ops, ops


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def angles(T, half, seed=0):
    angle = normal(T, 1, half, seed=seed)
    return angle, {"cos": np.cos(angle), "sin": np.sin(angle)}


# --- RMS norm ----------------------------------------------------------------------------------


def test_rms_norm_equals_the_plain_loop():
    x, w = normal(2, 3, 5), normal(5, seed=1)
    y, _ = llama_ops.rms_norm_forward(x, w, eps=0.1)
    for place in np.ndindex(2, 3):
        mean_square = sum(entry**2 for entry in x[place]) / 5
        close(y[place], [w[i] * x[place][i] / (mean_square + 0.1) ** 0.5 for i in range(5)])


def test_the_gradient_of_rms_norm_is_orthogonal_to_x_and_keeps_its_mean():
    x, dy = normal(4, 6), normal(4, 6, seed=1)
    _, cache = llama_ops.rms_normalise_forward(x, eps=0.0)
    (dx,) = llama_ops.rms_normalise_backward(dy, cache)
    close((dx * x).sum(axis=-1), 0.0)
    assert np.abs(dx.mean(axis=-1)).min() > 1e-3, "a layer norm's gradient, which has no mean"


def test_rms_norm_of_a_centred_row_is_the_layer_norm_without_bias():
    x, w = normal(4, 6), normal(6, seed=1)
    x -= x.mean(axis=-1, keepdims=True)
    y, _ = llama_ops.rms_norm_forward(x, w, eps=0.1)
    close(y, ops.layer_norm_forward(x, w, np.zeros(6), eps=0.1)[0])


# --- SwiGLU ------------------------------------------------------------------------------------


def test_swiglu_is_silu_times_u():
    g, u = normal(3, 4), normal(3, 4, seed=1)
    close(llama_ops.swiglu_forward(g, u)[0], g / (1.0 + np.exp(-g)) * u)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_swiglu_far_out_is_the_product_and_zero(dtype):
    """Without an overflow, which would be an error here, in either pass."""
    g, u = np.array([1e3, -1e3], dtype), np.array([3.0, 3.0], dtype)
    with np.errstate(all="raise"):
        y, cache = llama_ops.swiglu_forward(g, u)
        dg, du = llama_ops.swiglu_backward(np.ones_like(g), cache)
    assert y.tolist() == [3e3, 0.0]
    assert dg.tolist() == [3.0, 0.0] and du.tolist() == [1e3, 0.0]


# --- rotary positions --------------------------------------------------------------------------


def test_rotary_turns_pairs_as_complex_numbers():
    """q and k, two heads and one of width 6, by e^(iφ); v stays as it is."""
    qkv = normal(2, 5, 4 * 6)
    angle, tables = angles(5, 3)
    y, _ = llama_ops.rotary_forward(qkv, **tables, heads=3)
    x, y = qkv.reshape(2, 5, 4, 6), y.reshape(2, 5, 4, 6)
    turned = (x[..., :3, :3] + 1j * x[..., :3, 3:]) * np.exp(1j * angle)
    close(y[..., :3, :3] + 1j * y[..., :3, 3:], turned)
    assert np.array_equal(y[..., 3, :], x[..., 3, :])


def test_the_backward_pass_turns_back():
    qkv = normal(2, 5, 4 * 6)
    y, cache = llama_ops.rotary_forward(qkv, **angles(5, 3)[1], heads=3)
    close(llama_ops.rotary_backward(y, cache)[0], qkv)


def test_scores_depend_on_the_distance_alone():
    """The same q and k at every time: the score is the same along each diagonal."""
    T, half = 6, 2
    angle = np.arange(T)[:, None, None] * normal(half)
    qkv = np.tile(normal(1, 1, 3 * 2 * half), (1, T, 1))
    y, _ = llama_ops.rotary_forward(qkv, cos=np.cos(angle), sin=np.sin(angle), heads=2)
    q, k, _ = ops.split_heads(y, 1, 1)
    scores = (q @ k.swapaxes(-1, -2))[0, 0]
    for distance in range(1 - T, T):
        diagonal = np.diagonal(scores, distance)
        close(diagonal, diagonal[0])
    assert np.ptp(scores[0]) > 1e-3


# --- groups of heads ---------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [2, 64])
def test_a_group_of_heads_is_attention_with_its_keys_and_values_repeated(tile, monkeypatch):
    """Both passes; the gradients of k and v are sums over the heads of their group."""
    monkeypatch.setattr(ops, "QUERY_TILE", tile)
    B, T, G, M, K = 2, 5, 2, 3, 4
    H = G * M
    qkv, dy = normal(B, T, (H + 2 * G) * K), normal(B, T, H * K, seed=1)
    y, cache = ops.attention_forward(qkv, heads=H, kv_heads=G)
    (dqkv,) = ops.attention_backward(dy, cache)

    q, k, v = np.split(qkv.reshape(B, T, -1, K), [H, H + G], axis=2)
    repeated = np.concatenate([q, k.repeat(M, axis=2), v.repeat(M, axis=2)], axis=2)
    expected, cache = ops.attention_forward(repeated.reshape(B, T, -1), heads=H)
    close(y, expected)
    (drepeated,) = ops.attention_backward(dy, cache)
    dq, dk, dv = np.split(drepeated.reshape(B, T, -1, K), 3, axis=2)
    summed = [d.reshape(B, T, G, M, K).sum(axis=3) for d in (dk, dv)]
    close(dqkv.reshape(B, T, -1, K), np.concatenate([dq, *summed], axis=2))


def test_groups_of_one_head_are_ordinary_attention_bit_for_bit():
    qkv = normal(2, 5, 3 * 2 * 4)
    y, _ = ops.attention_forward(qkv, heads=2, kv_heads=2)
    assert np.array_equal(y, ops.attention_forward(qkv, heads=2)[0])


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError):
        ops.attention_forward(normal(1, 2, 7 * 4), heads=3, kv_heads=2)
