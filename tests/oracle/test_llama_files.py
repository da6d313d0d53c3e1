"""Folders and adapters of a Llama and a Qwen2 pass to and from transformers and PEFT.

Needs the extra `oracle`; run with -m oracle. Logits are compared in float32, files bit for bit.
"""

import json

import numpy as np
import pytest
from helpers import moved

from minilora.adapters import LoRAConfig, lora_init
from minilora.formats import load_adapter, load_base, save_adapter, save_base
from minilora.formats.tensors import read_tensors
from minilora.llama import LlamaConfig, llama_init
from minilora.lora import merge
from minilora.network import Net, net_logits

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 96,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
CONFIG = LlamaConfig(**SIZES, rms_norm_eps=1e-3)
TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 90))


class Oracle:
    """What the tests need of torch, transformers and PEFT."""

    @staticmethod
    def model(kind="llama", **fields):
        """A model of transformers whose every parameter is random, norms and biases too."""
        import transformers

        classes = {
            "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
            "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        }
        config, model = classes[kind]
        return Oracle.drawn(model(config(**SIZES | fields)).eval())

    @staticmethod
    def drawn(model, only="", std=0.3):
        import torch

        for name, parameter in model.named_parameters():
            if only in name:
                torch.nn.init.normal_(parameter, std=std)
        return model

    @staticmethod
    def open(folder):
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    @staticmethod
    def adapted(base, folder):
        import peft

        return peft.PeftModel.from_pretrained(Oracle.open(base), folder).eval()

    @staticmethod
    def add(model, **options):
        """A fresh adapter of PEFT whose every number is random."""
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
        return Oracle.drawn(model.eval(), "lora_", 0.3)

    @staticmethod
    def logits(model):
        import torch

        with torch.no_grad():
            return model(torch.from_numpy(TOKENS)).logits.float().numpy()


@pytest.fixture(scope="module")
def oracle():
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name, reason=f"the oracle tests need {name}: install minilora[oracle]")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return Oracle


def logits_of(*net):
    """Ours of TOKENS."""
    return net_logits(Net(*net), tokens=TOKENS)


def close(ours, theirs):
    """Up to the rounding of ill-conditioned random models; what is wrong is off by 0.1 and more."""
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0.5, "logits that small cannot differ"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


def a_base(config=CONFIG, seed=0):
    return moved(llama_init(config, seed=seed), seed)


# --- bases -------------------------------------------------------------------------------------

