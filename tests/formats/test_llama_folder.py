"""Folders and adapters of a Llama and a Qwen2: round trips, and what is refused by name."""

import json
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from helpers import bytes_of, edit_config, edit_tensors
from hypothesis import given, settings

from minilora.adapters import LoRAConfig, adapted_paths, adapters, lora_init, weight_of
from minilora.errors import MiniloraError
from minilora.formats import load_adapter, load_base, save_adapter, save_base
from minilora.formats.base import read_config
from minilora.formats.peft import rewritten
from minilora.formats.tensors import read_tensors, write_tensors
from minilora.llama import LinearScaling, Llama3Scaling, LlamaConfig, frequencies, llama_init
from minilora.lora import merge
from minilora.network import Net, net_logits
from minilora.tree import flatten, map_leaves

CONFIG = LlamaConfig(
    13, 12, 20, 2, num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=9,
    rms_norm_eps=1e-4, rope_theta=50.0, head_dim=4,
)  # fmt: skip
MLP = ("gate", "up", "down")
Q, KV = 24, 8  # columns of q, and of k as of v


def drawn(config=CONFIG, seed=0, dtype=np.float32, biases=(), head=False):
    """A base whose every number is random, with biases on these maps."""
    rng = np.random.default_rng(seed)
    base = llama_init(config, seed=seed, dtype=dtype)
    for block in base["blocks"]:
        for linear in [*block["attn"].items(), *block["mlp"].items()]:
            if linear[0] in biases:
                linear[1]["b"] = linear[1]["w"][0]
    if head:
        base["head"] = base["wte"]
    return map_leaves(lambda x: rng.standard_normal(x.shape).astype(dtype), base)


def same(tree, other):
    flat, others = flatten(tree), flatten(other)
    assert flat.keys() == others.keys()
    for path, leaf in flat.items():
        assert leaf.dtype == others[path].dtype and np.array_equal(leaf, others[path]), path
        assert others[path].flags.c_contiguous and others[path].flags.writeable, path
    return True


@pytest.fixture
def folder(tmp_path):
    save_base(tmp_path / "base", drawn(), CONFIG)
    return tmp_path / "base"


# --- what is read is what was written ----------------------------------------------------------

KINDS = {
    "llama": ((), "llama"),
    "biases of the attention": (("qkv", "o"), "llama"),
    "all biases": (("qkv", "o", *MLP), "llama"),
    "qwen2": (("qkv",), "qwen2"),
}


@pytest.mark.parametrize("scaling", [None, LinearScaling(3.0), Llama3Scaling(8.0, 1.0, 4.0, 32)])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_read_as_it_was_written(tmp_path, kind, head, scaling):
    biases, model_type = KINDS[kind]
    config = LlamaConfig(**vars(CONFIG) | {"rope_scaling": scaling})
    base = drawn(biases=biases, head=head)
    save_base(tmp_path / "first", base, config)
    loaded, loaded_config = load_base(tmp_path / "first")
    assert same(base, loaded) and loaded_config == config
    document = json.loads((tmp_path / "first" / "config.json").read_text())
    assert document["model_type"] == model_type
    save_base(tmp_path / "second", loaded, config, like=tmp_path / "first")
    assert bytes_of(tmp_path / "first") == bytes_of(tmp_path / "second")


def test_a_tensor_is_the_transpose_of_ours_and_q_k_v_are_columns_of_one(folder):
    tensors, block = read_tensors(folder / "model.safetensors")[0], drawn()["blocks"][1]
    names = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    q, k, v = (tensors[name].T for name in names)
    assert (q.shape, k.shape, v.shape) == ((12, Q), (12, KV), (12, KV))
    assert np.array_equal(np.concatenate([q, k, v], axis=1), block["attn"]["qkv"]["w"])
    o, up = "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert np.array_equal(tensors[o].T, block["attn"]["o"]["w"])
    assert np.array_equal(tensors[up].T, block["mlp"]["up"]["w"])


