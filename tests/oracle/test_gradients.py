"""Loss, logits and every gradient against torch's autograd through transformers and PEFT.

Sizes, targets, ranks, scales, padding and ignored targets are Hypothesis's; values come from a
seed. Errors are relative to the largest entry of each tensor.
"""

import re
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.adapters import TARGETS, LoRAConfig, adapted_paths
from minilora.errors import MiniloraError
from minilora.gpt2 import GPTConfig
from minilora.keep import Plan
from minilora.network import Net, loss_and_grads, net_logits

pytestmark = pytest.mark.oracle

TOLERANCE = {np.float64: 1e-9, np.float32: 1e-4}
PLANS = (
    Plan(lora=True),
    Plan(base=True),
    Plan(base=True, lora=True),
    Plan(base=True, lora=True, recompute=True),
)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


class Case(NamedTuple):
    """A model to build and a batch for it; `attended` is False where a row is padded."""

    config: GPTConfig
    lora_config: LoRAConfig | None
    tokens: np.ndarray
    targets: np.ndarray
    attended: np.ndarray
    ignore_index: int
    seed: int
    tied: bool

    @property
    def batch(self) -> dict[str, np.ndarray | int]:
        """What `loss_and_grads` takes."""
        return {"tokens": self.tokens, "targets": self.targets, "ignore_index": self.ignore_index}


@st.composite
def gpt_configs(draw: st.DrawFn) -> GPTConfig:
    heads = draw(st.integers(1, 3))
    return GPTConfig(
        vocab_size=draw(st.integers(5, 13)),
        n_positions=draw(st.integers(7, 9)),
        n_embd=heads * draw(st.integers(6, 8)),
        n_layer=draw(st.integers(1, 3)),
        n_head=heads,
        n_inner=draw(st.sampled_from([None, 5, 17])),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-3])),
    )


@st.composite
def lora_configs(draw: st.DrawFn, n_layer: int) -> LoRAConfig:
    """Targets by name or as the pattern of one block, ranks and alphas of their own for some."""
    alphas = st.sampled_from([0.5, 2.0, 3.0])
    names = draw(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=5, unique=True))
    block = draw(st.none() | st.integers(0, n_layer - 1))
    if block is not None:
        names = [name if name == "embedding" else rf"{block}\.\w+\.{name}" for name in names]
    paths = adapted_paths(LoRAConfig(targets=tuple(names)), n_layer)
    keys = st.sampled_from([*map(re.escape, paths), *{path.split(".")[-1] for path in paths}])
    return LoRAConfig(
        rank=draw(st.integers(1, 4)),
        alpha=draw(alphas),
        targets=tuple(names),
        rslora=draw(st.booleans()),
        rank_pattern=draw(st.dictionaries(keys, st.integers(1, 4), max_size=2)),
        alpha_pattern=draw(st.dictionaries(keys, alphas, max_size=2)),
    )


@st.composite
def cases(draw: st.DrawFn, adapted: bool = True) -> Case:
    """Batches of some ten counted tokens and more: with fewer, a factor's whole gradient may be the
    small difference of two terms, and float32 then says nothing to four digits, here or in torch.
    """
    config = draw(gpt_configs())
    lora_config = draw(lora_configs(config.n_layer)) if adapted else None
    B, T = draw(st.integers(3, 5)), draw(st.integers(5, 7))
    lengths = draw(st.none() | st.lists(st.integers(4, T), min_size=B, max_size=B))
    ignore_index = draw(st.sampled_from([-100, -1, 3]))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(config.vocab_size, size=(2, B, T))
    attended = np.arange(T) < np.array([[T] * B] if lengths is None else [lengths]).T
    targets[~attended | (rng.random((B, T)) < 0.2)] = ignore_index
    targets[0, lengths[0] - 1 if lengths else T - 1] = 0  # at least one is counted
    tied = draw(st.booleans())
    return Case(config, lora_config, tokens, targets, attended, ignore_index, seed, tied)


def oracle_loss_and_grads(model, case: Case):
    """loss, logits and gradients by torch; transformers' own loss would round to float32."""
    import torch

    attended = None if case.attended.all() else case.attended
    logits = model(case.tokens, attended)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1),
        torch.from_numpy(case.targets).flatten(),
        ignore_index=case.ignore_index,
    )
    loss.backward()
    return loss.detach().numpy(), logits.detach().numpy(), *model.gradients()


def check_loss_and_logits(case: Case, net: Net, loss, logits, dtype) -> None:
    """Ours against the oracle's; the logits where a row is padded mean nothing."""
    ours = net_logits(net, tokens=case.tokens)
    scale = np.abs(logits).max()
    np.testing.assert_allclose(
        ours[case.attended] / scale, logits[case.attended] / scale, rtol=0, atol=TOLERANCE[dtype]
    )
    for plan in (Plan(), Plan(base=True)):
        our_loss, _, _ = loss_and_grads(net, **case.batch, plan=plan)
        assert our_loss == pytest.approx(loss, rel=TOLERANCE[dtype]), plan


