# %% [markdown]
# # Merging, switching and mixing adapters
#
# An adapter is a small change of a large model. Because it is kept apart, you can do three things
# with it after training: **merge** it into the weights, **switch** it for another one, and **mix**
# several of them. Each is a line of linear algebra. One of them has a trap, and we shall fall into
# it on purpose.
#
# The weight is $W$ (I, O), with rows as inputs: $y = xW$. An adapter adds $\Delta W = sAB$, where
# $A$ is (I, R), $B$ is (R, O), $R$ is the rank and $s$ a constant, the scale.

# %%
import dataclasses
import os
import pydoc_data.topics

import matplotlib.pyplot as plt
import numpy as np

import minilora
from minilora.adapters import adapters
from minilora.data import draw_batch
from minilora.figures import show
from minilora.loss import cross_entropy_forward
from minilora.mixing import mix
from minilora.tree import flatten, map_leaves, nbytes

SMALL = os.environ.get("MINILORA_SMALL") == "1"  # a quick run, for the tests
plt.rcParams.update({"figure.facecolor": "white", "figure.constrained_layout.use": True})

# %% [markdown]
# ## Two adapters on one base
#
# The base that comes with minilora has read English prose. We train two adapters on it: one on
# Python source (the standard library of the Python that runs this tutorial), one on the text of
# Python's reference manual, which is part of the standard library too. A token is one byte.

# %%
base = minilora.load_model()
source = minilora.load_corpus("python", base.tokenizer)

manual = minilora.load_corpus(pydoc_data.topics.__file__, base.tokenizer)

LORA = minilora.LoRAConfig(rank=2, alpha=2.0, targets=("qkv", "o", "up", "down"))


def trained_on(corpus, seed):
    settings = minilora.TrainConfig(
        steps=12 if SMALL else 60,
        batch=4,
        context=128,
        lr=1e-2,
        warmup=5,
        eval_tokens=128,
        seed=seed,
    )
    return minilora.adapt(base, corpus, LORA, settings)[0].lora


first = trained_on(source, seed=0)
second = trained_on(manual, seed=1)

# %% [markdown]
# ## Switching costs nothing
#
# `with_adapter` makes another model on the same base. It copies no weight: both models hold the
# same arrays. So you can keep one base in memory and a hundred adapters beside it.

# %%
writes_source = base.with_adapter(first, LORA)
writes_manual = base.with_adapter(second, LORA)
shared = np.shares_memory(writes_source.base["wte"], writes_manual.base["wte"])
print(f"the models share their weights: {shared}")
print(f"base {nbytes(base.base) / 1e6:.1f} MB, one adapter {nbytes(first) / 1e6:.1f} MB")

# %% [markdown]
# We judge a model by its loss on text that no adapter was trained on: nats per byte, on the same
# windows each time. Each adapter is better than the base on its own domain. What does it do on the
# other's?

# %%
rng = np.random.default_rng(0)
TEXTS = {
    name: draw_batch(corpus.held_out, batch=4 if SMALL else 24, context=128, rng=rng)
    for name, corpus in {"source": source, "manual": manual}.items()
}


def losses(model):
    """Nats per byte on held-out source, and on the held-out manual."""
    return [
        float(cross_entropy_forward(model.logits(tokens), targets=targets)[0])
        for tokens, targets in TEXTS.values()
    ]


of_base, of_first, of_second = losses(base), losses(writes_source), losses(writes_manual)
print("                  on source   on manual")
for name, pair in [("base", of_base), ("source adapter", of_first), ("manual adapter", of_second)]:
    print(f"{name:16} {pair[0]:10.3f} {pair[1]:11.3f}")

# %% [markdown]
# ## Merging is exact, up to rounding
#
# Matrix multiplication distributes: $xW + x(sAB) = x(W + sAB)$. So the update can be added to the
# weight once, $W' = W + sAB$ [LORA.10], and the adapted model then costs what the base costs.
#
# In real numbers both sides are equal. In floating point they are not quite: each $W'_{ij}$ is
# rounded to a number that the format has. How much does that change? We keep the same merge in
# three formats; the model is always evaluated in float64, so that only the rounding of the weights
# shows.


