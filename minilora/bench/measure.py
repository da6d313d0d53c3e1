"""Times one case in a process of its own, so that the process's peak memory is the case's.

A job is a function without arguments that runs what is timed, once.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np

from minilora.adapters import lora_init
from minilora.backend import to_device, to_host
from minilora.bench.case import CLIP, LEARNING_RATE, PROMPT, Case
from minilora.bench.products import (
    Product,
    RecordingWorkers,
    prepare,
    recorded,
    recording,
    repeat,
    repeat_timed,
)
from minilora.bench.profile import profiling
from minilora.data import draw_batch
from minilora.evaluation import sum_nats
from minilora.generate import generate
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.keep import Plan
from minilora.llama import llama_init
from minilora.network import Net
from minilora.optim import adamw, adamw_init, clip_by_global_norm
from minilora.training.loop import batch_loss_and_grads
from minilora.tree import Tree
from minilora.workers import Workers

PROFILED = 3  # runs of the job that are profiled
TO_ANSWER = 3.0  # seconds


def random_model(case: Case) -> dict[str, Tree]:
    """The case's trees with random weights: base, and lora if it is trained."""
    c = case.config
    base = gpt_init(c, seed=0) if isinstance(c, GPTConfig) else llama_init(c, seed=0)
    if case.what != "step" or case.method != "lora":
        return {"base": base}
    return {"base": base, "lora": lora_init(base, case.lora_config, seed=0)}


def measure(
    case: Case,
    asked: Iterable[bytes],
    *,
    started: float,
    how: Literal["floor", "alone", "products"],
) -> None:
    """Time the case and its matrix products in turn, or one of the two on request (see `serve`).

    `started` is the time.perf_counter() at which this process began to import.
    """
    from threadpoolctl import threadpool_limits

    figures: dict[str, Any] = {
        "import_seconds": time.perf_counter() - started,
        "idle_rss_bytes": peak_rss(),  # Python and its libraries, before there is a model
    }
    model = random_model(case)
    # A batch is shared among threads by rows; a generation has one row, so its threads are BLAS's.
    sharing, in_blas = (1, case.threads) if case.what == "generate" else (case.threads, 1)
    with Workers(sharing, case.device) as workers, threadpool_limits(in_blas, user_api="blas"):
        job: Callable[[], Any]
        if how == "products":
            job = products_alone(products_of(case, model), workers, case.device)
        else:
            job = JOBS[case.what](case, to_device(model, case.device), workers)
        figures["first_step_seconds"] = seconds_of(job)
        figures |= blas()
        job()
        if how != "floor":
            serve(job, figures, asked)
            return
        figures["peak_rss_bytes"] = peak_rss()  # of the runs alone
        faults = page_faults()
        job()
        figures["page_faults"] = page_faults() - faults
        figures |= floor_and_breakdown(case, model, workers, job)
        print(json.dumps(figures))


def questions() -> Iterator[bytes]:
    """The lines of standard input, read by a thread, so that this process ends with its parent.

    However the parent ends, its side of the pipe is closed; this process then has TO_ANSWER seconds
    for its last answer.
    """
    lines: SimpleQueue[bytes] = SimpleQueue()

    def read() -> None:
        with open(0, "rb", buffering=0, closefd=False) as pipe:  # no buffer to be locked at exit
            for line in pipe:
                lines.put(line)
        lines.put(b"")
        time.sleep(TO_ANSWER)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return iter(lines.get, b"")


def serve(job: Callable[[], Any], figures: dict[str, Any], asked: Iterable[bytes]) -> None:
    """Answer each number with the seconds of that many runs, and the end of input with the figures.

    This lets the processes that are compared take turns, each waiting while another runs.
    """
    for times in asked:
        print(json.dumps([seconds_of(job) for _ in range(int(times))]), flush=True)
    print(json.dumps(figures | {"peak_rss_bytes": peak_rss()}))


def floor_and_breakdown(
    case: Case, model: Tree, workers: Workers, job: Callable[[], Any]
) -> dict[str, Any]:
    """The job and its products alone, timed in turn; then the job's time by operation."""
    items = products_of(case, model)
    all_products = products_alone(items, workers, case.device)
    all_products()
    pairs = [(seconds_of(all_products), seconds_of(job)) for _ in range(case.steps)]
    floor_seconds, seconds = zip(*pairs, strict=True)

    profiled, alone = 0.0, Counter[str]()
    wait = partial(synchronize, case.device)
    with profiling(wait) as profile:
        for _ in range(PROFILED):
            profiled += seconds_of(job)
            for by_operation in all_products(partial(repeat_timed, wait=wait)):
                alone.update(by_operation)
    rows = [
        row(operation, taken, alone[operation] / workers.threads, profile.calls[operation])
        for operation, taken in profile.by_operation(workers.threads).items()
    ]
    rows.append(row("all else, and waiting", profiled - profile.total(workers.threads), 0.0, 0))
    return {
        "seconds": seconds,
        "floor": floor_seconds,
        "flops": sum(product.flops for item in items for product in item),
        "breakdown": sorted(rows, key=lambda row: -row["seconds"]),
    }


