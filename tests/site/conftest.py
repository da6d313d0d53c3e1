"""The built site on this machine, and a browser that can reach nothing else."""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest

SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "chrome")
    found = [os.environ.get("CHROMIUM"), *map(shutil.which, names)]
    nothing_else = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(
            executable_path=next(filter(None, found), None), args=[nothing_else]
        )


@pytest.fixture(scope="session")
def address():
    """The site, served on this machine below a folder, as a project's pages are."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            inside = path.startswith("/minilora/")
            return super().translate_path(path.removeprefix("/minilora") if inside else "/none")

        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/minilora/"
        server.shutdown()
