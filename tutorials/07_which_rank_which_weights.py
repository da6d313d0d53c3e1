# %% [markdown]
# # Which rank, and which weights?
#
# LoRA leaves you two choices: the rank $R$ of the update, and the weights that get one. Section 7
# of the paper (Hu et al. 2021) looks for answers with GPT-3, and asks what the learned updates look
# like. We repeat its experiments in miniature, with the base that comes with minilora, in a minute.
#
# Small experiments are noisy, and small models are not large ones. Hence two rules: we run
# everything with two seeds and show both, and whenever we see structure we ask what chance alone
# would give.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np

import minilora
from minilora.adapters import adapters, weight_of
from minilora.data import draw_batch
from minilora.figures import show
from minilora.loss import cross_entropy_forward
from minilora.tree import count, flatten

SMALL = os.environ.get("MINILORA_SMALL") == "1"  # a quick run, for the tests
plt.rcParams.update({"figure.facecolor": "white", "figure.constrained_layout.use": True})

base = minilora.load_model()
corpus = minilora.load_corpus("python", base.tokenizer)
STEPS, WINDOWS, SEEDS = (2, 2, (0, 1)) if SMALL else (40, 48, (0, 1))

# %% [markdown]
# ## One experiment
#
# The base has read English prose and now learns Python, in a few seconds of training. The result is
# one number: the loss in nats per byte on files of the standard library that were held out. It is
# always measured on the same windows, and runs with the same seed see the same batches. Much of the
# noise is therefore common to the runs, and cancels when we compare them.

# %%
WINDOWS_OF_TEXT = draw_batch(
    corpus.held_out, batch=WINDOWS, context=64, rng=np.random.default_rng(0)
)


def loss_of(model):
    tokens, targets = WINDOWS_OF_TEXT
    return float(cross_entropy_forward(model.logits(tokens), targets=targets)[0])


def settings(seed, **others):
    return minilora.TrainConfig(
        **{"steps": STEPS, "batch": 4, "context": 64, "lr": 5e-3, **others},
        warmup=5,
        eval_tokens=64,
        seed=seed,
    )


def adapt(targets, rank, alpha, seed):
    """An adapted model and its loss."""
    config = minilora.LoRAConfig(rank=rank, alpha=float(alpha), targets=targets)
    model, _ = minilora.adapt(base, corpus, config, settings(seed))
    return model, loss_of(model)


before = loss_of(base)
print(f"the base, before: {before:.3f} nats per byte")

# %% [markdown]
# ## Does the rank matter?
#
# The paper adapts the query and value projections, `q` and `v`, and finds that rank 1 is nearly as
# good as rank 64. Its adapters are scaled by $s = \alpha / R$ with a fixed $\alpha$. We do the same
# with $\alpha = 8$; and once more with $\alpha = R$, so that $s = 1$, which looks harmless.
#
# **Predict.** With a fixed $\alpha$, how much of the gain of rank 64 does rank 1 reach? (a) about a
# tenth, (b) about a half, (c) more than four fifths.
#
# <details><summary>Answer</summary>
#
# (c) more than four fifths: one direction per weight does nearly all of the work. With
# $\alpha = R$ the same experiment gives a lower share, for a reason that has nothing to do with
# rank; see below.
#
# </details>

# %%
RANKS = (1, 8, 64)
models, rank_loss = {}, {}
for seed in SEEDS:
    for rank in RANKS:
        for alpha in {8, rank}:
            model, rank_loss[rank, alpha, seed] = adapt(("q", "v"), rank, alpha, seed)
            models[rank, alpha, seed] = model


def curve(alpha_of, seed):
    return [rank_loss[rank, alpha_of(rank), seed] for rank in RANKS]


CHOICES = {"alpha = 8": lambda rank: 8, "alpha = R": lambda rank: rank}
COLOURS = {"alpha = 8": "#2171b5", "alpha = R": "#d94801"}

figure, axes = plt.subplots(figsize=(6.5, 3.8))
axes.axhline(before, color="#636363", linestyle=":", label="base")
for name, alpha_of in CHOICES.items():
    for seed in SEEDS:
        label = name if seed == SEEDS[0] else None
        axes.plot(RANKS, curve(alpha_of, seed), "o-", color=COLOURS[name], label=label)
