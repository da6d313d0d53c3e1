"""Ties the site to the repository: listings of its files, and links between text, equations, code.

Pages that lie outside docs/, such as the tutorials, are copied into it before Sphinx looks. On
every page

- a relative link to a file of the repository leads to its page, or else to its listing;
- an equation's tag leads to the line of code that completes it, [TAG] in a text to the equation;
- `minilora.lora.merge`, `minilora/ops.py` and `tests/ops/test_ops.py::test_gelu` lead to the code.

The pages stay plain Markdown, which reads the same wherever the repository is shown.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from posixpath import relpath
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).parents[2]
LISTED = (
    "minilora/**/*.py",
    "tests/**/*.py",
    "docs/*.py",
    "docs/_ext/*.py",
    "noxfile.py",
    "pyproject.toml",
    ".ci/run",
)
OUTSIDE = {
    "README.md": "project/readme",
    "CONTRIBUTING.md": "project/contributing",
    "CHANGELOG.md": "project/changelog",
    "minilora/base/README.md": "project/model_card",
}
FOLDERS = {
    "docs/derivations": "derivations/linear.html",
    "minilora/formats": "source/minilora/formats/__init__.py.html",
    "tutorials": "tutorials/index.html",
}
TAGS = re.compile(r"\[([A-Z]+)\.(\d+)(?:-(\d+))?\]")
QUOTES = re.compile(r"^\| \[([A-Z]+\.\d+)\] \| `([\w.]+)` \| `([^`]+)` \|$", re.MULTILINE)
Place = tuple[str, int]  # a path in the repository, and a line

log = logging.getLogger(__name__)


# --- what is where -----------------------------------------------------------------------------


@cache
def files() -> dict[str, str]:
    """The text of every file that has a listing, by its path."""
    paths = sorted(path for pattern in LISTED for path in ROOT.glob(pattern))
    return {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in paths}


@cache
def outside() -> dict[str, str]:
    """The page of each file that lies outside docs/ and has one."""
    tutorials = sorted((ROOT / "tutorials").glob("*.py"))
    return {**OUTSIDE, **{f"tutorials/{path.name}": f"tutorials/{path.stem}" for path in tutorials}}


def copy_pages(app: Sphinx, config: Any) -> None:
    """Bring the pages of `outside` below docs/; one that has not changed is not touched."""
    docs = ROOT / "docs"
    copies = {docs / (page + Path(path).suffix): ROOT / path for path, page in outside().items()}
    for old in {*docs.glob("tutorials/*.py"), *docs.glob("project/*.md")} - copies.keys():
        old.unlink()
    for copy, source in copies.items():
        text = source.read_text(encoding="utf-8")
        if not copy.exists() or copy.read_text(encoding="utf-8") != text:
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(text, encoding="utf-8", newline="\n")


def modules() -> list[str]:
    """The paths of the package's own files."""
    return [path for path in files() if path.startswith("minilora/") and path.endswith(".py")]


def tags_in(text: str) -> list[str]:
    """The tags that a text mentions; [LN.1-4] stands for four."""
    return [
        f"{name}.{number}"
        for name, first, last in TAGS.findall(text)
        for number in range(int(first), int(last or first) + 1)
    ]


@cache
def texts() -> dict[str, str]:
    """The text of every page that may have equations, by the page's name."""
    docs = ROOT / "docs"
    paths = sorted([*docs.glob("*.md"), *docs.glob("derivations/*.md")])
    return {
        path.relative_to(docs).with_suffix("").as_posix(): path.read_text(encoding="utf-8")
        for path in paths
    }


@cache
def lines_of_tags() -> dict[str, Place]:
    """For each tag the line of code that its page quotes, `| [TAG] | `function` | `line` |`."""
    found: dict[str, Place] = {}
    for text in texts().values():
        for tag, function, quoted in QUOTES.findall(text):
            path, first = locate(function) or ("", 0)
            lines = list(enumerate(files().get(path, "").splitlines(), start=1))[
                max(first - 1, 0) :
            ]
            quotes = [(n, line) for n, line in lines if line.strip().startswith(quoted)]
            tagged = [(n, line) for n, line in quotes if tag in tags_in(line)]  # of equal lines
            if not quotes:
                log.warning("[%s]: %s has no line %r", tag, function, quoted)
            else:
                found[tag] = (path, (tagged or quotes)[0][0])
    return found


