"""A tiny base, an adapter for it and a text, made once; and the command line in this process."""

import contextlib
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.adapters import LoRAConfig, lora_init
from minilora.cli import main
from minilora.formats import save_adapter, save_base
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.tree import map_leaves

CONFIG = GPTConfig(vocab_size=256, n_positions=32, n_embd=16, n_layer=2, n_head=2)
LORA_CONFIG = LoRAConfig(rank=2, alpha=2.0, targets=("qkv", "o", "up", "down"))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a byte-level base whose logits differ from token to token."""
    folder = tmp_path_factory.mktemp("models") / "base"
    weights = gpt_init(CONFIG, seed=0)
    weights["wte"] *= 10.0
    save_base(folder, weights, CONFIG)
    return folder


def save_some_adapter(folder, lora_config, seed):
    """Write an adapter whose factors are random, and so do something."""
    rng = np.random.default_rng(seed)
    lora = lora_init(gpt_init(CONFIG, seed=0), lora_config, seed=0)
    lora = map_leaves(lambda x: 0.3 * rng.standard_normal(x.shape).astype(x.dtype), lora)
    save_adapter(folder, lora, lora_config, CONFIG)
    return folder


@pytest.fixture(scope="session")
def adapter(base):
    """The folder of an adapter that changes what the base says."""
    return save_some_adapter(base.parent / "adapter", LORA_CONFIG, 0)


@pytest.fixture(scope="session")
def other_adapter(base):
    """The folder of an adapter of other rank, scale and targets for the same base."""
    lora_config = LoRAConfig(rank=3, alpha=2.5, targets=("q", "v", "down"), rslora=True)
    return save_some_adapter(base.parent / "other-adapter", lora_config, 1)


@pytest.fixture(scope="session")
def text(base):
    """A text of a few thousand bytes, some of them not ASCII."""
    path = base.parent / "text.txt"
    lines = [f"Line {i} of a naïve text, {i * i} squared…\n" for i in range(100)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def quick(base, text):
    """`adapt` with everything small, the output folder left to the test."""
    return [
        *("adapt", text, "--base", base, "--steps", 4, "--batch", 2, "--context", 16),
        *("--warmup", 1, "--eval-tokens", 200, "--log-every", 1, "--threads", 2, "--rank", 2),
    ]


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Run a command in this process, in an empty folder: its status, stdout and stderr lines."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(word) for word in words])
        return SimpleNamespace(
            status=status, out=out.getvalue(), err=err.getvalue(), lines=err.getvalue().splitlines()
        )

    return run


def snapshot(folder):
    """Every path below a folder, with its bytes."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(cli, tmp_path, base):
    """Assert that a command is refused as it should be, in a line that matches a pattern."""

    def run(pattern, *words):
        before = snapshot(tmp_path) | snapshot(base.parent)
        result = cli(*words)
        shown = f"{result.status}\n{result.out}\n{result.err}"
        assert result.status == 2, shown
        assert len(result.lines) == 1, shown
        assert result.lines[0].startswith("minilora: "), shown
        assert result.out == "", shown
        assert re.search(pattern, result.err), f"{pattern}\n{shown}"
        assert snapshot(tmp_path) | snapshot(base.parent) == before, "files were written"

    return run
