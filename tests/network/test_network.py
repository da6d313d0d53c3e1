"""The whole model: its gradients, its definition written a second time, dtypes and refusals."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from helpers import CONFIG, a_base, a_batch, a_net, assert_trees_equal, moved, small_tiles
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.adapters import TARGETS, LoRAConfig, dropout_masks, lora_init
from minilora.errors import MiniloraError
from minilora.generate import new_cache, next_logits
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.gradcheck import PAIR_TOLERANCE, TOLERANCE, assert_close
from minilora.keep import Plan
from minilora.network import Net, loss_and_grads, net_logits
from minilora.pairs import PAIRS, check_model, table, tiny_model
from minilora.tree import flatten, map_leaves

BASE, LORA, BOTH = Plan(base=True), Plan(lora=True), Plan(base=True, lora=True)
each_plan = pytest.mark.parametrize("plan", [BASE, LORA, BOTH], ids=["base", "lora", "both"])


def tiny_with(targets, *, dropout=0.0, rank=2):
    """The model of the gradient check with other adapters, and their batch."""
    net, batch = tiny_model()
    lora_config = LoRAConfig(rank=rank, alpha=3.0, targets=targets, dropout=dropout)
    lora = moved(lora_init(net.base, lora_config, seed=0), 0)
    masks = dropout_masks(lora, lora_config, rng=np.random.default_rng(0), shape=(2, 4))
    return replace(net, lora=lora, lora_config=lora_config), batch._replace(masks=masks)


# --- gradients -----------------------------------------------------------------------------------


@each_plan
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_model_s_gradients_agree_with_central_differences(plan, seed):
    assert_close(check_model(*tiny_model(seed=seed), plan, seed=seed, entries=2))


@each_plan
def test_the_model_s_gradients_agree_with_central_differences_in_small_tiles(plan):
    with small_tiles():
        assert_close(check_model(*tiny_model(), plan, entries=2))


@pytest.mark.parametrize("targets", [*((target,) for target in TARGETS), ("1.attn.k",)])
def test_the_gradients_of_an_adapter_on_its_own_agree_with_central_differences(targets):
    assert_close(check_model(*tiny_with(targets), LORA, entries=4))


@pytest.mark.parametrize("plan", [BASE, LORA])
def test_the_gradients_with_an_untied_head_agree_with_central_differences(plan):
    net, batch = tiny_model()
    net = replace(net, base={**net.base, "head": moved(net.base["wte"], 1)})
    checks = check_model(net, batch, plan, entries=4)
    assert_close(checks)
    assert plan.lora or "base.head" in {check.name for check in checks}


def test_a_head_equal_to_the_embedding_shares_its_gradient():
    """Tied or not, the logits are the same, and the tied gradient is the sum of the two."""
    net = a_net()
    untied = replace(net, base={**net.base, "head": net.base["wte"]})
    tied, dtied, _ = loss_and_grads(net, **a_batch(net), plan=BASE)
    loss, apart, _ = loss_and_grads(untied, **a_batch(net), plan=BASE)
    assert loss == tied
    np.testing.assert_allclose(apart["wte"] + apart["head"], dtied["wte"], rtol=1e-12, atol=1e-15)


def test_the_table_of_the_gradient_check():
    rows = list(table())
    names = [row.name for row in rows]
    models = [
        f"{model}, {what}"
        for model in ("model", "Llama")
        for what in ("base and LoRA", "LoRA factors")
    ]
    assert names == [*PAIRS, *models]
    for row in rows:
        assert row.error < (PAIR_TOLERANCE if row.name in PAIRS else TOLERANCE), row
        assert row.entries > 0
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


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_the_model_is_gpt_2(epsilon):
    """Training, logits and generation alike, and each with the configuration's epsilon."""
    net = a_net(config=replace(CONFIG, layer_norm_epsilon=epsilon))
    batch = a_batch(net)
    tokens = batch["tokens"]
    expected = np.stack([reference_logits(net.base, row, net.config) for row in tokens])
    logits = net_logits(net, tokens=tokens)
    np.testing.assert_allclose(logits, expected, rtol=1e-10)

    cache = new_cache(net, length=5, batch=len(tokens))
    for start, end in [(0, 3), (3, 4), (4, 5)]:
        last = next_logits(net, tokens=tokens[:, start:end], cache=cache, position=start)
        np.testing.assert_allclose(last, expected[:, end - 1], rtol=1e-10)

    p = np.exp(expected) / np.exp(expected).sum(-1, keepdims=True)
    chosen = np.take_along_axis(p, batch["targets"][..., None], axis=-1)
    for plan in (BASE, Plan(base=True, recompute=True), Plan()):
        loss, _, _ = loss_and_grads(net, **batch, plan=plan)
        assert loss == pytest.approx(-np.log(chosen).mean(), rel=1e-12)