@cache
def pages_of_tags() -> dict[str, str]:
    """For each tag the page of its equation."""
    return {
        tag: page
        for page, text in texts().items()
        for tag in re.findall(r"\\tag\{([A-Z]+\.\d+)\}", text)
    }


@cache
def definitions(path: str) -> dict[str, int]:
    """The line of every class, function, method and module-level name of a Python file."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, int]]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield prefix + node.name, node.lineno
                if isinstance(node, ast.ClassDef):
                    yield from walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        yield prefix + target.id, node.lineno

    return dict(walk(ast.parse(files()[path]).body, ""))


@cache
def tests() -> dict[str, Place]:
    """Every test whose name no other has."""
    found: dict[str, list[Place]] = {}
    for path in files():
        if path.startswith("tests/") and path.endswith(".py"):
            for name, line in definitions(path).items():
                found.setdefault(name, []).append((path, line))
    return {name: places[0] for name, places in found.items() if len(places) == 1}


def locate(name: str) -> Place | None:
    """Where a file, a `FILE::TEST`, a test or a dotted name begins; None if it is none of ours."""
    if name.startswith("test_") and name in tests():
        return tests()[name]
    path, _, inside = name.partition("::")
    if path in files():
        line = definitions(path).get(inside.split("[")[0]) if inside else 1
        return (path, line) if line else None
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for path in ("/".join(parts[:length]) + end for end in (".py", "/__init__.py")):
            if path in files():
                inside = ".".join(parts[length:])
                line = definitions(path).get(inside) if inside else 1
                return (path, line) if line else None
    return None


def uri_of(path: str, line: int = 1) -> str:
    """The address of a line of a listing, from the site's root."""
    return f"source/{path}.html" + (f"#L-{line}" if line > 1 else "")


def destination(path: str) -> str | None:
    """The address of a file's page or listing, from the site's root."""
    if path in outside():
        return outside()[path] + ".html"
    if path.startswith("docs/") and path.endswith(".md"):
        return path.removeprefix("docs/").removesuffix(".md") + ".html"
    return FOLDERS.get(path) or (uri_of(path) if path in files() else None)


# --- links on pages ----------------------------------------------------------------------------


def link_page(app: Sphinx, doctree: nodes.document) -> None:
    """Put every link of this module into a page that was just read."""
    page = app.env.current_document.docname if hasattr(app.env, "current_document") else ""
    page = page or app.env.docname
    link_files(doctree, page)
    link_equations(doctree, page)
    link_rows(doctree, page)
    link_names(doctree, page)
    link_tags(doctree, page)


def from_page(page: str, uri: str) -> str:
    """An address from the site's root, seen from a page."""
    return relpath(uri, page.rpartition("/")[0] or ".")


def reference(page: str, uri: str, *children: nodes.Node) -> nodes.reference:
    return nodes.reference("", "", *children, refuri=from_page(page, uri), internal=True)


def link_files(doctree: nodes.document, page: str) -> None:
    """Relative links and pictures, as seen from where the page lies in the repository."""
    origins = {page: path for path, page in outside().items()}
    folder = (ROOT / origins.get(page, f"docs/{page}")).parent
    for raw in list(doctree.findall(nodes.raw)):  # a picture in HTML
        html = re.sub(
            r'(?<=src=")docs/(_static/[^"]+)', lambda m: from_page(page, m[1]), raw.astext()
        )
        raw.replace_self(nodes.raw("", html, format=raw["format"]))
    for node in list(doctree.findall(nodes.Element)):
        if isinstance(node, nodes.image) and (folder / node["uri"]).exists():
            node["uri"] = relpath(folder / node["uri"], (ROOT / "docs" / page).parent)
        if node.get("reftype") != "myst":
            continue
        target, _, anchor = node["reftarget"].partition("#")
        if node["refdomain"] == "doc" and target.startswith(str(ROOT)):  # MyST cut off the suffix
            found = next(
                Path(target + end) for end in (".md", ".py") if Path(target + end).exists()
            )
        elif node["refdomain"] is None and target and (folder / target).exists():
            found = (folder / target).resolve()
        else:
            continue
        path = found.relative_to(ROOT).as_posix()
        uri = destination(path)
        if uri is None:
            log.warning("%s links to %s, which has no listing (see LISTED)", page, path)
        else:
            uri += f"#{anchor}" if anchor else ""
            node.replace_self(reference(page, uri, *node.children))


