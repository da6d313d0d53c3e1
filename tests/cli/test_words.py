"""The first words that a new user types: help in every form, hints, options named as typed."""

import io
import re
import shlex
from pathlib import Path

import pytest

from minilora import LoRAConfig, TrainConfig
from minilora.cli import main
from minilora.cli.commands import lora_options, settings_of
from minilora.cli.parser import parser
from minilora.cli.register import COMMANDS, Option
from minilora.cli.streams import Output, escaped, one_line

ROWS = {row.name: row for row in COMMANDS}


def printed(capsys, *words):
    with pytest.raises(SystemExit) as exit:
        main(list(words))
    assert exit.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


# --- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["help"], ["--help"]], ids=" ".join)
def test_the_commands_are_listed_for_whoever_asks_nothing_or_help(capsys, words):
    assert printed(capsys, *words) == printed(capsys, "-h")
    assert "watch the built-in model learn Python" in printed(capsys, *words)


@pytest.mark.parametrize("command", ROWS)
def test_help_and_a_command_is_the_help_of_the_command(capsys, command):
    assert printed(capsys, "help", command) == printed(capsys, command, "--help")


@pytest.mark.parametrize("command", ROWS)
def test_the_help_ends_with_examples_that_the_parser_takes(capsys, command):
    text = printed(capsys, command, "--help")
    assert text.split("examples:\n")[1].splitlines() == [
        f"  {example}" for example in ROWS[command].examples
    ]
    for example in ROWS[command].examples:
        name, *words = shlex.split(example)
        assert name == "minilora"
        assert parser().parse_args(words).command is ROWS[command]


