"""Exact match by greedy generation: what counts as the same, when it stops, what is not asked."""

from dataclasses import replace

import numpy as np
import pytest

from minilora.adapters import LoRAConfig
from minilora.errors import MiniloraError
from minilora.records.corpus import corpus_from_records
from minilora.records.match import answer_to, judge, matches
from minilora.tokenizer import NO_TEXT
from minilora.training.loop import TrainConfig
from minilora.training.runs import adapt


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("Paris", "Paris", True),
        (" Paris", "Paris", True),
        ("Paris\n", "Paris", True),
        ("paris", "Paris", False),
        ("Paris.", "Paris", False),
        ("The Paris", "Paris", False),
        ("a  b", "a b", False),
        ("", "x", False),
        ("a", "a\nb", False),
        ("4", "42", False),
    ],
)
def test_two_texts_match_but_for_white_space_at_their_ends(answer, expected, same):
    assert matches(answer, expected) is same


def corpus(model, *objects, context=79):
    return corpus_from_records(objects, model, context=context, held_out=0)


def scripted(monkeypatch, text):
    """A model that answers with these bytes, whatever it is asked; returns what it was asked."""
    asked = []

    def generate(net, *, prompt_ids, max_tokens, temperature, **draws):
        assert temperature == 0
        asked.append((np.asarray(prompt_ids).tolist(), max_tokens))
        return iter(list(text)[:max_tokens])

    monkeypatch.setattr("minilora.model.generate", generate)
    return asked


def test_a_model_is_given_the_prompt_and_as_many_tokens_as_the_answer_has(model, monkeypatch):
    asked = scripted(monkeypatch, b"four and more")
    (example,) = corpus(model, {"prompt": "2+2: ", "completion": "four"}).train
    assert answer_to(model, example) == "four "
    assert asked == [(list(b"2+2: "), 5)]


def test_an_answer_ends_at_its_end_and_may_have_newlines(model, monkeypatch):
    scripted(monkeypatch, b"a\nb" + bytes([NO_TEXT]) + b"zzz")
    (example,) = corpus(model, {"prompt": "q", "completion": "a\nb and so on"}).train
    assert answer_to(model, example) == "a\nb"


def test_an_answer_of_a_chat_ends_at_the_template_s_mark(model, monkeypatch):
    scripted(monkeypatch, b"blue</>\nmore")
    (example,) = corpus(model, {"prompt": "q", "completion": "red, not blue"}).train
    assert answer_to(model, example._replace(closing="</>")) == "blue"


def test_what_cannot_be_asked_is_counted(model, monkeypatch):
    """A text, an empty prompt, and a record beyond the context have nothing to ask."""
    scripted(monkeypatch, b"yes" + bytes([NO_TEXT]))
    found = judge(
        model,
        corpus(
            model,
            {"prompt": "a", "completion": "yes"},
            {"prompt": "b", "completion": "no"},
            {"prompt": "", "completion": "yes"},
            {"text": "yes"},
        ).train,
    )
    assert (found.records, found.asked, found.exact, found.tokens) == (4, 2, 1, 4 + 3 + 3 + 3)
    assert found.bits_per_byte == pytest.approx(
        found.loss * found.tokens / np.log(2) / len("yesnoyesyes")
    )


def test_a_model_that_has_learned_its_records_answers_them_all(model):
    """The end is learned with the answer: every text stops before its limit."""
    rows = {"a? ": "no", "b? ": "yes\n1", "d? ": "x"}
    records = corpus(model, *[{"prompt": p, "completion": a} for p, a in rows.items()])
    both = replace(records, held_out=records.train)
    settings = TrainConfig(steps=150, batch=3, context=79, lr=0.03, eval_every=150, threads=1)
    adapted, _ = adapt(model, both, LoRAConfig(rank=8), settings, progress=False)
    found = judge(adapted, both.train)
    assert (found.exact, found.asked) == (3, 3)
    assert found.loss < judge(model, both.train).loss
    for example in both.train:
        longer = example._replace(tokens=np.append(example.tokens, [0] * 20).astype(np.int32))
        assert answer_to(adapted, longer) == example.answer, "it stopped by itself"
    assert adapted.generate("a? ", temperature=0) == "no"


def test_nothing_to_evaluate_is_an_error(model):
    with pytest.raises(MiniloraError, match="no record to evaluate"):
        judge(model, ())
