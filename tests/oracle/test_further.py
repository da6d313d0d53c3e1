"""An adapter trained further, three times in a row, as PEFT does it with PyTorch's AdamW.

Each time PEFT loads the adapter that it saved before as one to be trained, and PyTorch makes a new
optimiser; minilora goes on from the folder that it wrote itself. All in float64, on the same
batches.
"""

import warnings

import numpy as np
import pytest

from minilora.adapters import LoRAConfig, adapters
from minilora.data import Corpus, draw_batch
from minilora.formats import save_adapter, save_base
from minilora.gpt2 import GPTConfig
from minilora.model import load_model
from minilora.optim import warmup_cosine
from minilora.tokenizer import ByteTokenizer
from minilora.training.loop import TrainConfig
from minilora.training.runs import adapt_in_folder

pytestmark = pytest.mark.oracle

CONFIG = GPTConfig(vocab_size=256, n_positions=12, n_embd=16, n_layer=2, n_head=2)
TARGETS = ("qkv", "o", "up", "down", "embedding")
LORA_CONFIGS = {
    "every matrix and the embedding": LoRAConfig(rank=3, alpha=5.0, targets=TARGETS),
    "rsLoRA and patterns": LoRAConfig(
        rank=2, alpha=3.0, targets=("qkv", "down"), rslora=True,
        rank_pattern={r"1\.mlp\.down": 4}, alpha_pattern={"qkv": 7.0},
    ),
}  # fmt: skip
STEPS, TIMES = 5, 3


def corpus():
    tokens = np.random.default_rng(0).integers(0, 256, size=400, dtype=np.int32)
    return Corpus(tokens[:350], tokens[350:], 350, 50, 1, "a text")


def settings_of(time):
    return TrainConfig(
        steps=STEPS, batch=3, context=10, lr=0.02, warmup=2, weight_decay=0.1, beta2=0.99,
        clip=0.5, seed=time, threads=1, eval_tokens=20,
    )  # fmt: skip


def trained_by_peft(base, source, target, settings):
    """Load an adapter as trainable, train it with a new optimiser, save it; the losses."""
    import torch
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(
        base, dtype=torch.float64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    model = PeftModel.from_pretrained(
        model, source, is_trainable=True, autocast_adapter_dtype=False
    )
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float64 for p in trained)
    optimizer = torch.optim.AdamW(
        trained, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay
    )
    losses = []
    for step in range(1, settings.steps + 1):
        rng = np.random.default_rng([settings.seed, step])
        tokens, targets = draw_batch(corpus().train, batch=3, context=10, rng=rng)
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, steps=STEPS, peak=settings.lr, warmup=settings.warmup)
        logits = model(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(targets.astype(np.int64)).flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        losses.append(loss.item())
    model.save_pretrained(target)
    return losses


@pytest.mark.parametrize("kind", LORA_CONFIGS)
def test_three_updates_in_a_row_are_those_of_peft(tmp_path, twin, make_model, worst, kind):
    net = make_model(CONFIG, LORA_CONFIGS[kind], seed=0, dtype=np.float64)
    save_base(tmp_path / "base", net.base, CONFIG, dtype=np.float64)
    save_adapter(tmp_path / "ours0", net.lora, LORA_CONFIGS[kind], CONFIG)
    theirs = tmp_path / "ours0"
    for time in range(1, TIMES + 1):
        ours = tmp_path / f"ours{time}"
        model = load_model(tmp_path / "base", tmp_path / f"ours{time - 1}", dtype=np.float64)
        assert isinstance(model.tokenizer, ByteTokenizer)
        run = adapt_in_folder(model, corpus(), None, settings_of(time), ours)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = trained_by_peft(
                tmp_path / "base", theirs, tmp_path / f"theirs{time}", settings_of(time)
            )
        theirs = tmp_path / f"theirs{time}"
        np.testing.assert_allclose([loss for _, loss in run.history.train], losses, rtol=1e-11)
        found = [load_model(tmp_path / "base", f, dtype=np.float64).lora for f in (ours, theirs)]
        expected = {f"{p}.{n}": x for p, ab in adapters(found[1]).items() for n, x in ab.items()}
        difference = worst(found[0], expected)
        assert difference.error < 1e-9, f"update {time}: {difference}"
        start = {f"{p}.{n}": x for p, ab in adapters(model.lora).items() for n, x in ab.items()}
        assert worst(found[0], start).error > 1e-2, "it was hardly trained"