axes.set_xscale("log", base=2)
axes.set(xlabel="rank of the adapters on q and v", ylabel="held-out loss (nats per byte)")
axes.legend()
show(figure, "Whether the rank matters depends on what is held fixed: alpha, or the scale")

print("rank          " + "".join(f"{rank:8d}" for rank in RANKS))
for name, alpha_of in CHOICES.items():
    for seed in SEEDS:
        print(f"{name} seed {seed}  " + "".join(f"{x:8.3f}" for x in curve(alpha_of, seed)))


def share_of_gain(alpha_of):
    """What rank 1 gains, as a share of what rank 64 gains; mean over the seeds."""
    losses = np.mean([curve(alpha_of, seed) for seed in SEEDS], axis=0)
    return (before - losses[0]) / (before - losses[-1])


flat, steep = share_of_gain(CHOICES["alpha = 8"]), share_of_gain(CHOICES["alpha = R"])
print(f"rank 1 gains, of what rank 64 gains: {flat:.0%} with alpha = 8, {steep:.0%} with alpha = R")

# %% [markdown]
# We have two answers to one question. With a fixed $\alpha$ the curve is nearly flat, as in the
# paper. With $\alpha = R$ the rank seems to matter a lot. But look at what we changed. Adam moves
# every entry of $A$ and $B$ by about the learning rate, whatever the scale. So with $s = 1$ an
# update of rank 64, a sum of 64 such products, moves much further in a step than one of rank 1, and
# over so few steps the one that moves further wins. We did not compare ranks; we compared learning
# rates.
#
# The lesson about experiments: *say what was held fixed*. The lesson about LoRA is why there is an
# $\alpha / R$ at all (Hu et al., §4.1): it lets you change the rank without searching for a
# learning rate again, at least roughly.
#
# ## Which weights?
#
# Now the number of trained parameters is fixed, and only the place changes. An adapter of rank $R$
# on an (I, O) weight has $R(I + O)$ parameters. So one weight gets a high rank, or many weights get
# a low one. We take $s = 1$ throughout. As we just saw, that favours high ranks: here, the adapters
# that sit on one weight only.
#
# **Predict.** Which use of the same budget learns the most? (a) rank 16 on `q`, (b) rank 8 on `q`
# and `v`, (c) rank 2 on every weight.
#
# <details><summary>Answer</summary>
#
# (c) rank 2 on every weight, although the scale favours the others. The MLP's weights, `up` and
# `down`, are where a small model that changes from prose to code has most to learn.
#
# </details>

# %%
PLACES = {
    "q, R=16": (("q",), 16),
    "v, R=16": (("v",), 16),
    "q v, R=8": (("q", "v"), 8),
    "q k v o, R=4": (("q", "k", "v", "o"), 4),
    "all, R=2": (("qkv", "o", "up", "down"), 2),
}
place_loss, sizes = {}, {}
for name, (targets, rank) in PLACES.items():
    for seed in SEEDS:
        if targets == ("q", "v"):
            model, place_loss[name, seed] = models[8, 8, seed], rank_loss[8, 8, seed]
        else:
            model, place_loss[name, seed] = adapt(targets, rank, rank, seed)
    sizes[name] = count(model.lora)
    found = "  ".join(f"{place_loss[name, seed]:.3f}" for seed in SEEDS)
    print(f"{name:13} {sizes[name]:,} parameters   loss {found}")

figure, axes = plt.subplots(figsize=(6.5, 3.4))
for i, name in enumerate(PLACES):
    gains = [before - place_loss[name, seed] for seed in SEEDS]
    axes.barh(i, np.mean(gains), color="#9ecae1")
    axes.plot(gains, [i] * len(gains), "o", color="#08519c", markersize=4)
axes.set_yticks(range(len(PLACES)), list(PLACES))
axes.invert_yaxis()
axes.set(xlabel="gain over the base (nats per byte); dots are the seeds")
axes.set_title(f"{sizes['q, R=16']:,} parameters in each case")
show(figure, "At an equal budget, a low rank on every weight beats a high rank on one")

