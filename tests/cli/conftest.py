"""A tiny base, an adapter for it and a text, made once; and the command line in this process."""

import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.cli import main
from minilora.formats import save_adapter, save_base
from minilora.gpt import GPTConfig, gpt_init
from minilora.lora import LoRAConfig, lora_init
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


@pytest.fixture(scope="session")
def adapter(base):
    """The folder of an adapter that changes what the base says."""
    rng = np.random.default_rng(0)
    lora = lora_init(gpt_init(CONFIG, seed=0), LORA_CONFIG, seed=0)
    lora = map_leaves(lambda x: 0.3 * rng.standard_normal(x.shape).astype(x.dtype), lora)
    save_adapter(base.parent / "adapter", lora, LORA_CONFIG, CONFIG)
    return base.parent / "adapter"


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
