"""What a benchmark runs: a model of random weights, and a step, an evaluation or a generation."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from minilora.data import Corpus
from minilora.errors import MiniloraError
from minilora.gpt import GPTConfig
from minilora.lora import LoRAConfig
from minilora.train import TrainConfig

SHAPES = {
    "tiny": GPTConfig(vocab_size=512, n_embd=256, n_layer=4, n_head=4),
    "small": GPTConfig(vocab_size=12564, n_embd=384, n_layer=6, n_head=6),
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_embd=1024, n_layer=24, n_head=16),
}
WHAT = ("step", "evaluate", "generate")
PROMPT = 8  # tokens that a generation starts from


@dataclass(frozen=True)
class Case:
    """One thing to time.

    A `step` is one of training by `method`, an `evaluate` the loss on as large a batch, each timed
    `steps` times; a `generate` continues a prompt by `context` tokens. `threads` is the number of
    threads in all, BLAS's included. Raises MiniloraError for what cannot be run.
    """

    config: GPTConfig
    what: Literal["step", "evaluate", "generate"] = "step"
    method: Literal["lora", "full"] = "lora"
    batch: int = 8
    context: int = 128
    rank: int = 8
    targets: tuple[str, ...] = ("qkv",)
    threads: int = 2
    steps: int = 10
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("batch", "context", "rank", "threads", "steps"):
            if getattr(self, name) < 1:
                raise MiniloraError(f"{name} {getattr(self, name)} is too small; it is at least 1")
        length = self.context + (PROMPT if self.what == "generate" else 0)
        if length > self.config.n_positions:
            raise MiniloraError(
                f"{length} tokens exceed the model's context of {self.config.n_positions}"
            )

    @property
    def tokens(self) -> int:
        """Tokens that one timed run reads or, generating, writes."""
        return self.context if self.what == "generate" else self.batch * self.context

    @property
    def lora_config(self) -> LoRAConfig:
        return LoRAConfig(rank=self.rank, alpha=self.rank, targets=self.targets)

    @property
    def settings(self) -> TrainConfig:
        return TrainConfig(
            method=self.method,
            batch=self.batch,
            context=self.context,
            steps=10**6,
            threads=self.threads,
        )

    def corpus(self) -> Corpus:
        """Random tokens."""
        size = 8 * self.batch * self.context + 1
        tokens = np.random.default_rng(0).integers(self.config.vocab_size, size=size)
        train = tokens.astype(np.int32)
        return Corpus(train, train, size, size, 1, "random tokens")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        fields: dict[str, Any] = json.loads(text)
        fields["config"] = GPTConfig(**fields["config"])
        fields["targets"] = tuple(fields["targets"])
        return cls(**fields)