# %%
def cast(tree, dtype):
    return map_leaves(lambda leaf: leaf.astype(dtype), tree)


def logits(weights, lora=None):
    """Logits on a little text, computed in float64 whatever the weights are kept in."""
    lora = lora and cast(lora, np.float64)
    model = dataclasses.replace(base, base=cast(weights, np.float64), lora=lora, lora_config=LORA)
    return model.logits(TEXTS["source"][0][:2])


exact = logits(base.base, first)
merged = minilora.merge(cast(base.base, np.float64), cast(first, np.float64), LORA)
FORMATS = (np.float64, np.float32, np.float16)
errors = [np.abs(logits(cast(merged, dtype)) - exact).max() for dtype in FORMATS]
for dtype, error in zip(FORMATS, errors, strict=True):
    print(f"merged and kept in {np.dtype(dtype)}: the logits differ by at most {error:.1e}")

# %% [markdown]
# The difference is what the digits of each format allow. float16 is good enough here, but look
# closer. Near a weight $W_{ij}$ the numbers of a format have a certain spacing, and an update of
# less than half of it disappears when the sum is rounded. The histogram compares each entry of the
# update with the spacing of float16 at its weight. What lies left of the line is lost.

# %%
path = "blocks.0.attn.qkv"
W = flatten(base.base)[f"{path}.w"].astype(np.float64)
ab = adapters(first)[path]
update = LORA.scale_of(path) * ab["A"].astype(np.float64) @ ab["B"]
spacing = np.spacing(np.abs(W).astype(np.float16)).astype(np.float64)
ratio = np.log2(np.abs(update) / spacing + 1e-9)
vanished = float((ratio < -1).mean())

figure, axes = plt.subplots(figsize=(6.5, 3.2))
axes.hist(ratio.ravel(), bins=120, range=(-6, 16), color="#6baed6")
axes.axvline(-1, color="#d94801")
axes.set(xlabel="log2 of |update| / spacing of float16 at the weight", ylabel="entries")
show(figure, f"{path}: {vanished:.1%} of the update's entries vanish in float16")
print(f"{vanished:.1%} of the entries of one update vanish in float16")

# %% [markdown]
# ## Unmerging does not give the base back
#
# We merge an update, subtract it again, and compare the result with the base. (The base's file is
# float16; we add a little noise to its weights so that they use all digits of float32, as most
# weights do.)
#
# **Predict.** How many of the float32 weights come back different? (a) none, (b) about one in a
# million, (c) about one in ten.
#
# <details><summary>Answer</summary>
#
# (c) about one in ten, as printed below: each of the two sums is rounded. The changes are tiny, but
# the bits differ.
#
# </details>


# %%
def left_after_unmerging(dtype):
    """The share of weights that changed, and the largest change, after merge and unmerge."""
    noise = np.random.default_rng(1)
    start = map_leaves(
        lambda w: (w * (1 + 1e-3 * noise.standard_normal(w.shape))).astype(dtype), base.base
    )
    adapter = cast(first, dtype)
    end = minilora.unmerge(minilora.merge(start, adapter, LORA), adapter, LORA)
    change = np.concatenate(
        [
            np.abs(flatten(end)[f"{p}.w"].astype(np.float64) - flatten(start)[f"{p}.w"]).ravel()
            for p in adapters(first)
        ]
    )
    return (change > 0).mean(), change.max()


unmerged = {dtype: left_after_unmerging(dtype) for dtype in (np.float32, np.float16)}
for dtype, (share, worst) in unmerged.items():
    print(f"{np.dtype(dtype)}: {share:.1%} of the weights changed, by at most {worst:.1e}")

