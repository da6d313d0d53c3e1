"""Verdicts in print and for Gradescope, and the zip by which Gradescope grades."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilora.course.check import Verdict
from minilora.course.exercises import Exercise
from minilora.errors import MiniloraError
from minilora.formats.files import write_bytes

LONGEST = 8000  # characters of one test's output


def printed(verdict: Verdict) -> str:
    """A verdict as the command prints it."""
    mark = "right" if verdict.failure is None else "wrong"
    if verdict.failure is not None and verdict.failure.kind == "unwritten":
        mark = "empty"
    elif verdict.failure is not None and verdict.points:
        mark = "partly"
    lines = [f"{mark:7}{verdict.name:20}{verdict.points} of {verdict.max_points}"]
    lines += [f"       {line}" for line in said(verdict).splitlines()]
    return "\n".join(line.rstrip() for line in lines)


def said(verdict: Verdict) -> str:
    """The failure, and what the student's file printed."""
    parts = [] if verdict.failure is None else [verdict.failure.text()]
    if verdict.printed:
        parts.append("It printed:\n" + verdict.printed)
    return "\n".join(parts)


def gradescope(verdicts: Sequence[Verdict], names: Sequence[str] = ()) -> dict[str, Any]:
    """The results in Gradescope's format: a test for each result that is worth a point."""
    tests = []
    for verdict in verdicts:
        text = said(verdict)
        for i, (result, is_right) in enumerate(verdict.right.items()):
            output = text if not is_right or i == 0 else ""
            if (
                not is_right
                and verdict.failure
                and i
                and list(verdict.right.values())[:i].count(False)
            ):
                output = "See the first of this exercise's tests that failed."
            cut = output[:LONGEST] + ("\n… (cut)" if len(output) > LONGEST else "")
            tests.append({
                "name": f"{verdict.name}: {result}",
                "score": int(is_right),
                "max_score": 1,
                "status": "passed" if is_right else "failed",
                "output": cut,
                "output_format": "text",
                "visibility": "visible",
            })  # fmt: skip
    return {"stdout_visibility": "hidden", "tests": tests}


# --- Gradescope's autograder -------------------------------------------------------------------

SETUP = """#!/usr/bin/env bash
# Once, when Gradescope builds its image: a virtual environment with minilora in it.
set -e
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import ensurepip' 2> /dev/null || {   # Ubuntu's images have no venv, or no Python
    apt-get update -qq
    apt-get install -qq -y python3 python3-venv
}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "minilora needs Python 3.10 or newer; this is $("$PYTHON" --version)." >&2
    exit 1
}
"$PYTHON" -m venv venv
if [ -d wheels ]; then
    venv/bin/pip install --quiet --no-index --find-links wheels numpy safetensors tqdm threadpoolctl
else
    venv/bin/pip install --quiet "numpy>=2.0" "safetensors>=0.4.3" "tqdm>=4.64" "threadpoolctl>=3.1"
fi
"""

RUN = """#!/usr/bin/env bash
# For each submission. Gradescope's folders are under /autograder, or under $AUTOGRADER.
ROOT=${AUTOGRADER:-/autograder}
cd "$ROOT/source" || exit 1
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONPATH="$ROOT/source"
mkdir -p "$ROOT/results"
venv/bin/python -m minilora course check "$ROOT/submission" --timeout @TIMEOUT@ @ONLY@ \\
    --gradescope "$ROOT/results/results.json"
status=$?
[ $status -le 1 ] && exit 0   # 1: something is wrong, which the results say
exit $status
"""


def write_autograder(
    path: Path, exercises: Sequence[Exercise], *, timeout: float, every: bool
) -> None:
    """The zip that Gradescope takes: setup.sh, run_autograder and the package; two are the same.

    Raises MiniloraError where it exists already.
    """
    if path.exists():
        raise MiniloraError(f"{path} exists already; expected the name of a new file")
    only = "" if every else "--only " + " ".join(exercise.name for exercise in exercises)
    run = RUN.replace("@TIMEOUT@", f"{timeout:g}").replace("@ONLY@", only)
    package = Path(__file__).parents[1]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        _add(out, "setup.sh", SETUP.encode(), 0o755)
        _add(out, "run_autograder", run.encode(), 0o755)
        for file in sorted(package.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                name = file.relative_to(package.parent).as_posix()
                if not name.startswith("minilora/base/"):  # the model's weights, 18 MB
                    _add(out, name, file.read_bytes(), 0o644)
    write_bytes(path, packed.getvalue())


def _add(out: zipfile.ZipFile, name: str, data: bytes, mode: int) -> None:
    """A file of a fixed date with its mode, which ZipFile.writestr leaves out."""
    info = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
    info.compress_type = zipfile.ZIP_DEFLATED
    info.create_system = 3  # Unix, so that the mode is read
    info.external_attr = mode << 16
    out.writestr(info, data)
