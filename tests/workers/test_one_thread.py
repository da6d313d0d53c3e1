"""One thread is the caller's own: no pool, and on one core no threadpoolctl either."""

import sys
import threading

import numpy as np
import pytest

from minilora import workers
from minilora.workers import Workers


def test_one_thread_is_the_callers_own():
    with Workers(1) as alone, Workers(2) as two:
        assert set(alone.map(lambda _: threading.get_ident(), range(3))) == {threading.get_ident()}
        assert threading.get_ident() not in two.map(lambda _: threading.get_ident(), range(3))


def test_on_one_core_neither_a_pool_nor_threadpoolctl_is_needed(monkeypatch):
    def no_pool(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(workers, "own_cores", lambda: {0})
    monkeypatch.setattr(workers, "ThreadPoolExecutor", no_pool)
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)  # its import fails
    with Workers(0) as alone:
        assert list(alone.map(lambda a, b: a * b, [2, 3], [5, 7])) == [10, 21]
    with pytest.raises(RuntimeError, match="new thread"), Workers(2):
        pass


@pytest.mark.parametrize("threads", [1, 2])
def test_an_overflow_is_silent_within_a_shard_and_nowhere_else(threads):
    with Workers(threads) as shared, np.errstate(over="raise"):
        for found in shared.map(lambda x: x * x, [np.float32(1e30)] * 2):
            assert np.isinf(found)
            with pytest.raises(FloatingPointError):
                np.float32(1e30) * np.float32(1e30)
