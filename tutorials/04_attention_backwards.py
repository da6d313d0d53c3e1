# %% [markdown]
# # Attention, backwards
#
# Attention is three matrix products and a softmax. The products are known from [checking
# gradients](01_checking_gradients.py). The softmax is new. We differentiate it, work through the
# attention of three tokens by hand, see what the mask does to the gradients, and then look at a
# real sentence in the built-in model: where its heads look, and where the loss wants them to look.
#
# Shapes: T tokens, K numbers for each query, key and value, H heads, C = H K the width of the
# model.

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora
from minilora import gradcheck, ops
from minilora.figures import show
from minilora.loss import cross_entropy_backward, cross_entropy_forward
from minilora.ops import attention_backward, attention_forward

plt.rcParams.update({"figure.facecolor": "white", "figure.constrained_layout.use": True})
rng = np.random.default_rng(0)

# %% [markdown]
# ## The softmax and its Jacobian
#
# The softmax turns T scores $x$ into T positive weights with sum 1:
#
# $$y_i = \frac{e^{x_i}}{\sum_j e^{x_j}} .$$
#
# Take logarithms, $\log y_i = x_i - \log \sum_j e^{x_j}$, and change $x$ by $\delta x$. The
# derivative of the last term with respect to $x_j$ is $e^{x_j} / \sum_k e^{x_k} = y_j$. So
#
# $$\frac{\delta y_i}{y_i} = \delta x_i - \sum_j y_j\,\delta x_j, \qquad
# \text{that is} \qquad
# \delta y = J\,\delta x \quad\text{with}\quad J_{ij} = y_i\,(\delta_{ij} - y_j) .$$
#
# ($\delta_{ij}$ is 1 for $i = j$, else 0.) This matrix is the **Jacobian**,
# $J = \operatorname{diag}(y) - y\,y^\top$. Here is one.
#
# **Predict.** Raise one score. How many of the other weights rise with it? (a) none, (b) those with
# higher scores, (c) all.
#
# <details><summary>Answer</summary>
#
# (a) none: $J_{ij} = -y_i y_j$ is negative for $i \ne j$. The weights share a sum of 1, so what one
# gains the others lose.
#
# </details>

# %%
scores = np.array([0.0, 1.0, 2.0, -1.0, 0.5, 1.5])
y, cache = ops.softmax_forward(scores)
J = np.diag(y) - np.outer(y, y)
print("weights         ", np.round(y, 3))
print("row sums of J   ", np.abs(J.sum(axis=1)).max())
print("J is symmetric  ", np.array_equal(J, J.T))

fig, axes = plt.subplots(1, 2, figsize=(8, 3), width_ratios=(1, 1.3))
axes[0].bar(range(6), y)
axes[0].set(title="weights y", xlabel="i")
picture = axes[1].imshow(J, cmap="RdBu", vmin=-np.abs(J).max(), vmax=np.abs(J).max())
axes[1].set(title="Jacobian J", xlabel="j", ylabel="i")
fig.colorbar(picture, ax=axes[1])
show(fig, "What one weight gains, all others lose")

# %% [markdown]
# The diagonal is positive: a higher score gives a higher weight. Everything else is negative. Each
# row and each column sums to zero. Where a weight is near 0 or near 1, the entries are small, and
# the softmax hardly passes any gradient: it is **saturated**.
#
# The backward pass must multiply by $J$ (which is its own transpose), but need not form it. For a
# row of T numbers that would be T² entries. Multiply out:
#
# $$\mathrm{d}x = J\,\mathrm{d}y = y \circ \mathrm{d}y - y\,(y^\top \mathrm{d}y)
# = y \circ \big( \mathrm{d}y - \textstyle\sum_j y_j\,\mathrm{d}y_j \big) .$$
#
# This is [SM.2]. In words: from each entry of $\mathrm{d}y$ subtract the weighted mean, then
# multiply by the weight. A score is pushed up if its $\mathrm{d}y$ is *below* the mean, as we move
# against the gradient. If all entries of $\mathrm{d}y$ are equal, nothing happens.

