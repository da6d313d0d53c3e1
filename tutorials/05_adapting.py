# %% [markdown]
# # Adapting a model: LoRA beside full fine-tuning
#
# The built-in model has read only English prose. We teach it Python in two ways: by training all
# of its parameters, and by training an adapter of about one per cent of their number. Then we
# compare what was learned, what it cost, and what was forgotten.
#
# The text is the source of the standard library of the Python that runs this tutorial, so nothing
# is downloaded. Another version of Python has another library, and gives slightly different
# figures. A token is one byte.

# %%
import dataclasses
import os
import time

import matplotlib.pyplot as plt
import numpy as np

import minilora
from minilora import tree
from minilora.data import draw_batch, held_out_batches
from minilora.figures import show
from minilora.loss import cross_entropy_forward
from minilora.optim import adamw, adamw_init, clip_by_global_norm, warmup_cosine

SMALL = os.environ.get("MINILORA_SMALL") == "1"  # a quick run, for the tests
plt.rcParams.update({"figure.facecolor": "white", "figure.constrained_layout.use": True})

model = minilora.load_model()
corpus = minilora.load_corpus("python", model.tokenizer)
print(f"the base: {tree.count(model.base):,} parameters")
print(f"Python to train on: {corpus.train_bytes:,} bytes")
print(f"held out, in other files: {corpus.held_out_bytes:,} bytes")

# %% [markdown]
# ## The new domain and the old one
#
# We judge by the **loss**: the mean of $-\log p$ over the bytes of a text, where $p$ is the
# probability that the model gave to the byte that came. Its unit is nats per byte. Lower is
# better; a model that knows nothing has $\ln 256 \approx 5.5$.
#
# - *New*: pieces of the held-out Python files.
# - *Old*: what the base itself writes. We give it the beginning of a sentence and let it continue
#   freely (temperature 1, nothing cut off), so the text comes from the distribution that it has
#   learned. If an adapted model has a higher loss on this text, it has moved away from what the
#   base knew. The increase estimates the **Kullback–Leibler divergence** between the two models:
#   the mean of $\log p_{\text{base}} - \log p_{\text{adapted}}$ over the base's own text.

# %%
CONTEXT = 32 if SMALL else 128
new_text = held_out_batches(corpus.held_out, context=CONTEXT, limit=256 if SMALL else 4096)

PROMPTS = ("The ",) if SMALL else ("The ", "I ", "It was ", "When ", "There ", "He ", "In ", "My ")
written = []
for seed, prompt in enumerate(PROMPTS):
    ids = minilora.complete(model, prompt, max_tokens=CONTEXT, temperature=1.0, seed=seed)
    written.append([*model.tokenizer.encode(prompt), *ids][: CONTEXT + 1])
written = np.array(written, np.int32)
old_text = [(written[:, :-1], written[:, 1:])]


def printable(text):
    """The text in ASCII, which every terminal can print."""
    return text.encode("ascii", "replace").decode()


def mean_loss(model, batches):
    """Nats per byte over batches of (inputs, targets)."""
    nats = size = 0
    for tokens, targets in batches:
        nats += float(cross_entropy_forward(model.logits(tokens), targets=targets, count=1)[0])
        size += targets.size
    return nats / size


print(f"loss of the base: {mean_loss(model, new_text):.3f} on Python, ", end="")
print(f"{mean_loss(model, old_text):.3f} on what it writes itself")
print()
print(printable(model.tokenizer.decode(written[0])))

# %% [markdown]
# ## One loop for both
#
# Training repeats five lines: draw a batch, compute the gradients, clip them, find the learning
# rate of this step, take a step of AdamW. Full fine-tuning and LoRA differ in which tree they pass
# to these lines: the base or the adapters. There is nothing more to freezing.
#
# The adapters have rank 2 and sit on all weight matrices of all blocks. Their learning rate is ten
# times as high, because the factors are small and have further to go. We also try LoRA at twice
# that rate. (How the rates were found: see the table in [the base's model
# card](../minilora/base/README.md).)
#
# **Predict.** LoRA trains about one per cent of the numbers. How long does its training take,
# compared with full fine-tuning? (a) about one per cent of the time, (b) about a tenth, (c) more
# than half.
#
# <details><summary>Answer</summary>
#
# (c) more than half. The forward pass, and the gradients of all activations on the way back, have
# to be computed all the same. Only the products for the weights' gradients and the optimiser's work
# are saved.
#
# </details>

# %%
LORA = minilora.LoRAConfig(rank=2, alpha=2.0, targets=("qkv", "o", "up", "down"))
STEPS, BATCH = (12, 4) if SMALL else (72, 4)


