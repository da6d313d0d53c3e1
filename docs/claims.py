"""The measurements of docs/claims.md: every command prints one table.

    python docs/claims.py frozen     which arrays training changes
    python docs/claims.py cost       time and memory of steps, of LoRA and of full fine-tuning
    python docs/claims.py switch     bytes and time of loading, merging and running an adapter
    python docs/claims.py random     similarity of random subspaces, and two formulas for it

--quick takes only a few steps and small sizes.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

import minilora
from minilora import tree
from minilora.adapters import lora_init
from minilora.bench.budget import SHAPES
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.keep import Plan
from minilora.network import Net
from minilora.optim import adamw, adamw_init, clip_by_global_norm
from minilora.training.loop import batch_loss_and_grads
from minilora.tree import Tree
from minilora.workers import Workers, cores

Table = Iterator[tuple[str, ...]]


# --- frozen --------------------------------------------------------------------------------------


def frozen(quick: bool) -> Table:
    """Train adapters of rank 2 on qkv of the built-in base, and count the arrays that changed."""
    model = minilora.load_model()
    before = tree.flatten(tree.map_leaves(np.copy, model.base))
    settings = minilora.TrainConfig(
        steps=2 if quick else 60, context=128, lr=1e-3, warmup=20, eval_tokens=4096
    )
    lora_config = minilora.LoRAConfig(rank=2, targets=("qkv",))
    corpus = minilora.load_corpus("python", model.tokenizer)
    adapted, _ = minilora.adapt(model, corpus, lora_config, settings)
    start = tree.flatten(lora_init(model.base, lora_config, seed=settings.seed))

    def changed(now: Tree, then: dict[str, np.ndarray]) -> int:
        return sum(not np.array_equal(x, then[path]) for path, x in tree.flatten(now).items())

    yield "tree", "numbers", "arrays", "arrays that changed"
    for name, now, then in (("base", model.base, before), ("adapters", adapted.lora, start)):
        yield name, f"{tree.count(now):,}", str(len(then)), str(changed(now, then))


# --- cost ----------------------------------------------------------------------------------------


def training_step(
    workers: Workers, config: GPTConfig, *, method: str, batch: int, context: int
) -> Callable[[], None]:
    """A training step with its update, on random tokens: of a new base, or of adapters on one."""
    rng, lora_config = np.random.default_rng(0), minilora.LoRAConfig(targets=("qkv",))
    net, trained, plan = Net(gpt_init(config, seed=0), config), "base", Plan(base=True)
    if method == "LoRA":
        lora = lora_init(net.base, lora_config, seed=0)
        net, trained, plan = Net(net.base, config, lora, lora_config), "lora", Plan(lora=True)
    moments = adamw_init(getattr(net, trained))

    def run() -> None:
        nonlocal net, moments
        tokens, targets = rng.integers(config.vocab_size, size=(2, batch, context))
        _, grads = batch_loss_and_grads(workers, net, tokens, targets, plan=plan)
        grads, _ = clip_by_global_norm(grads, 1.0)
        params, moments = adamw(getattr(net, trained), grads, moments, step=1, lr=1e-4)
        net = replace(net, **{trained: params})

    return run


def cost(quick: bool) -> Table:
    """Full over LoRA (rank 8 on qkv): median time of steps in turn, and peak of allocations."""
    yield "shape", "tokens", "time of full / LoRA", "memory of full / LoRA"
    shapes = {"tiny": (2, 16)} if quick else {"tiny": (8, 128), "small": (8, 128), "gpt2": (4, 128)}
    for name, (batch, context) in shapes.items():
        make = functools.partial(training_step, config=SHAPES[name], batch=batch, context=context)
        peaks, runs = {}, {}
        with Workers(cores()) as workers:
            for method in ("full", "LoRA"):
                tracemalloc.start()
                make(workers, method=method)()
                peaks[method] = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                runs[method] = make(workers, method=method)
            times = {n: statistics.median(t) for n, t in in_turn(runs, 2 if quick else 5).items()}
        time_ratio, memory_ratio = (x["full"] / x["LoRA"] for x in (times, peaks))
        yield name, f"{batch} × {context}", f"{time_ratio:.2f}", f"{memory_ratio:.2f}"


def in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in every round, after an uncounted one that first touches the memory."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: taken[1:] for name, taken in seconds.items()}


# --- switch --------------------------------------------------------------------------------------


def switch(quick: bool) -> Table:
    """Bytes and median time of loading a base or an adapter, and of a forward pass with either."""
    model = minilora.load_model()
    lora_config = minilora.LoRAConfig(rank=2, targets=("qkv", "o", "up", "down"))
    rng = np.random.default_rng(0)
    lora = tree.map_leaves(
        lambda x: (0.1 * rng.standard_normal(x.shape)).astype(x.dtype),
        lora_init(model.base, lora_config, seed=0),
    )
    adapted = model.with_adapter(lora, lora_config)
    merged = adapted.merged()
    tokens = rng.integers(model.config.vocab_size, size=(1, 16 if quick else 256))
    with tempfile.TemporaryDirectory() as folder:
        minilora.save_adapter(folder, lora, lora_config, model.config)
        minilora.save_base(Path(folder) / "base", merged.base, model.config)
        runs: dict[str, Callable[[], object]] = {
            "load a fine-tuned base": lambda: minilora.load_base(Path(folder) / "base"),
            "load an adapter": lambda: minilora.load_adapter(folder, model.config),
            "merge it": adapted.merged,
            "forward pass, base alone": lambda: model.logits(tokens),
            "forward pass, adapter not merged": lambda: adapted.logits(tokens),
            "forward pass, adapter merged": lambda: merged.logits(tokens),
        }
        taken = in_turn(runs, 2 if quick else 40)
        sizes = {
            name: sum(file.stat().st_size for file in Path(folder).glob(pattern))
            for name, pattern in (
                ("load a fine-tuned base", "base/*"),
                ("load an adapter", "adapter_*"),
            )
        }
    unit = statistics.median(taken["forward pass, base alone"])
    yield "what", "bytes", "time / forward pass of the base"
    for name, seconds in taken.items():
        size = f"{sizes[name]:,}" if name in sizes else ""
        yield name, size, f"{statistics.median(seconds) / unit:.2f}"
    difference = np.abs(adapted.logits(tokens) - merged.logits(tokens)).max()
    size = np.abs(merged.logits(tokens)).max()
    yield "largest logit", "", f"{size:.1f}"
    yield "merged and not merged, logits differ by", "", f"{difference:.1e}"


# --- random subspaces ----------------------------------------------------------------------------


def directions(factor: np.ndarray) -> np.ndarray:
    """Orthonormal columns that span those of A (in, R), the strongest first.

    Our A is the transpose of the paper's, so its right-singular vectors are our left ones.
    """
    return np.linalg.svd(factor, full_matrices=False)[0]


def similarity(U: np.ndarray, V: np.ndarray, i: int, j: int) -> float:
    """φ(i, j) = ‖U_iᵀ V_j‖² / min(i, j) (Hu et al. 2021, eq. 4), of the first i and j columns."""
    return float(np.linalg.norm(U[:, :i].T @ V[:, :j]) ** 2 / min(i, j))


def projection_distance(U: np.ndarray, V: np.ndarray) -> float:
    """The projection metric of two subspaces of one dimension p: ‖U Uᵀ - V Vᵀ‖ / √2.

    (Ham & Lee 2008, §2.)
    """
    return float(np.linalg.norm(U @ U.T - V @ V.T) / np.sqrt(2.0))


def random(quick: bool) -> Table:
    """Means over pairs of random subspaces of R^d beside max(i, j) / d, and both formulas for φ."""
    d, draws = 256, 3 if quick else 100
    rng = np.random.default_rng(0)
    yield "i, j", "mean of φ", "max(i, j) / d", "1 - δ²/p", "(1 - δ²) / p"
    for i, j in ((1, 1), (1, 8), (8, 8), (8, 64), (64, 64)):
        found = []
        for _ in range(draws):
            U, V = (directions(rng.standard_normal((d, n))) for n in (i, j))
            formulas = [float("nan")] * 2
            if i == j:  # the metric compares subspaces of one dimension
                squared = projection_distance(U, V) ** 2
                formulas = [1.0 - squared / i, (1.0 - squared) / i]
            found.append([similarity(U, V, i, j), *formulas])
        mean, right, printed = np.mean(found, axis=0)
        shown = (f"{right:.4f}", f"{printed:.4f}") if i == j else ("", "")
        yield f"{i}, {j}", f"{mean:.4f}", f"{max(i, j) / d:.4f}", *shown


COMMANDS: dict[str, Callable[[bool], Table]] = {
    "frozen": frozen,
    "cost": cost,
    "switch": switch,
    "random": random,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--quick", action="store_true", help="a few steps, small sizes")
    options = parser.parse_args()
    header, *rows = COMMANDS[options.what](options.quick)
    for row in (header, ("---",) * len(header), *rows):
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main()
