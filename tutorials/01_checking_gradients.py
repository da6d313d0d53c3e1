# %% [markdown]
# # Checking gradients
#
# Every gradient in minilora is written by hand. How do we know that they are right? This tutorial
# has three parts: the chain rule for matrices, which gives the gradients; finite differences, which
# check them; and a collection of wrong gradients that a careless check accepts.
#
# Shapes: N examples, I inputs, O outputs. Rows are examples.

# %%
import functools
import math

import matplotlib.pyplot as plt
import numpy as np

from minilora import gradcheck, ops
from minilora.figures import show
from minilora.lora import lora_backward, lora_forward
from minilora.loss import cross_entropy_backward, cross_entropy_forward

plt.rcParams.update({"figure.facecolor": "white", "figure.constrained_layout.use": True})
rng = np.random.default_rng(0)

# %% [markdown]
# ## The gradient is what stands beside the change
#
# The loss $L$ is one number. Change the entries of a matrix $x$ by a little, and call the change
# $\delta x$, a matrix of the same shape. To first order the loss changes by
#
# $$\delta L = \sum_{ij} \frac{\partial L}{\partial x_{ij}}\, \delta x_{ij} .$$
#
# Put the partial derivatives into a matrix of the same shape and call it $\mathrm{d}x$. It is the
# **gradient**. The sum of products of entries is the **inner product**,
# $\langle U, V\rangle = \sum_{ij} U_{ij} V_{ij}$. So
#
# $$\delta L = \langle \mathrm{d}x, \delta x\rangle .$$
#
# This is all we need. If we can write $\delta L$ as the inner product of some matrix with
# $\delta x$, for every small $\delta x$, then that matrix is the gradient.

# %% [markdown]
# ## Three rules for moving a factor
#
# To get $\delta x$ to stand alone, we move everything else to the other side of the inner product:
#
# $$\langle U, P\,\delta x\rangle = \langle P^\top U, \delta x\rangle, \qquad
# \langle U, \delta x\,Q\rangle = \langle U Q^\top, \delta x\rangle, \qquad
# \langle U, D \circ \delta x\rangle = \langle D \circ U, \delta x\rangle .$$
#
# A factor on the left moves over as its transpose and stays on the left. One on the right moves as
# its transpose and stays on the right. An entry-wise factor ($\circ$) moves unchanged. The proof is
# one line of traces, in `docs/notation.md`. Here are the rules in numbers.


# %%
def inner(U, V):
    return float(np.sum(U * V))


U, change = rng.standard_normal((2, 3, 4))  # two matrices of 3 × 4
P, Q, D = (rng.standard_normal(shape) for shape in ((3, 3), (4, 4), (3, 4)))

rules = {
    "left": (inner(U, P @ change), inner(P.T @ U, change)),
    "right": (inner(U, change @ Q), inner(U @ Q.T, change)),
    "entry-wise": (inner(U, D * change), inner(D * U, change)),
}
for name, (before, after) in rules.items():
    print(f"{name:10s}  {before:.12f}  {after:.12f}")

# %% [markdown]
# ## The chain rule on matrices
#
# Take $y = \tanh(xW)$ with $x$ of shape (N, I) and $W$ of shape (I, O). In two steps:
#
# - $u = xW$. Change both factors: $\delta u = \delta x\,W + x\,\delta W$. The order matters,
#   because matrices do not commute. We drop $\delta x\,\delta W$, the product of two small changes.
# - $y = \tanh u$, entry by entry, with $\tanh' u = 1 - \tanh^2 u$. So
#   $\delta y = (1 - y \circ y) \circ \delta u$.
#
# The rest of the network supplies $\mathrm{d}y$, the gradient of the loss with respect to $y$. Now
# move the factors, one after the other:
#
# $$\delta L = \langle \mathrm{d}y, (1 - y \circ y) \circ \delta u\rangle
# = \langle \underbrace{(1 - y \circ y) \circ \mathrm{d}y}_{\mathrm{d}u}, \delta u\rangle ,$$
#
# $$\langle \mathrm{d}u, \delta x\,W + x\,\delta W\rangle
# = \langle \mathrm{d}u\,W^\top, \delta x\rangle + \langle x^\top \mathrm{d}u, \delta W\rangle .$$
#
# We can read off both gradients: $\mathrm{d}x = \mathrm{d}u\,W^\top$ and
# $\mathrm{d}W = x^\top \mathrm{d}u$. In code this is a **pair**: a forward function that keeps
# what its backward function will need.


