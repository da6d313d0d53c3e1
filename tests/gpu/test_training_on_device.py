"""Training on the device: the host's losses, few copies, and files that either side reads."""

import dataclasses

import numpy as np
import pytest
from helpers import Killed, killed_at

from minilora import tree
from minilora.adapters import LoRAConfig, lora_init
from minilora.backend import namespace, to_device, to_host
from minilora.evaluation import evaluate_tokens
from minilora.formats import load_adapter, load_base
from minilora.optim import adamw, adamw_init
from minilora.training.checkpoint import (
    CHECKPOINT,
    History,
    State,
    load_checkpoint,
    save_checkpoint,
)
from minilora.training.loop import TrainConfig
from minilora.training.runs import adapt, adapt_in_folder

LORA_CONFIG = LoRAConfig(rank=2, targets=("qkv", "q", "o", "up", "down", "embedding"), dropout=0.1)
SAVED = LoRAConfig(rank=2, targets=("qkv", "o", "up", "down"))  # PEFT has no q beside qkv
SETTINGS = TrainConfig(
    steps=20, batch=4, context=16, lr=1e-2, warmup=4, log_every=5, eval_every=10, eval_tokens=128,
    checkpoint_every=20, weight_decay=0.01, threads=1,
)  # fmt: skip


def assert_trees_close(actual, expected, tolerance):
    actual, expected = tree.flatten(actual), tree.flatten(expected)
    assert actual.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_allclose(
            actual[name], leaf, rtol=tolerance, atol=tolerance, err_msg=name, strict=True
        )


# --- the same numbers --------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-4), (np.float64, 1e-9)])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_twenty_steps_have_the_losses_of_the_host(device, model, corpus, method, dtype, tolerance):
    base = tree.map_leaves(lambda x: x.astype(dtype), model.base)
    model = dataclasses.replace(model, base=base)
    settings = dataclasses.replace(SETTINGS, method=method)
    (_, host), (_, on_device) = (
        adapt(model, corpus, LORA_CONFIG, settings, device=place) for place in ("cpu", device)
    )
    for name in ("train", "held_out"):
        expected, actual = (getattr(run.history, name) for run in (host, on_device))
        np.testing.assert_allclose(actual, expected, rtol=tolerance, err_msg=f"{method}, {name}")
    assert len(on_device.history.train) == 20
    assert on_device.history.held_out[-1][1] < on_device.history.held_out[0][1]


def test_training_leaves_the_base_and_gives_arrays_of_the_host(device, model, corpus):
    before = tree.map_leaves(np.copy, model.base)
    adapted, trained = adapt(
        model, corpus, LORA_CONFIG, dataclasses.replace(SETTINGS, steps=2), device=device
    )
    assert_trees_close(model.base, before, 0.0)
    assert adapted.base is model.base
    for leaf in tree.flatten(trained.params).values():
        assert type(leaf) is np.ndarray
        assert leaf.dtype == np.float32


def test_evaluation_is_that_of_the_host(device, model, corpus):
    rng = np.random.default_rng(0)
    lora = tree.map_leaves(
        lambda x: (0.1 * rng.standard_normal(x.shape)).astype(x.dtype),
        lora_init(model.base, LORA_CONFIG, seed=0),
    )
    adapted = model.with_adapter(lora, LORA_CONFIG)
    host, on_device = (
        evaluate_tokens(adapted, corpus.held_out, text_bytes=300, device=place)
        for place in ("cpu", device)
    )
    assert on_device.loss == pytest.approx(host.loss, rel=1e-5)
    assert on_device.tokens == host.tokens == 299


# --- copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 4, 7])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_one_copy_to_the_host_for_each_logging_step(
    device, copied, model, corpus, method, log_every
):
    """And none between: the loss and the norm of every step are read together when they are due."""
    settings = dataclasses.replace(
        SETTINGS, steps=22, method=method, log_every=log_every, eval_every=22, checkpoint_every=22
    )
    copies = {}

    def report(progress):
        copies[progress.step] = copied().to_host

    adapt(model, corpus, LORA_CONFIG, settings, device=device, report=report)
    steps = [step for step in copies if step < settings.steps]
    assert steps == list(range(log_every, settings.steps, log_every))
    made = np.diff([copies[step] for step in steps])
    assert (made == 1).all(), f"copies to the host between reports: {made.tolist()}"


