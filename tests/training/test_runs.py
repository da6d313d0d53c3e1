"""A run's folder: what is in it at every moment, and that `resume` finds what it needs."""

import contextlib
import dataclasses
import json
import shutil

import numpy as np
import pytest
from helpers import Killed, killed_at

from minilora import tree
from minilora.adapters import LoRAConfig
from minilora.data import Corpus
from minilora.errors import MiniloraError
from minilora.formats import load_adapter, load_base, save_base
from minilora.formats.card import CARD
from minilora.formats.output import LOCK
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.model import Model
from minilora.tokenizer import ByteTokenizer
from minilora.training.checkpoint import CHECKPOINT, checksum
from minilora.training.loop import TrainConfig
from minilora.training.runs import (
    ADAPTER_WEIGHTS,
    BASE_WEIGHTS,
    RECORD,
    WEIGHTS,
    adapt,
    adapt_in_folder,
    pretrain_in_folder,
)

CONFIG = GPTConfig(vocab_size=256, n_positions=8, n_embd=8, n_layer=2, n_head=2)
LORA_CONFIG = LoRAConfig(rank=2, targets=("qkv", "down"), dropout=0.1)
SETTINGS = TrainConfig(
    steps=4, batch=2, context=8, lr=0.05, warmup=1, threads=1, log_every=1, checkpoint_every=1
)
ADAPTER_FILES = [CARD, "adapter_config.json", "adapter_model.safetensors", RECORD]
NAMES = {
    "loss_before", "loss_after", "trainable_parameters", "base_parameters", "adapter_bytes",
    "seconds", "tokens_per_second",
}  # fmt: skip


def corpus(seed=0):
    tokens = np.random.default_rng(seed).integers(0, 256, size=300, dtype=np.int32)
    return Corpus(tokens[:250], tokens[250:], 250, 50, 1, "a text")


@pytest.fixture
def model(tmp_path):
    base = gpt_init(CONFIG, seed=0)
    save_base(tmp_path / "base", base, CONFIG)
    return Model(base, CONFIG, tokenizer=ByteTokenizer(), folder=tmp_path / "base")


