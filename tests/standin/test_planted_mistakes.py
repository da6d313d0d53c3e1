"""Mistakes planted in the library itself are noticed on the stand-in: this is what it is for.

Every call of `xp.f` becomes `np.f`, every `to_device` and `to_host` is left out, every array that
starts at zero starts as it finds the memory, and every kernel gets two arguments swapped; a few
more mistakes are planted by hand. After each change the library trains, evaluates, generates,
merges and writes files once more.
"""

import __future__

import ast
import contextlib
import copy
import dataclasses
import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

import numpy as np
import pytest
from strict_cupy import COPIES

import minilora
from minilora import kernels, model, ops, optim, tree
from minilora.adapters import LoRAConfig, lora_init
from minilora.backend import load_cupy, to_device, to_device_in_half, to_host
from minilora.data import Corpus
from minilora.evaluation import evaluate_tokens
from minilora.formats import load_adapter
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.keep import Plan
from minilora.kernels import gelu_gradient
from minilora.mixing import mix
from minilora.model import Model, complete
from minilora.network import loss_and_grads
from minilora.ops import normalise_forward
from minilora.pairs import PAIRS, tiny_llama, tiny_model
from minilora.tokenizer import ByteTokenizer
from minilora.training import loop
from minilora.training.loop import TrainConfig
from minilora.training.runs import adapt, adapt_in_folder

PACKAGE = Path(minilora.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in sorted((*PACKAGE.glob("*.py"), *PACKAGE.glob("training/*.py")))
    if any(f"{word}(" in path.read_text("utf-8") for word in ("namespace", "to_device", "to_host"))
    and path.stem not in ("pairs", "kernels", "ranks")  # run in tests of their own
]
# Changes that no device can notice, by "module.function: before → after", and why.
EXPLAINED = {
    "training.checkpoint.save_checkpoint: to_host(trees) → trees": "write_tensors does it as well.",
    "training.loop.save: to_host(state.params) → state.params": "Only several processes come here.",
}

# --- what is done after each change --------------------------------------------------------------

CONFIG = GPTConfig(vocab_size=256, n_positions=8, n_embd=4, n_layer=2, n_head=2)
LORA_CONFIG = LoRAConfig(rank=1, targets=("qkv", "o", "up", "down"), dropout=0.2)
SETTINGS = TrainConfig(
    steps=5, batch=2, context=6, lr=0.1, warmup=1, threads=1, log_every=2, eval_every=5,
    eval_tokens=12, checkpoint_every=3,
)  # fmt: skip
PLANS = (Plan(lora=True), Plan(base=True, lora=True, recompute=True))


def a_model() -> Model:
    base = tree.map_leaves(lambda x: 10 * x, gpt_init(CONFIG, seed=0))
    return Model(base, CONFIG, tokenizer=ByteTokenizer(), folder=Path())


def a_corpus() -> Corpus:
    tokens = np.random.default_rng(0).integers(256, size=80, dtype=np.int32)
    return Corpus(tokens[:40], tokens[40:], 40, 40, 1, "a text")


def random_like(x: np.ndarray) -> np.ndarray:
    return (0.1 * np.random.default_rng(x.size).standard_normal(x.shape)).astype(x.dtype)


def on(place: str, parts: tuple[list, dict]) -> list:
    """A pair's arguments and constants, with their arrays on the device."""
    return tree.map_leaves(
        lambda x: to_device(x, place) if isinstance(x, np.ndarray) else x, list(parts)
    )


class Stopped(Exception):
    """Ends a training run before its end."""


