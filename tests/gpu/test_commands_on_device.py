"""Every command runs with --device cuda, and prints what it prints without."""

import functools
import json

import pytest

from minilora import pairs
from minilora.cli import demo, main
from minilora.formats import save_base
from minilora.gpt2 import gpt_init
from minilora.llama import LlamaConfig, llama_init

QUICK = [
    *("--steps", "4", "--batch", "2", "--context", "16", "--warmup", "2", "--threads", "1"),
    *("--eval-every", "2", "--eval-tokens", "64", "--log-every", "2"),
]


@pytest.fixture(params=["gpt2", "llama"])
def base(request, model, tmp_path):
    """The tiny model, or a Llama, as a folder."""
    weights, config = model.base, model.config
    if request.param == "llama":
        config = LlamaConfig(
            256, 16, 24, 2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=model.config.n_positions, rms_norm_eps=1e-5,
        )  # fmt: skip
        weights = llama_init(config, seed=0)
        weights["wte"] *= 10.0
    save_base(tmp_path / "base", weights, config)
    return str(tmp_path / "base")


@pytest.fixture
def text(tmp_path):
    """A file of a few thousand characters."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {i}, {i * i} squared.\n" for i in range(100)), encoding="utf-8")
    return str(path)


@pytest.fixture
def figures(tmp_path, capsys):
    """The figures that a command writes; it must succeed."""

    def run(*words):
        path = tmp_path / "figures.json"
        assert main([*map(str, words), "--json", str(path)]) == 0, capsys.readouterr().err
        return json.loads(path.read_text(encoding="utf-8"))

    return run


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    by_chance = ("seconds", "tokens_per_second", "difference")  # times, and what is rounding alone
    for name in (name for name in actual if not name.endswith(by_chance)):
        is_text = isinstance(expected[name], str)
        wanted = expected[name] if is_text else pytest.approx(expected[name], rel=1e-4)
        assert actual[name] == wanted, name


def test_adapt_evaluate_generate_and_merge(device, figures, base, text, tmp_path):
    found = {}
    for place in ("cpu", device):
        adapter = tmp_path / f"adapter on {place}"
        merged = tmp_path / f"merged on {place}"
        on = ("--base", base, "--device", place)
        adapted = (*on, "--adapter", adapter)
        found[place] = [
            figures("adapt", text, *on, *QUICK, "--dropout", "0.1", "--out", adapter),
            figures("evaluate", text, *adapted),
            figures("generate", *adapted, "--prompt", "Line", "--tokens", 40),
            figures("merge", *adapted, "--out", merged),
        ]
    for host, on_device in zip(*found.values(), strict=True):
        assert_close(on_device, host)
    assert found[device][3]["merge_max_abs_difference"] < 1e-4


def test_a_base_in_half(device, figures, base, text, tmp_path):
    on = ("--base", base, "--device", device, "--half")
    adapter = tmp_path / "adapter"
    figures("adapt", text, *on, *QUICK, "--out", adapter)
    half = figures("evaluate", text, *on, "--adapter", adapter)
    whole = figures("evaluate", text, "--base", base, "--adapter", adapter)
    assert half["loss"] == pytest.approx(whole["loss"], rel=1e-3)
    assert half["loss"] != whole["loss"]
    assert len(figures("generate", *on, "--adapter", adapter, "--tokens", 5)["token_ids"]) == 5


def test_a_base_in_half_needs_a_gpu_and_stays_frozen(device, base, text, tmp_path, capsys):
    adapt = ("adapt", text, "--base", base, *QUICK, "--out", str(tmp_path / "out"), "--half")
    assert main(adapt) == 2
    assert "--half needs --device cuda" in capsys.readouterr().err
    assert main([*adapt, "--device", device, "--method", "full"]) == 2
    assert "--half is for a frozen base" in capsys.readouterr().err


def test_pretrain(device, figures, text, tmp_path):
    sizes = ("--layers", 2, "--width", 16, "--heads", 2)
    host, on_device = (
        figures("pretrain", text, *sizes, *QUICK, "--device", place, "--out", tmp_path / place)
        for place in ("cpu", device)
    )
    assert_close(on_device, host)


def test_gradcheck(device, figures, monkeypatch):
    monkeypatch.setattr(pairs, "check_model", functools.partial(pairs.check_model, entries=1))
    result = figures("gradcheck", "--device", device)
    assert len(result["pairs"]) > 20
    assert result["max_relative_error"] < 1e-6


def test_demo(device, figures, model, corpus, monkeypatch):
    """With a tiny model and a short text: the built-in ones take a minute."""
    load_model = demo.load_model
    folder = model.folder / "built-in"
    save_base(folder, gpt_init(model.config, seed=0), model.config)
    monkeypatch.setattr(demo, "load_model", functools.partial(load_model, folder))
    monkeypatch.setattr(demo, "load_corpus", lambda *_: corpus)
    monkeypatch.setattr(demo, "STEPS", 10)
    monkeypatch.setattr(demo, "PROMPT", "in ")
    monkeypatch.setattr(
        demo, "TrainConfig", functools.partial(demo.TrainConfig, batch=2, context=16)
    )
    result = figures("demo", "--device", device, "--threads", 1)
    assert result["gradcheck_max_relative_error"] < 1e-6
    assert result["merge_max_abs_difference"] < 1e-4


def test_auto_finds_the_device(device, figures, base, text, capsys):
    figures("evaluate", text, "--base", base, "--device", "auto")
    assert "device: cuda" in capsys.readouterr().err
