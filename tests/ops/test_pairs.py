"""What holds for every pair of the register: right gradients, the dtype kept, any memory layout."""

import contextlib
import inspect
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import arrays_in, small_tiles
from hypothesis import given
from hypothesis import strategies as st

from minilora import llama_ops, lora, loss, ops
from minilora.gradcheck import GradientError, assert_close, check_pair
from minilora.loss import VOCAB_CHUNK
from minilora.ops import QUERY_TILE
from minilora.pairs import PAIRS, Sizes, page_of
from minilora.tiles import TILE

every_pair = pytest.mark.parametrize("name", PAIRS)

sides = st.integers(1, 3)
sizes = st.builds(
    Sizes,
    lead=st.lists(sides, min_size=1, max_size=3).map(tuple),
    C=st.integers(1, 4),
    O=sides,
    R=sides,
    V=st.integers(1, 5),
    H=sides,
)


def call(name, arguments, constants, seed=1):
    """y, dy, the cache and the gradients of one call of a pair."""
    pair = PAIRS[name]
    y, cache = pair.forward(*arguments, **constants)
    cache = pair.thin(cache)
    dy = np.random.default_rng(seed).standard_normal(np.shape(y)).astype(y.dtype)
    return y, dy, cache, pair.backward(dy, cache)


def check(name, seed, sizes=None, entries=6):
    pair = PAIRS[name]
    arguments, constants = pair.make(np.random.default_rng(seed), sizes)
    checks = check_pair(
        pair.forward, pair.backward, arguments, constants,
        seed=seed, entries=entries, frozen=pair.frozen, thin=pair.thin,
    )  # fmt: skip
    try:
        assert_close(checks)
    except GradientError as error:
        raise GradientError(f"{name}, derived in {page_of(name)}: {error}") from None


@every_pair
@pytest.mark.parametrize("tiles", [small_tiles, contextlib.nullcontext])
@given(sizes=sizes, seed=st.integers(0, 2**32 - 1))
def test_gradients_agree_with_central_differences(name, tiles, sizes, seed):
    with tiles():
        check(name, seed, sizes)


@every_pair
def test_gradients_agree_with_central_differences_at_the_row_s_own_sizes(name):
    check(name, 0, entries=PAIRS[name].entries)


def test_the_register_goes_beyond_one_tile_of_each_kind():
    """The largest of the rows, at the default sizes; what goes beyond is many times as large."""
    for name, tile in [("gelu", TILE), ("attention", QUERY_TILE), ("head and loss", VOCAB_CHUNK)]:
        rows = [pair for row, pair in PAIRS.items() if row.startswith(f"{name}, ")]
        assert any(tile < max(*pair.sizes.lead, pair.sizes.V) for pair in rows), name


@every_pair
def test_every_pair_has_a_page(name):
    assert (Path(__file__).parents[2] / page_of(name)).is_file()


@every_pair
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtype_of_the_arguments_is_kept(name, dtype):
    arguments, constants = PAIRS[name].make(np.random.default_rng(0))
    y64, _, _, gradients64 = call(name, arguments, constants)

    arguments = [x.astype(dtype) for x in arguments]
    constants = {
        key: value.astype(dtype)
        if np.asarray(value).dtype == np.float64 and np.ndim(value)
        else value
        for key, value in constants.items()
    }
    y, _, cache, gradients = call(name, arguments, constants)
    close = {"rtol": 1e-3, "atol": 1e-5} if dtype == np.float32 else {"rtol": 0}
    assert y.dtype == dtype
    kept = {path: x.dtype for path, x in arrays_in(cache).items() if x.dtype.kind == "f"}
    assert set(kept.values()) <= {np.dtype(dtype)}, kept
    np.testing.assert_allclose(y, y64, **close)
    for gradient, gradient64 in zip(gradients, gradients64, strict=True):
        if gradient64 is not None:
            assert gradient.dtype == dtype
            np.testing.assert_allclose(gradient, gradient64, **close)


def every_second(x):
    """The same values as a view that skips memory, back to front."""
    if x.ndim == 0:
        return x
    room = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    view = room[..., ::-2]
    view[...] = x
    return view


def columns_first(x):
    return np.asfortranarray(x)


@every_pair
@pytest.mark.parametrize("layout", [every_second, columns_first])
def test_the_memory_layout_does_not_matter(name, layout):
    pair = PAIRS[name]
    arguments, constants = pair.make(np.random.default_rng(0))
    y, dy, _, gradients = call(name, arguments, constants)

    constants = {
        key: layout(value) if isinstance(value, np.ndarray) else value
        for key, value in constants.items()
    }
    y_again, cache = pair.forward(*map(layout, arguments), **constants)
    np.testing.assert_allclose(y_again, y, rtol=1e-12, atol=1e-14)
    cache = pair.thin(cache)
    for gradient, again in zip(gradients, pair.backward(layout(dy), cache), strict=True):
        if gradient is not None:
            np.testing.assert_allclose(again, gradient, rtol=1e-12, atol=1e-14)


@every_pair
def test_nothing_given_is_written_to(name):
    pair = PAIRS[name]
    arguments, constants = pair.make(np.random.default_rng(0))
    for array in [*arguments, *constants.values()]:
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    y, cache = pair.forward(*arguments, **constants)
    dy = np.asarray(np.random.default_rng(1).standard_normal(np.shape(y)))
    dy.flags.writeable = False
    pair.backward(dy, cache)


def test_the_register_holds_every_pair():
    def backwards(module: types.ModuleType) -> set[str]:
        return {name for name in vars(module) if name.endswith("_backward")}

    registered = {pair.backward.__name__ for pair in PAIRS.values()}
    composed = {"adapted_linear_backward"}  # of pairs; its gradients are trees, see tests/network
    modules = (ops, llama_ops, loss, lora)
    assert registered | composed == set().union(*map(backwards, modules))


@every_pair
def test_positional_arguments_are_differentiable_and_the_others_keyword_only(name):
    pair = PAIRS[name]
    parameters = inspect.signature(pair.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(positional) == len(pair.arguments)
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters if p.name not in positional)
    assert list(inspect.signature(pair.backward).parameters)[-1] == "cache"
    assert pair.forward.__name__.removesuffix("_forward") == pair.backward.__name__.removesuffix(
        "_backward"
    )
