"""The loss counts the answers alone, and is one mean over all targets, however they are grouped."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minilora import tree
from minilora.adapters import LoRAConfig, lora_init
from minilora.data import IGNORED
from minilora.errors import MiniloraError
from minilora.evaluation import sum_nats
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.keep import Plan
from minilora.loss import cross_entropy_backward, cross_entropy_forward
from minilora.network import Net, loss_and_grads, net_logits
from minilora.records.corpus import batches, corpus_from_records, padded
from minilora.tokenizer import ByteTokenizer
from minilora.training.checkpoint import checksum
from minilora.training.loop import TrainConfig, batch_loss_and_grads, train
from minilora.training.runs import date_of_run
from minilora.workers import Workers

CONFIG = GPTConfig(vocab_size=256, n_positions=48, n_embd=16, n_layer=2, n_head=2)
LORA = LoRAConfig(rank=2, targets=("qkv", "o", "up", "down"))
SETTINGS = TrainConfig(steps=6, batch=3, context=48, eval_every=3, threads=2, seed=4)
RECORDS = [{"prompt": "ab" * i, "completion": "xyz" * (1 + 3 * i % 7)} for i in range(1, 9)]


@pytest.fixture(scope="module")
def net():
    base = gpt_init(CONFIG, seed=0, dtype=np.float64)
    base["wte"] *= 10.0
    return Net(base, CONFIG, lora_init(base, LORA, seed=1), LORA)


@pytest.fixture(scope="module")
def corpus():
    model = SimpleNamespace(tokenizer=ByteTokenizer(), folder=Path("base"))
    return corpus_from_records(RECORDS, model, context=48, held_out=0.2)


def gradients(net, examples, threads=1):
    """The loss of a batch of these examples, and the adapters' gradients by path."""
    with Workers(threads) as workers:
        loss, grads = batch_loss_and_grads(workers, net, *padded(examples), plan=Plan(lora=True))
    return float(loss), tree.flatten(grads)


def close(one, other):
    for path, gradient in one.items():
        np.testing.assert_allclose(gradient, other[path], rtol=1e-9, atol=1e-12, err_msg=path)


def test_the_gradient_of_the_logits_is_zero_on_the_prompt_and_only_there(net, corpus):
    (example,) = [e for e in corpus.train if e.prompt == "ababab"]
    tokens, targets = padded([example])
    logits = net_logits(net, tokens=tokens)
    (dlogits,) = cross_entropy_backward(1.0, cross_entropy_forward(logits, targets=targets)[1])
    first = len(example.prompt) - 1  # the last token of the prompt predicts the answer's first
    assert not dlogits[0, :first].any()
    assert np.abs(dlogits[0, first:]).max(axis=-1).min() > 1e-4


def test_a_batch_s_loss_is_the_mean_over_its_targets(net, corpus):
    """Counted by hand, record by record, alone: not a mean of the records' means."""
    sums, counts = [], []
    for example in corpus.train:
        tokens, targets = (part[None] for part in example.batch)
        counts.append((targets != IGNORED).sum())
        sums.append(float(loss_and_grads(net, tokens=tokens, targets=targets)[0]) * counts[-1])
    loss, _ = gradients(net, corpus.train)
    assert loss == pytest.approx(sum(sums) / sum(counts), rel=1e-12)
    wrong = np.mean(np.array(sums) / counts)
    assert abs(wrong - loss) > 1e-6, "the two means differ here, so the test can tell them apart"


@pytest.mark.parametrize("threads", [2, 3])
def test_shards_of_unequal_counts_add_up_to_the_batch(net, corpus, threads):
    loss, grads = gradients(net, corpus.train)
    shared_loss, shared = gradients(net, corpus.train, threads)
    assert shared_loss == pytest.approx(loss, rel=1e-12)
    close(shared, grads)


def test_a_record_s_gradient_is_the_same_beside_longer_ones(net, corpus):
    """Padding is counted by nobody, and no record sees another."""
    short, *others = sorted(corpus.train, key=lambda e: len(e.tokens))
    alone, alone_grads = gradients(net, [short])
    tokens, targets = padded([short, *others])
    targets[1:] = IGNORED
    for value in (0, 17):
        tokens[0, len(short.tokens) - 1 :] = value
        loss, _, dlora = loss_and_grads(net, tokens=tokens, targets=targets)
        assert float(loss) == pytest.approx(alone, rel=1e-12)
        close(tree.flatten(dlora), alone_grads)


def test_the_order_of_the_records_changes_nothing(net, corpus):
    loss, grads = gradients(net, corpus.train)
    turned, turned_grads = gradients(net, corpus.train[::-1])
    assert turned == pytest.approx(loss, rel=1e-12)
    close(turned_grads, grads)


def test_an_evaluation_does_not_depend_on_the_batches(net, corpus):
    with Workers(1) as workers:
        whole = sum_nats(workers, net, batches(corpus.train), "cpu")
        alone = [sum_nats(workers, net, [padded([e])], "cpu") for e in corpus.train]
    assert whole[1] == sum(count for _, count in alone)
    assert whole[0] == pytest.approx(sum(nats for nats, _ in alone), rel=1e-12)


def test_training_lowers_the_loss_on_held_out_answers(net, corpus):
    trained = train(net, corpus, settings=replace(SETTINGS, steps=30, lr=0.02))
    (_, before), *_, (_, after) = trained.history.held_out
    assert after < before - 1.0


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_run_goes_on_in_the_middle_of_a_pass_with_the_same_bits(net, corpus, tmp_path, stop):
    whole = train(net, corpus, settings=SETTINGS)
    settings = replace(SETTINGS, checkpoint_every=stop, log_every=stop)

    with pytest.raises(KeyboardInterrupt):
        train(net, corpus, settings=settings, folder=tmp_path, report=stop_after(stop))
    again = train(net, corpus, settings=settings, folder=tmp_path, resume=True)
    assert checksum(tree.flatten(again.params).values()) == checksum(
        tree.flatten(whole.params).values()
    )


def stop_after(step):
    """A report that ends the run once a checkpoint of this step has been written."""

    def report(progress):
        if progress.step > step:
            raise KeyboardInterrupt

    return report


def test_a_run_refuses_to_go_on_with_other_records(net, corpus, tmp_path):
    settings = replace(SETTINGS, checkpoint_every=2, log_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(net, corpus, settings=settings, folder=tmp_path, report=stop_after(2))
    last = corpus.train[-1]
    counts = last.counts.copy()
    counts[-1] = False  # an end that is not learned
    other = replace(corpus, train=(*corpus.train[:-1], last._replace(counts=counts)))
    with pytest.raises(MiniloraError, match="checksum of the text"):
        train(net, other, settings=settings, folder=tmp_path, resume=True)


def test_a_record_longer_than_the_context_is_refused_by_name(net, corpus):
    with pytest.raises(MiniloraError, match=r"record \d has .* a context of 9 holds records of at"):
        train(net, corpus, settings=replace(SETTINGS, context=9))


def test_the_date_of_a_template_is_part_of_a_run(net, corpus, tmp_path):
    settings = replace(SETTINGS, checkpoint_every=2, log_every=2)
    dated = replace(corpus, today="2024-02-29")
    with pytest.raises(KeyboardInterrupt):
        train(net, dated, settings=settings, folder=tmp_path, report=stop_after(2))
    assert str(date_of_run(tmp_path)) == "2024-02-29"
    with pytest.raises(MiniloraError, match="today 2024-02-29, but this one has 2024-03-01"):
        train(
            net, replace(corpus, today="2024-03-01"), settings=settings, folder=tmp_path,
            resume=True,
        )  # fmt: skip
