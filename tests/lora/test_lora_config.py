"""Which weights a configuration names, at which rank and scale, and what it refuses."""

import math

import numpy as np
import pytest

from minilora.adapters import (
    TARGETS,
    LoRAConfig,
    adapted_paths,
    adapters,
    lora_init,
    placed_adapters,
    weight_of,
)
from minilora.errors import MiniloraError
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.lora import merge
from minilora.tree import flatten

GPT = GPTConfig(vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2)


def base(dtype=np.float64):
    return gpt_init(GPT, seed=0, dtype=dtype)


# --- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (("qkv",), ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]),
        (("q", "o"), [f"blocks.{i}.attn.{name}" for i in range(2) for name in "qo"]),
        (("o", "q"), [f"blocks.{i}.attn.{name}" for i in range(2) for name in "qo"]),
        (("down", "embedding"), ["embedding", "blocks.0.mlp.down", "blocks.1.mlp.down"]),
        (("1.mlp.up",), ["blocks.1.mlp.up"]),
        (
            (r"blocks\.1\..*",),
            [f"blocks.1.{p}" for p in ["attn.qkv", "attn.q", "attn.k", "attn.v"]]
            + [f"blocks.1.{p}" for p in ["attn.o", "mlp.up", "mlp.down"]],
        ),
        ((r"0\.attn\.[qv]",), ["blocks.0.attn.q", "blocks.0.attn.v"]),
        (("up", "up", "0.mlp.up"), ["blocks.0.mlp.up", "blocks.1.mlp.up"]),
    ],
)
def test_targets_name_paths_in_the_order_of_the_model(targets, paths):
    assert adapted_paths(LoRAConfig(targets=targets), 2) == paths


def test_a_name_is_not_matched_inside_another():
    """`q` is not `qkv`, `o` is not `down`, and block 1 is not block 11."""
    assert adapted_paths(LoRAConfig(targets=("q",)), 1) == ["blocks.0.attn.q"]
    assert adapted_paths(LoRAConfig(targets=("o",)), 1) == ["blocks.0.attn.o"]
    assert adapted_paths(LoRAConfig(targets=("1.mlp.up",)), 12) == ["blocks.1.mlp.up"]


def test_an_unknown_target_is_refused_with_a_list_of_those_that_exist():
    with pytest.raises(MiniloraError, match="'query'.*" + ", ".join(TARGETS)):
        adapted_paths(LoRAConfig(targets=("q", "query")), 2)


@pytest.mark.parametrize("target", [r"blocks\.7\..*", "7.mlp.up", "", "Q"])
def test_a_target_that_matches_nothing_is_refused(target):
    with pytest.raises(MiniloraError, match="target"):
        adapted_paths(LoRAConfig(targets=(target,)), 2)


def test_a_target_that_is_no_regular_expression_is_refused():
    with pytest.raises(MiniloraError, match=r"'\(q'"):
        adapted_paths(LoRAConfig(targets=("(q",)), 2)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["up", "2.attn.qkv", "("])
def test_a_pattern_key_that_matches_no_adapted_weight_is_refused(option, pattern):
    with pytest.raises(MiniloraError, match="pattern"):
        adapted_paths(LoRAConfig(targets=("qkv",), **{option: {pattern: 4}}), 2)


# --- ranks and scales ----------------------------------------------------------------------------


def test_the_first_pattern_that_matches_gives_rank_and_alpha():
    config = LoRAConfig(
        rank=4,
        alpha=8.0,
        targets=("qkv", "up"),
        rank_pattern={"1.mlp.up": 2, "up": 1},
        alpha_pattern={r"blocks\.0\..*": 6.0},
    )
    ranks = {path: config.rank_of(path) for path in adapted_paths(config, 2)}
    assert list(ranks.values()) == [4, 1, 4, 2]
    scales = {path: config.scale_of(path) for path in ranks}
    assert list(scales.values()) == [6 / 4, 6 / 1, 8 / 4, 8 / 2]
    shapes = {path: x.shape for path, x in flatten(lora_init(base(), config, seed=0)).items()}
    assert shapes["blocks.1.mlp.up.A"] == (8, 2)
    assert shapes["blocks.0.mlp.up.B"] == (1, 32)


