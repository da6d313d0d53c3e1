# %% [markdown]
# # The two gradients of LoRA
#
# LoRA leaves a weight $W$ alone and learns an update of low rank beside it. This tutorial derives
# the gradients of the two factors, checks them, and then looks at four consequences: the gradients
# are projections of the dense one; one of them is exactly zero at first; the scale decides how far
# a step goes at a given rank; and the dense gradient is never computed.
#
# Shapes: N rows (examples), I inputs, O outputs, R rank.

# %%
import inspect
import os
import tracemalloc

import matplotlib.pyplot as plt
import numpy as np

import minilora
from minilora import gradcheck, ops, tree
from minilora.figures import show
from minilora.lora import lora_backward, lora_forward
from minilora.optim import adamw, adamw_init

SMALL = os.environ.get("MINILORA_SMALL") == "1"  # smaller, for the tests
plt.rcParams.update({"figure.facecolor": "white", "figure.constrained_layout.use": True})
rng = np.random.default_rng(0)

# %% [markdown]
# ## Forward
#
# The input $x$ is (N, I), the factors are $A$ (I, R) and $B$ (R, O), and $s$ is a constant, the
# scale. The update of the output is
#
# $$h = s\,xA, \qquad y = hB .$$
#
# So $y = x\,(sAB)$: the weight is changed by $sAB$, a matrix of rank at most R. The full output is
# $xW + y$, but $W$ plays no part in the gradients of $A$ and $B$.
#
# ## Backward
#
# A small change is $\delta$, a gradient is $\mathrm{d}$, and
# $\langle U, V\rangle = \sum_{ij} U_{ij} V_{ij}$ is the inner product (tutorial 01). First the
# second product, $\delta y = \delta h\,B + h\,\delta B$. Factors move to the other side as
# transposes:
#
# $$\langle \mathrm{d}y, h\,\delta B\rangle = \langle h^\top \mathrm{d}y, \delta B\rangle, \qquad
# \langle \mathrm{d}y, \delta h\,B\rangle = \langle \mathrm{d}y\,B^\top, \delta h\rangle .$$
#
# So $\mathrm{d}B = h^\top \mathrm{d}y$ [LORA.3], and $h$ receives $\mathrm{d}y\,B^\top$. Then the
# first product, $\delta h = s\,\delta x\,A + s\,x\,\delta A$. In the same way
#
# $$\mathrm{d}A = x^\top \big(s\,\mathrm{d}y\,B^\top\big), \qquad
# \mathrm{d}x = \big(s\,\mathrm{d}y\,B^\top\big) A^\top .$$
#
# These are [LORA.5] and [LORA.6]. Four lines of code:


# %%
def forward(x, A, B, *, s):
    h = s * (x @ A)
    return h @ B, (x, h, A, B, s)


def backward(dy, cache):
    x, h, A, B, s = cache
    dB = h.T @ dy
    dxA = s * (dy @ B.T)  # the gradient of the product x A
    dA = x.T @ dxA
    return dxA @ A.T, dA, dB


N, I, O, R, s = 6, 5, 4, 2, 0.5
x, A, B = rng.standard_normal((N, I)), rng.standard_normal((I, R)), rng.standard_normal((R, O))
checks = gradcheck.check_pair(forward, backward, [x, A, B], {"s": s})
for check in checks:
    print(f"{check.name:12s} {check.entries:3d} entries, largest relative error {check.error:.1e}")

# %% [markdown]
# minilora's own pair has the same lines and gives the same numbers.

# %%
dy = rng.standard_normal((N, O))
dx, dA, dB = backward(dy, forward(x, A, B, s=s)[1])
theirs = lora_backward(dy, lora_forward(x, A, B, scale=s)[1])
pair_difference = max(np.abs(a - b).max() for a, b in zip((dx, dA, dB), theirs, strict=True))
print(f"largest difference from minilora.lora: {pair_difference:.1e}")

# %% [markdown]
# ## Projections of the dense gradient
#
# Full fine-tuning would compute the gradient of $W$ itself, $\mathrm{d}W = x^\top \mathrm{d}y$
# [LIN.3]. Put $h = s\,xA$ into $\mathrm{d}B$, and move the brackets in $\mathrm{d}A$:
#
# $$\mathrm{d}A = s\;\mathrm{d}W\,B^\top, \qquad \mathrm{d}B = s\;A^\top \mathrm{d}W .$$

