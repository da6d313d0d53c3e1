"""Adapters in PEFT's layout: round trips, fusing, and what is refused by name."""

import json
import re
import time

import hypothesis.strategies as st
import numpy as np
import pytest
from helpers import bytes_of
from hypothesis import given, settings

from minilora.adapters import (
    TARGETS,
    LoRAConfig,
    adapted_paths,
    adapters,
    lora_init,
    lora_paths,
    weight_of,
)
from minilora.errors import MiniloraError
from minilora.formats.card import CARD
from minilora.formats.peft import fused_blocks, load_adapter, save_adapter
from minilora.formats.tensors import read_tensors, write_tensors
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.lora import merge
from minilora.network import Net, net_logits
from minilora.tree import flatten, map_leaves

CONFIG = GPTConfig(vocab_size=11, n_positions=6, n_embd=8, n_layer=3, n_head=2, n_inner=12)
WEIGHTS, JSON = "adapter_model.safetensors", "adapter_config.json"


def drawn(lora_config, config=CONFIG, dtype=np.float32, seed=0):
    """Adapters whose every number is random."""
    rng = np.random.default_rng(seed)
    lora = lora_init(gpt_init(config, seed=0, dtype=dtype), lora_config, seed=0)
    return map_leaves(lambda x: rng.standard_normal(x.shape).astype(dtype), lora)


def updates(lora, lora_config, config=CONFIG):
    """The dense update s A B of every base weight, float64, by the weight's path."""
    dense = {}
    for path, ab in adapters(lora).items():
        where, columns = weight_of(path, config.n_embd)
        update = lora_config.scale_of(path) * (ab["A"].astype(float) @ ab["B"].astype(float))
        n_out = 3 * config.n_embd if where.endswith("qkv.w") else update.shape[1]
        dense.setdefault(where, np.zeros((len(update), n_out)))[:, columns] += update
    return dense


def edit(folder, **fields):
    document = json.loads((folder / JSON).read_text())
    document.update(fields)
    (folder / JSON).write_text(json.dumps({k: v for k, v in document.items() if v is not ...}))


def edit_tensors(folder, change):
    tensors, metadata = read_tensors(folder / WEIGHTS)
    change(tensors)
    write_tensors(folder / WEIGHTS, tensors, metadata)


# --- what is read is what was written ----------------------------------------------------------

ANY_PATH = st.sampled_from(lora_paths(CONFIG.n_layer)).map(re.escape)
ANY_TARGET = st.sampled_from(TARGETS) | ANY_PATH


@st.composite
def configurations(draw):
    """A LoRA configuration for CONFIG: any targets, ranks, alphas and patterns."""
    targets = draw(st.lists(ANY_TARGET, min_size=1, max_size=5, unique=True))
    paths = adapted_paths(LoRAConfig(targets=tuple(targets)), CONFIG.n_layer)
    keys = st.sampled_from([re.escape(path) for path in paths])
    return LoRAConfig(
        rank=draw(st.integers(1, 4)),
        alpha=draw(st.sampled_from([1.0, 8.0, 2.5, 1 / 3])),
        targets=tuple(targets),
        dropout=draw(st.sampled_from([0.0, 0.25])),
        rslora=draw(st.booleans()),
        rank_pattern=draw(st.dictionaries(keys, st.integers(1, 5), max_size=3)),
        alpha_pattern=draw(st.dictionaries(keys, st.sampled_from([0.7, 3.0, 16.0]), max_size=3)),
    )


