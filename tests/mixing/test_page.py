"""The Python and the commands of docs/mixing.md run, as they stand there, on the built-in base."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import minilora
from minilora.adapters import LoRAConfig, lora_init
from minilora.cli import main
from minilora.tree import flatten, map_leaves

PAGE = Path(__file__).parents[2] / "docs" / "mixing.md"


def blocks(language):
    """The blocks of the page in a language, joined."""
    text = PAGE.read_text(encoding="utf-8")
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A folder with the adapters `first` and `second` and the text notes.txt."""
    monkeypatch.chdir(tmp_path)
    model = minilora.load_model()
    for seed, name in enumerate(("first", "second")):
        lora_config = LoRAConfig(rank=2 + seed, targets=("qkv", "down"))
        rng = np.random.default_rng(seed)
        lora = map_leaves(
            lambda x, rng=rng: 0.02 * rng.standard_normal(x.shape).astype(x.dtype),
            lora_init(model.base, lora_config, seed=0),
        )
        minilora.save_adapter(name, lora, lora_config, model.config)
    Path("notes.txt").write_text("Some notes, to be read.\n" * 5, encoding="utf-8")


def test_the_python_of_the_page_runs(folders):
    names = {}
    exec(blocks("python"), names)
    tokens = np.arange(65, 85)[None]
    both, merged = names["both"], names["merged"]
    np.testing.assert_allclose(merged.logits(tokens), both.logits(tokens), atol=1e-3)
    assert names["first"].base is names["second"].base is both.base
    for path, factor in flatten(names["mixed"][0]).items():
        np.testing.assert_array_equal(flatten(both.lora)[path], factor, err_msg=path)


def test_the_commands_of_the_page_run(folders, capsys):
    lines = [line for line in blocks("sh").splitlines() if line.startswith("minilora ")]
    assert len(lines) == 3
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    tokens = np.arange(65, 85)[None]
    mixed = minilora.load_model(adapter="mixed").logits(tokens)
    np.testing.assert_allclose(minilora.load_model("merged").logits(tokens), mixed, atol=1e-3)