# %%
dy = rng.standard_normal(6)
(dx,) = ops.softmax_backward(dy, cache)
softmax_difference = np.abs(dx - J @ dy).max()
(dx_of_equal,) = ops.softmax_backward(np.ones(6), cache)
print(f"softmax_backward compared with J dy: {softmax_difference:.0e}")
print(f"for dy = 1 everywhere: {np.abs(dx_of_equal).max():.0e}")

# %% [markdown]
# ## Three tokens by hand
#
# One head, with queries $q$, keys $k$ and values $v$ of T = 3 tokens, and K = 1 so that it can be
# done by hand:
#
# $$q = \begin{pmatrix} 5 \\ \ln 3 \\ \ln 2 \end{pmatrix}, \qquad
# k = \begin{pmatrix} 0 \\ 1 \\ 0 \end{pmatrix}, \qquad
# v = \begin{pmatrix} 4 \\ 8 \\ 0 \end{pmatrix} .$$
#
# **Scores.** Row $t$ belongs to the query of token $t$, column $s$ to the key of token $s$:
# $S_{ts} = q_t k_s / \sqrt K$. Token $t$ must not see later tokens, so every $S_{ts}$ with $s > t$
# becomes $-\infty$ (the **causal mask**):
#
# $$S = \begin{pmatrix} 0 & -\infty & -\infty \\
# 0 & \ln 3 & -\infty \\ 0 & \ln 2 & 0 \end{pmatrix} .$$
#
# **Weights.** Each row of $e^S$ is divided by its sum. The rows of $e^S$ are (1, 0, 0), (1, 3, 0)
# and (1, 2, 1), so
#
# $$P = \begin{pmatrix} 1 & 0 & 0 \\
# \tfrac14 & \tfrac34 & 0 \\ \tfrac14 & \tfrac12 & \tfrac14 \end{pmatrix}, \qquad
# y = P v = \begin{pmatrix} 4 \\ 1 + 6 \\ 1 + 4 + 0 \end{pmatrix}
# = \begin{pmatrix} 4 \\ 7 \\ 5 \end{pmatrix} .$$
#
# Now the backward pass, with
#
# $$\mathrm{d}y = \begin{pmatrix} 1 \\ 1 \\ -2 \end{pmatrix} .$$
#
# **Values.** From $\delta y = P\,\delta v$ follows $\mathrm{d}v = P^\top \mathrm{d}y$ [ATT.4]: a
# value gets the gradients of all tokens that looked at it, weighted by how much they did.
#
# $$\mathrm{d}v = \begin{pmatrix} 1 + \tfrac14 - \tfrac24 \\ \tfrac34 - 1 \\ -\tfrac24 \end{pmatrix}
# = \begin{pmatrix} \tfrac34 \\ -\tfrac14 \\ -\tfrac12 \end{pmatrix} .$$
#
# **Weights.** From $\delta y = \delta P\,v$ follows $\mathrm{d}P = \mathrm{d}y\,v^\top$ [ATT.5]:
#
# $$\mathrm{d}P = \begin{pmatrix} 4 & 8 & 0 \\ 4 & 8 & 0 \\ -8 & -16 & 0 \end{pmatrix} .$$
#
# **Scores.** The softmax's rule for each row [ATT.6]. The weighted means of the rows of
# $\mathrm{d}P$ are 4, then $\tfrac14 \cdot 4 + \tfrac34 \cdot 8 = 7$, then
# $-\tfrac84 - \tfrac{16}{2} = -10$. Subtract them and multiply by the weights:
#
# $$\mathrm{d}S = \begin{pmatrix} 0 & 0 & 0 \\
# \tfrac14(4 - 7) & \tfrac34(8 - 7) & 0 \\
# \tfrac14(-8 + 10) & \tfrac12(-16 + 10) & \tfrac14(0 + 10) \end{pmatrix}
# = \begin{pmatrix} 0 & 0 & 0 \\ -\tfrac34 & \tfrac34 & 0 \\
# \tfrac12 & -3 & \tfrac52 \end{pmatrix} .$$
#
# Each row sums to zero. The first token sees only itself and has no choice, so its row is zero.
# Where the mask has made a weight 0, the gradient is 0 as well: the backward pass needs no second
# mask.
#
# **Queries and keys.** From $\delta S = \delta q\,k^\top + q\,\delta k^\top$ (and $\sqrt K = 1$)
# follow $\mathrm{d}q = \mathrm{d}S\,k$ [ATT.7] and $\mathrm{d}k = \mathrm{d}S^\top q$ [ATT.8]:
#
# $$\mathrm{d}q = \begin{pmatrix} 0 \\ \tfrac34 \\ -3 \end{pmatrix}, \qquad
# \mathrm{d}k = \begin{pmatrix} -\tfrac34 \ln 3 + \tfrac12 \ln 2 \\
# \tfrac34 \ln 3 - 3 \ln 2 \\ \tfrac52 \ln 2 \end{pmatrix} .$$
#
# The same in code, one line per step, compared with the numbers above.


