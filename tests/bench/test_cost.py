"""docs/cost.py: its formulas on cases whose answer is known; its page and plots are of its data."""

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cost(import_file):
    return import_file("docs/cost.py")


@pytest.fixture(scope="module")
def found(cost):
    return json.loads(cost.MEASURED.read_text(encoding="utf-8"))


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 2.0])
def test_the_slope_of_a_power_law_is_its_power(cost, power):
    sizes = [3, 5, 11, 40]
    assert cost.slope(sizes, [7.0 * size**power for size in sizes]) == pytest.approx(power)


def test_the_formula_of_the_page_counts_the_flops(cost):
    for knob, sizes in cost.SIZES.items():
        for size in sizes:
            case = cost.case_of(knob, size)
            c = case.config
            n, C, V, T, R = c.n_layer, c.n_embd, c.vocab_size, case.context, case.rank
            page = (48 * n - 6) * C**2 + 7 * n * (T + 64) * C + 4 * C * V + (24 * n - 2) * R * C
            assert cost.formulas(case)["flops"] == pytest.approx(case.tokens * page), (knob, size)


def test_the_share_of_pairs_is_that_of_the_page(cost):
    page = " ".join((ROOT / "docs" / "cost.md").read_text(encoding="utf-8").split())
    centre = cost.CENTRE.context
    assert "count: all at T = 64, three quarters at the centre, 53 % at T = 1,024." in page
    for context, share in ((64, 1.0), (centre, 0.75), (1024, 0.53)):
        pairs = cost.budget.Step(cost.CENTRE.config, None, 1, context).pairs
        assert pairs / context**2 == pytest.approx((context + 64) / (2 * context))
        assert pairs / context**2 == pytest.approx(share, abs=0.005), context


def test_the_head_is_half_of_the_work_where_the_page_says(cost):
    C = cost.CENTRE.config.n_embd
    rest = cost.formulas(cost.CENTRE)["flops"] / cost.CENTRE.tokens
    rest -= 4 * C * cost.CENTRE.config.vocab_size
    assert rest / (4 * C) / C == pytest.approx(50, abs=5)


def test_one_size_varies_at_a_time(cost):
    for knob, sizes in cost.SIZES.items():
        seen = {cost.case_of(knob, size) for size in sizes}
        assert len(seen) == len(sizes)
        if knob != "vocabulary":
            assert cost.CENTRE in seen, knob


def test_predicted_seconds_are_the_centres_at_the_centre(cost):
    sizes = cost.formulas(cost.CENTRE)
    found = {
        "flops_per_second": sizes["flops"] / 2.0,
        "numbers_per_second": sizes["numbers"] / 3.0,
    }
    assert cost.predicted_seconds(found, sizes) == 5.0


def test_the_data_are_of_these_sizes(cost, found):
    for knob, sizes in cost.SIZES.items():
        assert [point["size"] for point in found[knob]] == list(sizes), knob
    assert [point["size"] for point in found["prefix"]] == list(cost.PREFIXES)


def test_the_page_shows_the_table_of_the_data(cost, found):
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    assert cost.table(found) in page


def test_predictions_of_memory_hold(cost, found):
    """Within a quarter, or the 16 MB that threads, buffers of BLAS and fragments may take."""
    for knob in cost.SIZES:
        for point in found[knob]:
            off = abs(point["bytes"] - point["predicted_bytes"])
            assert off < max(16e6, 0.25 * point["predicted_bytes"]), (knob, point)


def test_a_sweep_runs(cost, monkeypatch):
    monkeypatch.setattr(cost, "SIZES", {"rank": (1, 2)})
    monkeypatch.setattr(cost, "CENTRE", cost.replace(cost.CENTRE, batch=1, context=2))
    monkeypatch.setattr(cost, "ROUNDS", 1)
    points = cost.sweep("rank")
    assert [point["size"] for point in points] == [1, 2]
    assert all(point["seconds"] > 0 and point["bytes"] > 0 for point in points)
    assert points[0]["flops"] < points[1]["flops"]


def test_drawing_gives_the_same_bytes(cost, found, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(cost, "FIGURES", tmp_path / folder)
        cost.draw(found)
        drawn.append({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()})
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {"cost_time.svg", "cost_memory.svg", "cost_generation.svg"}
    assert all(np.char.find(content.decode(), "<svg") >= 0 for content in drawn[0].values())
