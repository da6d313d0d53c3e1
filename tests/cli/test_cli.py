"""The commands: their figures, what they print, their help."""

import io
import json
import re
import shlex
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import Terminal, adapter_bytes

from minilora import complete, evaluate, load_adapter, load_base, load_corpus, load_model
from minilora.cli import main
from minilora.cli.commands import command_line
from minilora.cli.parser import json_option
from minilora.cli.register import COMMANDS, SEED, Option
from minilora.formats import save_base
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.training.ranks import Ranks

ROWS = {row.name: row for row in COMMANDS}
KINDS = {"text": str, "token_ids": list, "pairs": dict}


def kind(name):
    """The type of a figure: most are counts or measurements, as their names say."""
    counted = name.endswith(("parameters", "bytes", "tokens"))
    return KINDS.get(name, int if counted else float)


def figures(path, command):
    """The figures in a JSON file, once they are those of the command's row in the register."""
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found.keys() == {figure.name for figure in ROWS[command].figures if figure.always}
    for name, value in found.items():
        assert type(value) is kind(name), f"{name} is {value!r}"
    return found


# --- help --------------------------------------------------------------------------------------


def helped(capsys, *words):
    with pytest.raises(SystemExit) as exit:
        main([*words, "--help"])
    assert exit.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return " ".join(out.split())


def options(row):
    """The options of a row, those in groups among them."""
    for entry in row.options:
        yield from [entry] if isinstance(entry, Option) else entry.options


@pytest.mark.parametrize("command", ROWS)
def test_the_help_names_every_option_and_every_figure(capsys, command):
    text, row = helped(capsys, command), ROWS[command]
    assert row.summary[1:] in text
    for option in [*options(row), *([json_option(row)] if row.figures else [])]:
        name = option.flag if option.flag.startswith("-") else option.keywords["metavar"]
        assert re.search(rf"(?<!-){name}\b", text), f"{command} --help does not mention {name}"
        default = option.keywords.get("default")
        assert default in (None, []) or f"(default: {default})" in text
    for figure in row.figures:
        assert re.search(rf"\b{figure.name}\b", text), f"{command} --help: no {figure.name}"
        assert figure.note in text
    for absent in ("default: None", "default: False", "default: []", "SUPPRESS"):
        assert absent not in text
    if SEED.flag in text:
        assert re.search(r"--seed N [a-z ]+ \(default: 0\)", text)


def test_the_help_lists_the_commands(capsys):
    text = helped(capsys)
    for row in COMMANDS:
        assert f" {row.name} {row.summary}" in text


def test_the_version(capsys):
    from minilora import __version__

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"minilora {__version__}\n"


# --- adapt and pretrain ------------------------------------------------------------------------


def test_adapt_writes_an_adapter_its_figures_and_plain_lines(cli, quick, tmp_path, base):
    result = cli(*quick, "--json", "figures.json", "--out", "out")
    assert result.status == 0, result.err
    found = figures(tmp_path / "figures.json", "adapt")
    assert found["base_parameters"] == sum(p.size for p in flat(load_base(base)[0]))
    lora, _ = load_adapter(tmp_path / "out", load_base(base)[1])
    assert found["trainable_parameters"] == sum(p.size for p in flat(lora))
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert found["adapter_bytes"] == size
    assert found["loss_after"] != found["loss_before"]
    assert len(result.lines) == 4
    line = (
        r"adapt: step \d/4, loss \d\.\d{3}, (held-out \d\.\d{3}, )?[\d,]+ tokens/s, \d+:\d\d left"
    )
    for line_of_err in result.lines:
        assert re.fullmatch(line, line_of_err), line_of_err
    assert "\r" not in result.err
    assert "saved in out" in result.out
    assert f"next: minilora generate --base {base} --adapter out\n" in result.out.replace('"', "")


def test_several_processes_write_their_figures_too(cli, quick, tmp_path, monkeypatch):
    class Two(Ranks):
        """The first of two processes that both do all the work."""

        size = 2

        def share(self, items):
            return slice(items)

        def gather(self, value):
            return [value, value]

    monkeypatch.setattr("minilora.training.ranks.find_ranks", Two)
    result = cli(*quick, "--json", "x.json")
    assert result.status == 0, result.err
    found = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert found.keys() == {figure.name for figure in ROWS["adapt"].figures}
    assert found["processes"] == 2


