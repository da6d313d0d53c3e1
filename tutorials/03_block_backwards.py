# %% [markdown]
# # A transformer block, backwards
#
# The forward pass of a GPT-2 block is ten lines. Its backward pass is the same ten lines, read from
# the bottom to the top. In this tutorial we write both with minilora's pairs, compare every
# intermediate gradient with finite differences and the whole with minilora's own block, and then
# send the gradient of a real loss through all blocks of the built-in model to see where it goes.
#
# Shapes: B sequences of T tokens, C numbers for each token (the width), H attention heads, F
# numbers inside the MLP.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np

import minilora
from minilora import gpt2, gradcheck, ops, tree
from minilora.figures import show
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.loss import cross_entropy_backward, cross_entropy_forward

SMALL = os.environ.get("MINILORA_SMALL") == "1"  # smaller, for the tests
plt.rcParams.update({"figure.facecolor": "white", "figure.constrained_layout.use": True})
rng = np.random.default_rng(0)

# %% [markdown]
# ## Forward: ten lines
#
# The input $x$ (B, T, C) is the **residual stream**. Two branches read it, and each adds its result
# to it:
#
# $$\mathrm{mid} = x + \operatorname{Attn}(\operatorname{LN}_1(x)), \qquad
# y = \mathrm{mid} + \operatorname{MLP}(\operatorname{LN}_2(\mathrm{mid})) .$$
#
# LN is a layer norm. Attn is a linear map to queries, keys and values, the attention itself, and a
# linear map back. MLP is a linear map up to width F, the GELU, and a linear map down.
#
# Each line below computes one value, eight of them with a `…_forward` of
# [minilora/ops.py](../minilora/ops.py), and two with a plus sign. What a forward function keeps for
# its backward function, its **cache**, is stored under the name of the value; a sum needs none. The
# argument `nudge` is for a check later on: it changes a value by a little.


# %%
def block_forward(x, p, *, heads, nudge=None):
    """Every value of the block by name, y among them, and every cache; `p` are the parameters."""
    values, caches = {}, {}

    def line(name, output_and_cache):
        output, caches[name] = output_and_cache
        values[name] = output + nudge[name] if nudge and name in nudge else output
        return values[name]

    n1 = line("n1", ops.layer_norm_forward(x, **p["ln_1"]))
    qkv = line("qkv", ops.linear_forward(n1, **p["attn"]["qkv"]))
    att = line("att", ops.attention_forward(qkv, heads=heads))
    o = line("o", ops.linear_forward(att, **p["attn"]["o"]))
    mid = line("mid", (x + o, None))

    n2 = line("n2", ops.layer_norm_forward(mid, **p["ln_2"]))
    up = line("up", ops.linear_forward(n2, **p["mlp"]["up"]))
    act = line("act", ops.gelu_forward(up))
    down = line("down", ops.linear_forward(act, **p["mlp"]["down"]))
    line("y", (mid + down, None))
    return values, caches


# %% [markdown]
# ## Backward: the same lines from the bottom up
#
# We are given $\mathrm{d}y$, the gradient of the loss with respect to $y$. Each `…_backward` takes
# the gradient of its line's output and the line's cache. It returns the gradients of the line's
# inputs: first that of the value, then those of the parameters.
#
# We begin with the two branches, each from its end to its beginning.


# %%
def mlp_backward(ddown, caches):
    """Back through down, GELU, up, LN₂: the gradient of mid, of the values, of the parameters."""
    dact, dw_down, db_down = ops.linear_backward(ddown, caches["down"])
    (dup,) = ops.gelu_backward(dact, caches["act"])
    dn2, dw_up, db_up = ops.linear_backward(dup, caches["up"])
    dmid, dw_2, db_2 = ops.layer_norm_backward(dn2, caches["n2"])
    parameters = {
        "ln_2": {"w": dw_2, "b": db_2},
        "mlp": {"up": {"w": dw_up, "b": db_up}, "down": {"w": dw_down, "b": db_down}},
    }
    return dmid, {"down": ddown, "act": dact, "up": dup, "n2": dn2}, parameters


def attn_backward(do, caches):
    """Back through o, attention, qkv, LN₁: the gradient of x, of the values, of the parameters."""
    datt, dw_o, db_o = ops.linear_backward(do, caches["o"])
    (dqkv,) = ops.attention_backward(datt, caches["att"])
    dn1, dw_qkv, db_qkv = ops.linear_backward(dqkv, caches["qkv"])
    dx, dw_1, db_1 = ops.layer_norm_backward(dn1, caches["n1"])
    parameters = {
        "ln_1": {"w": dw_1, "b": db_1},
        "attn": {"qkv": {"w": dw_qkv, "b": db_qkv}, "o": {"w": dw_o, "b": db_o}},
    }
    return dx, {"o": do, "att": datt, "qkv": dqkv, "n1": dn1}, parameters