def adapted(method, parameters):
    """The model with trained parameters in their place."""
    if method == "lora":
        return model.with_adapter(parameters, LORA)
    return dataclasses.replace(model, base=parameters)


def train(method, peak):
    """The adapted model, the losses of the steps, and notes of (step, loss on new, on old)."""
    parameters = minilora.lora_init(model.base, LORA, seed=0) if method == "lora" else model.base
    moments, losses, notes = adamw_init(parameters), [], []
    for step in range(1, STEPS + 1):
        now = adapted(method, parameters)
        if (step - 1) % (STEPS // 6) == 0:
            notes.append((step - 1, mean_loss(now, new_text), mean_loss(now, old_text)))
        rng = np.random.default_rng([0, step])  # the same batches for both methods
        tokens, targets = draw_batch(corpus.train, batch=BATCH, context=CONTEXT, rng=rng)
        plan = minilora.Plan(lora=method == "lora", base=method == "full")
        loss, dbase, dlora = minilora.loss_and_grads(now, tokens=tokens, targets=targets, plan=plan)
        gradients, _ = clip_by_global_norm(dlora if method == "lora" else dbase, 1.0)
        rate = warmup_cosine(step, steps=STEPS, peak=peak, warmup=STEPS // 6)
        parameters, moments = adamw(parameters, gradients, moments, step=step, lr=rate)
        losses.append(float(loss))
    now = adapted(method, parameters)
    notes.append((STEPS, mean_loss(now, new_text), mean_loss(now, old_text)))
    return now, losses, np.array(notes)


runs, seconds = {}, {}
for name, method, peak in (
    ("full", "full", 1e-3),
    ("LoRA", "lora", 1e-2),
    ("LoRA, rate x 2", "lora", 2e-2),
):
    started = time.perf_counter()
    runs[name] = train(method, peak)
    seconds[name] = time.perf_counter() - started

# %% [markdown]
# ## What was learned

# %%
COLOURS = dict(zip(runs, ("C1", "C0", "C2"), strict=True))
fig, ax = plt.subplots(figsize=(7, 3.6))
for name, (_, losses, notes) in runs.items():
    ax.plot(np.arange(1, STEPS + 1), losses, color=COLOURS[name], alpha=0.3, linewidth=1)
    ax.plot(notes[:, 0], notes[:, 1], "o-", color=COLOURS[name], label=f"{name}, held out")
ax.set(xlabel="step", ylabel="loss on Python (nats per byte)")
ax.set_title("thin lines: the training batches", fontsize=10)
ax.grid(alpha=0.3)
ax.legend()
show(fig, "In the same number of steps full fine-tuning learns more than LoRA of rank 2")

# %% [markdown]
# All three fall quickly. Full fine-tuning gets further: it may change every weight, and does not
# have to squeeze its change into rank 2.
#
# ## What it costs
#
# Each trained number needs room for itself, its gradient, and AdamW's two moments, four bytes
# each. Only the trained numbers have to be stored afterwards: a whole new model, or a small file
# beside the old one.


# %%
def trained_tree(name):
    now, *_ = runs[name]
    return now.base if now.lora is None else now.lora


trained = {name: tree.count(trained_tree(name)) for name in runs}
print("                 trained numbers    share   room for training   seconds")
for name, numbers in trained.items():
    share, megabytes = numbers / tree.count(model.base), 4 * 4 * numbers / 1e6
    print(f"{name:15s} {numbers:16,} {share:8.2%} {megabytes:16.1f} MB {seconds[name]:9.1f}")

# %% [markdown]
# ## What was forgotten
#
# Each path in the next picture is one training run. It starts at the base, on the left. To the
# right the model has learned more Python, further up it has forgotten more. The best path would be
# a flat line.
#
# **Predict.** Compare the two where both have the *same* loss on Python. Which has forgotten less
# of its old text? (a) full fine-tuning, (b) LoRA, (c) neither.
#
# <details><summary>Answer</summary>
#
# (b) LoRA, at its usual rate: the end of its path lies below the path of full fine-tuning.
#
# </details>

# %%
fig, ax = plt.subplots(figsize=(6.5, 4.4))
base_new, base_old = runs["full"][2][0, 1:]
for name, (*_, notes) in runs.items():
    learned, forgotten = base_new - notes[:, 1], notes[:, 2] - base_old
    ax.plot(learned, forgotten, "o-", color=COLOURS[name], markersize=4, label=name)
    ax.annotate(
        f"{STEPS} steps", (learned[-1], forgotten[-1]), xytext=(5, -3), textcoords="offset points"
    )
ax.annotate("base", (0, 0), xytext=(8, -5), textcoords="offset points")
ax.set(
    xlabel="learned: how far the loss on Python fell",
    ylabel="forgotten: how far the loss\non the base's own text rose",
)
ax.margins(x=0.15)
ax.grid(alpha=0.3)
ax.legend()
show(fig, "Having learned as much Python, LoRA at its usual rate has forgotten less")

# %%
before_new, before_old = runs["full"][2][0, 1:]
print(f"the base: {before_new:.3f} on Python, {before_old:.3f} on its own text\n")
print("                 on Python   on its own text   forgotten")
for name, (*_, notes) in runs.items():
    _, new, old = notes[-1]
    print(f"{name:15s} {new:10.3f} {old:17.3f} {old - before_old:11.3f}")

# %% [markdown]
# LoRA has learned less than full fine-tuning, and forgotten less. In part these are one and the
# same: a model that changes less forgets less. That is why the picture compares them at the same
# loss on Python. Biderman et al. (2024) found the same in large models and made it their title:
# *LoRA Learns Less and Forgets Less*.
#
# But it is no law. At twice the rate LoRA learns hardly more, and forgets more. A low rank limits
# the kind of change, not its size. How much is forgotten has to be measured, with the settings that
# are used.
#
# One difference remains whatever the rate. LoRA did not touch the base: remove the adapter, and the
# old model is back, bit for bit. After full fine-tuning, what was forgotten is gone.

# %%
lora_model, *_ = runs["LoRA"]
untouched = lora_model.base is model.base
off = dataclasses.replace(lora_model, lora=None, lora_config=None)
print("the adapted model holds the very arrays of the base:", untouched)
print(f"its loss on the old text with the adapter off: {mean_loss(off, old_text):.3f}")

# %% [markdown]
# ## Read it
#
# What does each model write? We use one prompt from the new domain and one from the old, and the
# same random numbers for all.

# %%
print(f"bytes of Python read: {STEPS * BATCH * CONTEXT:,}\n")
texts = {}
for prompt in ("    def get_", "She was so much "):
    for name, now in (("base", model), ("full", runs["full"][0]), ("LoRA", runs["LoRA"][0])):
        ids = minilora.complete(now, prompt, max_tokens=20 if SMALL else 160, temperature=0.7)
        texts[prompt, name] = prompt + model.tokenizer.decode(ids)
        print(f"--- {name} ---\n{printable(texts[prompt, name].rstrip())}\n")

# %% [markdown]
# This is a very small model after very few steps. Still, it has picked up underscores, brackets and
# indentation. Now look at the prose of the adapted models, and how far Python has crept into it.
#
# ## Claims, asserted

# %%
notes_of = {name: notes for name, (*_, notes) in runs.items()}
assert trained["LoRA"] < 0.01 * trained["full"], "the adapter is not small"
assert untouched, "training the adapter changed the base"
assert mean_loss(off, old_text) == before_old, "the base is not what it was"
assert all(notes[-1, 1] < before_new for notes in notes_of.values()), "nothing was learned"
if not SMALL:
    full, lora, fast = notes_of.values()
    assert full[-1, 1] < lora[-1, 1] < before_new - 0.4, "LoRA learns less, but it does learn"
    assert before_old < lora[-1, 2] < full[-1, 2], "LoRA does not forget less"
    assert before_old < fast[-1, 2] < full[-1, 2], "nor at twice the rate"
    learned = np.minimum.accumulate(full[:, 1])  # np.interp wants them in order
    same = np.interp(lora[-1, 1], learned[::-1], full[::-1, 2])
    assert lora[-1, 2] < same, "at the same loss on Python, LoRA has forgotten more"
    for (prompt, name), text in texts.items():
        assert name == "base" or text != texts[prompt, "base"], "an adapted model writes as before"

# %% [markdown]
# ## Exercises
#
# [Solutions](../docs/solutions.md), each with what the programs print.
#
# 1. Half the new batches, half the old: mix the base's own text into training (draw some rows from
#    `written`). How does the path of full fine-tuning change? This is called rehearsal.
# 2. Let LoRA's rank be 8, or its targets only `("qkv",)`. Do the paths differ, or do they only go
#    further along the same one?
# 3. Use text of your own: `minilora.load_corpus("my_file.txt", model.tokenizer)`. The same from
#    the command line is `minilora adapt my_file.txt --out my-adapter`.
# 4. Freeze nothing: ask for `Plan(base=True, lora=True)` and let AdamW change both trees. What does
#    `untouched` say then, and how do the paths look? In minilora the test
#    `test_adapters_train_and_the_base_keeps_its_bits` in `tests/training/test_train.py` notices
#    such a mistake.
