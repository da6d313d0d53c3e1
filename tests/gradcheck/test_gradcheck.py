"""The checker itself: it accepts right gradients and names the entry of a wrong one."""

import re
from typing import Any, NamedTuple

import numpy as np
import pytest

from minilora.gradcheck import (
    DIRECTION,
    PAIR_TOLERANCE,
    TOLERANCE,
    GradientError,
    assert_close,
    check_pair,
    check_tree,
    max_error,
)


def affine_forward(x, w, *, shift=0.5):
    """y = sin(x) @ w + shift: small, not linear, and of two arguments."""
    return np.sin(x) @ w + shift, (x, w)


def affine_backward(dy, cache):
    x, w = cache
    return (dy @ w.T) * np.cos(x), np.sin(x).T @ dy


def arguments(dtype=np.float64):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in [(4, 3), (3, 2)]]


def check(backward, forward=affine_forward, **options):
    return check_pair(forward, backward, arguments(), {"shift": 2.0}, **options)


def spoiled(name, change):
    """The correct backward pass with one gradient replaced by change(gradient)."""

    def backward(dy, cache):
        gradients = dict(zip(("x", "w"), affine_backward(dy, cache), strict=True))
        gradients[name] = change(gradients[name])
        return tuple(gradients.values())

    return backward


def add_at(index, amount):
    def change(gradient):
        gradient[index] += amount
        return gradient

    return change


def test_a_right_pair_passes_far_below_the_tolerance():
    checks = check(affine_backward)
    assert_close(checks)
    assert [c.name for c in checks] == ["x", "w", DIRECTION]
    assert [c.entries for c in checks] == [12, 6, 1]
    assert max_error(checks) < 1e-9


def test_a_pair_s_tolerance_is_tighter_than_a_tree_s_and_another_can_be_given():
    pair = check(spoiled("w", lambda gradient: (1 + 1e-7) * gradient))
    tree, gradients = tree_and_gradients()
    leaves = check_tree(tree_loss, tree, {p: (1 + 1e-7) * g for p, g in gradients.items()})
    assert {c.tolerance for c in pair} == {PAIR_TOLERANCE}
    assert {c.tolerance for c in leaves} == {TOLERANCE}
    with pytest.raises(GradientError, match="relative error 1.0e-07, .*tolerance 1e-08"):
        assert_close(pair)
    assert_close(pair, 1e-6)
    assert_close(leaves)
    with pytest.raises(GradientError, match="tolerance 1e-08"):
        assert_close(leaves, 1e-8)


def test_entries_limits_the_entries_and_the_seed_chooses_them():
    assert [c.entries for c in check(affine_backward, entries=5)] == [5, 5, 1]
    assert check(affine_backward, entries=5) == check(affine_backward, entries=5)
    assert check(affine_backward, entries=5) != check(affine_backward, entries=5, seed=1)


def test_one_wrong_entry_is_named_with_both_values():
    checks = check(spoiled("w", add_at((2, 1), 0.25)))
    wrong = {c.name: c for c in checks if c.error > 1e-6}
    assert set(wrong) == {"w", DIRECTION}
    assert wrong["w"].worst == (2, 1)
    assert wrong["w"].analytic - wrong["w"].numeric == pytest.approx(0.25)
    both = f"is {wrong['w'].analytic:.12g}, central differences give {wrong['w'].numeric:.12g}"
    with pytest.raises(GradientError, match=r"dw\[2, 1\] " + re.escape(both)):
        assert_close(checks)


def test_the_direction_sees_an_entry_that_the_sample_missed():
    seen = set()
    for row in range(4):
        for column in range(3):
            checks = check(spoiled("x", add_at((row, column), 1e-3)), entries=1)
            seen.add(checks[0].error > 1e-6)
            assert checks[-1].error > 1e-6, f"the direction missed x[{row}, {column}]"
    assert seen == {True, False}


@pytest.mark.parametrize("amount", [1e-5, -1e-5])
def test_a_small_wrong_entry_is_noticed(amount):
    checks = check(spoiled("x", add_at((0, 0), amount)))
    assert checks[0].error > 1e-6


def test_a_gradient_of_zero_is_no_division_by_zero():
    def forward(x):
        return x - x, None

    right = check_pair(forward, lambda dy, cache: (np.zeros_like(dy),), arguments()[:1])
    assert max_error(right) == 0
    wrong = check_pair(forward, lambda dy, cache: (np.full_like(dy, 1e-3),), arguments()[:1])
    assert max_error(wrong) > 1e-6


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_fails(value):
    with pytest.raises(GradientError, match=r"dw\[0, 0\]"):
        assert_close(check(spoiled("w", add_at((0, 0), value))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: None, "dw is None, but w is not frozen"),
        (lambda g: g[:1], r"dw is float64\(1, 2\), but w is float64\(3, 2\)"),
        (lambda g: g.astype(np.float32), "dw is float32.*but w is float64"),
    ],
)
def test_a_gradient_has_its_argument_s_shape_and_dtype(change, message):
    with pytest.raises(GradientError, match=message):
        check(spoiled("w", change))


