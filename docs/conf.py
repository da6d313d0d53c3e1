"""Settings of the site.

    pip install ".[docs]"
    sphinx-build -W --keep-going -n docs docs/_build/html

With `pip install --no-deps --require-hashes -r docs/live/requirements.txt` and npm the live page is
built too. The tutorials are executed, with small sizes where MINILORA_SMALL=1. What they printed is
kept in docs/_build as long as their text stays; delete that folder to see what changed code makes
of them.
"""

from __future__ import annotations

import importlib
import importlib.resources
import os
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
os.environ["TQDM_DISABLE"] = "1"  # a bar is no output of a tutorial
sys.path[:0] = [str(DOCS / "_ext"), str(ROOT)]

project = "minilora"
author = "the authors of minilora"
release = importlib.import_module("minilora").__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.linkcode",
    "sphinx.ext.mathjax",
    "cli_reference",
    "docstrings",
    "live_page",
    "repository",
    "slides",
]
exclude_patterns = ["_build", "*.py", "_ext", "_templates", "live"]
nitpicky = True
suppress_warnings = ["misc.highlighting_failure"]  # code that leaves something out with an ellipsis
smartquotes = False  # `--rank` has two hyphens, here as on a terminal


# --- pages in Markdown -------------------------------------------------------------------------

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3


# --- tutorials ---------------------------------------------------------------------------------

nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "cache"
nb_execution_cache_path = str(DOCS / "_build" / "executed")
nb_execution_show_tb = True
nb_execution_timeout = 1200
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
)  # for the kernel


# --- reference ---------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"


def linkcode_resolve(domain: str, info: dict[str, Any]) -> str | None:
    """Where [source] leads: the line of the listing on this site."""
    from repository import locate, uri_of

    place = locate(f"{info['module']}.{info['fullname']}")
    return "../" + uri_of(*place) if place else None  # seen from docs/api


# --- HTML --------------------------------------------------------------------------------------

html_theme = "furo"
html_title = "minilora"
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
html_css_files = ["site.css"]
# MathJax 3 as a single file with its fonts, from the package of that name: no content network.
mathjax = importlib.resources.files("sphinx-mathjax-offline") / "static/mathjax/tex-svg-full.js"
html_static_path = ["_static", str(mathjax)]
templates_path = ["_templates"]
mathjax_path = mathjax.name
