# %% [markdown]
# # The bug zoo
#
# LoRA is a few lines of code, and each of them can be wrong in a way that raises no error. Eighteen
# such bugs live here. We let each one run on the base that comes with minilora, look at what it
# does, and name the test of this repository that catches it. (That it does is tested as well:
# `tests/zoo/test_zoo.py` plants every bug in a copy of the package and runs the named test.)
#
# Many of these bugs leave a model that still learns *something*. That is what makes them dangerous:
# the loss goes down, only less far than it could, and nobody looks.
#
# The notation is that of the other tutorials. A frozen weight $W$ (I, O) gets the update $sAB$,
# with $A$ (I, R), $B$ (R, O) and the scale $s = \alpha / R$. Rows are inputs: $y = xW + s(xA)B$.

# %%
import inspect
import os
import pydoc_data.topics
import tempfile
import textwrap
import tracemalloc
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np

import minilora
from minilora.adapters import (
    LoRAConfig,
    adapters,
    dropout_masks,
    lora_init,
    lora_paths,
    matches,
    weight_of,
)
from minilora.data import draw_batch
from minilora.figures import show
from minilora.keep import Kept, Plan
from minilora.lora import (
    adapted_linear_backward,
    adapted_linear_forward,
    lora_backward,
    lora_forward,
    merge,
)
from minilora.loss import cross_entropy_forward
from minilora.mixing import mix
from minilora.network import Net, loss_and_grads, net_logits, trunk_forward
from minilora.ops import dropout_forward, linear_backward
from minilora.optim import adamw, adamw_init
from minilora.tree import count, flatten, map_leaves, unflatten

SMALL = os.environ.get("MINILORA_SMALL") == "1"  # a quick run, for the tests
STEPS = 4 if SMALL else 14
plt.rcParams.update({"figure.facecolor": "white", "figure.constrained_layout.use": True})

model = minilora.load_model()
base, sizes = model.base, model.config

# %% [markdown]
# ## The cage
#
# One batch of text (the source of a Python module; the base has read prose only), and a training
# loop that reads this batch again and again. To overfit one batch is no way to make a good model,
# but a good way to look for bugs: the loss has no noise and has to fall.

# %%
text = model.tokenizer.encode(inspect.getsource(textwrap))
tokens, targets = draw_batch(
    text, batch=2 if SMALL else 4, context=64, rng=np.random.default_rng(0)
)


def loss_of(weights, lora=None, config=None, **others):
    """Nats per byte on the batch."""
    logits = net_logits(Net(weights, sizes, lora, config), tokens=tokens, **others)
    return float(cross_entropy_forward(logits, targets=targets)[0])


def train(lora, config, steps=STEPS):
    """The trained adapters, and the loss before each step."""
    moments, losses = adamw_init(lora), []
    for step in range(1, steps + 1):
        net = Net(base, sizes, lora, config)
        loss, _, grads = loss_and_grads(net, tokens=tokens, targets=targets)
        lora, moments = adamw(lora, grads, moments, step=step, lr=5e-3)
        losses.append(float(loss))
    return lora, [*losses, loss_of(base, lora, config)]


def leaves(tree):
    return list(flatten(tree).values())


CONFIG = LoRAConfig(rank=4, alpha=8.0, targets=("qkv", "o", "up", "down"))
fresh = lora_init(base, CONFIG, seed=0)
healthy, healthy_losses = train(fresh, CONFIG)
before, after = healthy_losses[0], healthy_losses[-1]
print(f"no bug: the loss goes from {before:.3f} to {after:.3f}")

# %% [markdown]
# ## Bugs of the initialisation
#
# Training should begin exactly at the base, so $sAB = 0$; and it must be able to leave. With
# $\mathrm{d}W$ the gradient that $W$ would have, the factors get
# $\mathrm{d}A = s\,\mathrm{d}W B^\top$ and $\mathrm{d}B = s\,A^\top \mathrm{d}W$. So one factor has
# to be zero, and the other must not be.
#
# ### 1. Both factors start at zero
#
# Then both gradients are zero, and stay zero for ever. The run finishes without an error.
#
# Caught by `test_at_initialisation_one_factor_s_gradient_is_zero_and_the_other_s_is_not`
# (`tests/lora/test_lora_laws.py`).


