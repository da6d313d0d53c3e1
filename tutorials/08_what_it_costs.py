# %% [markdown]
# # What it costs
#
# How much memory and how much work does it take to adapt a model, and how much of it does LoRA
# save? All of this can be calculated before anything runs. We do so for models from a toy to GPT-3,
# and check the formulas wherever the machine at hand can.
#
# The letters: a model has `n_layer` blocks of width $C$; a weight is (I, O), an adapter of rank $R$
# has $A$ (I, R) and $B$ (R, O). A step reads $N$ tokens.

# %%
import os
import time
import tracemalloc

import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from minilora.adapters import LoRAConfig, lora_init
from minilora.bench.budget import SHAPES, Step, figures_of, flops, ledger, peaks
from minilora.bench.profile import profiling
from minilora.figures import show
from minilora.gpt2 import gpt_init
from minilora.keep import Plan
from minilora.network import Net, loss_and_grads
from minilora.tree import count

SMALL = os.environ.get("MINILORA_SMALL") == "1"  # a quick run, for the tests
plt.rcParams.update({"figure.facecolor": "white", "figure.constrained_layout.use": True})
LORA_BLUE, FULL_RED = "#2171b5", "#d94801"

# %% [markdown]
# ## Parameters
#
# One adapter has $R(I + O)$ numbers, its weight $IO$. In GPT-2's architecture a block has about
# $12 C^2$ numbers. With adapters on the projections `q` and `v`, as in the paper, it has $4RC$
# more. So the share that is trained is about $R / 3C$: *the wider the model, the smaller the
# share*.
#
# **Predict.** The paper's "10,000 times fewer trainable parameters" is for GPT-3 and rank 4. What
# is it for GPT-2 small, 16 times narrower, with the same adapters? (a) also about 10,000, (b)
# fewer than 1,000, (c) more than 100,000.
#
# <details><summary>Answer</summary>
#
# (b) fewer than 1,000: 844. The quotient grows with the width, so the famous figure needs a model
# as wide as GPT-3.
#
# </details>