# %% [markdown]
# So keep the base, and do not rely on unmerging to get it back. In minilora `merge` is a pure
# function: it returns new weights and leaves the old ones alone. (A merge that works in place
# invites a worse mistake, merging twice; it is in the bug zoo, `tutorials/09_bug_zoo.py`.)
#
# ## Mixing: half of each
#
# Suppose you want a model that does a bit of both. The update should be the weighted sum
#
# $$\Delta = w_1 s A_1 B_1 + w_2 s A_2 B_2 .$$
#
# It is tempting to average the factors, $A = w_1 A_1 + w_2 A_2$ and $B = w_1 B_1 + w_2 B_2$: the
# shapes fit, and the rank stays what it was.
#
# **Predict.** With $w_1 = w_2 = 1/2$, which share of $s A_1 B_1$ is in the product of the averaged
# factors? (a) a half, as wanted, (b) a quarter, (c) all of it.
#
# <details><summary>Answer</summary>
#
# (b) a quarter. Multiply it out:
#
# $$AB = w_1^2 A_1 B_1 + w_2^2 A_2 B_2 + w_1 w_2 \, (A_1 B_2 + A_2 B_1) .$$
#
# The wanted terms have shrunk to $w^2$, and two **cross terms** have appeared.
#
# </details>
#
# In a cross term, $A_1$ reads directions of the input that $B_1$ was trained to use, and $B_2$ was
# not.
#
# The exact way is to put the factors side by side:
#
# $$\begin{pmatrix} A_1 & A_2 \end{pmatrix}
# \begin{pmatrix} w_1 s B_1 \\ w_2 s B_2 \end{pmatrix} = w_1 s A_1 B_1 + w_2 s A_2 B_2 .$$
#
# This is one adapter, of rank $2R$. `minilora.mixing.mix` does it for any number of adapters
# (`docs/mixing.md`).


# %%
def averaged(weight):
    """The tempting mixture: the weighted mean of the factors."""
    return map_leaves(lambda a, b: weight * a + (1 - weight) * b, first, second), LORA


def concatenated(weight):
    """The exact one."""
    return mix([(first, LORA), (second, LORA)], [weight, 1 - weight])


def update_of(lora, config, path):
    ab = adapters(lora)[path]
    return config.scale_of(path) * ab["A"].astype(np.float64) @ ab["B"]


def wanted(path):
    return 0.5 * update_of(first, LORA, path) + 0.5 * update_of(second, LORA, path)


def off_by(mixture):
    """The distance from the wanted updates over their length, all weights as one vector."""
    difference = sum(np.sum((update_of(*mixture, p) - wanted(p)) ** 2) for p in adapters(first))
    return np.sqrt(difference / sum(np.sum(wanted(p) ** 2) for p in adapters(first)))


off_exact, off_averaged = off_by(concatenated(0.5)), off_by(averaged(0.5))
print(f"half of each, by concatenation: off by {off_exact:.1e}")
print(f"half of each, by averaging:     off by {off_averaged:.1%}")

# %% [markdown]
# Here are the four products of the two adapters in a corner of one weight. The wanted update is the
# mean of the two on the diagonal. Averaging the factors gives the mean of all four.

# %%
path = "blocks.0.mlp.up"
factors = [adapters(tree)[path] for tree in (first, second)]
corner = (slice(0, 64), slice(0, 64))
products = [[LORA.scale_of(path) * a["A"] @ b["B"] for b in factors] for a in factors]
limit = 0.7 * max(np.abs(p[corner]).max() for row in products for p in row)
figure, grid = plt.subplots(2, 2, figsize=(6.5, 6.2))
for i in range(2):
    for j in range(2):
        picture = grid[i, j].imshow(products[i][j][corner], cmap="RdBu", vmin=-limit, vmax=limit)
        kind = "trained" if i == j else "cross term"
        length = np.linalg.norm(products[i][j])
        grid[i, j].set_title(f"$s A_{i + 1} B_{j + 1}$: {kind}, length {length:.2f}", fontsize=10)
        grid[i, j].set(xticks=[], yticks=[])