# %%
def changed(lora, A=lambda a: a, B=lambda b: b):
    """The adapters with every A and every B replaced."""
    return unflatten(
        {path: (A if path.endswith(".A") else B)(x) for path, x in flatten(lora).items()}
    )


stuck, zero_losses = train(changed(fresh, A=np.zeros_like), CONFIG)
print(f"both zero: {zero_losses[0]:.3f} -> {zero_losses[-1]:.3f}")

# %% [markdown]
# ### 2. Neither factor starts at zero
#
# Then the model at step 0 is not the base but the base plus noise. Training has to repair the
# damage first.
#
# Caught by `test_a_fresh_adapter_changes_no_logit_bit_for_bit` (`tests/lora/test_lora_laws.py`).

# %%
rng = np.random.default_rng(1)
noisy_start = changed(fresh, B=lambda B: rng.uniform(-0.5, 0.5, B.shape).astype(B.dtype))
_, noisy_losses = train(noisy_start, CONFIG)
print(f"neither zero: {noisy_losses[0]:.3f} -> {noisy_losses[-1]:.3f}")

# %% [markdown]
# ### 3. A starts constant
#
# If all columns of $A$ are equal, all rows of $B$ get the same gradient. So they stay equal, then
# the columns of $A$ do, and so on: the $R$ directions are one direction, $R$ times. It trains, but
# at rank 1, whatever rank you asked for. The loss hardly shows it here; the singular values of the
# update do.
#
# Caught by `test_the_seed_decides_and_no_two_adapters_are_alike`
# (`tests/lora/test_lora_config.py`).


# %%
def update_of(lora, path, config=CONFIG):
    ab = adapters(lora)[path]
    return config.scale_of(path) * ab["A"].astype(np.float64) @ ab["B"]


constant_start = changed(fresh, A=lambda A: np.full_like(A, 1 / np.sqrt(len(A))))
constant, constant_losses = train(constant_start, CONFIG)
PATH = "blocks.2.mlp.up"
spectra = {
    name: np.linalg.svd(update_of(lora, PATH), compute_uv=False)[:4]
    for name, lora in {"no bug": healthy, "A constant": constant}.items()
}
for name, values in spectra.items():
    print(f"{name:10} singular values", " ".join(f"{v:8.1e}" for v in values))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
curves = {
    "no bug": healthy_losses,
    "1 both zero": zero_losses,
    "2 neither zero": noisy_losses,
    "3 A constant": constant_losses,
}
for name, losses in curves.items():
    left.plot(losses, label=name)
left.set(xlabel="step", ylabel="loss (nats per byte)", title="four initialisations")
left.legend()
for shift, (name, values) in zip((-0.2, 0.2), spectra.items(), strict=True):
    right.bar(np.arange(1, 5) + shift, np.maximum(values, 1e-9), 0.4, label=name)
right.set_yscale("log")
right.set(xlabel="number of the singular value", title="directions of the update at one weight")
right.set_xticks(range(1, 5))
right.legend()
show(figure, "Three bad starts: one loss stays put, one starts too high, one looks healthy")

# %% [markdown]
# ## Bugs of the scale
#
# The scale $s$ appears in three places: in the forward pass, in the backward pass, and in merging.
# To forget it in one of them, or to apply it twice, makes the three disagree.
#
# ### 4. The scale in the forward pass only
#
# The backward pass lacks its $s$ in $\mathrm{d}A$. To see it we need another check: the loss
# itself. Move all $A$ a little along some direction $V$ and compare the change of the loss with
# $\langle \mathrm{d}A, V \rangle$, in float64. (We take the right gradient for $V$.) The two should
# agree; they differ by the factor $s$. But look at the training: Adam divides every gradient by its
# own size, so a constant factor disappears, and the loss falls as if nothing were wrong. No loss
# curve shows this bug.
#
# **Predict.** The gradient of A lacks its factor s = 2. Where does training with Adam end? (a) at
# nearly the same loss, (b) at about twice the loss, (c) at the loss of the base.
#
# <details><summary>Answer</summary>
#
# (a) at nearly the same loss: Adam divides every gradient by its own size, so a constant factor
# disappears.
#
# </details>
#
# Caught by `test_gradients_agree_with_central_differences` (`tests/ops/test_pairs.py`).


# %%
def forgetful_backward(dy, cache):
    return lora_backward(dy, cache._replace(scale=1.0))


weights, lora = (map_leaves(lambda x: x.astype(np.float64), tree) for tree in (base, healthy))


