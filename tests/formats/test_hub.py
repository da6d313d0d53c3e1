"""Bases named as on the hub, held to a hub of our own: no test leaves this machine."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from minilora.errors import MiniloraError
from minilora.formats import hub, save_base
from minilora.formats.hub import fetch_base, is_hub_id
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.model import load_model

CONFIG = GPTConfig(vocab_size=256, n_positions=16, n_embd=4, n_layer=1, n_head=2)
NAME = "someone/tiny-gpt2"


@pytest.fixture
def folder(tmp_path):
    save_base(tmp_path / "base", gpt_init(CONFIG, seed=0), CONFIG)
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        *[(name, True) for name in ("openai-community/gpt2", "a/b.c_d-1")],
        *[(name, False) for name in ("gpt2", "./a/b", "../a", "/a/b", "a/b/c", "a/", "a/..")],
        *[(name, False) for name in ("", "a\\b", "C:/base", "a/b\n", "é/a", Path("a/b"))],
    ],
)
def test_what_looks_like_a_name_on_the_hub(base, expected):
    assert is_hub_id(base) == expected


def test_a_folder_of_that_name_wins(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder.rename(folder.parent / "someone")
    Path("someone/tiny-gpt2").mkdir()
    assert not is_hub_id(NAME)
    with pytest.raises(MiniloraError, match=r"someone.tiny-gpt2.config\.json does not exist"):
        load_model(NAME)


def test_a_mistyped_entry_of_a_folder_that_is_there_never_reaches_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    assert not is_hub_id("runs/mybase") and is_hub_id("nobody/mybase")
    with pytest.raises(MiniloraError, match=r"runs.mybase.config\.json does not exist; expected"):
        load_model("runs/mybase")


def test_a_name_without_an_owner_says_how_the_hub_names_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MiniloraError, match=r"gpt2.config\.json .* openai-community/gpt2"):
        load_model("gpt2")


def test_huggingface_hub_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MiniloraError, match=r"someone/tiny-gpt2 is no folder .*pip install it"):
        load_model(NAME)


class FakeHub(SimpleNamespace):
    """A huggingface_hub that is online or not, and whose cache is a folder or empty."""

    def HfApi(self):
        return self

    def model_info(self, name, *, timeout):
        assert timeout <= 10.0
        if not self.online:
            raise ConnectionError("no route\nto the hub")

    def snapshot_download(self, name, *, allow_patterns, local_files_only):
        assert name == NAME and "config.json" in allow_patterns
        assert local_files_only != self.online
        if self.cache is None:
            raise FileNotFoundError("nothing in the cache")
        return str(self.cache)


@pytest.mark.parametrize("online", [True, False])
def test_the_client_is_asked_online_and_its_cache_offline(folder, monkeypatch, online):
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub(online=online, cache=folder))
    model = load_model(NAME)
    assert model.config == CONFIG and model.folder == folder
    assert model.base_name == model.hub_id == NAME
    assert load_model(folder).base_name == str(folder)


@pytest.mark.parametrize(("online", "reason"), [(True, "nothing in"), (False, "no route to the")])
def test_why_it_cannot_be_fetched(monkeypatch, online, reason):
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub(online=online, cache=None))
    with pytest.raises(MiniloraError, match=f"cannot be fetched: {reason}"):
        fetch_base(NAME)


# --- the real client -----------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download takes; `folder` holds the one model."""

    folder: Path
    commit = "0123456789" * 4

    def do_GET(self, body=True):
        parts = self.path.strip("/").split("/")
        file = self.folder / parts[-1]
        if "/".join(parts[:2]) == "api/models" and "/".join(parts[2:4]) == NAME:
            names = [path.name for path in self.folder.iterdir()]
            files = [
                {"rfilename": n, "path": n, "type": "file", "size": 1, "oid": n} for n in names
            ]
            document = {"id": NAME, "sha": self.commit, "siblings": files}
            if "tree" in parts:
                document = files
            data = json.dumps(document).encode()
        elif parts[:4] == [*NAME.split("/"), "resolve", self.commit] and file.is_file():
            data = file.read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for name, value in {
            "Content-Length": len(data),
            "ETag": f'"{abs(hash(data)):x}"',
            "X-Repo-Commit": self.commit,
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def do_HEAD(self):
        self.do_GET(body=False)

    def log_message(self, *args):
        pass


@pytest.fixture
def client(tmp_path):
    """Runs `minilora generate --base NAME` against a hub; its exit status, stderr and seconds."""
    pytest.importorskip("huggingface_hub")

    def run(name, endpoint):
        environment = {k: v for k, v in os.environ.items() if not k.upper().startswith("HF_")}
        environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": endpoint}
        program = (
            "import sys; from minilora.cli import main; from minilora.formats import hub;"
            "hub.TIMEOUT = 1.0; sys.exit(main(sys.argv[1:]))"
        )
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", program, "generate", "--base", name, "--tokens", "3"],
            env=environment | {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stderr, time.monotonic() - start

    return run


def test_a_model_is_downloaded_once_and_then_found_offline(folder, tmp_path, client):
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    handler = type("Handler", (Server,), {"folder": folder})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        status, errors, _ = client(NAME, endpoint)
        assert status == 0, errors
        status, errors, _ = client("someone/else", endpoint)
        assert status == 2 and "someone/else is no folder here" in errors.splitlines()[-1]
        server.shutdown()
    fetched = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert fetched == {"config.json", "model.safetensors"}
    status, errors, _ = client(NAME, endpoint)
    assert status == 0, errors


def test_a_hub_that_never_answers(client):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        status, errors, seconds = client(NAME, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert status == 2 and "cannot be fetched: " in errors.splitlines()[-1], errors
    assert "Traceback" not in errors and seconds < 30.0
    assert hub.TIMEOUT <= 10.0