figure.colorbar(picture, ax=grid, shrink=0.6)
show(figure, "Averaging the factors adds cross terms that nothing was trained for")

# %% [markdown]
# What does that do to the model? We vary the weight $w_1$ from 0 (manual only) to 1 (source only)
# and follow the two losses. Each point is a model; lower and further left is better.
#
# **Predict.** Take half of each adapter. Which mixture has the lower sum of both losses? (a) the
# exact one, (b) that of the averaged factors, (c) they are equal.
#
# <details><summary>Answer</summary>
#
# (a) the exact one. It is better on the manual than the source adapter, and better on source
# than the manual adapter. The averaged factors take a detour through worse models.
#
# </details>

# %%
WEIGHTS = np.linspace(0, 1, 3 if SMALL else 5)
paths = {
    name: np.array([losses(base.with_adapter(*mixture(float(w)))) for w in WEIGHTS])
    for name, mixture in {"concatenated": concatenated, "averaged": averaged}.items()
}

figure, axes = plt.subplots(figsize=(6.5, 4.5))
axes.plot(*of_base, "s", color="#636363")
axes.plot(*paths["averaged"].T, "o--", color="#d94801", label="factors averaged")
axes.plot(*paths["concatenated"].T, "o-", color="#2171b5", label="factors concatenated")
names = {"base": of_base, "source adapter": of_first, "manual adapter": of_second}
for name, point in names.items():
    axes.annotate(name, point, textcoords="offset points", xytext=(8, 6))
axes.set(xlabel="loss on source (nats per byte)", ylabel="loss on manual (nats per byte)")
axes.margins(x=0.2, y=0.1)
axes.legend()
show(figure, "The exact mixture keeps some of both; averaged factors take a detour")

middle = len(WEIGHTS) // 2
print("half of each  on source   on manual")
for name, points in paths.items():
    print(f"{name:13} {points[middle][0]:9.3f} {points[middle][1]:11.3f}")

# %% [markdown]
# The exact mixture moves along a curve that bends towards the good corner.
#
# ## What to remember
#
# - Switching is free: an adapter never touches the base.
# - Merging is exact up to the rounding of the format, and undoing it is not exact.
# - Mix updates, not factors: the product of two means is not the mean of the products.
#
# ## Exercises
#
# [Solutions](../docs/solutions.md), each with what the programs print.
#
# 1. Train the second adapter with `seed=0`, so that both start from the same $A$. Is averaging less
#    wrong now? Why? (Put $A_1 = A_2$ into the formula above.)
# 2. The exact mixture has rank $2R$. Cut it back to rank $R$ with a singular value decomposition of
#    each update. How far off is it, compared with averaging?
# 3. Mix with the weights 1 and -1 on two copies of one adapter. What must come out?

# %%
assert shared, "switching copied the base"
assert of_first[0] < of_base[0] and of_second[1] < of_base[1], "an adapter learned nothing"
assert of_first[0] < of_second[0] and of_second[1] < of_first[1], "each is best at home"
assert errors[0] < 1e-9 < errors[1] < 1e-4 < errors[2] < 1.0, "merging is exact up to rounding"
assert 0 < vanished < 0.5, "some of the update vanishes in float16"
assert unmerged[np.float32][0] > (0.01 if SMALL else 0.05), "float32 comes back"
assert unmerged[np.float32][1] < 1e-6, "float32 comes back wrong"
assert unmerged[np.float16][0] > 0 and unmerged[np.float16][1] < 1e-2, "float16 less so"
assert off_exact < 1e-6, "concatenation is exact"
assert off_averaged > 0.3, "averaging the factors is another update"
half, half_averaged = paths["concatenated"][middle], paths["averaged"][middle]
assert half[0] < of_second[0] and half[1] < of_first[1], "half of each is half good at both"
assert half_averaged.sum() > half.sum(), "averaging the factors costs loss"
