"""Random batches to train on and consecutive windows to evaluate with."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data import check_length, draw_batch, windows
from minilora.errors import MiniloraError


@given(
    length=st.integers(2, 60),
    context=st.integers(1, 20),
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_a_batch_is_windows_and_their_next_tokens(length, context, batch, seed):
    context = min(context, length - 1)
    tokens = np.arange(100, 100 + length, dtype=np.int32)
    inputs, targets = draw_batch(
        tokens, batch=batch, context=context, rng=np.random.default_rng(seed)
    )
    assert inputs.shape == targets.shape == (batch, context)
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(targets, inputs + 1)
    np.testing.assert_array_equal(np.diff(inputs, axis=1), 1)
    assert inputs.min() >= tokens[0] and targets.max() <= tokens[-1]


def test_every_window_can_be_drawn():
    tokens = np.arange(10, dtype=np.int32)
    inputs, _ = draw_batch(tokens, batch=1000, context=4, rng=np.random.default_rng(0))
    assert set(inputs[:, 0].tolist()) == set(range(6))


def test_windows_are_drawn_evenly_and_each_on_its_own():
    tokens = np.arange(104, dtype=np.int32)
    inputs, _ = draw_batch(tokens, batch=100_000, context=4, rng=np.random.default_rng(0))
    starts = inputs[:, 0]
    counts = np.bincount(starts, minlength=100)
    assert len(counts) == 100
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)
    for distance in (1, 2, 50_000):
        assert np.mean(starts[distance:] == starts[:-distance]) < 0.02, distance


def test_the_generator_decides_the_batch():
    tokens = np.arange(1000, dtype=np.int32)

    def starts(step):
        rng = np.random.default_rng([7, step])
        return draw_batch(tokens, batch=8, context=16, rng=rng)[0][:, 0].tolist()

    assert starts(3) == starts(3)
    assert starts(3) != starts(4)


@given(length=st.integers(0, 70), context=st.integers(1, 20), batch=st.integers(1, 5))
def test_windows_predict_every_token_but_the_first_once(length, context, batch):
    tokens = np.arange(length, dtype=np.int32)
    seen = []
    for inputs, targets in windows(tokens, context=context, batch=batch):
        assert inputs.shape == targets.shape
        assert 1 <= inputs.shape[0] <= batch and 1 <= inputs.shape[1] <= context
        assert inputs.dtype == targets.dtype == np.int32
        np.testing.assert_array_equal(targets, inputs + 1)
        np.testing.assert_array_equal(np.diff(inputs, axis=1), 1)
        seen += targets.ravel().tolist()
    assert seen == list(range(1, length)), "each once and in order"


def test_every_window_but_the_last_is_whole():
    tokens = np.arange(1 + 7 * 5 + 3, dtype=np.int32)
    shapes = [inputs.shape for inputs, _ in windows(tokens, context=5, batch=3)]
    assert shapes == [(3, 5), (3, 5), (1, 5), (1, 3)]


def test_text_shorter_than_the_context_is_an_error():
    check_length(np.zeros(9, np.int32), context=8, name="a.txt")
    with pytest.raises(MiniloraError, match="a.txt has 8 tokens; a context of 8 needs at least 9"):
        check_length(np.zeros(8, np.int32), context=8, name="a.txt")
