"""The strict stand-in in CuPy's place."""

import sys

import pytest
import strict_cupy


@pytest.fixture
def xp(monkeypatch):
    """The stand-in; `import cupy` finds it."""
    monkeypatch.setitem(sys.modules, "cupy", strict_cupy.CUPY)
    strict_cupy.COPIES.reset()
    return strict_cupy.CUPY
