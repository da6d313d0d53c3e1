"""Bases and adapters pass to and from transformers and PEFT with the same logits.

Needs the extra `oracle`; run with -m oracle.
"""

import json
import re

import numpy as np
import pytest
from helpers import moved

from minilora.adapters import LoRAConfig, lora_init
from minilora.errors import MiniloraError
from minilora.formats import load_adapter, load_base, save_adapter, save_base
from minilora.formats.tensors import read_tensors
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.network import Net, net_logits

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

CONFIG = GPTConfig(vocab_size=61, n_positions=19, n_embd=24, n_layer=3, n_head=4)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 17))


@pytest.fixture(scope="module")
def oracle():
    """torch, transformers and peft, as one object with attributes."""
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name, reason=f"the oracle tests need {name}: install minilora[oracle]")
    import peft
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)

    class Oracle:
        def __init__(self):
            self.torch, self.peft, self.transformers = torch, peft, transformers

        @staticmethod
        def model(config):
            """A GPT-2 of transformers whose every parameter is random."""
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
            Oracle.randomize(model.named_parameters(), 0.2)
            return model

        @staticmethod
        def open(folder):
            return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()

        @staticmethod
        def add(model, **options):
            """A fresh adapter of PEFT whose every number is random."""
            config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
            model = peft.get_peft_model(model, config).eval()
            Oracle.randomize((n, p) for n, p in model.named_parameters() if "lora_" in n)
            return model

        @staticmethod
        def adapted(base, folder):
            return peft.PeftModel.from_pretrained(Oracle.open(base), folder).eval()

        @staticmethod
        def randomize(parameters, std=0.3):
            for _, parameter in parameters:
                torch.nn.init.normal_(parameter, std=std)

        @staticmethod
        def logits(model, tokens=TOKENS):
            with torch.no_grad():
                return model(torch.from_numpy(tokens)).logits.float().numpy()

    return Oracle()


def logits_of(*net):
    """Ours of TOKENS."""
    return net_logits(Net(*net), tokens=TOKENS)


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0.5, "logits that small cannot differ"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


# --- bases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("inner", [None, 40])
def test_a_base_of_ours_opens_in_transformers(oracle, tmp_path, dtype, inner):
    config = GPTConfig(**{**CONFIG.__dict__, "n_inner": inner, "layer_norm_epsilon": 1e-3})
    save_base(tmp_path, moved(gpt_init(config, seed=0), 0), config, dtype=dtype)
    base, _ = load_base(tmp_path)
    ours = logits_of(base, config)
    close(ours, oracle.logits(oracle.open(tmp_path)))


@pytest.mark.parametrize("part", ["whole", "transformer", "float16", "bfloat16", "shards", "head"])
def test_a_base_of_transformers_opens_here(oracle, tmp_path, part):
    sizes = {"vocab_size": 61, "n_positions": 19, "n_embd": 24, "n_layer": 2, "n_head": 3}
    tied = part != "head"
    model = oracle.model(
        {**sizes, "n_inner": 50, "layer_norm_epsilon": 1e-2, "tie_word_embeddings": tied}
    )
    if part.endswith("float16"):
        model = model.half() if part == "float16" else model.bfloat16()
    saved = model.transformer if part == "transformer" else model
    saved.save_pretrained(tmp_path, max_shard_size="10KB" if part == "shards" else "1GB")
    assert (tmp_path / "model.safetensors").exists() == (part != "shards")
    base, config = load_base(tmp_path)
    assert (config.inner, config.n_head, config.layer_norm_epsilon) == (50, 3, 1e-2)
    ours = logits_of(base, config)
    close(ours, oracle.logits(model.float()))


def test_a_head_of_its_own_passes_there_and_back(oracle, tmp_path):
    sizes = {"vocab_size": 61, "n_positions": 19, "n_embd": 24, "n_layer": 1, "n_head": 3}
    model = oracle.model({**sizes, "tie_word_embeddings": False})
    model.save_pretrained(tmp_path / "theirs")
    base, config = load_base(tmp_path / "theirs")
    assert not np.array_equal(base["head"], base["wte"])
    save_base(tmp_path / "ours", base, config)
    again = oracle.open(tmp_path / "ours")
    assert again.lm_head.weight is not again.transformer.wte.weight
    close(oracle.logits(again), oracle.logits(model))


