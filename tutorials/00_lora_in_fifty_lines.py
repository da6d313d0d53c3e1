# %% [markdown]
# # LoRA in fifty lines
#
# We know the weight W of a linear map. New data come from W plus a change of rank 2. We leave W as
# it is and learn only the change, as a product A B of two thin matrices, with both gradients worked
# out by hand. NumPy is all we need; minilora itself appears only at the end, for comparison and for
# a picture.
#
# Shapes: N examples, I inputs, O outputs, rank R. Rows are examples, so y = x W.

# %%
import numpy as np

rng = np.random.default_rng(0)
N, I, O, R = 200, 20, 15, 2  # noqa: E741

W = rng.standard_normal((I, O))
change = rng.standard_normal((I, R)) @ rng.standard_normal((R, O)) / np.sqrt(I)
x = rng.standard_normal((N, I))
target = x @ (W + change)

# %% [markdown]
# ## Forward
#
# The adapted map is y = x W + s (x A) B with A (I, R), B (R, O) and a constant s = α / R. The loss
# is half the squared error, averaged over the examples.
#
# A starts random and B starts at zero. The product A B is then zero, so training starts exactly at
# the old map. We choose α = 4, so that s is not 1: with s = 1 no check notices a forgotten s.

# %%
s = 4.0 / R
A = rng.uniform(-1 / np.sqrt(I), 1 / np.sqrt(I), (I, R))
B = np.zeros((R, O))


def loss_of(A, B):
    y = x @ W + s * (x @ A) @ B
    return 0.5 * np.sum((y - target) ** 2) / N


# %% [markdown]
# ## Backward, by hand
#
# Let dy be the gradient of the loss with respect to y. A small change δA of A changes y by
# s (x δA) B, and the loss by the inner product
#
# ⟨dy, s x δA B⟩ = ⟨s xᵀ dy Bᵀ, δA⟩.
#
# What stands beside δA is the gradient: dA = s xᵀ (dy Bᵀ). In the same way dB = s (x A)ᵀ dy. W gets
# no gradient at all. The brackets matter: dy Bᵀ has only R columns, so the I × O matrix xᵀ dy,
# which would be the gradient of W, is never computed.


# %%
def gradients_of(A, B):
    h = x @ A
    dy = (x @ W + s * h @ B - target) / N
    dA = s * x.T @ (dy @ B.T)
    dB = s * h.T @ dy
    return dy, dA, dB


# %% [markdown]
# ## Is it right? Ask the loss itself
#
# The central difference (L(A + ε V) - L(A - ε V)) / 2ε, with a V that is 1 in one entry and 0 in
# the others, approximates that entry of the gradient. We compare all entries, at a B that is not
# zero: at B = 0 the true dA is zero, and so is what most wrong formulas give.
#
# **Predict.** Suppose that you forget the s in dA. How large is the relative error then? (a) about
# 1e-10, (b) 0.5, (c) 2.
#
# <details><summary>Answer</summary>
#
# (b) 0.5: the wrong dA is the right one divided by s, and s = 4 / 2 = 2. Half of each entry is
# missing. Had we chosen α = R, the error would be zero, and the check blind.
#
# </details>


# %%
def numeric(f, point, eps=1e-5):
    gradient = np.zeros_like(point)
    for entry in np.ndindex(point.shape):
        step = np.zeros_like(point)
        step[entry] = eps
        gradient[entry] = (f(point + step) - f(point - step)) / (2 * eps)
    return gradient


some_B = rng.standard_normal(B.shape)
_, dA, dB = gradients_of(A, some_B)
error_A = np.abs(dA - numeric(lambda A: loss_of(A, some_B), A)).max() / np.abs(dA).max()
error_B = np.abs(dB - numeric(lambda B: loss_of(A, B), some_B)).max() / np.abs(dB).max()
error_without_s = np.abs(dA / s - dA).max() / np.abs(dA).max()
print(f"largest relative error: dA {error_A:.1e}, dB {error_B:.1e}; dA without s {error_without_s}")

# %% [markdown]
# ## Train
#
# Plain gradient descent, 200 steps.
#
# **Predict.** Which factor moves in the very first step? (a) both, (b) only A, (c) only B.
#
# <details><summary>Answer</summary>
#
# (c) only B: at B = 0 the gradient dA = s xᵀ (dy Bᵀ) is exactly zero. After one step B is not zero,
# and A follows.
#
# </details>

# %%
losses, sizes_dA, sizes_dB = [], [], []
for step in range(201):
    _, dA, dB = gradients_of(A, B)
    losses.append(loss_of(A, B))
    sizes_dA.append(np.abs(dA).max())
    sizes_dB.append(np.abs(dB).max())
    if step in (0, 1, 2, 5, 10, 50, 100, 200):
        print(f"step {step:3d}   loss {losses[-1]:8.1e}   largest entry of dA {sizes_dA[-1]:.1e}")
    A = A - 0.1 * dA
    B = B - 0.1 * dB

# %% [markdown]
# ## What we have
#
# The learned update is the true change, W was never touched, and we trained R (I + O) numbers
# instead of I O. Afterwards the update can be added to W, and the adapted map costs what the old
# one did. minilora's own LoRA pair gives the same gradients as the two lines above. In your browser
# you can [change `lora_backward`](../docs/live.md#lora_backward) and see what a mistake does.

# %%
import matplotlib.pyplot as plt  # noqa: E402

from minilora.figures import show  # noqa: E402
from minilora.lora import lora_backward, lora_forward  # noqa: E402

dy, dA, dB = gradients_of(A, some_B)
_, cache = lora_forward(x, A, some_B, scale=s)
_, dA_minilora, dB_minilora = lora_backward(dy, cache)

trained, full = A.size + B.size, W.size
error = np.abs(s * A @ B - change).max() / np.abs(change).max()
merged = W + s * A @ B
print(f"trained {trained} numbers instead of {full}; relative error of the change {error:.1e}")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.semilogy(losses, color="black")
left.set(xlabel="step", ylabel="loss", title="the loss")
right.plot(sizes_dA[:15], "o-", label="dA")
right.plot(sizes_dB[:15], "s-", label="dB")
right.set(xlabel="step", ylabel="largest entry", title="the gradients, first steps")
right.legend()
show(figure, "The loss vanishes; at B = 0 only B has a gradient, then A joins in")

assert error_A < 1e-6, "dA disagrees with the finite differences"
assert error_B < 1e-6, "dB disagrees with the finite differences"
assert error_without_s == 0.5, "without s, dA is not half of what it should be"
assert sizes_dA[0] == 0.0 < sizes_dB[0], "at B = 0 the gradient of A alone is exactly zero"
assert sizes_dA[1] > 0.0, "after one step it is not"
assert losses[-1] < 1e-10 * losses[0], "the loss did not vanish"
assert error < 1e-4, "the update is not the change"
assert np.allclose(x @ merged, x @ W + s * (x @ A) @ B), "merged and unmerged differ"
assert np.allclose(dA, dA_minilora, rtol=1e-12, atol=1e-14), "minilora's dA differs"
assert np.allclose(dB, dB_minilora, rtol=1e-12, atol=1e-14), "minilora's dB differs"
