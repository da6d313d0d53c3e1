"""The built site: links that lead somewhere, and pages as a browser shows them.

    sphinx-build -W --keep-going -n docs docs/_build/html
    python -m pytest -m site

Playwright drives the Chromium or Chrome that is here (CHROMIUM names another path; where there is
none, `playwright install chromium` fetches one). It opens every page in a wide window, light and
dark, and as a phone does; screenshots go to docs/_build/screenshots.
"""

import contextlib
import functools
import html
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

import minilora

pytestmark = pytest.mark.site

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "_build" / "html"
SCREENSHOTS = ROOT / "docs" / "_build" / "screenshots"
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
READ = [page for page in PAGES if not page.startswith(("source/", "genindex", "py-modindex"))]
VIEWS = {
    "light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
}


def test_the_site_is_built():
    command = "sphinx-build -W --keep-going -n docs docs/_build/html"
    assert "index.html" in PAGES, f"there is no site in {SITE}: {command}"


# --- links ---------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The identifiers of a page, what it links to, and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = [], [], []
        self.feed((SITE / path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        if tag == "a":
            self.links += [given["href"]] if "href" in given else []
        elif tag == "link" and given.get("rel") in ("canonical", "next", "prev"):
            pass
        else:
            self.loads += [given[name] for name in ("src", "href") if given.get(name)]


page_of = functools.cache(Page)


@pytest.mark.parametrize("path", PAGES)
def test_every_link_inside_the_site_leads_somewhere(path):
    page = page_of(path)
    source = (SITE / path).read_text(encoding="utf-8")
    in_mathematics = re.findall(r"\\href\{([^}]*)\}", source)
    assert len(page.ids) == len(set(page.ids)), "the same id twice"
    for link in [*page.links, *page.loads, *in_mathematics]:
        if urlsplit(link).scheme or link in ("#", ""):
            continue
        target, _, anchor = unquote(urljoin(path, link)).partition("#")
        target = target.partition("?")[0]
        assert (SITE / target).exists(), f"{path} links to {link}"
        if anchor and target.endswith(".html"):
            assert anchor in page_of(target).ids, f"{path} links to {link}"


@pytest.mark.parametrize("path", PAGES)
def test_a_page_loads_nothing_from_elsewhere(path):
    for link in page_of(path).loads:
        parts = urlsplit(link)
        assert parts.scheme in ("", "data") and not parts.netloc, f"{path} loads {link}"


# --- what the pages are about --------------------------------------------------------------------


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "derivations").glob("*.md")), ids=str)
def test_each_tag_leads_to_the_line_that_completes_it(page):
    """That is the line which the page quotes for the tag."""
    text = page.read_text(encoding="utf-8")
    built = (SITE / "derivations" / f"{page.stem}.html").read_text(encoding="utf-8")
    for tag in re.findall(r"\\tag\{([^}]*)\}", text):
        link = re.search(
            rf"\\tag\{{\$\\href\{{\.\./(source/.*?\.html)#(L-\d+)\}}\{{\\text\{{{tag}\}}", built
        )
        assert link, f"[{tag}] has no link"
        listing = (SITE / link[1]).read_text(encoding="utf-8")
        line = listing.partition(f'<a id="{link[2]}"')[2].partition("\n")[0].partition("</a>")[2]
        line = html.unescape(re.sub("<[^>]*>", "", line)).lstrip(" 0123456789")
        quoted = re.search(rf"^\| \[{tag}\] \| `[^`]+` \| `([^`]+)` \|$", text, re.MULTILINE)[1]
        assert line.startswith(quoted), f"[{tag}] leads to {line!r} in {link[1]}, not to {quoted!r}"
        if tag.startswith("BLOCK."):  # two lines of a block are equal but for their tags
            assert f"[{tag}]" in line, f"[{tag}] leads to {line!r} in {link[1]}"