# %%
dW = x.T @ dy
print(f"dA - s dW B^T: {np.abs(dA - s * dW @ B.T).max():.1e}")
print(f"dB - s A^T dW: {np.abs(dB - s * A.T @ dW).max():.1e}")

# %% [markdown]
# So the adapter sees $\mathrm{d}W$ only through $B$ and $A$. What does this do to a step? Full
# fine-tuning moves $W$ by $-\eta\,\mathrm{d}W$, where $\eta$ is the learning rate. LoRA moves $A$
# by $-\eta\,\mathrm{d}A$ and $B$ by $-\eta\,\mathrm{d}B$. To first order in $\eta$, this moves
# $sAB$ by
#
# $$-\eta s\,(\mathrm{d}A\,B + A\,\mathrm{d}B)
# = -\eta s^2 \big( \mathrm{d}W\,B^\top B + A A^\top \mathrm{d}W \big) .$$
#
# It is the same gradient, multiplied by $B^\top B$ on the right and by $AA^\top$ on the left. As a
# picture: a dense gradient with a pattern, and what random factors of rank 2 and of rank 12 leave
# of it. The cosine says how well two directions agree: 1 for the same direction, 0 for directions
# at right angles. Each panel has its own colour scale.
#
# **Predict.** With R = 2, what is the rank of a step of LoRA, the sum of both products? (a) 1, (b)
# 2, (c) 4.
#
# <details><summary>Answer</summary>
#
# (c) 4. Each product has rank 2, but they are limited on different sides: $\mathrm{d}W\,B^\top B$
# has the row space of $B$, and $AA^\top \mathrm{d}W$ the column space of $A$. No step of LoRA can
# have a rank above 2 R.
#
# </details>

# %%
down, across = np.meshgrid(np.linspace(0, 3, 30), np.linspace(0, 3, 40), indexing="ij")
dense = np.sin(2 * down * across) + (across > 2)  # any (30, 40) matrix with a pattern


def cosine(U, V):
    return float(np.sum(U * V) / np.linalg.norm(U) / np.linalg.norm(V))


fig, axes = plt.subplots(2, 4, figsize=(9.5, 4))
ranks_found = {}
for row, rank in zip(axes, (2, 12), strict=True):
    A_random, B_random = rng.standard_normal((30, rank)), rng.standard_normal((rank, 40))
    right, left = dense @ B_random.T @ B_random, A_random @ A_random.T @ dense
    images = {"dW": dense, "dW BᵀB": right, "A Aᵀ dW": left, "the sum": right + left}
    for ax, (name, image) in zip(row, images.items(), strict=True):
        ax.imshow(image, cmap="RdBu", vmin=-np.abs(image).max(), vmax=np.abs(image).max())
        ax.set_title(f"{name}, cosine {cosine(dense, image):.2f}", fontsize=9)
        ranks_found[name, rank] = np.linalg.matrix_rank(image)
        ax.set(xticks=[], yticks=[], xlabel=f"rank {ranks_found[name, rank]}")
    row[0].set_ylabel(f"R = {rank}", fontsize=11)
show(fig, "LoRA sees the dense gradient through B and A: the higher the rank, the more of it")

# %% [markdown]
# At rank 2 every column of $\mathrm{d}W\,B^\top B$ is a mixture of the same two columns, and every
# row of $AA^\top \mathrm{d}W$ a mixture of two rows. At rank 12 the cosines are larger.
#
# ## The same in the real model
#
# The built-in model reads a piece of Python: minilora's own `lora.py`. The adapters have rank 4
# and sit on the attention's fused projection and on the MLP's first map. A `Plan` says which
# gradients are wanted: those of the adapters and, only for this comparison, those of the base.

# %%
model = minilora.load_model()
lora_config = minilora.LoRAConfig(rank=4, alpha=4.0, targets=("qkv", "up"))
sequences, length = (2, 32) if SMALL else (2, 64)
ids = model.tokenizer.encode(inspect.getsource(minilora.lora))[: sequences * (length + 1)]
text = ids.reshape(sequences, length + 1)
task = {"tokens": text[:, :-1], "targets": text[:, 1:]}
fresh = minilora.lora_init(model.base, lora_config, seed=0)


def initialised(of_A, of_B):
    """Adapters with every A and every B replaced by a function of it."""
    leaves = tree.flatten(fresh).items()
    return tree.unflatten({p: (of_A if p.endswith("A") else of_B)(leaf) for p, leaf in leaves})