# %%
def attention_by_hand(q, k, v, dy, nudge=0.0):
    """Forward and backward of one head, (T, K) each; `nudge` is added to the scores."""
    T, K = q.shape
    S = q @ k.T / np.sqrt(K) + nudge
    S[np.triu_indices(T, 1)] = -np.inf
    P, _ = ops.softmax_forward(S)
    y = P @ v

    dv = P.T @ dy
    dP = dy @ v.T
    dS = P * (dP - np.sum(P * dP, axis=1, keepdims=True))
    dq = dS @ k / np.sqrt(K)
    dk = dS.T @ q / np.sqrt(K)
    return {"P": P, "y": y, "dv": dv, "dP": dP, "dS": dS, "dq": dq, "dk": dk}


ln2, ln3 = np.log(2.0), np.log(3.0)
q, k, v, dy = (
    np.array(numbers)[:, None]
    for numbers in ([5.0, ln3, ln2], [0.0, 1.0, 0.0], [4.0, 8.0, 0.0], [1.0, 1.0, -2.0])
)
steps = attention_by_hand(q, k, v, dy)
on_paper = {
    "P": [[1, 0, 0], [1 / 4, 3 / 4, 0], [1 / 4, 1 / 2, 1 / 4]],
    "y": [[4], [7], [5]],
    "dv": [[3 / 4], [-1 / 4], [-1 / 2]],
    "dP": [[4, 8, 0], [4, 8, 0], [-8, -16, 0]],
    "dS": [[0, 0, 0], [-3 / 4, 3 / 4, 0], [1 / 2, -3, 5 / 2]],
    "dq": [[0], [3 / 4], [-3]],
    "dk": [[-3 / 4 * ln3 + ln2 / 2], [3 / 4 * ln3 - 3 * ln2], [5 / 2 * ln2]],
}
paper_difference = max(np.abs(steps[name] - np.array(on_paper[name])).max() for name in on_paper)
print(f"code compared with paper: {paper_difference:.0e}\n")
print("dS =", steps["dS"], sep="\n")

# %% [markdown]
# minilora's pair takes queries, keys and values side by side in one array (B, T, 3C), for B
# sequences and H heads. With one of each it must agree with our numbers; with more, finite
# differences decide. They also check the factor $1/\sqrt K$, which is 1 in our example. The pair
# never holds all of $P$, whose size grows with the square of the context: it takes a tile of
# queries at a time, and its backward pass recomputes their rows of $P$.

# %%
qkv = np.concatenate([q, k, v], axis=1)[None]
_, cache = attention_forward(qkv, heads=1)
(dqkv,) = attention_backward(dy[None], cache)
by_hand = np.concatenate([steps["dq"], steps["dk"], steps["dv"]], axis=1)[None]
pair_difference = np.abs(dqkv - by_hand).max()
print(f"attention_backward compared with the steps by hand: {pair_difference:.0e}")

checks = gradcheck.check_pair(
    attention_forward, attention_backward, [rng.standard_normal((2, 5, 3 * 6))], {"heads": 2}
)
for check in checks:
    print(f"two heads, {check.name:12s} {check.entries:4d} entries, error {check.error:.0e}")

