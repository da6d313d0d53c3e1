"""Bytes by formula, compared with what the caches really hold and tracemalloc sees of a step."""

import dataclasses

import numpy as np
import pytest
from helpers import peak_of
from hypothesis import given
from hypothesis import strategies as st

from minilora.adapters import TARGETS, LoRAConfig, dropout_masks, lora_init
from minilora.bench.budget import SHAPES, Step, figures_of, ledger, peaks
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.keep import Plan
from minilora.llama import LlamaConfig, llama_init
from minilora.loss import frozen_head_loss_forward, head_loss_forward
from minilora.network import Net, loss_and_grads, trunk_forward
from minilora.optim import adamw, adamw_init, clip_by_global_norm
from minilora.training.loop import batch_loss_and_grads
from minilora.tree import flatten
from minilora.workers import Workers

configs = st.builds(
    lambda head, heads, layers: GPTConfig(11, 9, n_embd=head * heads, n_layer=layers, n_head=heads),
    st.integers(1, 3),
    st.integers(2, 3),
    st.integers(1, 3),
)
llama_configs = st.builds(
    lambda width, layers, groups, shared, half: LlamaConfig(
        11, width, 7, layers, groups * shared, groups, 9, rms_norm_eps=0.1, head_dim=2 * half
    ),
    st.integers(2, 6),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 2),
)


def lora_configs(*targets):
    return st.builds(
        lambda rank, targets, dropout: LoRAConfig(rank, targets=tuple(targets), dropout=dropout),
        st.integers(1, 2),
        st.lists(st.sampled_from([*targets, "1?0.attn.q", "0.mlp.*"]), min_size=1, unique=True),
        st.sampled_from([0.0, 0.5]),
    )


def inputs_of(step, *, seed=0):
    """What `loss_and_grads` takes for a step: the net and, by name, all else."""
    rng = np.random.default_rng(seed)
    init = gpt_init if isinstance(step.config, GPTConfig) else llama_init
    base = init(step.config, seed=0, dtype=step.dtype)
    if not step.tied:
        base["head"] = base["wte"].copy()
    lora = None if step.trains_base else lora_init(base, step.lora_config, seed=0)
    shape = (step.batch, step.context)
    tokens, targets = rng.integers(step.config.vocab_size, size=(2, *shape))
    masks = lora and dropout_masks(lora, step.lora_config, rng=rng, shape=shape)
    plan = Plan(base=step.trains_base, lora=not step.trains_base, recompute=step.recompute)
    net = Net(base, step.config, lora, step.lora_config)
    return net, {"tokens": tokens, "targets": targets, "plan": plan, "masks": masks}


def arrays_in(cache):
    """Every array of floating-point numbers that a cache holds, or holds a view of."""
    if isinstance(cache, np.ndarray):
        while isinstance(cache.base, np.ndarray):
            cache = cache.base
        return [cache] if cache.dtype.kind == "f" else []
    if isinstance(cache, dict):
        cache = list(cache.values())
    if not isinstance(cache, (tuple, list)):
        return []
    return [array for part in cache for array in arrays_in(part)]


def numbers_in(cache, *, net):
    """How many numbers caches hold, each array counted once and parameters not at all."""
    owned = {id(a): a.size for a in arrays_in(cache)}
    for parameter in flatten({"base": net.base, "lora": net.lora or {}}).values():
        owned.pop(id(parameter), None)
    return sum(owned.values())


def caches_of(step):
    """The caches of the net below its head, and of the head with the loss."""
    net, options = inputs_of(step)
    targets = options.pop("targets")
    x, trunk = trunk_forward(net, **options)
    if step.trains_base:
        return trunk, head_loss_forward(x, net.head, targets=targets)[1]
    return trunk, frozen_head_loss_forward(x, table=net.head, targets=targets)[1]


def steps_of(configs, *targets):
    return st.builds(
        Step,
        configs,
        st.none() | lora_configs(*targets),
        batch=st.integers(1, 3),
        context=st.integers(1, 9),
        dtype=st.sampled_from(["float32", "float64"]),
        tied=st.booleans(),
    )


steps = steps_of(configs, *TARGETS) | steps_of(llama_configs, *TARGETS, "gate")


@given(steps)
def test_the_ledger_is_what_the_caches_hold(step):
    trunk, head = caches_of(step)
    lines = ledger(step)

    def in_ledger(place, *pairs):
        return sum(e.numbers for e in lines if e.place == place and e.pair in pairs)

    def linear_in_ledger(place, name, *targets):
        adapters = (f"{pair} {target}" for pair in ("LoRA", "dropout") for target in targets)
        return in_ledger(place, f"linear {name}", *adapters)

    def norms_in_ledger(place):
        """Those before and after the attention; without one there is only the second."""
        norm = step.parts.norm.pair
        pairs = [entry.pair for entry in lines if entry.place == place]
        middle = pairs.index("attention") if "attention" in pairs else 0
        size = in_ledger(place, norm) // max(pairs.count(norm), 1)
        return (norm in pairs[:middle]) * size, (norm in pairs[middle:]) * size

    def held_by(*caches):
        return numbers_in(caches, net=trunk.net)

    def held_by_parts(block, *names):
        return held_by(*(block.get(name) for name in names))

    for i, block in enumerate(trunk.blocks):
        place = f"blocks.{i}"
        if block is None:
            assert not any(entry.place == place for entry in lines)
            continue
        ln_1, ln_2 = norms_in_ledger(place)
        qkv = linear_in_ledger(place, "qkv", "qkv", "q", "k", "v")
        o, gate, up, down = (linear_in_ledger(place, m, m) for m in ("o", "gate", "up", "down"))
        activation = in_ledger(place, "GELU", "SwiGLU")
        assert held_by_parts(block, "ln_1", "qkv") == ln_1 + qkv, place
        assert held_by_parts(block, "attention") == in_ledger(place, "attention"), place
        assert held_by_parts(block, "o") == o, place
        assert held_by_parts(block, "ln_2", "gate", "up") == ln_2 + gate + up, place
        assert held_by_parts(block, "gelu", "swiglu", "down") == activation + down, place
    blocks = [block for block in trunk.blocks if block is not None]
    assert held_by(*(block.get("rotary") for block in blocks)) == in_ledger("positions", "rotary")
    assert held_by(head) == in_ledger("head", "head and loss")
    assert held_by(trunk, head) == sum(e.numbers for e in lines)