def keep(leaf):
    return leaf


def random(leaf):
    return rng.uniform(-1 / 16, 1 / 16, leaf.shape).astype(leaf.dtype)  # 16 = √256, as for A


somewhere = initialised(keep, random)  # no initialisation: neither factor is zero
_, dbase, dlora = minilora.loss_and_grads(
    model.with_adapter(somewhere, lora_config), **task, plan=minilora.Plan(base=True, lora=True)
)
scale = lora_config.scale_of("blocks.0.attn.qkv")


def qkv(blocks, i):
    return blocks["blocks"][i]["attn"]["qkv"]


model_errors = []
for i in range(model.config.n_layer):
    dense_gradient, factors, gradients = qkv(dbase, i)["w"], qkv(somewhere, i), qkv(dlora, i)
    for name, projected in (
        ("A", scale * dense_gradient @ factors["B"].T),
        ("B", scale * factors["A"].T @ dense_gradient),
    ):
        difference = np.abs(gradients[name] - projected).max()
        model_errors.append(difference / np.abs(projected).max())
print(f"the same two equations in every block, float32: within {max(model_errors):.0e}")

# %% [markdown]
# ## Why B is zero at initialisation
#
# The usual initialisation is $A$ random and $B = 0$. Then
#
# - $y = 0$: training starts exactly at the base;
# - $\mathrm{d}A = s\,\mathrm{d}W\,B^\top = 0$: in the first step $A$ does not move;
# - $\mathrm{d}B = s\,A^\top \mathrm{d}W$ is not zero: $B$ moves, and from the second step on so
#   does $A$.
#
# We take steps of plain gradient descent on our text from three initialisations: this one, its
# mirror image ($A = 0$, $B$ random), and both zero. (Every step reads the same text: here we want
# to see the gradients change, not to train well.)
#
# **Predict.** What does the loss do when both factors start at zero? (a) it falls as with the usual
# start, (b) it falls more slowly, (c) it stays what it was.
#
# <details><summary>Answer</summary>
#
# (c) it stays what it was, bit for bit. $\mathrm{d}A$ has the factor $B$ and $\mathrm{d}B$ the
# factor $A$: both gradients are zero, and stay zero.
#
# </details>


# %%
def norm_of(factor, gradients):
    """The length of all dA, or of all dB, taken as one vector."""
    leaves = [leaf for path, leaf in tree.flatten(gradients).items() if path.endswith(factor)]
    return float(np.sqrt(sum(np.sum(leaf**2) for leaf in leaves)))


def descend(lora, steps, rate=0.5):
    """The adapters after some steps, and (loss, |dA|, |dB|) before each of them."""
    history = []
    for _ in range(steps):
        loss, _, gradients = minilora.loss_and_grads(model.with_adapter(lora, lora_config), **task)
        history.append((float(loss), norm_of("A", gradients), norm_of("B", gradients)))
        lora = tree.map_leaves(lambda p, g: p - rate * g, lora, gradients)
    return lora, np.array(history)


STEPS = 6 if SMALL else 20
initialisations = {
    "A random, B = 0": initialised(keep, np.zeros_like),
    "A = 0, B random": initialised(np.zeros_like, random),
    "A = 0, B = 0": initialised(np.zeros_like, np.zeros_like),
}
runs = {name: descend(lora, STEPS) for name, lora in initialisations.items()}

_, history = runs["A random, B = 0"]
print("step     loss      |dA|      |dB|")
for step in range(min(STEPS, 8)):
    loss, norm_A, norm_B = history[step]
    print(f"{step:4d} {loss:8.4f} {norm_A:9.5f} {norm_B:9.5f}")

fig, axes = plt.subplots(1, 3, figsize=(9.5, 3), sharey=True)
for ax, (name, (_, history)) in zip(axes, runs.items(), strict=True):
    ax.plot(history[:, 1], "o-", markersize=3, label="|dA|")
    ax.plot(history[:, 2], "s-", markersize=3, label="|dB|")
    ax.set_title(f"{name}\nloss {history[0, 0]:.2f} → {history[-1, 0]:.2f}", fontsize=10)
    ax.set_xlabel("step")
    ax.grid(alpha=0.3)
axes[0].set_ylabel("length of the gradient")
axes[0].legend()
show(fig, "With one factor at zero the other moves first; with both at zero nothing ever moves")

