"""The device that these tests run on: the strict stand-in for CuPy always, CuPy with `-m gpu`."""

import sys
from typing import NamedTuple

import numpy as np
import pytest
import strict_cupy

from minilora.backend import load_cupy
from minilora.data import Corpus
from minilora.errors import MiniloraError
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.model import Model
from minilora.tokenizer import ByteTokenizer

CONFIG = GPTConfig(vocab_size=256, n_positions=32, n_embd=16, n_layer=2, n_head=2)


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """`cuda`, with the stand-in behind it or CuPy. Without a GPU, CuPy's tests are skipped."""
    if request.param == "stand-in":
        monkeypatch.setitem(sys.modules, "cupy", strict_cupy.CUPY)
        strict_cupy.COPIES.reset()
        return "cuda"
    try:
        load_cupy()
    except MiniloraError as error:
        if request.config.getoption("--require-gpu"):
            pytest.fail(f"--require-gpu: {error}")
        pytest.skip(str(error))
    return "cuda"


class Copied(NamedTuple):
    """How many copies were made so far in a test."""

    to_host: int
    to_device: int


@pytest.fixture
def counters(request):
    """Reads the counters of the emulator of the CUDA calls; a GPU does not count."""
    if not request.config.pluginmanager.has_plugin("cupy_on_cpu.plugin"):
        pytest.skip("a GPU does not count copies and bytes; the emulator of the CUDA calls does")
    return request.getfixturevalue("cupy_stats")


@pytest.fixture
def copied(request, device):
    """Reads the number of copies."""
    if request.node.callspec.params["device"] == "stand-in":
        return lambda: Copied(strict_cupy.COPIES.to_host, strict_cupy.COPIES.to_device)
    stats = request.getfixturevalue("counters")
    return lambda: Copied(stats()["d2h_copies"], stats()["h2d_copies"])


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny byte-level model whose logits differ from token to token."""
    base = gpt_init(CONFIG, seed=0)
    base["wte"] *= 10.0
    folder = tmp_path_factory.mktemp("nowhere")
    return Model(base, CONFIG, tokenizer=ByteTokenizer(), folder=folder)


@pytest.fixture(scope="session")
def corpus():
    """A text with a pattern that is quickly learned: each byte is one of two after the last."""
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.integers(1, 3, size=1300), dtype=np.int32) % 256
    return Corpus(tokens[:1000], tokens[1000:], 1000, 300, 1, "a text")
