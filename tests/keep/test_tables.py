"""Laws of the caches, over the whole register: None in, None out, and all else as it was.

No pair is named here: a new one is held to them by its line in the register.
"""

import inspect
import types
from collections.abc import Mapping
from typing import get_type_hints

import numpy as np
import pytest
from helpers import a_batch, a_net, parts_of, small_tiles

from minilora import gpt2, keep, llama_ops, lora, loss, network, ops
from minilora.adapters import TARGETS
from minilora.backend import Array
from minilora.keep import OF_FACTORS, OF_INPUTS, OF_WEIGHTS, Plan, without
from minilora.pairs import PAIRS

TABLES = {"weights": OF_WEIGHTS, "factors": OF_FACTORS, "inputs": OF_INPUTS}
WHOLE = {name: pair for name, pair in PAIRS.items() if not pair.dropped and pair.entries is None}
each_pair = pytest.mark.parametrize("name", WHOLE)
each_table = pytest.mark.parametrize("table", TABLES)

# None because nothing is dropped out, which is a constant of the forward pass and no making.
CONSTANT_FIELDS = {(ops.DropoutCache, "mask")}


def caches() -> dict[str, type]:
    """The classes of caches, by name."""
    return {
        name: member
        for module in (ops, llama_ops, loss, lora, gpt2)
        for name, member in vars(module).items()
        if name.endswith("Cache")
    }


def called(name):
    """The arguments, the cache and a function from a cache to the gradients."""
    pair = WHOLE[name]
    arguments, constants = pair.make(np.random.default_rng(0))
    y, cache = pair.forward(*arguments, **constants)
    dy = np.asarray(np.random.default_rng(1).standard_normal(np.shape(y)))
    return arguments, cache, lambda cache: pair.backward(dy, cache)


def assert_some_gone(gradients, whole, gone):
    """The gradients in these places are None, the others the same bit for bit."""
    for place, (gradient, expected) in enumerate(zip(gradients, whole, strict=True)):
        if place in gone:
            assert gradient is None, f"gradient {place} of {len(whole)} should be None"
        else:
            assert gradient is not None, f"gradient {place} of {len(whole)} is None"
            assert np.array_equal(gradient, expected), f"gradient {place} of {len(whole)} differs"


# --- None in, None out ---------------------------------------------------------------------------


@each_pair
def test_a_whole_cache_gives_every_gradient_and_holds_no_none(name):
    arguments, cache, backward = called(name)
    assert all(part is not None for part in parts_of(cache).values())
    gradients = backward(cache)
    assert [g.shape for g in gradients] == [x.shape for x in arguments]


@each_pair
@each_table
def test_dropping_the_fields_of_a_table_drops_the_gradients_the_register_names(name, table):
    """Those of the row of the same pair with these fields dropped; none where there is no row."""
    pair, fields = WHOLE[name], TABLES[table]
    rows = [row for row in PAIRS.values() if (row.forward, row.dropped) == (pair.forward, fields)]
    _, cache, backward = called(name)
    thin = without(cache, fields)
    assert rows or not parts_differ(thin, cache), "the register has no row of what is dropped"
    parameters = list(inspect.signature(pair.forward).parameters)
    gone = {parameters.index(argument) for row in rows for argument in row.frozen}
    assert_some_gone(backward(thin), backward(cache), gone)


def parts_differ(one, other):
    """Whether two caches of one structure hold other things, by identity."""
    ones, others = parts_of(one), parts_of(other)
    return ones.keys() != others.keys() or any(
        ones[path] is not others[path] for path in ones if not hasattr(ones[path], "_fields")
    )


