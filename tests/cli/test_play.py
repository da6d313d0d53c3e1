"""`minilora play`: lines in, answers out; mistakes, stops and a context that is full."""

import io
import sys
from dataclasses import replace

import pytest

import minilora
from minilora.cli import main
from minilora.cli.play import Draws, Player, play
from minilora.model import load_model
from minilora.records.chat import until_mark
from minilora.records.lines import Message
from minilora.tokenizer import ByteTokenizer

GREEDY = Draws(max_tokens=6, temperature=0.0)


class Brackets:
    """A chat template: [u:hello][a:hi]; it refuses a chat whose roles do not alternate."""

    closing = "]"

    def render(self, messages, *, generation=False):
        spoken = [m for m in messages if m.role != "system"]
        assert [m.role for m in spoken] == (["user", "assistant"] * 99)[: len(spoken)]
        text = "".join(f"[{m.role[0]}:{m.content}]" for m in messages)
        return text + "[a:" * generation


@pytest.fixture
def model(base):
    return load_model(base)


@pytest.fixture
def answers(monkeypatch):
    """What the model generates, one text after the other, and the prompts that it was given."""
    texts, prompts = [], []

    def generate(model, *, prompt_ids, **draws):
        prompts.append(bytes(prompt_ids.tolist()).decode())
        return iter(texts.pop(0).encode()[: draws["max_tokens"]])

    monkeypatch.setattr("minilora.model.generate", generate)
    return texts, prompts


def said(player, line):
    return "".join(player.answer(line))


def played(*lines, model, draws=GREEDY):
    """All that is shown for some lines."""
    waiting, shown = iter(lines), []

    def read():
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    play(model, draws, read=read, show=shown.append)
    return "".join(shown)


def test_a_line_is_continued_as_generate_continues_it(model):
    expected = model.generate("hello", max_tokens=6, temperature=0)
    assert said(Player(model, GREEDY), "hello") == expected + "\n"
    assert played("hello", model=model).endswith(expected + "\n")


def test_rows_that_are_no_tokens_are_never_drawn(model):
    class Few(ByteTokenizer):
        known = 128

        def stream(self, ids):
            drawn.extend(ids)
            yield ""

    drawn = []
    few = replace(model, tokenizer=Few([1]))
    said(Player(few, Draws(max_tokens=30, temperature=5.0)), "hi")
    assert drawn and max(drawn) < 128


def test_nothing_is_said_to_an_empty_line_and_the_end_leaves(model):
    assert played("", model=model).count("\n") == 1
    assert played("/quit", "hello", model=model).count("\n") == 1


def test_options_are_set_by_commands(model):
    player = Player(model)
    assert said(player, "/temp 0") == "temperature 0\n"
    assert said(player, "/seed 7") == "seed 7\n"
    assert said(player, "/tokens 3") == "max tokens 3\n"
    assert player.draws == Draws(3, 0.0, None, None, 7)
    assert "/compare" in said(player, "/help")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adpter x", "there is no command /adpter; did you mean /adapter?"),
        ("/", "there is no command /; /help lists the commands"),
        ("/temp", "/temp: expected one number of at least 0"),
        ("/temp -1", "/temp: expected one number of at least 0"),
        ("/temp nan", "/temp: expected one number of at least 0"),
        ("/tokens 1.5", "/tokens: expected one whole number of at least 0"),
        ("/seed 1 2", "/seed: expected one whole number of at least 0"),
        ("/adapter nowhere", "nowhere is not a folder"),
        ("/compare", "there is no adapter to compare with"),
        ("x" * 40, "this has 40 tokens, which leaves no room in a context of 32"),
    ],
)
def test_a_mistake_is_one_sentence_and_the_next_line_is_read(model, line, message):
    shown = played(line, "/temp 0", model=model)
    assert message in shown and shown.endswith("temperature 0\n")


