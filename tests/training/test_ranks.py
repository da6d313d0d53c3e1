"""Training shared among ranks; here they are threads of this process, with or without MPI."""

import copy
import dataclasses
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers import Killed, killed_at
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora import tree
from minilora.adapters import LoRAConfig, lora_init
from minilora.data import Corpus
from minilora.errors import MiniloraError
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.model import Model
from minilora.network import Net
from minilora.tokenizer import ByteTokenizer
from minilora.training.checkpoint import CHECKPOINT
from minilora.training.loop import Interrupted, TrainConfig, train
from minilora.training.ranks import LAUNCHERS, Ranks, as_one, check_alone, find_ranks, launched
from minilora.training.runs import adapt_in_folder

CONFIG = GPTConfig(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
BASE = gpt_init(CONFIG, seed=0, dtype=np.float64)
LORA_CONFIG = LoRAConfig(rank=2, targets=("qkv", "down"), dropout=0.2)
SETTINGS = TrainConfig(
    steps=6, batch=5, context=16, short_context=8, short_steps=2, lr=0.02, warmup=2,
    weight_decay=0.1, clip=0.05, threads=1, log_every=2, eval_every=3, checkpoint_every=2,
)  # fmt: skip


class Meeting:
    """What ranks that are threads share."""

    def __init__(self, size):
        self.values = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)


class ThreadRanks(Ranks):
    def __init__(self, rank, meeting):
        self.rank, self.size, self.meeting = rank, len(meeting.values), meeting

    def gather(self, value):
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        values = copy.deepcopy(self.meeting.values)  # as from another process
        self.meeting.barrier.wait()
        return values

    def sum(self, arrays):
        total, *others = self.gather(arrays)
        for other in others:
            total = tree.map_leaves(np.add, total, other)
        return total


