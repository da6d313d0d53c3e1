"""The laws of low-rank adaptation, in float64, on a small model with an adapter anywhere."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import CONFIG, a_base, a_batch, a_net, assert_trees_close, assert_trees_equal, normal

from minilora.adapters import (
    TARGETS,
    Adapter,
    LoRAConfig,
    adapted_paths,
    adapters,
    dropout_mask,
    dropout_masks,
    weight_of,
)
from minilora.gradcheck import assert_close, check_tree
from minilora.keep import Plan
from minilora.lora import (
    adapted_linear_backward,
    adapted_linear_forward,
    lora_backward,
    lora_embedding_backward,
    lora_embedding_forward,
    lora_forward,
    merge,
    unmerge,
)
from minilora.network import Net, loss_and_grads, net_logits
from minilora.ops import embedding_backward, embedding_forward, linear_backward, linear_forward
from minilora.tree import flatten, map_leaves, unflatten

MERGEABLE = tuple(target for target in TARGETS if target != "embedding")
BASE, LORA, BOTH = Plan(base=True), Plan(lora=True), Plan(base=True, lora=True)
each_target = pytest.mark.parametrize("target", TARGETS)


def logits_of(net, **options):
    return net_logits(net, tokens=a_batch(net)["tokens"], **options)


def without_adapter(net):
    return Net(net.base, net.config)


def merged(net):
    return Net(merge(net.base, net.lora, net.lora_config), net.config)


# --- initialisation: B = 0 -----------------------------------------------------------------------


@each_target
def test_a_fresh_adapter_changes_no_logit_bit_for_bit(target):
    net = a_net(target, is_trained=False)
    assert np.array_equal(logits_of(net), logits_of(without_adapter(net)))


@each_target
def test_at_initialisation_one_factor_s_gradient_is_zero_and_the_other_s_is_not(target):
    net = a_net(target, is_trained=False)
    _, _, dlora = loss_and_grads(net, **a_batch(net))
    still, moves = ("B", "A") if target == "embedding" else ("A", "B")
    for path, gradients in adapters(dlora).items():
        assert not gradients[still].any(), f"{path}.{still} has a gradient at initialisation"
        assert gradients[moves].any(), f"{path}.{moves} has no gradient at initialisation"


# --- the factors' gradients and the dense one ----------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_factors_gradients_follow_from_the_dense_gradient(scale):
    x, w, A, B, dy = (normal(*s) for s in [(2, 3, 5), (5, 4), (5, 2), (2, 4), (2, 3, 4)])
    dx_dense, dW, _ = linear_backward(dy, linear_forward(x, scale * A @ B, np.zeros(4))[1])
    dx, dA, dB = lora_backward(dy, lora_forward(x, A, B, scale=scale)[1])
    np.testing.assert_allclose(dx, dx_dense, rtol=1e-12)
    np.testing.assert_allclose(dA, scale * dW @ B.T, rtol=1e-12)
    np.testing.assert_allclose(dB, scale * A.T @ dW, rtol=1e-12)


def test_the_factors_gradients_of_an_embedding_follow_from_its_dense_gradient():
    A, B, dy = (normal(*shape) for shape in [(7, 2), (2, 4), (3, 5, 4)])
    index = np.random.default_rng(0).integers(7, size=(3, 5))
    y, cache = lora_embedding_forward(A, B, index=index, scale=1.5)
    dense, dense_cache = embedding_forward(1.5 * A @ B, index=index)
    np.testing.assert_allclose(y, dense, rtol=1e-12)
    (dW,) = embedding_backward(dy, dense_cache)
    dA, dB = lora_embedding_backward(dy, cache)
    np.testing.assert_allclose(dA, 1.5 * dW @ B.T, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(dB, 1.5 * A.T @ dW, rtol=1e-12)


@pytest.mark.parametrize("target", MERGEABLE)
def test_the_factors_gradients_follow_from_the_dense_one_inside_the_model(target):
    net = a_net(target, rslora=True)
    _, dbase, dlora = loss_and_grads(net, **a_batch(net), plan=BOTH)
    dense, factors = flatten(dbase), adapters(net.lora)
    for path, gradients in adapters(dlora).items():
        weight, columns = weight_of(path, CONFIG.n_embd)
        dW, scale = dense[weight][:, columns], net.lora_config.scale_of(path)
        A, B = factors[path]["A"], factors[path]["B"]
        np.testing.assert_allclose(gradients["A"], scale * dW @ B.T, rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(gradients["B"], scale * A.T @ dW, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("plan", [LORA, BOTH])
def test_the_factors_gradients_are_balanced(plan):
    """Aᵀ dA = dB Bᵀ: (1 + t) A with B / (1 + t) is the same map, so the loss stays as it is."""
    net = a_net(*TARGETS, dropout=0.3)
    gradients = adapters(loss_and_grads(net, **a_batch(net), plan=plan)[2])
    for path, ab in adapters(net.lora).items():
        left, right = ab["A"].T @ gradients[path]["A"], gradients[path]["B"] @ ab["B"].T
        assert np.abs(left).max() > 1e-6, path
        np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-13, err_msg=path)


# --- the adapted linear map ----------------------------------------------------------------------


def adapted(x, w, b, factors, masks):
    placed = {
        name: Adapter(**ab, scale=1.5 + i, mask=masks[name], columns=slice(2 * i, 2 * i + 2))
        for i, (name, ab) in enumerate(factors.items())
    }
    return adapted_linear_forward(x, w, b, adapters=placed)


def test_the_gradients_of_an_adapted_linear_map_agree_with_central_differences():
    """Two adapters, on other columns, one with dropout."""
    factors = {
        "q": {"A": normal(4, 2), "B": normal(2, 2, seed=1)},
        "v": {"A": normal(4, 3, seed=2), "B": normal(3, 2, seed=3)},
    }
    tree = {"x": normal(2, 3, 4, seed=4), "w": normal(4, 5, seed=5), "b": normal(5), **factors}
    masks = {"q": None, "v": dropout_mask(np.random.default_rng(0), (2, 3, 4), 0.4, np.float64)}
    y, cache = adapted(tree["x"], tree["w"], tree["b"], factors, masks)
    dy = normal(*y.shape, seed=6)
    dx, dlinear, dfactors = adapted_linear_backward(dy, cache)

    def loss_of(flat):
        moved = unflatten(flat)
        x, w, b = (moved.pop(name) for name in "xwb")
        return np.sum(dy * adapted(x, w, b, moved, masks)[0])

    gradients = flatten({"x": dx, **dlinear, **dfactors})
    assert_close(check_tree(loss_of, flatten(tree), gradients), 1e-8)


def test_an_adapted_linear_map_is_its_merged_weight():
    x, w, b = normal(2, 3, 4), normal(4, 5, seed=1), normal(5, seed=2)
    A, B = normal(4, 2, seed=3), normal(2, 2, seed=4)
    y, _ = adapted(x, w, b, {"q": {"A": A, "B": B}}, {"q": None})
    w = w.copy()
    w[:, :2] += 1.5 * A @ B
    np.testing.assert_allclose(y, x @ w + b, rtol=1e-12)


# --- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [*((t,) for t in MERGEABLE), MERGEABLE])
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_equals_unmerged(targets, rslora):
    net = a_net(*targets, rslora=rslora, rank_pattern={r"0\..*": 1})
    np.testing.assert_allclose(logits_of(merged(net)), logits_of(net), rtol=1e-10, atol=1e-11)
    difference = logits_of(net) - logits_of(without_adapter(net))
    assert np.abs(difference).max() > 1e-3, "the adapters do nothing"
    assert_trees_close(unmerge(merged(net).base, net.lora, net.lora_config), net.base)


def test_the_embedding_merges_where_the_head_is_a_table_of_its_own():
    base = a_base()
    net = a_net(*TARGETS, base={**base, "head": base["wte"] + 1.0})
    assert merged(net).head is net.head
    np.testing.assert_allclose(logits_of(merged(net)), logits_of(net), rtol=1e-10, atol=1e-11)
    assert_trees_close(unmerge(merged(net).base, net.lora, net.lora_config), net.base)


def test_merging_is_pure():
    net = a_net(*MERGEABLE)
    given = {"base": net.base, "lora": net.lora}
    before = map_leaves(np.copy, given)
    map_leaves(lambda x: x.setflags(write=False), given)
    after = flatten(merged(net).base)
    assert_trees_equal(given, before)

    plain = flatten(net.base)
    adapted = {weight_of(path, CONFIG.n_embd)[0] for path in adapters(net.lora)}
    assert adapted == {path for path in plain if not np.array_equal(after[path], plain[path])}
    assert not any(np.shares_memory(after[path], plain[path]) for path in adapted)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_merging_keeps_the_dtype(dtype):
    net = a_net(*MERGEABLE)
    base, lora = (map_leaves(lambda x: x.astype(dtype), tree) for tree in (net.base, net.lora))
    leaves = flatten(merge(base, lora, net.lora_config)).values()
    assert {x.dtype for x in leaves} == {np.dtype(dtype)}


# --- one fused adapter and three separate ones ---------------------------------------------------


def test_adapters_on_q_k_v_equal_one_block_structured_adapter_on_qkv():
    net = a_net("q", "k", "v")
    C, R = CONFIG.n_embd, 2

    def fused(block):
        A = np.concatenate([block["attn"][name]["A"] for name in "qkv"], axis=1)
        B = np.zeros((3 * R, 3 * C))
        for i, name in enumerate("qkv"):
            B[i * R : (i + 1) * R, i * C : (i + 1) * C] = block["attn"][name]["B"]
        return {"attn": {"qkv": {"A": A, "B": B}}}

    fused_lora = {"blocks": [fused(block) for block in net.lora["blocks"]]}
    fused_config = LoRAConfig(rank=3 * R, alpha=3 * 3.0, targets=("qkv",))  # the same α / R
    fused_net = replace(net, lora=fused_lora, lora_config=fused_config)
    np.testing.assert_allclose(logits_of(fused_net), logits_of(net), rtol=1e-10, atol=1e-12)

    loss, _, dlora = loss_and_grads(net, **a_batch(net))
    fused_loss, _, dfused = loss_and_grads(fused_net, **a_batch(net))
    np.testing.assert_allclose(fused_loss, loss, rtol=1e-12)
    for dblock, dblock_fused in zip(dlora["blocks"], dfused["blocks"], strict=True):
        dA, dB = dblock_fused["attn"]["qkv"]["A"], dblock_fused["attn"]["qkv"]["B"]
        for i, name in enumerate("qkv"):
            rank, columns = slice(i * R, (i + 1) * R), slice(i * C, (i + 1) * C)
            assert_trees_close(dblock["attn"][name], {"A": dA[:, rank], "B": dB[rank, columns]})


# --- freezing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [*((t,) for t in TARGETS), ("1.attn.o", "1.mlp.down"), TARGETS])
def test_freezing_changes_neither_loss_nor_gradient(targets):
    net = a_net(*targets, dropout=0.3)
    batch = a_batch(net)
    loss, dbase, dlora = loss_and_grads(net, **batch, plan=BOTH)
    frozen_loss, no_dbase, frozen_dlora = loss_and_grads(net, **batch, plan=LORA)
    base_loss, only_dbase, no_dlora = loss_and_grads(net, **batch, plan=BASE)

    assert no_dbase is None
    assert no_dlora is None
    assert loss == base_loss
    np.testing.assert_allclose(frozen_loss, loss, rtol=1e-12)
    assert_trees_close(frozen_dlora, dlora)  # the head's dx is then another order of one sum
    assert_trees_equal(only_dbase, dbase)
    assert set(flatten(dlora)) == set(flatten(net.lora))
    assert set(flatten(dbase)) == set(flatten(net.base))


def test_a_training_step_leaves_the_base_bit_identical():
    net = a_net(*TARGETS)
    before = {path: leaf.tobytes() for path, leaf in flatten(net.base).items()}
    losses = []
    for _ in range(3):
        loss, _, dlora = loss_and_grads(net, **a_batch(net))
        losses.append(loss)
        net = replace(net, lora=map_leaves(lambda p, g: p - 0.1 * g, net.lora, dlora))
    assert losses[2] < losses[0]
    assert {path: leaf.tobytes() for path, leaf in flatten(net.base).items()} == before


# --- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_mask_drops_its_share_and_scales_the_rest(p, dtype):
    mask = dropout_mask(np.random.default_rng(0), (100, 100), p, dtype)
    assert mask.dtype == dtype
    assert set(np.unique(mask)) <= {dtype(0), dtype(1 / (1 - p))}
    assert abs((mask == 0).mean() - p) < 0.02
    again = dropout_mask(np.random.default_rng(0), (100, 100), p, dtype)
    assert np.array_equal(mask, again)


def test_masks_lie_at_every_adapter_but_the_embedding_s():
    net = a_net(*TARGETS, dropout=0.5)
    rng = np.random.default_rng(0)
    masks = dropout_masks(net.lora, net.lora_config, rng=rng, shape=(3, 5))
    assert set(masks) == set(adapted_paths(net.lora_config, 2)) - {"embedding"}
    for path, mask in masks.items():
        assert mask.shape == (3, 5, 12 if path.endswith("down") else 8)
        assert set(np.unique(mask)) == {0.0, 2.0}
    assert dropout_masks(net.lora, LoRAConfig(), rng=rng, shape=(3, 5)) is None


def test_every_entry_of_every_mask_is_drawn_on_its_own():
    """Neighbours along any axis, of adapters, rows, times or entries, agree half of the time."""
    net = a_net("q", "o", dropout=0.5)
    shape, rng = (16, 16), np.random.default_rng(0)
    masks = dropout_masks(net.lora, net.lora_config, rng=rng, shape=shape)
    kept = np.stack(list(masks.values())) > 0  # (adapters, B, T, in)
    for axis in range(4):
        one, other = (np.delete(kept, end, axis) for end in (0, -1))
        assert 0.45 < np.mean(one == other) < 0.55, axis


def test_dropout_acts_on_the_adapter_s_input_alone():
    net = a_net("up", dropout=0.5)
    nothing_left = {path: np.zeros((3, 5, 8)) for path in adapters(net.lora)}
    dropped = logits_of(net, masks=nothing_left)
    assert np.array_equal(dropped, logits_of(without_adapter(net)))
