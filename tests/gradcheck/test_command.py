"""`minilora gradcheck` compares each row with its own tolerance."""

import pytest

from minilora import pairs
from minilora.cli import main


@pytest.mark.parametrize(
    ("name", "error", "status"),
    [
        ("linear", 9e-9, 0),
        ("linear", 2e-8, 1),
        ("model, LoRA factors", 2e-8, 0),
        ("model, LoRA factors", 2e-6, 1),
        ("linear", float("inf"), 1),
        ("linear", float("nan"), 1),
    ],
)
def test_a_pair_s_tolerance_is_tighter_than_a_model_s(monkeypatch, capsys, name, error, status):
    rows = [pairs.Row("model, base and LoRA", 5e-7, 1, 0.1), pairs.Row(name, error, 1, 0.1)]
    monkeypatch.setattr(pairs, "table", lambda **options: iter(rows))
    assert main(["gradcheck"]) == status
    out = capsys.readouterr().out
    assert out.count("ABOVE") == status
    assert "allowed: 1e-08 for a pair, 1e-06 for a model" in out
