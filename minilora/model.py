"""A model ready for use: base, sizes, tokenizer and, optionally, an adapter, in one value.

The command line calls these functions, and most programs need no others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minilora import lora as lora_math
from minilora import tree
from minilora.adapters import LoRAConfig
from minilora.backend import Half, namespace, to_device, to_device_in_half, to_host
from minilora.data import load_text
from minilora.described import Described
from minilora.errors import MiniloraError
from minilora.evaluation import Evaluation, evaluate_tokens
from minilora.formats.tokenizer import load_tokenizer
from minilora.generate import generate
from minilora.mixing import check_weights, mix
from minilora.network import Net, net_logits
from minilora.texts import Source
from minilora.tokenizer import Tokenizer
from minilora.tree import Tree

BUILT_IN = Path(__file__).parent / "base"


@dataclass(frozen=True, kw_only=True, repr=False)
class Model(Described, Net):
    """A network with its tokenizer and the folder of its base.

    `hub_id` is the base's name on the Hugging Face hub, if it comes from there.
    """

    tokenizer: Tokenizer
    folder: Path
    hub_id: str | None = None

    def _described(self) -> dict[str, str]:
        c, parameters = self.config, tree.count(self.base)
        wte = self.base["wte"]
        dtype = "float16" if isinstance(wte, Half) else str(wte.dtype)
        described = {
            "Model": f"{self.base_name}, {parameters:,} parameters, {dtype} on {self.device}",
            "sizes": f"{c.n_layer} blocks of width {c.n_embd}, {c.n_head} heads, "
            f"context {c.n_positions}",
            "tokenizer": repr(self.tokenizer),
            "adapter": "none",
        }
        if self.lora is not None and self.lora_config is not None:
            lora, count = self.lora_config, tree.count(self.lora)
            described["adapter"] = (
                f"rank {lora.rank}, alpha {lora.alpha:g} on {', '.join(lora.targets)}: "
                f"{count:,} parameters, {count / parameters:.2%} of the base's"
            )
        return described

    @property
    def is_built_in(self) -> bool:
        """Whether the base is the one that comes with minilora."""
        return self.folder == BUILT_IN

    @property
    def base_name(self) -> str:
        """What an adapter's files call the base: "minilora", a name on the hub, or a folder."""
        return "minilora" if self.is_built_in else self.hub_id or str(self.folder)

    @property
    def device(self) -> str:
        """Where the arrays are: "cpu" or "cuda"."""
        return "cpu" if namespace(self.base["wte"]) is np else "cuda"

    def with_adapter(self, lora: Tree, lora_config: LoRAConfig) -> Model:
        """The same base with this adapter; the base's arrays are shared, not copied."""
        return replace(self, lora=lora, lora_config=lora_config)

    def with_adapters_from(
        self, *folders: str | Path, weights: Sequence[float] | None = None
    ) -> Model:
        """The same base with the adapter in a folder, or with the weighted sum of several.

        The sum is exact (see `mix`); without `weights` every weight is 1. Raises MiniloraError for
        files that are missing, damaged, or made for another base, and unless there is a finite
        weight for each adapter.
        """
        from minilora.formats import load_adapter

        weights = [1.0] * len(folders) if weights is None else list(weights)
        check_weights(len(folders), weights)
        for folder in folders:
            if not Path(folder).is_dir():
                raise MiniloraError(
                    f"{folder} is not a folder; expected one with adapter_config.json and "
                    "adapter_model.safetensors, as PEFT saves an adapter"
                )
        dtype = self.base["wte"].dtype
        config: Any = self.config
        parts = [load_adapter(f, config, dtype=dtype, base=self.base) for f in folders]
        lora, lora_config = parts[0] if weights == [1.0] else mix(parts, weights)
        return self.with_adapter(to_device(lora, self.device), lora_config)

    def merged(self) -> Model:
        """A model without an adapter that computes the same: its weights are W + s A B.

        Raises MiniloraError if there is no adapter, or if the base is in float16.
        """
        if self.lora is None or self.lora_config is None:
            raise MiniloraError("there is no adapter to merge")
        if isinstance(self.base["wte"], Half):
            raise MiniloraError("a base in float16 is frozen; merge it before it goes to the GPU")
        merged = lora_math.merge(self.base, self.lora, self.lora_config)
        return replace(self, base=merged, lora=None, lora_config=None)

    def on(self, device: str, *, half: bool = False) -> Model:
        """The same model with its arrays on a device, "cpu" or "cuda".

        With `half`, which needs a GPU, the base's matrices become float16 and stay frozen. Raises
        MiniloraError for a device that cannot be used.
        """
        base = to_device_in_half(self.base, device) if half else self.base
        return super(Model, replace(self, base=base)).on(device)

    def generate(self, prompt: str, **options: Any) -> str:
        """The text that continues a prompt; options and errors are those of `complete`."""
        return self.tokenizer.decode(complete(self, prompt, **options))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """The logits of every next token: ids (B, T) -> (B, T, V), both on the host."""
        return np.asarray(to_host(net_logits(self, tokens=to_device(tokens, self.device))))


def load_model(
    base: str | Path | None = None, adapter: str | Path | None = None, *, dtype: Any = np.float32
) -> Model:
    """The base in a folder (None: the one that comes with minilora), with an adapter if given.

    The base is in Hugging Face's GPT-2 layout, the adapter in PEFT's; arrays become `dtype`. A
    string `owner/model` that is not a folder names a model on the hub. Raises MiniloraError for
    files that are missing, damaged, or do not belong together, and for a model that cannot be
    downloaded.
    """
    from minilora.formats import load_base
    from minilora.formats.base import CONFIG
    from minilora.formats.hub import check_folder, fetch_base, is_hub_id
    from minilora.formats.output import steady

    hub_id = str(base) if base is not None and is_hub_id(base) else None
    folder = fetch_base(hub_id) if hub_id else check_folder(BUILT_IN if base is None else base)
    with steady(folder, CONFIG):
        weights, config = load_base(folder, dtype=dtype)
        tokenizer = load_tokenizer(folder, config.vocab_size)
    model = Model(weights, config, tokenizer=tokenizer, folder=folder, hub_id=hub_id)
    return model if adapter is None else model.with_adapters_from(adapter)


def evaluate(
    model: Model, sources: Source | Sequence[Source], *, threads: int = 0, device: str = "cpu"
) -> Evaluation:
    """The loss on all the text of the sources (see `texts.read_documents`).

    Consecutive windows of the base's whole context, of 1,024 tokens at most, so that every token
    but the first is predicted exactly once. `threads` 0: one for each core. Raises MiniloraError as
    `read_documents` and `evaluate_tokens` do.
    """
    text = load_text(sources, model.tokenizer)
    return evaluate_tokens(
        model, text.tokens, text_bytes=text.bytes, threads=threads, device=device
    )


def complete(
    model: Model,
    prompt: str | np.ndarray,
    *,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """The token ids that continue a prompt, as they are drawn; options and errors as `generate`'s.

    The prompt is a text, or its token ids. Stops before `max_tokens` at an end-of-text token, if
    the base's files name one; rows of the base that are no tokens are never drawn.
    `model.tokenizer.stream` decodes ids as they come, `model.tokenizer.decode` all at once.
    """
    drawn = generate(
        model,
        prompt_ids=model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        known=model.tokenizer.known,
    )
    return itertools.takewhile(lambda token: token not in model.tokenizer.ends, drawn)
