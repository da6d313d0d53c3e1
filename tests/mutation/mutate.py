"""Breaks every backward pass in every small way, and sees whether the gradient checks notice.

    python tests/mutation/mutate.py [WORD]

Each mutant is one change of one expression or statement in a backward pass (or in a helper that it
calls): a term dropped, a sign flipped, a transpose left out, a reduction over another axis, two
gradients swapped, another variable, … It is held against central differences of the *unchanged*
forward passes, and it is killed when a check fails or an error is raised. One that survives must be
named in `EXPLAINED`, with the reason why no test could tell it from the original.

Prints one line per function, and below it each survivor with its explanation; WORD limits the run
to the functions whose name contains it.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import re
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilora import gpt, lora, ops
from minilora.errors import MiniloraError
from minilora.gradcheck import assert_close, check_pair, check_tree
from minilora.lora import LoRAConfig, lora_init
from minilora.pairs import PAIRS, Case, Sizes, tiny_model
from minilora.tree import flatten, map_leaves

INFERRED_SIDE = "NumPy infers the side that is given as any negative number, -1 or -2."
SECOND_TO_LAST = "Of four axes, 2 and -2 are the same."
ALIKE = "The arrays are of one shape and dtype."
SYMMETRIC = "The order of the two does not matter."
NOT_HERE = "Where the target is in another part, any column will do: 0 is subtracted there."
MAXIMUM_CANCELS = "The maximum cancels; tests/ops sees huge logits and changed arguments."
ONE_DEVICE = "All of the cache lies on one device."

# Survivors, by "function: before → after", and why the result is the same.
EXPLAINED = {
    "rows: return x.reshape(-1, x.shape[-1]) → return x.reshape(-2, x.shape[-1])": INFERRED_SIDE,
    "embedding_backward: namespace(dy).add.at(dtable, index.reshape(-1), rows(dy)) → "
    "namespace(dy).add.at(dtable, index.reshape(-2), rows(dy))": INFERRED_SIDE,
    "position_backward: dwpe[offset:offset + T] = dy.reshape(-1, T, dy.shape[-1]).sum(axis=0) → "
    "dwpe[offset:offset + T] = dy.reshape(-2, T, dy.shape[-1]).sum(axis=0)": INFERRED_SIDE,
    "lora_embedding_backward: namespace(dy).add.at(dA, index.reshape(-1), drows) → "
    "namespace(dy).add.at(dA, index.reshape(-2), drows)": INFERRED_SIDE,
    "attention_backward: dv[..., s, :] += P.swapaxes(-1, -2) @ dy_heads[..., t, :] → "
    "dv[..., s, :] += P.swapaxes(-1, 2) @ dy_heads[..., t, :]": SECOND_TO_LAST,
    "attention_backward: dP = dy_heads[..., t, :] @ v[..., s, :].swapaxes(-1, -2) → "
    "dP = dy_heads[..., t, :] @ v[..., s, :].swapaxes(-1, 2)": SECOND_TO_LAST,
    "attention_backward: dk[..., s, :] += dS.swapaxes(-1, -2) @ q[..., t, :] → "
    "dk[..., s, :] += dS.swapaxes(-1, 2) @ q[..., t, :]": SECOND_TO_LAST,
    "attention_weights: n, K = q.shape[-2:] → n, K = q.shape[2:]": SECOND_TO_LAST,
    "attention_weights: scores = q * (1.0 / math.sqrt(K)) @ k.swapaxes(-1, -2) → "
    "scores = q * (1.0 / math.sqrt(K)) @ k.swapaxes(-1, 2)": SECOND_TO_LAST,
    "causal_mask: return xp.triu(xp.full((n, n), -math.inf, dtype=like.dtype), 1) → "
    "return xp.triu(xp.full((n, n), -math.inf), 1)": "Added in place it takes the scores' dtype.",
    "causal_blocks: stop = min(start + queries, T) → stop = min(T, start + queries)": SYMMETRIC,
    "softmax_forward: y = x - x.max(axis=-1, keepdims=True) → y = x": MAXIMUM_CANCELS,
    "softmax_forward: y = x - x.max(axis=-1, keepdims=True) → "
    "y = x + x.max(axis=-1, keepdims=True)": MAXIMUM_CANCELS,
    "softmax_forward: y = x - x.max(axis=-1, keepdims=True) → "
    "y = x - x.max(keepdims=True)": MAXIMUM_CANCELS,
    "attention_backward: B, heads, T, K = q.shape → B, heads, T, K = k.shape": (
        "Queries and keys have the same shape."
    ),
    "entrywise: flat = [x.reshape(-1) for x in xs] → flat = [x.reshape(-2) for x in xs]": (
        INFERRED_SIDE
    ),
    "entrywise: y = np.empty_like(flat[0]) → y = np.empty_like(flat[1])": ALIKE,
    "entrywise: y = np.empty_like(flat[0]) → y = np.empty_like(flat[-1])": ALIKE,
    "entrywise: return y.reshape(xs[0].shape) → return y.reshape(xs[1].shape)": ALIKE,
    "entrywise: return y.reshape(xs[0].shape) → return y.reshape(xs[-1].shape)": ALIKE,
    "layer_norm_backward: along = dots(dx, xhat) / dy.shape[-1] → "
    "along = dots(xhat, dx) / dy.shape[-1]": SYMMETRIC,
    "softmax_backward: dx = dy - dots(dy, y) → dx = dy - dots(y, dy)": SYMMETRIC,
    "vocabulary_parts: part = slice(start, min(start + chunk, table.shape[0])) → "
    "part = slice(start, min(table.shape[0], start + chunk))": SYMMETRIC,
    "vocabulary_parts: column = namespace(target).where(has_target, target - start, 0) → "
    "column = namespace(target).where(has_target, target - start, -1)": NOT_HERE,
    "loss_and_grads: x, trunk = trunk_forward(base, lora, tokens=tokens, config=config, "
    "lora_config=lora_config, masks=masks, frozen=frozen, recompute=recompute) → "
    "x, trunk = trunk_forward(base, lora, tokens=tokens, config=config, "
    "lora_config=lora_config, masks=masks, frozen=frozen)": (
        "Computing again gives the same bits; tests/budget sees the memory."
    ),
    "loss_and_grads: loss, head = head_loss_forward(x, head_table(base), targets=targets, "
    "ignore_index=ignore_index, count=count, frozen=frozen) → "
    "loss, head = head_loss_forward(x, head_table(base), targets=targets, "
    "ignore_index=ignore_index, count=count)": (
        "A gradient of the table that nobody asked for is dropped; tests/budget sees the memory."
    ),
    "head_loss_backward: xp = namespace(x) → xp = namespace(table)": ONE_DEVICE,
    "head_loss_backward: x_rows, n = (rows(x), xp.arange(target.size)) → "
    "x_rows, n = (rows(x), xp.arange(lse.size))": "Every row has one target.",
    "cross_entropy_backward: xp = namespace(logits) → xp = namespace(lse)": ONE_DEVICE,
    "cross_entropy_backward: dlogits[xp.arange(target.size), target] -= 1.0 → "
    "dlogits[xp.arange(weight.size), target] -= 1.0": "Every target has one weight.",
    "_gelu_tanh: return np.tanh(u, out=u) → return np.tanh(u)": (
        "Writing into u saves an array and changes no number."
    ),
}


class Mutant(NamedTuple):
    """One change of one function: its module, its name, the change in words, the changed code."""

    module: types.ModuleType
    function: str
    change: str
    code: types.CodeType

    @property
    def name(self) -> str:
        return f"{self.function}: {self.change}"


# --- what to break -------------------------------------------------------------------------------


def backward_functions(module: types.ModuleType, tree: ast.Module) -> list[ast.FunctionDef]:
    """The module's backward passes, loss_and_grads, and the helpers that the former call."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found = [name for name in functions if name.endswith("_backward")]
    for name in found:  # grows while it is walked: helpers of helpers count as well
        called = {node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)}
        found += [name for name in functions if name in called and name not in found]
    if module is gpt:
        found.append("loss_and_grads")
    return [functions[name] for name in functions if name in found]


