"""The README.md of an adapter's folder: what the adapter is, how it was made, how to load it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.adapters import LoRAConfig
from minilora.formats.files import Content, is_there
from minilora.formats.hub import HUB_ID

CARD = "README.md"


def card_file(folder: Path, base: str | None, facts: Mapping[str, Any]) -> dict[str, Content]:
    """The card of the adapter in a folder by the name of its file; {} if there is a README.md.

    `base` and `facts` are those of `card`.
    """
    if is_there(folder / CARD):
        return {}
    text = card(folder.resolve().name, base, facts)
    return {CARD: [text.encode("utf-8", "replace")]}  # a name may be no text


def lora_facts(lora_config: LoRAConfig) -> dict[str, Any]:
    """The settings of an adapter that its card shows: the common ones, and others that are set."""
    settings = dataclasses.asdict(lora_config)
    always = {name: settings.pop(name) for name in ("rank", "alpha", "targets", "dropout")}
    return always | {name: value for name, value in settings.items() if value}


def card(name: str, base: str | None, facts: Mapping[str, Any]) -> str:
    """The text of a card, with the YAML front matter that the Hugging Face hub reads.

    `name` is the adapter's folder, `base` what adapter_config.json calls the base, if it does. The
    facts become a table, by name.
    """
    front = ["library_name: peft", "pipeline_tag: text-generation", "tags:", "- lora", "- minilora"]
    if base is not None and HUB_ID.fullmatch(base):
        front = [f"base_model: {base}", *front, f"- base_model:adapter:{base}"]
    where = json.dumps(base or "FOLDER OF THE BASE", ensure_ascii=False)
    first, what, imported = f"{where}, ", f"`{base}`" if base else "a GPT-2", ""
    if base == "minilora":
        first, where, what = "", "minilora.model.BUILT_IN", "the base that comes with minilora"
        imported = "import minilora.model\n"
    folder = json.dumps(name, ensure_ascii=False)
    return "\n".join(
        [
            *("---", *front, "---", "", f"# {name}", ""),
            f"A LoRA adapter for {what}, made with minilora, in PEFT's layout.",
            *("", "| | |", "| --- | --- |"),
            *(f"| {name} | {json.dumps(x, ensure_ascii=False)} |" for name, x in facts.items()),
            *("", "In minilora:", "", "```python", "import minilora", ""),
            f"model = minilora.load_model({first}adapter={folder})",
            *('print(model.generate("Once upon"))', "```", "", "In PEFT:", "", "```python"),
            f"{imported}from peft import PeftModel",
            *("from transformers import AutoModelForCausalLM", ""),
            f"base = AutoModelForCausalLM.from_pretrained({where})",
            *(f"model = PeftModel.from_pretrained(base, {folder})", "```", ""),
        ]
    )