def test_base_and_adapter_are_shown_beside_each_other(model, adapter):
    player = Player(model, Draws(max_tokens=20, temperature=1.0))
    assert said(player, f"/adapter {adapter}") == f"the adapter is {adapter}\n"
    adapted = player.model.generate("hello", max_tokens=20, temperature=1.0)
    plain = model.generate("hello", max_tokens=20, temperature=1.0)
    assert adapted != plain
    said(player, "/compare")
    assert said(player, "hello") == f"base:    {plain}\nadapted: {adapted}\n"
    said(player, "/compare")
    assert said(player, "hello") == adapted + "\n"
    assert said(player, "/adapter") == "the base alone\n" and player.model.lora is None


# --- chats -------------------------------------------------------------------------------------


def test_a_chat_is_rendered_as_in_training_and_ends_at_its_mark(model, answers):
    texts, prompts = answers
    texts += ["hi]xx", "yes]"]
    player = Player(model, GREEDY, Brackets())
    assert said(player, "hey") == "hi\n" and said(player, "ok?") == "yes\n"
    assert prompts == ["[u:hey][a:", "[u:hey][a:hi][u:ok?][a:"]
    said(player, "/new")
    assert player.chat == []


def test_of_a_full_context_the_oldest_exchange_goes_and_the_system_s_text_stays(model, answers):
    texts, prompts = answers
    texts += ["b]"] * 3
    player = Player(model, Draws(max_tokens=3, temperature=0.0), Brackets())
    player.chat = [Message("system", "s")]
    shown = [said(player, line) for line in ("one", "two", "three")]
    assert shown[:2] == ["b\n", "b\n"] and shown[2].startswith("(the oldest messages no longer fit")
    assert prompts == [
        "[s:s][u:one][a:",
        "[s:s][u:one][a:b][u:two][a:",
        "[s:s][u:two][a:b][u:three][a:",
    ]


def test_an_answer_that_is_stopped_is_in_the_chat_as_far_as_it_came(model, answers, monkeypatch):
    texts, prompts = answers
    texts += ["hello", "b]"]
    player = Player(model, GREEDY, Brackets())
    pieces = player.answer("hey")
    assert [next(pieces) for _ in range(3)] == ["", "h", "e"]
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)
    said(player, "go on")
    assert prompts[1] == "[u:hey][a:he][u:go on][a:"


def test_ctrl_c_stops_the_answer_and_not_the_program(model):
    shown = played(KeyboardInterrupt, "/temp 0", model=model)
    assert shown.endswith("\ntemperature 0\n")


@pytest.mark.parametrize("cut", range(9))
def test_a_mark_in_parts_is_found_and_its_beginning_waits(cut):
    text = "a<|b<|e|>c"
    pieces = [text[:cut], text[cut : cut + 1], text[cut + 1 :]]
    assert "".join(until_mark(pieces, "<|e|>")) == "a<|b"
    assert "".join(until_mark(pieces, "")) == text
    assert "".join(until_mark(["a<", "|"], "<|e|>")) == "a<|"


# --- the command -------------------------------------------------------------------------------


def test_lines_of_standard_input_are_answered(base, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/temp 0\nhello\n"))
    assert main(["play", "--base", str(base), "--tokens", "6"]) == 0
    out, err = capsys.readouterr()
    expected = load_model(base).generate("hello", max_tokens=6, temperature=0)
    assert out.endswith(f"temperature 0\n{expected}\n") and err == ""


def test_a_wrong_option_is_refused_as_everywhere(base, capsys):
    assert main(["play", "--base", str(base), "--json", "x"]) == 2
    assert "there is no option --json; see minilora play --help" in capsys.readouterr().err


def test_in_python_a_model_is_played_with_in_one_call(model, capsys, monkeypatch):
    lines = iter(["/temp 0", "/tokens 6", "ab"])

    def typed(prompt):
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    minilora.play(model)
    text = model.generate("ab", max_tokens=6, temperature=0)
    assert capsys.readouterr().out.endswith(f"max tokens 6\n{text}\n")
