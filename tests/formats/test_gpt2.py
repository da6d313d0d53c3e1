"""Bases in Hugging Face's layout: round trips, and what is refused by name."""

import json
import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pytest
from helpers import edit_config, edit_tensors
from hypothesis import given, settings

from minilora.errors import MiniloraError
from minilora.formats import tensors as tensors_module
from minilora.formats.base import load_base, read_config, save_base
from minilora.formats.gpt2 import ALIASES, tensor_table
from minilora.formats.tensors import read_tensors, write_tensors
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.network import Net, net_logits
from minilora.tree import count, flatten, map_leaves

CONFIG = GPTConfig(vocab_size=13, n_positions=7, n_embd=6, n_layer=2, n_head=3, n_inner=10)


def drawn(config, seed=0, dtype=np.float32):
    """A base whose every number is random."""
    rng = np.random.default_rng(seed)
    base = gpt_init(config, seed=seed, dtype=dtype)
    return map_leaves(lambda x: rng.standard_normal(x.shape).astype(dtype), base)


def same(tree, other):
    """Whether two trees are equal bit for bit, dtypes and memory order included."""
    flat, others = flatten(tree), flatten(other)
    assert flat.keys() == others.keys()
    for path, leaf in flat.items():
        assert leaf.dtype == others[path].dtype and leaf.shape == others[path].shape, path
        assert leaf.tobytes() == others[path].tobytes(), path
        assert others[path].flags.c_contiguous and others[path].flags.writeable, path
    return True


@pytest.fixture
def folder(tmp_path):
    save_base(tmp_path / "base", drawn(CONFIG), CONFIG)
    return tmp_path / "base"


# --- what is read is what was written ----------------------------------------------------------


@given(
    heads=st.integers(1, 3),
    head_width=st.integers(1, 4),
    layers=st.integers(1, 3),
    inner=st.none() | st.integers(1, 9),
    vocab=st.integers(1, 20),
    positions=st.integers(1, 9),
    epsilon=st.sampled_from([1e-5, 1e-6, 0.1]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_round_trip(
    tmp_path_factory, heads, head_width, layers, inner, vocab, positions, epsilon, seed
):
    config = GPTConfig(vocab, positions, heads * head_width, layers, heads, inner, epsilon)
    base, folder = drawn(config, seed), tmp_path_factory.mktemp("base")
    save_base(folder, base, config)
    loaded, loaded_config = load_base(folder)
    assert loaded_config == config and same(base, loaded)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert first.keys() == {"config.json", "model.safetensors"}
    save_base(folder, loaded, loaded_config)
    assert first == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_names_and_orientation_are_hugging_faces(folder):
    tensors, metadata = read_tensors(folder / "model.safetensors")
    assert metadata == {"format": "pt"} and len(tensors) == 4 + 12 * CONFIG.n_layer
    base = drawn(CONFIG)
    assert np.array_equal(tensors["transformer.wte.weight"], base["wte"])
    attention = base["blocks"][1]["attn"]
    assert np.array_equal(tensors["transformer.h.1.attn.c_attn.weight"], attention["qkv"]["w"])
    assert np.array_equal(tensors["transformer.h.1.attn.c_proj.bias"], attention["o"]["b"])
    down = tensors["transformer.h.0.mlp.c_proj.weight"]
    assert np.array_equal(down, base["blocks"][0]["mlp"]["down"]["w"]) and down.shape == (10, 6)
    document = json.loads((folder / "config.json").read_text())
    assert document["architectures"] == ["GPT2LMHeadModel"] and document["model_type"] == "gpt2"
    assert document["n_inner"] == 10 and document["eos_token_id"] is None


def test_the_output_is_the_same(folder):
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 7))
    base, config = load_base(folder, dtype=np.float64)
    assert all(leaf.dtype == np.float64 for leaf in flatten(base).values())
    saved = map_leaves(lambda x: x.astype(np.float64), drawn(CONFIG))
    expected = net_logits(Net(saved, CONFIG), tokens=tokens)
    assert np.array_equal(net_logits(Net(base, config), tokens=tokens), expected)


def test_half_precision_files_load_as_float32(tmp_path):
    base = drawn(CONFIG)
    save_base(tmp_path, base, CONFIG, dtype=np.float16)
    tensors, _ = read_tensors(tmp_path / "model.safetensors")
    assert all(tensor.dtype == np.float16 for tensor in tensors.values())
    rounded = map_leaves(lambda x: x.astype(np.float16).astype(np.float32), base)
    assert same(rounded, load_base(tmp_path)[0])