# --- hints -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["adpt", "x.txt"], "no command 'adpt'; did you mean adapt? See minilora --help"),
        (["generat"], "did you mean generate?"),
        (["help", "megre"], "did you mean merge?"),
        (
            ["generate", "--temprature", "1"],
            "did you mean --temperature? See minilora generate --help",
        ),
        (
            ["adapt", "x", "--learning-rat", "1"],
            "no option --learning-rat; see minilora adapt --help",
        ),
        (["adapt", "x", "--evalevery=3"], "did you mean --eval-every? See minilora adapt --help"),
        (["nonsense"], "no command 'nonsense'; see minilora --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistyped_word_is_answered_with_the_nearest(refused, words, hint):
    refused(hint.replace("?", r"\?"), *words)


@pytest.mark.parametrize(
    ("option", "folder", "expected"),
    [
        ("--adapter", ".", "--adapter: adapter_config.json does not exist"),
        ("--adapter", "./empty", "--adapter: empty/adapter_config.json does not exist"),
        ("--adapter", "empty/", "--adapter: empty/adapter_config.json does not exist"),
        ("--base", ".", "--base: config.json does not exist"),
        ("--base", "./empty", "--base: empty/config.json does not exist"),
        ("--base", "nowhere/", "--base: nowhere/config.json does not exist"),
    ],
)
def test_an_error_names_the_option_however_its_folder_is_typed(
    refused, tmp_path, monkeypatch, option, folder, expected
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    refused(re.escape(str(Path(expected))), "generate", option, folder)


def test_an_option_before_the_command_is_named(refused):
    refused("^minilora: --seed: expected a command first", "--seed", 3, "demo")


def test_half_without_a_gpu_is_named(refused):
    refused("^minilora: --half needs --device cuda", "generate", "--half")


# --- values that begin with a dash ---------------------------------------------------------------


@pytest.mark.parametrize("value", ["-1e-1", "-0.5", "-.5", "-inf"])
def test_a_negative_number_is_a_value_however_it_is_written(value):
    found = parser().parse_args(["mix", "--adapter", "x", "--weight", value])
    assert found.weight == [float(value)]


@pytest.mark.parametrize("value", ["---", "-", "-x", "--not-an-option", "- a list"])
def test_a_prompt_may_begin_with_dashes(value):
    assert parser().parse_args(["generate", "--prompt", value, "--seed", "3"]).prompt == value


def test_an_option_is_no_value_of_the_one_before(refused):
    refused("--prompt: expected a value", "generate", "--prompt", "--seed", 3)
    refused("--prompt: expected a value", "generate", "--prompt", "--seed=3")


def test_a_prompt_is_the_word_after_generate(cli, base):
    words = ("--base", base, "--tokens", 5)
    result = cli("generate", "Once upon", *words)
    assert result.out.startswith("Once upon")
    assert result.out == cli("generate", "--prompt", "Once upon", *words).out


# --- options as they were typed ------------------------------------------------------------------


@pytest.mark.parametrize("command", ROWS)
def test_a_number_out_of_range_is_told_of_its_option(refused, quick, base, adapter, command):
    """Every option of a whole number, set to -7: whoever notices, the message names the option."""
    words = {
        "adapt": quick, "pretrain": ["pretrain", quick[1]], "evaluate": ["evaluate", quick[1]],
        "generate": ["generate", "--base", base], "bench": ["bench"], "budget": ["budget"],
    }.get(command)  # fmt: skip
    if words is None:
        pytest.skip("it has no such option but --seed")
    for one in ROWS[command].every_option():
        if one.keywords.get("type") is int and one.flag != "--short-context":
            refused(rf"^minilora: (argument )?{one.flag}\b", *words, one.flag, -7)


def test_a_folder_that_is_none_is_told_of_its_option(refused, base, quick):
    for command in (["generate"], ["evaluate", quick[1]], ["merge"], ["mix"]):
        words = (*command, "--base", base, "--adapter", "nofolder")
        expected = "is not a folder; expected one with adapter_config.json"
        refused(f"^minilora: --adapter: nofolder {expected}", *words)
    expected = "/config.json does not exist; expected a base's folder"
    refused(f"^minilora: --base: nofolder{expected}", "generate", "--base", "nofolder")
    words = ("generate", "--base", base, "--adapter", base.parent)
    refused("^minilora: --adapter: .*adapter.* in folders of their own", *words)
    refused("^minilora: --out: .*base already holds config.json", *quick, "--out", base)


@pytest.mark.parametrize("finished", [True, False])
def test_a_second_run_is_told_what_it_can_do(cli, quick, tmp_path, finished):
    (tmp_path / "adapter").mkdir()
    name = "training.json" if finished else "checkpoint.safetensors"
    (tmp_path / "adapter" / name).write_text("{}", encoding="utf-8")
    result = cli(*quick)
    assert result.status == 2
    assert "--out adapter holds" in result.err
    assert "name another folder with --out" in result.err
    assert ("--resume" in result.err) == (not finished)


@pytest.mark.parametrize("command", ["merge", "mix"])
def test_no_option_is_advised_that_a_command_does_not_have(cli, base, adapter, command):
    words = (command, "--base", base, "--adapter", adapter, "--out", "out")
    assert cli(*words).status == 0
    result = cli(*words)
    assert result.status == 2
    assert "--out: out already holds" in result.err
    assert "--resume" not in result.err


# --- one set of defaults -------------------------------------------------------------------------


def test_the_command_line_s_defaults_are_those_of_python():
    """What adapt trains with, given only data, is LoRAConfig() and TrainConfig()."""
    args = parser().parse_args(["adapt", "x.txt"])
    assert LoRAConfig(**lora_options(args)) == LoRAConfig()
    assert settings_of(args, method=args.method) == TrainConfig()
    assert (LoRAConfig(rank=3).alpha, TrainConfig(steps=50).warmup) == (3, 5)
    assert (TrainConfig().lr, TrainConfig(method="full").lr) == (1e-2, 1e-3)


@pytest.mark.parametrize("option", ["rank", "targets", "dropout", "lr", "warmup", "alpha"])
def test_the_help_says_what_is_taken_where_an_option_is_not_given(capsys, option):
    text = " ".join(printed(capsys, "adapt", "--help").split())
    taken = {
        "rank": "8", "targets": "qkv,o,up,down", "dropout": "0", "alpha": "rank",
        "lr": "0.01 for lora, 0.001 for full", "warmup": "a tenth of the steps",
    }  # fmt: skip
    for name, value in vars(LoRAConfig()).items():
        if name in ("rank", "targets", "dropout"):
            shown = ",".join(value) if name == "targets" else f"{value:g}"
            assert taken[name] == shown, name
    (shown,) = re.findall(rf" --{option} [A-Z].*?\(default: (.*?)\)", text)
    assert shown == taken[option]


# --- what is printed -----------------------------------------------------------------------------


def test_names_with_control_characters_and_of_any_length_are_shown_safely(refused, cli, base):
    refused(r"^minilora: cannot read \\x1b\[31mred", "evaluate", "\x1b[31mred", "--base", base)
    result = cli("evaluate", "x" * 10**6, "--base", base)
    assert len(result.err) < 2500
    assert escaped("a\tb\nc\r\x1b[2J\x07\x9b") == "a\tb\nc\r\\x1b[2J\\x07\\x9b"
    assert one_line("a\nb") == "a b"


def test_a_terminal_gets_no_control_characters_of_a_model_but_a_file_does():
    for raw in (True, False):
        stream = io.StringIO()
        Output(stream, raw=raw).write("\x1b]0;title\x07")
        assert ("\x1b" in stream.getvalue()) == raw


def test_options_are_named_once_and_have_help():
    for row in COMMANDS:
        names = [one.flag for one in row.every_option()]
        assert len(set(names)) == len(names)
        assert all(isinstance(one, Option) and one.help for one in row.every_option())
