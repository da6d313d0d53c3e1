"""Which tokens count, how records become batches, and what is held out."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data import IGNORED
from minilora.errors import MiniloraError
from minilora.records.corpus import (
    are_records,
    batches,
    corpus_from_records,
    load_records,
    padded,
)
from minilora.tokenizer import NO_TEXT, ByteTokenizer

BYTES = ByteTokenizer()


def pairs(n):
    """Records of unequal lengths, each with a prompt of its own."""
    return [{"prompt": f"{i}+{i}=", "completion": "x" * (1 + 7 * i % 13)} for i in range(n)]


def read(*objects, tokenizer=BYTES, context=200, held_out=0.0, **options):
    """Records of a program's objects as a corpus; all to train on, if nothing else is said."""
    model = SimpleNamespace(tokenizer=tokenizer, folder=Path("base"))
    return corpus_from_records(objects, model, context=context, held_out=held_out, **options)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@given(prompt=texts, answer=texts.filter(bool))
def test_the_targets_are_the_answer_and_its_end(prompt, answer):
    (example,) = read({"prompt": prompt, "completion": answer}).train
    p, a = len(prompt.encode()), len(answer.encode())
    assert example.tokens.tolist() == [*prompt.encode(), *answer.encode(), NO_TEXT]
    assert example.tokens[:p].tolist() == BYTES.encode(prompt).tolist()
    assert example.counts.sum() == a + 1 - (p == 0), "nothing predicts the first token"
    assert example.counts[p:].sum() == example.counts.sum()
    inputs, targets = example.batch
    assert len(inputs) == len(targets) == p + a
    counted = targets != IGNORED
    assert counted.sum() == example.counts.sum()
    assert targets[counted].tolist() == example.tokens[example.counts].tolist()
    if p:
        assert counted[p - 1] and not counted[: p - 1].any(), "the last of the prompt predicts"


def test_a_text_counts_from_its_second_token_to_its_end():
    (example,) = read({"text": "tide"}).train
    assert example.counts.tolist() == [False, True, True, True, True]
    (one,) = read({"text": "x"}).train
    assert one.counts.tolist() == [False, True]


def test_all_counts_the_prompt_as_well():
    (example,) = read({"prompt": "ab", "completion": "c"}, loss="all").train
    assert example.counts.tolist() == [False, True, True, True]


def test_an_answer_that_holds_the_padding_or_the_end_keeps_its_targets():
    """The mask is a matter of lengths, not of values."""
    examples = read(
        {"prompt": "a", "completion": "\x01\x02"}, {"prompt": "a long one", "completion": "b"}
    ).train
    inputs, targets = padded(examples)
    assert (targets != IGNORED).sum(axis=1).tolist() == [3, 2]
    assert inputs.shape == targets.shape == (2, 11)
    assert targets[0].tolist() == [1, 2, NO_TEXT, *[IGNORED] * 8]


def test_a_record_fits_a_context_of_its_inputs_and_not_one_of_one_less():
    """Its last token is a target only: 24 tokens are 23 inputs."""
    record = {"prompt": "Port of Ostend: ", "completion": "Belgium"}
    assert len(read(record, context=23).train) == 1
    other = {"prompt": "a", "completion": "b"}
    found = read(record, other, context=22)
    assert [e.place for e in found.train] == ["record 2"]
    assert found.left_out == (("record 1", "longer than the context of 22"),)
    with pytest.raises(MiniloraError, match="no record that fits"):
        read(record, context=22)


@given(length=st.integers(1, 40), context=st.integers(1, 9))
def test_a_long_text_is_read_in_windows_and_every_token_counts_once(length, context):
    text = "".join(chr(97 + i % 26) for i in range(length))
    examples = read({"text": text}, context=context).train
    assert all(len(e.tokens) <= context + 1 for e in examples)
    counted = np.concatenate([e.tokens[e.counts] for e in examples])
    assert counted.tolist() == [*text.encode()[1:], NO_TEXT]
    assert sum(e.counted_bytes for e in examples) == length


def test_a_base_that_cannot_end_an_answer_is_refused():
    tokenizer = ByteTokenizer()
    tokenizer.end_of_answer = None
    with pytest.raises(MiniloraError, match="no token that ends a text.*eos_token_id"):
        read({"text": "a"}, tokenizer=tokenizer)