def test_a_number_that_float16_cannot_hold_is_not_saved(tmp_path):
    base = drawn(CONFIG)
    base["blocks"][1]["ln_2"]["b"][3] = 1e5
    with pytest.raises(MiniloraError, match=r"blocks\.1\.ln_2\.b .* float16"):
        save_base(tmp_path / "new", base, CONFIG, dtype=np.float16)
    assert not (tmp_path / "new").exists()
    save_base(tmp_path, base, CONFIG)


def test_only_the_named_files_are_replaced(folder):
    (folder / "tokenizer.json").write_text("mine")
    save_base(folder, drawn(CONFIG, seed=5), CONFIG)
    assert (folder / "tokenizer.json").read_text() == "mine"
    assert len(list(folder.iterdir())) == 3 and same(drawn(CONFIG, seed=5), load_base(folder)[0])


def test_what_a_base_has_beside_its_weights_is_carried_over(folder, tmp_path):
    fields = {"eos_token_id": [3, 4], "attn_pdrop": 0.1, "n_ctx": ..., "task": {"a": 1}}
    edit_config(folder, **fields, torch_dtype="float16", architectures=["GPT2Model"])
    carried = ("vocab.json", "added_tokens.json", "generation_config.json", "chat_template.jinja")
    (folder / "additional_chat_templates").mkdir()
    carried += ("additional_chat_templates/tool use (1).jinja",)
    for name in (*carried, "README.md", "additional_chat_templates/notes"):
        (folder / name).write_bytes(name.encode())
    before = json.loads((folder / "config.json").read_text())
    save_base(tmp_path / "new", *load_base(folder), like=folder)
    expected = {**before, "dtype": "float32", "architectures": ["GPT2LMHeadModel"]}
    del expected["torch_dtype"]
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == expected
    written = {
        path.relative_to(tmp_path / "new").as_posix()
        for path in (tmp_path / "new").rglob("*")
        if path.is_file()
    }
    assert written == {*carried, "config.json", "model.safetensors"}
    for name in carried:
        assert (tmp_path / "new" / name).read_bytes() == name.encode()


def test_a_companion_that_is_no_file_leaves_nothing_half_written(folder, tmp_path):
    (folder / "chat_template.jinja").mkdir()
    with pytest.raises(MiniloraError, match=r"chat_template\.jinja is not a file"):
        save_base(tmp_path / "new", *load_base(folder), like=folder)
    (folder / "chat_template.jinja").rmdir()
    (folder / "additional_chat_templates" / "x.jinja").mkdir(parents=True)
    with pytest.raises(MiniloraError, match=r"x\.jinja is not a file"):
        save_base(tmp_path / "new", *load_base(folder), like=folder)
    (folder / "additional_chat_templates" / "x.jinja").rmdir()
    edit_config(folder, embd_pdrop=float("nan"))
    with pytest.raises(MiniloraError, match=r"config\.json holds a number that is not finite"):
        save_base(tmp_path / "new", *load_base(folder), like=folder)
    edit_config(folder, embd_pdrop=0.1, layer_norm_epsilon=0.5)
    with pytest.raises(MiniloraError, match=r"config\.json describes a base of other sizes"):
        save_base(tmp_path / "new", drawn(CONFIG), CONFIG, like=folder)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("head", [False, True], ids=["tied", "with head"])
def test_loading_takes_little_more_memory_than_the_weights(tmp_path, monkeypatch, dtype, head):
    monkeypatch.setattr(tensors_module, "PART", 1 << 14)  # as the model is small
    config = GPTConfig(vocab_size=5000, n_positions=64, n_embd=64, n_layer=2, n_head=2)
    base = gpt_init(config, seed=0)
    save_base(tmp_path, base, config, dtype=dtype)
    if head:
        edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"]}))
    weights = 4 * count(base)
    del base
    tracemalloc.start()
    try:
        load_base(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert weights <= peak <= 1.3 * weights


# --- several files -----------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def split(folder, shards=3):
    """Spread the tensors over files with an index, as transformers does for large models."""
    tensors, metadata = read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[k::shards]}
        write_tensors(folder / file, part, metadata)
        weight_map |= dict.fromkeys(part, file)
    document = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(document))
    return weight_map


@pytest.mark.parametrize("shards", [1, 3])
def test_a_base_in_several_files(folder, shards):
    split(folder, shards)
    loaded, config = load_base(folder)
    assert config == CONFIG and same(drawn(CONFIG), loaded)
    save_base(folder, drawn(CONFIG, seed=5), CONFIG)  # one file counts more, as in transformers
    assert same(drawn(CONFIG, seed=5), load_base(folder)[0])


