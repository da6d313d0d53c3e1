"""Settings of every test: Hypothesis profiles, --require-gpu, a line where oracles are missing."""

import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A shared machine is sometimes slow, so no example has a deadline. In CI the examples are the same
# in every run, and a failure prints what reproduces it.
settings.register_profile("minilora", deadline=None)
settings.register_profile("minilora-ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("minilora-ci" if os.environ.get("CI") else "minilora")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--require-gpu`, for where a GPU has to be there."""
    parser.addoption(
        "--require-gpu", action="store_true", help="fail gpu tests that find no GPU, not skip them"
    )


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """No test cuts the power, and flushing every small file to the disk takes most of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def import_file() -> Callable[[str], types.ModuleType]:
    """`import_file("docs/cost.py")` is the module of a file that belongs to no package."""

    def load(path: str) -> types.ModuleType:
        name = path.removesuffix(".py").replace("/", "_")
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line when oracle tests were left out and could not have run: torch is not there."""
    left_out = [
        report
        for outcome in ("skipped", "deselected")
        for report in terminalreporter.stats.get(outcome, [])
        if "oracle" in report.nodeid or "oracle" in getattr(report, "keywords", ())
    ]
    if left_out and importlib.util.find_spec("torch") is None:
        terminalreporter.write_line(
            "ORACLE TESTS NOT RUN: torch is not installed, so nothing was compared with PyTorch, "
            "Transformers or PEFT (pip install '.[test,oracle]', then python -m pytest -m oracle)",
            red=True,
            bold=True,
        )
