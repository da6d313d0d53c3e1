"""Parameters by formula, against models of transformers and PEFT that hold no numbers."""

import warnings

import pytest

from minilora.adapters import LoRAConfig
from minilora.bench.budget import SHAPES, Step

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.oracle

MODULES = {"qkv": "c_attn", "o": "attn.c_proj", "up": "c_fc", "down": "mlp.c_proj"}


@pytest.mark.parametrize("name", ["distilgpt2", "gpt2", "gpt2-medium", "gpt2-xl", "gpt3"])
@pytest.mark.parametrize("targets", [("qkv",), ("qkv", "o", "up", "down")], ids=str)
def test_transformers_and_peft_count_the_same(name: str, targets: tuple[str, ...]) -> None:
    shape = SHAPES[name]
    config = transformers.GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.n_positions, n_embd=shape.n_embd,
        n_layer=shape.n_layer, n_head=shape.n_head,
    )  # fmt: skip
    settings = peft.LoraConfig(r=4, target_modules=[MODULES[t] for t in targets])
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out, which PEFT sets by itself
        model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), settings)
    trainable, every = model.get_nb_trainable_parameters()
    step = Step(shape, LoRAConfig(rank=4, targets=targets))
    assert step.trainable_parameters == trainable
    assert step.base_parameters == every - trainable
