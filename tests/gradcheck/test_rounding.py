"""What differences can resolve: rounding hides no wrong gradient and is no false alarm."""

import numpy as np
import pytest

from minilora.gradcheck import GradientError, assert_close, check_pair, check_tree, max_error
from minilora.ops import attention_backward, attention_forward
from minilora.pairs import PAIRS, Sizes


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# --- large outputs -----------------------------------------------------------------------------


def linear_forward(x, w, b):
    return x @ w + b, (x, w)


def linear_backward(factor):
    """The backward pass whose dw is the right one times a factor."""

    def backward(dy, cache):
        x, w = cache
        return dy @ w.T, factor * (x.T @ dy), dy.sum(axis=0)

    return backward


@pytest.mark.parametrize(("b", "factor"), [(1e8, 1.01), (1e10, 0.0)])
@pytest.mark.parametrize("seed", range(5))
def test_a_large_bias_hides_no_wrong_weight_gradient(b, factor, seed):
    arguments = [normal(6, 4, seed=seed), normal(4, 3, seed=seed + 10), b + normal(3, seed=seed)]
    assert_close(check_pair(linear_forward, linear_backward(1.0), arguments, seed=seed))
    with pytest.raises(GradientError, match="^dw"):
        assert_close(check_pair(linear_forward, linear_backward(factor), arguments, seed=seed))


@pytest.mark.parametrize("factor", [0.0, 1.01])
def test_a_large_input_hides_no_wrong_gradient_of_a_branch(factor):
    def forward(x, branch):
        return x + branch, ()

    arguments = [1e9 * (1.0 + normal(2, 3, 4) ** 2), normal(2, 3, 4, seed=1)]
    assert_close(check_pair(forward, lambda dy, cache: (dy, dy), arguments))
    with pytest.raises(GradientError, match="^dbranch"):
        assert_close(check_pair(forward, lambda dy, cache: (dy, factor * dy), arguments))


def test_outputs_that_do_not_depend_on_an_argument_do_not_hide_its_gradient():
    """Only outputs that change add rounding errors, however large the others are."""

    def forward(x, huge):
        return np.concatenate([np.sin(x), huge]), (x,)

    def backward(factor):
        return lambda dy, cache: (factor * dy[:3] * np.cos(cache[0]), dy[3:])

    arguments = [normal(3), 1e15 * normal(3, seed=1)]
    assert check_pair(forward, backward(1.0), arguments)[0].error < 1e-8
    assert check_pair(forward, backward(1.0 + 1e-7), arguments)[0].error > 1e-8


# --- rounding alone ----------------------------------------------------------------------------


def loss_forward(logits, *, targets):
    """The cross-entropy without the maximum: for V = 1 it is 0 except for rounding."""
    loss = np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), targets])
    return loss, (logits, targets)


def loss_backward(dloss, cache):
    logits, targets = cache
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p[np.arange(len(logits)), targets] -= 1.0
    return (dloss * p / len(logits),)


def test_the_rounding_of_an_output_that_is_zero_is_no_error():
    moved = []
    for seed in range(10):
        logits, constants = normal(3, 1, seed=seed), {"targets": np.zeros(3, dtype=int)}
        checks = check_pair(loss_forward, loss_backward, [logits], constants, seed=seed)
        assert_close(checks)
        moved.append(checks[0].numeric != 0.0)
    assert any(moved), "rounding made no difference, so that nothing was tested"


@pytest.mark.parametrize("seed", [271341, 329673, 471903])  # the worst of 11,000 such losses
def test_the_rounding_of_logits_before_a_loss_near_zero_is_no_error(seed):
    pair = PAIRS["head and loss"]
    arguments, constants = pair.make(np.random.default_rng(seed), Sizes((1,), C=4, V=3))
    assert pair.forward(*arguments, **constants)[0] < 0.02
    assert_close(check_pair(pair.forward, pair.backward, arguments, constants, seed=seed))


@pytest.mark.parametrize("seed", range(10))
def test_large_attention_scores_are_no_false_alarm(seed):
    """The scores are strongly curved within a step that grows with the entries."""
    arguments = [30.0 * normal(2, 5, 18, seed=seed)]
    checks = check_pair(attention_forward, attention_backward, arguments, {"heads": 2}, seed=seed)
    assert_close(checks)


# --- float32 -----------------------------------------------------------------------------------


def cast(value, dtype):
    """Every floating-point array of a cache or of gradients in another dtype."""
    if isinstance(value, tuple):
        entries = [cast(entry, dtype) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
    if isinstance(value, np.ndarray | np.floating) and value.dtype.kind == "f":
        return value.astype(dtype)
    return value


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [n for n, p in PAIRS.items() if len(p.frozen) < len(p.arguments)])
def test_a_backward_pass_that_computes_in_float32_is_noticed(name, seed):
    pair = PAIRS[name]

    def in_float32(dy, cache):
        return cast(pair.backward(cast(dy, np.float32), cast(cache, np.float32)), np.float64)

    arguments, constants = pair.make(np.random.default_rng(seed))
    given = {
        "seed": seed, "frozen": pair.frozen, "thin": pair.thin, "entries": pair.entries
    }  # fmt: skip
    assert_close(check_pair(pair.forward, pair.backward, arguments, constants, **given))
    with pytest.raises(GradientError, match="tolerance 1e-08"):
        assert_close(check_pair(pair.forward, in_float32, arguments, constants, **given))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_arguments_and_outputs_must_be_float64(dtype):
    def rounded(x, w):
        return (x @ w).astype(dtype), (x, w)

    def exact(x, w):
        return x @ w, (x, w)

    def backward(dy, cache):
        x, w = cache
        return dy @ w.T, x.T @ dy

    x, w = normal(2, 3), normal(3, 4)
    name = np.dtype(dtype).name
    with pytest.raises(GradientError, match=f"^central differences need float64; w is {name}$"):
        check_pair(exact, backward, [x, w.astype(dtype)])
    with pytest.raises(GradientError, match=f"need float64; the output is {name}$"):
        check_pair(rounded, backward, [x, w])


def test_leaves_and_the_loss_must_be_float64():
    tree, gradients = {"a.w": normal(3)}, {"a.w": np.ones(3)}
    single = {"a.w": tree["a.w"].astype(np.float32)}
    assert max_error(check_tree(lambda t: float(np.sum(t["a.w"])), tree, gradients)) < 1e-8
    with pytest.raises(GradientError, match="need float64; a.w is float32$"):
        check_tree(lambda t: float(np.sum(t["a.w"])), single, gradients)
    with pytest.raises(GradientError, match="need float64; the loss is float32$"):
        check_tree(lambda t: np.float32(np.sum(t["a.w"])), tree, gradients)