# %% [markdown]
# In the first panel $|\mathrm{d}A|$ starts at exactly zero and at first grows in a straight line:
# $\mathrm{d}A$ is proportional to $B$, and $B$ grows by about the same step each time. In the
# mirror image the roles are exchanged. With both at zero, nothing ever moves: this adapter is dead.
#
# The mirror image ends a little lower. Why then is $B = 0$ the usual start? Plain gradient descent
# takes steps in proportion to the gradient, so the start whose first gradient is longer is ahead
# after the first step, and here it stays ahead. That says little about the starts: AdamW, which is
# used in practice, divides each entry by its own size.
#
# **Predict.** Which of the two starts is ahead with AdamW? (a) the usual one, (b) the mirror image,
# (c) it depends on the learning rate.
#
# <details><summary>Answer</summary>
#
# (c) it depends: at the learning rates below, now the one is ahead and now the other. In a model
# this small the choice hardly matters.
#
# </details>


# %%
def descend_with_adamw(lora, steps, rate):
    """The loss before each of some steps of AdamW."""
    losses, moments = [], adamw_init(lora)
    for step in range(1, steps + 1):
        loss, _, gradients = minilora.loss_and_grads(model.with_adapter(lora, lora_config), **task)
        losses.append(float(loss))
        lora, moments = adamw(lora, gradients, moments, step=step, lr=rate)
    return losses


starts = ("A random, B = 0", "A = 0, B random")
with_adamw = {
    rate: [descend_with_adamw(initialisations[name], STEPS, rate) for name in starts]
    for rate in (1e-3, 1e-2)
}
print(f"loss after {STEPS - 1} steps of AdamW from", " and ".join(starts))
for rate, losses in with_adamw.items():
    print(f"learning rate {rate:g}:", "  ".join(f"{of_start[-1]:.4f}" for of_start in losses))

# %% [markdown]
# In wide models it does matter. There $A$ random with $B = 0$ tolerates higher learning rates, and
# ends better on average (Hayou, Ghosh and Yu 2024, *The Impact of Initialization on LoRA Finetuning
# Dynamics*). It is also what the LoRA paper chose, and what PEFT does for every weight but an
# embedding.
#
# ## α / r, or α / √r
#
# The scale is $s = \alpha / r$ in the LoRA paper, and $s = \alpha / \sqrt r$ in rank-stabilised
# LoRA (Kalajdzievski 2023), where $r$ is the rank and $\alpha$ a constant. Both have the same aim:
# a learning rate that suits one rank should suit another. Which of them achieves it?
#
# Look at the first step of gradient descent. From $B = 0$ it leads to
# $B = -\eta\,\mathrm{d}B = -\eta s\,A^\top \mathrm{d}W$, so the weight changes by
# $\Delta W = sAB = -\eta s^2\,AA^\top \mathrm{d}W$. The loss falls, to first order, by
#
# $$-\langle \mathrm{d}W, \Delta W\rangle
# = \eta s^2\,\langle A^\top \mathrm{d}W, A^\top \mathrm{d}W\rangle .$$
#
# For full fine-tuning it would fall by $\eta\,\langle \mathrm{d}W, \mathrm{d}W\rangle$. The
# quotient of the two is the share of the dense step's progress that LoRA makes. The entries of $A$
# are uniform in $\pm 1/\sqrt I$, their variance is $1/(3I)$, and $A^\top \mathrm{d}W$ has $r$
# rows; $\mathrm{d}W$ does not depend on $A$, since at $B = 0$ the model is the base. So on average
# the share is $s^2 r / (3I)$: $\alpha^2 / (3 I r)$ for the one scale, and
# $\alpha^2 / (3I)$, at any rank, for the other.
#
# Adam's first step is different: it moves every entry of $B$ by the same amount $\eta$, whatever
# the size of the gradient (as long as that is far above Adam's $\varepsilon$).
#
# **Predict.** Which scale makes Adam's first step equally effective at every rank? (a) both,
# (b) $\alpha / \sqrt r$, as for gradient descent, (c) $\alpha / r$.
#
# <details><summary>Answer</summary>
#
# (c) $\alpha / r$: the roles are exchanged. The loss falls by $\eta s$ times the sum of
# $|A^\top \mathrm{d}W|$ over all entries, in $r$ rows. So the progress is proportional to $s\,r$,
# which is $\alpha$ for $\alpha / r$, and $\alpha \sqrt r$ for the other.
#
# </details>
#
# Both can be measured. We draw a dense gradient and many $A$, and take one real step with each
# optimiser.

