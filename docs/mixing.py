"""The figures of docs/mixing.md: what averaging factors costs, and what unmerging leaves behind.

    python docs/mixing.py                both tables
    python docs/mixing.py --steps 2      a quick look

Three adapters are trained on the base: one on the standard library's source, and two on the text of
Python's language reference (pydoc_data.topics). The second of the two starts from another A.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

import minilora
from minilora.adapters import LoRAConfig, adapters, weight_of
from minilora.data import Corpus
from minilora.evaluation import evaluate_tokens
from minilora.lora import merge, unmerge
from minilora.mixing import mix
from minilora.tree import Tree, flatten, map_leaves

LORA = LoRAConfig(rank=2, targets=("qkv", "o", "up", "down"))
LEARNING_RATE = 5e-3
TOKENS = 32768  # of held-out text, for each loss
ROUNDS = (1, 10)


# --- averaging the factors -----------------------------------------------------------------------


def average(*trees: Tree) -> Tree:
    """The mean of the trees, A by A and B by B: not the mean of their updates."""
    return map_leaves(lambda *leaves: sum(leaves) / len(leaves), *trees)


def update_of(lora: Tree, lora_config: LoRAConfig) -> np.ndarray:
    """All entries of all updates s A B, in one vector of float64."""
    return np.concatenate(
        [
            (lora_config.scale_of(path) * ab["A"].astype(np.float64) @ ab["B"]).ravel()
            for path, ab in adapters(lora).items()
        ]
    )


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b|."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# --- merging and unmerging -----------------------------------------------------------------------


class Rounding(NamedTuple):
    """What some rounds of merging and unmerging do to the adapted weights.

    `merged` is the distance of the merged weights' update from s A B, relative to s A B. Of the
    weights afterwards, `changed` is the share of entries that differ from the base's, `worst` is
    the largest difference, and `distance` is the whole difference relative to the update.
    """

    rounds: int
    merged: float
    changed: float
    worst: float
    distance: float


def rounding(
    base: Tree, lora: Tree, lora_config: LoRAConfig, rounds: tuple[int, ...] = ROUNDS
) -> Iterator[Rounding]:
    """The rounding after each of these numbers of rounds; all arrays have the base's dtype."""
    paths = list(dict.fromkeys(weight_of(path, 0)[0] for path in adapters(lora)))

    def vector(tree: Tree) -> np.ndarray:
        flat = flatten(tree)
        return np.concatenate([flat[path].ravel() for path in paths]).astype(np.float64)

    wide = map_leaves(lambda x: x.astype(np.float64), {"base": base, "lora": lora})
    weights = vector(base)
    update = vector(merge(wide["base"], wide["lora"], lora_config)) - weights
    merged = distance(vector(merge(base, lora, lora_config)) - weights, update)
    for done in range(1, max(rounds) + 1):
        base = unmerge(merge(base, lora, lora_config), lora, lora_config)
        if done in rounds:
            left = np.abs(vector(base) - weights)
            left_share = float(np.linalg.norm(left) / np.linalg.norm(update))
            yield Rounding(done, merged, float((left > 0).mean()), float(left.max()), left_share)


# --- the tables ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="folder of a base (default: the built-in one)")
    parser.add_argument("--steps", type=int, default=60, help="steps of every training")
    options = parser.parse_args()

    model = minilora.load_model(options.base)
    source, reference = (
        minilora.load_corpus(text, model.tokenizer)
        for text in ("python", pydoc_data.topics.__file__)
    )

    def trained(corpus: Corpus, seed: int) -> Tree:
        settings = minilora.TrainConfig(
            steps=options.steps, lr=LEARNING_RATE, warmup=5, eval_every=options.steps, seed=seed
        )
        return minilora.adapt(model, corpus, LORA, settings)[0].lora

    def losses(lora: Tree, lora_config: LoRAConfig) -> str:
        """Nats per token on the held-out text of both corpora."""
        adapted = model.with_adapter(lora, lora_config)
        held_out = [corpus.held_out[:TOKENS] for corpus in (source, reference)]
        return " | ".join(
            f"{evaluate_tokens(adapted, t, text_bytes=len(t)).loss:.3f}" for t in held_out
        )

    first = trained(source, seed=0)
    print("| adapter | update, off by | loss on source | loss on reference |")
    print("| --- | ---: | ---: | ---: |")
    print(f"| source alone | | {losses(first, LORA)} |")
    for seed, start in ((0, "the same initial A"), (1, "another initial A")):
        second = trained(reference, seed=seed)
        exact = mix([(first, LORA), (second, LORA)], [0.5, 0.5])
        naive = average(first, second), LORA
        off = distance(update_of(*naive), update_of(*exact))
        print(f"| reference alone, {start} | | {losses(second, LORA)} |")
        print(f"| half of each, {start} | 0 | {losses(*exact)} |")
        print(f"| factors averaged, {start} | {off:.1%} | {losses(*naive)} |")

    print("\n| dtype | rounds | merged update, off by | entries changed | worst | left of update |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    # The built-in base is stored in float16; with an adapter merged in, it uses all of float32.
    full = merge(model.base, second, LORA)
    for dtype in (np.float32, np.float16):
        base, lora = (map_leaves(lambda x, d=dtype: x.astype(d), t) for t in (full, first))
        for row in rounding(base, lora, LORA):
            print(
                f"| {np.dtype(dtype)} | {row.rounds} | {row.merged:.1e} | {row.changed:.1%} "
                f"| {row.worst:.1e} | {row.distance:.1e} |"
            )


if __name__ == "__main__":
    main()
