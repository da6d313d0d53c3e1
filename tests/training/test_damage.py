"""A run's folder with a damaged file: one clear sentence, or the same result to the last bit."""

import dataclasses
import random
import shutil

import numpy as np
import pytest
from damage import JSON_CHANGES, WRONG, exchanged
from helpers import Killed, bytes_of, killed_at

from minilora.adapters import LoRAConfig
from minilora.data import Corpus
from minilora.errors import MiniloraError
from minilora.formats import save_base
from minilora.formats.card import CARD
from minilora.formats.tensors import read_tensors, write_tensors
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.model import Model
from minilora.tokenizer import ByteTokenizer
from minilora.training import runs
from minilora.training.checkpoint import CHECKPOINT
from minilora.training.loop import TrainConfig
from minilora.training.runs import RECORD, adapt_in_folder

CONFIG = GPTConfig(vocab_size=256, n_positions=8, n_embd=4, n_layer=1, n_head=2)
LORA_CONFIG = LoRAConfig(rank=1, targets=("qkv", "down"), dropout=0.1)
SETTINGS = TrainConfig(
    steps=3, batch=1, context=8, lr=0.05, warmup=1, threads=1, log_every=1, eval_tokens=20,
    checkpoint_every=1,
)  # fmt: skip
SOME, ALL = range(300), range(300, 2000)


def run(model, folder, method, **options):
    tokens = np.random.default_rng(0).integers(0, 256, size=300, dtype=np.int32)
    corpus = Corpus(tokens[:250], tokens[250:], 250, 50, 1, "a text")
    settings = dataclasses.replace(SETTINGS, method=method)
    return adapt_in_folder(model, corpus, LORA_CONFIG, settings, folder, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = gpt_init(CONFIG, seed=0)
    folder = tmp_path_factory.mktemp("damage") / "base"
    save_base(folder, base, CONFIG)
    return Model(base, CONFIG, tokenizer=ByteTokenizer(), folder=folder)


@pytest.fixture(scope="module")
def folders(model):
    """A run's folder by (method, what it holds): a checkpoint, a result, or both."""
    found = {}
    for method in ("lora", "full"):
        root = model.folder.parent / method
        with pytest.raises(Killed):
            run(model, root / "checkpoint", method, report=killed_at(2))
        run(model, root / "result", method)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "_remove", lambda folder, *names: None)
            run(model, root / "both", method)
        for kind in ("checkpoint", "result", "both"):
            found[method, kind] = root / kind
    assert CHECKPOINT in {path.name for path in found["lora", "both"].iterdir()}
    return found


# --- what is done to a file ----------------------------------------------------------------------


def metadata_of_wrong_kinds(rng, path):
    tensors, metadata = read_tensors(path)
    name = rng.choice(sorted(metadata))
    if name in ("settings", "history") and rng.random() < 0.7:
        changed = rng.choice(JSON_CHANGES)(rng, metadata[name].encode())
        metadata[name] = changed.decode("utf-8", "replace")
    else:
        metadata[name] = rng.choice([*map(repr, WRONG), "[" * 50_000, "9" * 5000, '{"a":' * 9000])
    write_tensors(path, tensors, metadata)


def metadata_missing(rng, path):
    tensors, metadata = read_tensors(path)
    del metadata[rng.choice(sorted(metadata))]
    write_tensors(path, tensors, metadata)


def numbers_changed(rng, path):
    tensors, metadata = read_tensors(path)
    tensor = tensors[rng.choice(sorted(tensors))]
    tensor.reshape(-1)[rng.randrange(tensor.size)] += rng.choice([1e-6, 1.0, float("nan")])
    write_tensors(path, tensors, metadata)


def deleted(rng, path):
    path.unlink()


def damage(rng, path, corrupted):
    """Do one thing to a file; its name."""
    if path.suffix == ".json":
        changes = [*JSON_CHANGES, deleted]
    else:
        changes = [*corrupted.TENSOR_CHANGES, numbers_changed, deleted]
        changes += [metadata_of_wrong_kinds, metadata_missing] * 3
    change = rng.choice(changes)
    if change.__module__ == __name__:
        change(rng, path)
    else:
        path.write_bytes(change(rng, path.read_bytes()))
    return change.__name__


@pytest.mark.parametrize(
    "cases", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_a_damaged_run_is_resumed_to_the_same_bytes_or_refused(
    tmp_path, model, folders, import_file, cases
):
    corrupted = import_file("tests/formats/test_corrupted.py")
    whole = {m: bytes_of(folders[m, "result"]) for m in ("lora", "full")}
    ends = {"refused": 0, "resumed": 0, "finished": 0}
    for case in cases:
        rng = random.Random(f"damage {case}")
        method, kind = rng.choice(sorted(folders))
        folder = tmp_path / str(case)
        shutil.copytree(folders[method, kind], folder)
        path = rng.choice(sorted(path for path in folder.iterdir() if path.name != CARD))
        is_swap = kind == "result" and rng.random() < 0.1
        done = exchanged(rng, folder) if is_swap else damage(rng, path, corrupted)
        what = f"case {case}: {done} {path.name}, {method} with {kind}"
        before = bytes_of(folder)
        try:
            end = run(model, folder, method, resume=True)
        except MiniloraError as error:
            ends["refused"] += 1
            assert str(folder) in str(error) and "\n" not in str(error), what
            assert bytes_of(folder) == before, what
            assert kind != "both", what
        except BaseException as error:
            raise AssertionError(what) from error
        else:
            ends["finished" if end.was_finished else "resumed"] += 1
            for name, data in whole[method].items():
                same = name in (RECORD, CARD) or (folder / name).read_bytes() == data
                assert same, f"{what}: {name}"
            assert all(np.isfinite(figure) for figure in end.figures.values()), what
            assert end.history.train[-1][0] == SETTINGS.steps, what
            assert {p.name for p in folder.iterdir()} == whole[method].keys(), what
        shutil.rmtree(folder)
    assert min(ends.values()) > len(cases) / 20, ends
    assert ends["refused"] > len(cases) / 3, ends
