"""The breakdown counts every second once, and leaves the package as it was."""

import threading
import time

import pytest

from minilora import evaluation, gpt2, loss, network, ops, optim
from minilora.bench.case import Case
from minilora.bench.measure import JOBS, random_model
from minilora.bench.profile import Profile, profiling
from minilora.gpt2 import GPTConfig
from minilora.training import loop
from minilora.workers import Workers

CONFIG = GPTConfig(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only its `advance` moves."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_an_operation_is_counted_without_those_that_it_calls(clock):
    profile = Profile(wait=lambda: None)

    @profile.timed
    def inner():
        assert profile.operation() == "inner"
        clock(2.0)

    @profile.timed
    def outer():
        clock(1.0)
        inner()
        inner()
        assert profile.operation() == "outer"
        clock(4.0)

    outer()
    assert profile.operation() == ""
    assert profile.by_operation(threads=2) == {"inner": 4.0, "outer": 5.0}
    assert profile.calls == {"inner": 2, "outer": 1}


def test_an_operation_lasts_until_the_device_is_done(clock):
    profile = Profile(wait=lambda: clock(1.0))
    work = profile.timed(lambda: clock(2.0))
    work()
    assert profile.total(threads=1) == 3.0


def test_what_threads_do_counts_by_its_mean(clock):
    profile = Profile(wait=lambda: None)
    work = profile.timed(lambda: clock(3.0))
    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert profile.total(threads=2) == 3.0
    work()
    assert profile.total(threads=2) == 6.0


def test_time_is_counted_when_an_operation_raises(clock):
    profile = Profile(wait=lambda: None)

    @profile.timed
    def broken():
        clock(1.0)
        raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert profile.operation() == ""
    assert profile.total(threads=1) == 1.0


def calls_in(case):
    """How often a run of the case calls each operation; every one of them takes time."""
    with Workers(2) as workers:
        job = JOBS[case.what](case, random_model(case), workers)
        with profiling() as profile:
            job()
    assert all(seconds > 0.0 for seconds in profile.by_operation(2).values())
    return profile.calls


BLOCKS = CONFIG.n_layer
FORWARD = {
    "embedding_forward": 1, "position_forward": 1, "block_forward": BLOCKS,
    "layer_norm_forward": 2 * BLOCKS + 1, "adapted_linear_forward": 4 * BLOCKS,
    "linear_forward": 4 * BLOCKS, "gelu_forward": BLOCKS,
}  # fmt: skip
BACKWARD = {
    "block_backward": BLOCKS, "attention_backward": BLOCKS, "gelu_backward": BLOCKS,
    "adapted_linear_backward": 4 * BLOCKS, "linear_backward": 4 * BLOCKS,
}  # fmt: skip
LOSS = {"lora": "frozen_head_loss", "full": "head_loss"}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_is_divided_among_its_operations(method):
    calls = calls_in(Case(CONFIG, method=method, batch=2, context=8, threads=2))
    adapted = BLOCKS if method == "lora" else 0
    in_shard = FORWARD | BACKWARD | {
        "attention_forward": BLOCKS, "loss_and_grads": 1,
        "lora_forward": adapted, "lora_backward": adapted,
        f"{LOSS[method]}_forward": 1, f"{LOSS[method]}_backward": 1,
    }  # fmt: skip
    expected = {name: 2 * count for name, count in in_shard.items()}
    expected |= {"adamw": 1, "clip_by_global_norm": 1, "draw_batch": 1}
    assert {name: calls[name] for name in expected} == expected


def test_an_evaluation_is_divided_among_its_operations():
    calls = calls_in(Case(CONFIG, what="evaluate", batch=2, context=8, threads=2))
    in_shard = FORWARD | {"attention_forward": BLOCKS, "head_loss_forward": 1}
    expected = {name: 2 * count for name, count in in_shard.items()}
    assert {name: calls[name] for name in expected} == expected


def test_a_generation_is_divided_among_its_operations():
    calls = calls_in(Case(CONFIG, what="generate", context=4))
    in_token = FORWARD | {"cached_attention": BLOCKS, "head_forward": 1, "distribution": 1}
    expected = {name: 4 * count for name, count in in_token.items()}
    assert {name: calls[name] for name in expected} == expected


def test_nothing_stays_wrapped():
    modules = (ops, loss, gpt2, network, evaluation, optim, loop)
    before = {module: dict(vars(module)) for module in modules}
    with profiling():
        assert ops.gelu_forward is not before[ops]["gelu_forward"]
        assert network.attention_forward is ops.attention_forward
        assert evaluation.head_loss_forward is loss.head_loss_forward
    assert {module: dict(vars(module)) for module in modules} == before
