"""AdamW, clipping and the schedule, compared with plain loops over single numbers."""

import math

import numpy as np
import pytest
from helpers import assert_trees_close, assert_trees_equal, copied
from hypothesis import given
from hypothesis import strategies as st

from minilora import tree
from minilora.optim import adamw, adamw_init, clip_by_global_norm, global_norm, warmup_cosine

SHAPES = {"w": (3, 4), "b": (4,), "table": (2, 3, 2)}


def random_tree(seed, dtype=np.float64):
    """A tree with lists, a matrix, a vector and a 3-D array."""
    rng = np.random.default_rng(seed)
    leaves = {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}
    return {"w": leaves["w"], "blocks": [{"b": leaves["b"]}, {}], "t": [leaves["table"]]}


def plain_adamw(p, gradients, *, lrs, beta1, beta2, eps, weight_decay):
    """The algorithm on one number, in Python's floats (Loshchilov & Hutter 2019, alg. 2)."""
    m = v = 0.0
    for t, (g, lr) in enumerate(zip(gradients, lrs, strict=True), 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        p = p - lr * (m_hat / (math.sqrt(v_hat) + eps) + weight_decay * p)
    return p


@given(
    seed=st.integers(0, 999),
    lr=st.floats(1e-4, 1.0),
    beta1=st.floats(0.0, 0.99),
    beta2=st.floats(0.0, 0.999),
    eps=st.sampled_from([1e-8, 0.1]),
    weight_decay=st.floats(0.0, 0.5),
)
def test_adamw_is_the_published_algorithm_number_by_number(
    seed, lr, beta1, beta2, eps, weight_decay
):
    steps = 4
    initial = params = random_tree(seed)
    gradients = [random_tree(1000 * seed + step) for step in range(1, steps + 1)]
    lrs = [lr / step for step in range(1, steps + 1)]
    moments = adamw_init(params)
    for step in range(steps):
        params, moments = adamw(
            params,
            gradients[step],
            moments,
            step=step + 1,
            lr=lrs[step],
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
        )
    flat_gradients = [tree.flatten(g) for g in gradients]
    for path, leaf in tree.flatten(initial).items():
        decay = weight_decay if leaf.ndim >= 2 else 0.0
        for at in np.ndindex(leaf.shape):
            expected = plain_adamw(
                float(leaf[at]),
                [float(g[path][at]) for g in flat_gradients],
                lrs=lrs,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=decay,
            )
            actual = tree.flatten(params)[path][at]
            assert actual == pytest.approx(expected, rel=1e-9, abs=1e-12), (path, at)


def test_the_moments_start_at_zero_and_are_running_means():
    params = random_tree(0, np.float32)
    moments = adamw_init(params)
    for part in moments:
        assert_trees_equal(part, tree.map_leaves(np.zeros_like, params))
    grads = random_tree(1, np.float32)
    _, moments = adamw(params, grads, moments, step=1, lr=0.1, beta1=0.9, beta2=0.99)
    assert_trees_close(moments.m, tree.map_leaves(lambda g: 0.1 * g, grads), rtol=1e-5)
    assert_trees_close(moments.v, tree.map_leaves(lambda g: 0.01 * g * g, grads), rtol=1e-5)


def test_the_first_step_moves_every_entry_by_the_rate():
    """The bias corrections cancel the initial zeros: without them, |step| is 0.3 lr or so."""
    params, grads = random_tree(0), random_tree(1)
    new, _ = adamw(params, grads, adamw_init(params), step=1, lr=0.01, eps=0.0)
    expected = tree.map_leaves(lambda p, g: p - 0.01 * np.sign(g), params, grads)
    assert_trees_close(new, expected, rtol=1e-12)


def test_under_a_constant_gradient_every_step_moves_by_the_rate():
    """m̂ is then g and v̂ is g² at any step; corrections that end early show in the later ones."""
    params, grads = {"w": np.zeros((2, 2))}, {"w": np.full((2, 2), 0.3)}
    moments = adamw_init(params)
    for step in range(1, 300):
        new, moments = adamw(params, grads, moments, step=step, lr=0.1, eps=0.0)
        np.testing.assert_allclose(params["w"] - new["w"], 0.1, rtol=1e-9, err_msg=str(step))
        params = new


def test_decay_acts_on_matrices_alone_and_not_on_the_gradient():
    params = random_tree(0)
    zero = tree.map_leaves(np.zeros_like, params)
    new, moments = adamw(params, zero, adamw_init(params), step=1, lr=0.1, weight_decay=0.5)
    expected = tree.map_leaves(lambda p: p * 0.95 if p.ndim >= 2 else p, params)
    assert_trees_close(new, expected, rtol=1e-12)
    assert_trees_equal(moments.v, zero)  # decoupled: the moments see no decay


def test_a_gradient_of_zero_leaves_zero_where_it_is():
    params = {"w": np.zeros((2, 2), np.float32)}
    new, _ = adamw(params, copied(params), adamw_init(params), step=1, lr=1.0)
    np.testing.assert_array_equal(new["w"], 0.0)  # 0 / (0 + ε), not 0 / 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_is_changed_and_the_dtype_stays(dtype):
    params, grads = random_tree(0, dtype), random_tree(1, dtype)
    moments = adamw_init(params)
    _, moments = adamw(params, grads, moments, step=1, lr=0.1)
    given = [params, grads, moments.m, moments.v]
    before = copied(given)
    clipped, norm = clip_by_global_norm(grads, 0.5)
    new, new_moments = adamw(
        params, clipped, moments, step=2, lr=warmup_cosine(2, steps=9, peak=0.1, warmup=3),
        weight_decay=0.1,
    )  # fmt: skip
    assert_trees_equal(given, before)
    for leaf in tree.flatten([clipped, new, new_moments.m, new_moments.v]).values():
        assert leaf.dtype == dtype
    assert norm.dtype == dtype
    assert tree.flatten(new).keys() == tree.flatten(params).keys()


# --- clipping ----------------------------------------------------------------------------------


def test_the_global_norm_is_that_of_one_long_vector():
    grads = random_tree(3)
    long = np.concatenate([g.ravel() for g in tree.flatten(grads).values()])
    assert float(global_norm(grads)) == pytest.approx(
        math.sqrt(sum(x * x for x in long)), rel=1e-12
    )
    assert float(global_norm({"a": np.array([3.0]), "b": [np.array([[4.0]])]})) == 5.0


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e9])
def test_clipping_bounds_the_norm_and_keeps_the_direction(max_norm):
    grads = random_tree(3)
    norm = float(global_norm(grads))
    clipped, before = clip_by_global_norm(grads, max_norm)
    assert float(before) == pytest.approx(norm)
    assert float(global_norm(clipped)) == pytest.approx(min(norm, max_norm), rel=1e-5)
    scale = min(1.0, max_norm / norm)
    assert_trees_close(clipped, tree.map_leaves(lambda g: g * scale, grads), rtol=1e-5)