def gradients():
    net = Net(weights, sizes, lora, CONFIG)
    return loss_and_grads(net, tokens=tokens, targets=targets)[2]


V = changed(gradients(), B=np.zeros_like)
plus, minus = (map_leaves(lambda p, v, h=h: p + h * v, lora, V) for h in (1e-4, -1e-4))
slope = (loss_of(weights, plus, CONFIG) - loss_of(weights, minus, CONFIG)) / 2e-4


def claimed_slope():
    return sum(np.sum(g * v) for g, v in zip(leaves(gradients()), leaves(V), strict=True))


claim = claimed_slope()
with patch("minilora.lora.lora_backward", forgetful_backward):
    forgetful_claim = claimed_slope()
    _, forgetful_losses = train(fresh, CONFIG)
print(f"no bug:      measured slope / gradient's = {slope / claim:.4f}, loss {after:.3f}")
print(
    f"scale lacks: measured slope / gradient's = {slope / forgetful_claim:.4f}, "
    f"loss {forgetful_losses[-1]:.3f}"
)

# %% [markdown]
# (The second ratio need not be exactly $s$: the gradient that flows on to lower blocks lacks an $s$
# too, [LORA.6], so the error differs from block to block.)
#
# ### 5. The scale applied twice
#
# For instance once on $xA$ and once more on the result. Training adapts to $s^2$ and looks healthy.
# The adapter is then used or merged by a program that multiplies by $s$, as it should, and only
# half of the update arrives (here $s = 2$).
#
# Caught by `test_merged_equals_unmerged` (`tests/lora/test_lora_laws.py`).


# %%
def twice_scaled(x, A, B, *, scale):
    return lora_forward(x, A, B, scale=scale * scale)


with patch("minilora.lora.lora_forward", twice_scaled):
    doubled, doubled_losses = train(fresh, CONFIG)
SEEN = {"no bug": after}
SEEN["5 trained with s²"] = loss_of(merge(base, doubled, CONFIG))
print(f"in training the loss is {doubled_losses[-1]:.3f}, merged {SEEN['5 trained with s²']:.3f}")

# %% [markdown]
# ### 6. The scale forgotten when merging
#
# $W + AB$ instead of $W + sAB$. The adapter was fine, the merged model is not.
#
# Caught by `test_merged_equals_unmerged` (`tests/lora/test_lora_laws.py`).

# %%
unscaled = LoRAConfig(rank=4, alpha=4.0, targets=CONFIG.targets)  # s = 1
SEEN["6 merged without s"] = loss_of(merge(base, healthy, unscaled))
print(f"adapter {after:.3f}, merged without its scale {SEEN['6 merged without s']:.3f}")

# %% [markdown]
# ## Bugs of the place
#
# ### 7. The update transposed
#
# The paper, and PEFT's files, store weights as (out, in) and write $\Delta W = sBA$; here, and in
# GPT-2's own files, they are (in, out). Mix the two up and an oblong weight raises an error. A
# square one does not: it takes $\Delta W^\top$ in silence. In GPT-2 the attention's output
# projection `o` is square.
#
# Caught by `test_merged_equals_unmerged` (`tests/lora/test_lora_laws.py`), which has one run for
# each target.

# %%
merged = flatten(merge(base, healthy, CONFIG))
for path in adapters(healthy):
    if path.endswith(".o"):
        merged[f"{path}.w"] = flatten(base)[f"{path}.w"] + update_of(healthy, path).T.astype("f4")
SEEN["7 o transposed"] = loss_of(unflatten(merged))
print(f"adapter {after:.3f}, merged with o transposed {SEEN['7 o transposed']:.3f}")

# %% [markdown]
# ### 8. Columns of the fused weight swapped
#
# GPT-2 keeps the projections of queries, keys and values in one weight, `qkv`, as three thirds of
# its columns. Other models order them otherwise. Nothing in the shapes says which is which. Below,
# an adapter for `q` and `v` is merged in the right order and with `k` and `v` exchanged.
#
# Caught by `test_q_k_and_v_are_the_columns_of_qkv` (`tests/lora/test_lora_config.py`).


# %%
def swapped_weight_of(path, *widths):
    if path.endswith((".k", ".v")):
        path = path[:-1] + {"k": "v", "v": "k"}[path[-1]]
    return weight_of(path, *widths)