@given(steps)
def test_recomputing_keeps_the_input_of_each_block(step):
    step = dataclasses.replace(step, recompute=True)
    trunk, head = caches_of(step)
    assert numbers_in([trunk, head], net=trunk.net) == sum(e.numbers for e in ledger(step))


# --- what tracemalloc sees -----------------------------------------------------------------------

QKV = LoRAConfig(rank=8, targets=("qkv",))
EVERYWHERE = LoRAConfig(rank=2, targets=("qkv", "o", "mlp.*"))
UPPER_HALF = LoRAConfig(rank=4, targets=("blocks.[1-9].attn.[qv]", "blocks.[1-9].mlp.down"))
DROPPED = LoRAConfig(rank=8, dropout=0.1)
DROPPED_EVERYWHERE = dataclasses.replace(EVERYWHERE, dropout=0.1)
FAST = GPTConfig(256, 128, n_embd=96, n_layer=3, n_head=3)
# Wide enough for arrays to outweigh Python's objects; name: (config, batch, context, dtype)
FAST_SHAPES = {
    "short sequences": (FAST, 16, 32, "float32"),
    "long sequences": (FAST, 2, 128, "float64"),
    "large vocabulary": (GPTConfig(8192, 64, n_embd=64, n_layer=2, n_head=2), 4, 64, "float32"),
    "llama": (LlamaConfig(256, 96, 256, 3, 6, 6, 128, rms_norm_eps=1e-5), 16, 32, "float32"),
    "llama, groups of 3": (
        LlamaConfig(256, 96, 256, 3, 6, 2, 128, rms_norm_eps=1e-5), 2, 128, "float64"
    ),
    "llama, one group of wide heads": (
        LlamaConfig(2048, 96, 160, 2, 4, 1, 64, rms_norm_eps=1e-5, head_dim=48), 6, 64, "float32"
    ),
}  # fmt: skip
SLOW_SHAPES = {
    f"{name}, {batch} × {context}, {dtype}": (SHAPES[name], batch, context, dtype)
    for name in ("tiny", "small")
    for batch, context, dtype in (
        (8, 128, "float32"),
        (1, 1024, "float32"),
        (4, 64, "float64"),
    )
}
METHODS = {
    "full": None, "LoRA on qkv": QKV, "LoRA everywhere": EVERYWHERE,
    "LoRA in the upper blocks": UPPER_HALF, "LoRA with dropout": DROPPED,
    "LoRA everywhere with dropout": DROPPED_EVERYWHERE,
}  # fmt: skip
each_method = pytest.mark.parametrize("method", METHODS)
each_shape = pytest.mark.parametrize(
    "shape",
    [
        *(pytest.param(shape, id=name) for name, shape in FAST_SHAPES.items()),
        *(
            pytest.param(shape, id=name, marks=pytest.mark.slow)
            for name, shape in SLOW_SHAPES.items()
        ),
    ],
)


@each_shape
@each_method
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_the_peak_of_a_pass_is_predicted(method, shape, recompute):
    config, batch, context, dtype = shape
    step = Step(config, METHODS[method], batch, context, dtype, recompute=recompute)
    net, options = inputs_of(step)
    measured = peak_of(lambda: loss_and_grads(net, **options))
    if options["masks"]:  # they are made before the pass, and the ledger counts them
        measured += sum(mask.nbytes for mask in options["masks"].values())
    found = peaks(step)
    del found["the update"]
    predicted = max(found.values())
    assert predicted == pytest.approx(measured, rel=0.02), f"{predicted / measured:.4f}: {found}"


@each_shape
@each_method
def test_the_peak_of_a_whole_step_is_predicted(method, shape):
    """From nothing to the updated parameters, in one thread: weights and moments included."""
    config, batch, context, dtype = shape
    step = Step(config, METHODS[method], batch, context, dtype, threads=1)

    def whole_step():
        net, options = inputs_of(step)
        params = net.base if net.lora is None else net.lora
        state = adamw_init(params)
        with Workers(1) as workers:
            _, grads = batch_loss_and_grads(workers, net, **options)
        grads, _ = clip_by_global_norm(grads, 1.0)
        return adamw(params, grads, state, step=1, lr=1e-3)

    measured = peak_of(whole_step)
    predicted = figures_of(step)["peak_bytes"]
    assert predicted == pytest.approx(measured, rel=0.02), f"{predicted / measured:.4f}"


@each_method
def test_a_shared_batch_is_predicted(method, monkeypatch):
    """Passes one after the other, as one thread makes them of a batch that is large for it."""
    monkeypatch.setattr("minilora.workers.SHARD_TOKENS", 512)
    test_the_peak_of_a_whole_step_is_predicted(method, (FAST, 32, 64, "float32"))