# %% [markdown]
# ## What the mask does to the gradients
#
# The mask makes $y_t$ independent of everything after $t$. We can see this without any derivation:
# change the query, key and value of one token $s$ a little, and see which rows of $y$ change. Two
# mistakes are common, and we try them too:
#
# - the masked scores are set to **0** instead of $-\infty$;
# - the mask comes **after the softmax**: the weights of later tokens are set to zero.
#
# **Predict.** Which of the three hides the future completely? (a) only $-\infty$, (b) $-\infty$
# and the mask after the softmax, (c) all three.
#
# <details><summary>Answer</summary>
#
# (a) only $-\infty$. A score of 0 gives $e^0 = 1$, not zero. After the softmax it is too late: the
# future has been counted in the denominators.
#
# </details>


# %%
def attention_with_mask(qkv, mask):
    """The output (T, K) of one head with one of three masks; qkv is (3, T, K)."""
    q, k, v = qkv
    S = q @ k.T / np.sqrt(q.shape[1])
    future = np.triu_indices(len(q), 1)
    if mask != "after the softmax":
        S[future] = {"-∞": -np.inf, "0": 0.0}[mask]
    P, _ = ops.softmax_forward(S)
    P[future] *= mask == "0"  # with -∞ they are zero anyway
    return P @ v


T, h = 16, 1e-6
qkv, direction = rng.standard_normal((2, 3, T, 8))
sensitivity = {}
for mask in ("-∞", "0", "after the softmax"):
    y = attention_with_mask(qkv, mask)
    sensitivity[mask] = np.zeros((T, T))
    for s in range(T):
        moved = qkv.copy()
        moved[:, s] += h * direction[:, s]
        difference = attention_with_mask(moved, mask) - y
        sensitivity[mask][:, s] = np.linalg.norm(difference, axis=1) / h

fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.6))
for ax, (mask, picture) in zip(axes, sensitivity.items(), strict=True):
    ax.imshow(np.sqrt(picture), cmap="magma")
    ax.set(title=f"mask: {mask}", xlabel="token s, changed", ylabel="output t")
show(fig, "Only a score of minus infinity hides the future (black: no effect)")

# %% [markdown]
# With $-\infty$ everything above the diagonal is exactly black. The other two leak, the last one
# faintly, and such a leak is easily overlooked: the training loss gets *better*, because the model
# can see part of the answer. In the backward pass the picture is transposed: if only $y_t$ gets a
# gradient, the tokens after $t$ must get none.

# %%
qkv = rng.standard_normal((1, T, 3 * 8))
_, cache = attention_forward(qkv, heads=2)
dy = np.zeros((1, T, 8))
dy[0, 6] = rng.standard_normal(8)  # a gradient for output 6 alone
(dqkv,) = attention_backward(dy, cache)
reached = np.flatnonzero(np.abs(dqkv[0]).max(axis=1))
print("a gradient at output 6 reaches the tokens", *reached)

# %% [markdown]
# ## A real sentence
#
# Now the built-in model. It has 6 blocks of 4 heads, and a token is one byte. We run its blocks
# with minilora's pairs, as in [a block backwards](03_block_backwards.py). On the way up we keep
# the queries, keys and values, and on the way down the gradient of the attention's output, all in
# float64, since we shall compare with finite differences.

# %%
SENTENCE = "Mr. Bingley smiled at Jane. Mr. Bingley bowed to her."
model = minilora.load_model(dtype=np.float64)
base, heads = model.base, model.config.n_head
ids = model.tokenizer.encode(SENTENCE)
tokens, targets = ids[None, :-1], ids[None, 1:]  # from each byte, predict the next


def block_forward(x, p, attend=attention_forward):
    n1, ln_1 = ops.layer_norm_forward(x, **p["ln_1"])
    qkv, to_qkv = ops.linear_forward(n1, **p["attn"]["qkv"])
    att, attention = attend(qkv, heads=heads)
    o, to_o = ops.linear_forward(att, **p["attn"]["o"])
    mid = x + o
    n2, ln_2 = ops.layer_norm_forward(mid, **p["ln_2"])
    up, to_up = ops.linear_forward(n2, **p["mlp"]["up"])
    act, gelu = ops.gelu_forward(up)
    down, to_down = ops.linear_forward(act, **p["mlp"]["down"])
    return mid + down, qkv, (ln_1, to_qkv, attention, to_o, ln_2, to_up, gelu, to_down)


