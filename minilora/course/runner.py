"""Checking a folder: each exercise in a process of its own, with a limit of time.

The process is told on its standard input what to check, and with which secret word to answer; so a
file that prints a result, or ends the process, gains nothing.
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

ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")} | {
    "VECLIB_MAXIMUM_THREADS": "1"
}


def check_folder(
    folder: Path, exercises: Sequence[Exercise], *, timeout: float, at_once: int | None = None
) -> Iterator[Verdict]:
    """The verdicts in the order of the exercises, each as soon as it and those before are there."""
    workers = at_once or min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda exercise: check_file(folder, exercise, timeout), exercises)


def check_file(folder: Path, exercise: Exercise, timeout: float) -> Verdict:
    """The verdict on one file, whatever the file does."""
    path = folder / exercise.file
    if not path.is_file():
        return refused(exercise, Failure("missing", f"{exercise.file} is missing."))
    start = time.perf_counter()
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="minilora-") as place:
        answer = Path(place) / "verdict.json"
        order = {
            "name": exercise.name,
            "path": str(path.absolute()),
            "answer": str(answer),
            "word": word,
        }
        status = run(order, timeout)
        seconds = time.perf_counter() - start
        if status is None:
            what = (
                f"{exercise.file} was still running after {timeout:g} seconds: a loop without end?"
            )
            return refused(exercise, Failure("time", what))._replace(seconds=seconds)
        try:
            found = json.loads(answer.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
    if found.get("word") != word:
        what = f"{exercise.file} ended its process (status {status}) before it could be judged."
        return refused(exercise, Failure("error", what))._replace(seconds=seconds)
    return from_document(found["verdict"])._replace(seconds=seconds)


def run(order: dict[str, str], timeout: float) -> int | None:
    """The exit status of a process that is given the order; None if it took too long."""
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        [sys.executable, "-m", "minilora.course.runner"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        process.communicate(json.dumps(order).encode(), timeout=timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process)
    return process.returncode


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


def document(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON has it."""
    failure = None if verdict.failure is None else verdict.failure._asdict()
    return {**verdict._asdict(), "failure": failure}


def from_document(found: dict[str, Any]) -> Verdict:
    """The verdict that `document` was made of."""
    failure = found.pop("failure")
    if failure is not None:
        failure = Failure(**{**failure, "case": tuple(failure["case"])})
    return Verdict(**found, failure=failure)


def answer_order() -> None:
    """In the process: read the order, judge, answer."""
    order = json.loads(sys.stdin.read())
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 (a student's input() ends at once)
    exercise = ALL[order["name"]]
    try:
        source = Path(order["path"]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        verdict = refused(
            exercise, Failure("error", f"{exercise.file} cannot be read as UTF-8: {error}")
        )
    else:
        verdict = check(exercise, source, exercise.file)
    found = {"word": order["word"], "verdict": document(verdict)}
    Path(order["answer"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    answer_order()
