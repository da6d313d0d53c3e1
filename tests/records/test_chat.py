"""Chats through a template: what counts, what is refused, and templates that do harm."""

import json
from datetime import date
from types import SimpleNamespace

import pytest

from minilora.errors import MiniloraError
from minilora.records import chat
from minilora.records.chat import Template
from minilora.records.corpus import corpus_from_records
from minilora.records.lines import Message
from minilora.tokenizer import ByteTokenizer

pytest.importorskip("jinja2")

DAY = date(2024, 2, 29)
BYTES = ByteTokenizer()
ROLES = {"s": "system", "u": "user", "a": "assistant"}


def messages(*turns):
    """Messages from texts such as "u:Two?"."""
    pairs = (turn.split(":", 1) for turn in turns)
    return [{"role": ROLES[role], "content": content} for role, content in pairs]


def read(folder, *turns, tokenizer=BYTES):
    """The example that one chat becomes."""
    return corpus(folder, {"messages": messages(*turns)}, tokenizer=tokenizer).train[0]


def corpus(folder, *objects, tokenizer=BYTES):
    """Chats and other records, all to train on."""
    model = SimpleNamespace(tokenizer=tokenizer, folder=folder)
    return corpus_from_records(objects, model, context=500, held_out=0, today=DAY)


def counted(example):
    """Whole text of an example, with what counts between braces."""
    text, inside = "", False
    for token, counts in zip(example.tokens.tolist(), example.counts.tolist(), strict=True):
        text += ("{" if counts else "}") * (counts != inside) + chr(token)
        inside = counts
    return text + "}" * inside


def test_every_answer_counts_with_its_end_and_nothing_else(with_template):
    folder = with_template()
    assert counted(read(folder, "u:Two?", "a:2", "u:Three?", "a:3")) == (
        "<user>\nTwo?</>\n<assistant>\n{2</>\n}<user>\nThree?</>\n<assistant>\n{3</>\n}"
    )
    assert counted(read(folder, "s:Be short.", "u:Four?", "a: 4 ")) == (
        "<system>\nBe short.</>\n<user>\nFour?</>\n<assistant>\n{ 4 </>\n}"
    )


def test_marks_in_a_text_and_equal_answers_are_no_trap(with_template):
    """Nothing is looked for: an answer like the question counts once, at its own place."""
    folder = with_template()
    assert counted(read(folder, "u:Say </> and <assistant>", "a:no")).count("{") == 1
    assert counted(read(folder, "u:A", "a:A", "a:B")) == (
        "<user>\nA</>\n<assistant>\n{A</>\n}<assistant>\n{B</>\n}"
    )


def test_a_template_may_trim(with_template):
    folder = with_template(
        "{% for m in messages %}{% if m.role == 'user' %}U{{ m.content | trim }}"
        "{% else %}A{{ m.content | trim }};{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A{% endif %}"
    )
    example = read(folder, "u:  ink? \n", "a:\nblue\n")
    assert counted(example) == "Uink?A{blue;}"
    assert (example.answer, example.closing, example.asked) == ("\nblue\n", ";", 6)


