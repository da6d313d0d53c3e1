"""The README.md of an adapter's folder: what it is, how it was made, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.formats.files import read_json, write_text
from minilora.formats.hub import HUB_ID

CARD = "README.md"


def write_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the card of the adapter in a folder, unless there is a README.md already.

    The facts are shown as a table, by name. Raises MiniloraError for a folder without an
    adapter_config.json, and where the system refuses to write.
    """
    if not (folder / CARD).exists():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        write_text(folder / CARD, card(folder.resolve().name, str(base), facts))


def card(name: str, base: str, facts: Mapping[str, Any]) -> str:
    """The text of a card, with the YAML front matter that the Hugging Face hub reads."""
    front = ["library_name: peft", "pipeline_tag: text-generation", "tags:", "- lora", "- minilora"]
    if HUB_ID.fullmatch(base):
        front = [f"base_model: {base}", *front, f"- base_model:adapter:{base}"]
    first, where, what, imported = json.dumps(base) + ", ", json.dumps(base), f"`{base}`", ""
    if base == "minilora":
        first, where, what = "", "minilora.model.BUILT_IN", "the base that comes with minilora"
        imported = "import minilora.model\n"
    return "\n".join(
        [
            *("---", *front, "---", "", f"# {name}", ""),
            f"A LoRA adapter for {what}, made with minilora, in PEFT's layout.",
            *("", "| | |", "| --- | --- |"),
            *(f"| {name} | {json.dumps(x, ensure_ascii=False)} |" for name, x in facts.items()),
            *("", "In minilora:", "", "```python", "import minilora", ""),
            f'model = minilora.load_model({first}adapter="{name}")',
            *('print(model.generate("Once upon"))', "```", "", "In PEFT:", "", "```python"),
            f"{imported}from peft import PeftModel",
            *("from transformers import AutoModelForCausalLM", ""),
            f"base = AutoModelForCausalLM.from_pretrained({where})",
            *(f'model = PeftModel.from_pretrained(base, "{name}")', "```", ""),
        ]
    )
