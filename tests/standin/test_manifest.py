"""The manifest is what the installed CuPy says of itself."""

import importlib.util

import pytest
import write_manifest
from strict_cupy import MANIFEST


def test_what_the_manifest_holds():
    assert MANIFEST["functions"]["sum"] == "a, axis=..., dtype=..., out=..., keepdims=..."
    assert MANIFEST["ufuncs"]["exp"] == "x, /, out=..., *, casting=..., dtype=..."
    assert MANIFEST["methods"]["reshape"] == "*shape, order=..., copy=..."
    assert {"float16", "inf", "newaxis"} <= set(MANIFEST["values"])
    assert {"T", "dtype", "shape"} <= set(MANIFEST["attributes"])
    assert "norm" in MANIFEST["linalg"]
    for missing in ("errstate", "vecdot", "matvec", "unstack", "nditer"):
        assert not any(missing in names for names in MANIFEST.values()), missing


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_the_manifest_is_that_of_the_installed_cupy():
    written = write_manifest.manifest()
    if written["cupy"] != MANIFEST["cupy"]:
        pytest.skip(f"CuPy {written['cupy']} is installed; the manifest is {MANIFEST['cupy']}'s")
    assert written == MANIFEST
