"""An adapter that is trained further: what stays, what starts afresh, what is refused."""

import dataclasses

import numpy as np
import pytest
from helpers import Killed, assert_trees_equal, killed_at, moved

from minilora.adapters import LoRAConfig, lora_init
from minilora.data import Corpus
from minilora.errors import MiniloraError
from minilora.formats import load_adapter, save_adapter, save_base
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.model import Model, load_model
from minilora.tokenizer import ByteTokenizer
from minilora.training.loop import TrainConfig, train
from minilora.training.runs import adapt, adapt_in_folder
from minilora.tree import flatten, map_leaves

CONFIG = GPTConfig(vocab_size=256, n_positions=8, n_embd=8, n_layer=2, n_head=2)
LORA_CONFIG = LoRAConfig(rank=3, alpha=5.0, targets=("q", "v", "down"), rslora=True, dropout=0.2)
SETTINGS = TrainConfig(
    steps=4, batch=2, context=8, lr=0.05, warmup=1, threads=1, log_every=1, checkpoint_every=1
)


def corpus():
    tokens = np.random.default_rng(0).integers(0, 256, size=300, dtype=np.int32)
    return Corpus(tokens[:250], tokens[250:], 250, 50, 1, "a text")


@pytest.fixture
def model(tmp_path):
    """A base with an adapter that does something."""
    base = gpt_init(CONFIG, seed=0)
    save_base(tmp_path / "base", base, CONFIG)
    lora = map_leaves(np.float32, moved(lora_init(base, LORA_CONFIG, seed=3), 3))
    return Model(
        base, CONFIG, lora, LORA_CONFIG, tokenizer=ByteTokenizer(), folder=tmp_path / "base"
    )


def test_it_starts_where_the_adapter_is(model):
    """Training it further is `train` from its tree: the first losses are those of the adapter."""
    further, trained = adapt(model, corpus(), settings=SETTINGS)
    expected = train(model, corpus(), settings=SETTINGS)
    assert_trees_equal(further.lora, expected.params)
    assert trained.history == expected.history
    assert further.lora_config == LORA_CONFIG
    fresh, from_base = adapt(
        dataclasses.replace(model, lora=None, lora_config=None), corpus(), LORA_CONFIG, SETTINGS
    )
    assert from_base.history.held_out[0][1] != trained.history.held_out[0][1]


def test_the_given_model_stays_as_it_is(model):
    before = map_leaves(np.copy, [model.base, model.lora])
    further, _ = adapt(model, corpus(), settings=SETTINGS)
    assert_trees_equal([model.base, model.lora], before)
    assert further.base is model.base
    moved_leaves = flatten(further.lora)
    assert all((leaf != moved_leaves[path]).any() for path, leaf in flatten(model.lora).items())


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 2}, {"alpha": 4.0}, {"targets": ("qkv",)}, {"rslora": False},
        {"rank_pattern": {"down": 1}}, {"alpha_pattern": {"down": 1.0}},
    ],
    ids=str,
)  # fmt: skip
def test_another_rank_scale_or_target_is_refused_by_name(model, changes):
    asked = dataclasses.replace(LORA_CONFIG, **changes)
    ((name, value),) = changes.items()
    with pytest.raises(
        MiniloraError, match=f"^{name} .* was asked for, but the adapter has {name}"
    ):
        adapt(model, corpus(), asked, SETTINGS)
    assert getattr(asked, name) == value


def test_the_same_configuration_and_another_dropout_may_be_given(model):
    same, _ = adapt(model, corpus(), LORA_CONFIG, SETTINGS)
    assert_trees_equal(same.lora, adapt(model, corpus(), settings=SETTINGS)[0].lora)
    other = dataclasses.replace(LORA_CONFIG, dropout=0.0)
    without, _ = adapt(model, corpus(), other, SETTINGS)
    assert without.lora_config == other
    assert flatten(without.lora).keys() == flatten(same.lora).keys()
    with pytest.raises(AssertionError, match="differs"):
        assert_trees_equal(without.lora, same.lora)


def test_full_training_of_a_model_with_an_adapter_is_refused(model, tmp_path):
    full = dataclasses.replace(SETTINGS, method="full")
    with pytest.raises(MiniloraError, match="'full' trains a base without an adapter; merge"):
        adapt(model, corpus(), settings=full)
    with pytest.raises(MiniloraError, match="'full' trains a base without an adapter; merge"):
        adapt_in_folder(model, corpus(), None, full, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merged, _ = adapt(model.merged(), corpus(), settings=full)
    assert merged.lora is None


@pytest.fixture
def loaded(model, tmp_path):
    """The model as the command line has it: q and v are one adapter on qkv, as in PEFT's file."""
    save_adapter(tmp_path / "first", model.lora, LORA_CONFIG, CONFIG)
    return load_model(tmp_path / "base", tmp_path / "first")


@pytest.mark.parametrize("step", [1, 3])
def test_a_stopped_run_ends_in_the_same_files(tmp_path, loaded, step):
    whole, out = tmp_path / "whole", tmp_path / "out"
    adapt_in_folder(loaded, corpus(), None, SETTINGS, whole)
    with pytest.raises(Killed):
        adapt_in_folder(loaded, corpus(), None, SETTINGS, out, report=killed_at(step))
    adapt_in_folder(loaded, corpus(), None, SETTINGS, out, resume=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    lora, lora_config = load_adapter(out, CONFIG)
    assert lora_config == loaded.lora_config
    assert_trees_equal(lora, adapt(loaded, corpus(), settings=SETTINGS)[0].lora)


@pytest.mark.parametrize("is_finished", [True, False])
def test_resume_is_bound_to_the_adapter_that_it_started_from(tmp_path, loaded, is_finished):
    if is_finished:
        adapt_in_folder(loaded, corpus(), None, SETTINGS, tmp_path / "out")
    else:
        with pytest.raises(Killed):
            adapt_in_folder(loaded, corpus(), None, SETTINGS, tmp_path / "out", report=killed_at(3))
    other = loaded.with_adapter(map_leaves(np.copy, loaded.lora), loaded.lora_config)
    other.lora["blocks"][1]["mlp"]["down"]["B"][0, 0] += 1e-3
    with pytest.raises(MiniloraError, match="checksum of the adapter"):
        adapt_in_folder(other, corpus(), None, SETTINGS, tmp_path / "out", resume=True)
    run = adapt_in_folder(loaded, corpus(), None, SETTINGS, tmp_path / "out", resume=True)
    assert run.was_finished == is_finished