QV = LoRAConfig(rank=4, alpha=8.0, targets=("q", "v"))
on_qv, qv_losses = train(lora_init(base, QV, seed=0), QV)
right_merge = merge(base, on_qv, QV)
with patch("minilora.lora.weight_of", swapped_weight_of):
    wrong_merge = merge(base, on_qv, QV)
SEEN["8 k and v swapped"] = loss_of(wrong_merge)
print(f"adapter {qv_losses[-1]:.3f}, merged into the wrong columns {SEEN['8 k and v swapped']:.3f}")

figure, panels = plt.subplots(2, 1, figsize=(7, 4.2), sharex=True)
titles = {"right: q and v have changed": right_merge, "wrong: q and k have": wrong_merge}
for axes, (title, weights) in zip(panels, titles.items(), strict=True):
    name = "blocks.3.attn.qkv.w"
    difference = np.abs(flatten(weights)[name] - flatten(base)[name])
    axes.imshow(difference, cmap="Blues", vmax=np.quantile(difference, 0.99), aspect="auto")
    axes.set_title(title)
    axes.set_ylabel("inputs")
    axes.set_xticks([128, 384, 640], ["q", "k", "v"])
show(figure, "Every shape fits, and the update of v has landed on k")

# %% [markdown]
# ### 9. A wrong target, silently ignored
#
# You ask for adapters on `q` and `value`; the model's name for it is `v`. A library that takes the
# names that match, and ignores the others, trains half of what you wanted. The loss still falls.
# minilora refuses.
#
# Caught by `test_an_unknown_target_is_refused_with_a_list_of_those_that_exist`
# (`tests/lora/test_lora_config.py`).

# %%
TYPO = LoRAConfig(rank=4, alpha=8.0, targets=("q", "value"))
refusal = ""
try:
    lora_init(base, TYPO, seed=0)
except minilora.MiniloraError as error:
    refusal = str(error)
print(refusal)


def lenient_paths(config, n_layer, *, mlp):
    return [p for p in lora_paths(n_layer, mlp=mlp) if any(matches(t, p) for t in config.targets)]


with patch("minilora.adapters.adapted_paths", lenient_paths):
    half = lora_init(base, TYPO, seed=0)
half, half_losses = train(half, TYPO)
print(f"q and v: {count(on_qv):,} numbers trained, loss {qv_losses[-1]:.3f}")
print(f"typo:    {count(half):,} numbers trained, loss {half_losses[-1]:.3f}")

# %% [markdown]
# ### 10. Dropout on the wrong path
#
# Dropout belongs on the input of the adapter, $y = xW + s\,(x \circ m) A B$, where the mask $m$
# zeroes some entries and enlarges the others. If it hits the path through $W$ too, the base itself
# is damaged in every training step. A fresh adapter shows it best: since $B = 0$, the loss must be
# that of the base, dropout or not.
#
# Caught by `test_dropout_acts_on_the_adapter_s_input_alone` (`tests/lora/test_lora_laws.py`).


# %%
def dropping_linear(x, w, b, *, adapters):
    for adapter in adapters.values():
        x, _ = dropout_forward(x, mask=adapter.mask)
    unmasked = {name: adapter._replace(mask=None) for name, adapter in adapters.items()}
    return adapted_linear_forward(x, w, b, adapters=unmasked)


dropping = LoRAConfig(rank=4, alpha=8.0, targets=CONFIG.targets, dropout=0.1)
masks = dropout_masks(fresh, dropping, rng=np.random.default_rng(0), shape=tokens.shape)
dropped = loss_of(base, fresh, dropping, masks=masks)
with patch("minilora.gpt2.adapted_linear_forward", dropping_linear):
    wrongly_dropped = loss_of(base, fresh, dropping, masks=masks)
print(f"base {before:.3f}, dropout on the adapter {dropped:.3f}, on both {wrongly_dropped:.3f}")

# %% [markdown]
# ## Bugs of freezing
#
# ### 11. Weight decay on the wrong tree
#
# An optimiser is given both trees, base and adapters, with gradients of zero for the base:
# "frozen". But decay needs no gradient. AdamW multiplies every matrix by $1 - \eta\lambda$ in each
# step ($\eta$ the learning rate, $\lambda$ the decay), so the base shrinks, slowly, under an
# adapter that is blameless. The cure is not to hand the base to the optimiser at all: you train the
# tree that you hand over.
#
# Caught by `test_adapters_train_and_the_base_keeps_its_bits` (`tests/training/test_train.py`).