def link_equations(doctree: nodes.document, page: str) -> None:
    """\\tag{LIN.1}: an anchor at the equation, and a link from its tag to the code."""

    def linked(match: re.Match[str]) -> str:
        tag = match[1]
        if tag not in lines_of_tags():
            return match[0]
        uri = from_page(page, uri_of(*lines_of_tags()[tag]))
        return rf"\tag{{$\href{{{uri}}}{{\text{{{tag}}}}}$}}"

    for node in list(doctree.findall(nodes.math_block)):
        tags = re.findall(r"\\tag\{([A-Z]+\.\d+)\}", node.astext())
        if tags:
            node.parent.insert(node.parent.index(node), nodes.target("", "", ids=tags))
            tex = re.sub(r"\\tag\{([A-Z]+\.\d+)\}", linked, node.astext())
            # As it stands: Sphinx would put lines into a split, where a tag may not be.
            node.children = [nodes.Text(rf"\[{tex}\]")]
            node["nowrap"] = node["no-wrap"] = True


def link_rows(doctree: nodes.document, page: str) -> None:
    """In a row of a table that begins with a tag, the quoted line leads to the line itself."""
    for row in doctree.findall(nodes.row):
        tags = tags_in(row[0].astext())
        if tags and tags[0] in lines_of_tags():
            for literal in list(row[-1].findall(nodes.literal)):
                uri = uri_of(*lines_of_tags()[tags[0]])
                literal.replace_self(reference(page, uri, literal.deepcopy()))


def link_names(doctree: nodes.document, page: str) -> None:
    """`minilora.lora.merge`, `minilora/ops.py`, `tests/ops/test_ops.py::test_gelu`, `test_gelu`."""
    for node in list(doctree.findall(nodes.literal)):
        if not isinstance(node.parent, nodes.reference | addnodes.pending_xref):
            place = locate(node.astext())
            uri = uri_of(*place) if place else destination(node.astext())
            if uri:
                node.replace_self(reference(page, uri, node.deepcopy()))


def link_tags(doctree: nodes.document, page: str) -> None:
    """[LIN.1] in a text leads to the equation."""
    for node in list(doctree.findall(nodes.Text)):
        inside = nodes.literal_block | nodes.math | nodes.math_block | nodes.reference
        if isinstance(node.parent, inside | nodes.literal | nodes.title):
            continue
        parts: list[nodes.Node] = []
        end = 0
        for match in TAGS.finditer(node):
            tag = tags_in(match[0])[0]
            if tag in pages_of_tags():
                parts += [nodes.Text(node[end : match.start()])]
                uri = f"{pages_of_tags()[tag]}.html#{tag}"
                parts += [reference(page, uri, nodes.Text(match[0]))]
                end = match.end()
        if parts:
            node.parent.replace(node, [*parts, nodes.Text(node[end:])])


# --- listings ----------------------------------------------------------------------------------


def listings(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for each file, with an anchor at every line and links from tags to equations."""
    languages = {".py": "python", ".md": "markdown", ".toml": "toml"}
    for path, text in files().items():
        page = f"source/{path}"

        def linked(match: re.Match[str], page: str = page) -> str:
            tag = tags_in(match[0])[0]
            if tag not in pages_of_tags():
                return match[0]
            uri = from_page(page, f"{pages_of_tags()[tag]}.html#{tag}")
            return f'<a class="reference internal" href="{uri}">{match[0]}</a>'

        code = app.builder.highlighter.highlight_block(
            text,
            languages.get(Path(path).suffix, "bash"),
            force=True,  # a language that is not understood stays plain
            linenos="inline",
            lineanchors="L",
            anchorlinenos=True,
        )
        body = f'<h1>{path}</h1>\n<div class="listing">{TAGS.sub(linked, code)}</div>'
        yield page, {"title": path, "body": body}, "page.html"


def reread(app: Sphinx, env: Any, added: set[str], changed: set[str], removed: set[str]) -> set:
    """Read every page again in each build: lines of code may have moved."""
    return {page for page in env.found_docs if not page.startswith("tutorials/")} - removed


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", copy_pages)
    app.connect("doctree-read", link_page, priority=100)  # before Sphinx collects downloads
    app.connect("html-collect-pages", listings)
    app.connect("env-get-outdated", reread)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