def flat(tree):
    from minilora.tree import flatten

    return flatten(tree).values()


def test_adapt_trains_what_its_options_say(cli, quick, tmp_path, base):
    result = cli(
        *quick, "--targets", r"q, v ,blocks\.1\.mlp\.down", "--rank", 3, "--alpha", 6, "--rslora",
        "--rank-pattern", "(?=mlp).*down=4", "--alpha-pattern", "0.attn.q=1", "--out", "out",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert "written as one equivalent adapter on c_attn" in result.out
    record = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    settings = record["settings"]
    assert settings["targets"] == ["q", "v", r"blocks\.1\.mlp\.down"]
    assert settings["rank_pattern"] == {"(?=mlp).*down": 4}
    assert settings["alpha_pattern"] == {"0.attn.q": 1.0}
    assert (settings["rank"], settings["alpha"], settings["rslora"]) == (3, 6.0, True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["use_rslora"] is True


def test_a_comma_in_braces_does_not_end_a_target(cli, quick, tmp_path):
    targets = r"blocks\.[0-9]{1,2}\.attn\.qkv,(?:.*\.){2,}down,"
    assert cli(*quick, "--targets", targets, "--out", "out").status == 0
    record = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert record["settings"]["targets"] == [r"blocks\.[0-9]{1,2}\.attn\.qkv", r"(?:.*\.){2,}down"]


def test_alpha_is_the_rank_unless_given(cli, quick, tmp_path):
    assert cli(*quick, "--rank", 3, "--targets", "o").status == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["lora_alpha"] == config["r"] == 3
    assert config["target_modules"] == ["attn.c_proj"]


@pytest.mark.parametrize(("method", "lr"), [("lora", 1e-2), ("full", 1e-3)])
def test_each_method_has_its_own_rate(cli, quick, tmp_path, method, lr):
    assert cli(*quick, "--method", method, "--out", "out").status == 0
    record = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert record["settings"]["lr"] == lr


def test_full_fine_tuning_gives_a_base(cli, quick, tmp_path, text):
    assert cli(*quick, "--method", "full", "--out", "out", "--json", "x.json").status == 0
    found = figures(tmp_path / "x.json", "adapt")
    assert found["trainable_parameters"] == found["base_parameters"]
    assert cli("evaluate", text, "--base", "out").status == 0


def test_pretrain_gives_a_base_that_the_other_commands_take(cli, tmp_path, text):
    result = cli(
        "pretrain", text, "--layers", 1, "--width", 8, "--heads", 2, "--context", 16, "--batch", 2,
        "--steps", 3, "--warmup", 1, "--eval-tokens", 100, "--dtype", "float16", "--threads", 1,
        "--short-context", 8, "--short-steps", 2, "--json", "x.json",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert figures(tmp_path / "x.json", "pretrain")["trainable_parameters"] == 256 * 8 + 16 * 8 + (
        2 * 2 * 8 + 8 * 24 + 24 + 8 * 8 + 8 + 8 * 32 + 32 + 32 * 8 + 8 + 2 * 8
    )
    assert "next: minilora generate --base base\n" in result.out
    assert cli("evaluate", text, "--base", "base").status == 0
    config = json.loads((tmp_path / "base" / "config.json").read_text(encoding="utf-8"))
    sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    assert [config[name] for name in sizes] == [256, 16, 8, 1, 2]


def test_a_short_context_needs_no_other_option(cli, tmp_path, text):
    """Whoever pretrains on less context than --short-context's default has no short sequences."""
    words = ("--layers", 1, "--width", 8, "--heads", 2, "--steps", 1, "--batch", 1)
    assert cli("pretrain", text, *words, "--context", 16).status == 0


def test_a_path_with_a_space_is_quoted_in_the_next_command(cli, quick):
    assert (
        command_line("--adapter", "my adapter").removeprefix("minilora ")
        in cli(*quick, "--out", "my adapter").out
    )


def test_a_bar_on_a_terminal(cli, quick, monkeypatch):
    monkeypatch.setattr(io, "StringIO", Terminal)
    result = cli(*quick)
    assert result.status == 0
    assert "\r" in result.err
    assert re.search(r"adapt: 100%\|.*\| 4/4, loss .*held-out .*tokens/s, 0:00 left", result.err)


def test_plot_draws_both_curves(cli, quick, tmp_path):
    pytest.importorskip("matplotlib")
    assert cli(*quick, "--plot", "losses.png").status == 0
    data = (tmp_path / "losses.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) > 10000


# --- demo --------------------------------------------------------------------------------------


def test_the_demo_shows_what_changed_and_documents_its_figures(cli, tmp_path, text, monkeypatch):
    config = GPTConfig(vocab_size=256, n_positions=256, n_embd=16, n_layer=1, n_head=2)
    save_base(tmp_path / "base", gpt_init(config, seed=0), config)
    monkeypatch.setattr("minilora.model.BUILT_IN", tmp_path / "base")
    monkeypatch.setattr("minilora.cli.demo.STEPS", 4)

    def small(source, tokenizer):
        assert source == "python"
        return load_corpus(str(text), tokenizer)

    monkeypatch.setattr("minilora.cli.demo.load_corpus", small)
    result = cli("demo", "--json", "x.json", "--threads", 2)
    assert result.status == 0, result.err
    found = figures(tmp_path / "x.json", "demo")
    bits = 1 / np.log(2)
    assert found["bits_per_byte_before"] == pytest.approx(found["loss_before"] * bits)
    assert found["bits_per_byte_after"] == pytest.approx(found["loss_after"] * bits)
    assert found["gradcheck_max_relative_error"] < 1e-6
    assert found["merge_max_abs_difference"] < 1e-4
    share = found["trainable_parameters"] / found["base_parameters"]
    for shown in (
        "Before, it continues 'def __init__", "After 4 steps", f"({share:.3%})",
        "gradients of A and B",
        f"{found['bits_per_byte_before']:.3f} -> {found['bits_per_byte_after']:.3f}", "Try next",
    ):  # fmt: skip
        assert shown in result.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "x.json"]


# --- stops -------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c(monkeypatch):
    """Press Ctrl-C when the report of a step is shown."""
    from minilora.training.progress import ProgressBar

    show = ProgressBar.__call__

    def press_at(step):
        def shown(self, progress):
            show(self, progress)
            if progress.step == step:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(ProgressBar, "__call__", shown)

    return press_at


def test_ctrl_c_saves_exits_130_and_resumes(cli, quick, tmp_path, ctrl_c):
    assert cli(*quick, "--out", "whole").status == 0
    ctrl_c(2)
    result = cli(*quick, "--out", "out")
    assert result.status == 130
    told, command = result.lines[-1].split(" To resume: ")
    assert told == "minilora: stopped at step 3; its state is saved."
    assert "Traceback" not in result.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint.safetensors"]
    ctrl_c(None)
    assert cli(*quick, "--out", "out").status == 2
    result = cli(*shlex.split(command)[1:])
    assert result.status == 0
    assert [line.split(",")[0] for line in result.lines] == ["adapt: step 4/4"]
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")


def test_resuming_a_finished_run_only_writes_its_figures_again(cli, quick, tmp_path):
    assert cli(*quick, "--resume", "--json", "first.json").status == 0
    before = {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    result = cli(*quick, "--resume", "--json", "second.json")
    assert result.status == 0
    assert result.err == ""
    assert "finished; nothing was left to do" in result.out
    assert {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert figures(tmp_path / "second.json", "adapt") == figures(tmp_path / "first.json", "adapt")


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--lr", 0.5], "lr 0.01, but this one has 0.5"),
        (["--seed", 3], "seed 0"),
        (["--steps", 5], "steps 4"),
        (["--rank", 3], "(alpha 2|rank 2)"),
        (["--targets", "qkv"], "targets"),
        (["--dropout", 0.5], "dropout 0.0"),
        (["--threads", 1], "threads 2"),
        (["--method", "full"], "(alpha|method)"),
        (["--batch", 3], "batch 2"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_resuming_with_another_setting_names_it(
    cli, quick, tmp_path, ctrl_c, finished, words, name
):
    if not finished:
        ctrl_c(2)
    assert cli(*quick).status == (0 if finished else 130)
    before = {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    result = cli(*quick, "--resume", *words)
    assert result.status == 2
    assert len(result.lines) == 1
    assert re.search(f"belongs to a run with {name}", result.err), result.err
    assert {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


def test_resuming_with_another_text_or_base_names_it(cli, quick, tmp_path, text, base, ctrl_c):
    ctrl_c(2)
    assert cli(*quick).status == 130
    changed = text.read_bytes().replace(b"naive", b"naive!").replace(b"Line 7", b"Line x")
    (tmp_path / "other.txt").write_bytes(changed)
    other = [quick[0], "other.txt", *quick[2:]]
    assert "checksum of the text" in cli(*other, "--resume").err
    assert cli("merge", "--base", base, "--adapter", make_adapter(cli, quick)).status == 0
    result = cli(*quick, "--resume", "--base", "merged")
    assert result.status == 2
    assert "checksum of the base" in result.err


def make_adapter(cli, quick):
    cli(*quick, "--out", "for-merging", "--log-every", 4, "--seed", 9)
    return "for-merging"


# --- evaluate ----------------------------------------------------------------------------------


def test_evaluate_is_the_loss_of_the_whole_text(cli, tmp_path, base, adapter, text):
    result = cli("evaluate", text, "--base", base, "--adapter", adapter, "--json", "x.json")
    assert result.status == 0, result.err
    found = figures(tmp_path / "x.json", "evaluate")
    size = len(text.read_bytes())
    assert found["tokens"] == size - 1
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / np.log(2))  # a byte is a token
    model = load_model(base, adapter)
    expected = evaluate(model, text)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert cli("evaluate", text, "--base", base, "--json", "y.json").status == 0
    assert figures(tmp_path / "y.json", "evaluate")["loss"] != found["loss"]


def test_evaluate_reads_standard_input(cli, tmp_path, base, text, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.read_bytes())))
    assert cli("evaluate", "-", "--base", base, "--json", "stdin.json").status == 0
    assert cli("evaluate", text, "--base", base, "--json", "file.json").status == 0
    files = [figures(tmp_path / name, "evaluate") for name in ("stdin.json", "file.json")]
    assert files[0] == files[1]


def test_evaluate_held_out_reads_what_adapt_held_out(cli, quick, tmp_path, base, text):
    assert cli(*quick, "--eval-tokens", 10**6, "--json", "adapt.json").status == 0
    words = ("--base", base, "--held-out")
    assert cli("evaluate", text, *words, "--json", "before.json").status == 0
    assert cli("evaluate", text, *words, "--adapter", "adapter", "--json", "x.json").status == 0
    corpus = load_corpus(str(text), load_model(base).tokenizer)
    before, after = (figures(tmp_path / n, "evaluate") for n in ("before.json", "x.json"))
    assert before["tokens"] == len(corpus.held_out) - 1
    trained = figures(tmp_path / "adapt.json", "adapt")
    # adapt's windows are 16 tokens long, those of an evaluation 32: near, not equal.
    assert before["loss"] == pytest.approx(trained["loss_before"], rel=0.02)
    assert after["loss"] == pytest.approx(trained["loss_after"], rel=0.02)


def test_several_sources_are_read_as_one(cli, tmp_path, base, text):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.md").write_text("a text\n", encoding="utf-8")
    (folder / "b.bin").write_bytes(b"\0\1")
    assert cli("evaluate", text, folder, "--base", base, "--json", "x.json").status == 0
    expected = len(text.read_bytes()) + len("\n") + len("a text\n") - 1
    assert figures(tmp_path / "x.json", "evaluate")["tokens"] == expected


# --- generate ----------------------------------------------------------------------------------


def test_generate_prints_the_prompt_and_what_follows(cli, tmp_path, base, adapter):
    words = ("generate", "--base", base, "--adapter", adapter, "--prompt", "naïve ", "--tokens", 20)
    result = cli(*words, "--top-k", 50, "--top-p", 0.9, "--seed", 3, "--json", "x.json")
    assert result.status == 0, result.err
    found = figures(tmp_path / "x.json", "generate")
    model = load_model(base, adapter)
    expected = list(complete(
        model, "naïve ", max_tokens=20, temperature=0.8, top_k=50, top_p=0.9, seed=3
    ))  # fmt: skip
    assert found["token_ids"] == expected
    assert found["text"] == model.tokenizer.decode(expected)
    assert result.out == "naïve " + found["text"] + "\n"
    assert result.err == ""


def test_the_seed_decides_what_is_drawn(cli, base):
    words = ("generate", "--base", base, "--tokens", 30, "--seed")
    assert cli(*words, 1).out == cli(*words, 1).out != cli(*words, 2).out


def test_generate_goes_on_beyond_the_context(cli, tmp_path, base):
    words = ("--prompt", "x" * 32, "--tokens", 50, "--temperature", 0, "--json", "x.json")
    assert cli("generate", "--base", base, *words).status == 0
    assert len(figures(tmp_path / "x.json", "generate")["token_ids"]) == 50


def test_no_tokens_are_no_mistake(cli, tmp_path, base):
    result = cli("generate", "--base", base, "--tokens", 0, "--prompt", "x", "--json", "x.json")
    assert result.out == "x\n"
    assert figures(tmp_path / "x.json", "generate") == {"text": "", "token_ids": []}


def test_generate_streams(base, monkeypatch):
    """Every piece is flushed as soon as it is drawn."""

    class Stream(io.StringIO):
        flushed = 0

        def flush(self):
            self.flushed += 1

    monkeypatch.setattr(sys, "stdout", Stream())
    assert main(["generate", "--base", str(base), "--tokens", "12", "--temperature", "0"]) == 0
    assert sys.stdout.flushed >= 8  # 12 bytes, of which some may be parts of one character


def test_generate_reads_its_prompt_from_standard_input(cli, base, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("naïve\r\n".encode())))
    result = cli("generate", "--base", base, "--prompt", "-", "--tokens", 3)
    assert result.out.startswith("naïve\n")


# --- merge and gradcheck -----------------------------------------------------------------------


def test_a_merged_base_computes_what_base_and_adapter_do(cli, tmp_path, base, adapter, text):
    result = cli("merge", "--base", base, "--adapter", adapter, "--json", "x.json")
    assert result.status == 0, result.err
    found = figures(tmp_path / "x.json", "merge")
    assert 0 < found["merge_max_abs_difference"] < 1e-3
    assert found["bytes"] == (tmp_path / "merged" / "model.safetensors").stat().st_size
    tokens = np.arange(32)[None]
    merged, model = load_model(tmp_path / "merged"), load_model(base, adapter)
    np.testing.assert_allclose(merged.logits(tokens), model.logits(tokens), atol=1e-3)
    assert np.abs(merged.logits(tokens) - load_model(base).logits(tokens)).max() > 0.1
    assert "next: minilora generate --base merged\n" in result.out


def test_merging_into_float16_is_smaller_and_less_exact(cli, tmp_path, base, adapter):
    words = ("merge", "--base", base, "--adapter", adapter)
    assert cli(*words, "--json", "x.json").status == 0
    assert cli(*words, "--json", "y.json", "--dtype", "float16", "--out", "half").status == 0
    single, half = (figures(tmp_path / name, "merge") for name in ("x.json", "y.json"))
    assert half["bytes"] < 0.6 * single["bytes"]
    assert half["merge_max_abs_difference"] > single["merge_max_abs_difference"]


@pytest.fixture
def few_pairs(monkeypatch):
    """Leave the gradient check some of its pairs, and two entries of each leaf of the model."""
    from minilora import pairs

    check_model = pairs.check_model

    def check_some(*args, **kwargs):
        return check_model(*args, **kwargs | {"entries": 2})

    def choose(**changes):
        few = {name: pairs.PAIRS[name] for name in ("linear", "gelu", "lora")}
        monkeypatch.setattr(pairs, "PAIRS", few | changes)
        monkeypatch.setattr(pairs, "check_model", check_some)

    return choose


def test_gradcheck_prints_a_table_and_its_figures(cli, tmp_path, few_pairs):
    few_pairs()
    result = cli("gradcheck", "--seed", 1, "--json", "x.json")
    assert result.status == 0
    found = figures(tmp_path / "x.json", "gradcheck")
    assert {"linear", "gelu", "lora"} < set(found["pairs"])
    assert found["max_relative_error"] == max(found["pairs"].values()) < 1e-6
    for name, error in found["pairs"].items():
        assert re.search(rf"^{re.escape(name)} +{error:.1e} +\d+ +\d+\.\d+$", result.out, re.M), (
            name
        )
    assert "ABOVE" not in result.out


def test_a_wrong_gradient_exits_1(cli, tmp_path, few_pairs):
    from minilora import ops, pairs

    def wrong(dy, cache):
        (dx,) = ops.gelu_backward(dy, cache)
        return (1.001 * dx,)

    few_pairs(gelu=pairs.PAIRS["gelu"]._replace(backward=wrong))
    result = cli("gradcheck", "--json", "x.json")
    assert result.status == 1
    assert re.search(r"^gelu .*ABOVE: see docs/derivations/gelu\.md$", result.out, re.M)
    assert figures(tmp_path / "x.json", "gradcheck")["max_relative_error"] > 1e-4


def test_a_gradient_that_is_not_finite_exits_1(cli, tmp_path, few_pairs):
    """JSON has no number for its error, so that the figure is null."""
    from minilora import ops, pairs

    def broken(dy, cache):
        (dx,) = ops.gelu_backward(dy, cache)
        return (dx / 0.0,)

    few_pairs(gelu=pairs.PAIRS["gelu"]._replace(backward=broken))
    result = cli("gradcheck", "--json", "x.json")
    assert result.status == 1, result.err
    assert re.search(r"^gelu .*inf .*ABOVE: see docs/derivations/gelu\.md$", result.out, re.M)
    found = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert found["max_relative_error"] is found["pairs"]["gelu"] is None
    assert found["pairs"]["linear"] < 1e-6


def test_json_replaces_an_older_file_in_one_step(cli, tmp_path, base, text):
    (tmp_path / "x.json").write_text("old", encoding="utf-8")
    assert cli("evaluate", text, "--base", base, "--json", "x.json").status == 0
    figures(tmp_path / "x.json", "evaluate")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


# --- an adapter trained further ----------------------------------------------------------------


def test_adapt_goes_on_from_an_adapter(cli, tmp_path, quick, base, adapter):
    result = cli(*quick[:-2], "--adapter", adapter, "--out", "further", "--json", "x.json")
    assert result.status == 0, result.err
    assert f"trained further from {adapter}, with a fresh optimiser" in result.out
    evaluated = cli(*("evaluate", quick[1], "--base", base, "--adapter", adapter), "--held-out",
                    "--json", "y.json")  # fmt: skip
    assert evaluated.status == 0
    start = json.loads((tmp_path / "x.json").read_bytes())["loss_before"]
    alone = json.loads((tmp_path / "y.json").read_bytes())["loss"]
    fresh = cli(*quick, "--out", "fresh", "--json", "z.json")
    assert fresh.status == 0 and "further" not in fresh.out
    from_base = json.loads((tmp_path / "z.json").read_bytes())["loss_before"]
    assert abs(start - alone) < 0.2 * abs(start - from_base)  # other windows of the same text
    folders = (adapter, tmp_path / "further")
    documents = [json.loads((f / "adapter_config.json").read_bytes()) for f in folders]
    for name in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"):
        assert documents[0][name] == documents[1][name], name


def test_what_an_adapter_has_of_its_own_may_be_named_but_not_changed(cli, refused, quick, adapter):
    further = [*quick[:-2], "--adapter", adapter]
    refused("rank 3 was asked for, but the adapter has rank 2", *further, "--rank", 3)
    refused("alpha 4.0 was asked for, but the adapter has alpha 2.0", *further, "--alpha", 4)
    refused("targets .* was asked for, but the adapter has targets", *further, "--targets", "q,v")
    refused("rslora True was asked for", *further, "--rslora")
    refused("--rank-pattern .* was asked for", *further, "--rank-pattern", "down=1")
    refused("--adapter: expected one to train further, not 2", *further, "--adapter", adapter)
    refused("merge the adapter into it first", *further, "--method", "full")
    assert cli(*further, "--rank", 2, "--alpha", 2, "--targets", "qkv,o,up,down").status == 0
