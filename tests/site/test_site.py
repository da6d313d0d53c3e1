"""The built site: links that lead somewhere, and pages as a browser shows them.

    sphinx-build -W --keep-going -n docs docs/_build/html
    python -m pytest -m site

The browser is Chromium or Chrome (CHROMIUM names another path). It opens every page in a wide
window, light and dark, and as a phone does; screenshots go to docs/_build/screenshots.
"""

import base64
import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
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
    "light": {"width": 1280, "height": 900, "scheme": "light"},
    "dark": {"width": 1280, "height": 900, "scheme": "dark"},
    "phone": {"width": 390, "height": 844, "scheme": "light"},
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


class Browser:
    """Chromium without a window, spoken to through pipes in its DevTools protocol."""

    def __init__(self, program, profile):
        from_us, to_browser = os.pipe()
        from_browser, to_us = os.pipe()

        def as_three_and_four():
            os.dup2(from_us, 13)
            os.dup2(to_us, 14)
            os.dup2(13, 3)
            os.dup2(14, 4)

        self.process = subprocess.Popen(
            [
                *(program, "--headless", "--remote-debugging-pipe", "--no-sandbox"),
                *("--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"),
                "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            ],
            preexec_fn=as_three_and_four,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self.to, self.back = os.fdopen(to_browser, "wb"), os.fdopen(from_browser, "rb")
        self.number, self.rest, self.events, self.session = 0, b"", [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """The result of one command; events that arrive meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + b"\0")
        self.to.flush()
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def receive(self):
        while b"\0" not in self.rest:
            read = os.read(self.back.fileno(), 1 << 16)
            assert read, "the browser has gone"
            self.rest += read
        message, _, self.rest = self.rest.partition(b"\0")
        answer = json.loads(message)
        if "method" in answer:
            self.events.append(answer)
        return answer

    def open(self, url, view):
        """Open a page and wait until it is loaded and its mathematics is set; what happened."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=view["width"],
            height=view["height"],
            deviceScaleFactor=1,
            mobile=view["width"] < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": view["scheme"]}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events = []
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.receive()
        self.ask("window.MathJax ? MathJax.startup.promise.then(() => true) : true")
        return self.events

    def ask(self, expression):
        """The value of an expression of JavaScript on the page."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path, *, longest=4000):
        """The whole page, or as much of it as is `longest` pixels high."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], longest)}
        shot = self.call(
            "Page.captureScreenshot", captureBeyondViewport=True, clip={**clip, "scale": 1}
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=30)
        self.to.close()
        self.back.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "chrome")
    found = [os.environ.get("CHROMIUM"), *map(shutil.which, names)]
    program = next(filter(None, found), None)
    assert program, (
        "no Chromium is installed: apt-get install chromium, or set CHROMIUM to its path"
    )
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def address():
    """The site, served on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


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


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("path", READ)
def test_a_page_in_the_browser(browser, address, path, view):
    events = browser.open(address + path, VIEWS[view])
    browser.screenshot(SCREENSHOTS / view / f"{path.removesuffix('.html')}.png")

    requests = [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]
    outside = [url for url in requests if not url.startswith((address, "data:"))]
    assert not outside, f"requests to other hosts: {outside}"
    answers = [e["params"]["response"] for e in events if e["method"] == "Network.responseReceived"]
    failed = [answer["url"] for answer in answers if answer["status"] >= 400]
    failed += [e["params"] for e in events if e["method"] == "Network.loadingFailed"]
    assert not failed, f"failed requests: {failed}"

    said = [e["params"] for e in events if e["method"] == "Runtime.consoleAPICalled"]
    errors = [entry for entry in said if entry["type"] in ("error", "warning", "assert")]
    errors += [
        e["params"] for e in events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")
    ]
    assert not errors, f"in the console: {errors}"

    formulas = browser.ask("document.querySelectorAll('.math.notranslate').length")
    assert browser.ask("document.querySelectorAll('mjx-container').length") == formulas
    wrong = "[...document.querySelectorAll('mjx-merror, [data-mjx-error]')].map(e => e.textContent)"
    assert browser.ask(wrong) == []
    assert browser.ask(LEFT_OVER) == []
    tags = browser.ask("[...document.querySelectorAll('mjx-container a')].length")
    source = (SITE / path).read_text(encoding="utf-8")
    assert tags == len(re.findall(r"\\href\{", source))

    assert browser.ask(TOO_WIDE) <= 1, "the page scrolls sideways"
