"""LoRA and full fine-tuning on Python source, each at its own best learning rate.

    python docs/sweep.py                 the table in the built-in base's model card
    python docs/sweep.py --steps 20      a quick look

Every run takes the same number of steps, over the same batches, from the same base, and is judged
on the same held-out files of the standard library. The share that a run recovers is
(loss before - its loss) / (loss before - the loss of the best full fine-tuning).
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

import minilora
from minilora import tree
from minilora.data import Corpus

FULL_RATES = (1e-3, 2e-3, 4e-3)
LORA_RATES = (5e-3, 1e-2, 2e-2)
EVERY_WEIGHT = ("qkv", "o", "up", "down")
# Each trains less than 1 % of the base's parameters.
ADAPTERS = (
    minilora.LoRAConfig(rank=7, targets=("q", "v")),
    minilora.LoRAConfig(rank=7, targets=("qkv",)),
    minilora.LoRAConfig(rank=3, targets=("up", "down")),
    minilora.LoRAConfig(rank=1, targets=EVERY_WEIGHT),
    minilora.LoRAConfig(rank=2, targets=EVERY_WEIGHT),
)


class Run(NamedTuple):
    """One line of the table."""

    method: str
    lr: float
    trainable: int
    before: float
    after: float


def run(
    model: minilora.Model, corpus: Corpus, lora: minilora.LoRAConfig | None, lr: float, steps: int
) -> Run:
    """Train once and report its losses in nats per token."""
    settings = minilora.TrainConfig(
        method="lora" if lora else "full", steps=steps, lr=lr, warmup=steps // 10, eval_every=steps
    )
    _, trained = minilora.adapt(model, corpus, lora, settings)
    name = f"LoRA r={lora.rank} on {', '.join(lora.targets)}" if lora else "full"
    (_, before), *_, (_, after) = trained.history.held_out
    print(f"{name}, lr {lr:g}: {before:.4f} -> {after:.4f}", file=sys.stderr, flush=True)
    return Run(name, lr, tree.count(trained.params), before, after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="folder of a base (default: the built-in one)")
    parser.add_argument("--steps", type=int, default=120, help="steps of every run")
    options = parser.parse_args()

    model = minilora.load_model(options.base)
    corpus = minilora.load_corpus("python", model.tokenizer)
    full = [run(model, corpus, None, lr, options.steps) for lr in FULL_RATES]
    lora = [run(model, corpus, c, lr, options.steps) for c in ADAPTERS for lr in LORA_RATES]

    best = min(r.after for r in full)
    print("| method | learning rate | trainable | share of base | held-out loss | recovered |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for r in sorted(full + lora, key=lambda r: r.after):
        share = r.trainable / tree.count(model.base)
        recovered = (r.before - r.after) / (r.before - best)
        print(
            f"| {r.method} | {r.lr:g} | {r.trainable:,} | {share:.3%} "
            f"| {r.after:.4f} | {recovered:.1%} |"
        )


if __name__ == "__main__":
    main()