# %% [markdown]
# Now the block. Only two rules are new:
#
# - **Where two paths meet** in a sum, such as $y = \mathrm{mid} + \mathrm{down}$, each of them
#   gets the gradient unchanged: $\delta y = \delta\mathrm{mid} + \delta\mathrm{down}$.
# - **Where one value is used twice**, the gradients of its two uses are added. `mid` is used by
#   the sum *and* by the branch [BLOCK.3]. So is `x` [BLOCK.4].
#
# The path straight along the stream, past the branches, is the residual connection.


# %%
def block_backward(dy, caches):
    """The gradients of every value and of every parameter, by name."""
    branch, mlp_values, mlp_parameters = mlp_backward(dy, caches)
    dmid = dy + branch  # dy comes along the residual connection

    branch, attn_values, attn_parameters = attn_backward(dmid, caches)
    dx = dmid + branch  # and so does dmid
    values = {"y": dy, **mlp_values, "mid": dmid, **attn_values, "x": dx}
    return values, {**attn_parameters, **mlp_parameters}


# %% [markdown]
# ## Is each line right? Nudge the value and see
#
# A small block in float64, with random parameters. As the loss we take
# $\langle \mathrm{d}y, y\rangle$, the sum of products of entries, for a random $\mathrm{d}y$: its
# gradient with respect to $y$ is $\mathrm{d}y$.
#
# For each value we draw a random direction $V$, change the value by $\pm h V$, and run the rest of
# the block. The difference of the losses over $2h$ must be $\langle \text{gradient}, V\rangle$.
# The table goes from the last value to the first, as the gradient does.

# %%
sizes = GPTConfig(vocab_size=2, n_positions=1, n_embd=8, n_layer=1, n_head=2, n_inner=12)
block = tree.map_leaves(
    lambda leaf: leaf + 0.5 * rng.standard_normal(leaf.shape),
    gpt_init(sizes, seed=0, dtype=np.float64)["blocks"][0],
)
x, dy = rng.standard_normal((2, 2, 5, 8))  # each (B, T, C)
_, caches = block_forward(x, block, heads=2)
dvalues, dparameters = block_backward(dy, caches)


def loss(nudge):
    values, _ = block_forward(x + nudge.get("x", 0.0), block, heads=2, nudge=nudge)
    return float(np.sum(dy * values["y"]))


h, errors = 1e-5, {}
print("value   shape           by hand   by differences   relative error")
for name, gradient in dvalues.items():
    V = rng.standard_normal(gradient.shape)
    by_hand = float(np.sum(gradient * V))
    by_differences = (loss({name: h * V}) - loss({name: -h * V})) / (2 * h)
    errors[name] = abs(by_hand - by_differences) / np.linalg.norm(gradient)
    shape = str(gradient.shape)
    print(f"{name:6s} {shape:12s} {by_hand:12.6f} {by_differences:16.6f} {errors[name]:16.0e}")

# %% [markdown]
# And the parameters, every entry of each, with minilora's own check.


# %%
def loss_of_parameters(flat):
    values, _ = block_forward(x, tree.unflatten(flat), heads=2)
    return float(np.sum(dy * values["y"]))


checks = gradcheck.check_tree(loss_of_parameters, tree.flatten(block), tree.flatten(dparameters))
for check in checks:
    print(f"{check.name:12s} {check.entries:4d} entries, largest relative error {check.error:.0e}")

# %% [markdown]
# minilora's own block has the same lines, in [minilora/gpt2.py](../minilora/gpt2.py). It also takes
# adapters, of which we give it none, and a plan of the gradients that are wanted: those of the
# base. As the very same operations run, its numbers equal ours bit for bit.

# %%
no_adapters = {name: {} for name in gpt2.READS}
plan = minilora.Plan(base=True)
constants = {"config": sizes, "plan": plan, "attend": ops.attention_forward}
y, cache = gpt2.block_forward(x, block, no_adapters, **constants)
dx, dblock, _ = gpt2.block_backward(dy, cache)
values, _ = block_forward(x, block, heads=2)
same_bits = {
    "y": np.array_equal(y, values["y"]),
    "dx": np.array_equal(dx, dvalues["x"]),
    **{
        f"d({path})": np.array_equal(gradient, tree.flatten(dparameters)[path])
        for path, gradient in tree.flatten(dblock).items()
    },
}
print(f"of {len(same_bits)} arrays, {sum(same_bits.values())} have the same bits as minilora's")