# %%
I, O, alpha = 128, 96, 8.0
dW = rng.standard_normal((I, O))
ranks = (1, 2, 4, 8, 16, 32, 64)
draws = 5 if SMALL else 50


def progress(rank, scale, optimiser):
    """How far the loss falls in the first step, to first order; the dense step's fall is 1."""
    A = rng.uniform(-1 / np.sqrt(I), 1 / np.sqrt(I), (I, rank))
    dB = scale * A.T @ dW
    if optimiser == "Adam":
        B, _ = adamw(np.zeros_like(dB), dB, adamw_init(dB), step=1, lr=1.0)
        dense_fall = np.abs(dW).sum()
    else:
        B = -dB
        dense_fall = np.sum(dW * dW)
    return -np.sum(dW * (scale * A @ B)) / dense_fall


SCALES = {"α / r": lambda r: alpha / r, "α / √r": lambda r: alpha / np.sqrt(r)}
measured = {
    (optimiser, name): [
        np.mean([progress(r, scale(r), optimiser) for _ in range(draws)]) for r in ranks
    ]
    for optimiser in ("gradient descent", "Adam")
    for name, scale in SCALES.items()
}
predicted = {name: [scale(r) ** 2 * r / (3 * I) for r in ranks] for name, scale in SCALES.items()}

TICKS = {"gradient descent": (0.003, 0.01, 0.03, 0.1), "Adam": (0.03, 0.1, 0.3)}
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
for ax, optimiser in zip(axes, ("gradient descent", "Adam"), strict=True):
    for name, marker in (("α / r", "o"), ("α / √r", "s")):
        ax.loglog(ranks, measured[optimiser, name], marker, label=f"{name}, measured")
        if optimiser == "gradient descent":
            ax.loglog(ranks, predicted[name], "-", color="gray", linewidth=1)
    ax.set(title=f"first step, {optimiser}", xlabel="rank r", ylabel="progress (dense step: 1)")
    ax.margins(y=0.1)
    ax.set_xticks(ranks, [str(r) for r in ranks])
    ax.set_yticks(TICKS[optimiser], [f"{tick:g}" for tick in TICKS[optimiser]])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
axes[0].text(1.1, predicted["α / r"][-1], "lines: the formulas", color="gray", fontsize=8)
show(fig, "Equal progress at every rank: alpha/sqrt(r) with gradient descent, alpha/r with Adam")

# %% [markdown]
# The dots lie on the lines. With gradient descent $\alpha / \sqrt r$ makes the first step
# independent of the rank; with Adam $\alpha / r$ does. Read this picture with care: it shows one
# step, from $B = 0$. Kalajdzievski's argument is about the size of the adapter's output and
# gradients during the whole training, where $\alpha / r$ makes high ranks learn too little. What
# matters in practice is the loss that a rank reaches at *its* best learning rate, and that has to
# be measured.
#
# ## The dense gradient is never computed
#
# The order of the products matters. $(x^\top \mathrm{d}y)\,B^\top$ and
# $x^\top (\mathrm{d}y\,B^\top)$ are equal, but the first computes the (I, O) matrix $\mathrm{d}W$
# on the way, and the second only matrices with a side of length R. We count the multiplications by
# formula, and let Python's own `tracemalloc` measure the memory that NumPy asked for.

# %%
N, I, O, R = 64, 1024, 1024, 8
x, dy = (rng.standard_normal((N, I), np.float32), rng.standard_normal((N, O), np.float32))
W, b = rng.standard_normal((I, O), np.float32), np.zeros(O, np.float32)
A, B = rng.standard_normal((I, R), np.float32), rng.standard_normal((R, O), np.float32)
_, linear_cache = ops.linear_forward(x, W, b)
frozen_cache = linear_cache._replace(x=None)  # where no dW is wanted, x is not kept
_, lora_cache = lora_forward(x, A, B, scale=1.0)


def detour(dy):
    """The right dA and dB by way of the dense gradient."""
    dW = x.T @ dy
    return dW @ B.T, A.T @ dW


def numbers_allocated(f, *args):
    """The most float32 numbers that were in memory at once because of a call."""
    tracemalloc.start()
    f(*args)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak // 4


