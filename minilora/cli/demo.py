"""The demonstration: the built-in model learns Python through adapters, and the result is shown."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from minilora import tree
from minilora.adapters import LoRAConfig
from minilora.backend import to_host
from minilora.data import load_corpus
from minilora.gradcheck import TOLERANCE, max_error
from minilora.model import Model, complete, load_model
from minilora.training.loop import TrainConfig
from minilora.training.progress import ProgressBar
from minilora.training.runs import adapt_in_folder

PROMPT = "def __init__(self, "
# Chosen by docs/sweep.py, whose table is in the built-in base's model card; with rank 2 less than
# 1 % of the base's parameters.
LORA = LoRAConfig(rank=2)
STEPS, LEARNING_RATE = 120, 2e-2


def demo(*, seed: int = 0, threads: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Adapt the built-in base to the standard library's source, print what changed, and return the
    figures by the names that `--json` writes.

    Raises MiniloraError as `adapt_in_folder` does.
    """
    started = time.perf_counter()
    model = load_model()
    corpus = load_corpus("python", model.tokenizer)
    print(
        f"The built-in base: {tree.count(model.base):,} parameters, trained on English prose.\n"
        f"The new domain: Python, {corpus.train_bytes / 1e6:.1f} MB of the standard library; "
        f"{corpus.held_out_bytes / 1e6:.1f} MB in other files held out.\n"
    )
    print(f"Before, it continues {PROMPT!r} with:\n{indented(continuation(model.on(device)))}\n")

    settings = TrainConfig(
        steps=STEPS, lr=LEARNING_RATE, eval_every=STEPS, seed=seed, threads=threads
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        with ProgressBar(settings.steps, "adapt") as report:
            run = adapt_in_folder(model, corpus, LORA, settings, folder, device=device,
                                  report=report)  # fmt: skip
        adapted = load_model(adapter=folder).on(device)

    print(
        f"\nAfter {STEPS} steps, it continues {PROMPT!r} with:\n{indented(continuation(adapted))}"
    )
    bits = 1.0 / np.log(2.0)  # one byte is one token
    figures = {
        **run.figures,
        "bits_per_byte_before": run.figures["loss_before"] * bits,
        "bits_per_byte_after": run.figures["loss_after"] * bits,
        "merge_max_abs_difference": merge_difference(adapted),
        "gradcheck_max_relative_error": check_factors(adapted, seed=seed, device=device),
    }
    figures["seconds"] = time.perf_counter() - started
    print(summary(figures))
    print(try_next(seed=seed, threads=threads, device=device))
    return figures


def continuation(model: Model) -> str:
    """The prompt and the model's continuation."""
    ids = complete(model, PROMPT, max_tokens=240, temperature=1.0, top_p=0.9)
    return PROMPT + model.tokenizer.decode(ids)


def merge_difference(adapted: Model) -> float:
    """The largest absolute difference between the logits of the merged and the unmerged model."""
    tokens = adapted.tokenizer.encode(PROMPT * 10)[None]
    return float(np.abs(adapted.merged().logits(tokens) - adapted.logits(tokens)).max())


def check_factors(adapted: Model, *, seed: int, device: str = "cpu") -> float:
    """The largest relative error of the gradients of A and B, two entries of each, in float64.

    They are compared with central differences of the loss.
    """
    from minilora.keep import Plan
    from minilora.network import Net
    from minilora.pairs import Batch, check_model

    def float64(leaf: np.ndarray) -> np.ndarray:
        return leaf.astype(np.float64)

    text = adapted.tokenizer.encode("for key, value in")
    base, lora = tree.map_leaves(float64, to_host([adapted.base, adapted.lora]))
    net = Net(base, adapted.config, lora, adapted.lora_config)
    batch = Batch(tokens=text[None, :-1], targets=text[None, 1:], masks=None)
    plan = Plan(lora=True)
    return max_error(check_model(net, batch, plan, seed=seed, entries=2, device=device))


def indented(text: str) -> str:
    """The text, with its lines indented."""
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def summary(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    share = figures["trainable_parameters"] / figures["base_parameters"]
    before, after = figures["bits_per_byte_before"], figures["bits_per_byte_after"]
    error = figures["gradcheck_max_relative_error"]
    verdict = "right" if error <= TOLERANCE else "WRONG"
    return f"""
held-out bits per byte      {before:.3f} -> {after:.3f}
trainable parameters        {figures["trainable_parameters"]:,} of \
{figures["base_parameters"]:,} ({share:.3%})
adapter on disk             {figures["adapter_bytes"] / 1e3:.0f} kB
merged against unmerged     logits differ by at most {figures["merge_max_abs_difference"]:.1e}
gradients of A and B        {verdict}: within {error:.1e} of central differences
time                        {figures["seconds"]:.0f} s, training at \
{figures["tokens_per_second"]:,.0f} tokens/s"""


def try_next(**options: Any) -> str:
    """Commands to type next; the first trains the demonstration's adapter again, bit for bit."""
    usual = {"seed": 0, "threads": 0, "device": "cpu"}
    given = {"rank": LORA.rank, "lr": LEARNING_RATE, "steps": STEPS}
    given |= {name: value for name, value in options.items() if value != usual[name]}
    words = " ".join(f"--{name} {value}" for name, value in given.items())
    rows = (
        (f"adapt python {words} --out python-adapter", "the same, saved"),
        ('generate "class " --adapter python-adapter', ""),
        ("adapt YOUR_TEXT.txt --out my-adapter", "your own text, 100 kB or more"),
        ("gradcheck", "every gradient compared with finite differences"),
        ("help adapt", "every option"),
    )
    width = max(len(command) for command, _ in rows)
    return "\nTry next:\n" + "\n".join(
        f"    minilora {command:<{width}}   {what}".rstrip() for command, what in rows
    )
