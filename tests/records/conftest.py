"""A byte-level base with a chat template, and files of records."""

import json

import pytest

from minilora.formats import save_base
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.model import load_model

CONFIG = GPTConfig(vocab_size=256, n_positions=80, n_embd=16, n_layer=2, n_head=2)

TURNS = """\
{% for m in messages %}
<{{ m['role'] }}>
{{ m['content'] }}</>
{% endfor %}
{% if add_generation_prompt %}
<assistant>
{% endif %}"""


@pytest.fixture
def folder(tmp_path):
    """The folder of the base, without a chat template."""
    folder = tmp_path / "base"
    weights = gpt_init(CONFIG, seed=0)
    weights["wte"] *= 10.0
    save_base(folder, weights, CONFIG)
    return folder


@pytest.fixture
def model(folder):
    return load_model(folder)


@pytest.fixture
def write(tmp_path):
    """Writes records, or lines as they stand, into a file in JSON Lines."""

    def write(*records, name="records.jsonl"):
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        (tmp_path / name).write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        return tmp_path / name

    return write


@pytest.fixture
def with_template(folder):
    """Gives the base a chat template."""

    def give(text=TURNS):
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
        return folder

    return give