counts = {  # what: (numbers in memory, multiplications)
    "dx alone (W frozen)": (
        numbers_allocated(ops.linear_backward, dy, frozen_cache),
        N * I * O,
    ),
    "dx, dW, db (W trained)": (
        numbers_allocated(ops.linear_backward, dy, linear_cache),
        2 * N * I * O,
    ),
    "dA, dB by way of dW": (numbers_allocated(detour, dy), N * I * O + 2 * I * O * R),
    "LoRA: dA, dB and its dx": (
        numbers_allocated(lora_backward, dy, lora_cache),
        N * R * (2 * O + 2 * I),
    ),
}
print(f"N = {N}, I = O = {I}, R = {R}; the dense gradient would have {I * O:,} numbers")
for name, (numbers, multiplications) in counts.items():
    print(f"{name:24s} {numbers:10,} numbers in memory {multiplications:13,} multiplications")

# %% [markdown]
# The last line is what LoRA adds to the first. It stays far below the size of $W$. The optimiser
# saves even more: AdamW keeps two numbers for each one that is trained, and LoRA trains R (I + O)
# numbers instead of I O.
#
# ## Claims, asserted

# %%
assert gradcheck.max_error(checks) < gradcheck.PAIR_TOLERANCE, "a gradient is wrong"
assert pair_difference < 1e-12, "minilora's pair differs"
assert ranks_found["the sum", 2] == 4 and ranks_found["A Aᵀ dW", 2] == 2, "a rank is wrong"
assert max(model_errors) < 1e-4, "the projections do not hold in the model"
usual, mirrored, dead = (history for _, history in runs.values())
assert usual[0, 1] == 0.0 and usual[0, 2] > 0.0, "at B = 0, dA is zero and dB is not"
assert mirrored[0, 1] > 0.0 and mirrored[0, 2] == 0.0, "at A = 0 it is the other way round"
assert 1.8 < usual[2, 1] / usual[1, 1] < 2.2, "dA does not grow in a line at first"
assert not dead[:, 1:].any() and np.ptp(dead[:, 0]) == 0.0, "a dead adapter moved"
assert usual[-1, 0] < usual[0, 0], "the loss did not fall"
longer, lower = mirrored[0, 1] > usual[0, 2], mirrored[1, 0] < usual[1, 0]
assert longer == lower, "the start with the longer first gradient is behind after one step"
assert SMALL or mirrored[-1, 0] < usual[-1, 0], "the mirror image does not end lower"
ahead = {usual[-1] < mirrored[-1] for usual, mirrored in with_adamw.values()}
assert SMALL or ahead == {True, False}, "with AdamW one start is always ahead"
for of_start in sum(with_adamw.values(), []):
    assert of_start[-1] < of_start[0], "AdamW did not learn"
for name, formula in predicted.items():
    wanted, found = np.array(formula), np.array(measured["gradient descent", name])
    assert np.all(np.abs(found / wanted - 1) < 0.2), f"the first step for {name} is another"
adam = {name: np.array(measured["Adam", name]) for name in SCALES}
assert np.ptp(adam["α / r"]) < 0.2 * adam["α / r"][0], "with Adam, α/r depends on the rank"
assert 6 < adam["α / √r"][-1] / adam["α / √r"][0] < 10, "with Adam, α/√r does not go as √r"
memory = {name: numbers for name, (numbers, _) in counts.items()}
assert memory["LoRA: dA, dB and its dx"] < I * O / 5, "LoRA's backward pass made something large"
assert memory["dA, dB by way of dW"] > I * O, "the detour did not make the dense gradient"

# %% [markdown]
# ## Exercises
#
# [Solutions](../docs/solutions.md), each with what the programs print.
#
# 1. Delete the line `dxA *= scale` from `lora_backward` in `minilora/lora.py`, and run
#    `python -m pytest tests/lora tests/ops`. Besides the finite differences,
#    `tests/lora/test_lora_laws.py::test_the_factors_gradients_follow_from_the_dense_gradient`
#    notices. Which of the two messages helps you more to find the line? Compare them with that of
#    [the course, in your browser](../docs/live.md#lora_backward).
# 2. Let `lora_init` make $A$ and $B$ both zero. Which test says that the adapter is dead?
#    (It is `test_at_initialisation_one_factor_s_gradient_is_zero_and_the_other_s_is_not` in
#    `tests/lora/test_lora_laws.py`.)
# 3. Repeat the picture of the first step for the second step of gradient descent, by hand or by
#    program. Now $A$ moves too. Does $\alpha / \sqrt r$ still make the progress independent of
#    the rank?