# %%
no_gradient = map_leaves(np.zeros_like, base)
decayed, _ = adamw(base, no_gradient, adamw_init(base), step=1, lr=5e-3, weight_decay=0.1)
moved = sum(not np.array_equal(a, b) for a, b in zip(leaves(base), leaves(decayed), strict=True))
print(f"after one step, {moved} of {len(leaves(base))} arrays of the frozen base have changed")

prose = model.tokenizer.encode("\n".join(pydoc_data.topics.topics.values()))
prose_tokens, prose_targets = draw_batch(prose, batch=4, context=64, rng=np.random.default_rng(0))


def loss_on_prose(weights):
    logits = net_logits(Net(weights, sizes), tokens=prose_tokens)
    return float(cross_entropy_forward(logits, targets=prose_targets)[0])


DECAY_STEPS = [0, 200, 400, 600, 800, 1000]
decay_losses = [
    loss_on_prose(map_leaves(lambda w, n=n: w * (1 - 5e-4) ** n if w.ndim > 1 else w, base))
    for n in DECAY_STEPS
]
print("loss on English prose after", DECAY_STEPS, "steps:", np.round(decay_losses, 2).tolist())

# %% [markdown]
# ### 12. Frozen, and paid for
#
# The opposite: the base is left alone, but its gradients are prepared all the same. Every linear
# map keeps its input for a $\mathrm{d}W$ that nobody wants. Nothing is wrong with the result; the
# memory that LoRA was to save is simply not saved. In minilora every forward pass returns all that
# its gradients are made of, and `keep.Kept`, a dict of a block's caches, drops what the wanted ones
# do not need as it is written; the bug is a dict that keeps it all. We count the bytes that are
# still held after the forward pass.
#
# Caught by `test_a_frozen_base_keeps_what_the_factors_gradients_are_made_of_and_no_more`
# (`tests/keep/test_keep.py`).


# %%
def kept_megabytes():
    tracemalloc.start()
    _, cache = trunk_forward(Net(base, sizes, on_qv, QV), tokens=tokens, plan=Plan(lora=True))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(cache.blocks) == sizes.n_layer
    return kept / 1e6


kept = kept_megabytes()
with patch.object(Kept, "__setitem__", dict.__setitem__):
    kept_for_nothing = kept_megabytes()
print(f"held after the forward pass: {kept:.1f} MB; with the bug {kept_for_nothing:.1f} MB")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
left.plot(DECAY_STEPS, decay_losses, "o-", color="#d94801")
left.set(xlabel="steps with decay on the base", ylabel="loss of the base on prose")
left.set_title("11 the base rots")
right.barh(["no bug", "12 inputs kept"], [kept, kept_for_nothing], color=["#2171b5", "#d94801"])
right.set(xlabel="MB held after the forward pass", title="12 frozen, and paid for")
show(figure, "Frozen is not enough: decay moves the base, and unused inputs fill the memory")

# %% [markdown]
# ## Bugs after training
#
# ### 13. Merged in place, and so twice
#
# A `merge` that changes the weights themselves, and is called by a function that evaluates. Call it
# a second time, and the update is in there twice; call it before each of five evaluations, and it
# is in there five times. A pure function, which returns new weights, cannot do this.
#
# **Predict.** After how many merges is the loss lowest? (a) one, (b) three, (c) it keeps falling.
#
# <details><summary>Answer</summary>
#
# (a) one: that is the update that was trained. Each further merge adds it again, and overshoots.
#
# </details>
#
# Caught by `test_merging_is_pure` (`tests/lora/test_lora_laws.py`).


# %%
def merge_in_place(weights):
    for path in adapters(healthy):
        weights[f"{path}.w"] += update_of(healthy, path).astype(np.float32)


in_place = flatten(map_leaves(np.copy, base))
merge_losses = [loss_of(unflatten(in_place))]
for _ in range(4):
    merge_in_place(in_place)
    merge_losses.append(loss_of(unflatten(in_place)))
SEEN["13 merged twice"] = merge_losses[2]
print("loss after 0, 1, 2, 3, 4 merges:", " ".join(f"{loss:.3f}" for loss in merge_losses))

