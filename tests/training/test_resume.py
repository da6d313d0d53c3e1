"""A run that was stopped, at whatever step and in whatever way, ends as if it had not been."""

import dataclasses
import json
import signal
import threading

import numpy as np
import pytest
from helpers import Killed, killed_at

from minilora import tree
from minilora.adapters import LoRAConfig, lora_init
from minilora.data import Corpus
from minilora.errors import MiniloraError
from minilora.formats.output import held
from minilora.formats.tensors import read_tensors, write_tensors
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.network import Net
from minilora.training.checkpoint import CHECKPOINT, _checksum
from minilora.training.loop import Interrupted, TrainConfig, ctrl_c_sets_flag, train

CONFIG = GPTConfig(vocab_size=32, n_positions=8, n_embd=8, n_layer=3, n_head=2)
BASE = gpt_init(CONFIG, seed=0)
STEPS = 6
SETTINGS = TrainConfig(
    steps=STEPS, batch=3, context=8, lr=0.05, warmup=2, weight_decay=0.1, threads=2,
    log_every=1, eval_every=2, checkpoint_every=2,
)  # fmt: skip
LORA_CONFIGS = {
    "dropout": LoRAConfig(rank=2, targets=("qkv", "o", "up", "down"), dropout=0.3),
    "first block only": LoRAConfig(rank=2, targets=(r"0\.attn\.qkv",), dropout=0.2),
    "last block only": LoRAConfig(rank=1, targets=(r"2\.mlp\.up",)),
    "embedding only": LoRAConfig(rank=2, targets=("embedding",)),
    "patterns": LoRAConfig(
        rank=2, targets=("q", "v", "down"), rslora=True, dropout=0.1,
        rank_pattern={r"1\.attn\.q": 3}, alpha_pattern={"down": 5.0},
    ),
}  # fmt: skip


def corpus(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 32, size=500, dtype=np.int32)
    return Corpus(tokens[:450], tokens[450:], 450, 50, 1, "a text")


def run(kind="dropout", folder=None, base=BASE, text=0, report=None, resume=True, **changes):
    net, method = Net(base, CONFIG), "full"
    if kind != "full":
        lora_config, method = LORA_CONFIGS[kind], "lora"
        net = Net(base, CONFIG, lora_init(base, lora_config, seed=0), lora_config)
    return train(
        net,
        corpus(text),
        settings=dataclasses.replace(SETTINGS, method=method, **changes),
        folder=folder,
        resume=resume,
        report=report or (lambda progress: None),
    )


def assert_same_result(actual, expected):
    flat, flat_expected = tree.flatten(actual.params), tree.flatten(expected.params)
    assert flat.keys() == flat_expected.keys()
    for name, leaf in flat_expected.items():
        np.testing.assert_array_equal(flat[name], leaf, err_msg=name)
    assert actual.history == expected.history
    # Blocks without an adapter have no leaves, but they have their places.
    assert len(actual.params.get("blocks", [])) == len(expected.params.get("blocks", []))


def ctrl_c_at(step):
    def report(progress):
        if progress.step == step:
            signal.raise_signal(signal.SIGINT)

    return report


@pytest.mark.parametrize("kind", [*LORA_CONFIGS, "full"])
def test_killed_at_every_step_in_turn(tmp_path, kind):
    expected = run(kind)
    for step in range(1, STEPS + 1):
        folder = tmp_path / str(step)
        with pytest.raises(Killed):
            run(kind, folder, report=killed_at(step))
        assert_same_result(run(kind, folder), expected)


def test_killed_again_and_again(tmp_path):
    expected = run()
    for step in (1, 2, 3, 3, 4, 5, 6):
        with pytest.raises(Killed):
            run(folder=tmp_path, report=killed_at(step))
    assert_same_result(run(folder=tmp_path), expected)


def test_a_resumed_run_does_only_the_rest(tmp_path):
    with pytest.raises(Killed):
        run(folder=tmp_path, report=killed_at(5))
    reports = []
    run(folder=tmp_path, report=reports.append)
    assert [report.step for report in reports] == [5, 6]  # the checkpoint is of step 4
    reports.clear()
    run(folder=tmp_path, report=reports.append)
    assert reports == []


def test_seconds_add_up_over_the_parts(tmp_path):
    with pytest.raises(Killed):
        run(folder=tmp_path, report=killed_at(5))
    metadata = read_tensors(tmp_path / CHECKPOINT)[1]
    assert run(folder=tmp_path).seconds > float(metadata["seconds"]) > 0


@pytest.mark.parametrize("step", range(1, STEPS))
def test_ctrl_c_saves_at_the_end_of_the_step(tmp_path, step):
    with pytest.raises(Interrupted, match=f"at step {step + 1}; its state is saved"):
        run(folder=tmp_path, report=ctrl_c_at(step), steps=STEPS + 1)
    assert read_tensors(tmp_path / CHECKPOINT)[1]["step"] == str(step + 1)
    assert_same_result(run(folder=tmp_path, steps=STEPS + 1), run(steps=STEPS + 1))