# %%
def forward(x, W):
    y = np.tanh(x @ W)
    return y, (x, W, y)


def backward(dy, cache):
    x, W, y = cache
    du = (1 - y * y) * dy
    return du @ W.T, x.T @ du


N, I, O = 5, 4, 3
x, W = rng.standard_normal((N, I)), rng.standard_normal((I, O))
dy = rng.standard_normal((N, O))
y, cache = forward(x, W)
dx, dW = backward(dy, cache)
print(f"dx {dx.shape} has the shape of x, dW {dW.shape} that of W")


# %% [markdown]
# ## What "to first order" means
#
# The simplest loss whose gradient with respect to $y$ is our $\mathrm{d}y$ is
# $L = \langle \mathrm{d}y, y\rangle$. Move $W$ by $t$ in a random direction $V$ of length 1. The
# gradient predicts the change $t\,\langle \mathrm{d}W, V\rangle$. Its error should shrink like
# $t^2$: divide $t$ by 10, and the error is divided by 100.


# %%
def loss(x, W):
    return inner(dy, forward(x, W)[0])


V = rng.standard_normal(W.shape)
V /= np.linalg.norm(V)

misses = []
print("       t   change of L     predicted  error / t^2")
for t in (1e-1, 1e-2, 1e-3, 1e-4):
    true, predicted = loss(x, W + t * V) - loss(x, W), t * inner(dW, V)
    misses.append((true - predicted) / t**2)
    print(f"{t:8.0e} {true:13.9f} {predicted:13.9f} {misses[-1]:12.4f}")

# %% [markdown]
# ## Asking the loss for its derivative
#
# Turned around, this gives the derivative along $V$ from the loss itself, without any derivation.
# Write $f(h) = L(W + hV)$. Three formulas are in use:
#
# $$\frac{f(h) - f(0)}{h}, \qquad \frac{f(h) - f(-h)}{2h}, \qquad
# \frac{8\,\big(f(h) - f(-h)\big) - \big(f(2h) - f(-2h)\big)}{12\,h} .$$
#
# Expand $f$ in powers of $h$. The first formula has an error of order $h$. In the second the even
# powers cancel, which leaves an error of order $h^2$. The third combines two of the second kind so
# that the $h^2$ terms cancel too, which leaves an error of order $h^4$.
#
# **Predict.** Which step $h$ is best for the central difference in float64? (a) the smallest that
# is not zero, (b) about $10^{-5}$, (c) about $10^{-1}$.
#
# <details><summary>Answer</summary>
#
# (b) about $10^{-5}$. The computer keeps about 16 digits of $f$ (about 7 in float32), and the
# difference of two nearly equal numbers has fewer correct digits. This **rounding error** is of
# order $\epsilon / h$, with $\epsilon \approx 10^{-16}$ (or $10^{-7}$): it *grows* when $h$
# shrinks. It meets the error $h^2$ of the formula where $h^3 \approx 10^{-16}$.
#
# </details>

# %%
FORMULAS = {
    "one-sided": lambda f, h: (f(h) - f(0)) / h,
    "central": lambda f, h: (f(h) - f(-h)) / (2 * h),
    "fourth order": lambda f, h: (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h),
}


def worst_error(formula, h, dtype):
    """The largest relative error of the numeric derivative over 20 directions."""
    directions = np.random.default_rng(1).standard_normal((20, *W.shape))
    directions /= np.linalg.norm(directions, axis=(1, 2), keepdims=True)
    x_, W_, dy_ = (array.astype(dtype) for array in (x, W, dy))

    def derivative(V):
        return formula(lambda h: np.sum(dy_ * np.tanh(x_ @ (W_ + dtype(h) * V))), h)

    errors = [abs(float(derivative(V.astype(dtype))) - inner(dW, V)) for V in directions]
    return max(errors) / np.linalg.norm(dW)