def test_every_module_has_its_place_in_the_reference():
    folder = Path(minilora.__path__[0])
    paths = (path.relative_to(folder.parent).with_suffix("") for path in folder.rglob("*.py"))
    names = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")]
    documented = re.findall(r"automodule:: (\S+)", "\n".join(pages))
    assert sorted(documented) == sorted(names - {"minilora", "minilora.__main__"})


def test_every_public_name_is_in_the_table_of_the_interface():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+) <minilora\.([\w.]+)>`", page)
    assert sorted(name for name, _ in named) == sorted(minilora.__all__)
    for name, place in named:
        assert f"{getattr(minilora, name).__module__}.{name}" == f"minilora.{place}"


def test_every_option_is_on_the_page_of_the_command_line():
    from minilora.cli.parser import parser

    text = (SITE / "cli.html").read_text(encoding="utf-8")
    (commands,) = (a.choices for a in parser()._actions if hasattr(a.choices, "values"))
    assert len(commands) >= 7
    for name, command in commands.items():
        for action in command._actions:
            for option in action.option_strings:
                if option not in ("-h", "--help"):
                    anchor = f"cmdoption-minilora-{name}-{option.lstrip('-')}"
                    assert f'id="{anchor}"' in text, f"minilora {name} {option}"


# --- a browser -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=VIEWS)
def view(request, browser):
    """The name of a view, and a browser's windows in it."""
    context = browser.new_context(**VIEWS[request.param], is_mobile=request.param == "phone")
    yield request.param, context
    context.close()


# What a reader would see of mathematics that was not set, outside of code.
LEFT_OVER = r"""
(() => {
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const parent = walk.currentNode.parentElement;
    const code = parent.closest("pre, code, script, style, mjx-container");
    if (!code && /\$\$|\\\(|\\\[|\\begin|\\tag|\\frac/.test(walk.currentNode.data))
      found.push(walk.currentNode.data.trim().slice(0, 80));
  }
  return found;
})()
"""


# By how many pixels the page, or the column of its text, is wider than its room.
TOO_WIDE = """
const parts = [...document.querySelectorAll("html, .content")];
Math.max(...parts.map(part => part.scrollWidth - part.clientWidth))
"""


@pytest.mark.parametrize("path", READ)
def test_a_page_in_the_browser(view, address, path):
    name, context = view
    with contextlib.closing(context.new_page()) as page:
        requested, failed, said = [], [], []
        page.on("request", lambda request: requested.append(request.url))
        page.on("requestfailed", lambda request: failed.append(request.url))
        page.on("response", lambda answer: answer.ok or failed.append(answer.url))
        page.on("console", lambda message: said.append((message.type, message.text)))
        page.on("pageerror", lambda error: said.append(("error", error)))
        page.goto(address + path)
        page.evaluate("window.MathJax ? MathJax.startup.promise.then(() => true) : true")
        take_picture(page, SCREENSHOTS / name / f"{path.removesuffix('.html')}.png")

        outside = [url for url in requested if not url.startswith((address, "data:"))]
        assert requested and not outside, f"requests to other hosts: {outside}"
        assert not failed, f"failed requests: {failed}"
        errors = [entry for entry in said if entry[0] in ("error", "warning", "assert")]
        assert not errors, f"in the console: {errors}"

        formulas = page.locator(".math.notranslate").count()
        assert page.locator("mjx-container").count() == formulas
        assert page.locator("mjx-merror, [data-mjx-error]").all_text_contents() == []
        assert page.evaluate(LEFT_OVER) == []
        source = (SITE / path).read_text(encoding="utf-8")
        assert page.locator("mjx-container a").count() == len(re.findall(r"\\href\{", source))
        assert page.evaluate(TOO_WIDE) <= 1, "the page scrolls sideways"


def take_picture(page, path, *, longest=4000):
    """The whole page, or as much of it as is `longest` pixels high."""
    width, height = page.evaluate("(({scrollWidth: w, scrollHeight: h}) => [w, h])(document.body)")
    clip = {"x": 0, "y": 0, "width": width, "height": min(height, longest)}
    page.screenshot(path=path, full_page=True, clip=clip)
