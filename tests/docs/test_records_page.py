"""What the page on records says in numbers and examples."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from minilora.data import IGNORED
from minilora.loss import cross_entropy_forward
from minilora.records.lines import record_of

PAGE = (Path(__file__).parents[2] / "docs" / "records.md").read_text(encoding="utf-8")


def test_the_three_means_are_those_of_the_table():
    """Losses as logits of two tokens: -log softmax is the wanted number of nats."""
    targets, nats = (2, 4, 10, 2), (6.0, 4.0, 5.0, 6.0)

    def mean(*chosen, count=None):
        each = np.repeat([nats[i] / targets[i] for i in chosen], [targets[i] for i in chosen])
        logits = np.stack([np.zeros_like(each), np.log(np.expm1(each))], axis=-1)
        return float(
            cross_entropy_forward(logits, targets=np.zeros(len(each), int), count=count)[0]
        )

    found = [
        mean(0, 1, 2, 3),
        (mean(0, 1) + mean(2, 3)) / 2,
        (mean(0) + mean(1) + mean(2) + mean(3)) / 4,
    ]
    said = re.findall(r"^\| .* \| (\d\.\d{4}) \|$", PAGE, re.MULTILINE)
    assert [f"{number:.4f}" for number in found] == said
    shards = mean(0, 1, count=18) + mean(2, 3, count=18)
    assert shards == pytest.approx(found[0], rel=1e-12)


def test_the_lines_shown_are_records_of_the_three_forms():
    (block,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    records = [record_of(json.loads(line), "the page") for line in block.splitlines()]
    assert [record.form for record in records] == ["prompt", "text", "messages"]


def test_ignored_is_the_index_that_the_loss_ignores():
    logits = np.zeros((3, 2))
    loss, cache = cross_entropy_forward(logits, targets=np.array([IGNORED, 0, IGNORED]))
    assert cache.weight.tolist() == [0.0, 1.0, 0.0] and loss == pytest.approx(np.log(2))