def test_a_frozen_argument_has_no_gradient():
    checks = check(spoiled("w", lambda g: None), frozen=("w",))
    assert [c.name for c in checks] == ["x", DIRECTION]
    assert_close(checks)
    with pytest.raises(GradientError, match="dw must be None"):
        check(affine_backward, frozen=("w",))


class AffineCache(NamedTuple):
    x: Any
    w: Any


def affine_with_names(x, w, *, shift=0.5):
    y, cache = affine_forward(x, w, shift=shift)
    return y, AffineCache(*cache)


def without_dx(cache):
    return cache._replace(w=None)


def backward_of_thin(dy, cache):
    """dx is None where the cache has no w."""
    if cache.w is None:
        return None, np.sin(cache.x).T @ dy
    return affine_backward(dy, cache)


def test_a_cache_that_was_thinned_makes_fewer_gradients():
    assert_close(check(backward_of_thin, affine_with_names))
    checks = check(backward_of_thin, affine_with_names, thin=without_dx, frozen=("x",))
    assert [c.name for c in checks] == ["w", DIRECTION]
    assert_close(checks)
    with pytest.raises(GradientError, match="dx must be None"):
        check(backward_of_thin, affine_with_names, frozen=("x",))
    with pytest.raises(GradientError, match="dx is None, but x is not frozen"):
        check(backward_of_thin, affine_with_names, thin=without_dx)


def test_a_thinned_cache_is_not_changed_either():
    def backward_changes_cache(dy, cache):
        np.sin(cache.x, out=cache.x)
        return None, cache.x.T @ dy

    def with_its_own_x(cache):
        return AffineCache(cache.x.copy(), None)

    with pytest.raises(GradientError, match="its cache"):
        check(backward_changes_cache, affine_with_names, thin=with_its_own_x, frozen=("x",))


def test_a_gradient_too_few_and_a_list_are_refused():
    with pytest.raises(GradientError, match="1 gradients for 2 arguments"):
        check(lambda dy, cache: affine_backward(dy, cache)[:1])
    with pytest.raises(GradientError, match="must return a tuple"):
        check(lambda dy, cache: list(affine_backward(dy, cache)))


def test_passes_that_change_what_they_were_given_are_refused():
    def forward_changes_x(x, w, *, shift):
        x += 1
        return affine_forward(x, w, shift=shift)

    def backward_changes_dy(dy, cache):
        gradients = affine_backward(dy, cache)
        dy *= 2
        return gradients

    def forward_with_state(x, w, *, shift):
        y, cache = affine_forward(x, w, shift=shift)
        return y, (*cache, np.zeros(1))

    def backward_changes_cache(dy, cache):
        cache[2][0] += 1
        return affine_backward(dy, cache[:2])

    calls = []

    def backward_with_memory(dy, cache):
        calls.append(dy)
        return tuple(len(calls) * gradient for gradient in affine_backward(dy, cache))

    with pytest.raises(GradientError, match="forward pass changed an argument"):
        check(affine_backward, forward_changes_x)
    with pytest.raises(GradientError, match="backward pass changed dy"):
        check(backward_changes_dy)
    with pytest.raises(GradientError, match="its cache"):
        check(backward_changes_cache, forward_with_state)
    with pytest.raises(GradientError, match="another result when repeated"):
        check(backward_with_memory)


def tree_loss(tree):
    return float(np.sum(np.exp(tree["a.w"])) * np.sum(tree["b"] ** 2))


def tree_and_gradients():
    a, b = arguments()
    gradients = {"a.w": np.exp(a) * np.sum(b**2), "b": 2 * b * np.sum(np.exp(a))}
    return {"a.w": a, "b": b}, gradients


def test_a_tree_is_checked_leaf_by_leaf():
    tree, gradients = tree_and_gradients()
    checks = check_tree(tree_loss, tree, gradients, entries=4)
    assert [(c.name, c.entries) for c in checks] == [("a.w", 4), ("b", 4), (DIRECTION, 1)]
    assert_close(checks)

    gradients["b"][1, 0] *= 1.001
    with pytest.raises(GradientError, match=r"db\[1, 0\]"):
        assert_close(check_tree(tree_loss, tree, gradients))


def test_tree_and_gradients_have_the_same_paths():
    tree, gradients = tree_and_gradients()
    del gradients["b"]
    with pytest.raises(GradientError, match=r"differ in \['b'\]"):
        check_tree(tree_loss, tree, gradients)


def test_dy_of_one_would_not_notice_what_a_random_dy_does():
    """Why dy is random: summed, a softmax is constant, and its gradient zero is 'right'."""

    def softmax_forward(x):
        e = np.exp(x)
        return e / e.sum(-1, keepdims=True), None

    def zero_backward(dy, cache):
        return (np.zeros_like(dy),)

    with pytest.raises(GradientError):
        assert_close(check_pair(softmax_forward, zero_backward, arguments()[:1]))
