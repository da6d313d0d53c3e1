"""Shows signatures and docstrings as they stand in the source.

Sphinx takes docstrings for reStructuredText, in which a lone * or _ and an indented line have
meanings of their own; ours are plain text with `code`, lists and indented blocks. And it spells
types out, so that Array would become numpy.ndarray[Any, Any]; autodoc_type_aliases does not reach
into tuples or the fields of a NamedTuple. (intersphinx would fetch from the network in each build.)
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Container
from typing import Any

from docutils import nodes
from repository import definitions, from_page, locate, modules, uri_of
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

# Names in annotations that belong to others: they have no page here, and need none.
FOREIGN = re.compile(
    r"(numpy|np|argparse|ast|collections|jinja2|nodes|os|pathlib|re|subprocess|threading)\..*"
    r"|(types|typing)\..*|date|Extension|ImmutableSandboxedEnvironment|Macro|NoReturn|Parser|Protocol"
    r"|Any|Callable|Iterable|Iterator|Literal|Mapping|ModuleType|Path|Sequence|TypeAlias"
)


def as_rst(text: str, names: Container[str] = (), module: str = "") -> str:
    """The reStructuredText of a docstring; code that is one of a module's names becomes a link."""

    def marked(part: str) -> str:
        code = part.strip("`")
        if not part.startswith("`"):
            return re.sub(r"([\\*_|<])", r"\\\1", part)
        return f":py:obj:`{code} <{module}.{code}>`" if code in names else f"`{part}`"

    paragraphs = (p for p in re.split(r"\n\s*\n", text) if p.strip())
    return "\n\n".join(
        f"::\n\n{p}" if p.startswith("    ") else "".join(map(marked, re.split(r"(`[^`]+`)", p)))
        for p in paragraphs
    )


def show_docstring(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    module = obj.__name__ if what == "module" else getattr(obj, "__module__", None)
    place = locate(module) if module else None
    names = definitions(place[0]).keys() - {name.rpartition(".")[2]} if place else ()
    lines[:] = [*as_rst("\n".join(lines), names, module or "").split("\n"), ""]


class Verbatim(str):
    """A string that is printed as it is where Python prints the repr of a value."""

    __repr__ = str.__str__


def show_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, result: str
) -> tuple[str, str] | None:
    """The signature with each annotation as it is written."""
    if what not in ("class", "function", "method") or signature is None:
        return None
    written = inspect.signature(obj)
    parameters = [as_written(p) for p in written.parameters.values() if p.name != "self"]
    shown = written.replace(parameters=parameters, return_annotation=written.empty)
    result = written.return_annotation
    return str(shown), result if isinstance(result, str) and what != "class" else ""


def as_written(parameter: inspect.Parameter) -> inspect.Parameter:
    """The parameter with its annotation as text; an ellipsis for a default without a literal."""
    annotation, default = parameter.annotation, parameter.default
    annotation = getattr(annotation, "__forward_arg__", annotation)  # of a NamedTuple
    if isinstance(annotation, str):
        parameter = parameter.replace(annotation=Verbatim(annotation))
    if default is not parameter.empty and repr(default).startswith("<"):
        parameter = parameter.replace(default=Verbatim("..."))
    return parameter


def qualify(app: Sphinx, doctree: nodes.document) -> None:
    """Give the classes in annotations their full names: modules import them from one another."""
    for node in doctree.findall(pending_xref):
        if node.get("refdomain") == "py" and node.get("py:module"):
            found = getattr(sys.modules.get(node["py:module"]), node["reftarget"], None)
            if isinstance(found, type) and found.__module__.startswith("minilora"):
                node["reftarget"] = f"{found.__module__}.{found.__qualname__}"


def find_type(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element
) -> nodes.Node | None:
    """Where a name leads that Sphinx does not find, such as Array without its module."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    if FOREIGN.fullmatch(target):
        return contnode
    objects = env.get_domain("py").objects
    entries = [name for name in objects if name.endswith("." + target)]
    lines = [(path, definitions(path)[target]) for path in modules() if target in definitions(path)]
    module = node.get("py:module")
    place = next(
        filter(None, map(locate, (target, f"{module}.{target}", f"minilora.{target}"))), None
    )
    if len(entries) == 1:
        uri = f"{objects[entries[0]].docname}.html#{objects[entries[0]].node_id}"
    elif place or len(lines) == 1:  # without a docstring it has no entry, but a line in a listing
        uri = uri_of(*(place or lines[0]))
    else:
        return None
    return nodes.reference("", "", contnode, refuri=from_page(node["refdoc"], uri), internal=True)


def skip_fields(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out a NamedTuple's fields, which the signature shows; their docstrings say nothing."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", show_docstring)
    app.connect("autodoc-process-signature", show_signature)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("doctree-read", qualify)
    app.connect("missing-reference", find_type)
    return {"parallel_read_safe": True}