# %% [markdown]
# ### 14. Saved while merged
#
# The same, by way of the disk: the model was merged to evaluate it, and then somebody saves "the
# base" and "the adapter". Each file is fine. Together they apply the update twice. In minilora a
# merged model has no adapter any more.
#
# Caught by `test_a_merged_model_has_no_adapter_left` (`tests/zoo/test_zoo.py`).

# %%
with tempfile.TemporaryDirectory() as folder:
    minilora.save_base(f"{folder}/base", merge(base, healthy, CONFIG), sizes)
    minilora.save_adapter(f"{folder}/adapter", healthy, CONFIG, sizes)
    loaded = minilora.load_model(f"{folder}/base", f"{folder}/adapter")
SEEN["14 saved while merged"] = loss_of(loaded.base, loaded.lora, loaded.lora_config)
print(f"adapter {after:.3f}, loaded again {SEEN['14 saved while merged']:.3f}")

# %% [markdown]
# ### 15. The factors averaged
#
# Two adapters for the same text, from two seeds; you want their mean. The mean of the *updates* is
# good. The mean of the factors multiplies each $A$ with the other's $B$ as well:
# `tutorials/06_merging_and_mixing.py` looks at this at leisure.
#
# Caught by `test_the_mixture_of_any_adapters_is_the_weighted_sum_of_their_updates`
# (`tests/mixing/test_mixing.py`).

# %%
twin, _ = train(lora_init(base, CONFIG, seed=1), CONFIG)
mixed = loss_of(base, *mix([(healthy, CONFIG), (twin, CONFIG)], [0.5, 0.5]))
mean = map_leaves(lambda a, b: (a + b) / 2, healthy, twin)
SEEN["15 factors averaged"] = loss_of(base, mean, CONFIG)
print(f"updates averaged {mixed:.3f}, factors averaged {SEEN['15 factors averaged']:.3f}")

# %% [markdown]
# ### 16. An embedding merged under a tied head
#
# GPT-2 uses one table twice: its rows are the inputs of the first block, and the head multiplies by
# its transpose to get the logits. An adapter of the embedding acts on the first use only. Merge it
# into the table, and the head changes too. minilora refuses.
#
# Caught by `test_an_adapter_of_the_embedding_cannot_be_merged` (`tests/lora/test_lora_config.py`).

# %%
EMBEDDING = LoRAConfig(rank=4, alpha=8.0, targets=("embedding",))
table, table_losses = train(lora_init(base, EMBEDDING, seed=0), EMBEDDING)
refused = ""
try:
    merge(base, table, EMBEDDING)
except minilora.MiniloraError as error:
    refused = str(error)
print(refused)
wte = base["wte"] + update_of(table, "embedding", EMBEDDING).astype(np.float32)
SEEN["16 embedding merged"] = loss_of({**base, "wte": wte})
print(f"adapter {table_losses[-1]:.3f}, merged {SEEN['16 embedding merged']:.3f}")

# %% [markdown]
# ## Bugs of the way back
#
# ### 17. The gradient's way through the adapter forgotten
#
# An adapted map has two ways from $x$ to $y$, so two ways lead back:
# $\mathrm{d}x = \mathrm{d}y\,W^\top + s\,(\mathrm{d}y\,B^\top) A^\top$. It is easy to return the
# first term alone: the weight is frozen, its own backward pass is there, and the factors get their
# gradients. But every map *below* then gets a wrong one. At the start $B = 0$, so the
# forgotten term is zero and every gradient is right to the last bit: a check at the start sees
# nothing. Later the error grows, and the further down, the more; the loss hardly shows it.
#
# Caught by `test_the_gradients_of_an_adapted_linear_map_agree_with_central_differences`
# (`tests/lora/test_lora_laws.py`), where neither factor is zero.


# %%
def pathless_backward(dy, cache):
    _, dlinear, dadapters = adapted_linear_backward(dy, cache)
    dx, _, _ = linear_backward(dy, cache.linear)
    return dx, dlinear, dadapters


def adapter_gradients(lora, targets=targets, rows=slice(None), count=None):
    net = Net(base, sizes, lora, CONFIG)
    return loss_and_grads(net, tokens=tokens[rows], targets=targets[rows], count=count)[::2]


def off(wrong, right):
    """How far gradients are from the right ones, as a share of these."""
    return np.sqrt(
        sum(np.sum((a - b) ** 2) for a, b in zip(leaves(wrong), leaves(right), strict=True))
        / sum(np.sum(b**2) for b in leaves(right))
    )


