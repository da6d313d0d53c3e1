"""The page of a run: what is on it is right, it stands alone, and watching changes nothing."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

import minilora
from minilora.adapters import LoRAConfig, lora_init
from minilora.cli import main
from minilora.cli.run_report import RunReport, curve, singular_values, sparkline
from minilora.data import corpus_from_text
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.model import load_model
from minilora.network import Net
from minilora.training.checkpoint import History
from minilora.training.loop import Snapshot, TrainConfig
from minilora.tree import flatten, map_leaves

CONFIG = GPTConfig(vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2)
LORA = LoRAConfig(rank=3, alpha=6.0, targets=("qkv", "down"))


@pytest.fixture
def seen():
    base = gpt_init(CONFIG, seed=0, dtype=np.float64)
    rng = np.random.default_rng(1)
    lora = map_leaves(lambda x: rng.standard_normal(x.shape), lora_init(base, LORA, seed=0))
    history = History([(1, 2.5), (2, 1.5)], [(0, 3.0), (2, 2.0)])
    grads = map_leaves(lambda x: 2 * x, lora)
    return Snapshot(2, Net(base, CONFIG, lora, LORA), grads, history, TrainConfig(steps=2))


@pytest.fixture
def page(tmp_path, seen, base, monkeypatch):
    """Writes the page of what is seen, with a sample that would do harm; the page."""
    harm = "</pre><script>alert(1)</script><!--"
    monkeypatch.setattr("minilora.cli.run_report.sampled", lambda *_: harm)

    def written(**changes):
        report = RunReport(tmp_path / "r.html", load_model(base), ["<run>", "x & y"], "<b>")
        report.watch(seen._replace(**changes))
        return report.path.read_text(encoding="utf-8")

    return written


def test_texts_of_others_are_texts_on_the_page(page):
    text = page()
    assert "adapted to &lt;run&gt;" in text and "x &amp; y" in text and "<i>&lt;b&gt;</i>" in text
    assert "<script" not in text and "<!--" not in text


def test_every_tag_is_closed_and_nothing_is_fetched(page):
    open_tags, void = [], {"meta", "polyline", "circle", "rect"}

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert not {"src", "href", "srcset", "action"} & {name for name, _ in attributes}
            if tag not in void:
                open_tags.append(tag)

        def handle_startendtag(self, tag, attributes):
            assert tag in void

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    text = page()
    Checker().feed(text)
    assert open_tags == [] and "url(" not in text and "@import" not in text


def test_the_page_reloads_itself_until_the_run_has_ended(page):
    text = page(settings=TrainConfig(steps=3))
    assert "refresh" in text and "at step 2" in text
    text = page()
    assert "refresh" not in text and "finished after 2 steps" in text


def test_lengths_and_singular_values_are_those_of_the_arrays(page, seen):
    text = page()
    for path in ("blocks.0.attn.qkv", "blocks.1.mlp.down"):
        i, sublayer, name = path.split(".")[1:]
        ab = seen.net.lora["blocks"][int(i)][sublayer][name]
        update = 2.0 * ab["A"] @ ab["B"]
        expected = np.linalg.svd(update, compute_uv=False)
        np.testing.assert_allclose(singular_values(ab, path, LORA), expected[:3], rtol=1e-12)
        lengths = [np.linalg.norm(x) for x in (2 * ab["A"], 2 * ab["B"], update)]
        row = re.search(rf"<td>{path}</td>((?:<td class=\"n\">[^<]*</td>)+)", text)[1]
        assert re.findall(r">([\d.,e+-]+)<", row) == [f"{x:,.4g}" for x in lengths]
        assert f"largest {expected[0]:.3g}, smallest {expected[2]:.3g}" in text


def test_the_first_page_has_no_gradients_and_full_training_no_adapters(page, seen):
    assert "|dA|" in page(step=0, grads=None, history=History([], [(0, 3.0)]))
    assert "Adapters" not in page(net=Net(seen.net.base, CONFIG), grads=None)


def test_a_curve_has_a_mark_for_each_evaluation_in_its_place():
    drawn = curve(History([(1, 4.0)], [(0, 3.0), (10, 1.0)]))
    circles = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert circles == [("44.0", "94.0"), ("676.0", "238.0")]
    assert "4.00" in drawn and "1.00" in drawn and "from 3.000 to 1.000" in drawn


@pytest.mark.parametrize(
    ("losses", "line"),
    [([], ""), ([1.0], "▁"), ([3.0, 2.0, 1.0], "█▅▁"), ([1.0] * 3, "▁▁▁")],
)
def test_a_sparkline_is_as_high_as_the_losses(losses, line):
    assert sparkline(losses) == line


def test_a_long_run_s_sparkline_is_as_wide_as_it_may_be():
    assert len(sparkline(list(range(1000)))) == 40


def test_watching_and_sampling_change_no_byte_of_the_adapter(base, text, tmp_path, capsys):
    def adapted(name, *options):
        out = tmp_path / name
        words = ["adapt", text, "--base", base, "--out", out, "--steps", 4, "--batch", 2]
        words += ["--context", 16, "--eval-every", 2, "--dropout", 0.2, "--threads", 1, *options]
        assert main([str(word) for word in words]) == 0
        return (out / "adapter_model.safetensors").read_bytes()

    plain = adapted("plain")
    watched = adapted("watched", "--sample", "ab", "--report", tmp_path / "r.html")
    assert plain == watched
    err = capsys.readouterr().err
    assert [line for line in ("step 0: ab", "step 2: ab", "step 4: ab") if line not in err] == []
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<pre>") == 3 and "finished after 4 steps" in page


def test_a_report_in_the_folder_of_results_is_refused(base, text, tmp_path, capsys):
    words = ["adapt", text, "--base", base, "--out", tmp_path, "--report", tmp_path / "r.html"]
    assert main([str(word) for word in words]) == 2
    assert "--report" in capsys.readouterr().err


def test_in_python_a_run_has_its_page_in_one_call(base, tmp_path):
    """With its own settings and samples; and the weights are those of a run without it."""
    model = load_model(base)
    corpus = corpus_from_text("two and two are four\n" * 200, model.tokenizer)
    settings = TrainConfig(steps=4, batch=2, context=16, eval_every=2, seed=3, threads=1)
    page = minilora.RunReport(str(tmp_path / "r.html"), model, prompt="two ")
    _, watched = minilora.adapt(model, corpus, LORA, settings, watch=page.watch)
    _, plain = minilora.adapt(model, corpus, LORA, settings)
    for path, array in flatten(plain.params).items():
        np.testing.assert_array_equal(flatten(watched.params)[path], array, err_msg=path)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    for shown in ("finished after 4 steps", "<td>seed</td><td>3</td>", "<td>rank</td><td>3</td>"):
        assert shown in text, shown
    assert [step for step, _ in page.samples] == [0, 2, 4] and text.count("<pre>") == 3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_sample_is_written_by_the_network_so_far_trained(base, method):
    model = load_model(base)
    corpus = corpus_from_text("two and two are four\n" * 200, model.tokenizer)
    settings = TrainConfig(method, steps=3, batch=2, context=16, eval_every=2, lr=0.1, threads=1)
    samples = []
    adapted, _ = minilora.adapt(
        model, corpus, None if method == "full" else LORA, settings,
        watch=lambda seen: samples.append(minilora.sampled(model, seen, "two ")),
    )  # fmt: skip
    before, _, after = samples
    assert before == model.generate("two ", max_tokens=100, seed=0)
    assert after == adapted.generate("two ", max_tokens=100, seed=0) != before


def test_a_finished_run_that_is_resumed_writes_no_page(base, text, tmp_path, capsys):
    words = ["adapt", text, "--base", base, "--out", tmp_path / "out", "--steps", 2, "--batch", 2]
    words += ["--context", 16, "--threads", 1]
    assert main([str(word) for word in words]) == 0
    words += ["--resume", "--report", tmp_path / "r.html"]
    assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