def test_files_that_are_links_are_read(folder, tmp_path):
    split(folder)  # the hub's cache holds links to files elsewhere
    for path in list(folder.glob("*.safetensors")):
        target = path.rename(tmp_path / path.name)
        try:
            path.symlink_to(target)
        except OSError:
            pytest.skip("this system makes no links")
    assert same(drawn(CONFIG), load_base(folder)[0])


SHARD = "model-00002-of-00003.safetensors"
NAME = "transformer.h.0.attn.c_attn.weight"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        *[(value, "weight_map is no object") for value in (None, {}, [SHARD], "x")],
        *[
            ({NAME: file}, "expected a plain name")
            for file in ("../a.safetensors", "/etc/passwd", "a/b.safetensors", "C:a.safetensors")
        ],
        *[
            ({NAME: file}, "expected a plain name")
            for file in ("..", "", "a\\b.safetensors", "a\0.safetensors", "x.bin", 3, None)
        ],
        ({NAME: "other.safetensors"}, r"other\.safetensors does not exist"),
        ({NAME: SHARD}, r"index\.json does not hold .* missing: wte\.weight"),
    ],
)
def test_an_index_that_is_refused(folder, weight_map, message):
    split(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(MiniloraError, match=message) as caught:
        load_base(folder)
    assert str(folder) in str(caught.value)


def test_files_that_do_not_fit_their_index(folder):
    good = split(folder)

    def index(weight_map):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    index(good | {"more": SHARD})
    with pytest.raises(MiniloraError, match=r"index\.json names more, which its files do not hold"):
        load_base(folder)
    name = next(name for name, file in good.items() if file == SHARD)
    index(good | {name: next(file for file in good.values() if file != SHARD)})
    with pytest.raises(MiniloraError, match=f"holds {name}, which weight_map in .* places in 'mod"):
        load_base(folder)
    index({other: file for other, file in good.items() if other != name})
    assert same(drawn(CONFIG), load_base(folder)[0])  # as in transformers
    tensors, metadata = read_tensors(folder / SHARD)
    other = folder / "model-00003-of-00003.safetensors"
    write_tensors(other, read_tensors(other)[0] | {name: tensors[name]}, metadata)
    with pytest.raises(MiniloraError, match=f"holds {name}, which weight_map in .* places in None"):
        load_base(folder)
    index(good)
    (folder / SHARD).unlink()
    with pytest.raises(MiniloraError, match=f"{SHARD} does not exist"):
        load_base(folder)


def test_the_shapes_of_every_gpt2():
    millions = {"gpt2": 124.4, "medium": 354.8, "large": 774.0, "xl": 1557.6, "distilgpt2": 81.9}
    sizes = {
        "gpt2": {},
        "medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
        "large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
        "xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
        "distilgpt2": {"n_layer": 6},
    }
    for name, fields in sizes.items():
        config = read_config({"model_type": "gpt2", **fields}, name)
        shapes = [stored.shape for stored in tensor_table(config, {}).values()]
        assert round(sum(map(np.prod, shapes)) / 1e6, 1) == millions[name], name


# --- what other writers do ---------------------------------------------------------------------


def test_names_without_prefix_masks_and_an_equal_head(folder):
    def as_the_first_gpt2_file(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()
        for i in range(CONFIG.n_layer):
            tensors[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 7, 7), np.uint8))
            tensors[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)

    edit_tensors(folder, as_the_first_gpt2_file)
    assert same(drawn(CONFIG), load_base(folder)[0])


def test_a_head_of_its_own(folder, tmp_path):
    """Loaded, computed with, and saved again, also where it is equal to the embedding for now."""
    base = drawn(CONFIG)
    for head in (drawn(CONFIG, seed=1)["wte"], base["wte"].copy()):
        edit_tensors(folder, lambda t, head=head: t.update({"lm_head.weight": head}))
        edit_config(folder, tie_word_embeddings=False)
        loaded, config = load_base(folder)
        assert same({**base, "head": head}, loaded)
        save_base(tmp_path / "again", loaded, config)
        assert same(loaded, load_base(tmp_path / "again")[0])
    tensors, _ = read_tensors(tmp_path / "again" / "model.safetensors")
    assert "lm_head.weight" in tensors and len(tensors) == 5 + 12 * CONFIG.n_layer


def test_a_tied_base_that_has_its_head_alone(folder):
    """As safetensors' save_model writes it: one name of two for the same table."""
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))
    assert same(drawn(CONFIG), load_base(folder)[0])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_weights_that_can_hold_code_are_not_read_and_it_is_said_how_to_convert_them(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"")
    message = rf"model\.safetensors does not exist, and {name} .*AutoModelForCausalLM"
    with pytest.raises(MiniloraError, match=message):
        load_base(folder)


