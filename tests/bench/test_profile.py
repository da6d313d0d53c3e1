"""The breakdown counts every moment once, and leaves the package as it was."""

import threading
import time

import pytest

from minilora import gpt, ops, optim
from minilora.bench.case import Case
from minilora.bench.measure import RUNS, random_model
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


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_is_divided_among_its_operations(method):
    case = Case(CONFIG, method=method, batch=2, context=8, threads=2)
    with Workers(2) as workers:
        run = RUNS["step"](case, random_model(case), workers)
        with profiling() as profile:
            run()
    shards, blocks = 2, 2
    expected = {
        "attention_forward": shards * blocks,
        "attention_backward": shards * blocks,
        "gelu_backward": shards * blocks,
        "linear_forward": 4 * shards * blocks,
        "loss_and_grads": shards,
        "adamw": 1,
        "clip_by_global_norm": 1,
        "draw_batch": 1,
    }
    assert {name: profile.calls[name] for name in expected} == expected
    assert all(seconds > 0.0 for seconds in profile.by_operation(2).values())


def test_nothing_stays_wrapped():
    before = [dict(vars(module)) for module in (ops, gpt, optim, loop)]
    defaults = dict(gpt.block_forward.__kwdefaults__)
    with profiling():
        assert ops.gelu_forward is not before[0]["gelu_forward"]
        assert gpt.gelu_forward is ops.gelu_forward
        assert before[1]["block_forward"].__kwdefaults__["attend"] is gpt.attention_forward
    assert [dict(vars(module)) for module in (ops, gpt, optim, loop)] == before
    assert gpt.block_forward.__kwdefaults__ == defaults