# %% [markdown]
# ## What a forgotten line does
#
# The commonest mistakes are made where the paths meet. We leave out one summand of
# $\mathrm{d}\mathrm{mid}$ or of $\mathrm{d}x$, and look how far off $\mathrm{d}x$ is.
#
# **Predict.** Four summands can be forgotten. How many of these mistakes raise an error? (a) all
# four, (b) those that forget a residual connection, (c) none.
#
# <details><summary>Answer</summary>
#
# (c) none: every summand has the shape of $x$, so all shapes still fit.
#
# </details>


# %%
def mlp(d):
    return mlp_backward(d, caches)[0]


def attn(d):
    return attn_backward(d, caches)[0]


dmid = dy + mlp(dy)
wrong = {
    "residual past the MLP": mlp(dy) + attn(mlp(dy)),
    "residual past the attention": attn(dmid),
    "branch through the MLP": dy + attn(dy),
    "branch through the attention": dmid,
}
distance = {}
for name, dx_wrong in wrong.items():
    off = np.linalg.norm(dx_wrong - dvalues["x"]) / np.linalg.norm(dvalues["x"])
    distance[name] = float(off)
    print(f"forgotten: {name:30s} dx is off by {off:4.0%} of its length")

# %% [markdown]
# None of the four raises an error. A model with such a bug may even learn, only worse than it
# should. It takes a comparison with finite differences to notice.
#
# ## The whole model
#
# Now the built-in model, byte by byte, on a paragraph of prose. Below the blocks lies the sum of
# token and position embeddings; above them a last layer norm, the product with the embedding table
# (the **head**), and the cross-entropy. All of these are pairs too.

# %%
PROSE = """The rain had stopped before noon, and the captain, who had said nothing since the
morning, went up to look at the sky. There was no wind. The men stood about and waited for a word
from him, but he only shook his head and asked for his glass. It was not until the evening that
they saw the other ship, very small and far away to the south, and she was coming nearer."""

model = minilora.load_model()
ids = model.tokenizer.encode(PROSE.replace("\n", " "))[: 65 if SMALL else 257]
tokens, targets = ids[None, :-1], ids[None, 1:]
base, heads = model.base, model.config.n_head

x0, wte_cache = ops.embedding_forward(base["wte"], index=tokens)
x0, wpe_cache = ops.position_forward(x0, base["wpe"])
stream = [x0]  # before the first block, and after each
values_of, caches_of = [], []
for p in base["blocks"]:
    values, caches = block_forward(stream[-1], p, heads=heads)
    stream.append(values["y"])
    values_of.append(values)
    caches_of.append(caches)
x, ln_f_cache = ops.layer_norm_forward(stream[-1], **base["ln_f"])
logits, head_cache = ops.head_forward(x, base["wte"])
loss_value, loss_cache = cross_entropy_forward(logits, targets=targets)
print(f"{tokens.size} bytes, loss {loss_value:.4f} nats per byte")

# %%
(dlogits,) = cross_entropy_backward(1.0, loss_cache)
dx, dwte_head = ops.head_backward(dlogits, head_cache)
dx, dw_f, db_f = ops.layer_norm_backward(dx, ln_f_cache)
dstream, dblocks, dvalues_of = [dx], [], []
for caches in reversed(caches_of):
    values, parameters = block_backward(dstream[0], caches)
    dstream.insert(0, values["x"])
    dblocks.insert(0, parameters)
    dvalues_of.insert(0, values)
dx, dwpe = ops.position_backward(dstream[0], wpe_cache)
(dwte,) = ops.embedding_backward(dx, wte_cache)
dwte = dwte + dwte_head  # the table was used twice [GPT.1]
ours = {"wte": dwte, "wpe": dwpe, "blocks": dblocks, "ln_f": {"w": dw_f, "b": db_f}}

their_loss, theirs, _ = minilora.loss_and_grads(
    model, tokens=tokens, targets=targets, plan=minilora.Plan(base=True)
)
ours, theirs = tree.flatten(ours), tree.flatten(theirs)
differences = {
    path: np.abs(ours[path] - theirs[path]).max() / np.abs(theirs[path]).max() for path in theirs
}
print(f"{len(ours)} arrays of gradients; largest relative difference from minilora's")
print(f"loss_and_grads: {max(differences.values()):.0e} (float32)")