def test_where_several_patterns_match_the_first_wins():
    patterns = {r"0\.attn\.q": 2, "q": 4}
    turned = dict(reversed(patterns.items()))
    config = LoRAConfig(rank_pattern=patterns, alpha_pattern=patterns)
    for of in (config.rank_of, config.alpha_of):
        assert [of(f"blocks.{i}.attn.q") for i in range(2)] == [2, 4]
    config = LoRAConfig(rank_pattern=turned, alpha_pattern=turned)
    for of in (config.rank_of, config.alpha_of):
        assert [of(f"blocks.{i}.attn.q") for i in range(2)] == [4, 4]


def test_the_rank_stabilised_scale_divides_by_the_root_of_the_rank():
    assert LoRAConfig(rank=16, alpha=8.0).scale_of("embedding") == 0.5
    assert LoRAConfig(rank=16, alpha=8.0, rslora=True).scale_of("embedding") == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": -1}, "rank -1"),
        ({"rank_pattern": {"qkv": 0}}, "rank 0"),
        ({"alpha": 0.0}, "alpha 0"),
        ({"alpha": math.nan}, "alpha nan"),
        ({"alpha_pattern": {"qkv": -1.0}}, "alpha -1"),
        ({"dropout": 1.0}, "dropout 1"),
        ({"dropout": -0.1}, "dropout -0.1"),
        ({"targets": ()}, "targets"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(MiniloraError, match=message):
        LoRAConfig(**options)


@pytest.mark.parametrize(
    ("targets", "smaller"),
    [("qkv", 8), ("q", 8), ("o", 8), ("up", 8), ("down", 8), ("embedding", 8)],
)
def test_a_rank_above_the_weight_s_smaller_side_is_refused(targets, smaller):
    lora_init(base(), LoRAConfig(rank=smaller, targets=(targets,)), seed=0)
    with pytest.raises(MiniloraError, match=f"rank {smaller + 1} is above.*{targets}"):
        lora_init(base(), LoRAConfig(rank=smaller + 1, targets=(targets,)), seed=0)


# --- the fresh tree ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_fresh_tree(dtype):
    lora = lora_init(base(dtype), LoRAConfig(rank=4, targets=TARGETS), seed=3)
    weights = flatten(base(dtype))
    assert list(adapters(lora)) == adapted_paths(LoRAConfig(targets=TARGETS), 2)
    for path, factors in adapters(lora).items():
        weight, columns = weight_of(path, GPT.n_embd)
        n_in, n_out = weights[weight][:, columns].shape
        A, B = factors["A"], factors["B"]
        assert (A.shape, B.shape) == ((n_in, 4), (4, n_out))
        assert A.dtype == B.dtype == dtype
        assert not (A if path == "embedding" else B).any()


def test_the_random_factor_has_its_standard_deviation():
    """A ~ U(-1/√in, 1/√in), whose deviation is 1/√(3 in); the embedding's B ~ N(0, 1)."""
    config = GPTConfig(vocab_size=130, n_positions=2, n_embd=128, n_layer=1, n_head=1)
    lora = lora_init(
        gpt_init(config, seed=0), LoRAConfig(rank=64, targets=("o", "down", "embedding")), seed=0
    )
    factors = adapters(lora)
    assert factors["embedding"]["B"].std() == pytest.approx(1, rel=0.03)
    for path, n_in in [("blocks.0.attn.o", 128), ("blocks.0.mlp.down", 512)]:
        A = factors[path]["A"]
        assert A.std() == pytest.approx(1 / math.sqrt(3 * n_in), rel=0.03), path
        assert 0.99 / math.sqrt(n_in) < np.abs(A).max() <= 1 / math.sqrt(n_in), path
        assert abs(A.mean()) < 0.03 / math.sqrt(n_in), path


def test_the_seed_decides_and_no_two_adapters_are_alike():
    config = LoRAConfig(rank=4, targets=("q", "k", "v"))
    first, again, other = (flatten(lora_init(base(), config, seed=s)) for s in (0, 0, 1))
    assert all(np.array_equal(first[path], again[path]) for path in first)
    assert not np.array_equal(first["blocks.0.attn.q.A"], other["blocks.0.attn.q.A"])
    As = [leaf.tobytes() for path, leaf in first.items() if path.endswith("A")]
    assert len(set(As)) == len(As)


def test_every_block_has_an_entry():
    lora = lora_init(base(), LoRAConfig(targets=("0.mlp.up",)), seed=0)
    assert lora["blocks"][1] == {}
    assert lora_init(base(), LoRAConfig(targets=("embedding",)), seed=0)["blocks"] == [{}, {}]
    lora = lora_init(base(), LoRAConfig(targets=("1.mlp.up",)), seed=0)
    assert lora["blocks"][0] == {}
    assert "mlp" in lora["blocks"][1]


def test_q_k_and_v_are_the_columns_of_qkv():
    columns = [weight_of(f"blocks.3.attn.{name}", 8) for name in "qkv"]
    assert columns == [("blocks.3.attn.qkv.w", slice(8 * i, 8 * i + 8)) for i in range(3)]
    assert weight_of("blocks.3.mlp.down", 8) == ("blocks.3.mlp.down.w", slice(None))
    assert weight_of("embedding", 8) == ("wte", slice(None))


def test_adapters_are_placed_by_block_and_linear_map():
    config = LoRAConfig(rank=2, alpha=3.0, targets=("embedding", "0.attn.[qv]", "1.mlp.down"))
    lora, mask = lora_init(base(), config, seed=0), np.ones((1, 1, 8))
    placed = placed_adapters(lora, config, (8, 8), masks={"blocks.0.attn.v": mask})
    found = {
        (block, linear, target): adapter
        for block, maps in placed.items()
        for linear, on_it in maps.items()
        for target, adapter in on_it.items()
    }
    assert {place: adapter.columns for place, adapter in found.items()} == {
        ("", "wte", "embedding"): slice(None),
        ("blocks.0", "qkv", "q"): slice(0, 8),
        ("blocks.0", "qkv", "v"): slice(16, 24),
        ("blocks.1", "down", "down"): slice(None),
    }
    assert found["blocks.0", "qkv", "v"].mask is mask
    assert found["blocks.0", "qkv", "q"].mask is None
    assert found["blocks.1", "down", "down"].A is lora["blocks"][1]["mlp"]["down"]["A"]
    assert {adapter.scale for adapter in found.values()} == {1.5}


def test_an_adapter_of_the_embedding_cannot_be_merged():
    config = LoRAConfig(targets=("embedding",))
    with pytest.raises(MiniloraError, match="embedding"):
        merge(base(), lora_init(base(), config, seed=0), config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 10**400, "alpha": 1.0}, "rank 10+ is too large; the limit is 2.31"),
        ({"rank_pattern": {"q": 2**31}}, "rank 2147483648 is too large"),
        ({"alpha": 5e-324}, "alpha 5e-324 is too small: the scale alpha / rank would be 0"),
        ({"alpha_pattern": {"q": 1e-40}}, "alpha 1e-40 is too small"),
    ],
)
def test_numbers_that_no_arithmetic_can_use_are_refused(options, message):
    with pytest.raises(MiniloraError, match=message):
        LoRAConfig(**options)


def test_a_rank_may_be_a_numpy_integer():
    assert LoRAConfig(rank=np.int64(4)).rank_of("embedding") == 4
