"""The training loop: what it changes, what it leaves, and that nothing depends on chance."""

import dataclasses
import math

import numpy as np
import pytest
from helpers import copied
from hypothesis import given
from hypothesis import strategies as st

from minilora import tree
from minilora.adapters import LoRAConfig, dropout_masks, lora_init
from minilora.bench.measure import blas
from minilora.data import Corpus, draw_batch, held_out_batches
from minilora.errors import MiniloraError
from minilora.evaluation import evaluate_tokens
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.keep import Plan
from minilora.network import Net, loss_and_grads, net_logits
from minilora.optim import adamw, adamw_init, clip_by_global_norm, warmup_cosine
from minilora.training.loop import TrainConfig, batch_loss_and_grads, train
from minilora.workers import SHARD_TOKENS, Workers

CONFIG = GPTConfig(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
BASE = gpt_init(CONFIG, seed=0)
LORA_CONFIG = LoRAConfig(rank=2, alpha=4.0, targets=("qkv", "o", "up", "down"), dropout=0.1)
SETTINGS = TrainConfig(
    steps=8, batch=4, context=16, lr=0.02, warmup=2, threads=2, log_every=3, eval_every=4
)


def corpus_of(length=3000, held_out=300):
    """A text with a pattern that is quickly learned: each token is one of two after the last."""
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.integers(1, 3, size=length + held_out), dtype=np.int32) % 32
    return Corpus(tokens[:length], tokens[length:], length, held_out, 1, "a text")


CORPUS = corpus_of()


def run(base=BASE, lora_config=LORA_CONFIG, corpus=CORPUS, seed=0, **changes):
    settings = dataclasses.replace(SETTINGS, seed=seed, **changes)
    lora = lora_init(base, lora_config, seed=seed) if settings.method == "lora" else None
    return train(Net(base, CONFIG, lora, lora_config), corpus, settings=settings)


def assert_same_bits(actual, expected):
    actual, expected = tree.flatten(actual), tree.flatten(expected)
    assert actual.keys() == expected.keys()
    for name, leaf in expected.items():
        assert actual[name].dtype == leaf.dtype
        np.testing.assert_array_equal(actual[name], leaf, err_msg=name)


# --- what training changes ---------------------------------------------------------------------


def test_the_loss_of_a_new_base_falls():
    trained = run(method="full", lr=0.01, steps=60, warmup=5)
    before, after = trained.history.held_out[0][1], trained.history.held_out[-1][1]
    assert before == pytest.approx(math.log(32), rel=0.05)  # a base at its start knows nothing
    assert after < before - 0.5
    losses = [loss for _, loss in trained.history.train]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5


def test_the_loss_of_adapters_falls():
    base = copied(BASE)
    base["wte"] *= 10.0  # a table whose rows differ: adapters cannot change the head
    trained = run(base=base, lr=0.05, steps=60, warmup=5)
    before, after = trained.history.held_out[0][1], trained.history.held_out[-1][1]
    assert after < before - 0.5


def test_adapters_train_and_the_base_keeps_its_bits():
    base = copied(BASE)
    lora = lora_init(base, LORA_CONFIG, seed=0)
    start = copied(lora)
    trained = train(Net(base, CONFIG, lora, LORA_CONFIG), CORPUS, settings=SETTINGS).params
    assert_same_bits(base, BASE)
    assert_same_bits(lora, start)
    for name, leaf in tree.flatten(trained).items():
        assert not np.array_equal(leaf, tree.flatten(start)[name]), f"{name} was not trained"
        assert leaf.dtype == np.float32


def test_full_training_moves_every_weight_of_a_copy():
    base = copied(BASE)
    settings = dataclasses.replace(SETTINGS, method="full")
    trained = train(Net(base, CONFIG), CORPUS, settings=settings).params
    assert_same_bits(base, BASE)
    for name, leaf in tree.flatten(trained).items():
        assert not np.array_equal(leaf, tree.flatten(base)[name]), f"{name} was not trained"


def test_history_holds_every_step_once_and_the_evaluations_asked_for():
    trained = run(steps=8, log_every=3, eval_every=5, checkpoint_every=4)
    assert [step for step, _ in trained.history.train] == list(range(1, 9))
    assert [step for step, _ in trained.history.held_out] == [0, 5, 8]
    assert trained.seconds > 0
    assert trained.tokens_per_second == pytest.approx(8 * 4 * 16 / trained.seconds)