def test_weights_are_checked_in_one_copy(device, copied, model, corpus):
    settings = dataclasses.replace(SETTINGS, log_every=5, checkpoint_every=5, eval_every=20)
    copies = []
    adapt(
        model, corpus, LORA_CONFIG, settings, device=device,
        report=lambda progress: copies.append(copied().to_host),
    )  # fmt: skip
    assert np.diff(copies[:-1]).tolist() == [2, 2]  # and one of the losses


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_step_sends_its_batch_and_its_masks_alone(device, copied, model, corpus, log_every):
    settings = dataclasses.replace(SETTINGS, log_every=log_every, eval_every=20)
    sent = []
    adapt(
        model, corpus, LORA_CONFIG, settings, device=device,
        report=lambda progress: sent.append(copied().to_device),
    )  # fmt: skip
    masks = len(model.base["blocks"]) * (len(LORA_CONFIG.targets) - 1)  # the embedding has none
    assert (np.diff(sent[:-1]) == log_every * (2 + masks)).all(), np.diff(sent).tolist()


def test_an_evaluation_is_read_in_one_copy(device, copied, model, corpus):
    on_device = model.on(device)
    before = copied().to_host
    evaluate_tokens(on_device, np.tile(corpus.held_out, 20), text_bytes=1, device=device)
    assert copied().to_host - before == 1


# --- files -------------------------------------------------------------------------------------


def state_on(place, model):
    """A state after one step, made of the same numbers on any device."""
    rng = np.random.default_rng(0)
    params = lora_init(model.base, LORA_CONFIG, seed=0)
    grads = tree.map_leaves(lambda x: rng.standard_normal(x.shape).astype(x.dtype), params)
    params, grads = to_device(params, place), to_device(grads, place)
    params, moments = adamw(params, grads, adamw_init(params), step=1, lr=0.01)
    return State(1, params, moments, History([(1, 2.0)], [(0, 3.0)]), seconds=1.5)


@pytest.mark.parametrize("to_the_host", [True, False])
def test_a_checkpoint_of_one_device_is_read_on_the_other(device, model, tmp_path, to_the_host):
    written_on, read_on = (device, "cpu") if to_the_host else ("cpu", device)
    state = state_on(written_on, model)
    save_checkpoint(tmp_path, state, {"seed": 0, "steps": 10})
    assert (tmp_path / CHECKPOINT).exists()
    loaded = load_checkpoint(
        tmp_path, {"seed": 0, "steps": 10}, state_on(read_on, model).params, read_on
    )
    actual, expected = ([s.params, s.moments.m, s.moments.v] for s in (loaded, state))
    assert all((namespace(leaf) is np) == to_the_host for leaf in tree.flatten(actual).values())
    assert_trees_close(to_host(actual), to_host(expected), 0.0)
    assert (loaded.step, loaded.history) == (state.step, state.history)


def test_an_adapter_trained_on_the_device_loads_anywhere(device, model, corpus, tmp_path):
    run = adapt_in_folder(model, corpus, SAVED, SETTINGS, tmp_path / "out", device=device)
    assert run.figures["loss_after"] < run.figures["loss_before"]
    lora, config = load_adapter(tmp_path / "out", model.config)
    adapted = model.with_adapter(lora, config)
    tokens = corpus.held_out[None, :32]
    on_device = adapted.on(device).logits(tokens)
    np.testing.assert_allclose(on_device, adapted.logits(tokens), rtol=1e-4, atol=1e-4)
    merged = adapted.on(device).merged()
    np.testing.assert_allclose(merged.logits(tokens), on_device, rtol=1e-4, atol=1e-4)


def test_a_base_trained_on_the_device_loads_anywhere(device, model, corpus, tmp_path):
    settings = dataclasses.replace(SETTINGS, method="full", steps=4)
    adapt_in_folder(model, corpus, SAVED, settings, tmp_path / "out", device=device)
    base, config = load_base(tmp_path / "out")
    assert config == model.config
    assert np.isfinite(base["wte"]).all()


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(device, model, corpus, tmp_path):
    settings = dataclasses.replace(SETTINGS, checkpoint_every=10)

    def run(folder, **options):
        return adapt_in_folder(model, corpus, SAVED, settings, folder, device=device, **options)

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "parts", report=killed_at(15))
    parts = run(tmp_path / "parts", resume=True)
    np.testing.assert_allclose(parts.history.train, whole.history.train, rtol=1e-5)