pathless_errors = {}
for name, lora in {"at the start": fresh, "after training": healthy}.items():
    right = adapter_gradients(lora)[1]["blocks"]
    with patch("minilora.gpt2.adapted_linear_backward", pathless_backward):
        wrong = adapter_gradients(lora)[1]["blocks"]
    pathless_errors[name] = [off(a, b) for a, b in zip(wrong, right, strict=True)]
    print(f"{name:15} error by block:", " ".join(f"{e:6.1%}" for e in pathless_errors[name]))
with patch("minilora.gpt2.adapted_linear_backward", pathless_backward):
    _, pathless_losses = train(fresh, CONFIG)
print(f"no bug: loss {after:.3f}; without the way through the adapter {pathless_losses[-1]:.3f}")

# %% [markdown]
# ### 18. Shards divided by their own count
#
# A batch that is too large is computed in shards, and their gradients are added up. The loss is a
# mean over the *targets*, and some of those are ignored (padding, or a prompt that is not to be
# learned), so shards have different numbers of them. If each shard divides by its own number and
# the results are averaged, a target in a short shard weighs more than one in a long shard: the mean
# of means is not the mean. Here the second shard has 8 targets in each row, the first one 64. Each
# shard has to divide by the count of the whole batch. (Gradient accumulation did this wrong in
# widely used libraries until October 2024. With shards of one length nothing shows.)
#
# Caught by `test_two_halves_of_a_batch_add_up_to_the_whole` (`tests/network/test_network.py`).

# %%
ragged = targets.copy()
middle = len(ragged) // 2
ragged[middle:, 8:] = -100  # ignored
shards = slice(0, middle), slice(middle, None)
all_targets = int((ragged != -100).sum())
whole_loss, whole = adapter_gradients(healthy, ragged)


def in_shards(shard_targets, *, count, share):
    """The loss and the gradients of the whole, summed from those of the shards."""
    parts = [adapter_gradients(healthy, shard_targets, rows, count) for rows in shards]
    summed = map_leaves(lambda *grads: share * sum(grads), *(grads for _, grads in parts))
    return share * sum(float(loss) for loss, _ in parts), summed


by_count = {
    "all counts": in_shards(ragged, count=all_targets, share=1.0),
    "own counts": in_shards(ragged, count=None, share=0.5),
    "own counts, equal shards": in_shards(targets, count=None, share=0.5),
}
expected = {"own counts, equal shards": adapter_gradients(healthy)}
shard_errors = {}
for name, (loss, grads) in by_count.items():
    right_loss, right = expected.get(name, (whole_loss, whole))
    shard_errors[name] = off(grads, right)
    print(f"{name:25} loss {loss:.3f}, should be {right_loss:.3f}; gradients off by "
          f"{shard_errors[name]:.1%}")  # fmt: skip

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
for shift, (name, errors) in zip((-0.2, 0.2), pathless_errors.items(), strict=True):
    left.bar(np.arange(len(errors)) + shift, errors, 0.4, label=name)
left.set(xlabel="block", ylabel="error of its adapters' gradients")
left.set_title("17 wrong, but not at the start")
left.set_xticks(range(sizes.n_layer))
left.margins(y=0.4)
left.legend()
right.barh(list(shard_errors), list(shard_errors.values()), color=["#2171b5", "#d94801", "#6baed6"])
right.invert_yaxis()
right.set(xlabel="error of the gradients", title="18 a mean of means")
show(figure, "Two wrong gradients that a fresh adapter and equal shards hide")

# %% [markdown]
# ## The zoo at a glance
#
# What a user sees of the bugs that strike after training. Each bar is the loss of the model that
# comes out; the dotted line is the base, without any training, and the solid one what would have
# come out without the bug.

# %%
without_the_bug = {
    "5 trained with s²": doubled_losses[-1],
    "8 k and v swapped": qv_losses[-1],
    "15 factors averaged": mixed,
    "16 embedding merged": table_losses[-1],
}
figure, axes = plt.subplots(figsize=(7.5, 4))
for i, (name, loss) in enumerate(SEEN.items()):
    axes.barh(i, loss, color="#2171b5" if name == "no bug" else "#d94801")
    axes.plot([without_the_bug.get(name, after)] * 2, [i - 0.4, i + 0.4], color="black")