def check_gradients(case: Case, net: Net, dbase, dlora, plan: Plan, worst, tolerance) -> None:
    _, our_dbase, our_dlora = loss_and_grads(net, **case.batch, plan=plan)
    assert (our_dbase is not None) == plan.base
    assert (our_dlora is not None) == plan.lora
    for ours, theirs in ((our_dbase, dbase), (our_dlora, dlora)):
        if ours is not None:
            found = worst(ours, theirs)
            assert found.error < tolerance, f"{plan}: {found}"


@each_dtype
@settings(max_examples=150)
@given(case=cases())
def test_an_adapted_model_agrees_with_autograd(twin, make_model, worst, dtype, case):
    net = make_model(case.config, case.lora_config, seed=case.seed, dtype=dtype, tied=case.tied)
    loss, logits, dbase, dlora = oracle_loss_and_grads(twin(net), case)
    check_loss_and_logits(case, net, loss, logits, dtype)
    for plan in PLANS:
        check_gradients(case, net, dbase, dlora, plan, worst, TOLERANCE[dtype])


@each_dtype
@settings(max_examples=50)
@given(case=cases(adapted=False))
def test_a_base_alone_agrees_with_autograd(twin, make_model, worst, dtype, case):
    net = make_model(case.config, None, seed=case.seed, dtype=dtype, tied=case.tied)
    loss, logits, dbase, dlora = oracle_loss_and_grads(twin(net), case)
    assert dlora == {}
    check_loss_and_logits(case, net, loss, logits, dtype)
    check_gradients(case, net, dbase, dlora, Plan(base=True), worst, TOLERANCE[dtype])


def test_every_target_alone_agrees_with_autograd(twin, make_model, worst):
    config = GPTConfig(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, n_inner=12)
    tokens, targets = np.random.default_rng(0).integers(config.vocab_size, size=(2, 2, 6))
    for seed, target in enumerate(TARGETS):
        lora_config = LoRAConfig(rank=2, alpha=3.0, targets=(target,))
        case = Case(config, lora_config, tokens, targets, np.ones((2, 6), bool), -100, seed, True)
        net = make_model(config, lora_config, seed=seed, dtype=np.float64)
        _, _, dbase, dlora = oracle_loss_and_grads(twin(net), case)
        assert all(np.abs(gradient).max() > 1e-6 for gradient in dlora.values()), target
        check_gradients(case, net, dbase, dlora, Plan(base=True, lora=True), worst, 1e-9)


def test_transformers_own_loss_is_ours_of_the_next_token(twin, make_model):
    """GPT2LMHeadModel shifts its labels; we are given the targets of each position."""
    import torch

    config = GPTConfig(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    net = make_model(config, None, seed=0, dtype=np.float32)
    text = np.random.default_rng(0).integers(config.vocab_size, size=(3, 8))
    labels = np.where(np.arange(8) < np.array([[8], [5], [2]]), text, -100)
    expected = twin(net).model(input_ids=torch.from_numpy(text), labels=torch.from_numpy(labels))
    loss, _, _ = loss_and_grads(net, tokens=text[:, :-1], targets=labels[:, 1:], plan=Plan())
    assert float(loss) == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize("ignored", [-100, -1, 0, 10, 11])
@pytest.mark.parametrize("target", [-300, -100, -1, 0, 10, 11])
def test_a_target_is_refused_where_torch_refuses_it_and_ignored_where_torch_ignores_it(
    make_model, target, ignored
):
    import torch

    config = GPTConfig(vocab_size=11, n_positions=4, n_embd=8, n_layer=1, n_head=2)
    net = make_model(config, None, seed=0, dtype=np.float64)
    tokens, targets = np.array([[1, 2, 3, 4]]), np.array([[5, 6, target, 7]])
    options = {"tokens": tokens, "targets": targets, "plan": Plan(), "ignore_index": ignored}
    logits = torch.from_numpy(net_logits(net, tokens=tokens)[0])
    try:
        expected = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(targets[0]), ignore_index=ignored
        )
    except IndexError:
        with pytest.raises(MiniloraError, match=f"target {target} is outside"):
            loss_and_grads(net, **options)
    else:
        assert float(loss_and_grads(net, **options)[0]) == pytest.approx(expected.item(), rel=1e-9)


def test_an_adapted_embedding_leaves_the_tied_head_as_it_is(twin, make_model):
    """In PEFT as here: wte's adapter changes what goes in, not the head that shares its table."""
    config = GPTConfig(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    lora_config = LoRAConfig(rank=2, targets=("embedding",))
    net = make_model(config, lora_config, seed=0, dtype=np.float64)
    model = twin(net).model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(embedding).__module__.startswith("peft"), "wte is not adapted"
    assert not type(head).__module__.startswith("peft"), "lm_head is adapted"
    assert head.weight is embedding.base_layer.weight
    assert np.array_equal(head.weight.detach().numpy(), net.base["wte"])