KINDS = {
    "groups of three": {"rms_norm_eps": 1e-2},
    "one key for all": {"num_key_value_heads": 1},
    "as many keys as queries": {"num_key_value_heads": 6},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 10},
    "biases on q, k, v and o": {"attention_bias": True},
    "biases in the MLP": {"mlp_bias": True},
    "another base of the angles": {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}},
    "scaled angles": {"rope_parameters": LLAMA3},
    "angles scaled in equal parts": {"rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    "qwen2": {"kind": "qwen2"},
    "qwen2, tied": {"kind": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 3},
    "qwen2, a window that is off": {"kind": "qwen2", "sliding_window": 4},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_base_of_transformers_opens_here_and_goes_back_unchanged(oracle, tmp_path, name):
    model = oracle.model(**KINDS[name])
    model.save_pretrained(tmp_path / "theirs")
    base, config = load_base(tmp_path / "theirs")
    close(logits_of(base, config), oracle.logits(model))
    for back, like in (("with its configuration", tmp_path / "theirs"), ("without", None)):
        save_base(tmp_path / back, base, config, like=like)
        again = oracle.open(tmp_path / back)
        assert type(again) is type(model), back
        assert np.array_equal(oracle.logits(again), oracle.logits(model)), back
        assert load_base(tmp_path / back)[1] == config, back
        again.save_pretrained(tmp_path / f"{back} again")
        theirs, ours = (
            read_tensors(tmp_path / folder / "model.safetensors")[0]
            for folder in ("theirs", f"{back} again")
        )
        assert theirs.keys() == ours.keys()
        assert all(np.array_equal(theirs[key], ours[key]) for key in theirs), back


@pytest.mark.parametrize("part", ["without its head", "float16", "bfloat16", "shards"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_other_ways_of_saving_a_base_open_here(oracle, tmp_path, kind, part):
    model = oracle.model(kind, tie_word_embeddings=True)
    if part.endswith("float16"):
        model = model.half() if part == "float16" else model.bfloat16()
    saved = model.model if part == "without its head" else model
    saved.save_pretrained(tmp_path, max_shard_size="10KB" if part == "shards" else "1GB")
    assert (tmp_path / "model.safetensors").exists() == (part != "shards")
    base, config = load_base(tmp_path)
    close(logits_of(base, config), oracle.logits(model.float()))


SPELLINGS = {
    "plain": (
        {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}},
        {"rope_theta": 77.0, "rope_scaling": None},
        {"rope_theta": 77.0},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 77.0},
        {"rope_theta": 77.0, "rope_scaling": {"type": "default"}},
    ),
    "scaled": (
        {"rope_parameters": LLAMA3},
        {"rope_theta": 500.0, "rope_scaling": {**dict(list(LLAMA3.items())[2:]), "type": "llama3"}},
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 3.0, "rope_type": "default"}},
        {"rope_theta": 3.0, "rope_parameters": LLAMA3 | {"type": "llama3"}},
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 9},
         "original_max_position_embeddings": 32},
    ),
    "default": ({}, {"rope_parameters": None}, {"rope_scaling": {}}),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_the_positions_means_what_it_means_in_transformers(
    oracle, tmp_path, name
):
    model = oracle.model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    del document["rope_parameters"]
    found = []
    for fields in SPELLINGS[name]:
        path.write_text(json.dumps(document | fields))
        theirs = oracle.logits(oracle.open(tmp_path))
        close(logits_of(*load_base(tmp_path)), theirs)
        found.append(theirs)
    assert all(np.array_equal(found[0], other) for other in found), "they say the same"


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_missing_size_is_transformers_default(oracle, kind):
    """Of all fields of theirs that are sizes here."""
    import transformers

    from minilora.formats.base import read_config

    theirs = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind]()
    config = read_config({"model_type": kind}, "config.json")
    for name in (*SIZES, "rms_norm_eps"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    heads = read_config({"model_type": kind, "num_key_value_heads": None}, "config.json")
    assert heads.num_key_value_heads == 32


# --- adapters ----------------------------------------------------------------------------------

EVERYTHING = ("q", "k", "v", "o", "gate", "up", "down", "embedding")
OURS = {
    "q and v": LoRAConfig(rank=4, alpha=8.0, targets=("q", "v")),
    "k alone": LoRAConfig(rank=4, alpha=8.0, targets=("k",)),
    "everywhere": LoRAConfig(rank=3, alpha=5.0, targets=EVERYTHING),
    "the default": LoRAConfig(),
    "qkv beside its columns": LoRAConfig(
        rank=2,
        alpha=3.0,
        targets=("qkv", "q", r"1\.attn\.k", "gate"),
        rslora=True,
        rank_pattern={"q": 3},
        alpha_pattern={r"2\.attn\.q": 7.0},
    ),
    "some blocks": LoRAConfig(rank=2, targets=(r"0\.attn\.[qv]", r"[02]\.mlp\.down", "gate")),
    "patterns": LoRAConfig(
        rank=2,
        alpha=3.0,
        targets=EVERYTHING,
        rank_pattern={r"1\.attn\..*": 5, "embedding": 7},
        alpha_pattern={r"blocks\.[12]\.mlp\.(down|gate)": 9.5},
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_an_adapter_of_ours_loads_in_peft(oracle, tmp_path, name):
    lora_config, base = OURS[name], a_base()
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
    copy = "base_model.model.model.embed_tokens.base_layer.weight"  # with an adapted embedding
    assert mine.keys() == again.keys() - {copy}
    assert all(np.array_equal(mine[key], again[key]) for key in mine)
    back, back_config = load_adapter(tmp_path / "again", CONFIG, base=base)
    close(logits_of(base, CONFIG, back, back_config), ours)


THEIRS = {
    "defaults": {"target_modules": ["q_proj", "v_proj"]},
    "nothing named": {},
    "all-linear": {"target_modules": "all-linear", "r": 2, "lora_alpha": 7, "lora_dropout": 0.5},
    "rslora": {"target_modules": ["k_proj", "gate_proj"], "use_rslora": True, "r": 5},
    "full module paths": {
        "target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    },
    "a regular expression": {"target_modules": r".*\.layers\.[02]\.(self_attn|mlp)\.(o|up)_proj"},
    "the embedding": {"target_modules": ["embed_tokens", "self_attn.o_proj"], "r": 3},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "one layer": {
        "target_modules": ["k_proj"], "layers_to_transform": 1, "layers_pattern": "layers"
    },
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "r": 3,
        "lora_alpha": 5,
        "rank_pattern": {r"layers\.(0|1)\.self_attn.*": 2, r"^model\.layers\.2.*": 6},
        "alpha_pattern": {"down_proj": 9, "layers.1.self_attn.q_proj": 1.5},
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", THEIRS)
def test_an_adapter_of_peft_loads_here(oracle, tmp_path, name, dtype):
    import torch

    base = a_base()
    save_base(tmp_path / "base", base, CONFIG)
    model = oracle.add(oracle.open(tmp_path / "base"), **THEIRS[name])
    for parameter in (p for name, p in model.named_parameters() if "lora_" in name):
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "adapter")
    model = oracle.adapted(tmp_path / "base", tmp_path / "adapter")
    lora, lora_config = load_adapter(tmp_path / "adapter", CONFIG, base=base)
    ours = logits_of(base, CONFIG, lora, lora_config)
    close(ours, oracle.logits(model))
    assert np.abs(ours - logits_of(base, CONFIG)).max() > 1e-2


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_merged_base_is_what_peft_merges(oracle, tmp_path, kind):
    oracle.model(kind).save_pretrained(tmp_path / "base")
    model = oracle.add(oracle.open(tmp_path / "base"), target_modules="all-linear", r=3)
    model.save_pretrained(tmp_path / "adapter")
    base, config = load_base(tmp_path / "base")
    lora, lora_config = load_adapter(tmp_path / "adapter", config)
    merged = merge(base, lora, lora_config)
    save_base(tmp_path / "merged", merged, config, like=tmp_path / "base")
    theirs = oracle.logits(model.merge_and_unload())
    close(oracle.logits(oracle.open(tmp_path / "merged")), theirs)
    close(logits_of(merged, config), theirs)
