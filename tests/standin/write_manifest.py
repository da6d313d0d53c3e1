"""Writes manifest.json: which names CuPy has, and which parameters they take.

    python tests/standin/write_manifest.py

Run it where the CuPy wheel is installed (no GPU is needed). The strict stand-in for CuPy hands out
these names and no others, with these parameters and no others.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

MANIFEST = Path(__file__).with_name("manifest.json")
# Taken as **kwargs, of which only these are understood.
HIDDEN = {"einsum": "*operands, dtype=..., optimize=..."}


def manifest() -> dict[str, Any]:
    """The manifest of the CuPy that is installed; parameters as the text between parentheses."""
    import cupy

    names = public(cupy)
    return {
        "cupy": cupy.__version__,
        "values": [name for name, value in names.items() if is_value(value)],
        "ufuncs": parameters({n: f for n, f in names.items() if isinstance(f, cupy.ufunc)}),
        "functions": parameters(functions_of(cupy)) | HIDDEN,
        "linalg": parameters(functions_of(cupy.linalg)),
        "methods": parameters(
            {n: f for n, f in public(cupy.ndarray).items() if inspect.ismethoddescriptor(f)}
        ),
        "attributes": [n for n, a in public(cupy.ndarray).items() if inspect.isgetsetdescriptor(a)],
    }


def public(owner: Any) -> dict[str, Any]:
    """The public names of a module or class, in alphabetical order."""
    return {name: getattr(owner, name) for name in dir(owner) if not name.startswith("_")}


def functions_of(module: ModuleType) -> dict[str, Any]:
    """The functions and generalised ufuncs among a module's public names."""
    kinds = ("function", "_GUFunc")
    return {name: f for name, f in public(module).items() if type(f).__name__ in kinds}


def is_value(value: Any) -> bool:
    """Whether this is a number, `newaxis`, or a dtype: the same object in NumPy."""
    is_dtype = isinstance(value, type) and issubclass(value, np.generic)
    return is_dtype or value is None or type(value) is float


def parameters(functions: dict[str, Any]) -> dict[str, str]:
    """The parameters by name; functions that do not tell theirs, or hide them, are left out."""
    found = {name: signature(f) for name, f in functions.items()}
    return {name: text for name, text in found.items() if text is not None and "**" not in text}


def signature(f: Any) -> str | None:
    """The parameters of a function as Python code, its defaults as `...` and no annotations."""
    try:
        parts = list(inspect.signature(f).parameters.values())
    except ValueError:  # written in Cython: the first line of its docstring has them
        return from_docstring(f)
    bare = [p.replace(annotation=p.empty) for p in parts]
    kept = [p if p.default is p.empty else p.replace(default=...) for p in bare]
    text = str(inspect.Signature(kept))[1:-1]
    return text.replace("=Ellipsis", "=...")


def from_docstring(f: Any) -> str | None:
    """`a, axis=..., out=...` of "class.f(self, a, int axis=None, out=None) -> array"."""
    first = (f.__doc__ or "").partition("\n")[0].replace("\\*", "*")
    inside = re.fullmatch(r"[\w.]+\((.*)\)(?: -> \w+)?", first)
    if inside is None or "[" in inside[1]:  # outputs in brackets: not ours
        return None
    parts = [part.strip() for part in inside[1].split(",")]
    names = [part.split("=")[0].split(" ")[-1] + "=..." * ("=" in part) for part in parts]
    return ", ".join(name for name in names if name != "self")


if __name__ == "__main__":
    MANIFEST.write_text(json.dumps(manifest(), indent=1) + "\n", encoding="utf-8", newline="\n")
