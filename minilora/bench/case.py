"""What a benchmark runs: a model of random weights, and a step, an evaluation or a generation."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from minilora.adapters import LoRAConfig
from minilora.errors import MiniloraError
from minilora.formats.files import json_number
from minilora.gpt2 import GPTConfig
from minilora.settings import Settings

PROMPT = 8  # tokens that a generation starts from
CLIP = 1.0
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Case(Settings):
    """One thing to time.

    A `step` is one of training by `method`, an `evaluate` the loss on as large a batch, each timed
    `steps` times; a `generate` continues a prompt by `context` tokens. `threads` is the number of
    threads in all, BLAS's included; `recompute` is that of `loss_and_grads`. Raises MiniloraError
    for what cannot be run.
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
    recompute: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch", "context", "rank", "threads", "steps"):
            if getattr(self, name) < 1:
                raise MiniloraError(f"{name} {getattr(self, name)} is too small; it is at least 1")
            if getattr(self, name) >= 2**31:
                raise MiniloraError(f"{name} {getattr(self, name)} is too large; it is below 2^31")
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

    def text(self) -> np.ndarray:
        """Random tokens, some batches of them."""
        size = 8 * self.batch * self.context + 1
        return np.random.default_rng(0).integers(self.config.vocab_size, size=size, dtype=np.int32)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=json_number)

    @classmethod
    def from_json(cls, text: str) -> Case:
        fields: dict[str, Any] = json.loads(text)
        fields["config"] = GPTConfig(**fields["config"])
        fields["targets"] = tuple(fields["targets"])
        return cls(**fields)
