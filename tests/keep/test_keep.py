"""What is kept of a forward pass: enough for every wanted gradient, and no more."""

import weakref

import numpy as np
import pytest
from helpers import CONFIG, a_batch, a_net, arrays_in, assert_trees_equal, numbers_kept

from minilora import gpt2, keep, loss, ops
from minilora.adapters import TARGETS, adapted_paths
from minilora.keep import Kept, Plan, without_output
from minilora.network import loss_and_grads, trunk_forward
from minilora.ops import attention_forward
from minilora.pairs import tiny_llama, tiny_model
from minilora.tree import flatten

BASE, LORA, BOTH = Plan(base=True), Plan(lora=True), Plan(base=True, lora=True)
LINEARS = ("qkv", "q", "k", "v", "o", "up", "down")
TARGET_SETS = [
    *((target,) for target in TARGETS),
    *((f"{i}.(attn|mlp).{name}",) for i in range(2) for name in LINEARS),
    ("q", "v"), ("qkv", "down"), ("1.attn.o", "1.mlp.down"), ("0.mlp.up", "1.attn.k"),
    ("qkv", "q"), ("embedding", "1.mlp.down"), TARGETS,
]  # fmt: skip
each_target_set = pytest.mark.parametrize("targets", TARGET_SETS, ids="+".join)
each_plan = pytest.mark.parametrize(
    "plan",
    [plan._replace(recompute=r) for r in (False, True) for plan in (BASE, LORA, BOTH)],
    ids=lambda plan: "+".join(name for name, wanted in plan._asdict().items() if wanted),
)


def model(*targets, dropout=0.3, **options):
    """A net with these adapters, and a batch with masks."""
    net = a_net(*targets, dropout=dropout, **options)
    return net, a_batch(net)


def with_its_whole_cache(x, net, i, adapters):
    """y of block i, and the caches of its parts in a dict that drops nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2, "Kept", lambda plan, reads: {})
        constants = {"config": net.config, "plan": Plan(), "attend": attention_forward}
        return gpt2.block_forward(x, net.base["blocks"][i], adapters, **constants)


def by_the_whole_caches(net, tokens, targets, masks, *, base):
    """The loss, dbase and dlora with nothing left out and nothing recomputed.

    The block's pair alone, forwards and backwards; `base` says which of the two losses.
    """
    placed = net.adapters(masks)
    embedding = placed[""]["wte"].get("embedding")
    x, embed = gpt2.embed_forward(net.base, embedding, tokens=tokens)
    caches = []
    for i in range(net.config.n_layer):
        x, cache = with_its_whole_cache(x, net, i, placed[f"blocks.{i}"])
        caches.append(cache)
    x, norm = gpt2.norm_forward(x, net.base, config=net.config)
    if base:
        mean, head = loss.head_loss_forward(x, net.head, targets=targets)
        dx, dhead = loss.head_loss_backward(1.0, head)
    else:
        mean, head = loss.frozen_head_loss_forward(x, table=net.head, targets=targets)
        (dx,), dhead = loss.frozen_head_loss_backward(1.0, head), 0.0
    dx, dnorm = gpt2.norm_backward(dx, norm)
    dblocks, dadapters = [], []
    for cache in reversed(caches):
        dx, *gradients = gpt2.block_backward(dx, cache)
        dblocks, dadapters = [gradients[0], *dblocks], [gradients[1], *dadapters]
    dembed, dadapter = gpt2.embed_backward(dx, embed)
    dbase = {**dembed, "wte": dembed["wte"] + dhead, "blocks": dblocks, **dnorm}
    return mean, dbase, {"embedding": dadapter, "blocks": dadapters}


def test_the_caches_of_the_reference_are_whole():
    net, batch = model("qkv")
    _, dbase, dlora = by_the_whole_caches(net, **batch, base=True)
    assert flatten(dbase).keys() == flatten(net.base).keys()
    assert not any(gradient is None for gradient in flatten([dbase, dlora]).values())


@each_plan
@each_target_set
def test_a_thin_cache_gives_the_gradients_of_the_whole_one_bit_for_bit(targets, plan):
    """The very same operations on the same numbers, whatever was dropped or recomputed."""
    net, batch = model(*targets)
    mean, dbase, dlora = loss_and_grads(net, **batch, plan=plan)
    expected, *gradients = by_the_whole_caches(net, **batch, base=plan.base)
    assert mean == expected
    for found, wanted, whole, tree in [
        (dbase, plan.base, gradients[0], net.base), (dlora, plan.lora, gradients[1], net.lora)
    ]:  # fmt: skip
        if not wanted:
            assert found is None
            continue
        paths = flatten(tree).keys()
        assert flatten(found).keys() == paths, "a gradient for each parameter and no other"
        assert_trees_equal(found, {path: flatten(whole)[path] for path in paths})


# --- how much is kept ----------------------------------------------------------------------------


def kept(net, batch, plan):
    """The arrays of real numbers in the trunk's cache, but for parameters and masks, by path."""
    _, cache = trunk_forward(net, tokens=batch["tokens"], masks=batch["masks"], plan=plan)
    given = {"base": net.base, "lora": net.lora or {}, "masks": batch["masks"] or {}}
    return {path: x.size for path, x in numbers_kept(cache, of=given).items()}