def test_logits_do_not_depend_on_what_comes_later_or_stands_in_another_row():
    net = a_net()
    tokens = a_batch(net)["tokens"]
    logits = net_logits(net, tokens=tokens)
    changed = tokens.copy()
    changed[:, 3:] = (tokens[:, 3:] + 1) % CONFIG.vocab_size
    np.testing.assert_array_equal(net_logits(net, tokens=changed)[:, :3], logits[:, :3])
    alone = net_logits(net, tokens=tokens[1:2])[0]
    np.testing.assert_allclose(alone, logits[1], rtol=1e-12)


# --- the loss ------------------------------------------------------------------------------------


@each_plan
def test_two_halves_of_a_batch_add_up_to_the_whole(plan):
    net, (tokens, targets, masks) = tiny_model()
    count = int((targets != -100).sum())
    assert count < targets.size, "no target is ignored"

    def shard(rows, **options):
        return loss_and_grads(
            net,
            tokens=tokens[rows],
            targets=targets[rows],
            masks={path: mask[rows] for path, mask in masks.items()},
            plan=plan,
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
    net = a_net(*TARGETS)
    batch = a_batch(net) | {"targets": np.full((3, 5), -100)}
    for plan in (BOTH, LORA):
        loss, *gradients = loss_and_grads(net, **batch, plan=plan)
        assert loss == 0
        assert not any(g.any() for g in flatten(gradients).values() if g is not None)


def test_ignored_positions_do_not_count():
    net = a_net()
    batch = a_batch(net, B=1)
    ignored = batch | {"targets": np.array([[1, 2, 9, 9, 9]]), "ignore_index": 9}
    short = batch | {"tokens": batch["tokens"][:, :2], "targets": np.array([[1, 2]])}
    loss, dbase, _ = loss_and_grads(net, **ignored, plan=BASE)
    expected, dexpected, _ = loss_and_grads(net, **short, plan=BASE)
    assert loss == pytest.approx(expected, rel=1e-12)
    dexpected = flatten(dexpected)
    for path, leaf in flatten(dbase).items():
        np.testing.assert_allclose(leaf, dexpected[path], atol=1e-13, err_msg=path)


def test_gradient_descent_learns_one_batch():
    net = a_net()
    losses = []
    for _ in range(60):
        loss, dbase, _ = loss_and_grads(net, **a_batch(net), plan=BASE)
        losses.append(float(loss))
        net = replace(net, base=map_leaves(lambda p, g: p - 0.3 * g, net.base, dbase))
    assert losses[-1] < 0.1 * losses[0]


# --- dtypes, purity ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@each_plan
def test_the_dtype_is_kept_everywhere(dtype, plan):
    base = gpt_init(CONFIG, seed=0, dtype=dtype)
    lora_config = LoRAConfig(rank=2, targets=TARGETS, dropout=0.5, rslora=True)
    net = Net(base, CONFIG, lora_init(base, lora_config, seed=0), lora_config)
    batch = a_batch(net)
    loss, *gradients = loss_and_grads(net, **batch, plan=plan)
    logits = net_logits(net, tokens=batch["tokens"])
    everything = {"loss": loss, "logits": logits, **flatten(gradients)}
    wrong = {path: x.dtype for path, x in everything.items() if x is not None and x.dtype != dtype}
    assert not wrong


@pytest.mark.parametrize("targets", [("0.mlp.down",), ("0.mlp.up",), ("0.attn.o",), ("0.attn.v",)])
def test_the_gradient_where_the_lowest_adapter_ends_the_pass_is_right(targets):
    assert_close(check_model(*tiny_with(targets), LORA))


def test_nothing_given_is_written_to():
    net, batch = tiny_model()
    for value in (net.base, net.lora, batch._asdict()):
        map_leaves(lambda x: x.setflags(write=False), value)
    for recompute in (False, True):
        plan = BOTH._replace(recompute=recompute)
        first, second = (loss_and_grads(net, **batch._asdict(), plan=plan) for _ in range(2))
        assert_trees_equal(list(second), list(first))


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
            assert abs(leaf.mean()) < 0.01, path


def test_a_fresh_model_s_weights_have_their_standard_deviation():
    """0.02, and by 1/√(2 n_layer) less where a sublayer feeds the residual stream."""
    config = GPTConfig(vocab_size=160, n_positions=160, n_embd=128, n_layer=3, n_head=4)
    flat = flatten(gpt_init(config, seed=0))
    weights = {path: leaf for path, leaf in flat.items() if leaf.ndim == 2}
    assert len(weights) == 2 + 3 * 4
    for path, leaf in weights.items():
        std = 0.02 / math.sqrt(6) if path.endswith(("o.w", "down.w")) else 0.02
        assert leaf.std() == pytest.approx(std, rel=0.03), path
        assert abs(leaf.mean()) < 0.03 * std, path
    for one, other in itertools.combinations(weights.values(), 2):
        assert not np.array_equal(one[:100, :100], other[:100, :100])


def test_a_fresh_model_s_loss_is_that_of_chance_and_its_seed_decides():
    base, again, other = (gpt_init(CONFIG, seed=seed) for seed in (0, 0, 1))
    net = Net(base, CONFIG)
    loss, _, _ = loss_and_grads(net, **a_batch(net), plan=BASE)
    assert loss == pytest.approx(math.log(CONFIG.vocab_size), rel=0.02)
    assert_trees_equal(again, base)
    assert not np.array_equal(base["wte"], other["wte"])


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
    net = a_net()
    net_logits(net, tokens=np.zeros((1, 6), int))
    with pytest.raises(MiniloraError, match=r"7 tokens .* 6"):
        net_logits(net, tokens=np.zeros((1, 7), int))


def test_adapters_without_their_configuration_are_refused():
    base = a_base()
    lora = lora_init(base, LoRAConfig(rank=2), seed=0)
    with pytest.raises(MiniloraError, match="lora_config"):
        Net(base, CONFIG, lora)


@pytest.mark.parametrize("plan", [LORA, BOTH])
def test_gradients_of_adapters_that_are_not_there_are_refused(plan):
    net = a_net()
    with pytest.raises(MiniloraError, match="adapters"):
        loss_and_grads(net, **a_batch(net), plan=plan)


@pytest.mark.parametrize("token", [-1, -CONFIG.vocab_size, CONFIG.vocab_size, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_named(token):
    net = a_net("q", "embedding")
    batch = a_batch(net)
    batch["tokens"][1, 2] = token
    message = f"token id {token} is outside the base's vocabulary of 11 tokens"
    with pytest.raises(MiniloraError, match=message):
        net_logits(net, tokens=batch["tokens"])
    for plan in (LORA, BOTH):
        with pytest.raises(MiniloraError, match=message):
            loss_and_grads(net, **batch, plan=plan)
    cache = new_cache(net, length=1)
    with pytest.raises(MiniloraError, match=message):
        next_logits(net, tokens=np.array([[token]]), cache=cache, position=0)


@each_plan
@pytest.mark.parametrize(
    ("target", "ignored"), [(-1, -100), (11, -100), (-300, -100), (-100, -1), (-1, 0), (2**31, 5)]
)
def test_a_target_outside_the_vocabulary_is_named(plan, target, ignored):
    net = a_net("q")
    batch = a_batch(net)
    batch["targets"][2, 4] = target
    message = f"target {target} is outside .* 11 tokens and is not ignore_index, {ignored}"
    with pytest.raises(MiniloraError, match=message):
        loss_and_grads(net, **batch, plan=plan, ignore_index=ignored)


@each_plan
@pytest.mark.parametrize("ignored", [-100, -1, 0, 10, 11, 2**40])
def test_the_ignored_target_may_be_any_number(plan, ignored):
    """And counts as little as it would by another name."""
    net = a_net("q")
    batch = a_batch(net)
    batch["targets"][batch["targets"] == ignored] = 5
    is_ignored = np.arange(15).reshape(3, 5) % 3 == 0
    expected, found = (
        loss_and_grads(
            net,
            **batch | {"targets": np.where(is_ignored, number, batch["targets"])},
            plan=plan,
            ignore_index=number,
        )
        for number in (-7, ignored)
    )
    assert found[0] == expected[0]
    for trees in zip(found[1:], expected[1:], strict=True):
        assert trees == (None, None) or assert_trees_equal(*trees) is None


@pytest.mark.parametrize("shape", [(15,), (3, 1), (5, 3), (3, 4)])
def test_targets_of_another_shape_than_the_tokens_are_refused(shape):
    net = a_net()
    batch = a_batch(net) | {"targets": np.zeros(shape, int)}
    with pytest.raises(MiniloraError, match=r"targets are of shape .*, tokens of \(3, 5\)"):
        loss_and_grads(net, **batch, plan=BASE)


@pytest.mark.parametrize("name", ["vocab_size", "n_positions", "n_embd", "n_layer"])
def test_sizes_that_no_machine_can_hold_are_refused(name):
    message = f"{name} 20000000 is too large; the maximum is 16,777,216"
    with pytest.raises(MiniloraError, match=message):
        GPTConfig(**{"n_head": 1, name: 20_000_000})