def everything(place: str, folder: Path) -> dict[str, np.ndarray]:
    """Numbers from all that uses the device, by name; those of the host are the same."""

    def stop(progress: loop.Progress) -> None:
        if progress.step == 4:
            raise Stopped

    results = {}
    for name, (net, inputs) in {"GPT-2": tiny_model(), "Llama": tiny_llama()}.items():
        net, batch = net.on(place), to_device(inputs._asdict(), place)
        for plan in PLANS:
            parts = loss_and_grads(net, **batch, plan=plan)
            found = [part for part in parts if part is not None]
            results[f"gradients of {name}, {plan}"] = to_host(found)

    for name, pair in PAIRS.items():
        arguments, constants = on(place, pair.make(np.random.default_rng(0)))
        y, cache = pair.forward(*arguments, **constants)
        gradients = [dx for dx in pair.backward(y, pair.thin(cache)) if dx is not None]
        results[name] = to_host([y, *gradients])

    model, corpus = a_model(), a_corpus()
    full = dataclasses.replace(SETTINGS, method="full")
    _, trained = adapt(model.on(place), corpus, settings=full, device=place)
    # No values: a bias of keys has a gradient of rounding alone, of which AdamW makes whole steps.
    results["full params"] = tree.map_leaves(np.zeros_like, trained.params)
    results["full"] = list(map(np.array, vars(trained.history).values()))
    results["init"] = to_device(lora_init(model.on(place).base, LORA_CONFIG, seed=0), "cpu")
    with contextlib.suppress(Stopped):
        adapt_in_folder(
            model, corpus, LORA_CONFIG, SETTINGS, folder / place, device=place, report=stop
        )
    run = adapt_in_folder(
        model.on(place), corpus, LORA_CONFIG, SETTINGS, folder / place, device=place, resume=True
    )
    results["lora"] = list(map(np.array, vars(run.history).values()))

    lora, _ = load_adapter(folder / place, CONFIG)
    results["saved"] = tree.map_leaves(np.zeros_like, lora)
    adapted = model.with_adapter(tree.map_leaves(random_like, lora), LORA_CONFIG)
    figures = vars(evaluate_tokens(adapted, corpus.held_out, text_bytes=40, device=place))
    results["evaluation"] = {name: np.array(figure) for name, figure in figures.items()}
    adapted = adapted.on(place)
    results["text"] = np.array(list(complete(adapted, "a", max_tokens=10)))
    tokens = np.array([[1, 2, 3]])
    results["logits"] = adapted.logits(tokens)
    results["merged"] = adapted.merged().logits(tokens)
    parts = [(adapted.lora, adapted.lora_config)] * 2
    results["mixed"] = to_host(mix(parts, [0.5, 0.25])[0])
    loaded = model.on(place).with_adapters_from(folder / place)
    results["loaded"] = tree.map_leaves(np.zeros_like, to_host(loaded.lora))

    half = to_device_in_half(model.base, place) if place != "cpu" else rounded(model.base)
    results["half"] = to_host(half)
    on_half = dataclasses.replace(model, base=half)
    results["half, logits"] = np.zeros_like(on_half.logits(tokens))
    return tree.flatten(results)


def rounded(base: tree.Tree) -> tree.Tree:
    """What `to_device_in_half` makes of a base, in float32."""
    return tree.unflatten({
        path: x if x.ndim == 1 or path == "wpe" else x.astype(np.float16).astype(np.float32)
        for path, x in tree.flatten(base).items()
    })  # fmt: skip


class Noticed(AssertionError):
    """The device gave another number, dtype or kind of array than the host, or copied too often."""