# %% [markdown]
# ## The stream in the forward pass
#
# For each block: how long is the stream's vector at a token (on average), and how long is what the
# two branches add to it?
#
# **Predict.** How does the length of the stream's vectors change from the first block to the last?
# (a) it grows, (b) it shrinks, (c) it stays, because of the layer norms.
#
# <details><summary>Answer</summary>
#
# (a) it grows, with a little step back at block 3. The layer norms stand at the entrances of the
# branches, not on the stream itself: each block adds something, and nothing divides.
#
# </details>


# %%
def length(x):
    """The length of a token's vector: the root mean square over all tokens."""
    return float(np.sqrt(np.mean(np.sum(x * x, axis=-1))))


def cosine(U, V):
    return float(np.sum(U * V) / np.linalg.norm(U) / np.linalg.norm(V))


n_layer = len(base["blocks"])
blocks = np.arange(n_layer)
lengths = [length(x) for x in stream]
fig, ax = plt.subplots(figsize=(7, 3.4))
ax.plot(np.arange(n_layer + 1) - 0.5, lengths, "ko-", label="stream")
ax.bar(blocks - 0.17, [length(v["o"]) for v in values_of], 0.3, label="attention adds")
ax.bar(blocks + 0.17, [length(v["down"]) for v in values_of], 0.3, label="MLP adds")
ax.set(xlabel="block", ylabel="length of a token's vector")
ax.grid(alpha=0.3)
ax.legend()
times = lengths[-1] / lengths[0]
show(fig, f"The residual stream grows: after the last block it is {times:.0f} times as long")

# %% [markdown]
# ## The stream in the backward pass
#
# Now the gradient, from the last block to the first. Along the way each branch adds what it sends
# back. To see what the residual connections are good for, we also send the gradient through the
# branches alone, as if there were no others:
# $\mathrm{d}x = \mathrm{Attn}^*(\mathrm{MLP}^*(\mathrm{d}y))$, where the star marks a branch's
# backward pass.
#
# **Predict.** How much of the gradient's length is left at the input of block 0, through the
# branches alone? (a) more than at the top, (b) about half, (c) less than a tenth.
#
# <details><summary>Answer</summary>
#
# (c) less than a tenth. With the residual connections, on the other hand, it arrives even longer
# than it started.
#
# </details>

# %%
without_residual = [dstream[-1]]
for caches in reversed(caches_of):
    dmid, *_ = mlp_backward(without_residual[0], caches)
    dx, *_ = attn_backward(dmid, caches)
    without_residual.insert(0, dx)

whole = [length(d) for d in dstream]
branches_only = [length(d) for d in without_residual]
alike = [cosine(d, dstream[-1]) for d in dstream]
print("after block   |gradient|   branches alone   cosine with the gradient at the top")
for i in reversed(range(n_layer + 1)):
    place = str(i - 1) if i else "(start)"
    print(f"{place:>11s} {whole[i]:12.2e} {branches_only[i]:16.2e} {alike[i]:20.2f}")

fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.4))
places = np.arange(n_layer + 1) - 0.5
axes[0].semilogy(places, whole, "ko-", label="the model")
axes[0].semilogy(places, branches_only, "s--", color="C3", label="branches alone, no residual")
axes[0].set_ylabel("length of a token's gradient")
sent_by_mlp = [length(d["mid"] - d["y"]) for d in dvalues_of]
sent_by_attention = [length(d["x"] - d["mid"]) for d in dvalues_of]
axes[1].plot(places, whole, "ko-", label="the stream's gradient")
axes[1].bar(blocks + 0.17, sent_by_mlp, 0.3, color="C1", label="the MLP adds")
axes[1].bar(blocks - 0.17, sent_by_attention, 0.3, color="C0", label="attention adds")
for ax, corner in zip(axes, ("lower left", "upper left"), strict=True):
    ax.set(xlabel="block (from the loss on the left, back to the input)")
    ax.invert_xaxis()
    ax.set_axisbelow(True)
    ax.grid(alpha=0.3)
    ax.legend(loc=corner, fontsize=8)
show(fig, "Without the residual connections the gradient dies on its way back")

# %% [markdown]
# Read both panels from left to right. Through the branches alone the gradient gets smaller at
# almost every block; after six, little is left of it. In a deeper model the first blocks would
# hardly learn. With the residual connections the gradient arrives even longer than it started. The
# cosine shows how its direction changes on the way: it is a sum of what every block above has
# added.
#
# Why is it so long at the input? A layer norm divides by the standard deviation σ of each token's
# vector. Its backward pass therefore multiplies by 1/σ [LN.6]. The stream is short at the
# beginning, where it holds little but an embedding, so 1/σ is large there. The more the blocks have
# added, the smaller is the gradient that a layer norm sends back.

