"""Bytes by formula, against what the caches really hold and what tracemalloc sees of a step."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minilora.budget import Step, ledger
from minilora.gpt import GPTConfig, gpt_forward, gpt_init
from minilora.lora import TARGETS, LoRAConfig, dropout_masks, lora_init
from minilora.tree import flatten

configs = st.builds(
    lambda head, heads, layers: GPTConfig(11, 9, n_embd=head * heads, n_layer=layers, n_head=heads),
    st.integers(1, 3),
    st.integers(2, 3),
    st.integers(1, 3),
)
lora_configs = st.builds(
    lambda rank, targets, dropout: LoRAConfig(rank=rank, targets=tuple(targets), dropout=dropout),
    st.integers(1, 2),
    st.lists(st.sampled_from([*TARGETS, "1?0.attn.q", "0.mlp.*"]), min_size=1, unique=True),
    st.sampled_from([0.0, 0.5]),
)


def inputs_of(step, *, seed=0):
    """What `loss_and_grads` takes for a step."""
    rng = np.random.default_rng(seed)
    base = gpt_init(step.config, seed=0, dtype=step.dtype)
    lora = None if step.trains_base else lora_init(base, step.lora_config, seed=0)
    tokens, targets = rng.integers(step.config.vocab_size, size=(2, step.batch, step.context))
    masks = None
    if lora is not None:
        shape = (step.batch, step.context)
        masks = dropout_masks(lora, step.lora_config, rng=rng, shape=shape)
    return base, lora, tokens, targets, masks


def arrays_in(cache):
    """Every array of floating-point numbers that a cache holds, or holds a view of."""
    if isinstance(cache, np.ndarray):
        while isinstance(cache.base, np.ndarray):
            cache = cache.base
        return [cache] if cache.dtype.kind == "f" else []
    parts = cache.values() if isinstance(cache, dict) else cache
    return (
        [a for part in parts for a in arrays_in(part)]
        if isinstance(parts, (tuple, list, type({}.values())))
        else []
    )


def numbers_in(cache, *, parameters):
    """How many numbers they hold, each array counted once and parameters left out."""
    owned = {id(a): a.size for a in arrays_in(cache)}
    for parameter in flatten(parameters).values():
        owned.pop(id(parameter), None)
    return sum(owned.values())


@given(configs, st.none() | lora_configs, st.integers(1, 3), st.integers(1, 9))
def test_the_ledger_is_what_the_caches_hold(config, lora_config, batch, context):
    step = Step(config, lora_config, batch, context)
    base, lora, tokens, _, masks = inputs_of(step)
    _, cache = gpt_forward(
        base, lora, tokens=tokens, config=config, lora_config=lora_config, masks=masks,
        frozen=not step.trains_base,
    )  # fmt: skip
    parameters = {"base": base, "lora": lora or {}}
    lines = [entry for entry in ledger(step) if entry.pair != "cross-entropy"]

    def in_ledger(place, *pairs):
        return sum(e.numbers for e in lines if e.place == place and e.pair in pairs)

    for i, block in enumerate(cache.blocks):
        place = f"blocks.{i}"
        if block is None:
            assert not any(entry.place == place for entry in lines)
            continue
        held = {
            part: numbers_in(part_cache, parameters=parameters)
            for part, part_cache in block._asdict().items()
        }
        expected = {
            "ln_1": in_ledger(place, "layer norm") // 2,
            "qkv": in_ledger(place, "linear qkv", *(f"LoRA {t}" for t in ("qkv", "q", "k", "v"))),
            "attention": in_ledger(place, "attention"),
            "o": in_ledger(place, "linear o", "LoRA o"),
            "ln_2": in_ledger(place, "layer norm") // 2,
            "up": in_ledger(place, "linear up", "LoRA up"),
            "gelu": in_ledger(place, "GELU"),
            "down": in_ledger(place, "linear down", "LoRA down"),
        }
        assert held == expected, place
    assert numbers_in(cache, parameters=parameters) == sum(entry.numbers for entry in lines)
