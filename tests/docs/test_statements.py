"""Statements of the pages that no equation carries, each with the condition that makes it true."""

import re
from pathlib import Path

import numpy as np
import pytest

from minilora import optim

DOCS = Path(__file__).parents[2] / "docs"


def prose(page):
    return " ".join((DOCS / page).read_text(encoding="utf-8").split())


def test_the_first_step_of_adam_and_its_conditions():
    """η in every entry far above ε, none where the gradient is 0, and the decay beside it."""
    weights = np.ones((1, 4))
    gradient = np.array([[1e-3, -1e3, 1e-8, 0.0]])

    def step(**decay):
        state = optim.adamw_init(weights)
        return optim.adamw(weights, gradient, state, step=1, lr=0.1, **decay)[0]

    np.testing.assert_allclose(step(), [[0.9, 1.1, 0.95, 1.0]], rtol=1e-4)
    np.testing.assert_allclose(step(weight_decay=0.1), step() - 0.01, rtol=1e-12)
    assert "without decay: with $\\lambda > 0$ every entry" in prose("derivations/adamw.md")


@pytest.mark.parametrize("mean, deviation", [(0.0, 8.0), (1.0, np.sqrt(3 * 64))])
def test_a_score_of_independent_numbers_has_the_standard_deviation_of_the_page(mean, deviation):
    """√K for mean 0; for mean 1 it is √(3 K), so the page has to name the mean."""
    q, k = mean + np.random.default_rng(0).standard_normal((2, 20000, 64))
    assert np.std(np.sum(q * k, axis=1)) == pytest.approx(deviation, rel=0.02)
    assert "independent numbers of mean 0 and variance 1" in prose("derivations/attention.md")


def test_half_the_spacing_of_a_format_is_what_the_page_says():
    """Relative to the weight in the normal numbers, a constant below them."""
    page = prose("derivations/lora.md")
    section = re.search(r"in float32 that is at most.*?For the same", page)[0]
    found = re.findall(r"\$(?:\|W_\{ij\}\| )?(\S+) \\cdot 10\^\{(-\d+)\}", section)
    bound32, bound16, smallest, below = (float(f"{digits}e{power}") for digits, power in found)
    for dtype, bound in ((np.float32, bound32), (np.float16, bound16)):
        normal = float(np.finfo(dtype).smallest_normal)
        weights = np.geomspace(normal, 1e4, 100_000).astype(dtype)
        relative = np.spacing(weights).astype(np.float64) / 2 / weights
        assert 0.9 * bound < relative.max() < bound
    assert smallest == pytest.approx(float(np.finfo(np.float16).smallest_normal), rel=1e-2)
    subnormal = np.geomspace(6e-8, smallest, 1000).astype(np.float16)
    assert float(np.spacing(subnormal).max()) / 2 == pytest.approx(below, rel=0.01)
    assert (below / subnormal.astype(np.float64)).max() > 100 * bound16
