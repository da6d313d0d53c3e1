"""The loss on text: on a whole stream, or on windows spread evenly over the held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from minilora.backend import Array, check_ids, namespace, to_device
from minilora.data import IGNORED, Batch, windows
from minilora.described import Described
from minilora.errors import MiniloraError
from minilora.loss import head_loss_forward
from minilora.network import Net, trunk_forward
from minilora.workers import SHARD_TOKENS, Workers

WINDOW = 1024  # tokens; the attention of all 8,192 of a long context would take most of the time


@dataclass(frozen=True, repr=False)
class Evaluation(Described):
    """The loss in nats per token and in bits per byte of text, and how many tokens it averages."""

    loss: float
    bits_per_byte: float
    tokens: int

    def _described(self) -> dict[str, str]:
        return {
            "Evaluation": f"{self.loss:.4f} nats per token, {self.bits_per_byte:.4f} bits per byte",
            "tokens": f"{self.tokens:,} predicted",
        }


def evaluate_tokens(
    net: Net,
    tokens: np.ndarray,
    *,
    text_bytes: int,
    threads: int = 0,
    device: str = "cpu",
) -> Evaluation:
    """The model's loss on a stream of tokens, 1-D, that encodes `text_bytes` bytes of text.

    Consecutive windows of the base's whole context, or of WINDOW tokens where that is longer, so
    that every token but the first is predicted exactly once. Raises MiniloraError for fewer than
    two tokens, for ids outside the vocabulary, and for a loss that is not finite.
    """
    if len(tokens) < 2:
        raise MiniloraError(f"tokens in the text: {len(tokens)}; an evaluation needs at least two")
    check_ids(tokens, net.config.vocab_size)
    context = min(net.config.n_positions, WINDOW)
    batches = windows(tokens, context=context, batch=max(1, SHARD_TOKENS // context))
    with Workers(threads, device) as workers:
        total, predicted = sum_nats(workers, net.on(device), batches, device)
    if not math.isfinite(total):
        raise MiniloraError("the loss is not finite: the model's numbers overflow on this text")
    loss = total / predicted
    return Evaluation(loss, loss / math.log(2) * len(tokens) / text_bytes, predicted)


def sum_nats(
    workers: Workers,
    net: Net,
    batches: Iterable[Batch],
    device: str,
) -> tuple[float, int]:
    """The loss in nats summed over batches (inputs, targets), and the number of targets counted."""

    def nats(batch: Batch) -> tuple[Array, int]:
        tokens, targets = (to_device(part, device) for part in batch)
        x, _ = trunk_forward(net, tokens=tokens)
        counted = int((batch[1] != IGNORED).sum())
        return head_loss_forward(x, net.head, targets=targets, count=1)[0], counted

    found = list(workers.map(nats, batches))
    if not found:  # one of several processes may have no share
        return 0.0, 0
    losses, sizes = zip(*found, strict=True)
    read_at_once = namespace(losses[0]).stack(losses).tolist()
    return sum(read_at_once), sum(sizes)