def products_of(case: Case, model: Tree) -> list[list[Product]]:
    """The matrix products of one run of the case: a list for each item that threads share."""
    with profiling() as names, recording(model, names.operation) as log:
        record = RecordingWorkers(case.threads, "cpu")
        JOBS[case.what](replace(case, device="cpu"), recorded(model), record)()
    return log.items


def products_alone(
    items: list[list[Product]], workers: Workers, device: str
) -> Callable[..., list[Any]]:
    """A job that runs all the products and nothing else, shared among threads as in the case."""
    ready = prepare(items, device)

    def job(each: Callable[..., Any] = repeat) -> list[Any]:
        done = list(workers.map(each, ready))
        synchronize(device)
        return done

    return job


def row(operation: str, seconds: float, products: float, calls: int) -> dict[str, Any]:
    """A line of the breakdown: means over the profiled runs."""
    return {
        "operation": operation,
        "calls": calls // PROFILED,
        "seconds": seconds / PROFILED,
        "products_seconds": products / PROFILED,
    }


# --- jobs ----------------------------------------------------------------------------------------


def training_step(case: Case, model: Tree, workers: Workers) -> Callable[[], None]:
    """A training step, of the same parts as in `train`."""
    text, rng = case.text(), np.random.default_rng(0)
    trees = {"base": model["base"], "lora": model.get("lora")}
    lora = case.method == "lora"
    plan = Plan(base=not lora, lora=lora, recompute=case.recompute)
    trained = "lora" if lora else "base"
    moments = adamw_init(trees[trained])

    def job() -> None:
        nonlocal moments
        net = Net(config=case.config, lora_config=case.lora_config, **trees)
        tokens, targets = draw_batch(text, batch=case.batch, context=case.context, rng=rng)
        _, grads = batch_loss_and_grads(
            workers, net, tokens, targets, plan=plan, device=case.device
        )
        grads, norm = clip_by_global_norm(grads, CLIP)
        trees[trained], moments = adamw(trees[trained], grads, moments, step=1, lr=LEARNING_RATE)
        to_host(norm)  # waits for a GPU

    return job


def evaluation(case: Case, model: Tree, workers: Workers) -> Callable[[], None]:
    """The loss on a batch, shared among threads as in a step."""
    tokens = case.text()[: case.tokens + 1]
    inputs, targets = (x.reshape(case.batch, case.context) for x in (tokens[:-1], tokens[1:]))
    shards = workers.shards(case.batch, case.context)
    batches = [(inputs[rows], targets[rows]) for rows in shards]

    def job() -> None:
        sum_nats(workers, Net(model["base"], case.config), batches, case.device)

    return job


def generation(case: Case, model: Tree, workers: Workers) -> Callable[[], None]:
    """The greedy continuation of a prompt."""
    net, prompt = Net(model["base"], case.config), case.text()[:PROMPT]

    def job() -> None:
        for _ in generate(net, prompt_ids=prompt, max_tokens=case.context, temperature=0.0):
            pass

    return job


JOBS = {"step": training_step, "evaluate": evaluation, "generate": generation}


# --- clocks and machines -------------------------------------------------------------------------


def seconds_of(job: Callable[[], Any]) -> float:
    """The seconds that one run of a job takes."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait until a GPU has finished its work."""
    if device != "cpu":
        import cupy

        cupy.cuda.Device().synchronize()


def peak_rss() -> int:
    """The peak resident memory of this process, in bytes."""
    status = Path("/proc/self/status")  # Linux's getrusage would count the parent's before exec
    if status.exists():
        high_water = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))
        if high_water:
            return 1024 * int(high_water[1])
    try:
        import resource
    except ImportError:
        return _peak_on_windows()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def page_faults() -> int:
    """The page faults of this process so far; 0 where they are not counted."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


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
    """NumPy's BLAS as it is now: name and version, kernel, number of threads."""
    from threadpoolctl import threadpool_info

    for library in threadpool_info():
        if library["user_api"] == "blas":
            return {
                "blas": f"{library['internal_api']} {library['version']}",
                "blas_kernel": library.get("architecture", "unknown"),
                "blas_threads": library["num_threads"],
            }
    return {"blas": "unknown", "blas_kernel": "unknown", "blas_threads": 0}
