"""Generation on a GPU is that on the CPU."""

import numpy as np
import pytest

from minilora.backend import load_cupy, to_device, to_host
from minilora.generate import generate, new_cache, next_logits
from minilora.gpt import GPTConfig, gpt_init
from minilora.lora import LoRAConfig, lora_init
from minilora.tree import map_leaves

pytestmark = pytest.mark.gpu

CONFIG = GPTConfig(vocab_size=23, n_positions=16, n_embd=12, n_layer=2, n_head=3)
LORA_CONFIG = LoRAConfig(rank=2, targets=("qkv", "q", "o", "up", "down", "embedding"))


def random_trees():
    base = gpt_init(CONFIG, seed=0, dtype=np.float64)
    rng = np.random.default_rng(0)
    trees = [base, lora_init(base, LORA_CONFIG, seed=1)]
    return map_leaves(lambda x: 0.4 * rng.standard_normal(x.shape), trees)


def test_logits_and_text_are_those_of_the_cpu():
    load_cupy()
    host = random_trees()
    device = to_device(host, "cuda")
    tokens = np.array([[3, 1, 4], [1, 5, 9]])
    logits = []
    for base, lora in (host, device):
        options = {"config": CONFIG, "lora_config": LORA_CONFIG}
        cache = new_cache(base, CONFIG, length=4, batch=2)
        next_logits(base, lora, tokens=tokens, cache=cache, position=0, **options)
        last = next_logits(base, lora, tokens=tokens[:, :1], cache=cache, position=3, **options)
        logits.append(to_host(last))
    np.testing.assert_allclose(*logits, rtol=1e-10, atol=1e-10)

    texts = [
        list(
            generate(
                base,
                lora,
                prompt_ids=[3, 1, 4],
                config=CONFIG,
                lora_config=LORA_CONFIG,
                max_tokens=20,
                top_p=0.9,
            )
        )
        for base, lora in (host, device)
    ]
    assert texts[0] == texts[1]
