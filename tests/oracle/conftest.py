"""The bridge to the oracle: our trees as a PyTorch model of transformers and PEFT, and back.

Everything happens in memory and nothing of `minilora.formats` is used, so that the formats and this
bridge cannot be wrong together. PEFT has one adapter for GPT-2's fused c_attn. Where adapters sit
on q, k or v, or several share one weight, they become one of the summed rank there:

    A = [A_q A_v],   B = [[s_q B_q 0 0], [0 0 s_v B_v]]     with PEFT's own scale at 1

and a gradient of such a B, taken at its block and multiplied by its s, is that of ours.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest

from minilora.adapters import LoRAConfig, adapters, lora_init
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.network import Net
from minilora.tree import Tree, flatten, map_leaves

TORCH_WORDS = {
    "blocks": "h",
    "qkv": "c_attn",
    "q": "c_attn",
    "k": "c_attn",
    "v": "c_attn",
    "o": "c_proj",
    "up": "c_fc",
    "down": "c_proj",
    "embedding": "wte",
    "wte": "wte.weight",
    "wpe": "wpe.weight",
    "w": "weight",
    "b": "bias",
}


def torch_name(path: str) -> str:
    """GPT2LMHeadModel's name of the parameter at a base path, or of the module at a LoRA path."""
    if path == "head":
        return "lm_head.weight"
    return ".".join(["transformer", *(TORCH_WORDS.get(word, word) for word in path.split("."))])


def columns_of(path: str, width: int) -> slice:
    """The outputs of its module that the adapter at a LoRA path acts on: c_attn's are q, k, v."""
    name = path.rpartition(".")[2]
    start = {"q": 0, "k": width, "v": 2 * width}.get(name)
    return slice(None) if start is None else slice(start, start + width)


class Part(NamedTuple):
    """Where one of our adapters lies in PEFT's: its columns of the output, its ranks, its s."""

    path: str
    columns: slice
    ranks: slice
    scale: float


