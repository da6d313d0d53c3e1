"""Generation on a device is that on the host."""

import numpy as np

from minilora.adapters import LoRAConfig, lora_init
from minilora.backend import namespace, to_host
from minilora.generate import generate, new_cache, next_logits
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.network import Net
from minilora.tree import map_leaves

CONFIG = GPTConfig(vocab_size=23, n_positions=16, n_embd=12, n_layer=2, n_head=3)
LORA_CONFIG = LoRAConfig(rank=2, targets=("qkv", "q", "o", "up", "down", "embedding"))


def net_on(place):
    """A base and an adapter of random numbers."""
    base = gpt_init(CONFIG, seed=0, dtype=np.float64)
    rng = np.random.default_rng(0)
    trees = [base, lora_init(base, LORA_CONFIG, seed=1)]
    base, lora = map_leaves(lambda x: 0.4 * rng.standard_normal(x.shape), trees)
    return Net(base, CONFIG, lora, LORA_CONFIG).on(place)


def test_the_logits_are_those_of_the_host(device):
    tokens = np.array([[3, 1, 4], [1, 5, 9]])
    logits = []
    for place in ("cpu", device):
        net = net_on(place)
        cache = new_cache(net, length=4, batch=2)
        next_logits(net, tokens=tokens, cache=cache, position=0)
        last = next_logits(net, tokens=tokens[:, :1], cache=cache, position=3)
        assert (namespace(last) is np) == (place == "cpu")
        logits.append(to_host(last))
    np.testing.assert_allclose(*logits, rtol=1e-10, atol=1e-10)


def test_the_text_is_that_of_the_host(device):
    """Past the end of the context, too."""

    def text(place, **options):
        prompt = {"prompt_ids": [3, 1, 4], "max_tokens": 20, "seed": 1}
        return list(generate(net_on(place), **prompt, **options))

    for options in ({"top_p": 0.9}, {"temperature": 0.0}, {"top_k": 5, "temperature": 1.5}):
        assert text(device, **options) == text("cpu", **options), options


def test_a_token_is_read_in_one_copy(device, copied):
    net = net_on(device)
    before = copied()
    assert len(list(generate(net, prompt_ids=[3, 1], max_tokens=6))) == 6
    assert copied().to_host - before.to_host == 6
    assert copied().to_device - before.to_device == 6
