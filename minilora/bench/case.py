"""What a benchmark times: a training step, an evaluation or a generation, with random weights."""

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
from minilora.llama import LinearScaling, Llama3Scaling, LlamaConfig
from minilora.settings import LARGEST_COUNT, Settings, check_sizes

PROMPT = 8  # tokens of the prompt that a generation continues
CLIP = 1.0
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Case(Settings):
    """One thing to time, and its sizes.

    `what` is a training step by `method`, the loss on a batch of that size (`evaluate`), or the
    continuation of a prompt by `context` tokens (`generate`); it is timed `steps` times. `threads`
    counts all threads, BLAS's included; `recompute` is that of `Plan`. Raises MiniloraError for
    sizes that cannot be run.
    """

    config: GPTConfig | LlamaConfig
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
        check_sizes(self, "batch", "context", "rank", "threads", "steps", largest=LARGEST_COUNT)
        prompt = PROMPT if self.what == "generate" else 0
        if self.context + prompt > self.config.n_positions:
            after = f" after a prompt of {prompt} tokens" if prompt else ""
            raise MiniloraError(
                f"context {self.context}{after} exceeds the model's context of "
                f"{self.config.n_positions}"
            )

    @property
    def tokens(self) -> int:
        """The number of tokens that one timed run reads or, in a generation, writes."""
        return self.context if self.what == "generate" else self.batch * self.context

    @property
    def lora_config(self) -> LoRAConfig:
        """The adapters of a step; s = 1."""
        return LoRAConfig(rank=self.rank, alpha=self.rank, targets=self.targets)

    def text(self) -> np.ndarray:
        """Random tokens, 1-D int32, enough for eight batches."""
        size = 8 * self.batch * self.context + 1
        return np.random.default_rng(0).integers(self.config.vocab_size, size=size, dtype=np.int32)

    def to_json(self) -> str:
        """The case as text, for another process."""
        return json.dumps(dataclasses.asdict(self), default=json_number)

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The case that `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        sizes = fields["config"]
        if scaling := sizes.get("rope_scaling"):
            scalings = (LinearScaling, Llama3Scaling)
            sizes["rope_scaling"] = scalings[len(scaling) > 1](*scaling)
        fields["config"] = (LlamaConfig if "hidden_size" in sizes else GPTConfig)(**sizes)
        fields["targets"] = tuple(fields["targets"])
        return cls(**fields)