steps = 10.0 ** np.arange(-13, -0.5, 0.25)
curves = {name: [worst_error(f, h, np.float64) for h in steps] for name, f in FORMULAS.items()}
single = [worst_error(FORMULAS["central"], h, np.float32) for h in steps[steps > 1e-7]]

fig, ax = plt.subplots(figsize=(7, 4))
for name, errors in curves.items():
    ax.loglog(steps, errors, label=name)
ax.loglog(steps[steps > 1e-7], single, "--", color="gray", label="central, float32")
ax.axvline(gradcheck.STEP, color="black", linewidth=0.8)
ax.text(gradcheck.STEP / 1.3, 2e-14, "the step of minilora.gradcheck", ha="right", fontsize=8)
ax.axhline(gradcheck.PAIR_TOLERANCE, color="black", linewidth=0.8, linestyle=":")
ax.text(7e-14, 1.5e-8, "its tolerance for a pair", fontsize=8)
ax.set(xlabel="step h", ylabel="relative error", ylim=(1e-14, 1))
ax.grid(alpha=0.3)
ax.legend(loc=(0.2, 0.72), fontsize=8)
show(fig, "A step can be too small: below the best one, rounding takes over")

# %% [markdown]
# Each curve is a V. On its right arm the error is that of the formula, with slope 1, 2 or 4. On the
# left arm it is that of rounding, with slope −1. The best step lies where the arms meet.
#
# - The fourth-order formula allows a large step, and reaches the smallest error of the three.
# - In float32 even the best step is poor. A check in float32 needs a tolerance so wide that a
#   gradient may be wrong in its third digit. **Check in float64.** The code is the same.

# %%
for name, errors in [*curves.items(), ("central, float32", single)]:
    best_step = steps[-len(errors) :][np.argmin(errors)]
    print(f"smallest error, {name:17s} {min(errors):.0e}   at h = {best_step:.0e}")

# %% [markdown]
# ## A check that can be blind
#
# Now the harder question: would our check notice a gradient that is wrong? We start with six of
# minilora's pairs, with random arguments in float64, and with the values that the parameters (all
# arguments but the first) have when training starts.

# %%
random = rng.standard_normal
x = random((2, 3, 4))  # (B, T, C): leading dimensions only make more rows
s = 0.5

PAIRS = {
    # forward, backward, arguments, parameters at initialisation, constants
    "softmax": (ops.softmax_forward, ops.softmax_backward, [x], [], {}),
    "layer norm": (
        ops.layer_norm_forward,
        ops.layer_norm_backward,
        [x, random(4), random(4)],
        [np.ones(4), np.zeros(4)],
        {},
    ),
    "linear": (
        ops.linear_forward,
        ops.linear_backward,
        [x, random((4, 4)), random(4)],
        [random((4, 4)), np.zeros(4)],
        {},
    ),
    "LoRA": (
        lora_forward,
        lora_backward,
        [x, random((4, 2)), random((2, 5))],
        [random((4, 2)), np.zeros((2, 5))],
        {"scale": s},
    ),
    "gelu": (ops.gelu_forward, ops.gelu_backward, [x], [], {}),
    "cross-entropy": (
        cross_entropy_forward,
        cross_entropy_backward,
        [random((128, 5))],
        [],
        {"targets": rng.integers(5, size=128)},
    ),
}


# %% [markdown]
# ## Seven bugs
#
# All of these mistakes are common. Each function below spoils a backward pass: `dy` is the gradient
# that arrives, `args` are the arguments of the forward pass, and `right` holds their right
# gradients. The tag names the equation of `docs/derivations` that is broken.


