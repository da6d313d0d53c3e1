"""What `minilora bench` times runs on the device, and so do its products alone."""

import json
import time

import pytest

from minilora.bench.case import Case
from minilora.bench.measure import measure
from minilora.gpt2 import GPTConfig

CONFIG = GPTConfig(vocab_size=32, n_positions=16, n_embd=8, n_layer=2, n_head=2)


@pytest.mark.parametrize("options", [
    {"what": "step", "method": "lora"},
    {"what": "step", "method": "full"},
    {"what": "evaluate"},
    {"what": "generate"},
], ids=lambda options: " ".join(options.values()))  # fmt: skip
def test_a_case_is_timed(device, capsys, options):
    case = Case(CONFIG, **options, batch=2, context=8, rank=2, threads=1, steps=2, device=device)
    measure(case, (), started=time.perf_counter(), how="floor")
    figures = json.loads(capsys.readouterr().out)
    assert len(figures["seconds"]) == len(figures["floor"]) == 2
    assert figures["flops"] > 0
    assert figures["breakdown"]
