"""Trees: flatten, unflatten, map_leaves, count and nbytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.tree import count, flatten, map_leaves, nbytes, unflatten

keys = st.sampled_from(["w", "b", "attn", "qkv", "ln_1"])
leaves = st.integers(0, 99)
trees = st.recursive(
    leaves,
    lambda branch: (
        st.dictionaries(keys, branch, min_size=1, max_size=3)
        | st.lists(branch, min_size=1, max_size=3)
    ),
    max_leaves=12,
)


def model():
    return {
        "wte": np.zeros((5, 2), np.float32),
        "blocks": [{"ln": {"w": np.ones(2), "b": np.zeros(2)}}, {"ln": {"w": np.ones(3)}}],
    }


@given(trees)
def test_unflatten_is_the_inverse_of_flatten(tree):
    assert unflatten(flatten(tree)) == tree


@given(trees)
def test_map_leaves_maps_the_flat_leaves_and_keeps_the_structure(tree):
    doubled = map_leaves(lambda x: 2 * x, tree)
    assert flatten(doubled) == {path: 2 * leaf for path, leaf in flatten(tree).items()}
    assert map_leaves(lambda x, y, z: x + y - z, doubled, tree, doubled) == tree


def test_paths_are_joined_by_dots_in_the_order_of_the_tree():
    paths = ["wte", "blocks.0.ln.w", "blocks.0.ln.b", "blocks.1.ln.w"]
    assert list(flatten(model())) == paths
    assert flatten(model())["blocks.1.ln.w"].shape == (3,)


def test_a_missing_index_becomes_an_empty_dict():
    assert unflatten({"blocks.2.A": 1}) == {"blocks": [{}, {}, {"A": 1}]}


def test_indices_are_ordered_as_numbers():
    flat = {f"blocks.{i}.w": i for i in reversed(range(11))}
    assert [block["w"] for block in unflatten(flat)["blocks"]] == list(range(11))


def test_a_leaf_alone_and_nothing():
    assert flatten(7) == {"": 7}
    assert unflatten({"": 7}) == 7
    assert flatten({}) == unflatten({}) == {}


def test_map_leaves_of_trees_that_differ_raises():
    with pytest.raises(KeyError):
        map_leaves(lambda x, y: x, {"a": 1, "b": 2}, {"a": 1})


def test_count_and_bytes():
    assert count(model()) == 10 + 4 + 3
    assert nbytes(model()) == 10 * 4 + 7 * 8
    assert count({}) == nbytes({}) == 0