def test_reports_come_at_every_step_that_has_news():
    reports = []
    train(
        Net(BASE, CONFIG, lora_init(BASE, LORA_CONFIG, seed=0), LORA_CONFIG),
        CORPUS,
        settings=dataclasses.replace(SETTINGS, steps=8, log_every=3, eval_every=4),
        report=reports.append,
    )
    assert [report.step for report in reports] == [3, 4, 6, 8]
    assert [report.held_out is not None for report in reports] == [False, True, False, True]
    assert all(report.steps == 8 and report.tokens_per_second > 0 for report in reports)
    assert reports[-1].seconds_left == 0
    assert all(report.seconds_left > 0 for report in reports[:-1])


def test_the_first_loss_is_that_of_the_batch_drawn_from_seed_and_step():
    trained = run(lora_config=dataclasses.replace(LORA_CONFIG, dropout=0.0), seed=7, steps=1)
    rng = np.random.default_rng([7, 1])
    tokens, targets = draw_batch(CORPUS.train, batch=4, context=16, rng=rng)
    loss, _, _ = loss_and_grads(Net(BASE, CONFIG), tokens=tokens, targets=targets, plan=Plan())
    assert trained.history.train[0][1] == pytest.approx(float(loss), rel=1e-6)


def test_the_steps_are_adamw_with_all_that_the_settings_say():
    settings = dataclasses.replace(
        SETTINGS, steps=3, threads=1, lr=0.03, weight_decay=0.3, beta1=0.8, beta2=0.7, clip=0.05
    )
    lora_config = dataclasses.replace(LORA_CONFIG, dropout=0.0)
    start = lora_init(BASE, lora_config, seed=0)
    net = Net(BASE, CONFIG, start, lora_config)
    trained = train(net, CORPUS, settings=settings).params

    params, moments = start, adamw_init(start)
    for step in (1, 2, 3):
        rng = np.random.default_rng([settings.seed, step])
        tokens, targets = draw_batch(CORPUS.train, batch=4, context=16, rng=rng)
        net = dataclasses.replace(net, lora=params)
        _, _, grads = loss_and_grads(net, tokens=tokens, targets=targets)
        grads, norm = clip_by_global_norm(grads, 0.05)
        assert norm > 0.05  # or nothing would be clipped
        lr = warmup_cosine(step, steps=3, peak=0.03, warmup=2)
        params, moments = adamw(
            params, grads, moments, step=step, lr=lr, beta1=0.8, beta2=0.7, weight_decay=0.3
        )
    for name, leaf in tree.flatten(params).items():
        np.testing.assert_allclose(tree.flatten(trained)[name], leaf, atol=1e-6, err_msg=name)


def test_short_sequences_come_first_and_read_as_much():
    settings = TrainConfig(batch=3, context=16, short_context=4, short_steps=5)
    assert [settings.shape(step) for step in (1, 5, 6)] == [(12, 4), (12, 4), (3, 16)]
    assert TrainConfig(batch=3, context=16).shape(1) == (3, 16)
    longer = TrainConfig(batch=3, context=16, short_context=128, short_steps=5)
    assert longer.shape(1) == (3, 16)  # no longer than the context


def test_training_reads_the_short_sequences(monkeypatch):
    shapes = []

    def spy(tokens, *, batch, context, rng):
        shapes.append((batch, context))
        return draw_batch(tokens, batch=batch, context=context, rng=rng)

    monkeypatch.setattr("minilora.data.draw_batch", spy)
    run(steps=3, short_context=8, short_steps=2)
    assert shapes == [(8, 8), (8, 8), (4, 16)]


# --- the same again ----------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_and_threads_give_the_same_bits(threads):
    first, second = run(threads=threads), run(threads=threads)
    assert_same_bits(first.params, second.params)
    assert first.history == second.history


def test_another_seed_gives_another_result():
    first, second = run(seed=0), run(seed=1)
    assert first.history.train != second.history.train


