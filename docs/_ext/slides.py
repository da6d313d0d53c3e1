"""Slides: a page below docs/slides becomes a deck, one slide for each section.

The pages are plain Markdown. In a browser the arrow keys turn the slides; on paper each has a sheet
of its own.
"""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx


def as_deck(
    app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any
) -> str | None:
    """Another template for a deck, which of all scripts needs those of the mathematics alone."""
    if not page.startswith("slides/"):
        return None
    context["mathematics"] = [
        script
        for script in context["script_files"]
        if "MathJax" in script.attributes.get("body", "")
        or str(script.filename or "").endswith(app.config.mathjax_path)
    ]
    return "slides.html"


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", as_deck, priority=900)  # when all scripts are known
    return {"parallel_read_safe": True, "parallel_write_safe": True}