# --- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch"), [(7, 3), (7, 7), (3, 8), (1, 4)])
def test_in_each_pass_every_record_is_seen_once(n, batch):
    corpus = read(*pairs(n))
    seen = []
    for step in range(1, 40):
        inputs, _ = corpus.draw(
            np.random.default_rng(0), step=step, batch=batch, context=200, seed=5
        )
        assert len(inputs) == batch
        seen += [bytes(row[: row.argmin() or None].tolist()).split(b"=")[0] for row in inputs]
    for start in range(0, len(seen) // n * n, n):
        assert len(set(seen[start : start + n])) == n
    if n > 3:
        assert seen[:n] != seen[n : 2 * n], "each pass has an order of its own"


def test_the_order_depends_on_seed_and_step_alone():
    corpus = read(*pairs(9))

    def drawn(step, seed, generator=0):
        rng = np.random.default_rng(generator)
        return corpus.draw(rng, step=step, batch=4, context=200, seed=seed)[0].tolist()

    assert drawn(5, 1) == drawn(5, 1, generator=3)
    assert drawn(5, 1) != drawn(5, 2)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_batches_to_evaluate_hold_every_record_once(lengths):
    examples = read(*({"prompt": f"{i}", "completion": "y" * n} for i, n in enumerate(lengths)))
    found = list(batches(examples.train))
    assert sum(len(inputs) for inputs, _ in found) == len(lengths)
    targets = sum(int((targets != IGNORED).sum()) for _, targets in found)
    assert targets == sum(n + 1 for n in lengths)
    assert all(inputs.size <= 1024 or len(inputs) == 1 for inputs, _ in found)


def test_an_evaluation_reads_no_more_than_it_may():
    corpus = read(*pairs(40))
    corpus = replace(corpus, held_out=corpus.train)
    everything = corpus.held_out_batches(context=200, limit=10**6)
    assert sum(len(inputs) for inputs, _ in everything) == 40
    some = corpus.held_out_batches(context=200, limit=100)
    assert 5 <= sum(len(inputs) for inputs, _ in some) <= 15


# --- what is held out --------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "apart"), [(2, 1), (20, 1), (100, 5)])
def test_whole_records_are_held_out(n, apart):
    corpus = read(*pairs(n), held_out=0.05)
    assert (len(corpus.train), len(corpus.held_out)) == (n - apart, apart)


def test_no_prompt_is_on_both_sides_and_the_order_of_lines_does_not_matter():
    records = [{"prompt": f"p{i % 12}", "completion": f"{i}"} for i in range(60)]
    corpus = read(*records, held_out=0.1)
    prompts = [{e.prompt for e in part} for part in (corpus.train, corpus.held_out)]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 12
    again = read(*reversed(records), held_out=0.1)
    assert Counter(e.answer for e in again.held_out) == Counter(e.answer for e in corpus.held_out)


@pytest.mark.parametrize("context", [9, 14, 200])
def test_no_context_moves_a_record_to_the_other_side(context):
    """Else an evaluation in a longer context would ask what was trained on in a shorter one."""
    records = [{"prompt": f"{i}:", "completion": "x" * (i % 17 + 1)} for i in range(80)]
    apart = {e.prompt for e in read(*records, held_out=0.1).held_out}
    corpus = read(*records, context=context, held_out=0.1)
    assert {e.prompt for e in corpus.held_out} <= apart
    assert not {e.prompt for e in corpus.train} & apart and corpus.train


def test_of_one_prompt_nothing_can_be_held_out():
    corpus = read(*[{"prompt": "a", "completion": "b"}] * 5, held_out=0.05)
    with pytest.raises(MiniloraError, match="needs two prompts that fit the context"):
        corpus.check(context=200)


def test_a_share_outside_its_range_is_refused():
    with pytest.raises(MiniloraError, match=r"held_out 1\.5"):
        read(*pairs(3), held_out=1.5)


# --- files -------------------------------------------------------------------------------------


def test_files_in_json_lines_are_records(write, tmp_path):
    path = write(*pairs(3))
    (tmp_path / "prose.txt").write_text("prose", encoding="utf-8")
    assert are_records(path) and are_records([str(path), path])
    assert not are_records("python") and not are_records("-") and not are_records(tmp_path)
    with pytest.raises(MiniloraError, match=r"records\.jsonl has records, .*prose\.txt is text"):
        are_records([path, tmp_path / "prose.txt"])


def test_several_files_are_one_corpus(write):
    files = [write(*pairs(3), name="a.jsonl"), write({"text": "b"}, name="b.jsonl")]
    model = SimpleNamespace(tokenizer=BYTES, folder=Path("base"))
    corpus = load_records(files, model, context=99, held_out=0)
    assert len(corpus.train) == 4 and corpus.forms == {"prompt": 3, "text": 1}
    assert repr(corpus).startswith("Records    '") and "4 records with" in repr(corpus)
    assert "4 records with" in corpus._repr_html_()
    assert corpus.train[3].place.endswith("b.jsonl, line 1")


def test_what_counts_is_said():
    (line,) = read(*pairs(3), {"text": "ab"}).described()
    assert line == (
        "records: 3 of the form prompt, 1 of the form text; 4 to train on, whose loss counts 16 of "
        "29 tokens, and 0 held out"
    )