def test_small_gradients_are_not_touched_by_clipping():
    grads = tree.map_leaves(lambda g: 1e-3 * g, random_tree(3, np.float32))
    clipped, _ = clip_by_global_norm(grads, 1.0)
    assert_trees_equal(clipped, grads)


def test_gradients_of_zero_are_clipped_to_zero():
    clipped, norm = clip_by_global_norm({"w": np.zeros(3)}, 1.0)
    assert norm == 0.0
    np.testing.assert_array_equal(clipped["w"], 0.0)


# --- the schedule ------------------------------------------------------------------------------


def test_the_schedule_at_its_corners():
    def rate(step):
        return warmup_cosine(step, steps=110, peak=2.0, warmup=10, floor=0.1)

    assert rate(1) == pytest.approx(0.2)
    assert rate(5) == pytest.approx(1.0)
    assert rate(10) == 2.0
    assert rate(60) == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half way down the cosine
    assert rate(35) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert rate(110) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"),
    [(1, 0, [0.1]), (2, 0, [0.55, 0.1]), (2, 2, [0.5, 1.0]), (2, 4, [0.25, 0.5]), (1, 1, [1.0])],
)
def test_the_schedule_of_very_short_runs(steps, warmup, expected):
    rates = [warmup_cosine(t, steps=steps, peak=1.0, warmup=warmup) for t in range(1, steps + 1)]
    assert rates == pytest.approx(expected)


@given(steps=st.integers(1, 200), warmup=st.integers(0, 250), floor=st.floats(0, 1))
def test_the_schedule_rises_then_falls_within_its_bounds(steps, warmup, floor):
    rates = [
        warmup_cosine(step, steps=steps, peak=3.0, warmup=warmup, floor=floor)
        for step in range(1, steps + 1)
    ]
    top = min(warmup, steps)
    assert all(a <= b for a, b in zip(rates[:top], rates[1:top], strict=False))
    assert all(a >= b for a, b in zip(rates[max(0, top - 1) :], rates[top:], strict=False))
    assert all(0 < rate <= 3.0 for rate in rates) or floor == 0
    assert all(rate >= 3.0 * floor - 1e-12 for rate in rates[warmup:])
