"""The demonstration: the built-in model learns Python through adapters, and shows that it did."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from minilora import tree
from minilora.backend import to_host
from minilora.cli.report import ProgressBar
from minilora.data import load_corpus
from minilora.gradcheck import TOLERANCE, max_error
from minilora.lora import LoRAConfig
from minilora.model import Model, complete, load_model
from minilora.training.loop import TrainConfig
from minilora.training.runs import adapt_in_folder

PROMPT = "def __init__(self, "
# Chosen by docs/sweep.py, whose table is in the model card of the built-in base.
LORA = LoRAConfig(rank=2, alpha=2.0, targets=("qkv", "o", "up", "down"))
STEPS, LEARNING_RATE = 120, 2e-2


def demo(*, seed: int = 0, threads: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Adapt the built-in base to the standard library's source and print what changed.

    Returns the figures by the names that `--json` writes.
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
        steps=STEPS,
        lr=LEARNING_RATE,
        warmup=STEPS // 10,
        eval_every=STEPS,
        eval_tokens=32768,
        seed=seed,
        threads=threads,
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
    return figures


def continuation(model: Model) -> str:
    """What the model writes after the prompt, prompt included."""
    ids = complete(model, PROMPT, max_tokens=240, temperature=1.0, top_p=0.9)
    return PROMPT + model.tokenizer.decode(ids)


def merge_difference(adapted: Model) -> float:
    """The largest difference between the logits of the merged and the unmerged model."""
    tokens = adapted.tokenizer.encode(PROMPT * 10)[None]
    return float(np.abs(adapted.merged().logits(tokens) - adapted.logits(tokens)).max())


def check_factors(adapted: Model, *, seed: int, device: str = "cpu") -> float:
    """The largest relative error of the factors' gradients, two entries each, all in float64.

    The gradients written by hand are compared with central differences of the loss.
    """
    from minilora.pairs import Case, check_model

    def float64(leaf: np.ndarray) -> np.ndarray:
        return leaf.astype(np.float64)

    text = adapted.tokenizer.encode("for key, value in")
    assert adapted.lora_config is not None  # it was just adapted
    case = Case(
        base=tree.map_leaves(float64, to_host(adapted.base)),
        lora=tree.map_leaves(float64, to_host(adapted.lora)),
        tokens=text[None, :-1],
        targets=text[None, 1:],
        config=adapted.config,
        lora_config=adapted.lora_config,
        masks=None,
    )
    return max_error(check_model(case, wrt="lora", seed=seed, entries=2, device=device))


def indented(text: str) -> str:
    """The text, set off from what surrounds it."""
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def summary(figures: dict[str, Any]) -> str:
    """The figures as a table, and what to try next."""
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
{figures["tokens_per_second"]:,.0f} tokens/s

Try next:
    minilora adapt python --out python-adapter      the same, kept, with options (--help)
    minilora generate --adapter python-adapter --prompt "class "
    minilora adapt YOUR_TEXT.txt --out my-adapter   your own text, 100 kB or more
    minilora gradcheck                              every gradient against finite differences"""
