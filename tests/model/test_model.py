"""The interface of Python: what a value shows of itself, text in and text out, plain settings."""

import io
import json
import sys
from html import escape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import minilora
from minilora.errors import MiniloraError
from minilora.evaluation import Evaluation
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.tokenizer import BPETokenizer, ByteTokenizer
from minilora.training.checkpoint import History
from minilora.training.progress import is_watched

CONFIG = GPTConfig(vocab_size=256, n_positions=32, n_embd=16, n_layer=2, n_head=2)
QUICK = {"steps": 2, "batch": 2, "context": 16, "eval_tokens": 64, "threads": 1, "log_every": 1}
TEXT = "".join(f"{i} squared is {i * i}\n" for i in range(200))


@pytest.fixture
def model(tmp_path):
    minilora.save_base(tmp_path / "base", gpt_init(CONFIG, seed=0), CONFIG)
    return minilora.load_model(tmp_path / "base")


def adapted(model, **options):
    corpus = minilora.corpus_from_text(TEXT, model.tokenizer)
    settings = minilora.TrainConfig(**QUICK)
    return minilora.adapt(model, corpus, minilora.LoRAConfig(rank=2), settings, **options)


# --- what is shown -----------------------------------------------------------------------------


def test_a_model_shows_itself_in_a_few_lines(model):
    shown, html = repr(model), model._repr_html_()
    assert len(shown.splitlines()) == 4
    for fact in ("2 blocks of width 16, 2 heads, context 32", "256 tokens", "float32 on cpu"):
        assert fact in shown and fact in html
    assert "adapter    none" in shown
    shown = repr(adapted(model)[0])
    assert "rank 2, alpha 2 on qkv, o, up, down: 1,024 parameters" in shown


def test_what_a_model_shows_is_no_markup():
    """A folder may be called anything."""
    base = gpt_init(CONFIG, seed=0)
    folder = Path("<script>")
    html = minilora.Model(base, CONFIG, tokenizer=ByteTokenizer(), folder=folder)._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_a_corpus_an_evaluation_and_a_training_show_themselves_as_facts(model):
    corpus = minilora.corpus_from_text(TEXT, model.tokenizer)
    trained = adapted(model)[1]
    (_, before), (_, after) = trained.history.held_out
    evaluation = Evaluation(loss=1.23456, bits_per_byte=1.78109, tokens=4095)
    facts = {
        "Corpus": (
            corpus,
            "'the text'",
            "1 read",
            f"{len(corpus.train):,} tokens, ",
            "held-out   ",
        ),
        "Trained": (trained, "1,024 parameters", "2 in ", f"{before:.3f} → {after:.3f} nats per"),
        "Evaluation": (
            evaluation,
            "1.2346 nats per token, 1.7811 bits per byte",
            "4,095 predicted",
        ),
    }
    for name, (value, *expected) in facts.items():
        shown, html = repr(value), value._repr_html_()
        assert shown.startswith(f"{name:<10} ")
        for fact in expected:
            assert fact in shown, shown
        for line in shown.splitlines():
            assert escape(line[11:]) in html and f">{line[:10].strip()}<" in html