@pytest.mark.parametrize("step", [STEPS - 1, STEPS])
def test_ctrl_c_in_the_last_step_changes_nothing(tmp_path, step):
    assert_same_result(run(folder=tmp_path, report=ctrl_c_at(step)), run())


def test_ctrl_c_without_a_folder_does_not_speak_of_one():
    with pytest.raises(Interrupted) as caught:
        run(report=ctrl_c_at(1))
    assert str(caught.value) == " at step 2"


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt) as caught, ctrl_c_sets_flag() as pressed:
        assert not pressed.is_set()
        signal.raise_signal(signal.SIGINT)
        assert pressed.is_set()
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(caught.value, Interrupted)


def test_the_handler_of_ctrl_c_is_put_back():
    def handler(*_):
        pass

    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(Interrupted):
            run(report=ctrl_c_at(1))
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_python_did_not_set_is_left_alone(monkeypatch):
    """Python shows a handler that was set from C as None, and cannot restore it."""
    set_handler = signal.signal
    calls = []

    def signal_of(number, handler):
        calls.append(handler)
        return set_handler(number, handler)

    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", signal_of)
    assert_same_result(run(), run())
    assert calls == []


def test_training_works_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    assert_same_result(results[0], run())


def test_killed_while_a_checkpoint_is_written(tmp_path):
    with pytest.raises(Killed):
        run(folder=tmp_path, report=killed_at(3))
    (tmp_path / ".minilora-0123456789abcdef.tmp").write_bytes(b"half a checkpoint")
    with held(tmp_path):
        assert_same_result(run(folder=tmp_path), run())
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_without_resume_a_run_starts_afresh(tmp_path):
    with pytest.raises(Killed):
        run(folder=tmp_path, report=killed_at(5))
    reports = []
    run(folder=tmp_path, report=reports.append, resume=False)
    assert len(reports) == STEPS


# --- checkpoints that do not belong --------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"lr": 0.04}, "lr 0.05, but this one has 0.04"),
        ({"seed": 1}, "seed"),
        ({"steps": 7}, "steps"),
        ({"threads": 1}, "threads"),
        ({"kind": "patterns"}, "alpha_pattern"),
        ({"kind": "full"}, "alpha"),
        ({"text": 1}, "checksum of the text"),
        ({"base": gpt_init(CONFIG, seed=1)}, "checksum of the base"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_another_run_is_refused_by_what_differs(tmp_path, changes, name):
    with pytest.raises(Killed):
        run(folder=tmp_path, report=killed_at(3))
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(MiniloraError, match=name):
        run(folder=tmp_path, **changes)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_machine_with_other_cores_is_another_run(tmp_path, monkeypatch):
    monkeypatch.setattr("minilora.training.ranks.cores", lambda: 2)
    with pytest.raises(Killed):
        run(folder=tmp_path, report=killed_at(3), threads=0)
    monkeypatch.setattr("minilora.training.ranks.cores", lambda: 3)
    with pytest.raises(MiniloraError, match="threads 2, but this one has 3"):
        run(folder=tmp_path, threads=0)
    assert_same_result(run(folder=tmp_path, threads=2), run(threads=2))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not safetensors at all"),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: write_tensors(path, {"x": np.zeros(3)}),
        lambda path: write_tensors(path, {"x": np.zeros(3)}, {"settings": "{", "step": "1"}),
    ],
    ids=["empty", "foreign", "truncated", "no metadata", "bad metadata"],
)
def test_a_damaged_checkpoint_is_named_and_kept(tmp_path, spoil):
    with pytest.raises(Killed):
        run(folder=tmp_path, report=killed_at(3))
    path = tmp_path / CHECKPOINT
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(MiniloraError, match="checkpoint.safetensors"):
        run(folder=tmp_path)
    assert path.read_bytes() == before


def with_json(name, change):
    """A change of the JSON text that a checkpoint's metadata holds under a name."""

    def spoil(tensors, metadata):
        document = json.loads(metadata[name])
        change(document)
        metadata[name] = json.dumps(document)

    return spoil


def with_text(name, text):
    return lambda tensors, metadata: metadata.update({name: text})


def with_array(name, change):
    def spoil(tensors, metadata):
        tensors[name] = change(tensors[name])

    return spoil


def renamed(tensors, metadata):
    tensors["params.blocks.0.attn.qkv.a"] = tensors.pop("params.blocks.0.attn.qkv.A")


