"""Threads that share a batch: NumPy releases the GIL in matrix products and in ufuncs alike."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

SHARD_TOKENS = 1024  # a shard's arrays stay near the core's caches; larger ones are slower


def own_cores() -> set[int]:
    """The numbers of the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on Windows and macOS
    return affinity(0) if affinity else set(range(os.cpu_count() or 1))


def cores() -> int:
    """How many cores this process may use."""
    return len(own_cores())


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory rather than return it to the system at once.

    Otherwise every large array is new memory, which the system zeroes page by page on first use:
    half the time of a small model's step. Other C libraries are not changed.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
        if mallopt is not None:
            M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
            mallopt(M_MMAP_THRESHOLD, 2**30)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(M_ARENA_MAX, 1)  # one heap for all threads: what one has freed, another can use


class Workers:
    """Threads that share a batch, each with single-threaded BLAS; `threads` 0: one for each core.

    The shards' gradients are added in the order of the shards, so results do not depend on timing.
    One thread is the caller's own; on one core nothing starts another, as a browser could not.
    """

    def __init__(self, threads: int, device: str = "cpu") -> None:
        self.on_gpu = device != "cpu"
        self.threads = 1 if self.on_gpu else threads or cores()
        self._pool: ThreadPoolExecutor | None = None
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Workers:
        keep_freed_memory()
        if cores() > 1:
            from threadpoolctl import threadpool_limits

            self._exit.enter_context(threadpool_limits(1, user_api="blas"))
        if self.threads > 1:
            self._pool = ThreadPoolExecutor(self.threads)
            self._exit.callback(self._pool.shutdown, cancel_futures=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def shards(self, batch: int, context: int) -> list[slice]:
        """The batch's rows, split evenly into a multiple of the threads, about SHARD_TOKENS each.

        On a GPU, which has cores for all of them, the whole batch is one shard.
        """
        if self.on_gpu:
            return [slice(0, batch)]
        rounds = max(1, round(batch * context / (self.threads * SHARD_TOKENS)))
        shards = min(batch, self.threads * rounds)
        edges = np.linspace(0, batch, shards + 1).astype(np.int64).tolist()
        return [slice(start, stop) for start, stop in itertools.pairwise(edges)]

    def map(self, f: Callable[..., Any], *items: Any) -> Iterator[Any]:
        """`f` of every item, in the order of the items."""

        def quiet(*arguments: Any) -> Any:
            # An overflow ends in a loss that is not finite, which is reported as such.
            with np.errstate(all="ignore"):
                return f(*arguments)

        return self._pool.map(quiet, *items) if self._pool else map(quiet, *items)
