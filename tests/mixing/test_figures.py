"""The measurements behind docs/mixing.md, on cases whose answer is known; and the page's claims."""

import re
from pathlib import Path

import numpy as np
import pytest

from minilora.adapters import LoRAConfig, lora_init
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.lora import merge
from minilora.mixing import mix
from minilora.tree import map_leaves

ROOT = Path(__file__).parents[2]
CONFIG = GPTConfig(vocab_size=11, n_positions=6, n_embd=32, n_layer=1, n_head=2)
LORA = LoRAConfig(rank=2, alpha=3.0, targets=("q", "v", "o", "up", "down"))


@pytest.fixture(scope="module")
def script(import_file):
    return import_file("docs/mixing.py")


def a_model(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    base = gpt_init(CONFIG, seed=0, dtype=np.float64)
    lora = lora_init(base, LORA, seed=0)
    lora = map_leaves(lambda x: 0.1 * rng.standard_normal(x.shape), lora)
    return (map_leaves(lambda x: x.astype(dtype), tree) for tree in (base, lora))


def test_the_average_of_unrelated_factors_is_off_by_some_71_percent(script):
    _, first = a_model(seed=1)
    _, second = a_model(seed=2)
    exact = script.update_of(*mix([(first, LORA), (second, LORA)], [0.5, 0.5]))
    naive = script.update_of(script.average(first, second), LORA)
    assert script.distance(naive, exact) == pytest.approx(1 / np.sqrt(2), rel=0.1)
    assert script.distance(script.update_of(script.average(first, first), LORA), exact) > 0.1
    assert script.distance(exact, exact) == 0.0


def test_the_average_with_itself_is_exact(script):
    _, lora = a_model()
    exact = script.update_of(*mix([(lora, LORA), (lora, LORA)], [0.5, 0.5]))
    naive = script.update_of(script.average(lora, lora), LORA)
    assert script.distance(naive, exact) < 1e-15


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rounding_is_that_of_the_dtype(script, dtype):
    base, lora = a_model(dtype)
    once, thrice = script.rounding(base, lora, LORA, (1, 3))
    assert (once.rounds, thrice.rounds) == (1, 3)
    eps = np.finfo(dtype).eps
    for row in (once, thrice):
        assert 0 < row.changed < 1
        assert 0 < row.worst < eps  # the weights are below 1
        assert eps / 1e3 < row.merged < 10 * eps
        assert eps / 1e3 < row.distance < 10 * eps


def test_rounding_is_nothing_where_every_sum_is_exact(script):
    """A base of whole numbers with updates of whole numbers comes back bit for bit."""
    base, lora = a_model(np.float32)
    base, lora = (map_leaves(lambda x: np.round(20 * x), tree) for tree in (base, lora))
    whole = LoRAConfig(rank=2, alpha=2.0, targets=LORA.targets)
    (row,) = script.rounding(base, lora, whole, (1,))
    assert row[1:] == (0.0, 0.0, 0.0, 0.0)
    assert np.any(merge(base, lora, whole)["blocks"][0]["mlp"]["up"]["w"])


def test_the_page_names_only_what_exists(script):
    page = (ROOT / "docs" / "mixing.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|docs)/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) >= 5
    for path, test in named:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert f"def {test}(" in text if test else text, f"{path}::{test}"
    for header in ("update, off by | loss on source", "merged update, off by | entries changed"):
        assert header in page and header in (ROOT / "docs/mixing.py").read_text(encoding="utf-8")
