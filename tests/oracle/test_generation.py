"""Greedy text against transformers' generate, token by token, with and without an adapter."""

import numpy as np
import pytest

from minilora.adapters import LoRAConfig
from minilora.generate import generate
from minilora.gpt2 import GPTConfig

pytestmark = pytest.mark.oracle

STEPS = 100
CONFIG = GPTConfig(vocab_size=61, n_positions=112, n_embd=24, n_layer=2, n_head=3, n_inner=40)
PROMPT = np.random.default_rng(0).integers(CONFIG.vocab_size, size=7)
ADAPTERS = {
    "base": None,
    "qkv": LoRAConfig(rank=3, alpha=6.0, targets=("qkv",)),
    "q-v": LoRAConfig(rank=2, alpha=2.0, targets=("q", "v"), rslora=True),
    "all": LoRAConfig(rank=2, alpha=4.0, targets=("qkv", "k", "o", "up", "down", "embedding")),
}


def greedy(net) -> list[int]:
    return list(generate(net, prompt_ids=PROMPT, max_tokens=STEPS, temperature=0.0))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", ADAPTERS)
def test_greedy_text_is_transformers_own(twin, make_model, name, dtype):
    import torch

    net = make_model(CONFIG, ADAPTERS[name], seed=0, dtype=dtype, spread=0.6)
    model = twin(net)
    prompt = torch.from_numpy(PROMPT[None])
    text = model.model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=STEPS,
        do_sample=False,
        pad_token_id=0,
    ).numpy()
    expected = text[0, len(PROMPT) :].tolist()
    assert len(expected) == STEPS

    # What the comparison is worth: the text is not one word, and no two tokens come near a tie.
    assert len(set(expected)) >= 10, expected
    top = np.sort(model(text[:, :-1]).detach().numpy()[0, len(PROMPT) - 1 :], axis=-1)
    margin = (top[:, -1] - top[:, -2]).min()
    assert margin > 1e-3, f"a near tie, {margin:.1e}: choose another seed"

    ours = greedy(net)
    first = next((i for i, (a, b) in enumerate(zip(ours, expected, strict=True)) if a != b), None)
    assert first is None, f"step {first}: {ours[first]} here, {expected[first]} there"


def test_the_adapters_change_the_text(make_model):
    """Otherwise the cases above would compare the base with itself."""
    texts = [
        greedy(make_model(CONFIG, lora_config, seed=0, dtype=np.float64, spread=0.6))
        for lora_config in ADAPTERS.values()
    ]
    assert len({tuple(text) for text in texts}) == len(ADAPTERS)