def test_one_and_two_threads_agree_up_to_rounding():
    one, two = run(threads=1), run(threads=2)
    for name, leaf in tree.flatten(one.params).items():
        other = tree.flatten(two.params)[name]
        np.testing.assert_allclose(other, leaf, rtol=0, atol=2e-3, err_msg=name)
    for (_, a), (_, b) in zip(one.history.train, two.history.train, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_training_that_recomputes_gives_the_same_bits(monkeypatch):
    asked = []

    def spy(*args, plan, **kwargs):
        asked.append(plan.recompute)
        return loss_and_grads(*args, plan=plan, **kwargs)

    monkeypatch.setattr("minilora.training.loop.loss_and_grads", spy)
    assert_same_bits(run(steps=3, recompute=True).params, run(steps=3).params)
    assert set(asked[: len(asked) // 2]) == {True} and set(asked[len(asked) // 2 :]) == {False}


def test_the_shards_of_a_batch_add_up_to_the_batch():
    rng = np.random.default_rng(0)
    lora = tree.map_leaves(
        lambda x: rng.standard_normal(x.shape).astype(np.float32),
        lora_init(BASE, LORA_CONFIG, seed=0),
    )
    tokens, targets = draw_batch(CORPUS.train, batch=5, context=16, rng=rng)
    masks = dropout_masks(lora, LORA_CONFIG, rng=rng, shape=tokens.shape)
    net, plan = Net(BASE, CONFIG, lora, LORA_CONFIG), Plan(lora=True)
    whole, _, dlora = loss_and_grads(net, tokens=tokens, targets=targets, plan=plan, masks=masks)
    for threads in (1, 2, 3, 8):
        with Workers(threads) as workers:
            loss, grads = batch_loss_and_grads(
                workers, net, tokens, targets, plan=plan, masks=masks
            )
        assert float(loss) == pytest.approx(float(whole), rel=1e-5)
        for name, leaf in tree.flatten(dlora).items():
            np.testing.assert_allclose(
                tree.flatten(grads)[name], leaf, rtol=1e-3, atol=1e-6, err_msg=f"{name}, {threads}"
            )


@given(threads=st.integers(1, 9), batch=st.integers(1, 400), context=st.integers(1, 3000))
def test_the_shards_cover_the_batch_once_and_evenly(threads, batch, context):
    shards = Workers(threads).shards(batch, context)
    rows = [row for shard in shards for row in range(shard.start, shard.stop)]
    assert rows == list(range(batch))
    sizes = [shard.stop - shard.start for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert len(shards) == batch or len(shards) % threads == 0
    # About SHARD_TOKENS each: a round of shards more or fewer would be further off.
    if batch > len(shards) > threads:
        assert max(sizes) * context <= 2 * SHARD_TOKENS + context


def test_a_gpu_takes_the_batch_at_once():
    assert Workers(4, "cuda").threads == 1
    assert Workers(4, "cuda").shards(64, 1024) == [slice(0, 64)]
    assert Workers(3).threads == 3
    assert Workers(0).threads >= 1


@pytest.mark.parametrize("threads", [1, 2])
def test_blas_has_one_thread_while_workers_share_a_batch_and_as_many_as_before_afterwards(threads):
    from threadpoolctl import threadpool_limits

    with threadpool_limits(2, user_api="blas"):
        if blas()["blas_threads"] != 2:
            pytest.skip("this BLAS cannot be told its threads")
        with Workers(threads):
            assert blas()["blas_threads"] == 1
        assert blas()["blas_threads"] == 2


def test_results_come_in_the_order_of_the_shards_whatever_ends_first():
    import threading

    second_is_done = threading.Event()

    def f(i):
        if i == 0:
            assert second_is_done.wait(60)
        else:
            second_is_done.set()
        return i

    with Workers(2) as workers:
        assert list(workers.map(f, [0, 1])) == [0, 1]


def test_dropout_is_drawn_anew_at_every_step_and_alike_in_every_run(monkeypatch):
    drawn = []

    def spy(*args, **kwargs):
        drawn.append(dropout_masks(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr("minilora.training.loop.dropout_masks", spy)
    run(steps=2)
    run(steps=2)
    first, second, *other_run = drawn
    assert_same_bits([first, second], other_run)
    assert any(not np.array_equal(first[path], second[path]) for path in first)
    for mask in first.values():
        assert set(np.unique(mask)) == {np.float32(0.0), np.float32(1 / 0.9)}


def test_dropout_is_not_drawn_with_the_numbers_of_its_batch(monkeypatch):
    """The masks are drawn after the windows: what is dropped does not depend on what is read."""
    drawn = []

    def spy(*args, **kwargs):
        drawn.append(dropout_masks(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr("minilora.training.loop.dropout_masks", spy)
    run(steps=1, seed=7)
    lora, rng = lora_init(BASE, LORA_CONFIG, seed=7), np.random.default_rng([7, 1])
    masks_of_the_batch = dropout_masks(lora, LORA_CONFIG, rng=rng, shape=(4, 16))
    for path, mask in masks_of_the_batch.items():
        assert not np.array_equal(drawn[0][path], mask), path


def test_dropout_reaches_the_adapters():
    plain = dataclasses.replace(LORA_CONFIG, dropout=0.0)
    assert run().history.train[-1] != run(lora_config=plain).history.train[-1]


# --- evaluation --------------------------------------------------------------------------------


def loss_by_hand(net, tokens):
    """Nats of every token but the first, each from float64 logits of its own window."""
    nats = []
    context = CONFIG.n_positions
    for start in range(0, len(tokens) - 1, context):
        window = tokens[start : start + context + 1]
        logits = net_logits(net, tokens=window[None, :-1])[0]
        for z, target in zip(logits, window[1:], strict=True):
            nats.append(-math.log(np.exp(z[target]) / np.exp(z).sum()))
    return nats


@pytest.mark.parametrize("length", [2, 3, 16, 17, 18, 33, 40])
def test_evaluation_predicts_every_token_but_the_first_once(length):
    rng = np.random.default_rng(length)
    base = tree.map_leaves(
        lambda x: (x + 0.2 * rng.standard_normal(x.shape)).astype(np.float64), BASE
    )
    tokens = rng.integers(0, 32, size=length).astype(np.int32)
    nats = loss_by_hand(Net(base, CONFIG), tokens)
    assert len(nats) == length - 1
    result = evaluate_tokens(Net(base, CONFIG), tokens, text_bytes=100, threads=2)
    assert result.tokens == length - 1
    assert result.loss == pytest.approx(np.mean(nats), rel=1e-12)
    bits = np.mean(nats) / math.log(2)  # the first token is not predicted, nor are its bytes
    assert result.bits_per_byte == pytest.approx(bits * length / 100, rel=1e-12)


def test_evaluation_sees_the_adapter():
    rng = np.random.default_rng(0)
    lora = tree.map_leaves(
        lambda x: rng.standard_normal(x.shape).astype(np.float32),
        lora_init(BASE, LORA_CONFIG, seed=0),
    )
    tokens = CORPUS.held_out[:50]
    options = {"text_bytes": 50, "threads": 1}
    net = Net(BASE, CONFIG, lora, LORA_CONFIG)
    result = evaluate_tokens(net, tokens, **options)
    assert result.loss == pytest.approx(np.mean(loss_by_hand(net, tokens)), rel=1e-5)
    assert result.loss != evaluate_tokens(Net(BASE, CONFIG), tokens, **options).loss


@pytest.mark.parametrize("tokens", [[], [1]])
def test_evaluation_needs_two_tokens(tokens):
    with pytest.raises(MiniloraError, match=f"tokens in the text: {len(tokens)}; "):
        evaluate_tokens(Net(BASE, CONFIG), np.array(tokens, np.int32), text_bytes=1)


def test_tokens_of_another_vocabulary_are_refused():
    tokens = np.array([1, 2, 32], np.int32)
    with pytest.raises(MiniloraError, match="token id 32 is outside"):
        evaluate_tokens(Net(BASE, CONFIG), tokens, text_bytes=3)
    corpus = dataclasses.replace(CORPUS, held_out=np.array([1, -1], np.int32))
    with pytest.raises(MiniloraError, match="token id -1 is outside"):
        run(corpus=corpus)


@given(
    length=st.integers(2, 400),
    context=st.integers(1, 64),
    limit=st.integers(1, 500),
)
def test_held_out_windows_are_the_texts_own_and_within_the_limit(length, context, limit):
    tokens = np.arange(length, dtype=np.int32)
    batches = held_out_batches(tokens, context=context, limit=limit)
    second_batches = held_out_batches(tokens, context=context, limit=limit)
    predicted = []
    for (inputs, targets), (second_inputs, _) in zip(batches, second_batches, strict=True):
        np.testing.assert_array_equal(inputs, second_inputs)
        np.testing.assert_array_equal(inputs + 1, targets)  # each target is the next token
        assert inputs.ndim == 2
        assert inputs.shape[1] <= context
        assert inputs.size <= max(SHARD_TOKENS, context)
        predicted += targets.ravel().tolist()
    if length - 1 <= limit:
        assert predicted == list(range(1, length))
    else:
        assert 0 < len(predicted) <= max(limit, context)
        assert len(predicted) >= min(limit - context + 1, length - 1)
        if len(predicted) > context:  # spread from the first window to the last
            assert predicted[0] == 1
            assert predicted[-1] == length - 1


def test_the_held_out_loss_is_that_of_an_evaluation_on_all_of_a_short_text():
    trained = run(steps=1, eval_tokens=10**6)
    expected = evaluate_tokens(Net(BASE, CONFIG), CORPUS.held_out, text_bytes=300)
    assert trained.history.held_out[0][1] == pytest.approx(expected.loss, rel=1e-6)


def test_a_limit_below_the_context_still_evaluates():
    assert run(steps=1, eval_tokens=1).history.held_out[-1][1] > 0
    short = corpus_of(held_out=10)  # shorter than the context, too
    assert run(steps=1, eval_tokens=3, corpus=short).history.held_out[-1][1] > 0


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lor"}, "method 'lor'"),
        ({"steps": 0}, "steps 0"),
        ({"batch": 0}, "batch 0"),
        ({"context": -1}, "context -1"),
        ({"log_every": 0}, "log_every 0"),
        ({"eval_every": 0}, "eval_every 0"),
        ({"eval_tokens": 0}, "eval_tokens 0"),
        ({"checkpoint_every": 0}, "checkpoint_every 0"),
        ({"warmup": -1}, "warmup -1"),
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
        ({"weight_decay": math.nan}, "weight_decay nan"),
        ({"weight_decay": math.inf}, "weight_decay inf"),
        ({"seed": -1}, "seed -1"),
        ({"threads": -2}, "threads -2"),
        ({"lr": 0.0}, "lr 0.0"),
        ({"lr": math.nan}, "lr nan"),
        ({"lr": math.inf}, "lr inf"),
        ({"clip": 0.0}, "clip 0.0"),
        ({"clip": -1.0}, "clip -1.0"),
        ({"beta1": 1.0}, "beta1 1.0"),
        ({"beta2": 1.0}, "beta2 1.0"),
        ({"beta2": -0.5}, "beta2 -0.5"),
        ({"beta2": math.nan}, "beta2 nan"),
        ({"short_steps": -1}, "short_steps -1"),
        ({"short_steps": 2, "short_context": 0}, "short_context 0"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(MiniloraError, match=message):
        TrainConfig(**changes)


def test_huge_settings_are_no_problem_of_floating_point():
    assert TrainConfig(seed=10**400).seed == 10**400
    for name in ("steps", "batch", "context", "warmup", "threads", "short_steps", "short_context"):
        with pytest.raises(MiniloraError, match=f"{name} 10+ is too large"):
            TrainConfig(**{name: 10**400})


@pytest.mark.parametrize(
    ("corpus", "changes", "message"),
    [
        (corpus_of(length=16), {}, "a text has 16 tokens; a context of 16 needs at least 17"),
        (corpus_of(held_out=1), {}, "a text is too short"),
        (CORPUS, {"context": 17}, "context 17 exceeds the base's context of 16"),
    ],
)
def test_text_that_does_not_fit_is_refused(corpus, changes, message):
    with pytest.raises(MiniloraError, match=message):
        run(corpus=corpus, **changes)


def test_the_shortest_text_that_fits_is_enough():
    assert len(run(corpus=corpus_of(length=17, held_out=2), steps=1).history.train) == 1


def test_adapters_are_needed_to_train_adapters():
    with pytest.raises(MiniloraError, match="needs an adapter tree"):
        train(Net(BASE, CONFIG), CORPUS, settings=SETTINGS)


# --- numbers that are not finite ---------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("lr", [1e30, 1e300])
def test_an_absurd_rate_stops_at_a_named_step(method, lr):
    with pytest.raises(MiniloraError, match=r"not finite at step [1-9]\d*: a lower learning rate"):
        run(method=method, lr=lr, steps=200, warmup=0, log_every=1)


def test_a_base_that_overflows_is_reported_before_training():
    poisoned = copied(BASE)
    poisoned["ln_f"]["w"][:] = 3e38
    poisoned["wte"] *= 100.0
    with pytest.raises(MiniloraError, match="held-out loss is not finite at step 0"):
        run(base=poisoned)
    with pytest.raises(MiniloraError, match="the loss is not finite"):
        evaluate_tokens(Net(poisoned, CONFIG), CORPUS.held_out, text_bytes=300)


def test_a_step_that_goes_wrong_between_two_reports_is_named(monkeypatch):
    """The losses are read from the device every few steps; the message names the very step."""

    def spoiled(*args, step, **kwargs):
        return math.nan if step == 4 else 0.001

    monkeypatch.setattr(
        "minilora.training.loop.warmup_cosine", lambda step, **_: spoiled(step=step)
    )
    with pytest.raises(MiniloraError, match="not finite at step 5"):
        run(log_every=7, eval_every=7)
