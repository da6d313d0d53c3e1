"""The whole model: its gradients, its definition written a second time, dtypes and refusals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.errors import MiniloraError
from minilora.gpt import (
    GPTConfig,
    gpt_backward,
    gpt_forward,
    gpt_init,
    gpt_logits,
    loss_and_grads,
)
from minilora.gradcheck import assert_close
from minilora.lora import TARGETS, LoRAConfig, dropout_masks, lora_init
from minilora.pairs import check_model, table, tiny_model
from minilora.tree import flatten, map_leaves

CONFIG = GPTConfig(vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2, n_inner=12)


def moved(tree, seed):
    rng = np.random.default_rng(seed)
    return map_leaves(lambda x: x + 0.3 * rng.standard_normal(x.shape), tree)


def a_base(config=CONFIG):
    return moved(gpt_init(config, seed=0, dtype=np.float64), 0)


def a_batch(B=3, T=5, config=CONFIG):
    tokens, targets = np.random.default_rng(2).integers(config.vocab_size, size=(2, B, T))
    return {"tokens": tokens, "targets": targets, "config": config}


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrt", ["base", "lora", "both"])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_model_s_gradients_agree_with_central_differences(wrt, seed):
    assert_close(check_model(tiny_model(seed=seed), wrt=wrt, seed=seed, entries=2), 1e-6)


@pytest.mark.parametrize("targets", [*((target,) for target in TARGETS), ("1.attn.k",)])
def test_so_do_those_of_an_adapter_on_its_own(targets):
    model = tiny_model()
    lora_config = LoRAConfig(rank=2, alpha=3.0, targets=targets)
    lora = moved(lora_init(model.base, lora_config, seed=0), 0)
    model = model._replace(lora=lora, lora_config=lora_config, masks=None)
    assert_close(check_model(model, wrt="lora", entries=4), 1e-6)


@pytest.mark.parametrize("wrt", ["base", "lora"])
def test_so_do_those_of_a_model_whose_head_is_a_table_of_its_own(wrt):
    model = tiny_model()
    head = moved(model.base["wte"], 1)
    model = model._replace(base={**model.base, "head": head})
    checks = check_model(model, wrt=wrt, entries=4)
    assert_close(checks, 1e-6)
    assert wrt == "lora" or "base.head" in {check.name for check in checks}


def test_a_head_equal_to_the_embedding_shares_its_gradient():
    """Tied or not, the logits are the same, and the tied gradient is the sum of the two."""
    base, batch = a_base(), a_batch()
    tied, dtied, _ = loss_and_grads(base, wrt="base", **batch)
    loss, apart, _ = loss_and_grads({**base, "head": base["wte"]}, wrt="base", **batch)
    assert loss == tied
    np.testing.assert_allclose(apart["wte"] + apart["head"], dtied["wte"], rtol=1e-12, atol=1e-15)


def test_the_gradient_of_the_logits():
    base, batch = a_base(), a_batch()
    logits, cache = gpt_forward(base, tokens=batch["tokens"], config=CONFIG)
    dlogits = np.random.default_rng(1).standard_normal(logits.shape)
    dbase, dlora = gpt_backward(dlogits, cache)
    assert dlora == {"blocks": [{}, {}]}

    direction = map_leaves(np.random.default_rng(3).standard_normal, map_leaves(np.shape, base))
    h = 1e-6
    there, back = (
        gpt_logits(
            map_leaves(lambda x, v, t=t: x + t * v, base, direction),
            tokens=batch["tokens"],
            config=CONFIG,
        )
        for t in (h, -h)
    )
    numeric = np.sum(dlogits * (there - back)) / (2 * h)
    grads, along = flatten(dbase), flatten(direction)
    analytic = sum(np.sum(grads[path] * along[path]) for path in along)
    assert analytic == pytest.approx(numeric, rel=1e-6)


def test_the_table_of_the_gradient_check():
    rows = list(table())
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert [name for name in names if name.startswith("model")] == [
        "model, base and LoRA",
        "model, LoRA factors",
    ]
    for row in rows:
        assert row.error < 1e-6, row
        assert row.entries > 10
        assert row.seconds > 0


# --- the definition ------------------------------------------------------------------------------


def reference_logits(base, tokens, config):
    """GPT-2 for one sequence, position by position, with nothing taken from the package."""

    def layer_norm(x, w, b):
        return w * (x - x.mean()) / math.sqrt(x.var() + config.layer_norm_epsilon) + b

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    C, K = config.n_embd, config.n_embd // config.n_head
    xs = [base["wte"][token] + base["wpe"][t] for t, token in enumerate(tokens)]
    for block in base["blocks"]:
        attn, mlp = block["attn"], block["mlp"]
        qkv = [layer_norm(x, **block["ln_1"]) @ attn["qkv"]["w"] + attn["qkv"]["b"] for x in xs]
        for t in range(len(xs)):
            heads = []
            for h in range(config.n_head):
                part = slice(h * K, (h + 1) * K)
                q = qkv[t][:C][part]
                scores = np.array([q @ past[C : 2 * C][part] for past in qkv[: t + 1]])
                weights = np.exp(scores / math.sqrt(K))
                values = np.array([past[2 * C :][part] for past in qkv[: t + 1]])
                heads.append(weights @ values / weights.sum())
            xs[t] = xs[t] + np.concatenate(heads) @ attn["o"]["w"] + attn["o"]["b"]
        for t, x in enumerate(xs):
            inner = gelu(layer_norm(x, **block["ln_2"]) @ mlp["up"]["w"] + mlp["up"]["b"])
            xs[t] = x + inner @ mlp["down"]["w"] + mlp["down"]["b"]
    return np.array([base["wte"] @ layer_norm(x, **base["ln_f"]) for x in xs])


def test_the_model_is_gpt_2():
    base, batch = a_base(), a_batch()
    logits = gpt_logits(base, tokens=batch["tokens"], config=CONFIG)
    for row, tokens in zip(logits, batch["tokens"], strict=True):
        np.testing.assert_allclose(row, reference_logits(base, tokens, CONFIG), rtol=1e-10)

    loss, _, _ = loss_and_grads(base, **batch, wrt="base")
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.take_along_axis(p, batch["targets"][..., None], axis=-1)
    assert loss == pytest.approx(-np.log(chosen).mean(), rel=1e-12)


def test_logits_do_not_depend_on_what_comes_later_or_stands_in_another_row():
    base, tokens = a_base(), a_batch()["tokens"]
    logits = gpt_logits(base, tokens=tokens, config=CONFIG)
    changed = tokens.copy()
    changed[:, 3:] = (tokens[:, 3:] + 1) % CONFIG.vocab_size
    np.testing.assert_array_equal(
        gpt_logits(base, tokens=changed, config=CONFIG)[:, :3], logits[:, :3]
    )
    alone = gpt_logits(base, tokens=tokens[1:2], config=CONFIG)[0]
    np.testing.assert_allclose(alone, logits[1], rtol=1e-12)


def test_forward_and_logits_agree_bit_for_bit():
    base, tokens = a_base(), a_batch()["tokens"]
    logits, _ = gpt_forward(base, tokens=tokens, config=CONFIG)
    assert np.array_equal(gpt_logits(base, tokens=tokens, config=CONFIG), logits)


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrt", ["base", "lora", "both"])
def test_two_halves_of_a_batch_add_up_to_the_whole(wrt):
    model = tiny_model()
    constants = model._asdict()
    masks, tokens, targets = (constants.pop(name) for name in ("masks", "tokens", "targets"))
    count = int((targets != -100).sum())
    assert count < targets.size, "no target is ignored"

    def shard(rows, **options):
        return loss_and_grads(
            **constants,
            tokens=tokens[rows],
            targets=targets[rows],
            masks={path: mask[rows] for path, mask in masks.items()},
            wrt=wrt,
            **options,
        )

    loss, *whole = shard(slice(0, 2))
    (first, *halves_1), (second, *halves_2) = (
        shard(slice(i, i + 1), count=count) for i in range(2)
    )
    assert first + second == pytest.approx(loss, rel=1e-12)
    for gradient, half_1, half_2 in zip(whole, halves_1, halves_2, strict=True):
        if gradient is None:
            assert half_1 is half_2 is None
            continue
        total = flatten(map_leaves(np.add, half_1, half_2))
        for path, leaf in flatten(gradient).items():
            np.testing.assert_allclose(total[path], leaf, rtol=1e-9, atol=1e-13, err_msg=path)


def test_a_batch_without_counted_targets_has_no_loss_and_no_gradient():
    base, batch = a_base(), a_batch()
    batch["targets"] = np.full((3, 5), -100)
    loss, dbase, _ = loss_and_grads(base, **batch, wrt="base")
    assert loss == 0
    assert not any(leaf.any() for leaf in flatten(dbase).values())


def test_ignored_positions_do_not_count():
    base, batch = a_base(), a_batch(B=1)
    ignored = batch | {"targets": np.array([[1, 2, 9, 9, 9]]), "ignore_index": 9}
    short = batch | {"tokens": batch["tokens"][:, :2], "targets": np.array([[1, 2]])}
    loss, dbase, _ = loss_and_grads(base, **ignored, wrt="base")
    expected, dexpected, _ = loss_and_grads(base, **short, wrt="base")
    assert loss == pytest.approx(expected, rel=1e-12)
    dexpected = flatten(dexpected)
    for path, leaf in flatten(dbase).items():
        np.testing.assert_allclose(leaf, dexpected[path], atol=1e-13, err_msg=path)


def test_gradient_descent_learns_one_batch():
    base, batch = a_base(), a_batch()
    losses = []
    for _ in range(60):
        loss, dbase, _ = loss_and_grads(base, **batch, wrt="base")
        losses.append(float(loss))
        base = map_leaves(lambda p, g: p - 0.3 * g, base, dbase)
    assert losses[-1] < 0.1 * losses[0]


# --- dtypes, purity ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("wrt", ["base", "lora", "both"])
def test_the_dtype_is_kept_everywhere(dtype, wrt):
    base = gpt_init(CONFIG, seed=0, dtype=dtype)
    lora_config = LoRAConfig(rank=2, targets=TARGETS, dropout=0.5, rslora=True)
    lora = lora_init(base, lora_config, seed=0)
    masks = dropout_masks(lora, lora_config, rng=np.random.default_rng(0), shape=(3, 5))
    batch = a_batch() | {"lora_config": lora_config, "masks": masks}
    loss, *gradients = loss_and_grads(base, lora, **batch, wrt=wrt)
    logits = gpt_logits(base, lora, tokens=batch["tokens"], config=CONFIG, lora_config=lora_config)
    everything = {"loss": loss, "logits": logits, **flatten(gradients)}
    wrong = {path: x.dtype for path, x in everything.items() if x is not None and x.dtype != dtype}
    assert not wrong


@pytest.mark.parametrize("wrt", ["base", "lora", "both"])
@pytest.mark.parametrize("targets", [TARGETS, ("1.mlp.up",), ("0.attn.q",), ("down",)])
def test_what_is_computed_again_is_the_same_bit_for_bit(wrt, targets):
    model = tiny_model()
    lora_config = LoRAConfig(rank=2, targets=targets, dropout=0.3)
    lora = moved(lora_init(model.base, lora_config, seed=0), 0)
    masks = dropout_masks(lora, lora_config, rng=np.random.default_rng(0), shape=(2, 4))
    model = model._replace(lora=lora, lora_config=lora_config, masks=masks)
    kept = loss_and_grads(**model._asdict(), wrt=wrt)
    again = loss_and_grads(**model._asdict(), wrt=wrt, recompute=True)
    assert kept[0] == again[0]
    for first, second in zip(kept[1:], again[1:], strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            first, second = flatten(first), flatten(second)
            assert first.keys() == second.keys()
            assert all(np.array_equal(first[path], second[path]) for path in first)


@pytest.mark.parametrize("targets", [("0.mlp.down",), ("0.mlp.up",), ("0.attn.o",), ("0.attn.v",)])
def test_the_lowest_adapter_ends_the_backward_pass_and_its_gradient_is_right(targets):
    model = tiny_model()
    lora_config = LoRAConfig(rank=2, alpha=3.0, targets=targets)
    lora = moved(lora_init(model.base, lora_config, seed=0), 0)
    model = model._replace(lora=lora, lora_config=lora_config, masks=None)
    assert_close(check_model(model, wrt="lora"), 1e-6)


def test_nothing_given_is_written_to():
    model = tiny_model()
    for name, value in model._asdict().items():
        if name not in ("config", "lora_config"):
            map_leaves(lambda x: x.setflags(write=False), value)
    results = [flatten(list(loss_and_grads(**model._asdict(), wrt="both"))[1:]) for _ in range(2)]
    assert all(np.array_equal(results[0][path], results[1][path]) for path in results[0])


# --- the fresh model -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_fresh_model(dtype):
    config = GPTConfig(vocab_size=50, n_positions=7, n_embd=32, n_layer=3, n_head=4)
    base = gpt_init(config, seed=0, dtype=dtype)
    flat = flatten(base)
    assert {leaf.dtype for leaf in flat.values()} == {np.dtype(dtype)}
    assert len(base["blocks"]) == 3
    assert [flat[p].shape for p in ("wte", "wpe", "ln_f.w")] == [(50, 32), (7, 32), (32,)]
    block = {path: leaf.shape for path, leaf in flatten(base["blocks"][2]).items()}
    assert block == {
        "ln_1.w": (32,),
        "ln_1.b": (32,),
        "attn.qkv.w": (32, 96),
        "attn.qkv.b": (96,),
        "attn.o.w": (32, 32),
        "attn.o.b": (32,),
        "ln_2.w": (32,),
        "ln_2.b": (32,),
        "mlp.up.w": (32, 128),
        "mlp.up.b": (128,),
        "mlp.down.w": (128, 32),
        "mlp.down.b": (32,),
    }
    for path, leaf in flat.items():
        if path.endswith(".b"):
            assert not leaf.any()
        elif path.split(".")[-2:-1] and path.split(".")[-2].startswith("ln"):
            assert (leaf == 1).all()
        else:
            std = 0.02 / math.sqrt(6) if path.endswith(("o.w", "down.w")) else 0.02
            assert leaf.std() == pytest.approx(std, rel=0.2), path


def test_a_fresh_model_s_loss_is_that_of_chance_and_its_seed_decides():
    base, again, other = (gpt_init(CONFIG, seed=seed) for seed in (0, 0, 1))
    loss, _, _ = loss_and_grads(base, **a_batch(), wrt="base")
    assert loss == pytest.approx(math.log(CONFIG.vocab_size), rel=0.02)
    assert all(np.array_equal(a, b) for a, b in zip(*map(leaves, (base, again)), strict=True))
    assert not np.array_equal(base["wte"], other["wte"])


def leaves(tree):
    return list(flatten(tree).values())


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_embd": 10, "n_head": 4}, "n_embd 10 .* n_head 4"),
        ({"n_layer": 0}, "n_layer 0"),
        ({"vocab_size": -1}, "vocab_size -1"),
    ],
)
def test_sizes_that_make_no_model_are_refused(sizes, message):
    with pytest.raises(MiniloraError, match=message):
        GPTConfig(**sizes)


def test_the_inner_width_defaults_to_four_times_the_width():
    assert GPTConfig().inner == 3072
    assert CONFIG.inner == 12


def test_more_tokens_than_positions_are_refused():
    base = a_base()
    gpt_logits(base, tokens=np.zeros((1, 6), int), config=CONFIG)
    with pytest.raises(MiniloraError, match=r"7 tokens .* 6"):
        gpt_logits(base, tokens=np.zeros((1, 7), int), config=CONFIG)


def test_adapters_without_their_configuration_are_refused():
    base = a_base()
    lora = lora_init(base, LoRAConfig(rank=2), seed=0)
    with pytest.raises(MiniloraError, match="lora_config"):
        gpt_logits(base, lora, tokens=a_batch()["tokens"], config=CONFIG)


@pytest.mark.parametrize("wrt", ["lora", "both"])
def test_gradients_of_adapters_that_are_not_there_are_refused(wrt):
    with pytest.raises(MiniloraError, match=wrt):
        loss_and_grads(a_base(), **a_batch(), wrt=wrt)


@pytest.mark.parametrize("name", ["vocab_size", "n_positions", "n_embd", "n_layer"])
def test_sizes_that_no_machine_can_hold_are_refused(name):
    with pytest.raises(MiniloraError, match=f"{name} 20000000 is above 16,777,216"):
        GPTConfig(**{"n_head": 1, name: 20_000_000})