WRONG = {
    "renamed": (renamed, r"qkv.A \(8, 2\); left over: params.blocks.0.attn.qkv.a"),
    "missing": (lambda tensors, _: tensors.pop("m.blocks.1.mlp.up.B"), r"missing: m.*up.B"),
    "left over": (lambda tensors, _: tensors.update(x=np.ones(3)), "left over: x"),
    "reshaped": (
        with_array("v.blocks.0.attn.o.A", lambda x: x.T.copy()),
        r"v.*o.A is \(2, 8\), expected \(8, 2\)",
    ),
    "other dtype": (
        with_array("params.blocks.0.attn.o.A", lambda x: x.astype(np.float64)),
        "params.*o.A is of dtype float64, but this run.s is float32",
    ),
    "settings []": (with_text("settings", "[]"), "is not a checkpoint"),
    "settings a list": (with_text("settings", '["steps"]'), "is not a checkpoint"),
    "settings without steps": (with_json("settings", lambda d: d.pop("steps")), "not a checkpoint"),
    "deep settings": (with_text("settings", "[" * 100_000), "is not a checkpoint"),
    "history null": (with_text("history", "null"), "is not a checkpoint"),
    "history of nan": (
        with_json("history", lambda d: d["train"].append([3, float("nan")])), "not a checkpoint"
    ),
    "history of texts": (with_json("history", lambda d: d["train"].append(["3", 1.0])), "not a ch"),
    "history of one curve": (with_json("history", lambda d: d.pop("train")), "not a checkpoint"),
    "no held-out loss": (with_json("history", lambda d: d["held_out"].clear()), "not a checkpoint"),
    "deep history": (with_text("history", '{"train":' * 50_000), "is not a checkpoint"),
    "seconds nan": (with_text("seconds", "nan"), "is not a checkpoint"),
    "seconds below 0": (with_text("seconds", "-1"), "is not a checkpoint"),
    "seconds a word": (with_text("seconds", "soon"), "is not a checkpoint"),
    "step 999": (with_text("step", "999"), "is not a checkpoint"),
    "step 0": (with_text("step", "0"), "is not a checkpoint"),
    "a step of many digits": (with_text("step", "1" * 5000), "is not a checkpoint"),
    "no step": (lambda _, metadata: metadata.pop("step"), "is not a checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("is_noticed_by", ["the checksum", "what is read"])
def test_what_a_checkpoint_cannot_hold_is_refused(tmp_path, case, is_noticed_by):
    spoil, message = WRONG[case]
    with pytest.raises(Killed):
        run(folder=tmp_path, report=killed_at(3))
    path = tmp_path / CHECKPOINT
    tensors, metadata = read_tensors(path)
    spoil(tensors, metadata)
    if is_noticed_by == "what is read":  # as if the program had saved it
        metadata["checksum"] = _checksum(
            tensors, {name: text for name, text in metadata.items() if name != "checksum"}
        )
    else:
        message = "is damaged: its contents do not match its checksum"
    write_tensors(path, tensors, metadata)
    before = path.read_bytes()
    with pytest.raises(MiniloraError, match=message) as caught:
        run(folder=tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_a_checkpoint_of_a_version_without_checksums_is_refused(tmp_path):
    with pytest.raises(Killed):
        run(folder=tmp_path, report=killed_at(3))
    tensors, metadata = read_tensors(tmp_path / CHECKPOINT)
    del metadata["checksum"]
    write_tensors(tmp_path / CHECKPOINT, tensors, metadata)
    with pytest.raises(MiniloraError, match="no checksum: .* an older version; empty the"):
        run(folder=tmp_path)


def test_one_bit_anywhere_is_noticed_or_means_nothing(tmp_path):
    """300 bits of a checkpoint, one at a time: refused, or the same result to the last bit."""
    with pytest.raises(Killed):
        run(folder=tmp_path, report=killed_at(3))
    path = tmp_path / CHECKPOINT
    whole, expected = path.read_bytes(), run()
    rng, refused = np.random.default_rng(0), 0
    for bit in rng.integers(8 * len(whole), size=300):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            result = run(folder=tmp_path)
        except MiniloraError:
            refused += 1
        else:
            assert_same_result(result, expected)
    assert refused > 290


def test_numbers_that_are_not_finite_leave_the_last_good_checkpoint(tmp_path, monkeypatch):
    """At step 5 the rate becomes absurd: the checkpoint of step 4 stays, and the run resumes."""
    from minilora.optim import warmup_cosine

    def absurd(step, **schedule):
        return 1e300 if step == 5 else warmup_cosine(step, **schedule)

    with monkeypatch.context() as patched:
        patched.setattr("minilora.training.loop.warmup_cosine", absurd)
        with pytest.raises(MiniloraError, match="not finite at step [56]: .*checkpoint is kept"):
            run(folder=tmp_path, checkpoint_every=1)
    tensors, metadata = read_tensors(tmp_path / CHECKPOINT)
    assert metadata["step"] == "4"
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert_same_result(run(folder=tmp_path, checkpoint_every=1), run(checkpoint_every=1))


def test_bad_text_leaves_no_folder_behind(tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(MiniloraError, match="exceeds"):
        run(folder=folder, context=9)
    assert not folder.exists()
