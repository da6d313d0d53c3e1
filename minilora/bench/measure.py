"""Times one case in this process, which is there for nothing else, so that its peak means it."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from minilora.backend import to_device, to_host
from minilora.bench.case import PROMPT, Case
from minilora.bench.products import (
    RecordingWorkers,
    prepare,
    recorded,
    recording,
    repeat,
    repeat_timed,
)
from minilora.bench.profile import profiling
from minilora.checkpoint import History, State
from minilora.evaluation import sum_nats
from minilora.generate import generate
from minilora.gpt import gpt_init
from minilora.lora import lora_init
from minilora.optim import adamw_init
from minilora.train import Loop
from minilora.tree import Tree
from minilora.workers import Workers

WARM_UP = 2
PROFILED = 3


def random_model(case: Case) -> dict[str, Tree]:
    """The case's trees by their names: base, and lora where it is trained."""
    base = gpt_init(case.config, seed=0)
    if case.what != "step" or case.method != "lora":
        return {"base": base}
    return {"base": base, "lora": lora_init(base, case.lora_config, seed=0)}


def measure(case: Case, *, started: float, floor: bool = True) -> dict[str, Any]:
    """Seconds of every run, peak memory and, with `floor`, products and breakdown of a case.

    `started` is the time.perf_counter() when this process began to import. The peak is that of the
    runs alone: what `floor` needs comes after.
    """
    from threadpoolctl import threadpool_limits

    figures: dict[str, Any] = {"import_seconds": time.perf_counter() - started}
    model = random_model(case)
    sharing = 1 if case.what == "generate" else case.threads  # one text: only its products share
    with threadpool_limits(case.threads, user_api="blas"), Workers(sharing, case.device) as workers:
        run = RUNS[case.what](case, to_device(model, case.device), workers)
        figures["first_step_seconds"] = seconds_of(run)
        for _ in range(WARM_UP):
            run()
        figures |= blas()
        if not floor:
            figures["seconds"] = [seconds_of(run) for _ in range(case.steps)]
            return figures | {"peak_rss_bytes": peak_rss()}
        figures["peak_rss_bytes"] = peak_rss()
        figures |= floor_and_breakdown(case, model, workers, run)
    return figures


def floor_and_breakdown(
    case: Case, model: Tree, workers: Workers, run: Callable[[], None]
) -> dict[str, Any]:
    """Runs and their products alone, in turn; then where the time of a run goes."""
    with profiling() as names, recording(model, names.operation) as log:
        record = RecordingWorkers(case.threads, "cpu")
        RUNS[case.what](case, recorded(model), record)()
    flops = sum(product.flops for products in log.items for product in products)
    products = prepare(log.items, case.device)

    def all_products(each: Callable[..., Any] = repeat) -> list[Any]:
        done = list(workers.map(each, products))
        synchronize(case.device)
        return done

    all_products()
    seconds, floor_seconds = [], []
    for _ in range(case.steps):
        seconds.append(seconds_of(run))
        floor_seconds.append(seconds_of(all_products))

    with profiling() as profile:
        profiled = statistics.fmean(seconds_of(run) for _ in range(PROFILED))
    alone: dict[str, float] = {}
    for _ in range(PROFILED):
        for by_operation in all_products(repeat_timed):
            for operation, taken in by_operation.items():
                alone[operation] = alone.get(operation, 0.0) + taken / PROFILED / workers.threads
    rows: list[dict[str, Any]] = [
        {
            "operation": operation,
            "calls": profile.calls[operation] // PROFILED,
            "seconds": taken / PROFILED,
            "products_seconds": alone.get(operation, 0.0),
        }
        for operation, taken in profile.by_operation(workers.threads).items()
    ]
    rest = profiled - sum(row["seconds"] for row in rows)
    rows.append({"operation": "all else, and waiting", "calls": 0, "seconds": rest,
                 "products_seconds": 0.0})  # fmt: skip
    rows.sort(key=lambda row: -row["seconds"])
    return {
        "seconds": seconds,
        "floor": floor_seconds,
        "flops": flops,
        "breakdown": rows,
    }


