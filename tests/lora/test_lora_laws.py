"""The laws of low-rank adaptation, in float64, on a small model with an adapter anywhere."""

import numpy as np
import pytest

from minilora.gpt import GPTConfig, gpt_forward, gpt_init, gpt_logits, loss_and_grads
from minilora.lora import (
    TARGETS,
    LoRAConfig,
    adapted_paths,
    adapters,
    dropout_masks,
    lora_backward,
    lora_embedding_backward,
    lora_embedding_forward,
    lora_forward,
    lora_init,
    merge,
    unmerge,
    weight_of,
)
from minilora.ops import embedding_backward, embedding_forward, linear_backward, linear_forward
from minilora.tree import flatten, map_leaves, unflatten

CONFIG = GPTConfig(vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2, n_inner=12)
MERGEABLE = tuple(target for target in TARGETS if target != "embedding")
each_target = pytest.mark.parametrize("target", TARGETS)


def moved(tree, seed):
    """The tree with every leaf moved, so that nothing is zero, one or as it was drawn."""
    rng = np.random.default_rng(seed)
    return map_leaves(lambda x: x + 0.3 * rng.standard_normal(x.shape), tree)


def model(targets, *, trained=True, **options):
    """Base, adapters (B not 0 if trained), their configuration, and a batch."""
    base = moved(gpt_init(CONFIG, seed=0, dtype=np.float64), 0)
    lora_config = LoRAConfig(**{"rank": 2, "alpha": 3.0, "targets": targets, **options})
    lora = lora_init(base, lora_config, seed=1)
    if trained:
        lora = moved(lora, 1)
    rng = np.random.default_rng(2)
    tokens, targets = rng.integers(CONFIG.vocab_size, size=(2, 3, 5))
    constants = {"config": CONFIG, "lora_config": lora_config}
    return base, lora, lora_config, {"tokens": tokens, "targets": targets, **constants}


def without_targets(batch):
    return {name: value for name, value in batch.items() if name != "targets"}


def assert_trees_equal(actual, expected):
    actual, expected = flatten(actual), flatten(expected)
    assert set(actual) == set(expected)
    for path, leaf in expected.items():
        assert np.array_equal(actual[path], leaf), f"{path} differs"


def assert_trees_close(actual, expected):
    actual, expected = flatten(actual), flatten(expected)
    assert set(actual) == set(expected)
    for path, leaf in expected.items():
        np.testing.assert_allclose(actual[path], leaf, rtol=1e-9, atol=1e-12, err_msg=path)


# --- the start: B = 0 ----------------------------------------------------------------------------


@each_target
def test_a_fresh_adapter_changes_no_logit_bit_for_bit(target):
    base, lora, lora_config, batch = model((target,), trained=False)
    plain = gpt_logits(base, tokens=batch["tokens"], config=CONFIG)
    assert np.array_equal(gpt_logits(base, lora, **without_targets(batch)), plain)


@each_target
def test_at_the_start_one_factor_s_gradient_is_zero_and_the_other_s_is_not(target):
    base, lora, _, batch = model((target,), trained=False)
    _, _, dlora = loss_and_grads(base, lora, **batch)
    still, moves = ("B", "A") if target == "embedding" else ("A", "B")
    for path, gradients in adapters(dlora).items():
        assert not gradients[still].any(), f"{path}.{still} has a gradient at the start"
        assert gradients[moves].any(), f"{path}.{moves} has no gradient at the start"


# --- the factors' gradients and the dense one ----------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_factors_gradients_follow_from_the_dense_gradient(scale):
    rng = np.random.default_rng(0)
    x, w, A, B, dy = (
        rng.standard_normal(s) for s in [(2, 3, 5), (5, 4), (5, 2), (2, 4), (2, 3, 4)]
    )
    dx_dense, dW, _ = linear_backward(dy, linear_forward(x, scale * A @ B, np.zeros(4))[1])
    dx, dA, dB = lora_backward(dy, lora_forward(x, A, B, scale=scale)[1])
    np.testing.assert_allclose(dx, dx_dense, rtol=1e-12)
    np.testing.assert_allclose(dA, scale * dW @ B.T, rtol=1e-12)
    np.testing.assert_allclose(dB, scale * A.T @ dW, rtol=1e-12)