def block_backward(dy, caches):
    ln_1, to_qkv, attention, to_o, ln_2, to_up, gelu, to_down = caches
    dact, *_ = ops.linear_backward(dy, to_down)
    (dup,) = ops.gelu_backward(dact, gelu)
    dn2, *_ = ops.linear_backward(dup, to_up)
    dmid = dy + ops.layer_norm_backward(dn2, ln_2)[0]
    datt, *_ = ops.linear_backward(dmid, to_o)
    (dqkv,) = attention_backward(datt, attention)
    dn1, dw_qkv, _ = ops.linear_backward(dqkv, to_qkv)
    return dmid + ops.layer_norm_backward(dn1, ln_1)[0], datt, dw_qkv


x = base["wte"][tokens] + base["wpe"][: tokens.shape[1]]
inputs, qkvs, caches = [], [], []
for p in base["blocks"]:
    inputs.append(x)
    x, qkv, cache = block_forward(x, p)
    qkvs.append(qkv)
    caches.append(cache)
x, ln_f = ops.layer_norm_forward(x, **base["ln_f"])
logits, head_cache = ops.head_forward(x, base["wte"])
loss, loss_cache = cross_entropy_forward(logits, targets=targets)

(dlogits,) = cross_entropy_backward(1.0, loss_cache)
dx, _ = ops.head_backward(dlogits, head_cache)
dx, *_ = ops.layer_norm_backward(dx, ln_f)
datts, dw_qkvs = [], []
for cache in reversed(caches):
    dx, datt, dw_qkv = block_backward(dx, cache)
    datts.insert(0, datt)
    dw_qkvs.insert(0, dw_qkv)

_, dbase, _ = minilora.loss_and_grads(
    model, tokens=tokens, targets=targets, plan=minilora.Plan(base=True)
)
model_difference = max(
    np.abs(dw - block["attn"]["qkv"]["w"]).max() / np.abs(dw).max()
    for dw, block in zip(dw_qkvs, dbase["blocks"], strict=True)
)
print(f"loss {float(loss):.3f} nats per byte")
print(f"gradients of the qkv weights compared with loss_and_grads: {model_difference:.0e}")

# %% [markdown]
# ## Where the heads look
#
# We cut each block's arrays into heads, and repeat the steps that we did by hand. In the picture
# row $t$ is the byte that looks and column $s$ the byte that is looked at. (The brightness is the
# square root of the weight, so that small weights show.)


# %%
def cut(array):
    """Pieces of K columns, one for each head: (1, T, H K) -> H arrays (T, K)."""
    return np.split(array[0], heads, axis=1)


def heads_of(qkv):
    """(q, k, v) of each head: (1, T, 3C) -> H triples of (T, K)."""
    return list(zip(*(cut(third) for third in np.split(qkv, 3, axis=2)), strict=True))


found = {
    (block, head): attention_by_hand(*qkv, dy)
    for block in range(len(qkvs))
    for head, (qkv, dy) in enumerate(zip(heads_of(qkvs[block]), cut(datts[block]), strict=True))
}

fig, axes = plt.subplots(len(qkvs), heads, figsize=(7, 10.5))
for ax, ((block, head), steps_found) in zip(axes.flat, found.items(), strict=True):
    ax.imshow(np.sqrt(steps_found["P"]), cmap="magma", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"block {block}, head {head}", fontsize=8)
show(fig, "Some heads look a fixed distance back, others at certain bytes")

# %% [markdown]
# In block 0 some heads look a fixed distance back: the bright lines beside the diagonal. Higher up
# there are vertical lines, bytes that every later byte looks at. Which ones? We measure how much of
# its weight a head gives, on average, to the byte before, to the one before that, and to spaces.

