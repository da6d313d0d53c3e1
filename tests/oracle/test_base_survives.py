"""What merge and full training write opens in transformers and stops where the base stopped."""

import json
import warnings

import numpy as np
import pytest
from helpers import bytes_of

from minilora.cli import main
from minilora.formats.tensors import read_tensors

pytestmark = pytest.mark.oracle

SIZES = {"vocab_size": 262, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
CHANGED = {"dtype", "architectures"}  # what describes the weights that were written
TEXT = "the cat sat on the mat and the dog sat on the cat; " * 40


@pytest.fixture(params=["float32", "float16", "gelu_fast", "eos"])
def base(request, tmp_path):
    """A base of transformers with a tokenizer, settings of generation and a chat template."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    folder = tmp_path / "base"
    fields = {"eos_token_id": [5, 260], "bos_token_id": 3, "pad_token_id": 261, "attn_pdrop": 0.25}
    options = {
        "float32": fields,
        "float16": fields,
        "gelu_fast": fields | {"activation_function": "gelu_fast", "summary_type": "mean"},
        "eos": {"eos_token_id": 2, "bos_token_id": None},
    }[request.param]
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, **options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.update(temperature=0.6, top_k=7, do_sample=True)
    model.to(getattr(torch, "float16" if request.param == "float16" else "float32"))
    model.save_pretrained(folder)
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([TEXT], 260, 1, special_tokens=["<|endoftext|>"])
    made.save_model(str(folder))
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "</s>", "pad_token": "[PAD]"})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def adapter_of(base, folder):
    """An adapter that PEFT made of a base and saved."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel

    torch.manual_seed(1)
    model = GPT2LMHeadModel.from_pretrained(base, dtype=torch.float32)
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():  # PEFT uses what transformers deprecates
        warnings.simplefilter("ignore")
        made = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options))
    made.save_pretrained(folder)
    return made.merge_and_unload().eval()


def same_but_for_the_weights(base, written):
    """The new folder's files are the base's, but for the weights and what describes them."""
    before, after = bytes_of(base), bytes_of(written)
    after.pop("training.json", None)
    assert before.keys() == after.keys()
    new = {name for name in before if before[name] != after[name]}
    assert new <= {"config.json", "model.safetensors"}
    one, other = (json.loads(files["config.json"]) for files in (before, after))
    fields = {name for name in {*one, *other} if one.get(name, ...) != other.get(name, ...)}
    assert fields <= CHANGED
    assert other["dtype"] == "float32" and other["architectures"] == ["GPT2LMHeadModel"]


def test_a_merged_base_opens_computes_and_stops_as_pefts(base, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected = adapter_of(base, tmp_path / "adapter")
    words = ["--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged"]
    assert main(["merge", *map(str, words)]) == 0
    same_but_for_the_weights(base, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.config.eos_token_id == expected.config.eos_token_id
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    )
    ids = torch.tensor([tokenizer.encode("the cat sat")])
    np.testing.assert_allclose(
        model(ids).logits.detach(), expected(ids).logits.detach(), rtol=1e-4, atol=1e-4
    )
    for seed in range(5):
        options = {"max_new_tokens": 20, "attention_mask": torch.ones_like(ids)}
        torch.manual_seed(seed)
        one = model.generate(ids, **options)
        torch.manual_seed(seed)
        np.testing.assert_array_equal(one, expected.generate(ids, **options))


def test_a_base_trained_in_full_keeps_all_but_its_weights(base, tmp_path):
    from transformers import AutoModelForCausalLM

    words = ["adapt", tmp_path / "text.txt", "--base", base, "--method", "full", "--steps", 2]
    words += ["--context", 16, "--batch", 2, "--out", tmp_path / "new"]
    assert main(list(map(str, words))) == 0
    same_but_for_the_weights(base, tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    written, _ = read_tensors(tmp_path / "new" / "model.safetensors")
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, model.state_dict()[name], err_msg=name)