def test_a_template_s_own_refusal_names_the_line(with_template):
    folder = with_template(
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system role here') }}"
        "{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(MiniloraError, match=r"^record 1: the chat template in .*: No system role"):
        read(folder, "s:x", "u:a", "a:b")


def test_a_message_that_a_template_leaves_out_is_refused(with_template):
    folder = with_template(
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(MiniloraError, match="record 1: the chat template leaves out message 1"):
        read(folder, "s:secret", "u:a", "a:b")


def test_answers_that_a_template_rewrites_later_are_context(with_template):
    """As templates do that drop the reasoning of earlier turns."""
    folder = with_template(
        "{% for m in messages %}{{ m.role[0] }}{% if m.role == 'assistant' and loop.last %}!"
        "{% endif %}{{ m.content }};{% endfor %}{% if add_generation_prompt %}a!{% endif %}"
    )
    found = corpus(folder, {"messages": messages("u:1", "a:2", "u:3", "a:4")})
    assert found.context_turns == 1
    assert counted(found.train[0]) == "u1;a2;u3;a!{4;}"
    assert "1 answers do not count" in list(found.described())[1]


def test_a_chat_without_a_target_is_left_out(with_template):
    folder = with_template(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}?{% endif %}"
    )
    found = corpus(folder, {"messages": messages("u:1", "a:2")}, {"text": "good"})
    assert found.left_out == (("record 1", "without a target"),) and len(found.train) == 1


def test_a_base_without_a_template_says_where_one_goes(folder):
    with pytest.raises(MiniloraError, match=r"has no chat template.*chat_template\.jinja there"):
        read(folder, "u:a", "a:b")


def test_the_template_of_tokenizer_config_is_read(folder):
    def settings(value):
        (folder / "tokenizer_config.json").write_text(json.dumps(value), encoding="utf-8")

    form = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    settings({"chat_template": form, "bos_token": {"content": "^"}})
    with Template(folder, DAY) as template:
        assert template.render([Message("user", "a")]) == "^a"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    settings({"chat_template": named})
    with Template(folder, DAY) as template:
        assert template.render([Message("user", "a")]) == "yes"
    settings({"chat_template": named[:1]})
    with pytest.raises(MiniloraError, match="has no chat template"):
        Template(folder, DAY)


def test_a_template_has_what_transformers_gives_it(with_template):
    folder = with_template(
        "{{ strftime_now('%d %b %Y') }}{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}"
        "{{ i }}{% endfor %}{% generation %}{{ ['<é>'] | tojson }}{% endgeneration %}"
        "{% if true %}\n    {% set x = 1 %}\n{{ x }}{% endif %}{{ tools is none }}"
    )
    with Template(folder, DAY) as template:
        assert template.render([]) == '29 Feb 202401["<é>"]1True'
        assert template.asks_for_date


HARMFUL = {
    "a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{{ 'a' * 10 ** 10 }}",
    "memory, when compiled": "{{ 'a' * 10 ** 12 }}",
    "a long text": "{% for i in range(99) %}{{ 'abcdefgh' * 20000 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "classes": "{{ ().__class__.__bases__ }}",
    "globals": "{{ lipsum.__globals__['os'] }}",
    "a change": "{{ messages.append(1) }}",
    "a file": "{% include '/etc/passwd' %}",
    "no template": "{% for",
}
SAID = {
    "a loop": "it takes longer than",
    "memory": "it needs too much memory",
    "memory, when compiled": "it needs too much memory",
    "a long text": "it makes a text of 15,840,000 characters",
    "recursion": "it calls itself without end",
    "classes": "unsafe",
    "globals": "unsafe",
    "a change": "unsafe",
    "a file": "no loader",
    "no template": "it is no template of jinja2",
}


@pytest.mark.parametrize("what", HARMFUL)
def test_a_harmful_template_ends_in_a_sentence(with_template, monkeypatch, what):
    pytest.importorskip("resource")  # the limit of memory
    folder = with_template(HARMFUL[what])
    expected = pytest.raises(MiniloraError, match=f"the chat template in .*: .*{SAID[what]}")
    with expected, Template(folder, DAY) as template:
        if what == "a loop":
            monkeypatch.setattr(chat, "SECONDS", 1.0)
        template.render([Message("user", "a")])


def test_a_special_token_s_name_in_a_message_is_refused(with_template):
    """It would become that token, and could end a turn that goes on."""

    class WithMarks(ByteTokenizer):
        def encode_batch(self, texts, *, special=True):
            found = super().encode_batch(texts)
            marked = [special and "<end>" in text for text in texts]
            return [i[:1] if has else i for i, has in zip(found, marked, strict=True)]

    folder = with_template()
    with pytest.raises(MiniloraError, match="record 1: message 2 has the name of a special token"):
        read(folder, "u:a", "a:b<end>c", tokenizer=WithMarks())
    assert read(folder, "u:a", "a:b", tokenizer=WithMarks()).counts.any()