def test_a_corpus_says_how_many_files_were_left_out_and_abridges_its_name(model, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    (folder / "b.bin").write_bytes(b"\0")
    shown = repr(minilora.load_corpus([folder / "a.txt", folder], model.tokenizer))
    assert "2 read, 1 left out" in shown
    assert len(shown.splitlines()[0]) < 50


@pytest.mark.parametrize("what", ["net", "trained", "history", "corpus", "bytes", "bpe", "config"])
def test_a_value_shows_no_arrays_and_no_address(model, what):
    values = {
        "net": minilora.Net(model.base, CONFIG, {"blocks": [{}, {}]}, minilora.LoRAConfig()),
        "trained": adapted(model)[1],
        "history": History([(i, 1.0) for i in range(500)], [(0, 2.0), (500, 1.0)]),
        "corpus": minilora.corpus_from_text(TEXT, model.tokenizer),
        "bytes": ByteTokenizer(),
        "bpe": BPETokenizer(SimpleNamespace(), 300, [], Path("x")),
        "config": minilora.LoRAConfig(),
    }
    shown = repr(values[what])
    assert len(shown) < 350, shown
    assert "array" not in shown and " at 0x" not in shown
    assert type(values[what]).__name__ in shown


# --- text --------------------------------------------------------------------------------------


def test_text_goes_in_and_text_comes_out(model):
    ids = minilora.complete(model, "The ", max_tokens=20, seed=3)
    assert model.generate("The ", max_tokens=20, seed=3) == model.tokenizer.decode(ids)


def test_a_text_in_memory_is_split_as_a_file_is(model, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8", newline="\n")
    ours = minilora.corpus_from_text(TEXT, model.tokenizer, held_out=0.1)
    theirs = minilora.load_corpus(tmp_path / "a.txt", model.tokenizer, held_out=0.1)
    for part in ("train", "held_out"):
        np.testing.assert_array_equal(getattr(ours, part), getattr(theirs, part))
    assert (ours.train_bytes, ours.held_out_bytes) == (theirs.train_bytes, theirs.held_out_bytes)
    with pytest.raises(MiniloraError, match="is empty"):
        minilora.corpus_from_text("", model.tokenizer)
    with pytest.raises(MiniloraError, match="held_out 1 is not"):
        minilora.corpus_from_text(TEXT, model.tokenizer, held_out=1)


def test_a_path_is_taken_wherever_a_name_is(model, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    for sources in (path, [path], [str(path), path]):
        assert minilora.load_corpus(sources, model.tokenizer).files >= 1
        assert minilora.evaluate(model, sources, threads=1).tokens > 100


# --- settings ----------------------------------------------------------------------------------


def test_numpy_s_scalars_become_plain_numbers():
    lora = minilora.LoRAConfig(
        rank=np.int64(4), alpha=np.float32(2), dropout=np.float32(0.5), rslora=np.bool_(True),
        rank_pattern={"q": np.int32(3)}, targets=("q",),
    )  # fmt: skip
    settings = minilora.TrainConfig(lr=np.float32(0.25), steps=np.int64(30), seed=np.uint8(3))
    for config in (lora, settings):
        json.dumps(vars(config))  # np.int64 could not be written
    assert (lora.rank, lora.alpha, lora.rank_pattern, lora.rslora) == (4, 2.0, {"q": 3}, True)
    assert (settings.lr, settings.steps, settings.warmup) == (0.25, 30, 3)


@pytest.mark.parametrize(
    ("config", "name", "meant"),
    [
        (minilora.LoRAConfig, "r", "rank"),
        (minilora.LoRAConfig, "lora_alpha", "alpha"),
        (minilora.LoRAConfig, "target_modules", "targets"),
        (minilora.LoRAConfig, "dropuot", "dropout"),
        (minilora.TrainConfig, "learning_rate", "lr"),
        (minilora.TrainConfig, "max_steps", "steps"),
        (minilora.TrainConfig, "eval_evry", "eval_every"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_name_that_was_meant(config, name, meant):
    with pytest.raises(TypeError, match=rf"no argument '{name}'; did you mean {meant}\?"):
        config(**{name: 1})
    assert meant in vars(config())
    with pytest.raises(TypeError, match="no argument 'xyzzy'; it has "):
        config(xyzzy=1)


# --- progress ----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_training_shows_a_bar_on_a_terminal(model, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    adapted(model)
    assert "2/2" in sys.stderr.getvalue()


def test_training_shows_a_bar_below_a_notebook_s_cell(model, monkeypatch):
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert is_watched()
    adapted(model)
    assert "2/2" in sys.stderr.getvalue()


@pytest.mark.parametrize("watched", [True, False])
def test_training_is_silent_when_asked_or_when_nobody_watches(model, monkeypatch, watched):
    monkeypatch.setattr(sys, "stderr", Terminal() if watched else io.StringIO())
    reports = []
    adapted(model, **({"progress": False} if watched else {}))
    adapted(model, report=reports.append)
    assert sys.stderr.getvalue() == ""
    assert [report.step for report in reports] == [1, 2]


def test_progress_can_be_asked_for(model, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    adapted(model, progress=True)
    assert "step 2/2" in sys.stderr.getvalue()