# %%
def softmax_plain_mean(dy, args, right):
    """Subtracts the plain mean of dy instead of the mean weighted with y [SM.2]."""
    y, _ = ops.softmax_forward(*args)
    return (y * (dy - dy.mean(-1, keepdims=True)),)


def layer_norm_no_third_term(dy, args, right):
    """Forgets that the standard deviation depends on x, too [LN.6]."""
    x, w, _ = args
    dxhat = dy * w
    rstd = 1.0 / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return (dxhat - dxhat.mean(-1, keepdims=True)) * rstd, *right[1:]


def linear_not_transposed(dy, args, right):
    """dx = dy W instead of dy Wᵀ; W is square here, so that no shape complains [LIN.2]."""
    _, w, _ = args
    return dy @ w, *right[1:]


def linear_mean_bias(dy, args, right):
    """Averages db over the rows instead of summing [LIN.4]."""
    dx, dw, db = right
    return dx, dw, db / (dy.size // dy.shape[-1])


def lora_no_scale(dy, args, right):
    """Forgets the scale s in dA [LORA.4]."""
    dx, dA, dB = right
    return dx, dA / s, dB


def gelu_other_form(dy, args, right):
    """Differentiates the exact GELU, x Φ(x), while the forward pass is its tanh form [GELU.4]."""
    (x,) = args
    Phi = (0.5 + 0.5 * np.vectorize(math.erf)(x / math.sqrt(2.0))).astype(x.dtype)
    return (dy * (Phi + x * np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)),)


def cross_entropy_no_target(dy, args, right):
    """p / N: forgets to subtract 1 at the target [CE.3]."""
    (logits,) = args
    p, _ = ops.softmax_forward(logits)
    return (p * (dy / len(p)),)


BUGS = {
    "softmax: plain mean of dy": ("softmax", softmax_plain_mean),
    "layer norm: no third term": ("layer norm", layer_norm_no_third_term),
    "linear: dx = dy W": ("linear", linear_not_transposed),
    "linear: db averaged": ("linear", linear_mean_bias),
    "LoRA: no s in dA": ("LoRA", lora_no_scale),
    "gelu: the other form": ("gelu", gelu_other_form),
    "cross-entropy: no target": ("cross-entropy", cross_entropy_no_target),
}


def planted(pair, bug):
    """The forward pass, and the backward pass with a bug; the cache also holds the arguments."""
    forward, backward, *_ = PAIRS[pair]

    @functools.wraps(forward)
    def wrong_forward(*args, **constants):
        y, cache = forward(*args, **constants)
        return y, (args, cache)

    def wrong_backward(dy, cache):
        args, cache = cache
        return bug(dy, args, backward(dy, cache))

    return wrong_forward, wrong_backward


# %% [markdown]
# ## Six lazy checks
#
# All six compare entries with central differences. They differ in what they look at:
#
# - **sum of the output**: they differentiate $\sum y$, so that $\mathrm{d}y$ is 1 everywhere;
# - **ones**: in addition all parameters are 1, and only $x$ is random;
# - **only dx**: they ignore the gradients of the parameters;
# - **at initialisation**: parameters have the values with which training starts;
# - **float32**, and so with a wide tolerance, 1 %;
# - **absolute**: they accept an error of up to 0.01, however small the gradient is.


# %%
def agrees(
    pair, passes, *, dy="random", parameters="random", only_dx=False,
    dtype=np.float64, h=1e-5, rtol=1e-4, atol=1e-7,
):  # fmt: skip
    """Whether gradients and central differences agree, as far as this check looks."""
    forward, backward = passes
    _, _, (x, *given), initial, constants = PAIRS[pair]
    chosen = {"random": given, "ones": [np.ones_like(p) for p in given], "initial": initial}
    arguments = [array.astype(dtype) for array in (x, *chosen[parameters])]

    y, cache = forward(*arguments, **constants)
    dy = np.ones(y.shape) if dy == "ones" else np.random.default_rng(2).standard_normal(y.shape)
    dy = dy.astype(dtype)
    gradients = backward(dy, cache)

    def output(i, entry, t):
        moved = [array.copy() for array in arguments]
        moved[i][entry] += t
        return forward(*moved, **constants)[0]

    for i, gradient in enumerate(gradients[:1] if only_dx else gradients):
        numeric = np.zeros_like(gradient)
        for entry in np.ndindex(gradient.shape):
            numeric[entry] = np.sum(dy * (output(i, entry, h) - output(i, entry, -h))) / (2 * h)
        if not np.allclose(gradient, numeric, rtol=rtol, atol=atol):
            return False
    return True