# --- how to break it -----------------------------------------------------------------------------

UNPACKED = re.compile(r"^( *)\(([\w, ]+, \w+)\) =", re.MULTILINE)  # "(a, b) = …" in Python 3.10
SWAPPED_OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
SWAPPED_ATTRIBUTES = {
    "sum": "mean",
    "mean": "sum",
    "zeros_like": "ones_like",
    "ln_1": "ln_2",
    "ln_2": "ln_1",
    "up": "down",
    "down": "up",
    "qkv": "o",
    "o": "qkv",
}


def swapped(operator: ast.AST) -> ast.AST:
    return SWAPPED_OPERATORS[type(operator)]()


def negated(value: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.USub(), value)


def zeroed(value: ast.expr) -> ast.expr:
    return ast.BinOp(value, ast.Mult(), ast.Constant(0))


def transposed(value: ast.expr) -> ast.expr:
    return ast.Attribute(value, "T", ast.Load())


def is_transposed(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "T"


def variants(node: ast.AST, names: list[str]) -> Iterator[ast.AST | None]:
    """Every changed form of one node; None deletes a statement. The node itself is left alone.

    `names` are the function's own variables: each use of one becomes a use of the next.
    """

    def changed(**fields: object) -> ast.AST:
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.BinOp(left, operator, right):
            yield left  # drop the right term or factor
            yield right
            if type(operator) in SWAPPED_OPERATORS:
                yield changed(op=swapped(operator))
            if isinstance(operator, ast.Sub | ast.MatMult | ast.Div):
                yield changed(left=right, right=left)
            if isinstance(operator, ast.MatMult):
                if not is_transposed(left):
                    yield changed(left=transposed(left))
                if not is_transposed(right):
                    yield changed(right=transposed(right))
        case ast.UnaryOp(ast.USub(), operand):
            yield operand
        case ast.Compare(_, [operator], _):
            if type(operator) in SWAPPED_OPERATORS:
                yield changed(ops=[swapped(operator)])
        case ast.Constant(bool() as value):
            yield changed(value=not value)
        case ast.Constant(int() | float() as value):
            yield changed(value=value + 1)
            yield changed(value=value - 1)
            if value not in (0, 1, 2):
                yield changed(value=value * 2)
        case ast.Attribute(value, "T"):
            yield value
        case ast.Attribute(_, str() as name) if name in SWAPPED_ATTRIBUTES:
            yield changed(attr=SWAPPED_ATTRIBUTES[name])
        case ast.Name(str() as name, ast.Load()) if name in names:
            yield changed(id=names[(names.index(name) + 1) % len(names)])
        case ast.Call(ast.Attribute(value, "swapaxes"), _):
            yield value
        case ast.Call(_, [first, second, *rest], keywords):
            yield changed(args=[second, first, *rest])
            yield from (
                changed(keywords=keywords[:i] + keywords[i + 1 :]) for i in range(len(keywords))
            )
        case ast.Call(_, _, [*keywords]) if keywords:
            yield from (
                changed(keywords=keywords[:i] + keywords[i + 1 :]) for i in range(len(keywords))
            )
        case ast.Slice(lower, upper):
            if lower is not None:
                yield changed(lower=None)
            if upper is not None:
                yield changed(upper=None)
        case ast.IfExp(_, body, orelse):
            yield body
            yield orelse
        case ast.If(test):
            yield changed(test=ast.Constant(value=True))
            yield changed(test=ast.Constant(value=False))
            yield changed(test=ast.UnaryOp(ast.Not(), test))
        case ast.For(_, iterator, _):
            if isinstance(iterator, ast.Call) and len(iterator.args) == 1:
                yield changed(iter=iterator.args[0])  # without `reversed`
        case ast.AugAssign(target, operator, value):
            yield None
            if type(operator) in SWAPPED_OPERATORS:
                yield changed(op=swapped(operator))
            yield ast.Assign(
                [ast.Name(target.id, ast.Store())] if isinstance(target, ast.Name) else [target],
                value,
            )
        case ast.Expr(ast.Call()):
            yield None
        case ast.Assign([ast.Tuple(targets)], value) if is_unpacking_a_cache(value):
            for i in range(len(targets) - 1):  # take one entry of the cache for the next
                order = [*targets[:i], targets[i + 1], targets[i], *targets[i + 2 :]]
                yield changed(targets=[ast.Tuple(order, ast.Store())])
        case ast.Assign([target], ast.BinOp() | ast.Call() as value):
            if isinstance(target, ast.Subscript):
                yield None
            if not is_allocation(value):
                yield changed(value=negated(value))
                yield changed(value=zeroed(value))
        case ast.Return(ast.Tuple(elements)):
            for i, element in enumerate(elements):
                for new in (negated(element), zeroed(element), ast.Constant(value=None)):
                    yield changed(
                        value=ast.Tuple([*elements[:i], new, *elements[i + 1 :]], ast.Load())
                    )
            for i in range(len(elements) - 1):
                order = [*elements[:i], elements[i + 1], elements[i], *elements[i + 2 :]]
                yield changed(value=ast.Tuple(order, ast.Load()))
        case ast.Return(value) if value is not None:
            yield changed(value=negated(value))
            yield changed(value=zeroed(value))
        case ast.Dict(_, values):
            for i in range(len(values) - 1):
                order = [*values[:i], values[i + 1], values[i], *values[i + 2 :]]
                yield changed(values=order)


def is_unpacking_a_cache(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and "cache" in value.id


def is_allocation(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and getattr(value.func, "attr", "") in (
        "empty",
        "empty_like",
        "zeros",
        "zeros_like",
    )


def slots(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Every place below a node that holds another one: its parent, the field, the index in it."""
    for field, value in ast.iter_fields(node):
        if isinstance(value, ast.arguments) or field in ("annotation", "returns"):
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not is_for_a_gpu(child):
                yield node, field, i
                yield from slots(child)


def is_for_a_gpu(node: ast.AST) -> bool:
    """Whether the statement calls a kernel: no check here runs it; tests/standin plants there."""
    return isinstance(node, ast.If) and "is not np" in ast.unparse(node.test)


def mutants_of(module: types.ModuleType) -> Iterator[Mutant]:
    """Every mutant of a module, in the order of its source; no two of a function are the same."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    for function in backward_functions(module, tree):
        original, seen = ast.unparse(function), {ast.unparse(function)}
        stored = (node for node in ast.walk(function) if isinstance(node, ast.Name))
        names = list(dict.fromkeys(n.id for n in stored if isinstance(n.ctx, ast.Store)))
        for parent, field, i in list(slots(function)):
            node = getattr(parent, field) if i is None else getattr(parent, field)[i]
            for variant in variants(node, names):
                new = ast.Pass() if variant is None else variant
                put(parent, field, i, new)
                ast.fix_missing_locations(function)
                text = ast.unparse(function)
                if text not in seen:
                    seen.add(text)
                    code = compile(ast.Module([function], []), f"<{function.name}>", "exec")
                    yield Mutant(module, function.name, difference(original, text), code)
                put(parent, field, i, node)


def put(parent: ast.AST, field: str, i: int | None, node: ast.AST) -> None:
    if i is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[i] = node


def difference(before: str, after: str) -> str:
    """The lines that differ, as "before → after", as every version of Python writes them."""
    old, new = (UNPACKED.sub(r"\1\2 =", text).splitlines() for text in (before, after))
    while old and new and old[0] == new[0]:
        old, new = old[1:], new[1:]
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    return " → ".join("; ".join(line.strip() for line in lines) for lines in (old, new))


def executed(mutant: Mutant) -> types.SimpleNamespace:
    """The names of the mutant's module with the changed function, which all the others now call."""
    names = dict(vars(mutant.module))
    for name, f in list(names.items()):
        if isinstance(f, types.FunctionType) and f.__module__ == mutant.module.__name__:
            names[name] = types.FunctionType(f.__code__, names, name, f.__defaults__, f.__closure__)
            names[name].__kwdefaults__ = f.__kwdefaults__
    if "BLOCK" in names:
        names["BLOCK"] = 3  # so that small arrays have several
    exec(mutant.code, names)
    return types.SimpleNamespace(**names)


# --- whether it is noticed -----------------------------------------------------------------------


# No two sizes of one call are equal, so that none can stand for another.
SIZES = (Sizes(lead=(3, 5), C=4, O=6, R=2, V=7, H=2), Sizes(lead=(2,), C=3, O=1, R=5, V=4, H=3))


def check_the_pairs(mutated: types.SimpleNamespace, function: str) -> None:
    """Checks the pairs that a function takes part in, with its backward from the mutated module."""
    helper = not function.endswith("_backward")
    for name, pair in PAIRS.items():
        backward = getattr(mutated, pair.backward.__name__, None)
        if backward is None or not (helper or function in (backward.__name__, *calls(backward))):
            continue
        for sizes in SIZES:
            arguments, constants = pair.make(np.random.default_rng(len(name)), sizes)
            checks = check_pair(
                pair.forward, backward, arguments, constants, entries=6, frozen=pair.frozen
            )
            assert_close(checks)
            check_float32(pair.forward, backward, arguments, constants)


def calls(f: types.FunctionType) -> tuple[str, ...]:
    return f.__code__.co_names


def check_float32(
    forward: Callable, backward: Callable, arguments: list[np.ndarray], constants: dict
) -> None:
    """Requires float32 gradients of float32 arguments."""
    constants = {
        key: value.astype(np.float32) if getattr(value, "dtype", None) == np.float64 else value
        for key, value in constants.items()
    }
    y, cache = forward(*(x.astype(np.float32) for x in arguments), **constants)
    for gradient in backward(np.ones_like(y), cache):
        assert gradient is None or gradient.dtype == np.float32


class ModelCheck:
    """Holds a whole model's gradients against differences of the original loss.

    No mutant changes that loss, so each of its values is computed once and remembered.
    """

    def __init__(self, case: Case, wrt: str, *, recompute: bool = False) -> None:
        self.wrt, self.recompute = wrt, recompute
        self.constants = case._asdict()
        self.trees = {"base": self.constants.pop("base"), "lora": self.constants.pop("lora")}
        self.constants["targets"] = np.where(case.targets == -100, -1, case.targets)
        self.constants |= {"ignore_index": -1, "count": 9}
        self.trained = {key: tree for key, tree in self.trees.items() if wrt in (key, "both")}
        self.flat = flatten(self.trained)
        self.losses: dict[tuple, float] = {}
        everything = [*self.trees.values(), *(case.masks or {}).values()]
        map_leaves(lambda x: x.setflags(write=False), everything)

    def loss(self, flat: dict[str, np.ndarray]) -> float:
        moved = [(path, x.tobytes()) for path, x in flat.items() if x is not self.flat[path]]
        if (key := tuple(moved)) not in self.losses:
            leaves = iter(flat.values())
            trees = {**self.trees, **map_leaves(lambda _: next(leaves), self.trained)}
            self.losses[key] = gpt.loss_and_grads(**trees, **self.constants, wrt=self.wrt)[0]
        return float(self.losses[key])

    def __call__(self, mutated: types.SimpleNamespace) -> None:
        loss, *gradients = mutated.loss_and_grads(
            **self.trees, **self.constants, wrt=self.wrt, recompute=self.recompute
        )
        named = zip(self.trees, gradients, strict=True)
        given = {key: gradient for key, gradient in named if gradient is not None}
        assert_close(check_tree(self.loss, self.flat, flatten(given), entries=2))
        assert float(loss) == self.loss(self.flat)


def model_checks() -> list[ModelCheck]:
    """The small model with all its adapters; and a deeper one without any in its first block."""
    case = tiny_model()
    base = {**case.base, "blocks": [*case.base["blocks"], case.base["blocks"][0]]}
    config = dataclasses.replace(case.config, n_layer=3)
    lora_config = LoRAConfig(rank=2, alpha=2.0, targets=("[12].attn.qkv",))
    adapters = map_leaves(lambda x: x + 0.3, lora_init(base, lora_config, seed=0))
    deep = case._replace(
        base=base, lora=adapters, config=config, lora_config=lora_config, masks=None
    )
    in_mlp = LoRAConfig(rank=2, alpha=2.0, targets=("mlp.up", "mlp.down"))
    lora = map_leaves(lambda x: x + 0.3, lora_init(case.base, in_mlp, seed=0))
    above = case._replace(lora=lora, lora_config=in_mlp, masks=None)
    untied = case._replace(base={**case.base, "head": case.base["wte"] + 0.3})
    return [
        ModelCheck(case, "lora"),
        ModelCheck(deep, "lora"),
        ModelCheck(deep, "base"),
        ModelCheck(case, "both", recompute=True),
        ModelCheck(above, "lora"),
        ModelCheck(untied, "both"),
    ]


def check_the_logits(mutated: types.SimpleNamespace) -> None:
    """Requires that gpt_backward, of the loss's dlogits, gives what loss_and_grads does."""
    case = tiny_model()
    constants = case._asdict()
    base, lora, targets = (constants.pop(name) for name in ("base", "lora", "targets"))
    for given in (base, {**base, "head": base["wte"] + 0.3}):
        _, *expected = gpt.loss_and_grads(given, lora, targets=targets, **constants, wrt="both")
        logits, cache = gpt.gpt_forward(given, lora, **constants)
        _, loss_cache = ops.cross_entropy_forward(logits, targets=targets)
        (dlogits,) = ops.cross_entropy_backward(1.0, loss_cache)
        for found, tree in zip(mutated.gpt_backward(dlogits, cache), expected, strict=True):
            found, flat = flatten(found), flatten(tree)
            assert found.keys() == flat.keys()
            assert all(np.allclose(found[path], flat[path], rtol=1e-9) for path in flat)


def check_the_refusal(mutated: types.SimpleNamespace) -> None:
    """Requires that gradients of adapters that are not there are refused, and of a base are not."""
    case, loss_and_grads = tiny_model(), mutated.loss_and_grads
    arguments = {"tokens": case.tokens, "targets": case.targets, "config": case.config}
    loss_and_grads(case.base, **arguments, wrt="base")
    for wrt in ("lora", "both"):
        try:
            loss_and_grads(case.base, **arguments, wrt=wrt)
        except MiniloraError:
            continue
        raise AssertionError(f"wrt={wrt!r} without adapters was not refused")


class Result(NamedTuple):
    """How a mutant fared: noticed by a "check", it "raised" an error of its own, or "survived"."""

    mutant: Mutant
    fate: str


def fate(mutant: Mutant, check: Callable[[types.SimpleNamespace, str], None]) -> str:
    try:
        check(executed(mutant), mutant.function)
    except AssertionError:
        return "check"
    except Exception:
        return "raised"
    return "survived"


def results(word: str = "", make: Callable = mutants_of) -> Iterator[Result]:
    """Every mutant of ops, lora and gpt, and how it fared."""
    checks = [*model_checks(), check_the_logits, check_the_refusal]

    def check_the_model(mutated: types.SimpleNamespace, function: str) -> None:
        for check in checks:
            check(mutated)

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for module in (ops, lora, gpt):
            for mutant in make(module):
                if word in mutant.function:
                    check = check_the_model if module is gpt else check_the_pairs
                    yield Result(mutant, fate(mutant, check))


def shares(found: list[Result]) -> tuple[float, float]:
    """The share killed of all mutants, and of those that do not raise an error by themselves."""
    fates = Counter(result.fate for result in found)
    killed = fates["check"] + fates["raised"]
    return killed / len(found), fates["check"] / (len(found) - fates["raised"])


def main(words: list[str]) -> None:
    start = time.perf_counter()
    found = list(results(*words))
    print(f"{'function':26s} mutants  noticed by a check  raised  survived")
    for function in dict.fromkeys(result.mutant.function for result in found):
        of_function = [result for result in found if result.mutant.function == function]
        print(line(function, of_function))
        for mutant in (result.mutant for result in of_function if result.fate == "survived"):
            print(f"    {mutant.change}\n        {EXPLAINED.get(mutant.name, 'NOT EXPLAINED')}")
    print(line("all", found))
    of_all, of_quiet = shares(found)
    print(
        f"killed: {of_all:.1%} of all, {of_quiet:.1%} of those that raise nothing by themselves, "
        f"in {time.perf_counter() - start:.0f} s"
    )


def line(name: str, found: list[Result]) -> str:
    fates = Counter(result.fate for result in found)
    counts = f"{fates['check']:20d}{fates['raised']:8d}{fates['survived']:10d}"
    return f"{name:26s}{len(found):8d}{counts}"


if __name__ == "__main__":
    main(sys.argv[1:])
