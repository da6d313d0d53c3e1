"""The card of an adapter's folder: what the hub and a reader find in it, and what stays."""

import re

from minilora.adapters import LoRAConfig, lora_init
from minilora.formats.card import CARD, card, card_file
from minilora.formats.output import write_folder
from minilora.formats.peft import save_adapter
from minilora.gpt2 import GPTConfig, gpt_init

CONFIG = GPTConfig(vocab_size=11, n_positions=4, n_embd=4, n_layer=2, n_head=1)
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
    write_folder(tmp_path, card_file(tmp_path, "minilora", FACTS))
    assert f"# {tmp_path.name}\n" in (tmp_path / CARD).read_text(encoding="utf-8")
    (tmp_path / CARD).write_text("mine", encoding="utf-8")
    write_folder(tmp_path, card_file(tmp_path, "minilora", FACTS))
    assert (tmp_path / CARD).read_text(encoding="utf-8") == "mine"


def test_whoever_saves_an_adapter_gets_its_card(tmp_path):
    """As with PEFT's `save_pretrained`; what the user has written stays."""
    lora_config = LoRAConfig(rank=2, targets=("up",), rank_pattern={"1.mlp.up": 1})
    base = gpt_init(CONFIG, seed=0)
    lora = lora_init(base, lora_config, seed=0)
    folder = tmp_path / 'the "first"'
    save_adapter(folder, lora, lora_config, CONFIG, base_name="me/base")
    text = (folder / CARD).read_text(encoding="utf-8")
    assert "base_model: me/base" in front(text)
    assert '| rank | 2 |\n| alpha | 2 |\n| targets | ["up"] |\n| dropout | 0.0 |' in text
    assert '| rank_pattern | {"1.mlp.up": 1} |' in text
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, "card", "exec")
    (folder / CARD).write_text("mine", encoding="utf-8")
    save_adapter(folder, lora, lora_config, CONFIG)
    assert (folder / CARD).read_text(encoding="utf-8") == "mine"


def test_a_card_without_a_base_says_that_one_is_needed():
    text = card("mine", None, FACTS)
    assert "A LoRA adapter for a GPT-2" in text
    assert 'load_model("FOLDER OF THE BASE", adapter="mine")' in text
    assert "base_model" not in text and "None" not in text


def test_a_name_that_is_no_text_does_not_hinder_the_card(tmp_path):
    """Linux allows any bytes in a name; Python has surrogates for those that are not UTF-8."""
    (file,) = card_file(tmp_path, "of \udcff", FACTS).values()
    assert b"`of ?`" in b"".join(file)