@given(lora_config=configurations(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_round_trip_computes_the_same(tmp_path_factory, lora_config, seed):
    lora, folder = drawn(lora_config, dtype=np.float64, seed=seed), tmp_path_factory.mktemp("a")
    save_adapter(folder, lora, lora_config, CONFIG)
    loaded, loaded_config = load_adapter(folder, CONFIG, dtype=np.float64)
    assert len(loaded["blocks"]) == CONFIG.n_layer
    assert loaded_config.dropout == lora_config.dropout
    assert adapted_paths(loaded_config, CONFIG.n_layer) == list(adapters(loaded))
    expected, found = updates(lora, lora_config), updates(loaded, loaded_config)
    assert expected.keys() == found.keys()
    for path, update in expected.items():
        np.testing.assert_allclose(found[path], update, rtol=1e-14, atol=1e-14, err_msg=path)


@given(lora_config=configurations(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_save_load_save_is_exact(tmp_path_factory, lora_config, seed):
    lora, folder = drawn(lora_config, seed=seed), tmp_path_factory.mktemp("a")
    save_adapter(folder, lora, lora_config, CONFIG, base_name="a/b")
    before = bytes_of(folder)
    assert before.keys() == {CARD, WEIGHTS, JSON}
    loaded, loaded_config = load_adapter(folder, CONFIG)
    for path, leaf in flatten(loaded).items():
        assert leaf.dtype == np.float32 and leaf.flags.c_contiguous and leaf.flags.writeable, path
    save_adapter(folder, loaded, loaded_config, CONFIG, base_name="a/b")
    assert bytes_of(folder) == before
    if not fused_blocks(lora):  # then the tree itself comes back, to the last bit
        assert flatten(lora).keys() == flatten(loaded).keys()
        for path, leaf in flatten(lora).items():
            assert leaf.tobytes() == flatten(loaded)[path].tobytes(), path
            adapter = path.rpartition(".")[0]
            assert loaded_config.rank_of(adapter) == lora_config.rank_of(adapter), path
            assert loaded_config.alpha_of(adapter) == lora_config.alpha_of(adapter), path


def test_the_file_is_pefts(tmp_path):
    lora_config = LoRAConfig(
        rank=2,
        alpha=5.0,
        targets=("qkv", "o", "down", r"blocks\.1\.mlp\.up", "embedding"),
        dropout=0.1,
        rank_pattern={r"blocks\.2\.attn\.o": 3},
        alpha_pattern={"embedding": 2.5},
    )
    lora = drawn(lora_config)
    save_adapter(tmp_path, lora, lora_config, CONFIG, base_name="me/base")
    text = (tmp_path / JSON).read_text()
    document = json.loads(text)
    assert text == json.dumps(document, indent=2, sort_keys=True) + "\n"
    assert document | {"modules_to_save": None} == {
        "alpha_pattern": {r"transformer\.wte": 2.5},
        "base_model_name_or_path": "me/base",
        "bias": "none",
        "fan_in_fan_out": True,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 5,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 2,
        "rank_pattern": {r"transformer\.h\.2\.attn\.c_proj": 3},
        "target_modules": [
            *("wte", "attn.c_attn", "attn.c_proj", "mlp.c_proj"),
            "transformer.h.1.mlp.c_fc",
        ],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    tensors, metadata = read_tensors(tmp_path / WEIGHTS)
    assert metadata == {"format": "pt"}
    prefix = "base_model.model.transformer"
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes[f"{prefix}.h.0.mlp.c_proj.lora_A.weight"] == (2, 12)
    assert shapes[f"{prefix}.h.0.mlp.c_proj.lora_B.weight"] == (8, 2)
    assert shapes[f"{prefix}.h.2.attn.c_proj.lora_A.weight"] == (3, 8)
    assert shapes[f"{prefix}.wte.lora_embedding_A"] == (2, 11)
    assert shapes[f"{prefix}.wte.lora_embedding_B"] == (8, 2)
    A = lora["blocks"][1]["attn"]["qkv"]["A"]
    assert np.array_equal(tensors[f"{prefix}.h.1.attn.c_attn.lora_A.weight"], A.T)


# --- from the paper's adapters to PEFT's --------------------------------------------------------


def test_q_and_v_become_one_adapter_of_twice_the_rank(tmp_path):
    lora_config = LoRAConfig(rank=2, alpha=3.0, targets=("q", "v"))
    lora = drawn(lora_config)
    assert fused_blocks(lora) == [0, 1, 2]
    save_adapter(tmp_path, lora, lora_config, CONFIG)
    document = json.loads((tmp_path / JSON).read_text())
    assert (document["r"], document["lora_alpha"]) == (4, 6)
    assert document["rank_pattern"] == document["alpha_pattern"] == {}
    assert document["target_modules"] == ["attn.c_attn"]
    loaded, loaded_config = load_adapter(tmp_path, CONFIG)
    q, v = (lora["blocks"][1]["attn"][name] for name in "qv")
    fused = loaded["blocks"][1]["attn"]["qkv"]
    assert np.array_equal(fused["A"], np.hstack([q["A"], v["A"]]))
    zero = np.zeros((2, 8), np.float32)
    assert np.array_equal(fused["B"], np.block([[q["B"], zero, zero], [zero, zero, v["B"]]]))
    base = gpt_init(CONFIG, seed=3)
    tokens = np.random.default_rng(0).integers(0, 11, (2, 6))
    np.testing.assert_allclose(
        net_logits(Net(base, CONFIG, loaded, loaded_config), tokens=tokens),
        net_logits(Net(base, CONFIG, lora, lora_config), tokens=tokens),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_every_mix_on_one_weight_merges_to_the_same(tmp_path, rslora):
    lora_config = LoRAConfig(
        rank=2,
        alpha=3.0,
        targets=("qkv", "q", r"blocks\.1\.attn\.k", "v", "o"),
        rslora=rslora,
        rank_pattern={"v": 4, "qkv": 1},
        alpha_pattern={"q": 7.0, r"blocks\.1\.attn\.k": 0.5},
    )
    lora = drawn(lora_config, dtype=np.float64)
    save_adapter(tmp_path, lora, lora_config, CONFIG)
    loaded, loaded_config = load_adapter(tmp_path, CONFIG, dtype=np.float64)
    assert loaded_config.rank_of("blocks.0.attn.qkv") == 1 + 2 + 4
    assert loaded_config.rank_of("blocks.1.attn.qkv") == 1 + 2 + 2 + 4
    base = gpt_init(CONFIG, seed=3, dtype=np.float64)
    expected = flatten(merge(base, lora, lora_config))
    for path, weight in flatten(merge(base, loaded, loaded_config)).items():
        np.testing.assert_allclose(weight, expected[path], rtol=1e-13, atol=1e-13, err_msg=path)


def test_nothing_is_fused_where_nothing_is_split():
    assert fused_blocks(drawn(LoRAConfig(targets=("qkv", "o", "embedding")))) == []
    assert fused_blocks(drawn(LoRAConfig(targets=(r"2\.attn\.k", "up")))) == [2]


# --- what PEFT writes ---------------------------------------------------------------------------

# Every field that PEFT 0.21 writes for an adapter on c_attn, as it writes it.
FROM_PEFT = {
    **{"alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None},
    **{"auto_mapping": None, "base_model_name_or_path": None, "bias": "none"},
    **{"corda_config": None, "ensure_weight_tying": False, "eva_config": None},
    **{"exclude_modules": None, "fan_in_fan_out": True, "inference_mode": True},
    **{"init_lora_weights": True, "kasa_config": None, "layer_replication": None},
    **{"layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 3},
    **{"lora_bias": False, "lora_dropout": 0.0, "lora_ga_config": None, "megatron_config": None},
    **{"megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None},
    **{"peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 2},
    **{"rank_pattern": {}, "revision": None, "target_modules": ["c_attn"]},
    **{"target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None},
    **{"use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False},
    **{"velora_config": None},
}


@pytest.fixture
def adapter(tmp_path):
    """A folder as PEFT writes it, of an adapter on every c_attn."""
    lora_config = LoRAConfig(rank=2, alpha=3.0, targets=("qkv",))
    save_adapter(tmp_path / "a", drawn(lora_config), lora_config, CONFIG)
    (tmp_path / "a" / JSON).write_text(json.dumps(FROM_PEFT))
    return tmp_path / "a"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {name: ... for name in FROM_PEFT if name not in ("peft_type", "r", "lora_alpha")},
        {"target_modules": "all-linear", "exclude_modules": ["c_proj", "mlp.c_fc"]},
        {"target_modules": r".*\.c_attn"},
        {"target_modules": r"transformer\.h\.\d+\.attn\.c_(attn|q)"},
        {"target_modules": ["c_attn", "q_proj"]},
        {"target_modules": ["c_attn", "wte"], "exclude_modules": r".*wte"},
        {"target_modules": ["attn.c_attn"], "layers_to_transform": [0, 1, 2]},
        {"target_modules": ["c_attn"], "layers_to_transform": [0, 1, 2], "layers_pattern": "h"},
        {"target_modules": [f"transformer.h.{i}.attn.c_attn" for i in range(3)]},
        {
            "target_modules": [f"transformer.h.{i}.attn.c_attn" for i in (1, 2)] + ["c_attn"],
            "layers_to_transform": [0],
        },
        {"init_lora_weights": "gaussian"},
        {"fan_in_fan_out": False},
        {"an_option_of_tomorrow": None},
    ],
)
def test_ways_to_say_the_same(adapter, fields):
    edit(adapter, **fields)
    lora, lora_config = load_adapter(adapter, CONFIG)
    assert lora_config == LoRAConfig(rank=2, alpha=3.0, targets=("qkv",))
    assert flatten(lora).keys() == flatten(drawn(lora_config)).keys()


def test_a_missing_alpha_is_that_of_peft(adapter):
    edit(adapter, lora_alpha=...)
    assert load_adapter(adapter, CONFIG)[1].alpha == 8.0


@pytest.mark.parametrize(
    ("pattern", "blocks"),
    [
        ({"c_attn": 7}, [0, 1, 2]),
        ({"h.1.attn.c_attn": 7}, [1]),
        ({r"h\.(0|2)\..*": 7}, [0, 2]),
        ({r"(.*\.)?h\.(0|1|3|4|5|6|7|8|9|10|11)\.(attn|mlp)\.(c_attn|c_proj)": 7}, [0, 1]),
        ({r"transformer\.h\.[0-1]\.[a-z]+\.c_[^\d\]p]+": 7}, [0, 1]),
        ({"^transformer.h.1.*": 7}, [1]),
        ({r"^h\.1.*": 7}, []),  # PEFT's names start with transformer.
        ({r"transformer\.h\.2\.attn\.c_attn": 7, "c_attn": 3}, [2]),
        ({"attn": 7}, []),
    ],
)
def test_patterns_match_as_in_peft(adapter, pattern, blocks):
    edit(adapter, alpha_pattern=pattern)
    _, lora_config = load_adapter(adapter, CONFIG)
    alphas = [lora_config.alpha_of(f"blocks.{i}.attn.qkv") for i in range(3)]
    assert alphas == [7.0 if i in blocks else 3.0 for i in range(3)]


def test_ranks_are_the_tensors(adapter):
    name = "base_model.model.transformer.h.1.attn.c_attn.lora_{}.weight"

    def change(tensors):
        tensors[name.format("A")] = np.ones((5, 8), np.float16)
        tensors[name.format("B")] = np.ones((24, 5), np.float16)

    edit_tensors(adapter, change)
    with pytest.raises(MiniloraError, match=r"lora_A.weight is \(5, 8\), expected \(2, 8\)"):
        load_adapter(adapter, CONFIG)
    edit(adapter, rank_pattern={"h.1.attn.c_attn": 5})
    lora, lora_config = load_adapter(adapter, CONFIG)
    assert lora["blocks"][1]["attn"]["qkv"]["A"].shape == (8, 5)
    assert lora["blocks"][1]["attn"]["qkv"]["A"].dtype == np.float32
    assert lora_config.rank_of("blocks.1.attn.qkv") == 5 != lora_config.rank_of("blocks.0.attn.qkv")


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", ...),
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["ln_f"]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["a"]),
        ("layer_replication", [[0, 1]]),
        ("ensure_weight_tying", True),
        ("init_lora_weights", "pissa_niter_4"),
        ("an_option_of_tomorrow", {"a": 1}),
        ("r", 0),
        ("r", 2.0),
        ("r", 10**30),
        ("lora_alpha", "8"),
        ("lora_alpha", 0),
        ("lora_alpha", float("inf")),
        ("lora_dropout", 1.5),
        ("use_rslora", 1),
        ("rank_pattern", {"c_attn": "4"}),
        ("rank_pattern", [4]),
        ("alpha_pattern", {"c_attn": None}),
        ("alpha_pattern", {"(c_attn": 4}),
        ("alpha_pattern", {"c_attn{99999999999999}": 4}),
        ("target_modules", 3),
        ("target_modules", [3]),
        ("target_modules", "(c_attn"),
        ("exclude_modules", {"a": 1}),
        ("layers_to_transform", ["0"]),
    ],
)
def test_a_field_that_is_not_understood_is_named(adapter, field, value):
    edit(adapter, **{field: value})
    name = {"r": "rank|r is|lora_A", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    with pytest.raises(MiniloraError, match=name.get(field, field)) as caught:
        load_adapter(adapter, CONFIG)
    assert str(adapter) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": ["c_attn", "attn.c_proj"]},
            r"missing: .*c_proj.lora_A.weight \(2, 8\)",
        ),
        (
            {"target_modules": "all-linear"},
            r"missing: .*c_fc.lora_B.weight \(12, 2\), .* and 12 more",
        ),
        (
            {"target_modules": r".*h\.[01]\.attn\.c_attn"},
            r"left over: .*h\.2.*lora_A.weight \(2, 8\)",
        ),
        ({"layers_to_transform": 1}, r"left over: .*h\.0.*lora_A.weight \(2, 8\)"),
        ({"exclude_modules": ["transformer.h.1.attn.c_attn"]}, r"left over: .*h\.1"),
    ],
)
def test_a_configuration_that_names_other_modules(adapter, fields, message):
    edit(adapter, **fields)
    with pytest.raises(MiniloraError, match=message) as caught:
        load_adapter(adapter, CONFIG)
    assert str(adapter / WEIGHTS) in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_embd": 10}, r"another base.*c_attn.lora_A.weight is \(2, 8\), expected \(2, 10\)"),
        ({"n_layer": 2}, r"another base.*left over: .*h\.2\.attn\.c_attn.lora_A.weight \(2, 8\)"),
        ({"n_layer": 4}, r"another base.*missing: .*h\.3\.attn\.c_attn.lora_A.weight \(2, 8\)"),
    ],
)
def test_an_adapter_made_for_another_base(adapter, sizes, message):
    with pytest.raises(MiniloraError, match=message):
        load_adapter(adapter, GPTConfig(**{**CONFIG.__dict__, **sizes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, a: t.pop(a), r"missing: .*h\.1.*lora_A.weight \(2, 8\)"),
        (lambda t, a: t.update({a[:-7]: t.pop(a)}), r"missing: .*left over: .*lora_A \(2, 8\)"),
        (lambda t, a: t.update({a: t[a].T}), r"lora_A.weight is \(8, 2\), expected \(2, 8\)"),
        (lambda t, a: t.update({a: t[a].ravel()}), r"is \(16,\), expected \(2, 8\)"),
        (lambda t, a: t.update({"lm_head.lora_A": t[a]}), r"left over: lm_head.lora_A"),
        (lambda t, a: t.update({a: t[a].astype(np.int32)}), "dtype I32"),
        (lambda t, a: t[a].fill(np.inf), "not finite"),
        (lambda t, a: t.clear(), "missing: |holds no adapter|damaged"),
    ],
)
@pytest.mark.parametrize("target", [["c_attn"], r"(transformer)?(.*)\.c_attn" + "?" * 6, None])
def test_tensors_that_do_not_fit(adapter, change, message, target):
    edit(adapter, target_modules=target if isinstance(target, list) else ...)
    edit_tensors(adapter, lambda t: change(t, sorted(t)[2]))
    with pytest.raises(MiniloraError, match=message) as caught:
        load_adapter(adapter, CONFIG)
    assert str(adapter / WEIGHTS) in str(caught.value)


HOSTILE = [
    r"(.*.*)*x",
    r"(a|a)*$",
    r"((t|r|a|n|s|f|o|m|e|\.)+)+!",
    r".*.*.*.*.*.*.*.*.*.*!",
    r"(?x:(.+) +)!",
    r"(?:.+)+!",
    r"(.|.)" * 28 + "!",
    r".?" * 28 + "!",
    "(" * 5000 + "a" + ")" * 5000,
    r"(.*)\1\1\1\1\1\1(.*)*!",
    "a" * 10**6,
    r".{0,30}" * 9 + "!",
    r"(.?[)]?|.|..)" * 6 + "[(][)]!" + ".*" * 9,
    r"([])]|.|..)" * 20 + "!",
    "[" * 50_000,
    r"(..?|(.|..)(.|..)(.|..))" * 5 + "!",
]


@pytest.mark.parametrize("pattern", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_patterns_are_not_run(adapter, pattern):
    start = time.process_time()
    for field in ("rank_pattern", "alpha_pattern"):
        edit(adapter, **(FROM_PEFT | {field: {pattern: 2}}))
        try:
            assert load_adapter(adapter, CONFIG)[1].alpha == 3.0
        except MiniloraError as error:
            assert field in str(error)
    edit(adapter, **(FROM_PEFT | {"target_modules": pattern}))
    try:  # what it names is unknown, but the tensors say it too
        assert load_adapter(adapter, CONFIG)[1].targets == ("qkv",)
    except MiniloraError as error:
        assert "target_modules" in str(error) or "left over" in str(error)
    assert time.process_time() - start < 5.0


@pytest.mark.parametrize("pattern", [".*" * 5 + "!", r".*(a|b)(c|d)e*f?!", "[a-z.]+[h.]+[a-z]*!"])
def test_the_slowest_patterns_that_are_run_take_a_moment(adapter, pattern):
    edit(adapter, alpha_pattern={pattern: 2, "x": 3}, rank_pattern={f"h.{pattern}": 2})
    start = time.process_time()
    assert load_adapter(adapter, CONFIG)[1].alpha == 3.0
    assert time.process_time() - start < 2.0


def test_very_many_patterns_are_refused_soon(adapter):
    edit(adapter, alpha_pattern={f"h.0.c{i}": 2 for i in range(20_000)})
    start = time.process_time()
    with pytest.raises(MiniloraError, match="alpha_pattern"):
        load_adapter(adapter, CONFIG)
    assert time.process_time() - start < 5.0


def test_what_does_not_fit_is_not_saved(tmp_path):
    lora_config = LoRAConfig(rank=2, targets=("q", "up"))
    lora = drawn(lora_config)
    for other, lora_other in [
        (GPTConfig(**{**CONFIG.__dict__, "n_layer": 2}), lora_config),
        (GPTConfig(**{**CONFIG.__dict__, "n_embd": 4}), lora_config),
        (CONFIG, LoRAConfig(rank=3, targets=("q", "up"))),
    ]:
        with pytest.raises(MiniloraError, match="do not fit"):
            save_adapter(tmp_path / "out", lora, lora_other, other)
    with pytest.raises(MiniloraError, match="no adapter to save"):
        save_adapter(tmp_path / "out", {"blocks": [{}, {}, {}]}, lora_config, CONFIG)
    assert not (tmp_path / "out").exists()


def test_files_that_are_missing(adapter):
    (adapter / WEIGHTS).unlink()
    with pytest.raises(MiniloraError, match=r"adapter_model\.safetensors does not exist"):
        load_adapter(adapter, CONFIG)
    (adapter / JSON).unlink()
    for folder in (adapter, adapter / "nowhere"):
        with pytest.raises(MiniloraError, match=r"adapter_config\.json does not exist"):
            load_adapter(folder, CONFIG)


def test_named_adapters_are_listed(adapter):
    folder = adapter.parent
    (folder / "empty").mkdir()
    with pytest.raises(MiniloraError, match="name one of them: ") as caught:
        load_adapter(folder, CONFIG)
    assert str(caught.value).endswith(f"them: {adapter}")
    (folder / "b").mkdir()
    (folder / "b" / JSON).write_text("{}")
    with pytest.raises(MiniloraError, match="name one of them: ") as caught:
        load_adapter(folder, CONFIG)
    assert str(caught.value).endswith(f"them: {adapter}, {folder / 'b'}")
    assert load_adapter(adapter, CONFIG)[1].rank == 2


# --- what other programs leave in the file -----------------------------------------------------

TABLES = ("base_model.model.transformer.wte.weight", "base_model.model.lm_head.weight")


def test_equal_copies_of_the_tables_are_accepted_and_others_refused_by_name(adapter):
    base = gpt_init(CONFIG, seed=4)
    plain, _ = load_adapter(adapter, CONFIG)
    edit_tensors(adapter, lambda t: t.update(dict.fromkeys(TABLES, base["wte"])))
    found, _ = load_adapter(adapter, CONFIG, base=base)
    assert {p: x.tobytes() for p, x in flatten(found).items()} == {
        p: x.tobytes() for p, x in flatten(plain).items()
    }
    with pytest.raises(MiniloraError, match="wte.weight, which can be compared with no base"):
        load_adapter(adapter, CONFIG)
    head = {**base, "head": base["wte"] + 1}
    with pytest.raises(MiniloraError, match=r"lm_head\.weight, which differs from the base's"):
        load_adapter(adapter, CONFIG, base=head)
    for change in (lambda x: x + np.eye(*x.shape, dtype=x.dtype), lambda x: x[:-1], lambda x: x.T):
        edit_tensors(adapter, lambda t, c=change: t.update({TABLES[0]: c(base["wte"])}))
        with pytest.raises(MiniloraError, match=r"wte\.weight, which differs from the base's"):
            load_adapter(adapter, CONFIG, base=base)


def test_keys_that_kept_the_adapters_name_and_an_absent_rslora(adapter):
    before = flatten(load_adapter(adapter, CONFIG)[0])
    tensors, _ = read_tensors(adapter / WEIGHTS)
    named = {re.sub(r"(lora_(embedding_)?[AB])", r"\1.default", n): x for n, x in tensors.items()}
    assert not named.keys() & tensors.keys()
    write_tensors(adapter / WEIGHTS, named)
    edit(adapter, use_rslora=None)
    after, lora_config = load_adapter(adapter, CONFIG)
    assert not lora_config.rslora
    assert all(np.array_equal(x, before[path]) for path, x in flatten(after).items())
    write_tensors(adapter / WEIGHTS, named | tensors)
    with pytest.raises(MiniloraError, match="holds an adapter twice"):
        load_adapter(adapter, CONFIG)


def test_a_pickled_adapter_is_not_read_and_it_is_said_how_to_convert_it(adapter):
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(MiniloraError, match=r"adapter_model\.bin .*AutoPeftModelForCausalLM"):
        load_adapter(adapter, CONFIG)


def test_names_and_dtypes_from_a_file_reach_a_message_short_and_printable(adapter):
    escape = "\x1b]0;owned\x07\x1b[2J"
    data = (adapter / WEIGHTS).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    body = data[8 + int.from_bytes(data[:8], "little") :]
    header[next(name for name in header if "lora" in name)]["dtype"] = escape
    text = json.dumps(header).encode()
    (adapter / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + body)
    with pytest.raises(MiniloraError) as caught:
        load_adapter(adapter, CONFIG)
    assert str(caught.value).isprintable()
    write_tensors(adapter / WEIGHTS, {"x" * 10**6: np.ones(1), escape: np.ones(1)})
    with pytest.raises(MiniloraError, match="left over") as caught:
        load_adapter(adapter, CONFIG)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000


def test_a_pattern_that_python_warns_of_is_read_without_a_word(adapter, recwarn):
    edit(adapter, alpha_pattern={"[[a]": 3})
    load_adapter(adapter, CONFIG)
    with pytest.raises(MiniloraError, match="no weight matches the target"):
        adapted_paths(LoRAConfig(targets=("[[a]x",)), 1)
    assert not recwarn.list
