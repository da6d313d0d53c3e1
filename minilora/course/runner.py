"""Checking a folder: each exercise in a process of its own, with limits of time and of memory.

The process is told on its standard input what to check, and with which secret word to answer; so a
file that prints a result, or ends the process, gains nothing. It works in an empty folder, on texts
that were read before, so a file that deletes others harms no other exercise.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from minilora.course.check import Failure, Verdict, check, refused
from minilora.course.exercises import Exercise
from minilora.course.puzzles import ALL

MEMORY = 2 * 2**30  # bytes of address space for an exercise, where the system has such a limit
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")} | {
    "VECLIB_MAXIMUM_THREADS": "1"
}


def check_folder(
    folder: Path, exercises: Sequence[Exercise], *, timeout: float, at_once: int | None = None
) -> Iterator[Verdict]:
    """The verdicts in the order of the exercises, each as soon as it and those before are there."""
    sources = [source_of(folder / exercise.file) for exercise in exercises]
    workers = at_once or min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda e, source: check_text(e, source, timeout), exercises, sources)


def source_of(path: Path) -> str | Failure:
    """The text of a student's file, or why there is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return Failure("missing", f"{path.name} is missing.")
    except (OSError, UnicodeDecodeError) as error:
        return Failure("error", f"{path.name} cannot be read as UTF-8: {error}")


def check_text(exercise: Exercise, source: str | Failure, timeout: float) -> Verdict:
    """The verdict on one file's text, whatever it does."""
    if isinstance(source, Failure):
        return refused(exercise, source)
    start, word = time.perf_counter(), secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="minilora-", ignore_cleanup_errors=True) as place:
        answer = Path(place) / "verdict.json"
        order = {
            "name": exercise.name, "source": source, "seconds": timeout,
            "answer": str(answer), "word": word,
        }  # fmt: skip
        status = run(order, timeout, place)
        try:
            found = json.loads(answer.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
    if found.get("word") == word:
        verdict = from_document(found["verdict"])
    elif status is None:
        what = f"{exercise.file} was still running after {timeout:g} seconds: a loop without end?"
        verdict = refused(exercise, Failure("time", what))
    else:
        what = f"{exercise.file} ended its process ({status}) before it could be judged."
        verdict = refused(exercise, Failure("error", what))
    return verdict._replace(seconds=time.perf_counter() - start)


def run(order: dict[str, Any], timeout: float, folder: str) -> str | None:
    """How a process ended that was given the order; None if it took too long."""
    paths = [Path(__file__).parents[2]]
    paths += [Path(p).absolute() for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    process = subprocess.Popen(
        [sys.executable, "-m", "minilora.course.runner"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        start_new_session=True,
    )
    try:
        process.communicate(json.dumps(order).encode(), timeout=timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process)
    code = process.returncode
    return f"status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it has started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        command = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        subprocess.run(command, capture_output=True, check=False)
    if process.poll() is None:
        process.kill()
    process.wait()


def from_document(found: dict[str, Any]) -> Verdict:
    """The verdict that `Verdict.document` was made of."""
    failure = found.pop("failure")
    if failure is not None:
        failure = Failure(**{**failure, "case": tuple(failure["case"])})
    return Verdict(**found, failure=failure)


# --- in the process ----------------------------------------------------------------------------


def limit(seconds: float) -> None:
    """A huge array is a MemoryError, and an endless loop ends even when nobody waits for it.

    Windows has no such limits, and macOS ignores that of memory.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 10, most))


def answer_order() -> None:
    """Read the order, judge, answer; and end, whatever threads are still running."""
    order = json.loads(sys.stdin.read())
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 (a student's input() ends at once)
    limit(order["seconds"])
    verdict = check(ALL[order["name"]], order["source"])
    found = {"word": order["word"], "verdict": verdict.document()}
    answer = Path(order["answer"])
    answer.parent.mkdir(exist_ok=True)
    answer.write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)


if __name__ == "__main__":
    answer_order()