# %% [markdown]
# Of these, `q` alone is the worst use of the budget. (In the paper's table 5 only `k` alone, which
# we did not run, is worse.) Between `v`, `q v` and `q k v o` the seeds hardly let us choose,
# although the high ranks had the advantage of longer steps. The last line goes beyond the paper's
# table, which adapts attention only. It is the best of all, at the lowest rank.
#
# ## What does an update look like?
#
# LoRA bets that a low rank is enough for the update $\Delta W$ of a weight. Full fine-tuning is
# free to make any update. Does it make one of low rank? We train the whole base for a few steps and
# look at the singular values $\sigma_1 \ge \sigma_2 \ge \dots$ of its $\Delta W$. The share
# $\sum_{i \le k} \sigma_i^2 / \sum_i \sigma_i^2$ says how much of $\Delta W$ its best
# approximation of rank $k$ holds. A random matrix gives the baseline.

# %%
whole, _ = minilora.adapt(
    base, corpus, None, settings(0, method="full", lr=1e-3, steps=max(1, STEPS // 2))
)
WIDTH, BLOCKS = base.config.n_embd, base.config.n_layer
old, new = flatten(base.base), flatten(whole.base)


def weight(path, weights=old):
    """The base's weight at a LoRA path, float64: q and v are columns of the fused qkv."""
    name, columns = weight_of(path, WIDTH)
    return weights[name][:, columns].astype(np.float64)


def update(model, path):
    ab = adapters(model.lora)[path]
    return model.lora_config.scale_of(path) * ab["A"].astype(np.float64) @ ab["B"]


def share_of_rank(matrix):
    """For each k, the share of the matrix that its best approximation of rank k holds."""
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    return np.cumsum(squares) / squares.sum()


rng = np.random.default_rng(0)
paths = {t: [f"blocks.{i}.attn.{t}" for i in range(BLOCKS)] for t in "qv"}
shares = {
    f"{kind}, {t}": np.mean([share_of_rank(change(p)) for p in paths[t]], axis=0)
    for t in "qv"
    for kind, change in {
        "full fine-tuning": lambda p: weight(p, new) - weight(p),
        "LoRA, R=64": lambda p: update(models[64, 8, 0], p),
    }.items()
}
shares["random matrix"] = share_of_rank(rng.standard_normal((WIDTH, WIDTH)))

figure, axes = plt.subplots(figsize=(6.5, 3.8))
styles = {"full": "#2171b5", "LoRA": "#d94801", "random": "#969696"}
for name, values in shares.items():
    colour, line = styles[name.split()[0].strip(",")], "--" if name.endswith("v") else "-"
    axes.plot(range(1, WIDTH + 1), values, line, color=colour, label=name)
axes.set_xscale("log", base=2)
axes.set(xlabel="rank k", ylabel="share of ΔW held by rank k", ylim=(0, 1.02))
axes.legend(fontsize=9)
show(figure, "A few directions hold much of a full update, and nearly all of LoRA's")
for name, values in shares.items():
    print(f"{name:20} rank 8 of {WIDTH} holds {values[7]:.0%}")

# %% [markdown]
# The full update is not of low rank in the strict sense: the curve keeps rising. But a few
# directions hold a large share of it, several times as much as in a random matrix. That is the
# sense in which the bet is a good one. And LoRA uses hardly any of its 64 directions. (The paper
# finds that $\Delta W_q$ has a higher rank than $\Delta W_v$. If so, the solid lines run below the
# dashed ones. But the paper measures this in another way, which comes next.)
#
# ## Do two trainings find the same directions?
#
# Take the adapters of rank 8 and of rank 64. Are the directions of the small one among those of the
# large one? The columns of $A$ span the inputs that an adapter reads. Let $U_8$ hold the
# left-singular vectors of the first adapter's $A$, the strongest first, and $U_{64}$ those of the
# second. The paper measures how much of the span of the first $i$ lies in the span of the first $j$
# by
#
# $$\varphi(i, j) = \frac{\lVert U_{8,\,1..i}^\top \, U_{64,\,1..j} \rVert_F^2}{\min(i, j)},$$
#
# where $\lVert M \rVert_F$ is the root of the sum of all squared entries of $M$. It is 1 when one
# span contains the other and 0 when they are orthogonal.
#
# **Predict.** Take two *random* spaces, of dimensions $i = 8$ and $j = 64$, in $d = 256$
# dimensions. What is $\varphi$ on average? (a) 0, (b) 1/4, (c) 1/2.
#
# <details><summary>Answer</summary>
#
# (b) 1/4: it is $\max(i, j) / d$, here 64 / 256. A picture of $\varphi$ means nothing without this
# baseline; the one below shows the difference from it.
#
# </details>


# %%
def directions(model, path):
    return np.linalg.svd(adapters(model.lora)[path]["A"].astype(np.float64), full_matrices=False)[0]


def similarity(first, second):
    """φ(i, j) for all i ≤ 8 and j ≤ 64: (8, 64)."""
    products = first[:, :8].T @ second[:, :64]
    sums = np.cumsum(np.cumsum(products**2, axis=0), axis=1)
    i, j = np.meshgrid(np.arange(1, 9), np.arange(1, 65), indexing="ij")
    return sums / np.minimum(i, j)


def mean_similarity(pair, target):
    """φ of two models, averaged over the blocks."""
    return np.mean([similarity(*(directions(m, p) for m in pair)) for p in paths[target]], axis=0)


def random_space(dimension):
    return np.linalg.qr(rng.standard_normal((WIDTH, dimension)))[0]


low, high, other = models[8, 8, 0], models[64, 8, 0], models[64, 8, 1]
PAIRS = {
    "R=8 and R=64, same batches": (low, high),
    "R=8 and R=64, other batches": (low, other),
    "R=64 twice, other batches": (high, other),
}
phi = {f"{t}: {name}": mean_similarity(pair, t) for name, pair in PAIRS.items() for t in "qv"}
chance = np.mean([similarity(random_space(8), random_space(64)) for _ in range(BLOCKS)], axis=0)
i, j = np.meshgrid(np.arange(1, 9), np.arange(1, 65), indexing="ij")
pictures = {**phi, "two random spaces": chance}
baseline = np.maximum(i, j) / WIDTH

figure, grid = plt.subplots(4, 2, figsize=(9, 6.4), sharex=True)
for axes, (name, values) in zip(grid.flat, pictures.items(), strict=False):
    picture = axes.imshow(
        values - baseline, vmin=-1, vmax=1, aspect="auto", extent=(0.5, 64.5, 8.5, 0.5), cmap="RdBu"
    )
    axes.set_title(name, fontsize=10)
    axes.set(ylabel="i", yticks=[1, 8])
for axes in grid[-1]:
    axes.set_xlabel("j")
grid[-1, -1].set_axis_off()
figure.colorbar(picture, ax=grid, shrink=0.5, label="φ(i, j) less max(i, j) / d")
show(figure, "A few strongest directions overlap far more than by chance (blue)")

print("phi at i, j:                       1, 1      1, 8      8, 8     8, 64")
for name, values in {**pictures, "max(i, j) / d": baseline}.items():
    at = [values[0, 0], values[0, 7], values[7, 7], values[7, 63]]
    print(f"{name:30}" + "".join(f"{x:10.3f}" for x in at))

shared = {t: np.diagonal(phi[f"{t}: R=64 twice, other batches"])[[0, 1, 3, 7]] for t in "qv"}
print("two seeds at R=64, phi at i, i:    1, 1      2, 2      4, 4      8, 8")
for t, values in shared.items():
    print(f"{t:30}" + "".join(f"{x:10.3f}" for x in values))

# %% [markdown]
# The strongest directions overlap far more than by chance, between ranks and between seeds, and the
# two random spaces show no colour at all. So training finds a few directions again and again, and
# the rest of the 64 are close to the random start of $A$.
#
# The paper sees the same in GPT-3, where the top directions of rank 8 and of rank 64 overlap by
# more than one half. But compare the first row with the second: the same two ranks agree less when
# they did not read the same batches. Part of what they share is the text that they happened to see.
#
# ## Does the update repeat the weight, or amplify something else?
#
# Let $\Delta W = U S V^\top$, with its $R$ left- and right-singular vectors $U$ and $V$. Then
# $\lVert U^\top W V \rVert_F$ says how much of the base's $W$ lies in the directions of the update.
# The paper compares it with the same for the strongest directions of $W$ itself, and for random
# ones, and calls $\lVert \Delta W \rVert_F / \lVert U^\top W V \rVert_F$ the **amplification
# factor**.


# %%
def in_directions_of(U, V, W):
    return float(np.linalg.norm(U.T @ W @ V))


def top(matrix, rank=8):
    U, _, Vt = np.linalg.svd(matrix)
    return U[:, :rank], Vt[:rank].T


rows = []
for t in "qv":
    for path in paths[t]:
        W, dW = weight(path), update(low, path)
        seen = [
            in_directions_of(*UV, W) for UV in (top(dW), top(W), (random_space(8), random_space(8)))
        ]
        rows.append((np.linalg.norm(dW), *seen))
table = np.array(rows)
length, of_update, of_weight, of_random = table.T

print("|U'WV| with U, V from       update        W   random  |update|  amplification")
for t, part in zip("qv", np.split(table, 2), strict=True):
    mean = part.mean(axis=0)
    print(f"{t}, mean over blocks     ", end="")
    print("".join(f"{x:9.2f}" for x in (*mean[1:], mean[0], np.mean(part[:, 0] / part[:, 1]))))
print(f"amplification of random directions, for comparison: {np.mean(length / of_random):.1f}")

figure, axes = plt.subplots(figsize=(6.5, 3.4))
x = np.arange(len(table))
for shift, (name, values, colour) in enumerate(
    [
        ("random directions", of_random, "#bdbdbd"),
        ("directions of ΔW", of_update, "#d94801"),
        ("top directions of W", of_weight, "#2171b5"),
    ]
):
    axes.bar(x + 0.27 * (shift - 1), values, 0.27, label=name, color=colour)
axes.set_xticks(x, [f"{t}{block}" for t in "qv" for block in range(BLOCKS)])
axes.set_yscale("log")
axes.set(xlabel="weight and block", ylabel="‖UᵀWV‖, how much of W is there")
axes.legend(fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
show(figure, "An update acts where W is stronger than at random, not where it is strongest")

# %% [markdown]
# The bar of the update stands between the two others, with few exceptions (note the logarithmic
# axis). The update is related to $W$: it acts where $W$ has more than in random directions. But it
# does not repeat what $W$ does most; it strengthens directions that the base has and does not
# emphasise. That is the paper's conclusion, and it holds here.
#
# The amplification factor by itself shows nothing: a *random* update of the same length would have
# an even larger one, since random directions hold so little of $W$. The argument rests on the
# middle bar between its two baselines.
#
# ## What to remember
#
# - With $s = \alpha / R$ and a fixed $\alpha$, one direction per weight does nearly all of the
#   work. With $s = 1$ the same experiment seems to say the opposite.
# - At an equal budget, every weight at a low rank beat one weight at a high rank.
# - Trainings agree on a few directions, and on little else. Compare with chance, always.
#
# ## Exercises
#
# [Solutions](../docs/solutions.md), each with what the programs print.
#
# 1. Give rank 1 a learning rate of its own: $\alpha = R = 1$ and `lr=4e-2`. Now the same with rank
#    64. Which of them is more sensitive, and why?
# 2. Use $\Delta W$ instead of $A$ in the similarity, by its left-singular vectors. Is there more
#    overlap, or less?
# 3. Show that $\varphi$ of two random spaces is $\max(i, j)/d$ on average. (Fix one of them. What
#    is the expected squared length of the projection of a random unit vector onto it?)

# %%
for values in phi.values():
    assert values.min() >= 0 and values.max() <= 1 + 1e-9, "φ is a share"
assert np.allclose(chance, np.maximum(i, j) / WIDTH, atol=0.05), "the baseline is max(i, j) / d"
assert len(set(sizes.values())) == 1, "the budgets differ"
assert (of_random < of_weight).all(), "W has more in its own top directions than in random ones"
if not SMALL:
    for seed in SEEDS:
        of = {name: place_loss[name, seed] for name in PLACES}
        assert of["all, R=2"] < of["q k v o, R=4"] < of["q, R=16"] < before, "spreading helps"
        assert of["q v, R=8"] < of["q, R=16"], "q and v beat q alone at the same budget"
        best_of_attention = min(loss for name, loss in of.items() if name != "all, R=2")
        assert of["all, R=2"] < best_of_attention, "the MLP's weights add nothing"
        assert of["q, R=16"] == max(of.values()), "q alone is not the worst of these"
    assert flat > 0.8, "with a fixed α rank 1 is nearly enough"
    assert steep < flat - 0.1, "with α = R the rank seems to matter more"
    for t in "qv":
        assert shares[f"full fine-tuning, {t}"][7] > 2 * shares["random matrix"][7], "no low rank"
    for name, values in phi.items():
        assert values[7, 7] > 2 * chance[7, 7], f"{name}: no more overlap than by chance"
    assert (of_update < of_weight).all(), "the update repeats what W does most"
    assert np.mean(of_random < of_update) > 0.8, "the update has nothing to do with W"