N, C, F, R = 3 * 5, CONFIG.n_embd, CONFIG.inner, 2
NORM = {"norm.normalise.xhat": N * C, "norm.normalise.rstd": N}


def layer_norm(name, i):
    return {f"blocks.{i}.{name}.normalise.xhat": N * C, f"blocks.{i}.{name}.normalise.rstd": N}


def attention(i):
    return {f"blocks.{i}.attention.q": N * 3 * C}  # q, k and v are views of one array


def gelu(i):
    return {f"blocks.{i}.gelu.x": N * F}


def mlp(i):
    return {**layer_norm("ln_2", i), **gelu(i)}


def update(linear, target, i, **makings):
    return {
        f"blocks.{i}.{linear}.adapters.{target}.lora.{name}": size for name, size in makings.items()
    }


def block(i):
    """What a block keeps in which nothing is trained, but something below."""
    return {**layer_norm("ln_1", i), **attention(i), **mlp(i)}


FROZEN = [
    (("1.attn.qkv",), {**block(1), **update("qkv", "qkv", 1, h=N * R)}),
    (("1.attn.q",), {**block(1), **update("qkv", "q", 1, h=N * R)}),
    (("1.attn.o",), {**attention(1), **update("o", "o", 1, x=N * C, h=N * R), **mlp(1)}),
    (("1.mlp.up",), {**mlp(1), **update("up", "up", 1, h=N * R)}),
    (("1.mlp.down",), {**gelu(1), **update("down", "down", 1, h=N * R)}),
    (("0.mlp.up",), {**mlp(0), **update("up", "up", 0, h=N * R), **block(1)}),
    (("0.attn.v",), {**block(0), **update("qkv", "v", 0, h=N * R), **block(1)}),
    (("embedding",), {"embedding.lora.h": N * R, **block(0), **block(1)}),
    (
        ("down", "0.attn.o"),
        {
            **attention(0), **update("o", "o", 0, x=N * C, h=N * R), **mlp(0), **block(1),
            **update("down", "down", 0, h=N * R), **update("down", "down", 1, h=N * R),
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("targets", "expected"), FROZEN, ids=["+".join(t) for t, _ in FROZEN])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_frozen_base_keeps_what_the_factors_gradients_are_made_of_and_no_more(
    targets, expected, dropout
):
    """No input of a linear map but o's, and nothing below the lowest adapter's sublayer."""
    net, batch = model(*targets, dropout=dropout)
    assert kept(net, batch, LORA) == {**expected, **NORM}


def test_a_trained_base_keeps_the_input_of_o_besides():
    net, batch = model("qkv")
    inputs = {f"blocks.{i}.o.linear.x": N * C for i in range(2)}
    assert kept(net, batch, BASE) == {**block(0), **block(1), **inputs, **NORM}
    makings = {path: x for i in range(2) for path, x in update("qkv", "qkv", i, h=N * R).items()}
    assert kept(net, batch, BOTH) == {**block(0), **block(1), **inputs, **makings, **NORM}


def test_with_recompute_a_block_keeps_its_input_alone():
    """And what the last map's factors are made of, as that is not recomputed."""
    inputs = {f"blocks.{i}.x": N * C for i in range(2)}
    for plan in (BASE, LORA, BOTH):
        net, batch = model("qkv", "up")
        assert kept(net, batch, plan._replace(recompute=True)) == {**inputs, **NORM}
    net, batch = model("1.mlp.down")
    last = {"blocks.1.last.adapters.down.lora.h": N * R}
    expected = {"blocks.1.x": N * C, **last, **NORM}
    assert kept(net, batch, LORA._replace(recompute=True)) == expected


@each_target_set
def test_inference_keeps_nothing(targets):
    net, batch = model(*targets)
    assert kept(net, batch, Plan()) == {}
    assert kept(net, batch, Plan(recompute=True)) == {}


@each_target_set
@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_is_kept_below_the_lowest_adapter_and_the_pass_ends_there(
    targets, recompute, monkeypatch
):
    net, batch = model(*targets)
    lowest = adapted_paths(net.lora_config, CONFIG.n_layer)[0]
    first = 0 if lowest == "embedding" else int(lowest.split(".")[1])
    plan = Plan(lora=True, recompute=recompute)
    _, cache = trunk_forward(net, tokens=batch["tokens"], masks=batch["masks"], plan=plan)
    assert [block is None for block in cache.blocks] == [i < first for i in range(2)]

    reached = []

    def block_backward(dy, cache, *, whole=gpt2.block_backward):
        dx, *gradients = whole(dy, cache)
        reached.append(dx is not None)
        return dx, *gradients

    def embed_backward(dx, cache, *, whole=gpt2.embed_backward):
        reached.extend(["embedding"] if dx is not None else [])
        return whole(dx, cache)

    monkeypatch.setattr(gpt2, "block_backward", block_backward)
    monkeypatch.setattr(gpt2, "embed_backward", embed_backward)
    loss_and_grads(net, **batch, plan=plan)
    ends = ["embedding"] if lowest == "embedding" else [False]
    above = 2 if lowest == "embedding" else 1 - first
    assert reached == [True] * above + ends


@pytest.mark.parametrize("target", ["1.mlp.up", "1.mlp.down"])
def test_a_pass_that_ends_in_the_mlp_computes_no_gradient_of_the_attention(target, monkeypatch):
    net, batch = model(target)
    monkeypatch.delattr(ops, "attention_backward")
    loss_and_grads(net, **batch)


def test_the_last_map_s_product_is_not_recomputed(monkeypatch):
    """Of its output, which nothing is made of, only one column."""
    net, batch = model("down", "qkv")
    widths = []

    def forward(x, w, b, *, whole=ops.linear_forward):
        widths.append(w.shape)
        return whole(x, w, b)

    plan = Plan(lora=True, recompute=True)
    monkeypatch.setattr(ops, "linear_forward", forward)
    loss_and_grads(net, **batch, plan=plan)
    block = [(C, 3 * C), (C, C), (C, F)]
    assert widths == 2 * [*block, (F, C)] + 2 * [*block, (F, 1)]


def test_without_output_leaves_the_block_as_it_was():
    block = a_net().base["blocks"][0]
    shapes = {path: x.shape for path, x in flatten(block).items()}
    cut = flatten(without_output(block, "down"))
    assert {path: x.shape for path, x in flatten(block).items()} == shapes
    changed = {path: x.shape for path, x in cut.items() if x.shape != shapes[path]}
    assert changed == {"mlp.down.w": (F, 1), "mlp.down.b": (1,)}


# --- inputs are restored one at a time -----------------------------------------------------------


@pytest.mark.parametrize("plan", [BASE, LORA, BOTH])
def test_an_input_lives_only_while_its_linear_map_is_read(plan, monkeypatch):
    """When one is recomputed, those before it are gone."""
    inputs = []

    def output(cache, *, whole):
        assert not any(x() is not None for x in inputs), "two inputs at a time"
        x = whole(cache)
        inputs.append(weakref.ref(x))
        return x

    for cache in (ops.LayerNormCache, ops.GELUCache):
        whole = cache.output
        monkeypatch.setattr(cache, "output", lambda self, whole=whole: output(self, whole=whole))
    net, batch = model(*TARGETS)
    loss_and_grads(net, **batch, plan=plan)
    assert len(inputs) == 2 * 3  # of qkv, up and down in each block; o's is kept
    assert not any(x() is not None for x in inputs)


def test_no_input_is_recomputed_of_which_no_gradient_is_made(monkeypatch):
    """With a frozen base, only those that adapters read."""
    recomputed = []
    for cache in (ops.LayerNormCache, ops.GELUCache):
        whole = cache.output
        monkeypatch.setattr(
            cache,
            "output",
            lambda self, whole=whole: (recomputed.append(type(self)), whole(self))[1],
        )
    net, batch = model("1.attn.o", "down")
    loss_and_grads(net, **batch)
    assert recomputed == [ops.GELUCache, ops.GELUCache]


def a_whole_cache(*targets):
    net, batch = model(*targets)
    placed, x = net.adapters(batch["masks"]), np.random.default_rng(0).standard_normal((3, 5, C))
    return with_its_whole_cache(x, net, 1, placed["blocks.1"])[1]


def written(whole, plan):
    """The same caches, written into a `Kept` in their order."""
    cache = Kept(plan, gpt2.READS)
    for name, part in whole.items():
        cache[name] = part
    return cache


@pytest.mark.parametrize("targets", [("qkv",), ("k", "v", "down"), TARGETS], ids="+".join)
@pytest.mark.parametrize("plan", [BASE, LORA, BOTH])
def test_what_is_read_is_the_whole_cache_without_what_the_plan_drops(targets, plan):
    """A map's input, and that of each of its adapters after dropout, bit for bit."""
    whole = a_whole_cache(*targets)
    cache = written(whole, plan)
    assert list(cache) == list(whole)
    for name in whole:
        expected = arrays_in(keep.without(whole[name], keep.unwanted(plan)))
        found = arrays_in(cache[name])
        if name in gpt2.READS and not (plan.base or whole[name].adapters):
            assert found.keys() == {"linear.w"}, "an input that nothing is made of"
            continue
        assert found.keys() == expected.keys(), name
        for path, x in expected.items():
            assert np.array_equal(found[path], x), f"{name}.{path}"


def test_writing_and_reading_leave_the_whole_cache_as_it_was():
    for plan in (Plan(), BASE, LORA, BOTH, LORA._replace(end="up")):
        whole = a_whole_cache("q", "down")
        before = arrays_in(whole)
        cache = written(whole, plan)
        for name in cache:
            cache[name]
        after = arrays_in(whole)
        assert before.keys() == after.keys()
        assert all(before[path] is after[path] for path in before)


def sublayer_of(net, name):
    return next(part for part, maps in net.base["blocks"][0].items() if name in maps)


@pytest.mark.parametrize("a_model", [tiny_model, tiny_llama], ids=["gpt2", "llama"])
def test_reads_and_ends_name_the_linear_maps_in_the_order_of_the_pass(a_model):
    net, batch = a_model()
    kept = trunk_forward(net, tokens=batch.tokens, plan=BOTH)[1].blocks[1]
    order, reads, ends = list(kept), net.architecture.READS, net.architecture.ENDS
    assert reads.keys() == ends.keys()
    assert net.architecture.LAST == list(reads)[-1] == order[-1]
    assert list(reads) == [name for name in order if name in reads]
    for name, source in reads.items():
        assert order.index(source) < order.index(name)
        norm = reads.get(ends[name], ends[name])
        assert norm == {"attn": "ln_1", "mlp": "ln_2"}[sublayer_of(net, name)]
        assert (ends[name] == norm) == (source == norm), "the norm is kept where a map reads it"