axes.axvline(before, color="#636363", linestyle=":")
axes.set_yticks(range(len(SEEN)), list(SEEN))
axes.invert_yaxis()
axes.set(xlabel="loss (nats per byte)")
show(figure, "Each of these bugs costs loss, and none raises an error (line: without the bug)")

# %% [markdown]
# ## What to remember
#
# - A falling loss proves little. Bugs 3, 4, 5, 9, 12 and 17 train well enough to be believed.
# - Each of these bugs breaks a *law* that is easy to state: a fresh adapter changes nothing; merged
#   equals unmerged; the base keeps its bits; gradients agree with differences of the loss. Test
#   laws, not examples.
# - What cannot be expressed cannot go wrong: pure functions instead of modes, two trees instead of
#   flags, an error instead of a guess.
#
# ## Exercises
#
# [Solutions](../docs/solutions.md), each with what the programs print.
#
# 1. Bug 4 hides from Adam ([train with it in your browser](../docs/live.md#lora_backward)). Replace
#    `adamw` by plain gradient descent. Does it show now? When would it not?
# 2. Find a nineteenth bug: change one character of `minilora/lora.py`, and run the tests. If none
#    fails, you have found either a bug in the tests or a change that changes nothing. Which?
# 3. A colleague multiplies the mask of dropout by nothing: entries are 0 or 1, not 0 or $1/(1-p)$.
#    Which law is broken, and which test says so? (Look into `tests/lora/test_lora_laws.py`.)

# %%
assert not any(x.any() for x in leaves(stuck)), "1: something moved"
assert set(zero_losses[:-1]) == {before}, "1: the loss moved"
assert abs(zero_losses[-1] - before) < 1e-5, "1: the loss of the whole logits is another"
assert noisy_losses[0] > before + 0.05, "2: the start is the base's"
assert spectra["A constant"][1] < 1e-4 * spectra["A constant"][0], "3: more than one direction"
assert spectra["no bug"][3] > 1e-3 * spectra["no bug"][0], "3: fewer than four without the bug"
assert abs(slope / claim - 1) < 1e-5, "4: the right gradient is wrong"
assert slope / forgetful_claim > 1.5, "4: the wrong gradient is right"
assert abs(forgetful_losses[-1] - after) < 0.1 * (before - after), "4: the loss shows it"
assert SEEN["5 trained with s²"] > doubled_losses[-1] + 0.02, "5: merged equals unmerged"
assert SEEN["6 merged without s"] > after + 0.02, "6: merging needs no scale"
assert SEEN["8 k and v swapped"] > qv_losses[-1], "8: the order does not matter"
assert "value" in refusal and count(half) * 2 == count(on_qv), "9: the typo was noticed"
assert half_losses[-1] > qv_losses[-1], "9: half the adapters are as good"
assert abs(dropped - before) < 1e-6 and wrongly_dropped > before + 0.01, "10: dropout"
assert moved > 0 and decay_losses[-1] > decay_losses[0], "11: the base stays"
assert kept_for_nothing > 1.2 * kept, "12: nothing more is kept"
assert abs(merge_losses[1] - after) < 1e-4, "13: one merge is not the adapter"
assert abs(SEEN["14 saved while merged"] - merge_losses[2]) < 1e-4, "14: not the same as twice"
assert "embedding" in refused, "16: merging was not refused"
assert max(pathless_errors["at the start"]) == 0.0, "17: the start shows it"
assert pathless_errors["after training"][0] > 0.01, "17: the lowest block's gradients are right"
assert shard_errors["all counts"] < 1e-5, "18: with the whole count the shards do not add up"
assert shard_errors["own counts, equal shards"] < 1e-5, "18: equal shards do not add up"
assert shard_errors["own counts"] > 0.05, "18: the mean of means is the mean"
if not SMALL:
    assert SEEN["7 o transposed"] > after, "7: the transpose is as good"
    assert merge_losses[2] > after + 0.1, "13: twice is as good as once"
    assert SEEN["15 factors averaged"] > mixed + 0.05, "15: averaging the factors does no harm"
    assert SEEN["16 embedding merged"] > table_losses[-1], "16: merging does no harm"
    for name, loss in SEEN.items():
        lost = loss - without_the_bug.get(name, after)
        assert (lost > 0) == (name != "no bug"), f"{name}: the bug costs {lost:.4f}"
