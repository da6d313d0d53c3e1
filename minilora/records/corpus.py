"""Records as tokens: which of them count in the loss, which batch they form, which are held out.

Prompt and answer are encoded apart, so that the prompt has the very tokens that generation is given
later; the mask is then a matter of lengths, and no text is searched for a mark.
"""

from __future__ import annotations

import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from minilora.data import IGNORED, Batch, as_list, check_share, name_hash
from minilora.described import Described
from minilora.errors import MiniloraError
from minilora.records.chat import Template
from minilora.records.lines import Record, read_records, records_of
from minilora.texts import LeftOut, Source, decode_text, is_json_lines, read_bytes
from minilora.tokenizer import Tokenizer
from minilora.workers import SHARD_TOKENS

Loss = Literal["answer", "all"]


class Piece(NamedTuple):
    """A part of a record's text, and whether the loss counts it."""

    text: str
    counts: bool


class Example(NamedTuple):
    """A record as tokens, and which of them count as targets; its last answer, to be asked for."""

    tokens: np.ndarray  # 1-D int32
    counts: np.ndarray  # 1-D bool, False at the first token, which nothing predicts
    place: str
    prompt: str  # the text before the first answer, by which records are told apart
    counted_bytes: int  # of text that counts
    asked: int  # how many tokens lead to the last answer; 0 where there is nothing to ask
    answer: str
    closing: str  # the mark with which a template ends an answer

    @property
    def batch(self) -> Batch:
        """Inputs (T,) and targets (T,), those that do not count IGNORED."""
        return self.tokens[:-1], np.where(self.counts[1:], self.tokens[1:], IGNORED)