def compare(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, leaf in expected.items():
        leaf = np.asarray(leaf)
        if type(actual[name]) is not type(leaf) or actual[name].dtype != leaf.dtype:
            raise Noticed(f"{name}: {type(actual[name])} of {getattr(actual[name], 'dtype', None)}")
        if not np.allclose(actual[name], leaf, rtol=1e-4, atol=1e-4 * np.abs(leaf).max(initial=0)):
            raise Noticed(f"{name} differs")


@pytest.fixture
def check(xp, tmp_path):
    """Runs everything on the device and compares with the host; raises where a mistake shows."""
    load_cupy()  # reads one number, the first time
    expected = everything("cpu", tmp_path / "expected")
    COPIES.reset()
    everything("cuda", tmp_path / "right")
    copies = (COPIES.to_host, COPIES.to_device)
    runs = iter(range(1000))

    def again() -> None:
        COPIES.reset()
        compare(everything("cuda", tmp_path / f"changed {next(runs)}"), expected)
        if (COPIES.to_host, COPIES.to_device) != copies:
            raise Noticed(f"{COPIES} instead of {copies}")

    again()  # nothing is wrong before anything is planted
    return again


# --- mistakes planted everywhere -----------------------------------------------------------------


class Plant(NamedTuple):
    """A function of the library, a change of one expression in it, and the changed code."""

    name: str
    function: FunctionType
    code: CodeType


def wrong(node: ast.expr) -> ast.expr | None:
    """The expression with a mistake in it, or None where there is no place for one."""
    if isinstance(node, ast.Call) and is_kernel(node.func):
        return ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
    if isinstance(node, ast.Attribute) and is_namespace(node.value):
        numpy = ast.parse("__import__('numpy')", mode="eval").body
        zeros = {"zeros": "empty", "zeros_like": "empty_like"}
        if node.attr in zeros:
            return ast.Attribute(node.value, zeros[node.attr], ast.Load())
        return ast.Attribute(numpy, node.attr, ast.Load())
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("to_device", "to_host"):
        return node.args[0]
    return None


def is_kernel(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "kernels"


def is_namespace(node: ast.expr) -> bool:
    is_call = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "namespace"
    return is_call or (isinstance(node, ast.Name) and node.id == "xp")


class Planting(ast.NodeTransformer):
    """Changes the expression of a given number, counted in the order of the source."""

    def __init__(self, number: int) -> None:
        self.number, self.change = number, ""

    def visit(self, node: ast.AST) -> ast.AST:
        changed = wrong(node) if isinstance(node, ast.expr) else None
        if changed is not None:
            self.number -= 1
            if self.number == -1:
                self.change = f"{ast.unparse(node)} → {ast.unparse(changed)}"
                return ast.copy_location(changed, node)
        return self.generic_visit(node)


def functions(module_name: str) -> Iterator[tuple[str, FunctionType, ast.FunctionDef]]:
    """The functions and methods of a module that no decorator hides."""
    module = importlib.import_module(f"minilora.{module_name}")
    source = Path(module.__file__).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        owner = getattr(module, node.name) if isinstance(node, ast.ClassDef) else module
        for part in inside:
            if isinstance(part, ast.FunctionDef) and not part.decorator_list:
                yield f"{module_name}.{part.name}", getattr(owner, part.name), part


def plants() -> Iterator[Plant]:
    """Every mistake that can be planted."""
    for module_name in MODULES:
        for name, function, node in functions(module_name):
            for number in range(1000):
                planting = Planting(number)
                changed = planting.visit(copy.deepcopy(node))
                if not planting.change:
                    break
                compiled = compile(
                    ast.fix_missing_locations(ast.Module([changed], [])),
                    name,
                    "exec",
                    flags=__future__.annotations.compiler_flag,
                )
                codes = (c for c in compiled.co_consts if isinstance(c, CodeType))
                code = next(c for c in codes if c.co_name == node.name)
                yield Plant(f"{name}: {planting.change}", function, code)


def test_every_mistake_in_the_library_is_noticed(check, monkeypatch):
    unnoticed, planted = [], list(plants())
    for plant in planted:
        with monkeypatch.context() as patch:
            patch.setattr(plant.function, "__code__", plant.code)
            try:
                check()
            except Exception:
                continue
            unnoticed.append(plant.name)
    assert len(planted) > 50
    assert set(unnoticed) <= set(EXPLAINED), "\n".join(set(unnoticed) - set(EXPLAINED))


# --- mistakes planted by hand --------------------------------------------------------------------


def gelu_with_a_keyword_of_numpy(x, *, scale, cubic):
    return ops.namespace(x).tanh(x, where=x > -math.inf)


def normalise_that_branches(x, *, eps=1e-5):
    """Reads a number from the device to choose what to do next."""
    if float((x * x).max()) > 0:
        return normalise_forward(x, eps=eps)
    return x, None


def dropout_with_a_constant_of_the_host(x, *, mask):
    return x * np.array(1.0, x.dtype), ops.DropoutCache(mask)


def norm_in_a_loop(grads, max_norm):
    """Adds up on the host: one copy for each leaf."""
    norm = math.sqrt(sum(float((g * g).sum()) for g in tree.flatten(grads).values()))
    scale = min(1.0, max_norm / (norm + 1e-6))
    first = next(iter(tree.flatten(grads).values()))
    norm = optim.namespace(first).asarray(np.float32(norm))
    return tree.map_leaves(lambda g: g * scale, grads), norm


def dropout_in_float64(x, *, mask):
    """A NumPy scalar where a Python float belongs: float32 becomes float64."""
    return np.float64(1.0) * x, ops.DropoutCache(mask)


def gradient_of_the_wrong_argument(dy, x, **constants):
    return gelu_gradient(x, dy, **constants)


def moments_on_the_host(params):
    zeros = tree.map_leaves(lambda p: np.zeros(p.shape, p.dtype), params)
    return optim.Moments(zeros, zeros)


BY_HAND = {
    "a keyword that CuPy lacks": (ops, "gelu", gelu_with_a_keyword_of_numpy),
    "a branch on a value": (ops, "normalise_forward", normalise_that_branches),
    "a host array": (ops, "dropout_forward", dropout_with_a_constant_of_the_host),
    "a kernel's arguments swapped": (kernels, "gelu_gradient", gradient_of_the_wrong_argument),
    "a host scalar in a loop": (loop, "clip_by_global_norm", norm_in_a_loop),
    "a scalar of NumPy": (ops, "dropout_forward", dropout_in_float64),
    "a tree on the host": (loop, "adamw_init", moments_on_the_host),
    "a model left on the host": (model, "to_device", lambda arrays, device: arrays),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_mistake_planted_by_hand_is_noticed(check, monkeypatch, name):
    module, attribute, mistake = BY_HAND[name]
    monkeypatch.setattr(module, attribute, mistake)
    with pytest.raises((Noticed, TypeError, IndexError)):
        check()