LAZY = {
    "sum of\nthe output": {"dy": "ones"},
    "ones": {"dy": "ones", "parameters": "ones"},
    "only dx": {"only_dx": True},
    "at initial-\nisation": {"parameters": "initial"},
    "float32": {"dtype": np.float32, "h": 1e-2, "rtol": 1e-2, "atol": 1e-2},
    "absolute": {"rtol": 0.0, "atol": 1e-2},
}


def minilora_agrees(pair, passes):
    """What minilora's own check says, with its tolerance for a pair."""
    _, _, arguments, _, constants = PAIRS[pair]
    checks = gradcheck.check_pair(*passes, arguments, constants)
    return gradcheck.max_error(checks) <= gradcheck.PAIR_TOLERANCE


# %% [markdown]
# First, no false alarms: each check must accept every right pair. Then the bugs.
#
# **Predict.** How many of the six lazy checks notice all seven bugs? (a) none, (b) two, (c) four.
#
# <details><summary>Answer</summary>
#
# (a) none. Each has a blind spot of its own, for a reason that is explained below the table.
#
# </details>
#
# **Predict.** The softmax subtracts the plain mean of dy instead of the weighted one. Which check
# accepts that? (a) the sum of the output, (b) at initialisation, (c) only dx.
#
# <details><summary>Answer</summary>
#
# (a) the sum of the output: with dy = 1 both means are 1, so the right and the wrong formula both
# give zero. The softmax has no parameters, so (b) and (c) are complete checks of it.
#
# </details>

# %%
false_alarms = [
    (pair, check)
    for pair, (forward, backward, *_) in PAIRS.items()
    for check, options in LAZY.items()
    if not agrees(pair, (forward, backward), **options)
]
ours_accepts = [minilora_agrees(pair, (f, b)) for pair, (f, b, *_) in PAIRS.items()]
print(
    f"false alarms: {len(false_alarms)} by lazy checks, {ours_accepts.count(False)} by minilora's"
)

noticed = np.array(
    [
        [not agrees(pair, planted(pair, bug), **options) for options in LAZY.values()]
        + [not minilora_agrees(pair, planted(pair, bug))]
        for pair, bug in BUGS.values()
    ]
)

fig, ax = plt.subplots(figsize=(8, 3.6))
ax.imshow(noticed, cmap="RdYlGn", vmin=-0.6, vmax=1.6, aspect="auto")
for row, column in np.ndindex(noticed.shape):
    word = "noticed" if noticed[row, column] else "MISSED"
    ax.text(column, row, word, ha="center", va="center", fontsize=8)
ax.set_xticks(range(len(LAZY) + 1), [*LAZY, "minilora"], fontsize=9)
ax.set_yticks(range(len(BUGS)), list(BUGS), fontsize=9)
ax.axvline(len(LAZY) - 0.5, color="black")
show(fig, "Every lazy check misses a bug, and every bug escapes a lazy check")

