"""The card of an adapter's folder: what the hub and a reader find in it, and what stays."""

import re

import pytest

from minilora.errors import MiniloraError
from minilora.formats.card import CARD, card, write_card
from minilora.formats.files import write_json

FACTS = {"rank": 4, "targets": ("q", "v"), "loss after": 1.5}


def front(text):
    """The lines of the YAML front matter."""
    return re.fullmatch(r"---\n(.*?)\n---\n.*", text, re.DOTALL)[1].splitlines()


def test_the_front_matter_is_what_the_hub_reads():
    """The names that PEFT writes: library, base and tags; of a base on the hub alone."""
    lines = front(card("mine", "openai-community/gpt2", FACTS))
    assert lines[:3] == [
        "base_model: openai-community/gpt2", "library_name: peft", "pipeline_tag: text-generation",
    ]  # fmt: skip
    assert {"- lora", "- base_model:adapter:openai-community/gpt2"} <= set(lines)
    for base in ("minilora", "/home/me/base", "a: b/c"):
        assert not any("base_model" in line for line in front(card("mine", base, FACTS))), base


def test_the_code_in_a_card_names_the_base_and_the_adapter():
    text = card("mine", "some/folder of mine", FACTS)
    assert 'minilora.load_model("some/folder of mine", adapter="mine")' in text
    assert 'from_pretrained("some/folder of mine")' in text
    assert 'minilora.load_model(adapter="mine")' in card("mine", "minilora", FACTS)
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, "card", "exec")


def test_the_facts_are_a_table():
    text = card("mine", "minilora", FACTS)
    assert '| rank | 4 |\n| targets | ["q", "v"] |\n| loss after | 1.5 |' in text


def test_a_readme_that_is_there_stays(tmp_path):
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "minilora"})
    write_card(tmp_path, FACTS)
    assert f"# {tmp_path.name}\n" in (tmp_path / CARD).read_text(encoding="utf-8")
    (tmp_path / CARD).write_text("mine", encoding="utf-8")
    write_card(tmp_path, FACTS)
    assert (tmp_path / CARD).read_text(encoding="utf-8") == "mine"


def test_a_folder_without_an_adapter_has_no_card(tmp_path):
    with pytest.raises(MiniloraError, match="adapter_config.json does not exist"):
        write_card(tmp_path, FACTS)