@dataclass(frozen=True, repr=False)
class Records(Described):
    """Examples to train on and held-out ones, as `train` and `adapt` take a Corpus."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    name: str
    forms: dict[str, int]  # how many records of each form there are
    left_out: tuple[LeftOut, ...] = ()
    context_turns: int = 0  # turns of assistants that do not count
    today: str | None = None  # the date, where the chat template asks for it

    def _described(self) -> dict[str, str]:
        counted = sum(int(example.counts.sum()) for example in self.train)
        left_out = {"left out": f"{len(self.left_out):,} files"} if self.left_out else {}
        return {
            "Records": reprlib.repr(self.name),
            "training": f"{len(self.train):,} records with {counted:,} targets",
            "held-out": f"{len(self.held_out):,} records",
            **left_out,
        }

    def described(self) -> Iterator[str]:
        """Sentences that say what there is to train on, and what of it counts."""
        tokens = sum(len(example.tokens) for example in self.train)
        counted = sum(int(example.counts.sum()) for example in self.train)
        forms = ", ".join(f"{count:,} of the form {form}" for form, count in self.forms.items())
        yield (
            f"records: {forms}; {len(self.train):,} to train on, whose loss counts {counted:,} of "
            f"{tokens:,} tokens, and {len(self.held_out):,} held out"
        )
        if self.context_turns:
            yield (
                f"{self.context_turns:,} answers do not count: the chat template writes them in "
                "another way once the chat goes on"
            )

    def check(self, *, context: int) -> None:
        """Raise MiniloraError where a record is longer than the context, or none is held out."""
        for example in (*self.train, *self.held_out):
            if len(example.tokens) > context + 1:
                raise MiniloraError(
                    f"{example.place} has {len(example.tokens)} tokens; a context of {context} "
                    f"holds records of at most {context + 1}"
                )
        if not self.train or not self.held_out:
            raise MiniloraError(
                f"{self.name} is too short: it needs two prompts that fit the context, one held out"
            )

    def arrays(self) -> Iterator[np.ndarray]:
        """All the arrays, from which a run is known."""
        for examples in (self.train, self.held_out):
            for example in examples:
                yield from (example.tokens, example.counts)
            yield np.ones(1, bool)  # between the parts

    def draw(
        self, rng: np.random.Generator, *, step: int, batch: int, context: int, seed: int
    ) -> Batch:
        """The batch of a step: every record once in each pass, in an order of the pass's own."""
        n = len(self.train)
        places = range((step - 1) * batch, step * batch)
        orders = {p: shuffled(n, seed, p) for p in {place // n for place in places}}
        return padded([self.train[orders[place // n][place % n]] for place in places])

    def tokens_in(self, batch: int, context: int) -> float:
        """How many inputs a batch has on average, its padding aside."""
        return batch * sum(len(example.tokens) - 1 for example in self.train) / len(self.train)

    def held_out_batches(self, *, context: int, limit: int) -> list[Batch]:
        """All held-out records, or as many, spread evenly, as have `limit` inputs."""
        sizes = np.cumsum([len(example.tokens) - 1 for example in self.held_out])
        share = min(1.0, limit / sizes[-1])
        chosen = np.linspace(0, len(sizes) - 1, max(1, int(share * len(sizes)))).astype(np.int64)
        return list(batches([self.held_out[i] for i in chosen]))


def shuffled(n: int, seed: int, number: int) -> np.ndarray:
    """The order of n records in a pass, which depends on the seed and the pass's number alone."""
    return np.random.default_rng([seed, number, n]).permutation(n)


def padded(examples: Sequence[Example]) -> Batch:
    """Examples as one batch, each from position 0 on; what is added at its end does not count."""
    shape = len(examples), max(len(example.tokens) for example in examples) - 1
    inputs, targets = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32)
    for i, example in enumerate(examples):
        own = slice(0, len(example.tokens) - 1)
        inputs[i, own], targets[i, own] = example.batch
    return inputs, targets


def batches(examples: Sequence[Example]) -> Iterator[Batch]:
    """The examples by length, as many together as make a shard of a batch."""
    together: list[Example] = []
    for example in sorted(examples, key=lambda one: len(one.tokens)):
        if together and (len(together) + 1) * (len(example.tokens) - 1) > SHARD_TOKENS:
            yield padded(together)
            together = []
        together.append(example)
    if together:
        yield padded(together)


def are_records(sources: Source | Sequence[Source]) -> bool:
    """Whether all sources are files in JSON Lines; MiniloraError where only some are."""
    names = as_list(sources)
    found = [is_records(source) for source in names]
    if any(found) and not all(found):
        text = names[found.index(False)]
        raise MiniloraError(
            f"{names[found.index(True)]} has records, {text} is text; expected one or the other"
        )
    return all(found)


def is_records(source: Source) -> bool:
    """Whether a source is a file in JSON Lines, by its name or by its lines."""
    if source in ("python", "-") or not os.path.isfile(source):
        return False
    return is_json_lines(os.fspath(source), decode_text(read_bytes(Path(source))) or "")


class HasTokenizer(Protocol):
    """A model, as far as records need one: for its tokens and its chat template."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What makes tokens of text."""

    @property
    def folder(self) -> Path:
        """Where the chat template is."""


def load_records(
    sources: Source | Sequence[Source], model: HasTokenizer, *, context: int, **options: Any
) -> Records:
    """The records of files in JSON Lines (see `read_records`), for a model to train on.

    The options are those of `corpus_of`.
    """
    names = as_list(sources)
    records = [record for source in names for record in read_records(source)]
    name = " ".join(map(str, names))
    return corpus_of(records, model, context=context, **{"name": name, **options})


def corpus_from_records(
    objects: Iterable[Mapping[str, Any]], model: HasTokenizer, *, context: int, **options: Any
) -> Records:
    """Records in memory, each as a line of a file has it; the options are those of `corpus_of`."""
    return corpus_of(records_of(objects), model, context=context, **options)


# --- from records to examples ------------------------------------------------------------------


def corpus_of(
    records: Sequence[Record],
    model: HasTokenizer,
    *,
    context: int,
    loss: Loss = "answer",
    held_out: float = 0.05,
    name: str = "the records",
    today: date | None = None,
) -> Records:
    """Records as tokens for a model, whose folder has its chat template.

    Counted are the answers (`loss="answer"`), each with its end, or every token. A text without a
    prompt is read in windows of `context`; other records that are longer are left out, and named.
    Held out are whole records, chosen by a hash of their prompts. Raises MiniloraError, naming the
    line, for a chat that the base's template refuses, and where no record is left.
    """
    check_share(held_out)
    tokenizer, folder = model.tokenizer, model.folder
    if tokenizer.end_of_answer is None:
        raise MiniloraError(
            f"the base in {folder} has no token that ends a text, with which an answer would end; "
            "expected eos_token_id in its config.json"
        )
    cut, dated = pieces_of(records, tokenizer, folder, today or date.today())
    whole = [
        (record, example_of(record, pieces, ids, tokenizer.end_of_answer, loss))
        for record, pieces, ids in encoded(cut, tokenizer)
    ]
    apart = held_out_prompts([example.prompt for _, example in whole], held_out)
    examples: list[Example] = []
    left_out: list[LeftOut] = []
    for record, example in whole:
        if not example.counts.any():
            left_out.append(LeftOut(record.place, "without a target"))
        elif len(example.tokens) <= context + 1:
            examples.append(example)
        elif record.form == "text":
            examples += windows_of(example, context)
        else:
            left_out.append(LeftOut(record.place, f"longer than the context of {context}"))
    if not examples:
        raise MiniloraError(f"{name} has no record that fits: each is longer than {context} tokens")
    train = tuple(example for example in examples if example.prompt not in apart)
    held = tuple(example for example in examples if example.prompt in apart)
    forms = Counter(record.form for record in records)
    lost = sum(lost for *_, lost in cut)
    return Records(train, held, name, dict(forms), tuple(left_out), lost, dated)


Cut = tuple[Record, list[Piece], int]  # a record, its pieces, how many of its answers do not count


def pieces_of(
    records: Sequence[Record], tokenizer: Tokenizer, folder: Path, today: date
) -> tuple[list[Cut], str | None]:
    """Every record, cut into pieces; and the date, if the chat template asks for it."""
    if not any(record.messages for record in records):
        return [(record, plain_pieces(record), 0) for record in records], None
    cut = []
    with Template(folder, today) as template:
        for record in records:
            if record.messages:
                check_no_marks(record, tokenizer)
                cut.append((record, *chat_pieces(record, template)))
            else:
                cut.append((record, plain_pieces(record), 0))
    return cut, today.isoformat() if template.asks_for_date else None


def encoded(
    cut: Sequence[Cut], tokenizer: Tokenizer
) -> Iterator[tuple[Record, list[Piece], list[np.ndarray]]]:
    """Every record with the tokens of its pieces, which are encoded apart.

    In what a template wrote, the name of a special token is that token; in a text it is text.
    """
    texts: dict[bool, list[str]] = {False: [], True: []}
    for record, pieces, _ in cut:
        texts[bool(record.messages)] += [piece.text for piece in pieces]
    ids = {on: iter(tokenizer.encode_batch(those, special=on)) for on, those in texts.items()}
    for record, pieces, _ in cut:
        yield record, pieces, [next(ids[bool(record.messages)]) for _ in pieces]


def plain_pieces(record: Record) -> list[Piece]:
    """The prompt, which does not count, if there is one, and what follows it."""
    before = [] if record.prompt is None else [Piece(record.prompt, False)]
    return [*before, Piece(record.completion, True)]


def chat_pieces(record: Record, template: Template) -> tuple[list[Piece], int]:
    """A rendered chat, cut where an answer begins and ends; and the answers that do not count.

    A turn counts if the chat up to it, ending as generation begins, is how the chat with it begins,
    and that is how the whole begins. A template that rewrites earlier turns fails this.
    """
    messages, pieces, done, lost = record.messages, list[Piece](), 0, 0
    try:
        whole = template.render(messages)
        for i, message in enumerate(messages):
            if message.content.strip() not in whole:
                raise MiniloraError(f"the chat template leaves out message {i + 1}")
            if message.role != "assistant":
                continue
            before = template.render(messages[:i], generation=True)
            through = template.render(messages[: i + 1])
            if through.startswith(before) and whole.startswith(through) and len(before) >= done:
                pieces += [Piece(whole[done : len(before)], False)]
                pieces += [Piece(whole[len(before) : len(through)], True)]
                done = len(through)
            else:
                lost += 1
    except MiniloraError as error:
        raise MiniloraError(f"{record.place}: {error}") from None
    return [*pieces, Piece(whole[done:], False)], lost


def check_no_marks(record: Record, tokenizer: Tokenizer) -> None:
    """Raise MiniloraError where a message has the name of a special token: it would become one."""
    texts = [message.content for message in record.messages]
    as_text, as_marks = (tokenizer.encode_batch(texts, special=on) for on in (False, True))
    for i, (one, other) in enumerate(zip(as_text, as_marks, strict=True), 1):
        if not np.array_equal(one, other):
            raise MiniloraError(
                f"{record.place}: message {i} has the name of a special token of the base"
            )


def example_of(
    record: Record, pieces: Sequence[Piece], ids: Sequence[np.ndarray], end: int, loss: Loss
) -> Example:
    """The tokens of a record; `end` ends an answer, unless a template wrote how it ends."""
    answers = [i for i, piece in enumerate(pieces) if piece.counts]
    counts = [np.full(len(i), p.counts or loss == "all") for i, p in zip(ids, pieces, strict=True)]
    tokens, mask = np.concatenate(ids), np.concatenate(counts)
    answer, closing = record.completion, ""
    if record.messages:
        answer = record.messages[-1].content
        closing = pieces[answers[-1]].text.rpartition(answer.strip())[2].strip() if answers else ""
    else:
        tokens, mask = np.append(tokens, np.int32(end)), np.append(mask, True)
    mask[:1] = False
    before = pieces[: answers[0]] if answers else pieces
    return Example(
        tokens,
        mask,
        record.place,
        prompt="".join(piece.text for piece in before) or record.completion,
        counted_bytes=sum(len(p.text.encode()) for p in pieces if p.counts or loss == "all"),
        asked=sum(map(len, ids[: answers[-1]])) if answers else 0,
        answer=answer,
        closing=closing,
    )


def windows_of(example: Example, context: int) -> Iterator[Example]:
    """A text in windows of `context` inputs; the last token of one is the first of the next."""
    for start in range(0, len(example.tokens) - 1, context):
        window = slice(start, start + context + 1)
        counts = example.counts[window].copy()
        counts[0] = False
        size = 0 if start else example.counted_bytes  # a window does not know its bytes
        yield example._replace(tokens=example.tokens[window], counts=counts, counted_bytes=size)


def held_out_prompts(prompts: Sequence[str], held_out: float) -> set[str]:
    """The prompts whose records are held out, of the prompts of all records.

    They are taken in the order of their hash until the share is reached, at least one and never
    all. So neither the order of the lines nor the context, which leaves long records out, changes
    on which side a record is.
    """
    sizes = Counter(prompts)
    wanted = max(1, int(held_out * len(prompts))) if held_out else 0
    apart: set[str] = set()
    held = 0
    for prompt in sorted(sizes, key=name_hash)[:-1]:
        if held < wanted:
            apart.add(prompt)
            held += sizes[prompt]
    return apart