# --- what is run ---------------------------------------------------------------------------------


def step(case: Case, model: Tree, workers: Workers) -> Callable[[], None]:
    """A training step, as the loop of `train` does it."""
    loop = Loop(model["base"], case.corpus(), case.config, case.lora_config, case.settings,
                case.device, workers)  # fmt: skip
    params = model["lora" if case.method == "lora" else "base"]
    state = State(0, params, adamw_init(params), History())

    def run() -> None:
        nonlocal state
        state, loss_and_norm = loop.step(state)
        to_host(loss_and_norm)  # a GPU is done only then

    return run


def evaluate(case: Case, model: Tree, workers: Workers) -> Callable[[], None]:
    """The loss on a batch, shared as that of a step."""
    tokens = case.corpus().train[: case.tokens + 1]
    inputs, targets = (x.reshape(case.batch, case.context) for x in (tokens[:-1], tokens[1:]))
    shards = workers.shards(case.batch, case.context)
    batches = [(inputs[rows], targets[rows]) for rows in shards]

    def run() -> None:
        sum_nats(workers, model["base"], None, batches, case.config, None, case.device)

    return run


def generation(case: Case, model: Tree, workers: Workers) -> Callable[[], None]:
    """The likeliest continuation of a prompt."""
    prompt = case.corpus().train[:PROMPT]

    def run() -> None:
        for _ in generate(
            model["base"],
            prompt_ids=prompt,
            config=case.config,
            max_tokens=case.context,
            temperature=0.0,
        ):
            pass

    return run


RUNS = {"step": step, "evaluate": evaluate, "generate": generation}


# --- clocks and machines -------------------------------------------------------------------------


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device != "cpu":
        import cupy

        cupy.cuda.Device().synchronize()


def peak_rss() -> int:
    """The largest resident memory that this process had, in bytes."""
    try:
        import resource
    except ImportError:
        return _peak_on_windows()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _peak_on_windows() -> int:
    import ctypes
    from ctypes import wintypes

    class Counters(ctypes.Structure):
        """PROCESS_MEMORY_COUNTERS of psapi.h."""

        _fields_ = [("cb", wintypes.DWORD), ("PageFaultCount", wintypes.DWORD)] + [
            (name, ctypes.c_size_t)
            for name in ("PeakWorkingSetSize", "WorkingSetSize", "QuotaPeakPagedPoolUsage",
                         "QuotaPagedPoolUsage", "QuotaPeakNonPagedPoolUsage",
                         "QuotaNonPagedPoolUsage", "PagefileUsage", "PeakPagefileUsage")
        ]  # fmt: skip

    kernel32 = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]
    kernel32.GetCurrentProcess.restype = wintypes.HANDLE
    kernel32.K32GetProcessMemoryInfo.argtypes = [
        wintypes.HANDLE,
        ctypes.POINTER(Counters),
        wintypes.DWORD,
    ]
    counters = Counters(cb=ctypes.sizeof(Counters))
    kernel32.K32GetProcessMemoryInfo(
        kernel32.GetCurrentProcess(), ctypes.byref(counters), counters.cb
    )
    return int(counters.PeakWorkingSetSize)


def blas() -> dict[str, Any]:
    """NumPy's BLAS as it is set now: its name and version, kernel and threads."""
    from threadpoolctl import threadpool_info

    for library in threadpool_info():
        if library["user_api"] == "blas":
            return {
                "blas": f"{library['internal_api']} {library['version']}",
                "blas_kernel": library.get("architecture", "unknown"),
                "blas_threads": library["num_threads"],
            }
    return {"blas": "unknown", "blas_kernel": "unknown", "blas_threads": 0}
