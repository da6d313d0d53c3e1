"""A user's program, as README has it and one level below: what type checkers must say of it.

    nox -s types

Nobody runs it. mypy and pyright read it, strictly, beside the package as it is installed.
"""

from collections.abc import Iterator

import numpy as np

import minilora


def adapt(text: str) -> minilora.Model:
    """README's program."""
    model = minilora.load_model()
    corpus = minilora.load_corpus([text], model.tokenizer)
    lora_config = minilora.LoRAConfig(rank=2, alpha=2, targets=("qkv", "o", "up", "down"))
    settings = minilora.TrainConfig(steps=120, lr=2e-2)
    adapted, trained = minilora.adapt(model, corpus, lora_config, settings)
    page = minilora.RunReport("run.html", model, prompt="def ")
    minilora.adapt(model, corpus, watch=page.watch)
    minilora.adapt(model, corpus, watch=lambda seen: print(minilora.sampled(model, seen, "def ")))
    for step, loss in trained.history.held_out:
        print(f"{step:6d} {loss:.3f}")
    tokens: Iterator[int] = minilora.complete(adapted, "def ", max_tokens=100)
    print(adapted.tokenizer.decode(list(tokens)))
    minilora.save_adapter("my-adapter", adapted.lora, lora_config, model.config)
    return adapted


def read(folder: str) -> float:
    """Files, merging and mixing."""
    base, config = minilora.load_base(folder)
    lora, lora_config = minilora.load_adapter("my-adapter", config)
    parts = [(lora, lora_config)] * 2
    lora, lora_config = minilora.mix(parts, [0.5, 0.5])
    merged = minilora.merge(base, lora, lora_config)
    base = minilora.unmerge(merged, lora, lora_config)
    minilora.save_base("merged", base, config)
    model = minilora.load_model(folder, "my-adapter", dtype=np.float64)
    return minilora.evaluate(model, ["text.txt"]).bits_per_byte


def descend(seed: int) -> tuple[float, bool]:
    """The whole model's loss and its gradients."""
    config = minilora.GPTConfig(
        vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2, n_inner=12
    )
    base, _ = minilora.load_base("base")
    lora_config = minilora.LoRAConfig(rank=2)
    scale: float = lora_config.alpha / lora_config.rank  # a number, also where it was not given
    warmup: int = minilora.TrainConfig().warmup // 2
    print(scale, warmup)
    lora = minilora.lora_init(base, lora_config, seed=seed)
    net = minilora.Net(base, config, lora, lora_config)
    tokens = np.arange(12).reshape(2, 6) % 11
    plan = minilora.Plan(base=True, lora=True)
    loss, dbase, dlora = minilora.loss_and_grads(net, tokens=tokens, targets=tokens, plan=plan)
    return float(loss), dbase is not None and dlora is not None


def refused() -> str:
    """The errors that a user may catch."""
    try:
        minilora.load_model("nowhere")
    except minilora.MiniloraError as error:
        return f"minilora {minilora.__version__}: {error}"
    return ""


# Mistakes that must be found. Where one is not, the comment that expects it is reported as unused.
minilora.LoRAConfig(rank="2")  # type: ignore[arg-type]
minilora.LoRAConfig(alpha="2")  # type: ignore[arg-type]
minilora.evaluate(3, ["text.txt"])  # type: ignore[arg-type]
nothing = minilora.loss_and_gradients  # type: ignore[attr-defined]