def test_what_the_configuration_says_beside_is_carried_over(folder, tmp_path):
    more = {"pretraining_tp": 2, "bos_token_id": 1, "eos_token_id": [2, 3], "my_own": {"a": 1}}
    edit_config(folder, **more, torch_dtype="bfloat16")
    base, config = load_base(folder)
    save_base(tmp_path / "new", base, config, like=folder)
    document = json.loads((tmp_path / "new" / "config.json").read_text())
    assert more.items() <= document.items()
    assert document["dtype"] == "float32" and "torch_dtype" not in document


def test_a_bias_that_the_configuration_cannot_say_is_no_base_to_save(tmp_path):
    base = drawn(biases=("up",))
    with pytest.raises(MiniloraError, match=r"left over: blocks\.0\.mlp\.up\.b"):
        save_base(tmp_path / "new", base, CONFIG)
    base = drawn(biases=("o",))
    with pytest.raises(MiniloraError, match=r"left over: blocks\.0\.attn\.o\.b"):
        save_base(tmp_path / "new", base, CONFIG)
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


# --- what other writers do ---------------------------------------------------------------------


def test_constants_of_older_files_and_names_without_the_prefix_are_read(folder):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        tensors["model.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        name = "model.layers.1.input_layernorm.weight"
        tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(folder, change)
    assert same(drawn(), load_base(folder)[0])


def test_an_equal_head_beside_a_tied_embedding_is_read(folder):
    edit_tensors(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
    )
    assert same(drawn(), load_base(folder)[0])


def test_a_llama_is_not_tied_unless_its_configuration_says_so(folder):
    edit_config(folder, tie_word_embeddings=...)
    with pytest.raises(MiniloraError, match=r"is false, but there is no lm_head\.weight"):
        load_base(folder)


ROTARY = {
    "none": ({}, (10000.0, None)),
    "new": ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, (7.0, None)),
    "old": ({"rope_theta": 7, "rope_scaling": None}, (7.0, None)),
    "older kind": ({"rope_scaling": {"type": "linear", "factor": 2}}, (10000.0, (2.0,))),
    "llama3": (
        {"rope_theta": 5e5, "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }},
        (5e5, (32.0, 1.0, 4.0, 8192)),
    ),
    "the context for want of an original": (
        {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 9.0, "factor": 8, "low_freq_factor": 1,
            "high_freq_factor": 4,
        }},
        (9.0, (8.0, 1.0, 4.0, 9)),
    ),
    "the whole of a head": ({"partial_rotary_factor": 1.0}, (10000.0, None)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROTARY)
def test_the_angles_settings_are_read_in_every_spelling(folder, name):
    fields, expected = ROTARY[name]
    edit_config(
        folder, **{"rope_parameters": ..., "rope_theta": ..., "rope_scaling": ..., **fields}
    )
    config = load_base(folder)[1]
    assert (config.rope_theta, config.rope_scaling) == expected


def test_llama_3_s_scaling_has_its_three_bands():
    document = {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 1, **ROTARY["llama3"][0]
    }  # fmt: skip
    config = read_config(document, "config.json")
    plain = frequencies(LlamaConfig(**vars(config) | {"rope_scaling": None}))
    ratio = plain / frequencies(config)
    assert np.allclose(ratio[:15], 1.0) and np.allclose(ratio[18:], 32.0)
    np.testing.assert_allclose(ratio[15:18], [1.6513, 3.2923, 9.6667], rtol=1e-4)


def test_the_width_of_a_head_is_that_of_the_file_or_else_the_quotient():
    sizes = {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 6}
    assert read_config({**sizes, "head_dim": 10}, "x").head_width == 10
    for fields in ({}, {"head_dim": None}):
        assert read_config({**sizes, **fields}, "x").head_width == 8
    wide = {**sizes, "hidden_size": 50, "head_dim": 8}  # which transformers itself refuses
    assert read_config(wide, "x").head_width == 8


def test_a_window_that_is_off_or_of_no_block_changes_nothing(folder):
    expected = load_base(folder)[1]
    save_base(folder, drawn(biases=("qkv",)), CONFIG)
    for fields in (
        {"sliding_window": 4, "use_sliding_window": False},
        {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2},
        {"layer_types": ["full_attention"] * 2, "use_sliding_window": True},
    ):
        absent = dict.fromkeys(("use_sliding_window", "sliding_window", "layer_types"), ...)
        edit_config(folder, **(absent | fields))
        assert load_base(folder)[1] == expected, fields


def test_missing_heads_of_k_and_v_are_those_of_q():
    sizes = {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 6}
    assert read_config(sizes, "x").num_key_value_heads == 6
    assert read_config({**sizes, "num_key_value_heads": None}, "x").num_key_value_heads == 6


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("llama", "model_type", "mistral"),
        ("llama", "hidden_act", "gelu"),
        ("llama", "quantization_config", {"bits": 4}),
        ("llama", "pruned_heads", {"0": [1]}),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "attention_bias", True),
        ("llama", "attention_bias", "yes"),
        ("llama", "mlp_bias", True),
        ("llama", "head_dim", 6),
        ("llama", "head_dim", 3),
        ("llama", "head_dim", 0),
        ("llama", "num_attention_heads", 4),
        ("llama", "num_key_value_heads", 4),
        ("llama", "num_key_value_heads", 0),
        ("llama", "num_hidden_layers", 3),
        ("llama", "num_hidden_layers", 10**9),
        ("llama", "hidden_size", "12"),
        ("llama", "vocab_size", None),
        ("llama", "rms_norm_eps", 0.0),
        ("llama", "rms_norm_eps", "small"),
        ("llama", "rope_theta", -1.0),
        ("llama", "tie_word_embeddings", False),
        ("llama", "rope_scaling", {"type": "yarn", "factor": 2.0}),
        ("llama", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("llama", "rope_scaling", {"rope_type": "linear"}),
        ("llama", "rope_scaling", {"rope_type": ["linear"]}),
        ("llama", "rope_scaling", "linear"),
        ("llama", "rope_scaling", {"rope_type": "default", "factor": 2.0}),
        ("llama", "rope_scaling", {"rope_type": "linear", "factor": -2.0}),
        ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 2.0}),
        ("llama", "rope_scaling", {"full_attention": {"rope_theta": 5.0}}),
        ("llama", "rope_scaling", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("qwen2", "use_sliding_window", True),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),
        ("qwen2", "layer_types", "full_attention"),
    ],
)
def test_a_field_that_is_not_understood_is_named(tmp_path, kind, field, value):
    folder = tmp_path / "base"
    save_base(folder, drawn(biases=("qkv",) if kind == "qwen2" else ()), CONFIG)
    more = {"max_window_layers": 1} if field == "use_sliding_window" else {}
    if field == "rope_theta":
        more = {"rope_parameters": ...}
    edit_config(folder, **{field: value}, **more)
    words = {"attention_bias": "bias", "mlp_bias": "bias", "num_attention_heads": "q_proj"}
    words |= {"head_dim": "head|heads|q_proj", "num_key_value_heads": "num_key_value_heads"}
    with pytest.raises(MiniloraError, match=words.get(field, field)) as caught:
        load_base(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_head_that_differs_from_a_tied_embedding_is_refused(folder):
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": np.ones((13, 12), np.float32)}))
    with pytest.raises(MiniloraError, match=r"lm_head\.weight differs from embed_tokens\.weight"):
        load_base(folder)


def test_a_bias_that_the_configuration_does_not_name_is_refused(folder):
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(folder, lambda t: t.update({name: np.ones(Q, np.float32)}))
    with pytest.raises(MiniloraError, match=r"left over: layers\.0\.self_attn\.q_proj\.bias"):
        load_base(folder)


# --- adapters ----------------------------------------------------------------------------------

EVERYTHING = ("qkv", "q", "k", "v", "o", *MLP, "embedding")


def adapted(lora_config, dtype=np.float32, seed=0):
    """Adapters whose every number is random."""
    rng = np.random.default_rng(seed)
    lora = lora_init(drawn(dtype=dtype), lora_config, seed=0)
    return map_leaves(lambda x: rng.standard_normal(x.shape).astype(dtype), lora)


def updates(lora, lora_config):
    """The dense update s A B of every base weight, float64, by the weight's path."""
    weights, dense = flatten(drawn()), {}
    for path, ab in adapters(lora).items():
        where, columns = weight_of(path, Q, KV)
        update = lora_config.scale_of(path) * (ab["A"].astype(float) @ ab["B"].astype(float))
        dense.setdefault(where, np.zeros(weights[where].shape))[:, columns] += update
    return dense


@given(
    targets=st.lists(st.sampled_from([*EVERYTHING, r"1\.attn\.[qv]"]), min_size=1, unique=True),
    rank=st.integers(1, 4), rslora=st.booleans(), seed=st.integers(0, 99),
    ranks=st.dictionaries(st.sampled_from(["q", "qkv", r"0\..*"]), st.integers(1, 5)),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_an_adapter_computes_the_same_when_it_is_read_again(
    tmp_path_factory, targets, rank, rslora, seed, ranks
):
    wanted = LoRAConfig(rank=rank, alpha=3.0, targets=tuple(targets), rslora=rslora)
    paths = adapted_paths(wanted, 2, mlp=MLP)
    matched = {
        k: r for k, r in ranks.items() if any(re.fullmatch(f"(.*\\.)?({k})", p) for p in paths)
    }
    lora_config = LoRAConfig(**vars(wanted) | {"rank_pattern": matched})
    lora, folder = adapted(lora_config, np.float64, seed), tmp_path_factory.mktemp("a")
    save_adapter(folder, lora, lora_config, CONFIG)
    loaded, loaded_config = load_adapter(folder, CONFIG, dtype=np.float64)
    expected, found = updates(lora, lora_config), updates(loaded, loaded_config)
    assert expected.keys() == found.keys()
    for path, update in expected.items():
        np.testing.assert_allclose(found[path], update, rtol=1e-14, atol=1e-14, err_msg=path)
    before = bytes_of(folder)
    save_adapter(folder, loaded, loaded_config, CONFIG)
    assert bytes_of(folder) == before
    if not rewritten(paths, CONFIG):  # then the tree itself comes back, to the last bit
        assert flatten(lora).keys() == flatten(loaded).keys()
        for path, leaf in flatten(lora).items():
            assert np.array_equal(leaf, flatten(loaded)[path]), path


def test_q_and_v_keep_their_own_a_and_b(tmp_path):
    lora_config = LoRAConfig(rank=3, targets=("q", "v"))
    lora = adapted(lora_config)
    save_adapter(tmp_path, lora, lora_config, CONFIG)
    tensors = read_tensors(tmp_path / "adapter_model.safetensors")[0]
    names = {f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"}
    parts = ("lora_A", "lora_B")
    assert set(tensors) == {f"base_model.model.{n}.{part}.weight" for n in names for part in parts}
    for n in "qv":
        ours, start = lora["blocks"][1]["attn"][n], f"base_model.model.model.layers.1.self_attn.{n}"
        assert np.array_equal(tensors[f"{start}_proj.lora_A.weight"], ours["A"].T)
        assert np.array_equal(tensors[f"{start}_proj.lora_B.weight"], ours["B"].T)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    assert document["target_modules"] == ["q_proj", "v_proj"]
    assert (document["r"], document["fan_in_fan_out"]) == (3, False)
    assert load_adapter(tmp_path, CONFIG)[1].targets == ("q", "v")


def test_an_adapter_on_qkv_is_written_as_three_with_the_same_a(tmp_path):
    lora_config = LoRAConfig(rank=3, targets=("qkv",))
    lora = adapted(lora_config)
    save_adapter(tmp_path, lora, lora_config, CONFIG)
    tensors, ours = (
        read_tensors(tmp_path / "adapter_model.safetensors")[0],
        lora["blocks"][0]["attn"]["qkv"],
    )
    start = "base_model.model.model.layers.0.self_attn."
    for name, columns in (("q", slice(0, Q)), ("k", slice(Q, Q + KV)), ("v", slice(Q + KV, None))):
        assert np.array_equal(tensors[f"{start}{name}_proj.lora_A.weight"], ours["A"].T)
        assert np.array_equal(tensors[f"{start}{name}_proj.lora_B.weight"], ours["B"][:, columns].T)
    paths = adapted_paths(lora_config, 2, mlp=MLP)
    assert "q_proj, k_proj and v_proj" in rewritten(paths, CONFIG)
    assert rewritten(["blocks.0.attn.q", "blocks.1.mlp.gate", "embedding"], CONFIG) == ""


TARGETS = {
    "short names": ["q_proj", "v_proj"],
    "ends of names": ["self_attn.q_proj", "self_attn.v_proj"],
    "full names": [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"],
    "a regular expression": r".*\.self_attn\.(q|v)_proj",
}


@pytest.mark.parametrize("name", TARGETS)
def test_target_modules_are_read_in_every_way_of_naming(tmp_path, name):
    lora_config = LoRAConfig(rank=3, alpha=5.0, targets=("q", "v"))
    lora = adapted(lora_config)
    save_adapter(tmp_path, lora, lora_config, CONFIG)
    path = tmp_path / "adapter_config.json"
    document = json.loads(path.read_text()) | {"target_modules": TARGETS[name]}
    path.write_text(json.dumps(document))
    loaded, loaded_config = load_adapter(tmp_path, CONFIG)
    assert loaded_config == lora_config and same(lora, loaded)


@pytest.mark.parametrize("is_list", [False, True])
def test_all_linear_is_every_map_of_the_blocks(tmp_path, is_list):
    lora_config = LoRAConfig(rank=2, targets=("q", "k", "v", "o", *MLP))
    lora = adapted(lora_config)
    save_adapter(tmp_path, lora, lora_config, CONFIG)
    path = tmp_path / "adapter_config.json"
    names = read_tensors(tmp_path / "adapter_model.safetensors")[0]
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names}
    assert len(modules) == 7 * 2
    every = sorted(modules) if is_list else "all-linear"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": every}))
    assert same(lora, load_adapter(tmp_path, CONFIG)[0])


def test_patterns_do_not_take_block_10_for_block_1(tmp_path):
    config = LlamaConfig(**vars(CONFIG) | {"num_hidden_layers": 11})
    lora_config = LoRAConfig(rank=2, targets=("q",), rank_pattern={r"blocks\.1\.attn\.q": 3})
    lora = lora_init(drawn(config), lora_config, seed=0)
    save_adapter(tmp_path, lora, lora_config, config)
    path = tmp_path / "adapter_config.json"
    for key in (r"layers\.1\.self_attn\.q_proj", r"^model\.layers\.1\.self_attn\.q_proj"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {key: 3}}))
        loaded, loaded_config = load_adapter(tmp_path, config)
        assert same(lora, loaded)
        assert [loaded_config.rank_of(f"blocks.{i}.attn.q") for i in (0, 1, 10)] == [2, 3, 2]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"^q_proj": 3}}))
    with pytest.raises(MiniloraError, match=r"layers\.1\.self_attn\.q_proj\.lora_A\.weight is"):
        load_adapter(tmp_path, config)


