"""The demonstration's first advice: the command that keeps the adapter it has shown."""

import shlex
import shutil

import pytest

from minilora.cli import demo as demo_module
from minilora.cli import main
from minilora.texts import Document

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (2, []),
        (2, ["--seed", "3", "--threads", "1"]),
        pytest.param(demo_module.STEPS, [], marks=pytest.mark.slow),
    ],
    ids=["two steps", "two steps with options", "all steps"],
)
def test_the_printed_command_gives_the_demonstration_s_adapter_bit_for_bit(
    tmp_path, monkeypatch, capsys, steps, options
):
    """`kept` is a copy of what the demonstration throws away."""
    monkeypatch.chdir(tmp_path)
    if steps != demo_module.STEPS:  # and on a part of the text
        documents = [
            Document(f"{i}.py", f"def f(x):\n    return x + {i}\n" * 20) for i in range(40)
        ]
        monkeypatch.setattr("minilora.texts.read_python", lambda: (documents, []))
        monkeypatch.setattr(demo_module, "STEPS", steps)
        monkeypatch.setattr(demo_module, "check_factors", lambda *_, **__: 0.0)  # takes seconds
    train = demo_module.adapt_in_folder

    def kept(model, corpus, lora_config, settings, folder, **options):
        run = train(model, corpus, lora_config, settings, folder, **options)
        shutil.copytree(folder, tmp_path / "kept")
        return run

    monkeypatch.setattr(demo_module, "adapt_in_folder", kept)
    assert main(["demo", *options]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.endswith("the same, saved"))
    assert main(shlex.split(line.removesuffix("the same, saved"))[1:]) == 0
    for name in ADAPTER:
        ours, theirs = (tmp_path / folder / name for folder in ("python-adapter", "kept"))
        assert ours.read_bytes() == theirs.read_bytes(), name