@each_pair
def test_every_droppable_field_drops_whole_gradients_and_changes_no_other(name):
    """Each alone and all at once: a gradient is right or None, and never all of them stay."""
    _, cache, backward = called(name)
    whole = backward(cache)
    droppable = {
        (type(part), field)
        for part in parts_of(cache).values()
        for table in TABLES.values()
        for field in table.get(type(part), ())
    }
    every = {kind: tuple(f for k, f in droppable if k is kind) for kind, _ in droppable}
    for fields in [*({kind: (field,)} for kind, field in droppable), every]:
        gradients = backward(without(cache, fields))
        gone = {place for place, gradient in enumerate(gradients) if gradient is None}
        assert bool(gone) == bool(fields), f"{fields} is read by no gradient"
        assert_some_gone(gradients, whole, gone)


def test_every_field_that_may_be_none_is_in_a_table_and_no_other():
    optional = {
        (cache, field)
        for cache in caches().values()
        for field, hint in get_type_hints(cache).items()
        if hint == Array | None
    }
    tables = {
        (cache, field)
        for table in (*TABLES.values(), keep.INPUTS)
        for cache, fields in table.items()
        for field in fields
    }
    assert optional - CONSTANT_FIELDS == tables


def test_an_input_that_is_restored_is_a_making_of_weights_or_factors():
    for cache, fields in keep.INPUTS.items():
        assert set(fields) <= {*OF_WEIGHTS.get(cache, ()), *OF_FACTORS.get(cache, ())}, cache


# --- what dropping does to a cache ---------------------------------------------------------------


@each_pair
@each_table
def test_dropping_fields_copies_no_array_and_changes_no_cache(name, table):
    _, cache, _ = called(name)
    before = parts_of(cache)
    thin = parts_of(without(cache, TABLES[table]))
    after = parts_of(cache)
    assert all(after[path] is part for path, part in before.items())
    for path, part in before.items():
        if isinstance(part, np.ndarray) and thin[path] is not None:
            assert thin[path] is part, path


# --- no flags, no closures -----------------------------------------------------------------------

CONSTANTS = {
    "index", "offset", "eps", "scale", "cubic", "mask", "heads", "targets", "ignore_index",
    "count", "table", "adapters", "sign", "kv_heads", "cos", "sin",
}  # fmt: skip


@pytest.mark.parametrize("module", [ops, llama_ops, loss, lora], ids=lambda module: module.__name__)
def test_a_keyword_is_a_constant_of_the_mathematics(module):
    """None says what is to be kept, computed or left out, nor how large a tile is."""
    functions = [
        member
        for member in vars(module).values()
        if isinstance(member, types.FunctionType) and member.__module__ == module.__name__
    ]
    assert len(functions) >= 8
    for function in functions:
        for name, parameter in inspect.signature(function).parameters.items():
            assert not isinstance(parameter.default, bool), f"{function.__name__}({name}=)"
            if parameter.kind is parameter.KEYWORD_ONLY:
                assert name in CONSTANTS, f"{function.__name__}({name}=)"


@each_pair
def test_a_pair_s_cache_is_named_after_it(name):
    pair = WHOLE[name]
    _, cache, _ = called(name)
    expected = pair.forward.__name__.removesuffix("_forward").replace("_", "") + "cache"
    assert type(cache).__name__.lower() == expected
    assert not any(callable(part) for part in parts_of(cache).values())


@pytest.mark.parametrize("plan", [Plan(), Plan(lora=True), Plan(base=True, lora=True)])
@pytest.mark.parametrize("recompute", [False, True])
def test_no_cache_of_a_model_holds_a_function(plan, recompute):
    net = a_net(*TARGETS, dropout=0.3)
    batch = a_batch(net)
    with small_tiles():
        _, cache = network.trunk_forward(
            net, tokens=batch["tokens"], masks=batch["masks"],
            plan=plan._replace(recompute=recompute),
        )  # fmt: skip
    parts = parts_of(cache)
    assert not [path for path, part in parts.items() if callable(part)]
    known = (np.ndarray, tuple, list, Mapping, float, int, slice, types.NoneType, network.Net)
    assert all(isinstance(part, known) for part in parts.values()), "what does it hold?"