def test_a_base_passes_there_and_back_unchanged(oracle, tmp_path):
    save_base(tmp_path / "ours", moved(gpt_init(CONFIG, seed=0), 0), CONFIG)
    oracle.open(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (read_tensors(tmp_path / f / "model.safetensors")[0] for f in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert np.array_equal(tensor, theirs[name]), name
    assert load_base(tmp_path / "theirs")[1] == CONFIG


# --- adapters ----------------------------------------------------------------------------------

OURS = {
    "qkv": LoRAConfig(rank=4, alpha=6.0, targets=("qkv",)),
    "everywhere": LoRAConfig(rank=3, alpha=5.0, targets=("qkv", "o", "up", "down", "embedding")),
    "embedding": LoRAConfig(rank=3, alpha=5.0, targets=("embedding",)),
    "rslora": LoRAConfig(rank=5, alpha=3.0, targets=("o", "down"), rslora=True),
    "some blocks": LoRAConfig(rank=2, targets=(r"1\.attn\.o", r"[02]\.mlp\.down", "up")),
    "patterns": LoRAConfig(
        rank=2,
        alpha=3.0,
        targets=("qkv", "o", "down", "embedding"),
        rank_pattern={r"1\.attn\..*": 5, "embedding": 7},
        alpha_pattern={r"blocks\.[12]\.mlp\.down": 9.5},
    ),
    "q and v": LoRAConfig(rank=4, alpha=8.0, targets=("q", "v")),
    "q and v of some blocks": LoRAConfig(rank=3, alpha=4.0, targets=(r"0\.attn\.[qv]", "o")),
    "a mix on one weight": LoRAConfig(
        rank=2,
        alpha=3.0,
        targets=("qkv", "q", r"1\.attn\.k", "v"),
        rslora=True,
        rank_pattern={"v": 3},
        alpha_pattern={r"2\.attn\.v": 7.0},
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_an_adapter_of_ours_loads_in_peft(oracle, tmp_path, name):
    lora_config = OURS[name]
    base = moved(gpt_init(CONFIG, seed=0), 0)
    lora = moved(lora_init(base, lora_config, seed=1), 1)
    save_base(tmp_path / "base", base, CONFIG)
    save_adapter(tmp_path / "adapter", lora, lora_config, CONFIG, base_name="nobody/nothing")
    ours = logits_of(base, CONFIG, lora, lora_config)
    theirs = oracle.adapted(tmp_path / "base", tmp_path / "adapter")
    close(ours, oracle.logits(theirs))
    assert np.abs(ours - logits_of(base, CONFIG)).max() > 1e-2

    theirs.save_pretrained(tmp_path / "again")  # PEFT adapts these modules and no other
    mine, again = (
        read_tensors(tmp_path / f / "adapter_model.safetensors")[0] for f in ("adapter", "again")
    )
    assert mine.keys() == again.keys()
    assert all(np.array_equal(mine[key], again[key]) for key in mine)
    back, back_config = load_adapter(tmp_path / "again", CONFIG)
    close(logits_of(base, CONFIG, back, back_config), ours)


THEIRS = {
    "defaults": {"target_modules": ["c_attn"]},
    "nothing named": {},
    "rslora": {"target_modules": ["c_attn", "c_proj"], "use_rslora": True, "r": 5},
    "all-linear": {"target_modules": "all-linear", "r": 2, "lora_alpha": 7, "lora_dropout": 0.5},
    "a regular expression": {"target_modules": r".*\.h\.[02]\.(attn|mlp)\.c_(proj|fc)"},
    "an optional group": {"target_modules": r"(transformer\.)?h\.\d\.(attn\.c_attn)"},
    "the embedding": {"target_modules": ["wte", "attn.c_proj"], "r": 3},
    "some layers": {"target_modules": ["c_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["c_fc"], "layers_to_transform": 1, "layers_pattern": "h"},
    "whole names are of every layer": {
        "target_modules": ["transformer.h.1.attn.c_attn", "mlp.c_proj"],
        "layers_to_transform": [0],
    },
    "excluded": {"target_modules": ["c_proj"], "exclude_modules": ["mlp.c_proj"]},
    "excluded by pattern": {"target_modules": ["c_proj"], "exclude_modules": r".*\.h\.1\..*"},
    "patterns": {
        "target_modules": ["c_attn", "c_proj", "wte"],
        "r": 3,
        "lora_alpha": 5,
        "rank_pattern": {r"h\.(0|1)\.attn.*": 2, r"^transformer\.h\.2.*": 6, "wte": 4},
        "alpha_pattern": {"mlp.c_proj": 9, "c_proj": 1.5, r".*\.c_attn": 11},
    },
    "gaussian": {"target_modules": ["c_attn"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["c_attn"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", THEIRS)
def test_an_adapter_of_peft_loads_here(oracle, tmp_path, name, dtype):
    base = moved(gpt_init(CONFIG, seed=0), 0)
    save_base(tmp_path / "base", base, CONFIG)
    model = oracle.add(oracle.open(tmp_path / "base"), **THEIRS[name])
    model.to(getattr(oracle.torch, dtype)).save_pretrained(tmp_path / "adapter")
    # As PEFT loads it: it sorts the patterns that it saves, so that of two that match, another may
    # be the first.
    model = oracle.adapted(tmp_path / "base", tmp_path / "adapter")
    lora, lora_config = load_adapter(tmp_path / "adapter", CONFIG)
    ours = logits_of(base, CONFIG, lora, lora_config)
    close(ours, oracle.logits(model))
    assert np.abs(ours - logits_of(base, CONFIG)).max() > 1e-2


def test_named_adapters_lie_in_folders_of_their_own(oracle, tmp_path):
    base = moved(gpt_init(CONFIG, seed=0), 0)
    save_base(tmp_path / "base", base, CONFIG)
    model = oracle.add(oracle.open(tmp_path / "base"), target_modules=["c_attn"])
    model.save_pretrained(tmp_path / "one")
    for name in ("first", "second"):
        model.load_adapter(tmp_path / "one", adapter_name=name)
    model.save_pretrained(tmp_path / "all", selected_adapters=["first", "second"])
    with pytest.raises(MiniloraError, match="name one of them: .*first, .*second"):
        load_adapter(tmp_path / "all", CONFIG)
    lora, lora_config = load_adapter(tmp_path / "all" / "second", CONFIG)
    ours = logits_of(base, CONFIG, lora, lora_config)
    close(ours, oracle.logits(model))


def test_our_file_has_no_field_that_peft_lacks(oracle, tmp_path):
    import peft

    lora_config = OURS["patterns"]
    lora = lora_init(gpt_init(CONFIG, seed=0), lora_config, seed=0)
    save_adapter(tmp_path, lora, lora_config, CONFIG)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = peft.LoraConfig.from_pretrained(tmp_path)
    for name, value in document.items():
        assert hasattr(theirs, name), name
        if name != "target_modules":
            assert getattr(theirs, name) == value, name
    assert set(document["target_modules"]) == set(theirs.target_modules)
    for key in document["rank_pattern"]:
        assert re.fullmatch(key, key.replace("\\", ""))
