"""The figures of docs/parallel.md: the time of a step, and of its all-reduce alone.

    python docs/parallel.py --threads 1
    mpiexec -n 2 python docs/parallel.py --threads 1

trains on random tokens, with one shape and one method (--help), and prints the figures of one row
of the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from minilora import tree
from minilora.adapters import LoRAConfig, lora_init
from minilora.data import Corpus
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.network import Net
from minilora.training.loop import TrainConfig, train
from minilora.training.ranks import Ranks, find_ranks

SHAPES = {  # config, (sequences in a step, tokens in a sequence)
    "built-in": (GPTConfig(256, 512, n_embd=256, n_layer=6, n_head=4), (8, 256)),
    "gpt2": (GPTConfig(), (4, 128)),
}
LORA = LoRAConfig(rank=8, targets=("qkv",))


def main() -> None:
    """Print the row of the options, on the first rank."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--shape", choices=SHAPES, default="gpt2")
    options.add_argument("--method", choices=("lora", "full"), default="lora")
    options.add_argument("--threads", type=int, default=0)
    options.add_argument("--steps", type=int, default=12)
    args = options.parse_args()
    ranks = find_ranks()
    config, (batch, context) = SHAPES[args.shape]
    net = Net(gpt_init(config, seed=0), config)
    if args.method == "lora":
        net = Net(net.base, config, lora_init(net.base, LORA, seed=0), LORA)
    trained = net.base if net.lora is None else net.lora
    settings = TrainConfig(
        method=args.method, steps=args.steps, batch=batch, context=context, threads=args.threads,
        log_every=1, eval_every=args.steps, eval_tokens=1, checkpoint_every=args.steps,
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=100_000, dtype=np.int32)
    noise = Corpus(tokens, tokens[:1000], 0, 0, 1, "noise")
    ends: list[float] = []
    train(
        net,
        noise,
        settings=settings,
        ranks=ranks,
        report=lambda progress: ends.append(time.perf_counter()),
    )
    step = ranks.of_first(lambda: median(np.diff(ends[:-1])))  # an evaluation is in the last
    seconds = median(seconds_of(ranks, lambda: ranks.sum(trained)) for _ in range(20))
    if ranks.rank == 0:
        print(
            f"{args.shape}, {args.method}: {ranks.size} processes of {args.threads} threads, "
            f"{step * 1e3:.0f} ms a step, all-reduce of {tree.nbytes(trained):,} bytes "
            f"{seconds * 1e3:.2f} ms"
        )


def seconds_of(ranks: Ranks, f: Callable[[], Any]) -> float:
    """The time of a call that all ranks begin together."""
    ranks.gather(None)
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
