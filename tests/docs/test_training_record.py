"""The page on files names every field of training.json, and no other."""

import json
import re
from pathlib import Path

from minilora.adapters import LoRAConfig
from minilora.data import corpus_from_text
from minilora.formats import save_base
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.model import load_model
from minilora.training.loop import TrainConfig
from minilora.training.runs import RECORD, adapt_in_folder

PAGE = Path(__file__).parents[2] / "docs" / "interop.md"
CONFIG = GPTConfig(vocab_size=256, n_positions=16, n_embd=8, n_layer=1, n_head=2)


def documented():
    """{part: names of its fields} of the page's table."""
    (section,) = re.findall(r"^### training.json\n(.*?)^## ", PAGE.read_text("utf-8"), re.M | re.S)
    found, part = {}, ""
    for cells in (row.split("|") for row in section.splitlines() if row.startswith("| ")):
        part = cells[1].strip(" `") or part
        found.setdefault(part, []).extend(re.findall(r"`([^`]+)`", cells[2]))
    return {part: names for part, names in found.items() if part not in ("part", "---")}


def test_the_page_names_every_field_of_the_record(tmp_path):
    save_base(tmp_path / "base", gpt_init(CONFIG, seed=0), CONFIG)
    model = load_model(tmp_path / "base")
    corpus = corpus_from_text("a text " * 100, model.tokenizer)
    settings = TrainConfig(steps=1, batch=1, context=8, threads=1)
    adapt_in_folder(model, corpus, LoRAConfig(rank=1), settings, tmp_path / "out")
    record = json.loads((tmp_path / "out" / RECORD).read_text(encoding="utf-8"))
    fields = {part: sorted(record[part]) for part in ("settings", "figures", "history")}
    assert {part: sorted(names) for part, names in documented().items()} == {
        **fields, **dict.fromkeys(record.keys() - fields.keys(), []),
    }  # fmt: skip