def test_the_copy_that_peft_saves_of_an_adapted_embedding_must_be_the_base_s(tmp_path):
    base, lora_config = drawn(), LoRAConfig(rank=2, targets=("embedding",))
    lora = adapted(lora_config)
    save_adapter(tmp_path, lora, lora_config, CONFIG)
    path = tmp_path / "adapter_model.safetensors"
    tensors, metadata = read_tensors(path)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    for table, is_right in ((base["wte"], True), (base["wte"] + 1, False)):
        write_tensors(path, {**tensors, name: table}, metadata)
        if is_right:
            assert same(lora, load_adapter(tmp_path, CONFIG, base=base)[0])
        else:
            with pytest.raises(MiniloraError, match="differs from the base's"):
                load_adapter(tmp_path, CONFIG, base=base)


@pytest.mark.parametrize("biases", [(), ("qkv",)])
def test_a_merged_base_computes_the_same_after_it_was_saved(tmp_path, biases):
    base, lora_config = drawn(biases=biases), LoRAConfig(rank=2, targets=("q", "v", "gate"))
    lora, tokens = adapted(lora_config), np.arange(8)[None]
    save_base(tmp_path / "base", base, CONFIG)
    merged = merge(base, lora, lora_config)
    save_base(tmp_path / "merged", merged, CONFIG, like=tmp_path / "base")
    expected = net_logits(Net(base, CONFIG, lora, lora_config), tokens=tokens)
    found = net_logits(Net(*load_base(tmp_path / "merged")), tokens=tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())