class Twin:
    """Our base and adapters as PyTorch's model: same numbers, same dtype, gradients by autograd.

    `base` holds its parameters by our paths, `adapters` PEFT's A and B and the parts of each.
    """

    def __init__(self, net: Net) -> None:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        base, config = net.base, net.config
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        no_tokens = {"bos_token_id": None, "eos_token_id": None}
        model = GPT2LMHeadModel(
            GPT2Config(
                **vars(config),
                **no_dropout,
                **no_tokens,
                tie_word_embeddings="head" not in base,
                attn_implementation="eager",
            )
        )
        model.to(torch.from_numpy(base["wte"]).dtype)
        self.base = {path: model.get_parameter(torch_name(path)) for path in flatten(base)}
        unset = {name for name, _ in model.named_parameters()} - {*map(torch_name, self.base)}
        assert not unset, f"our tree has no {sorted(unset)}"
        for path, leaf in flatten(base).items():
            self.base[path].data = torch.from_numpy(leaf.copy())
        tied = model.lm_head.weight is self.base["wte"]
        assert tied == ("head" not in base), "the head is not tied as in our tree"

        self.adapters: list[tuple[Any, Any, list[Part]]] = []
        self.model: Any = model
        self.width = config.n_embd
        if net.lora is not None:
            self.add_adapter(net.lora, net.lora_config)
        for parameter in self.model.parameters():
            parameter.requires_grad = True

    def add_adapter(self, lora: Tree, lora_config: LoRAConfig, name: str = "default") -> None:
        """Wrap the model in PEFT's with these adapters, or add them under a second name."""
        import torch
        from peft import LoraConfig, get_peft_model

        ours = adapters(lora)
        by_module: dict[str, list[str]] = {}
        for path in ours:
            by_module.setdefault(torch_name(path), []).append(path)

        ranks, alphas, parts = {}, {}, {}
        for module, paths in by_module.items():
            alone = len(paths) == 1 and columns_of(paths[0], self.width) == slice(None)
            if alone:
                ranks[module] = lora_config.rank_of(paths[0])
                alphas[module] = lora_config.alpha_of(paths[0])
            else:
                ranks[module] = sum(map(lora_config.rank_of, paths))
                alphas[module] = float(ranks[module])
                if lora_config.rslora:
                    alphas[module] = math.sqrt(ranks[module])
            start, parts[module] = 0, []
            for path in paths:
                rank = lora_config.rank_of(path)
                stop = start + rank
                divisor = math.sqrt(rank) if lora_config.rslora else rank
                scale = 1.0 if alone else lora_config.alpha_of(path) / divisor
                columns = columns_of(path, self.width)
                parts[module].append(Part(path, columns, slice(start, stop), scale))
                start = stop

        peft_config = LoraConfig(
            target_modules=list(ranks),
            rank_pattern=ranks,
            alpha_pattern=alphas,
            use_rslora=lora_config.rslora,
            lora_dropout=0.0,
            fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():  # PEFT uses what transformers deprecates, and warns of ties
            warnings.simplefilter("ignore")
            if name == "default":
                self.model = get_peft_model(self.model, peft_config)
            else:
                self.model.add_adapter(name, peft_config)
        for module in ranks:
            layer = self.model.get_submodule(f"base_model.model.{module}")
            if module == "transformer.wte":
                A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
            else:
                A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            A.data.zero_()
            B.data.zero_()
            for path, columns, rows, scale in parts[module]:
                A.data[rows] = torch.from_numpy(ours[path]["A"].T.copy())
                B.data[columns, rows] = torch.from_numpy(scale * ours[path]["B"].T)
            self.adapters.append((A, B, parts[module]))

    def __call__(self, tokens: np.ndarray, attended: np.ndarray | None = None) -> Any:
        """Logits (B, T, V) as a torch tensor; `attended` is False where a row is padded."""
        import torch

        mask = None if attended is None else torch.from_numpy(attended.astype(np.int64))
        return self.model(input_ids=torch.from_numpy(tokens), attention_mask=mask).logits

    def gradients(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The gradients of the base and of the adapters after a backward pass, by our paths."""
        dbase = {path: parameter.grad.numpy() for path, parameter in self.base.items()}
        dlora = {}
        for A, B, parts in self.adapters:
            for path, columns, ranks, scale in parts:
                dlora[f"{path}.A"] = A.grad.numpy()[ranks].T
                dlora[f"{path}.B"] = scale * B.grad.numpy()[columns, ranks].T
        return dbase, dlora

    def merged(self) -> dict[str, np.ndarray]:
        """The base's weights by our paths after PEFT's merge_and_unload, which ends this model."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = self.model.merge_and_unload()
        return {path: model.get_parameter(torch_name(path)).detach().numpy() for path in self.base}


@pytest.fixture(scope="session")
def twin() -> type[Twin]:
    """`Twin`, where the oracle is installed."""
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    return Twin


def random_model(
    config: GPTConfig,
    lora_config: LoRAConfig | None,
    *,
    seed: int,
    dtype: Any,
    spread: float = 0.2,
    tied: bool = True,
) -> Net:
    """A base and adapters of which no entry is zero, one or as it was drawn."""
    rng = np.random.default_rng(seed)

    def move(x: np.ndarray) -> np.ndarray:
        return (x + spread * rng.standard_normal(x.shape)).astype(dtype)

    base = map_leaves(move, gpt_init(config, seed=seed, dtype=np.float64))
    if not tied:
        base["head"] = move(np.zeros_like(base["wte"]))
    if lora_config is None:
        return Net(base, config)
    lora = map_leaves(move, lora_init(base, lora_config, seed=seed))
    return Net(base, config, lora, lora_config)


@pytest.fixture(scope="session")
def make_model() -> Any:
    """`random_model`, for test files of this folder."""
    return random_model


class Worst(NamedTuple):
    """The entry that differs most, relative to the largest entry of its tensor."""

    error: float
    path: str
    entry: tuple[int, ...]
    ours: float
    theirs: float


def worst_entry(ours: Tree, theirs: dict[str, np.ndarray]) -> Worst:
    """Where a tree of ours and the oracle's arrays at the same paths differ most.

    The scale of a tensor is its largest entry in the oracle; one that is all zero must be so here.
    """
    flat = flatten(ours)
    assert set(flat) == set(theirs), set(flat) ^ set(theirs)
    found = [Worst(0.0, "", (), 0.0, 0.0)]
    for path, expected in theirs.items():
        actual = flat[path]
        assert actual.shape == expected.shape, path
        assert actual.dtype == expected.dtype, path
        scale = np.abs(expected).max() or np.finfo(expected.dtype).tiny
        error = np.nan_to_num(np.abs(actual - expected) / scale, nan=np.inf)
        entry = np.unravel_index(error.argmax(), error.shape)
        found.append(
            Worst(
                float(error[entry]),
                path,
                tuple(map(int, entry)),
                float(actual[entry]),
                float(expected[entry]),
            )
        )
    return max(found)


@pytest.fixture(scope="session")
def worst() -> Any:
    """`worst_entry`, for test files of this folder."""
    return worst_entry
