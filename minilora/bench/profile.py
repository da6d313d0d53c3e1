"""Where the time goes: every pair and the optimiser, timed from outside while a step runs."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OTHERS = {
    "loss_and_grads",
    "cached_attention",
    "clip_by_global_norm",
    "adamw",
    "draw_batch",
    "distribution",
}


class Profile:
    """Seconds by operation and by kind of thread, without those of the operations it calls."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.local = threading.local()
        self.lock = threading.Lock()
        self.seconds: dict[tuple[str, bool], float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def operation(self) -> str:
        """The operation that this thread is running, or ""."""
        stack = getattr(self.local, "stack", [])
        return stack[-1][0] if stack else ""

    def timed(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """The operation `f`, timed under its name."""
        name = f.__name__

        @functools.wraps(f)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not hasattr(self.local, "stack"):
                self.local.stack = []
            stack = self.local.stack
            stack.append([name, 0.0])
            start = time.perf_counter()
            try:
                y = f(*args, **kwargs)
                self.wait()
                return y
            finally:
                taken = time.perf_counter() - start
                _, inside = stack.pop()
                if stack:
                    stack[-1][1] += taken
                on_main = threading.current_thread() is threading.main_thread()
                with self.lock:
                    self.seconds[name, on_main] += taken - inside
                    self.calls[name] += 1

        return wrapper

    def by_operation(self, threads: int) -> dict[str, float]:
        """Wall-clock seconds by operation: of the worker threads' seconds, the mean per thread."""
        seconds: dict[str, float] = defaultdict(float)
        for (name, on_main), taken in self.seconds.items():
            seconds[name] += taken if on_main else taken / threads
        return dict(seconds)

    def total(self, threads: int) -> float:
        """Wall-clock seconds of all operations."""
        return sum(self.by_operation(threads).values())


@contextmanager
def profiling(wait: Callable[[], None] = lambda: None) -> Iterator[Profile]:
    """In the block every operation that the package calls is timed, with a `wait` after it."""
    profile = Profile(wait)
    wrappers: dict[Callable[..., Any], Callable[..., Any]] = {}
    undo: list[Callable[[], None]] = []

    def wrapped(name: str, f: Any) -> Any:
        known = name.endswith(("_forward", "_backward")) or name in OTHERS
        if not (inspect.isfunction(f) and known and not name.startswith("_")):
            return f
        if f not in wrappers:
            wrappers[f] = profile.timed(f)
        return wrappers[f]

    for module in [m for name, m in sys.modules.items() if name.startswith("minilora.")]:
        for name, value in list(vars(module).items()):
            if wrapped(name, value) is not value:
                undo.append(functools.partial(setattr, module, name, value))
                setattr(module, name, wrapped(name, value))
    try:
        yield profile
    finally:
        for restore in undo:
            restore()