# %%
gain = []
print("block   1/sigma of the stream   LN_1 backwards: |out| / |in|")
for i, d in enumerate(dvalues_of):
    one_over_sigma = float(np.mean(1.0 / np.std(stream[i], axis=-1)))
    gain.append((one_over_sigma, length(d["x"] - d["mid"]) / length(d["n1"])))
    print(f"{i:5d} {gain[-1][0]:23.3f} {gain[-1][1]:30.3f}")

# %% [markdown]
# ## Where the weights feel it
#
# The length of each weight's gradient, relative to the length of the weight itself: the proportion
# that a step of gradient descent would change.

# %%
names = ("attn.qkv", "attn.o", "mlp.up", "mlp.down")
relative = np.array(
    [
        [
            np.linalg.norm(theirs[f"blocks.{i}.{name}.w"])
            / np.linalg.norm(tree.flatten(base["blocks"][i])[f"{name}.w"])
            for i in range(n_layer)
        ]
        for name in names
    ]
)
fig, ax = plt.subplots(figsize=(7, 3))
ax.imshow(relative, cmap="viridis", norm="log", aspect="auto")
for (row, column), value in np.ndenumerate(relative):
    dark = value < np.sqrt(relative.min() * relative.max())
    ax.text(column, row, f"{value:.3f}", ha="center", va="center", color="w" if dark else "k")
ax.set_xticks(range(n_layer))
ax.set_yticks(range(len(names)), names)
ax.set(xlabel="block", title="|dW| / |W|")
show(fig, "A gradient reaches every weight of every block")

# %% [markdown]
# The gradient is lost nowhere. That is what the stream is for, and it is why LoRA can be put on any
# of these matrices. Why is the number of `attn.o` in block 0 the largest? The gradient of its
# output is that of `mid`, which is longest in block 0, while the weight is the shortest of its row.
#
# ## Claims, asserted

# %%
assert max(errors.values()) < 1e-7, "a gradient of a value disagrees with the differences"
assert gradcheck.max_error(checks) < gradcheck.TOLERANCE, "a parameter's gradient is wrong"
assert len(same_bits) == 14 and all(same_bits.values()), "minilora's block is another"
assert min(distance.values()) > 0.1, "a forgotten summand would hardly matter"
assert max(differences.values()) < 1e-3, "our gradients are not those of loss_and_grads"
assert abs(float(their_loss) - float(loss_value)) < 1e-5, "the losses differ"
assert branches_only[0] < 0.1 * branches_only[-1], "the branches alone keep the gradient"
assert whole[0] > whole[-1], "the residual connections do not keep the gradient"
lengths = [length(x) for x in stream]
assert times > 10, "the stream hardly grows"
assert SMALL or list(np.flatnonzero(np.diff(lengths) < 0)) == [3], "another step back"
assert gain[0][0] == max(g for g, _ in gain), "the stream is not shortest at the start"
assert relative.max() < 100 * relative.min(), "some weights hardly get a gradient"
assert relative[1, 0] == relative.max(), "another weight's gradient is the longest"
of_mid = [length(d["mid"]) for d in dvalues_of]
of_weight = [np.linalg.norm(p["attn"]["o"]["w"]) for p in base["blocks"]]
assert of_mid[0] == max(of_mid) and of_weight[0] == min(of_weight), "it has another cause"

# %% [markdown]
# ## Exercises
#
# [Solutions](../docs/solutions.md), each with what the programs print.
#
# 1. In `minilora/gpt2.py`, at the end of `block_backward`, return `dh` in place of `dx + dh`. Run
#    `python -m pytest tests/network`. The test is
#    `tests/network/test_network.py::test_the_model_s_gradients_agree_with_central_differences`.
#    Which parameters does its message name, and why are those of the last block not among them?
#    Or write the whole of `block_backward` [in your browser](../docs/live.md#exercise-block).
# 2. GPT-2's layer norms stand at the entrances of the branches. The first transformers had them on
#    the stream: $y = \operatorname{LN}(x + \mathrm{branch}(x))$. Change `block_forward` and the two
#    rules accordingly, check with the table, and look at the picture again with random weights
#    (`gpt_init`).
# 3. Which line's cache holds the most numbers? Count them with T = 512. The page on [the
#    model](../docs/derivations/model.md) has the answer by formula.