# %% [markdown]
# ## Why they are blind
#
# - *Sum of the output.* A row of the softmax sums to 1, whatever $x$ is. So the true gradient of
#   the sum is zero, and any formula that gives zero for $\mathrm{d}y = 1$ looks right.
# - *Ones.* With $w = 1$ and $\mathrm{d}y = 1$ the third term of the layer norm contains the mean of
#   $\hat x$, which is zero: leaving it out changes nothing. And a matrix of ones is its own
#   transpose.
# - *Only dx.* The usual excuse is that "everything flows into dx". But $\mathrm{d}x$ does not
#   contain $\mathrm{d}b$ or $\mathrm{d}A$.
# - *At initialisation.* At $B = 0$ the true $\mathrm{d}A$ is exactly zero, and so is a wrong one.
# - *float32.* The derivatives of the two forms of the GELU differ by less than 0.001. A derivative
#   measured in float32 is hardly more precise than that, and the wide tolerance also hides the
#   small gradients of the mean loss.
# - *Absolute.* A mean over many targets has small gradients. Below the tolerance any value passes,
#   even zero.
#
# ## What to do instead
#
# A random $\mathrm{d}y$, random arguments, all arguments, float64, a relative error. This is
# `minilora.gradcheck.check_pair`, and when it fails it says where:

# %%
_, _, arguments, _, constants = PAIRS["layer norm"]
try:
    gradcheck.assert_close(
        gradcheck.check_pair(*planted("layer norm", layer_norm_no_third_term), arguments, constants)
    )
except gradcheck.GradientError as error:
    message = str(error)
    print(message)

# %% [markdown]
# The first line names the worst entry of the argument whose gradient is wrong; $w$ and $b$ are not
# mentioned, because theirs are right. The second line, `(direction)`, is another check. It moves
# *all* arguments at once in one random direction $V$ and compares a single pair of numbers,
# $\langle \mathrm{d}y, \delta y\rangle$ and $\sum \langle \text{gradient}, V\rangle$. Checking
# entry by entry costs four forward passes per entry, and says where the error is. The direction
# costs four in all and involves every entry. For a whole model, minilora does both: the direction,
# and a sample of entries.

# %%
checks = gradcheck.check_pair(ops.layer_norm_forward, ops.layer_norm_backward, arguments)
print("layer norm, right:   entries   largest relative error")
for check in checks:
    print(f"{check.name:18s} {check.entries:9d} {check.error:24.1e}")

# %% [markdown]
# ## Claims, asserted

# %%
assert all(abs(a - b) < 1e-12 for a, b in rules.values()), "a rule for moving factors is wrong"
assert np.ptp(misses) < 0.1 * abs(misses[0]), "the error does not shrink like t²"
best = {name: min(errors) for name, errors in curves.items()}
assert best["fourth order"] < best["central"] < best["one-sided"], "a higher order is no better"
assert min(single) > 1e-6, "float32 would do"
assert curves["central"][0] > 1e3 * best["central"], "a step can be too small"
assert not false_alarms and all(ours_accepts), "a right gradient was refused"
assert noticed[:, -1].all(), "minilora's check missed a bug"
assert not noticed[:, :-1].all(axis=0).any(), "a lazy check noticed every bug"
assert not noticed[:, :-1].all(axis=1).any(), "a bug was noticed by every lazy check"
assert not noticed[0, 0] and noticed[0, [2, 3]].all(), "another check misses the plain mean"
assert 3e-6 < steps[np.argmin(curves["central"])] < 3e-5, "another step is best"
assert message.startswith("dx["), "the message does not say where"
assert gradcheck.max_error(checks) < gradcheck.PAIR_TOLERANCE

# %% [markdown]
# ## Exercises
#
# [Solutions](../docs/solutions.md), each with what the programs print.
#
# 1. In `minilora/ops.py`, delete the line `dx -= xhat * (dots(dxhat, xhat) / dxhat.shape[-1])` of
#    `normalise_backward`. Then run `python -m pytest tests/ops`. Among the tests that fail are
#    `tests/ops/test_pairs.py::test_gradients_agree_with_central_differences` and
#    `test_layer_norm_s_gradient_is_orthogonal_to_what_it_removes`. What does each of them tell
#    you? (Put the line back.) And what does
#    [the course, in your browser](../docs/live.md#normalise_backward)?
# 2. Write an eighth bug that as many lazy checks as possible miss. A hint: four of the bugs above
#    escape two of them already.
# 3. `python tests/mutation/mutate.py backward` breaks every backward pass in all the small ways
#    that it knows, and lists how many of these were noticed. Each survivor comes with a reason. Is
#    the reason right?
