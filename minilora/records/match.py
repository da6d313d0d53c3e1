"""What a model answers, greedily, and whether it is the answer of the record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from minilora.backend import check_ids
from minilora.errors import MiniloraError
from minilora.evaluation import sum_nats
from minilora.model import Model, complete
from minilora.records.chat import until_mark
from minilora.records.corpus import Example, batches
from minilora.workers import Workers


class Judgement(NamedTuple):
    """The loss on the answers, and how many a model gives: of `asked` records, all others aside."""

    loss: float  # nats per target
    bits_per_byte: float  # of the text that counts
    tokens: int  # targets
    records: int
    asked: int
    exact: int


def judge(
    model: Model, examples: Sequence[Example], *, threads: int = 0, device: str = "cpu",
    report: Callable[[int], None] = lambda done: None,
) -> Judgement:  # fmt: skip
    """The loss on the targets of some examples, and exact match by greedy generation.

    A record without a prompt, or one whose answer does not fit the context, is not asked.
    `report` is told how many have been asked. Raises MiniloraError for a loss that is not finite.
    """
    if not examples:
        raise MiniloraError("there is no record to evaluate")
    for example in examples:
        check_ids(example.tokens, model.config.vocab_size)
    with Workers(threads, device) as workers:
        total, targets = sum_nats(workers, model.on(device), batches(examples), device)
    if not math.isfinite(total):
        raise MiniloraError("the loss is not finite: the model's numbers overflow on these records")
    asked = [e for e in examples if e.asked and len(e.tokens) <= model.config.n_positions]
    exact = 0
    for done, example in enumerate(asked, 1):
        exact += matches(answer_to(model, example), example.answer)
        report(done)
    size = max(1, sum(example.counted_bytes for example in examples))
    return Judgement(
        total / targets, total / math.log(2) / size, targets, len(examples), len(asked), exact
    )


def answer_to(model: Model, example: Example) -> str:
    """The text that a model gives greedily to what leads to a record's last answer.

    It stops where it was taught to, or after as many tokens as the record has there.
    """
    limit = len(example.tokens) - example.asked
    ids = complete(model, example.tokens[: example.asked], max_tokens=limit, temperature=0.0)
    return "".join(until_mark(model.tokenizer.stream(ids), example.closing))


def matches(answer: str, expected: str) -> bool:
    """Whether two texts are the same but for white space at their ends."""
    return answer.strip() == expected.strip()