# %%
PAPER = LoRAConfig(rank=4, targets=("q", "v"))
MODELS = {name: SHAPES[name] for name in ("tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
MODELS["gpt3"] = SHAPES["gpt3"]

print("model          width    base parameters       LoRA     base / LoRA")
counts = {}
for name, sizes in MODELS.items():
    step = Step(sizes, PAPER)
    counts[name] = step.base_parameters, step.adapter_parameters
    full, lora = counts[name]
    print(f"{name:12} {sizes.n_embd:7} {full:18,} {lora:10,} {full / lora:13,.0f}")

# %% [markdown]
# The last line is the paper's "18.8M" (truncated, not rounded): 96 blocks of two adapters with
# $2 \cdot 4 \cdot 12{,}288$ numbers each. Its "4.7M" is the same with rank 1. A formula is worth
# little until somebody has counted; for the smallest model we can.

# %%
tiny = SHAPES["tiny"]
base = gpt_init(tiny, seed=0)
counted = count(base), count(lora_init(base, PAPER, seed=0))
print(f"tiny, by formula {counts['tiny']}, counted {counted}")
rank_1 = Step(SHAPES["gpt3"], LoRAConfig(rank=1, targets=("q", "v"))).adapter_parameters
print(f"GPT-3 with rank 1: {rank_1:,}")

widths = [sizes.n_embd for sizes in MODELS.values()]
figure, axes = plt.subplots(figsize=(6.5, 3.6))
axes.plot(widths, [full for full, _ in counts.values()], "o-", color=FULL_RED, label="base")
axes.plot(widths, [lora for _, lora in counts.values()], "o-", color=LORA_BLUE, label="LoRA")
axes.set(xscale="log", yscale="log", xlabel="width C", ylabel="parameters")
for width, (name, (full, _)) in zip(widths, counts.items(), strict=True):
    if name in ("tiny", "gpt2", "gpt2-xl", "gpt3"):
        axes.annotate(name, (width, full), textcoords="offset points", xytext=(-4, 7), ha="right")
axes.margins(0.15)
axes.legend(loc="lower right")
show(figure, "The wider the model, the smaller the share that LoRA trains")

# %% [markdown]
# ## Memory that lasts
#
# A frozen number is stored once. A trained one comes with three more: its gradient, and AdamW's two
# running means. In float32 that is 4 bytes against 16. Since LoRA trains next to nothing, only 4 of
# the 16 remain.
#
# What does that say about the paper's figures for GPT-3, 1.2 TB of memory for full fine-tuning and
# 350 GB with LoRA? In float16 a number takes 2 bytes.

# %%
gpt3 = figures_of(Step(SHAPES["gpt3"], PAPER, batch=1, context=2048, dtype="float16"))
weights, trained = gpt3["weights_bytes"], gpt3["adapter_bytes"]
RECIPES = {
    "weights": weights,
    "LoRA: weights, and 4 x the adapters": weights + 4 * trained,
    "full: weights, m, v": 3 * weights,
    "full: weights, gradients, m, v": 4 * weights,
    "full, all of it in float32": 8 * weights,
}
for name, size in RECIPES.items():
    print(f"{name:36} {size / 1e12:6.3f} TB")
print(f"one adapter on disk: {trained / 1e6:.2f} MB, {trained / 2**20:.1f} MiB")

figure, axes = plt.subplots(figsize=(7.5, 2.8))
for i, (name, size) in enumerate(RECIPES.items()):
    axes.barh(i, size / 1e12, color=FULL_RED if name.startswith("full") else LORA_BLUE)
axes.axvline(1.2, color="black", linestyle="--")
axes.annotate("the paper's 1.2 TB", (1.2, 1), textcoords="offset points", xytext=(5, 0))
axes.set_yticks(range(len(RECIPES)), list(RECIPES))
axes.invert_yaxis()
axes.set(xlabel="TB", title="GPT-3, without activations")
show(figure, "LoRA needs the weights and little else; no recipe gives the paper's 1.2 TB")

# %% [markdown]
# The 350 GB are the weights alone, and LoRA's own share hardly shows. The adapter's "35 MB" is
# right. The paper's factor of three between the two follows if weights, m and v are counted. The
# 1.2 TB itself fits no simple recipe: three copies in float16 are less, four are more. (Four are
# 1.27 TiB, which may have been truncated to 1.2: a guess.) Such figures are worth recalculating
# before you quote them.
#
# ## Memory that comes and goes
#
# Between the forward and the backward pass a step must keep what the backward formulas need: the
# **activations**. They grow with the number of tokens. minilora has a ledger of them: what each
# operation keeps, as a formula.
#
# **Predict.** How much of the activations does LoRA save? (a) nearly all, as it trains nearly
# nothing, (b) two thirds, (c) less than a half.
#
# <details><summary>Answer</summary>
#
# (c) less than a half. What attention, GELU and layer norm keep is for $\mathrm{d}x$, which has to
# flow through every block whether its weights are trained or not.
#
# </details>

# %%
GPT2 = {
    "LoRA": Step(SHAPES["gpt2"], LoRAConfig(rank=8, targets=("q", "v")), batch=8, context=512),
    "full": Step(SHAPES["gpt2"], None, batch=8, context=512),
}
kept = {
    name: {
        what: 4 * sum(line.numbers for line in ledger(step) if line.pair.startswith(what))
        for what in ("attention", "GELU", "layer norm", "linear", "LoRA", "head")
    }
    for name, step in GPT2.items()
}
print("kept by GPT-2, 8 x 512 tokens:   LoRA      full")
for what in kept["LoRA"]:
    print(f"{what:28} " + "".join(f"{kept[name][what] / 1e6:7.0f} MB" for name in GPT2))
total = {name: sum(lines.values()) for name, lines in kept.items()}
print(f"{'in all':28} " + "".join(f"{total[name] / 1e6:7.0f} MB" for name in GPT2))

# %% [markdown]
# LoRA saves one kind of line here: a linear map's input is kept for
# $\mathrm{d}W = x^\top \mathrm{d}y$, and if $W$ is frozen it is not needed. (Unless it has an
# adapter: $\mathrm{d}A$ is computed from the same $x$.) The saving is small: of a block's four maps
# only the attention's output projection has its input kept. The inputs of the others come from a
# layer norm or a GELU, whose own caches suffice to recompute them cheaply. So LoRA removes the
# optimiser's memory, not that of the activations. The more tokens a step reads, the less that
# helps.

# %%
BATCHES = [1, 2, 4, 8, 16, 32]
LASTING = {"weights": "weights_bytes", "gradients": "gradients_bytes", "m, v": "optimizer_bytes"}
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
totals = {}
for axes, (name, adapted) in zip(
    panels, {"LoRA": GPT2["LoRA"].lora_config, "full": None}.items(), strict=True
):
    rows = [figures_of(Step(SHAPES["gpt2"], adapted, batch=b, context=512)) for b in BATCHES]
    parts = {label: [row[key] / 1e9 for row in rows] for label, key in LASTING.items()}
    parts["activations"] = [row["activations_bytes"] / 1e9 for row in rows]
    totals[name] = np.sum(list(parts.values()), axis=0)
    bottom = np.zeros(len(BATCHES))
    for (label, values), colour in zip(
        parts.items(), ("#08519c", "#fd8d3c", "#d94801", "#bdbdbd"), strict=True
    ):
        axes.bar([str(b) for b in BATCHES], values, bottom=bottom, label=label, color=colour)
        bottom += values
    axes.set(title=f"GPT-2, {name}", xlabel="sequences of 512 tokens in a step")
panels[0].set_ylabel("GB")
panels[0].legend()
show(figure, "LoRA saves gradients and moments; most of the activations stay")
saved = 1 - totals["LoRA"] / totals["full"]
for batch, share in zip(BATCHES, saved, strict=True):
    print(f"batch {batch:2}: LoRA saves {share:.0%} of the memory")

# %% [markdown]
# ## Is that true? Ask the allocator
#
# Python's `tracemalloc` sees each array that NumPy allocates. We run real steps of the tiny model
# and compare the peak of the memory in use with what `minilora.bench.budget` predicts from the
# shapes alone: the ledger, and what the backward pass needs on top at its peak.


# %%
def inputs(batch, context, adapted):
    tokens, targets = np.random.default_rng(0).integers(
        tiny.vocab_size, size=(2, batch, context), dtype=np.int32
    )
    lora = None if adapted is None else lora_init(base, adapted, seed=0)
    plan = Plan(base=adapted is None, lora=adapted is not None)
    return Net(base, tiny, lora, adapted), {"tokens": tokens, "targets": targets, "plan": plan}


def measured_peak(batch, context, adapted):
    net, options = inputs(batch, context, adapted)
    tracemalloc.start()
    result = loss_and_grads(net, **options)  # kept until the peak is read
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del result
    return peak


def predicted_peak(batch, context, adapted):
    found = peaks(Step(tiny, adapted, batch, context))
    return max(size for place, size in found.items() if place != "the update")


EVERY_WEIGHT = ("qkv", "o", "up", "down")
METHODS = {"LoRA": LoRAConfig(rank=8, targets=("q", "v")), "full": None}
CASES = [(1, 128), (4, 64)] if SMALL else [(1, 128), (4, 64), (4, 128), (2, 512), (16, 64)]
both_peaks = {
    (name, *case): (predicted_peak(*case, adapted), measured_peak(*case, adapted))
    for name, adapted in METHODS.items()
    for case in CASES
}
figure, axes = plt.subplots(figsize=(4.6, 4.2))
limit = 1.1 * max(max(pair) for pair in both_peaks.values()) / 1e6
axes.plot([0, limit], [0, limit], color="#969696", linewidth=1)
for name, colour in (("LoRA", LORA_BLUE), ("full", FULL_RED)):
    points = np.array([pair for key, pair in both_peaks.items() if key[0] == name]) / 1e6
    axes.plot(*points.T, "o", color=colour, label=name)
axes.set(xlabel="predicted (MB)", ylabel="measured (MB)")
axes.legend()
show(figure, "The formula predicts the peak to a few per cent")
for (name, batch, context), (predicted, measured) in both_peaks.items():
    off = measured / predicted - 1
    print(f"{name} {batch:2} x {context:3}: predicted {predicted / 1e6:6.1f} MB, {off:+.1%}")

# %% [markdown]
# ## Work
#
# A product of (N, I) and (I, O) takes $2NIO$ floating-point operations (FLOPs): one multiplication
# and one addition for each pair. Backwards there are two products of the same size,
# $\mathrm{d}x = \mathrm{d}y\,W^\top$ and $\mathrm{d}W = x^\top \mathrm{d}y$. So full fine-tuning
# takes 6 FLOPs for each weight and token, 2 in the forward pass and 4 in the backward pass.
#
# **Predict.** Which share of these FLOPs does LoRA take, at a rank far below the width? (a) about
# one per cent, (b) about a third, (c) about two thirds.
#
# <details><summary>Answer</summary>
#
# (c) about two thirds. With frozen weights only $\mathrm{d}W$ is left out, and 4 of the 6 FLOPs
# remain.
#
# </details>
#
# "About", because some products do not follow this rule. Those of the attention have no weights,
# so nothing is saved there. In the head half is saved: its logits are not kept, and full
# fine-tuning computes them twice, which makes 8 against 4. In the first block the backward pass
# ends at the adapter. And LoRA's own products grow with the rank.

# %%
work = {name: flops(Step(tiny, adapted, 8, 128)) for name, adapted in METHODS.items()}
ratio = work["LoRA"].total / work["full"].total
print(f"tiny: LoRA takes {ratio:.1%} of the FLOPs of full fine-tuning")
top_only = LoRAConfig(rank=8, targets=("blocks.3.attn.[qv]",))
ratio_top = flops(Step(tiny, top_only, 8, 128)).total / work["full"].total
print(f"adapters in the last block only: {ratio_top:.1%}")


def flops_ratio(sizes, adapted, batch, context):
    lora, full = (flops(Step(sizes, method, batch, context)).total for method in (adapted, None))
    return lora / full


ratios = {
    name: flops_ratio(sizes, METHODS["LoRA"], 1, 1024)
    for name, sizes in {"distilgpt2": SHAPES["distilgpt2"], **MODELS}.items()
}
print("LoRA / full, 1,024 tokens:", *(f"{name} {share:.3f}" for name, share in ratios.items()))
by_rank = {
    rank: flops_ratio(SHAPES["gpt2-xl"], LoRAConfig(rank, targets=EVERY_WEIGHT), 8, 128)
    for rank in (1, 64, 256, 1600)
}
print("GPT-2 XL, every weight:", *(f"rank {rank} {share:.3f}" for rank, share in by_rank.items()))

# %% [markdown]
# GPT-2 small saves more than a third, since much of its work is in the head. A rank as large as the
# width costs more than full fine-tuning.
#
# What does that mean in time? We run the step on one core and see where its time goes. (Each
# operation is timed from outside while the step runs. These are figures of one machine at one
# moment: yours will differ.)

# %%
GROUPS = {
    "linear": "linear maps",
    "attention": "attention",
    "attend": "attention",
    "softmax": "attention",
    "gelu": "GELU",
    "layer_norm": "layer norm",
    "normalise": "layer norm",
    "affine": "layer norm",
    "head": "head, loss",
    "frozen_head": "head, loss",
    "cross_entropy": "head, loss",
    "lora": "LoRA",
}


def seconds_by_group(adapted, rounds=1 if SMALL else 5):
    """Seconds of one step by kind of operation, the quickest of some rounds; and of all of it."""
    net, options = inputs(8, 128, adapted)
    loss_and_grads(net, **options)  # the first is slower
    best = None
    for _ in range(rounds):
        with profiling() as profile:
            loss_and_grads(net, **options)
        groups = dict.fromkeys([*GROUPS.values(), "other"], 0.0)
        for operation, seconds in profile.by_operation(1).items():
            start = next((key for key in GROUPS if operation.startswith(key)), None)
            groups[GROUPS.get(start, "other")] += seconds
        if best is None or sum(groups.values()) < sum(best.values()):
            best = groups
    return best


with threadpool_limits(1, user_api="blas"):
    seconds = {name: seconds_by_group(adapted) for name, adapted in METHODS.items()}
    square = np.random.default_rng(0).standard_normal((512, 512), dtype=np.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        square @ square
        times.append(time.perf_counter() - start)
speed = 2 * 512**3 / min(times)

figure, axes = plt.subplots(figsize=(8, 2.4))
left = np.zeros(2)
for group, colour in zip(seconds["LoRA"], plt.colormaps["tab10"].colors, strict=False):
    values = np.array([1e3 * seconds[name][group] for name in METHODS])
    axes.barh(list(METHODS), values, left=left, label=group, color=colour)
    left += values
axes.set(xlabel="milliseconds of a step, tiny, 8 x 128 tokens, one core")
axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
show(figure, "Most of the time that LoRA saves, it saves in the linear maps")

taken = {name: sum(groups.values()) for name, groups in seconds.items()}
for name in METHODS:
    rate = work[name].total / taken[name]
    print(f"{name}: {1e3 * taken[name]:.0f} ms, {rate / 1e9:.0f} GFLOP/s in all")
print(f"LoRA takes {taken['LoRA'] / taken['full']:.0%} of the time and {ratio:.0%} of the FLOPs")
print(f"a bare matrix product runs at {speed / 1e9:.0f} GFLOP/s")

# %% [markdown]
# A step takes longer than its FLOPs would at the speed of a bare product, because the element-wise
# operations move much memory for little arithmetic. That part is the same with LoRA and without, so
# the gain in time is rather less than in FLOPs. (The work of AdamW, which we left out, comes on top
# for each trained number: next to nothing with LoRA.) The paper reports 25 % less time for GPT-3.
#
# ## From here to GPT-3
#
# Finally, the same formulas for GPT-3 itself: one step of one sequence of 2,048 tokens. How long
# would the core at hand need, if it ran at the speed of its bare product all the time, and had the
# memory?

# %%
for name, adapted in {"LoRA": PAPER, "full": None}.items():
    step = Step(SHAPES["gpt3"], adapted, batch=1, context=2048, dtype="float16")
    need = figures_of(step)
    hours = flops(step).total / speed / 3600
    print(
        f"GPT-3, {name}: {flops(step).total / 1e15:.2f} PFLOP, {hours:.1f} hours a step on this "
        f"core, {need['peak_bytes'] / 1e12:.2f} TB at its peak"
    )

# %% [markdown]
# `minilora budget --model gpt3 --rank 4 --targets q,v --dtype float16` prints the whole table, for
# any model whose sizes you know.
#
# ## What to remember
#
# - The trained share is about $R / 3C$: it shrinks with the width.
# - A trained number costs four times a frozen one. LoRA saves that, for nearly all numbers.
# - Activations stay. With long batches they are most of the memory.
# - At a small rank LoRA saves about a third of the FLOPs, less of the time of the two passes, and
#   nearly all of the update's.
#
# ## Exercises
#
# [Solutions](../docs/solutions.md), each with what the programs print.
#
# 1. For which batch does LoRA save less than half of the memory of GPT-2 XL?
# 2. Put adapters into the upper half of the blocks only. What happens to the activations and to the
#    FLOPs? Calculate it first, then ask `figures_of` and `flops`.
# 3. If the activations were not kept but recomputed in the backward pass (*checkpointing*),
#    what would a step cost in FLOPs, full and with LoRA?

# %%
assert counted == counts["tiny"], "the formula does not count what is there"
assert counts["gpt3"][1] == 18_874_368 and rank_1 == 4_718_592, "the paper's 18.8M and 4.7M"
assert round(counts["gpt2"][0] / counts["gpt2"][1]) == 844, "another figure for GPT-2"
assert 9_000 < counts["gpt3"][0] / counts["gpt3"][1] < 10_000, "about 10,000 times fewer"
for name, sizes in MODELS.items():
    if name != "tiny":  # there the embeddings count
        full, lora = counts[name]
        assert lora / full < 4 / (3 * sizes.n_embd), f"{name}: more than R / 3C"
assert round(weights / 1e9) == 349 and 37 < trained / 1e6 < 38, "350 GB and 35 MB"
assert 3 * weights < 1.2e12 < 4 * weights, "1.2 TB lies between two recipes"
assert f"{4 * weights / 2**40:.2f}" == "1.27", "four copies in TiB"
assert total["LoRA"] < total["full"] < 2 * total["LoRA"], "activations stay"
assert (np.diff(saved) < 0).all(), "the more tokens, the less is saved"
for (name, *case), (predicted, measured) in both_peaks.items():
    assert abs(measured / predicted - 1) < 0.1, f"{name} {case}: the prediction is off"
assert 2 / 3 <= ratio < 0.75, "about a third of the FLOPs"
assert ratios["distilgpt2"] < ratios["gpt2"] < 2 / 3 < ratios["gpt2-xl"], "more in few blocks"
assert abs(ratios["gpt3"] - 2 / 3) < 0.01, "GPT-3 saves a third"
assert by_rank[1] < 2 / 3 < by_rank[64] < by_rank[256] < 1 < by_rank[1600], "the rank counts"
assert ratio_top < ratio, "no gradient has to reach the lower blocks"