# %%
is_space = np.array([character == " " for character in SENTENCE[:-1]])
shares = {
    place: {
        "1 back": np.mean(np.diagonal(steps_found["P"], -1)),
        "2 back": np.mean(np.diagonal(steps_found["P"], -2)),
        "spaces": np.mean(steps_found["P"][:, is_space].sum(axis=1)),
    }
    for place, steps_found in found.items()
}
print(f"{is_space.mean():.2f} of all bytes are spaces\n")
print("block head   1 back   2 back   spaces")
chosen = {name: max(shares, key=lambda place: shares[place][name]) for name in shares[0, 0]}
for block, head in chosen.values():
    print(f"{block:5d} {head:4d}" + "".join(f"{x:9.2f}" for x in shares[block, head].values()))

# %% [markdown]
# One head reads the byte before, one the byte before that, and one finds the spaces: where words
# begin. Nothing but the loss told them to.
#
# ## Where the loss wants them to look
#
# Now the gradient of the head that finds the spaces. On the left its weights $P$, with the bytes
# on both axes. On the right $-\mathrm{d}S$: where it is blue, a higher score would lower the loss;
# where it is red, a lower one would.
#
# **Predict.** Where is most of $|\mathrm{d}S|$? (a) in the columns of the spaces, where the head
# looks already, (b) in the other columns, where it should learn to look, (c) spread evenly.
#
# <details><summary>Answer</summary>
#
# (a) in the columns of the spaces. The backward pass of the softmax multiplies by $P$: where $P$ is
# nearly zero so is the gradient, however large $\mathrm{d}P$ is there.
#
# </details>

# %%
block, head = chosen["spaces"]
P, dS = found[block, head]["P"], found[block, head]["dS"]
fig, axes = plt.subplots(1, 2, figsize=(10, 6))
axes[0].imshow(P, cmap="magma", vmin=0, vmax=1)
axes[0].set_title(f"weights P of block {block}, head {head}")
axes[1].imshow(-dS, cmap="RdBu", vmin=-np.abs(dS).max() / 2, vmax=np.abs(dS).max() / 2)
axes[1].set_title("-dS: more (blue), less (red)")
for ax in axes:
    ax.set_xticks(range(len(P)), SENTENCE[:-1], fontsize=7)
    ax.set_yticks(range(len(P)), SENTENCE[:-1], fontsize=7)
    ax.set(xlabel="looked at", ylabel="looks")
show(fig, "The gradient is where the attention is: a head hardly learns to look elsewhere")

# %% [markdown]
# Each row of $\mathrm{d}S$ sums to zero, so each row has both colours, or none: a head can only
# move its attention, not add to it.
#
# Is the picture right? We change the scores of this one head by $-\varepsilon\,\mathrm{d}S$ and
# run the rest of the model. The loss must fall by
# $\varepsilon\,\langle \mathrm{d}S, \mathrm{d}S\rangle$.


# %%
def loss_with(change):
    """The model's loss, with a change added to the chosen head's scores."""

    def attend(qkv, *, heads):
        nudges = [change if i == head else 0.0 for i in range(heads)]
        y = [
            attention_by_hand(q, k, v, np.zeros_like(v), nudge)["y"]
            for (q, k, v), nudge in zip(heads_of(qkv), nudges, strict=True)
        ]
        return np.concatenate(y, axis=1)[None], None

    x, *_ = block_forward(inputs[block], base["blocks"][block], attend)
    for p in base["blocks"][block + 1 :]:
        x, *_ = block_forward(x, p)
    x, _ = ops.layer_norm_forward(x, **base["ln_f"])
    logits, _ = ops.head_forward(x, base["wte"])
    return float(cross_entropy_forward(logits, targets=targets)[0])


on_spaces = np.abs(dS[:, is_space]).sum() / np.abs(dS).sum()
print(f"{on_spaces:.0%} of |dS| is in the columns of spaces")

epsilon = 1e-2
by_differences = (loss_with(-epsilon * dS) - loss_with(epsilon * dS)) / (2 * epsilon)
by_hand = -float(np.sum(dS * dS))
print(f"the loss changes by {by_differences:.9e} times epsilon; by hand {by_hand:.9e}")

# %% [markdown]
# ## Saturated heads
#
# The backward pass of the softmax subtracts the mean and multiplies by the weights. How much of
# $\mathrm{d}P$ is left in $\mathrm{d}S$? Each dot is a head; the horizontal axis is the strongest
# weight of a row, averaged over the rows.