def test_fields_that_change_nothing_and_other_names_of_sizes(folder):
    edit_config(folder, reorder_and_upcast_attn=True, activation_function="gelu_pytorch_tanh")
    assert load_base(folder)[1] == CONFIG
    edit_config(folder, activation_function="gelu_fast")
    edit_config(folder, attn_pdrop=0.1, task_specific_params={"a": 1}, architectures=["GPT2Model"])
    assert load_base(folder)[1] == CONFIG
    edit_config(folder, n_head=..., num_attention_heads=3, n_embd=..., hidden_size=6)
    assert load_base(folder)[1] == CONFIG


def test_missing_fields_are_transformers_defaults(folder):
    edit_config(folder, n_head=..., layer_norm_epsilon=..., model_type=..., activation_function=...)
    edit_config(folder, vocab_size=...)
    with pytest.raises(MiniloraError, match="n_embd 6 is not a multiple of n_head 12"):
        load_base(folder)
    edit_config(folder, n_head=6)
    with pytest.raises(MiniloraError, match=r"wte\.weight is \(13, 6\), expected \(50257, 6\)"):
        load_base(folder)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_function", "gelu"),
        ("activation_function", "relu"),
        ("activation_function", None),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("model_type", "mamba"),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"bits": 4}),
        ("tie_word_embeddings", False),
        ("tie_word_embeddings", "yes"),
        ("n_layer", 1),
        ("n_layer", 10**9),
        ("n_layer", "2"),
        ("n_layer", 0),
        ("n_head", 4),
        ("n_head", True),
        ("n_embd", -6),
        ("n_inner", 2.5),
        ("vocab_size", None),
        ("n_positions", [7]),
        ("layer_norm_epsilon", "small"),
        ("layer_norm_epsilon", float("nan")),
    ],
)
def test_a_field_that_is_not_understood_is_named(folder, field, value):
    edit_config(folder, **{field: value})
    with pytest.raises(MiniloraError, match=field) as caught:
        load_base(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(("name", "other"), [(n, o) for o, n in ALIASES.items()])
def test_two_names_of_a_size_that_disagree_are_refused(folder, name, other):
    """transformers takes the other name's, so that heads of another number gave other logits."""
    size = json.loads((folder / "config.json").read_text())[name]
    edit_config(folder, **{other: size})
    load_base(folder)
    edit_config(folder, **{other: 2 * size})
    with pytest.raises(MiniloraError, match=f"{name} is {size}, but {other}, .* {2 * size}$"):
        load_base(folder)


def test_tensors_that_do_not_fit_are_listed(folder):
    def change(tensors):
        tensors["transformer.extra"] = tensors.pop("transformer.h.1.ln_2.bias")
        name = "transformer.h.0.mlp.c_fc.weight"
        tensors[name] = tensors[name].T

    edit_tensors(folder, change)
    with pytest.raises(MiniloraError) as caught:
        load_base(folder)
    for part in (
        "model.safetensors does not hold the model that its config.json describes",
        "of the wrong shape: h.0.mlp.c_fc.weight is (10, 6), expected (6, 10)",
        "missing: h.1.ln_2.bias (6,)",
        "left over: extra (6,)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"wte.weight": t["transformer.wte.weight"]}), "wte.weight twice"),
        (lambda t: t.update({"lm_head.weight": np.zeros((13, 6))}), "lm_head.weight differs"),
        (lambda t: t.update({"lm_head.weight": np.zeros((6, 13))}), "lm_head.weight differs"),
        (lambda t: t.update({"transformer.wpe.weight": np.zeros((7, 6), int)}), "dtype I64"),
        (lambda t: t["transformer.ln_f.bias"].fill(np.nan), "ln_f.bias .* not finite"),
        (
            lambda t: [t.pop(n) for n in list(t) if ".h." in n],
            "n_layer is 2, but model.safetensors holds 0 blocks",
        ),
    ],
)
def test_other_tensors_that_are_refused(folder, change, message):
    edit_tensors(folder, change)
    with pytest.raises(MiniloraError, match=message) as caught:
        load_base(folder)
    assert str(folder) in str(caught.value)


def test_files_that_are_missing(folder):
    (folder / "model.safetensors").rename(folder / "away")
    with pytest.raises(MiniloraError, match=r"model\.safetensors does not exist"):
        load_base(folder)
    with pytest.raises(MiniloraError, match=r"nowhere.config\.json does not exist"):
        load_base(folder / "nowhere")
    with pytest.raises(MiniloraError, match="away is a file; expected a folder"):
        save_base(folder / "away", drawn(CONFIG), CONFIG)