def together(size, f, kind=ThreadRanks):
    """`f(ranks)` of every rank, in order of rank; raises the error of the first that fails."""
    meeting = Meeting(size)

    def of_rank(rank):
        try:
            return f(kind(rank, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        results = [pool.submit(of_rank, rank) for rank in range(size)]
        wait(results)
    errors = [result.exception() for result in results]
    for error in errors:
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [result.result() for result in results]


def corpus(seed=0):
    rng = np.random.default_rng(seed)
    tokens = np.cumsum(rng.integers(1, 3, size=3300), dtype=np.int32) % 32
    return Corpus(tokens[:3000], tokens[3000:], 3000, 300, 1, "a text")


def run(ranks=None, *, method="lora", base=BASE, text=0, folder=None, report=None, **changes):
    lora = lora_init(base, LORA_CONFIG, seed=0) if method == "lora" else None
    return train(
        Net(base, CONFIG, lora, LORA_CONFIG),
        corpus(text),
        settings=dataclasses.replace(SETTINGS, method=method, **changes),
        folder=folder,
        resume=True,
        report=report or (lambda progress: None),
        ranks=ranks,
    )


def assert_same_bits(actual, expected):
    for name, leaf in tree.flatten(expected.params).items():
        np.testing.assert_array_equal(tree.flatten(actual.params)[name], leaf, err_msg=name)
    assert actual.history == expected.history


# --- the same result as alone ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_compute_what_one_process_does(method, size):
    """Dropout, short sequences, clipping, decay, uneven shares: in float64 up to its rounding."""
    alone = run(method=method)
    for trained in together(size, lambda ranks: run(ranks, method=method)):
        for name, leaf in tree.flatten(alone.params).items():
            shared = tree.flatten(trained.params)[name]
            np.testing.assert_allclose(shared, leaf, rtol=0, atol=1e-9, err_msg=name)
        for curve in ("train", "held_out"):
            expected = getattr(alone.history, curve)
            assert [step for step, _ in getattr(trained.history, curve)] == [s for s, _ in expected]
            np.testing.assert_allclose(getattr(trained.history, curve), expected, rtol=1e-9)


def test_ranks_compute_what_one_process_does_in_float32():
    base = tree.map_leaves(lambda leaf: leaf.astype(np.float32), BASE)
    alone, shared = run(base=base), together(2, lambda ranks: run(ranks, base=base))[0]
    for name, leaf in tree.flatten(alone.params).items():
        assert tree.flatten(shared.params)[name].dtype == np.float32
        np.testing.assert_allclose(tree.flatten(shared.params)[name], leaf, rtol=0, atol=1e-4)


def test_all_ranks_end_with_the_same_bits_in_every_run():
    first, *others = together(3, run) + together(3, run)
    for other in others:
        assert_same_bits(other, first)


@given(items=st.integers(0, 1000), size=st.integers(1, 64))
def test_the_shares_cover_everything_once_and_evenly(items, size):
    shares = [ThreadRanks(rank, Meeting(size)).share(items) for rank in range(size)]
    assert [i for share in shares for i in range(items)[share]] == list(range(items))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_each_rank_computes_its_share_alone(monkeypatch):
    rows = []

    def spy(net, *, tokens, count, **options):
        rows.append((len(tokens), count))
        return minilora.loss_and_grads(net, tokens=tokens, count=count, **options)

    monkeypatch.setattr("minilora.training.loop.loss_and_grads", spy)
    together(2, lambda ranks: run(ranks, steps=1, short_steps=0))
    assert sorted(rows) == [(2, 5 * 16), (3, 5 * 16)]


def test_an_evaluation_is_shared(monkeypatch):
    from minilora.evaluation import sum_nats

    tokens = []

    def spy(workers, net, batches, device):
        tokens.append(sum(targets.size for _, targets in batches))
        return sum_nats(workers, net, batches, device)

    monkeypatch.setattr("minilora.training.loop.sum_nats", spy)
    text = dataclasses.replace(corpus(), held_out=corpus().train)
    monkeypatch.setattr(f"{__name__}.corpus", lambda seed: text)
    together(2, lambda ranks: run(ranks, steps=1))
    assert len(tokens) == 4  # before and after, on two ranks
    assert sum(tokens) == 2 * (len(text.held_out) - 1)
    assert min(tokens) > 0.3 * len(text.held_out)


# --- one of them writes, and speaks ------------------------------------------------------------


def test_the_first_alone_writes_and_reports(tmp_path):
    reports = {0: [], 1: []}

    def of_rank(ranks):
        run(ranks, folder=tmp_path / str(ranks.rank), report=reports[ranks.rank].append)

    together(2, of_rank)
    assert [report.step for report in reports[0]] == [2, 3, 4, 6]
    assert reports[1] == []
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    assert [path.name for path in (tmp_path / "0").iterdir()] == [CHECKPOINT]


def adapted_in(folder, base=BASE):
    model = Model(base, CONFIG, tokenizer=ByteTokenizer(), folder=folder / "no base")

    def of_rank(ranks):
        return adapt_in_folder(
            model, corpus(), LORA_CONFIG, SETTINGS, folder / str(ranks.rank),
            resume=True, ranks=ranks,
        )  # fmt: skip

    return of_rank


def test_a_run_in_a_folder_tells_what_was_summed(tmp_path):
    base = tree.map_leaves(lambda leaf: leaf.astype(np.float32), BASE)
    first, second = together(2, adapted_in(tmp_path, base))
    assert first == second
    assert first.figures["processes"] == 2
    assert first.figures["allreduce_bytes"] == 4 * first.figures["trainable_parameters"]
    assert first.figures["allreduce_bytes_full"] == 4 * first.figures["base_parameters"]
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    again = together(2, adapted_in(tmp_path, base))
    assert [run.was_finished for run in again] == [True, True]


def test_a_killed_run_goes_on_from_what_the_first_has(tmp_path):
    expected = together(2, run)[0]
    killed = killed_at(4)
    with pytest.raises(Killed):
        together(2, lambda ranks: run(ranks, folder=tmp_path / str(ranks.rank), report=killed))
    for trained in together(2, lambda ranks: run(ranks, folder=tmp_path / str(ranks.rank))):
        np.testing.assert_equal(tree.flatten(trained.params), tree.flatten(expected.params))
    for size in (1, 3):
        with pytest.raises(MiniloraError, match=f"processes 2, but this one has {size}"):
            together(size, lambda ranks: run(ranks, folder=tmp_path / "0"))


@pytest.mark.parametrize("pressed_on", [0, 1])
def test_ctrl_c_on_one_rank_stops_all_after_the_same_step(tmp_path, monkeypatch, pressed_on):
    flags = {}

    @contextmanager
    def a_flag_for_each_thread():
        flags[threading.get_ident()] = threading.Event()
        yield flags[threading.get_ident()]

    monkeypatch.setattr("minilora.training.loop.ctrl_c_sets_flag", a_flag_for_each_thread)
    stopped = []

    class Pressing(ThreadRanks):
        def sum(self, arrays):
            self.steps = getattr(self, "steps", 0) + 1
            if (self.rank, self.steps) == (pressed_on, 3):
                flags[threading.get_ident()].set()
            return super().sum(arrays)

    def of_rank(ranks):
        with pytest.raises(Interrupted) as caught:
            run(ranks, folder=tmp_path)
        stopped.append(str(caught.value))

    together(2, of_rank, Pressing)
    assert stopped == [" at step 3; its state is saved"] * 2
    resumed, expected = together(2, lambda ranks: run(ranks, folder=tmp_path)), together(2, run)
    assert_same_bits(resumed[0], expected[0])


# --- what is refused ---------------------------------------------------------------------------


def test_every_rank_needs_a_sequence():
    with pytest.raises(MiniloraError, match="batch 2 is too small for 3 processes"):
        together(3, lambda ranks: run(ranks, batch=2))


@pytest.mark.parametrize(
    ("differing", "name"),
    [({"text": 1}, "checksum of the text is"), ({"lr": 0.01}, "lr is 0.02 on rank 0 but 0.01"),
     ({"base": gpt_init(CONFIG, seed=1, dtype=np.float64)}, "checksum of the base is")],
    ids=["text", "lr", "base"],
)  # fmt: skip
def test_a_rank_of_another_run_is_named(tmp_path, differing, name):
    with pytest.raises(MiniloraError, match=f"{name} .* rank 2"):
        together(3, lambda ranks: run(
            ranks, folder=tmp_path / "new", **(differing if ranks.rank == 2 else {})
        ))  # fmt: skip
    assert not (tmp_path / "new").exists()


def test_ranks_that_drift_apart_are_stopped_before_they_save(tmp_path):
    class Drifting(ThreadRanks):
        def sum(self, arrays):
            total = super().sum(arrays)
            if self.rank == 1:  # the last bit of one number
                leaf = total[1]["blocks"][0]["attn"]["qkv"]["B"]
                leaf = np.where(np.arange(leaf.size).reshape(leaf.shape) == 7, 1.001 * leaf, leaf)
                total[1]["blocks"][0]["attn"]["qkv"]["B"] = leaf
            return total

    with pytest.raises(MiniloraError, match="checksum of the weights at step 2 is .* on rank 1"):
        together(2, lambda ranks: run(ranks, folder=tmp_path / "new"), Drifting)
    assert not (tmp_path / "new").exists()


# --- the launcher ------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    """An environment without a launcher."""
    for name in (name for names in LAUNCHERS for name in names):
        monkeypatch.delenv(name, raising=False)
    find_ranks.cache_clear()
    yield monkeypatch
    find_ranks.cache_clear()


def test_without_a_launcher_there_is_one_process(alone):
    assert launched() == (0, 1)
    assert type(find_ranks()) is Ranks
    assert as_one(lambda: 7) == 7
    check_alone()
    alone.setenv("PMI_SIZE", "1")
    alone.setenv("PMI_RANK", "0")
    assert type(find_ranks()) is Ranks


@pytest.mark.parametrize(("rank", "size"), LAUNCHERS)
def test_a_launcher_is_known_by_its_environment(alone, rank, size):
    alone.setenv(size, "4")
    assert launched() == (0, 1)
    alone.setenv(rank, "3")
    assert launched() == (3, 4)
    with pytest.raises(MiniloraError, match="4 processes were started, but only adapt"):
        check_alone()


@pytest.mark.parametrize("local_rank", [0, 1])
def test_several_processes_need_mpi4py(alone, capsys, local_rank):
    alone.setenv("PMI_SIZE", "4")
    alone.setenv("PMI_RANK", str(local_rank))
    alone.setenv("MPI_LOCALRANKID", str(local_rank))
    alone.setitem(sys.modules, "mpi4py", None)  # as if it were not installed
    with pytest.raises(MiniloraError, match="started 4 processes, .* pip install mpi4py mpich"):
        find_ranks()
    assert as_one(lambda: 0) == 2
    assert len(capsys.readouterr().err.splitlines()) == (local_rank == 0)  # once on a machine


def test_one_process_does_not_import_mpi4py(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise SystemExit('it was imported')", encoding="utf-8")
    launcher = {name for names in LAUNCHERS for name in names}
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    paths = [str(tmp_path), str(Path(minilora.__path__[0]).parent)]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    code = (
        "import sys; from minilora.cli import main; status = main(sys.argv[1:]); "
        "assert not 'mpi4py' in sys.modules; sys.exit(status)"
    )
    words = ["adapt", __file__, "--steps", "1", "--batch", "1", "--context", "8", "--eval-tokens"]
    command = [sys.executable, "-c", code, *words, "8", "--out", str(tmp_path / "out")]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