def test_the_same_holds_of_an_embedding():
    rng = np.random.default_rng(0)
    A, B, dy = (rng.standard_normal(shape) for shape in [(7, 2), (2, 4), (3, 5, 4)])
    index = rng.integers(7, size=(3, 5))
    y, cache = lora_embedding_forward(A, B, index=index, scale=1.5)
    dense, dense_cache = embedding_forward(1.5 * A @ B, index=index)
    np.testing.assert_allclose(y, dense, rtol=1e-12)
    (dW,) = embedding_backward(dy, dense_cache)
    dA, dB = lora_embedding_backward(dy, cache)
    np.testing.assert_allclose(dA, 1.5 * dW @ B.T, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(dB, 1.5 * A.T @ dW, rtol=1e-12)


@pytest.mark.parametrize("target", MERGEABLE)
def test_the_same_holds_inside_the_model(target):
    base, lora, lora_config, batch = model((target,), rslora=True)
    _, dbase, dlora = loss_and_grads(base, lora, **batch, wrt="both")
    dense, factors = flatten(dbase), adapters(lora)
    for path, gradients in adapters(dlora).items():
        weight, columns = weight_of(path, CONFIG.n_embd)
        dW, scale = dense[weight][:, columns], lora_config.scale_of(path)
        expected_dA, expected_dB = (
            scale * dW @ factors[path]["B"].T,
            scale * factors[path]["A"].T @ dW,
        )
        np.testing.assert_allclose(gradients["A"], expected_dA, rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(gradients["B"], expected_dB, rtol=1e-9, atol=1e-13)


# --- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [*((t,) for t in MERGEABLE), MERGEABLE])
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_equals_unmerged(targets, rslora):
    base, lora, lora_config, batch = model(targets, rslora=rslora, rank_pattern={r"0\..*": 1})
    merged = merge(base, lora, lora_config)
    unmerged_logits = gpt_logits(base, lora, **without_targets(batch))
    merged_logits = gpt_logits(merged, tokens=batch["tokens"], config=CONFIG)
    plain_logits = gpt_logits(base, tokens=batch["tokens"], config=CONFIG)
    np.testing.assert_allclose(merged_logits, unmerged_logits, rtol=1e-10, atol=1e-11)
    assert np.abs(merged_logits - plain_logits).max() > 1e-3, "the adapters do nothing"
    assert_trees_close(unmerge(merged, lora, lora_config), base)


def test_the_embedding_merges_where_the_head_is_a_table_of_its_own():
    base, lora, lora_config, batch = model(TARGETS)
    base = {**base, "head": base["wte"] + 1.0}
    merged = merge(base, lora, lora_config)
    assert merged["head"] is base["head"]
    unmerged_logits = gpt_logits(base, lora, **without_targets(batch))
    merged_logits = gpt_logits(merged, tokens=batch["tokens"], config=CONFIG)
    np.testing.assert_allclose(merged_logits, unmerged_logits, rtol=1e-10, atol=1e-11)
    assert_trees_close(unmerge(merged, lora, lora_config), base)


def test_merging_is_pure():
    base, lora, lora_config, _ = model(MERGEABLE)
    before = flatten(map_leaves(np.copy, {"base": base, "lora": lora}))
    for tree in (base, lora):
        map_leaves(lambda x: x.setflags(write=False), tree)
    merged = flatten(merge(base, lora, lora_config))
    assert_trees_equal({"base": base, "lora": lora}, unflatten(before))

    plain = flatten(base)
    adapted = {weight_of(path, CONFIG.n_embd)[0] for path in adapters(lora)}
    assert adapted == {path for path in plain if not np.array_equal(merged[path], plain[path])}
    assert not any(np.shares_memory(merged[path], plain[path]) for path in adapted)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_merging_keeps_the_dtype(dtype):
    base, lora, lora_config, _ = model(MERGEABLE)
    base, lora = (map_leaves(lambda x: x.astype(dtype), tree) for tree in (base, lora))
    assert {x.dtype for x in flatten(merge(base, lora, lora_config)).values()} == {np.dtype(dtype)}


# --- one fused adapter and three separate ones ---------------------------------------------------


def test_adapters_on_q_k_v_equal_one_block_structured_adapter_on_qkv():
    base, lora, _, batch = model(("q", "k", "v"))
    C, R = CONFIG.n_embd, 2

    def fused(block):
        A = np.concatenate([block["attn"][name]["A"] for name in "qkv"], axis=1)
        B = np.zeros((3 * R, 3 * C))
        for i, name in enumerate("qkv"):
            B[i * R : (i + 1) * R, i * C : (i + 1) * C] = block["attn"][name]["B"]
        return {"attn": {"qkv": {"A": A, "B": B}}}

    fused_lora = {"blocks": [fused(block) for block in lora["blocks"]]}
    fused_config = LoRAConfig(rank=3 * R, alpha=3 * 3.0, targets=("qkv",))  # the same α / R
    fused_batch = {**batch, "lora_config": fused_config}
    np.testing.assert_allclose(
        gpt_logits(base, fused_lora, **without_targets(fused_batch)),
        gpt_logits(base, lora, **without_targets(batch)),
        rtol=1e-10,
        atol=1e-12,
    )

    loss, _, dlora = loss_and_grads(base, lora, **batch)
    fused_loss, _, dfused = loss_and_grads(base, fused_lora, **fused_batch)
    np.testing.assert_allclose(fused_loss, loss, rtol=1e-12)
    for dblock, dblock_fused in zip(dlora["blocks"], dfused["blocks"], strict=True):
        dA, dB = dblock_fused["attn"]["qkv"]["A"], dblock_fused["attn"]["qkv"]["B"]
        for i, name in enumerate("qkv"):
            rank, columns = slice(i * R, (i + 1) * R), slice(i * C, (i + 1) * C)
            assert_trees_close(dblock["attn"][name], {"A": dA[:, rank], "B": dB[rank, columns]})


# --- freezing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [*((t,) for t in TARGETS), ("1.attn.o", "1.mlp.down"), TARGETS])
def test_freezing_changes_neither_loss_nor_gradient(targets):
    base, lora, lora_config, batch = model(targets, dropout=0.3)
    rng = np.random.default_rng(5)
    batch["masks"] = dropout_masks(lora, lora_config, rng=rng, shape=(3, 5))
    loss, dbase, dlora = loss_and_grads(base, lora, **batch, wrt="both")
    frozen_loss, no_dbase, frozen_dlora = loss_and_grads(base, lora, **batch, wrt="lora")
    base_loss, only_dbase, no_dlora = loss_and_grads(base, lora, **batch, wrt="base")

    assert no_dbase is None
    assert no_dlora is None
    assert loss == frozen_loss == base_loss
    assert_trees_close(frozen_dlora, dlora)  # the head's dx is then another order of one sum
    assert_trees_equal(only_dbase, dbase)
    assert set(flatten(dlora)) == set(flatten(lora))
    assert set(flatten(dbase)) == set(flatten(base))


def test_a_training_step_leaves_the_base_bit_identical():
    base, lora, _, batch = model(TARGETS)
    before = {path: leaf.tobytes() for path, leaf in flatten(base).items()}
    losses = []
    for _ in range(3):
        loss, _, dlora = loss_and_grads(base, lora, **batch)
        losses.append(loss)
        lora = map_leaves(lambda p, g: p - 0.1 * g, lora, dlora)
    assert losses[2] < losses[0]
    assert {path: leaf.tobytes() for path, leaf in flatten(base).items()} == before


def arrays_in(cache):
    if isinstance(cache, np.ndarray):
        yield cache
    elif isinstance(cache, dict):
        for value in cache.values():
            yield from arrays_in(value)
    elif isinstance(cache, tuple | list):
        for value in cache:
            yield from arrays_in(value)


def kept_bytes(lora_tree, base, batch, *, frozen):
    """Bytes of activations that a forward keeps: every array of the cache that is no parameter."""
    _, cache = gpt_forward(base, lora_tree, **without_targets(batch), frozen=frozen)
    parameters = [*flatten(base).values(), *flatten(lora_tree).values()]
    kept = {}
    for array in arrays_in(cache):
        owner = array if array.base is None else array.base
        if not any(np.shares_memory(owner, parameter) for parameter in parameters):
            kept[id(owner)] = owner.nbytes
    return sum(kept.values())


def test_a_frozen_base_keeps_less_and_nothing_below_the_lowest_adapter():
    base, lora, _, batch = model(("up",))
    everything = kept_bytes(lora, base, batch, frozen=False)
    frozen = kept_bytes(lora, base, batch, frozen=True)
    base, last_only, _, batch = model(("1.mlp.up",))
    last = kept_bytes(last_only, base, batch, frozen=True)
    assert last < frozen < everything
    _, cache = gpt_forward(base, last_only, **without_targets(batch), frozen=True)
    assert cache.trunk.blocks[0] is None
    kept = cache.trunk.blocks[1]
    assert kept.up is not None and kept.gelu is not None
    assert kept.ln_1 is kept.qkv is kept.attention is kept.o is kept.ln_2 is None


# --- dropout -------------------------------------------------------------------------------------


def test_masks_lie_at_every_adapter_but_the_embedding_s():
    base, lora, lora_config, _ = model(TARGETS, dropout=0.5)
    rng = np.random.default_rng(0)
    masks = dropout_masks(lora, lora_config, rng=rng, shape=(3, 5))
    assert set(masks) == set(adapted_paths(lora_config, 2)) - {"embedding"}
    for path, mask in masks.items():
        assert mask.shape == (3, 5, 12 if path.endswith("down") else 8)
        assert set(np.unique(mask)) == {0.0, 2.0}
    assert dropout_masks(lora, LoRAConfig(), rng=rng, shape=(3, 5)) is None


def test_dropout_acts_on_the_adapter_s_input_alone():
    base, lora, lora_config, batch = model(("up",), dropout=0.5)
    nothing_left = {path: np.zeros((3, 5, 8)) for path in adapters(lora)}
    dropped, _ = gpt_forward(base, lora, **without_targets(batch), masks=nothing_left)
    assert np.array_equal(dropped, gpt_logits(base, tokens=batch["tokens"], config=CONFIG))