def run(model, folder, *, resume=False, report=lambda progress: None, text=0, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    return adapt_in_folder(
        model, corpus(text), LORA_CONFIG, settings, folder, resume=resume, report=report
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def result(folder):
    """The bytes of the files that must not depend on stops; a card without its folder's name."""
    files = {name: (folder / name).read_bytes() for name in names(folder) if name != RECORD}
    if CARD in files:
        for form in ("# {}\n", '"{}"'):
            old, new = (form.format(name).encode() for name in (folder.name, "NAME"))
            files[CARD] = files[CARD].replace(old, new)
    return files


def test_a_run_leaves_the_adapter_and_a_record(tmp_path, model):
    finished = run(model, tmp_path / "out")
    assert names(tmp_path / "out") == ADAPTER_FILES
    assert finished.figures.keys() == NAMES
    assert not finished.was_finished
    lora, lora_config = load_adapter(tmp_path / "out", CONFIG)
    assert tree.count(lora) == finished.figures["trainable_parameters"]
    assert tree.count(model.base) == finished.figures["base_parameters"]
    size = (tmp_path / "out" / ADAPTER_WEIGHTS).stat().st_size
    assert finished.figures["adapter_bytes"] == size
    assert lora_config.rank_of("blocks.0.attn.qkv") == 2
    assert finished.figures["loss_before"] == finished.history.held_out[0][1]
    assert finished.figures["loss_after"] == finished.history.held_out[-1][1]


def test_the_saved_adapter_is_the_one_that_was_trained(tmp_path, model):
    run(model, tmp_path / "out")
    adapted, trained = adapt(model, corpus(), LORA_CONFIG, SETTINGS)
    saved, _ = load_adapter(tmp_path / "out", CONFIG)
    for name, leaf in tree.flatten(saved).items():
        np.testing.assert_array_equal(leaf, tree.flatten(trained.params)[name])
    assert adapted.lora is trained.params
    assert adapted.base is model.base
    assert model.lora is None


def test_a_full_run_leaves_a_base(tmp_path, model):
    (model.folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    run(model, tmp_path / "out", method="full")
    assert names(tmp_path / "out") == [
        "config.json", "model.safetensors", "tokenizer_config.json", RECORD,
    ]  # fmt: skip
    base, config = load_base(tmp_path / "out")
    assert config == CONFIG
    _, trained = adapt(model, corpus(), settings=dataclasses.replace(SETTINGS, method="full"))
    for name, leaf in tree.flatten(base).items():
        np.testing.assert_array_equal(leaf, tree.flatten(trained.params)[name])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pretraining_leaves_a_base_in_the_dtype_asked_for(tmp_path, dtype):
    finished = pretrain_in_folder(CONFIG, corpus(), SETTINGS, tmp_path / "out", dtype=dtype)
    assert names(tmp_path / "out") == ["config.json", "model.safetensors", RECORD]
    base, _ = load_base(tmp_path / "out")
    start = gpt_init(CONFIG, seed=0)
    assert not np.array_equal(base["wte"], start["wte"])
    bits = np.dtype(dtype).itemsize
    size = (tmp_path / "out" / BASE_WEIGHTS).stat().st_size
    assert tree.count(base) * bits < size < tree.count(base) * bits + 10000
    assert finished.figures["trainable_parameters"] == finished.figures["base_parameters"]


@pytest.mark.parametrize("step", range(1, 5))
def test_a_stopped_run_ends_in_the_same_files(tmp_path, model, step):
    run(model, tmp_path / "whole")
    with pytest.raises(Killed):
        run(model, tmp_path / "out", report=killed_at(step))
    finished = run(model, tmp_path / "out", resume=True)
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    assert not finished.was_finished


def states_of_the_folder():
    """The folder after a kill at each moment of writing the result, from a finished run."""

    def keep(*kept):
        def spoil(folder):
            for path in folder.iterdir():
                if path.name not in kept:
                    path.unlink()

        return spoil

    def and_half_of(name, spoil):
        def half(folder):
            data = (folder / name).read_bytes()
            spoil(folder)
            (folder / ".minilora-0123456789abcdef.tmp").write_bytes(data[: len(data) // 2])
            (folder / LOCK).touch()

        return half

    card, config, weights, record = ADAPTER_FILES
    return {
        "the folder alone": keep(),
        "the first checkpoint half written": and_half_of(CHECKPOINT, keep()),
        "the last checkpoint": keep(CHECKPOINT),
        "weights half written": and_half_of(weights, keep(CHECKPOINT)),
        "weights alone": keep(CHECKPOINT, weights),
        "configuration half written": and_half_of(config, keep(CHECKPOINT, weights)),
        "no card": keep(CHECKPOINT, weights, config),
        "no record": keep(CHECKPOINT, weights, config, card),
        "record half written": and_half_of(record, keep(CHECKPOINT, weights, config, card)),
        "checkpoint not yet deleted": keep(CHECKPOINT, *ADAPTER_FILES),
    }


@pytest.mark.parametrize("state", states_of_the_folder())
def test_killed_while_the_result_is_written(tmp_path, model, monkeypatch, state):
    run(model, tmp_path / "whole")
    folder = tmp_path / "out"
    with monkeypatch.context() as patched:  # the last checkpoint, as it is before its deletion
        patched.setattr("minilora.training.runs._remove", lambda folder, *names: None)
        run(model, folder)
    assert CHECKPOINT in names(folder)
    shutil.rmtree(tmp_path / "base")  # nothing is read from it again
    states_of_the_folder()[state](folder)
    run(model, folder, resume=True)
    assert names(folder) == ADAPTER_FILES
    assert result(folder) == result(tmp_path / "whole")


def test_a_run_of_an_adapter_writes_a_card_with_its_settings_and_losses(tmp_path, model):
    figures = run(model, tmp_path / "out").figures
    text = (tmp_path / "out" / CARD).read_text(encoding="utf-8")
    for name, value in (("rank", 2), ("steps", 4), ("loss after", figures["loss_after"])):
        assert f"\n| {name} | {json.dumps(value)} |\n" in text
    run(model, tmp_path / "full", method="full")
    assert not (tmp_path / "full" / CARD).exists()


def test_a_readme_of_the_user_s_stays_when_a_run_is_resumed(tmp_path, model):
    folder = tmp_path / "out"
    with pytest.raises(Killed):
        run(model, folder, report=killed_at(2))
    (folder / CARD).write_text("mine", encoding="utf-8")
    run(model, folder, resume=True)
    assert names(folder) == ADAPTER_FILES
    assert (folder / CARD).read_text(encoding="utf-8") == "mine"


def test_a_finished_run_is_not_run_again(tmp_path, model):
    first = run(model, tmp_path / "out")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in ADAPTER_FILES}
    again = run(model, tmp_path / "out", resume=True, report=killed_at(1))
    assert again.was_finished
    assert again.figures == first.figures
    assert again.history == first.history
    assert {name: (tmp_path / "out" / name).read_bytes() for name in ADAPTER_FILES} == before


@pytest.mark.parametrize(
    ("method", "name"), [("lora", "adapter_config.json"), ("lora", ADAPTER_WEIGHTS),
                         ("full", "config.json"), ("full", BASE_WEIGHTS)],
)  # fmt: skip
def test_a_finished_run_without_its_files_is_not_finished(tmp_path, model, method, name):
    folder = tmp_path / "out"
    run(model, folder, method=method)
    (folder / name).unlink()
    left = names(folder)
    with pytest.raises(MiniloraError, match=f"a finished run but not its {name}; empty the folder"):
        run(model, folder, method=method, resume=True)
    assert names(folder) == left


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("damage", ["cut off", "from elsewhere", "one bit"])
def test_a_finished_result_is_what_was_saved_or_it_is_said(tmp_path, model, method, damage):
    """If a checkpoint is still there, the run resumes from it."""
    folder = tmp_path / "out"
    with pytest.raises(Killed):
        run(model, folder, method=method, report=killed_at(4))
    checkpoint = (folder / CHECKPOINT).read_bytes()
    run(model, folder, method=method, resume=True)
    whole = result(folder)
    weights = folder / WEIGHTS[method]
    run(model, tmp_path / "other", method=method, text=1)
    data = weights.read_bytes()
    weights.write_bytes({
        "cut off": data[:-1],
        "from elsewhere": (tmp_path / "other" / WEIGHTS[method]).read_bytes(),
        "one bit": data[:-1] + bytes([data[-1] ^ 1]),
    }[damage])  # fmt: skip
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        MiniloraError, match=f"{weights} has changed since its run saved it; empty the"
    ):
        run(model, folder, method=method, resume=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (folder / CHECKPOINT).write_bytes(checkpoint)
    assert not run(model, folder, method=method, resume=True).was_finished
    assert result(folder) == whole
    assert run(model, folder, method=method, resume=True).was_finished


def test_a_finished_run_needs_no_checkpoint_that_is_whole(tmp_path, model):
    first = run(model, tmp_path / "out")
    (tmp_path / "out" / CHECKPOINT).write_bytes(b"half")
    again = run(model, tmp_path / "out", resume=True)
    assert again.was_finished and again.figures == first.figures
    assert names(tmp_path / "out") == ADAPTER_FILES


@pytest.mark.parametrize("is_finished", [True, False])
def test_the_dtype_of_the_file_belongs_to_a_full_run(tmp_path, model, is_finished):
    def go(dtype, **options):
        full = dataclasses.replace(SETTINGS, method="full")
        options = {"report": lambda progress: None, **options}
        return adapt_in_folder(
            model, corpus(), None, full, tmp_path / "out", dtype=dtype, **options
        )

    with contextlib.suppress(Killed):
        go("float32", **({} if is_finished else {"report": killed_at(3)}))
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(MiniloraError, match="dtype float32, but this one has float16"):
        go("float16", resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert go(np.float32, resume=True).was_finished == is_finished


def test_a_second_run_into_the_folder_is_refused_at_once(tmp_path, model):
    refused = []

    def report(progress):
        for resume in (False, True):
            with pytest.raises(MiniloraError, match="another run is writing to") as caught:
                run(model, tmp_path / "out", resume=resume, report=killed_at(1))
            refused.append(str(caught.value))

    run(model, tmp_path / "out", report=report)
    assert len(refused) == 2 * SETTINGS.steps
    assert names(tmp_path / "out") == ADAPTER_FILES


def test_a_settings_type_that_json_does_not_know_loses_nothing(tmp_path, model):
    config = dataclasses.replace(LORA_CONFIG, dropout=np.float64(0.1))
    adapt_in_folder(model, corpus(), config, SETTINGS, tmp_path / "out")
    assert load_adapter(tmp_path / "out", CONFIG)[1].dropout == 0.1


@pytest.mark.parametrize("is_new", [True, False])
def test_a_run_that_cannot_begin_leaves_no_empty_folder(tmp_path, model, monkeypatch, is_new):
    folder = tmp_path / "out"
    if not is_new:
        folder.mkdir()

    def out_of_memory(*_, **__):
        raise MemoryError("nothing left")

    monkeypatch.setattr("minilora.training.loop.loss_and_grads", out_of_memory)
    with pytest.raises(MemoryError, match="nothing left"):
        run(model, folder)
    assert folder.exists() != is_new  # what was there before stays


def test_a_run_that_fails_later_keeps_its_checkpoint(tmp_path, model):
    with pytest.raises(Killed):
        run(model, tmp_path / "out", report=killed_at(2))
    assert names(tmp_path / "out") == [CHECKPOINT]


@pytest.mark.parametrize("finished", [False, True])
def test_another_device_is_another_run(tmp_path, model, monkeypatch, finished):
    """Another device rounds differently. Here the arrays stay on the host, whatever its name."""
    for module in ("network", "training.loop", "training.checkpoint", "evaluation"):
        monkeypatch.setattr(f"minilora.{module}.to_device", lambda arrays, device: arrays)

    def on(device, resume=False, report=lambda progress: None):
        adapt_in_folder(model, corpus(), LORA_CONFIG, SETTINGS, tmp_path / "out", device=device,
                        resume=resume, report=report)  # fmt: skip

    with contextlib.nullcontext() if finished else pytest.raises(Killed):
        on("cuda", report=killed_at(5 if finished else 3))
    with pytest.raises(MiniloraError, match="with device cuda, but this one has cpu"):
        on("cpu", resume=True)
    on("cuda", resume=True)


def test_the_base_is_read_through_once_for_its_checksum(tmp_path, model, monkeypatch):
    calls = []

    def counting(arrays):
        calls.append(arrays)
        return checksum(arrays)

    monkeypatch.setattr("minilora.training.loop.checksum", counting)
    run(model, tmp_path / "out")
    assert len(calls) == 3  # the base, the adapter and the text
    adapt(model, corpus(), LORA_CONFIG, SETTINGS)
    assert len(calls) == 3  # no folder, nothing to resume


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("changes", "name"), [({"lr": 0.01}, "lr"), ({"text": 1}, "text"), ({"steps": 5}, "steps")]
)
def test_resuming_as_another_run_is_refused(tmp_path, model, finished, changes, name):
    folder = tmp_path / "out"
    if finished:
        run(model, folder)
    else:
        with pytest.raises(Killed):
            run(model, folder, report=killed_at(3))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(MiniloraError, match=f"with [a-z ]*{name} .* but this one has"):
        run(model, folder, resume=True, **changes)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_with_a_run_needs_resume(tmp_path, model):
    run(model, tmp_path / "out")
    with pytest.raises(
        MiniloraError, match="out holds another training run; expected a new or an empty"
    ):
        run(model, tmp_path / "out")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "adapter_model.safetensors", ".hidden", "folder"])
def test_a_folder_with_anything_else_is_refused(tmp_path, model, resume, name):
    (tmp_path / "out").mkdir()
    if name == "folder":
        (tmp_path / "out" / name).mkdir()
    else:
        (tmp_path / "out" / name).write_text("mine", encoding="utf-8")
    with pytest.raises(MiniloraError, match=f"out already holds {name}"):
        run(model, tmp_path / "out", resume=resume)
    assert names(tmp_path / "out") == [name]


def test_a_file_is_no_folder(tmp_path, model):
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    with pytest.raises(MiniloraError, match="out is a file"):
        run(model, tmp_path / "out")
    with pytest.raises(MiniloraError, match="cannot make the folder"):
        run(model, tmp_path / "out" / "below")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("record", ["{}", '{"settings": 1}', "[]", "{", ""])
def test_a_record_that_is_none_is_named(tmp_path, model, record):
    folder = tmp_path / "out"
    run(model, folder)
    (folder / RECORD).write_text(record, encoding="utf-8")
    with pytest.raises(MiniloraError, match=RECORD):
        run(model, folder, resume=True)


def test_the_record_is_one_json_object_with_the_figures(tmp_path, model):
    finished = run(model, tmp_path / "out")
    record = json.loads((tmp_path / "out" / RECORD).read_text(encoding="utf-8"))
    assert record["figures"] == finished.figures
    assert record["settings"]["targets"] == ["qkv", "down"]
    assert [step for step, _ in record["history"]["train"]] == [1, 2, 3, 4]