# %%
strongest = {place: np.mean(s["P"].max(axis=1)) for place, s in found.items()}
passed = {
    place: np.linalg.norm(s["dS"]) / np.linalg.norm(np.tril(s["dP"])) for place, s in found.items()
}
fig, ax = plt.subplots(figsize=(6, 3.6))
for block_number in range(len(qkvs)):
    places = [place for place in found if place[0] == block_number]
    x_and_y = [[strongest[p] for p in places], [passed[p] for p in places]]
    ax.plot(*x_and_y, "o", label=f"block {block_number}")
ax.annotate("block 0, head 0", (strongest[0, 0] - 0.01, passed[0, 0]), ha="right", va="center")
ax.set(xlabel="strongest weight of a row", ylabel="|dS| / |dP|", ylim=(0, None), xlim=(0, 1))
ax.axvspan(0.3, 0.85, color="C2", alpha=0.1)
ax.grid(alpha=0.3)
ax.legend(fontsize=8, loc="lower center", ncols=2)
show(fig, "Heads that choose among a few bytes pass the most gradient")

# %% [markdown]
# The head that gives nearly all of its weight to the byte before passes the least: a saturated
# softmax hardly learns any more. On the left are heads that spread their weight over many bytes.
# They pass less too, since each entry is multiplied by a small weight. The heads between the two,
# shaded in the picture, pass the most.
#
# Saturation is one reason for the factor $1/\sqrt K$. Without it the scores would be $\sqrt K$
# times as large, and heads would be saturated sooner, perhaps before they had learned anything.
#
# ## Claims, asserted

# %%
assert softmax_difference < 1e-15 and np.abs(J.sum(axis=1)).max() < 1e-15
assert np.abs(dx_of_equal).max() < 1e-15, "equal dy must give no gradient"
assert paper_difference < 1e-12, "the code and the paper differ"
assert pair_difference < 1e-12, "minilora's attention and the steps by hand differ"
assert gradcheck.max_error(checks) < gradcheck.PAIR_TOLERANCE, "attention_backward is wrong"
upper = np.triu_indices(16, 1)
assert not sensitivity["-∞"][upper].any(), "an output moved with the future"
assert sensitivity["0"][upper].any() and sensitivity["after the softmax"][upper].any()
assert list(reached) == list(range(7)), "a gradient reached the future"
assert model_difference < 1e-9, "our model's gradients are not those of loss_and_grads"
assert all(not s["dS"][np.triu_indices(len(P), 1)].any() for s in found.values())
assert shares[chosen["1 back"]]["1 back"] > 0.8 and shares[chosen["2 back"]]["2 back"] > 0.6
assert shares[chosen["spaces"]]["spaces"] > 3 * is_space.mean(), "no head looks at spaces"
assert on_spaces > 0.5, "the gradient is elsewhere"
assert abs(by_differences / by_hand - 1) < 1e-5, "the gradient of the scores is wrong"
assert passed[0, 0] == min(passed.values()), "another head is more saturated"
spread = np.mean([passed[place] for place in found if strongest[place] < 0.3])
between = np.mean([passed[place] for place in found if 0.3 < strongest[place] < 0.85])
assert passed[0, 0] < spread < between, "the heads between the two do not pass most"

# %% [markdown]
# ## Exercises
#
# [Solutions](../docs/solutions.md), each with what the programs print.
#
# 1. In `minilora/ops.py`, leave out the factor $1/\sqrt K$ in `attend_backward` and run
#    `python -m pytest tests/ops -k attention`. Which test notices? Why would the example by hand
#    not notice? What does [the course, in your browser](../docs/live.md#attend_backward), say?
# 2. Leave out the mask in `attention_weights`. Now
#    `tests/ops/test_ops.py::test_attention_does_not_see_the_future` fails. The finite differences
#    do not: why not?
# 3. Change $q$ in the example by hand to $(5, 0, 0)$. Which weights, and which gradients, can you
#    write down without any calculation?
# 4. Put a sentence of your own into `SENTENCE`. Does the same head still find the spaces?
