"""Settings of every kind take NumPy's scalars for the numbers that they are."""

import dataclasses
import json

import numpy as np
import pytest

from minilora.adapters import LoRAConfig
from minilora.bench.budget import Step
from minilora.bench.case import Case
from minilora.gpt2 import GPTConfig
from minilora.llama import LlamaConfig
from minilora.training.loop import TrainConfig

SMALL = GPTConfig(256, 128, 8, 1, 2, n_inner=16)
GIVEN = [
    SMALL,
    LlamaConfig(rms_norm_eps=1e-5, head_dim=64),
    LoRAConfig(rank=2, alpha=2.5, rank_pattern={"o": 3}, alpha_pattern={"o": 1.5}),
    TrainConfig(),
    Case(SMALL),
    Step(SMALL, None, threads=2),
]
SCALARS = {bool: np.bool_, int: np.int64, float: np.array}  # the last has no axes


def in_numpy(value):
    """The value with each number in it as a NumPy scalar."""
    if isinstance(value, dict):
        return {key: in_numpy(entry) for key, entry in value.items()}
    return SCALARS.get(type(value), lambda other: other)(value)


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: type(given).__name__)
def test_a_numpy_scalar_becomes_the_number_that_it_is(given):
    fields = {f.name: in_numpy(getattr(given, f.name)) for f in dataclasses.fields(given)}
    assert any(isinstance(value, np.generic) for value in fields.values())
    made = type(given)(**fields)
    assert made == given
    kept = {name: type(value) for name, value in vars(made).items()}
    assert kept == {name: type(value) for name, value in vars(given).items()}
    json.dumps(dataclasses.asdict(made))


def test_a_size_of_the_model_by_another_name_is_named():
    with pytest.raises(TypeError, match="no argument 'n_layers'; did you mean n_layer"):
        GPTConfig(n_layers=2)
