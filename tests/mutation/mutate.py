"""Breaks every backward pass in every small way, and sees whether the gradient checks notice.

    python tests/mutation/mutate.py [WORD]

Each mutant is one change of one expression or statement in a backward pass, in a helper that it
calls, or in what decides what is kept for it: a term dropped, a sign flipped, a transpose left out,
a reduction over another axis, two gradients swapped, another variable, … Its gradients are compared
with central differences of the *unchanged* forward passes, and what it keeps and computes with what
follows from the shapes. It is killed when a check fails or an error is raised. One that survives
must be named in `EXPLAINED`, with the reason why no test could tell it from the original.

Prints one line per function, and below it each survivor with its explanation; WORD limits the run
to the functions whose name, such as ops.linear_backward, contains it.
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import copy
import dataclasses
import functools
import inspect
import re
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from minilora import fused, gpt2, keep, llama, llama_ops, lora, loss, network, ops, tiles
from minilora.adapters import LoRAConfig, adapters, lora_init
from minilora.errors import MiniloraError
from minilora.generate import new_cache, next_logits
from minilora.gradcheck import assert_close, check_pair, check_tree
from minilora.keep import Plan
from minilora.network import Net
from minilora.pairs import PAIRS, Batch, Pair, Sizes, tiny_llama, tiny_model
from minilora.tree import flatten, map_leaves

MODULES = (ops, llama_ops, loss, tiles, fused, lora, keep, gpt2, llama, network)
# Beside the backward passes, their helpers and all of `keep`: what they call from another module,
# and what decides what is kept for them.
BESIDE = {
    ops: ("LayerNormCache.output", "GELUCache.output"),
    llama_ops: ("RMSNormCache.output", "SwiGLUCache.output"),
    tiles: ("entrywise",),
    fused: ("gelu_gradient", "swiglu", "swiglu_gate_gradient"),
    network: ("trunk_forward", "_block_forward", "loss_and_grads"),
}
OF_MODELS = (lora, keep, gpt2, llama, network)
ALSO_OF_MODELS = (
    "ops.LayerNormCache.output", "ops.GELUCache.output", "ops.dropout_backward",
    "llama_ops.RMSNormCache.output", "llama_ops.SwiGLUCache.output", "llama_ops.rotary_forward",
)  # fmt: skip
# Called to recompute an output, which is not what is to be checked here.
FORWARD = {"affine_forward", "gelu", "scale_forward"}
# Formulas that a backward pass applies tile by tile, each with a fused form of its name.
FORMULAS = {
    "gelu_gradient": ops, "swiglu": llama_ops, "swiglu_gate_gradient": llama_ops
}  # fmt: skip
# So small that the arrays here have several.
TILES = ((ops, "QUERY_TILE", 2), (loss, "VOCAB_CHUNK", 3), (tiles, "TILE", 4))

SECOND_TO_LAST = "Of four axes, 2 and -2 are the same."
ALIKE = "The arrays are of one shape and dtype."
SYMMETRIC = "The order of the two does not matter."
NOT_HERE = "Where the target is in another chunk, any column will do: 0 is subtracted there."
ONE_DEVICE = "All of the cache lies on one device."
CACHE_UNUSED = "Attention recomputes P alone, and keeps it itself."
ON_A_GPU = "A GPU takes all queries as one tile."
NO_ADAPTER = "Either says that there is no adapter."
TWO_AXES = "Tokens are (B, T)."
AS_MANY = "A cache has as many entries as fields."
K_AND_V = "Keys and values have as many heads."
BOTH_DROPPED = "`keep` drops what either is made of, or neither."

# Survivors, by "module.function: before → after", and why the result is the same.
EXPLAINED: dict[str, str] = {
    "ops.normalise_backward: dx -= xhat * (dots(dxhat, xhat) / dxhat.shape[-1]) → "
    "dx -= xhat * (dots(xhat, dxhat) / dxhat.shape[-1])": SYMMETRIC,
    "ops.LayerNormCache.output: return affine_forward(self.normalise.xhat, self.affine.w, "
    "self.affine.b)[0] → "
    "return affine_forward(self.affine.w, self.normalise.xhat, self.affine.b)[0]": SYMMETRIC,
    "ops.softmax_forward: return (y, SoftmaxCache(y)) → "
    "return (y, SoftmaxCache(y) * 0)": CACHE_UNUSED,
    "ops.softmax_forward: return (y, SoftmaxCache(y)) → return (y, None)": CACHE_UNUSED,
    "ops.softmax_backward: dx = dy - dots(dy, y) → dx = dy - dots(y, dy)": SYMMETRIC,
    "ops.attention_weights: n, K = q.shape[-2:] → n, K = q.shape[2:]": SECOND_TO_LAST,
    "ops.attention_weights: S = q * (1.0 / math.sqrt(K)) @ k.swapaxes(-1, -2) → "
    "S = q * (1.0 / math.sqrt(K)) @ k.swapaxes(-1, 2)": SECOND_TO_LAST,
    "ops.attend_backward: dS *= 1.0 / math.sqrt(q.shape[-1]) → "
    "dS *= 1.0 / math.sqrt(k.shape[-1])": "Queries and keys have the same width.",
    "ops.query_tiles: stop = min(start + tile, T) → stop = min(T, start + tile)": SYMMETRIC,
    "ops.causal_mask: return xp.triu(xp.full((n, n), -math.inf, dtype=like.dtype), 1) → "
    "return xp.triu(xp.full((n, n), -math.inf), 1)": "Added in place it takes the scores' dtype.",
    "ops.attention_backward: tile = min(QUERY_TILE, T) if namespace(dy) is np else T → "
    "tile = min(QUERY_TILE, T)": ON_A_GPU,
    "ops.attention_backward: tile = min(QUERY_TILE, T) if namespace(dy) is np else T → "
    "tile = min(T, QUERY_TILE) if namespace(dy) is np else T": SYMMETRIC,
    "ops.attention_backward: tile = min(QUERY_TILE, T) if namespace(dy) is np else T → "
    "tile = min(QUERY_TILE, T) if namespace(dy) is np else K": ON_A_GPU,
    "ops.attention_backward: G = k.shape[1] → G = v.shape[1]": K_AND_V,
    "ops.attention_backward: for h in groups(q, k): → for h in groups(q, v):": K_AND_V,
    "llama_ops.rms_normalise_backward: "
    "dx = dxhat - xhat * (dots(dxhat, xhat) / dxhat.shape[-1]) → "
    "dx = dxhat - xhat * (dots(xhat, dxhat) / dxhat.shape[-1])": SYMMETRIC,
    "llama_ops.RMSNormCache.output: "
    "return scale_forward(self.normalise.xhat, self.scale.w)[0] → "
    "return scale_forward(self.scale.w, self.normalise.xhat)[0]": SYMMETRIC,
    "fused.swiglu: y = np.multiply(g, 0.5, out=out) → y = np.multiply(0.5, g, out=out)": SYMMETRIC,
    "loss.cross_entropy_backward: xp = namespace(logits) → xp = namespace(lse)": ONE_DEVICE,
    "loss.cross_entropy_backward: dlogits[xp.arange(target.size), target] -= 1.0 → "
    "dlogits[xp.arange(weight.size), target] -= 1.0": "Every target has one weight.",
    "loss.vocabulary_chunks: place = slice(start, min(start + VOCAB_CHUNK, "
    "table.shape[0])) → "
    "place = slice(start, min(table.shape[0], start + VOCAB_CHUNK))": SYMMETRIC,
    "loss.vocabulary_chunks: column = namespace(target).where(has_target, target - start, "
    "0) → "
    "column = namespace(target).where(has_target, target - start, -1)": NOT_HERE,
    "loss.head_loss_backward: xp = namespace(x) → xp = namespace(table)": ONE_DEVICE,
    "loss.head_loss_backward: dz[xp.arange(target.size), column] -= has_target → "
    "dz[xp.arange(lse.size), column] -= has_target": "Every row has one target.",
    "tiles.entrywise: y = np.empty_like(flat[0]) → y = np.empty_like(flat[1])": ALIKE,
    "tiles.entrywise: y = np.empty_like(flat[0]) → y = np.empty_like(flat[-1])": ALIKE,
    "tiles.entrywise: return y.reshape(xs[0].shape) → return y.reshape(xs[1].shape)": ALIKE,
    "tiles.entrywise: return y.reshape(xs[0].shape) → return y.reshape(xs[-1].shape)": ALIKE,
    "lora.adapted_linear_backward: if dx is not None and dx_lora is not None: → "
    "if dx is not None:": BOTH_DROPPED,
    "lora.adapted_linear_backward: if dx is not None and dx_lora is not None: → "
    "if dx_lora is not None:": BOTH_DROPPED,
    "lora.adapted_linear_backward: if dx is not None and dx_lora is not None: → "
    "if dx is not None or dx_lora is not None:": BOTH_DROPPED,
    "keep.without: parts = zip(kind._fields, cache, strict=True) → "
    "parts = zip(kind._fields, cache)": AS_MANY,
    "keep.without: parts = zip(kind._fields, cache, strict=True) → "
    "parts = zip(kind._fields, cache, strict=False)": AS_MANY,
    "keep.ending_at_lowest: adapted = [name for name in architecture.READS if plan.lora and "
    "adapters[name]] → "
    "adapted = [name for name in architecture.READS if adapters[name]]": (
        "Where neither base nor adapters are trained, nothing is kept whatever the end."
    ),
    "gpt2.embed_backward: return ({'wte': dwte, 'wpe': dwpe}, {}) → "
    "return ({'wte': dwte, 'wpe': dwpe}, None)": NO_ADAPTER,
    "llama.embed_backward: return ({'wte': dwte}, {}) → return ({'wte': dwte}, None)": NO_ADAPTER,
    "network.trunk_forward: if (end := (offset + tokens.shape[-1])) > net.config.n_positions: → "
    "if (end := (offset + tokens.shape[1])) > net.config.n_positions:": TWO_AXES,
    "network.trunk_forward: positions = architecture.positions(net.config, tokens.shape[-1], "
    "offset=offset, like=x) → "
    "positions = architecture.positions(net.config, tokens.shape[1], "
    "offset=offset, like=x)": TWO_AXES,
    "network.trunk_forward: below = plan.base or (plan.lora and adapter is not None) → "
    "below = plan.base or adapter is not None": (
        "Where no gradient is wanted, no block keeps anything whatever is below it."
    ),
    "network.trunk_backward: dx, dblock, dadapters = (dx, {}, {}) if kept is None else "
    "_block_backward(dx, net, kept) → "
    "dx, dblock, dadapters = (dnorm, {}, {}) if kept is None else "
    "_block_backward(dx, net, kept)": (
        "Below the block where the pass ends nothing is made of dx."
    ),
    "network.loss_and_grads: if plan.base: → if True:": (
        "The loss of a trained table is the same, and its gradient dropped; tests/bench "
        "counts the products."
    ),
}


class Mutant(NamedTuple):
    """One change of one function: its module, its name, the change in words, the changed code."""

    module: types.ModuleType
    function: str
    change: str
    code: types.CodeType

    @property
    def place(self) -> str:
        return f"{self.module.__name__.rpartition('.')[2]}.{self.function}"

    @property
    def name(self) -> str:
        return f"{self.place}: {self.change}"


# --- what to break -------------------------------------------------------------------------------


def functions_of(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """The functions and methods of a module, by name: "f" or "Class.f"."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            methods = (part for part in node.body if isinstance(part, ast.FunctionDef))
            found |= {f"{node.name}.{method.name}": method for method in methods}
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = node
    return found


def to_break(module: types.ModuleType, tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """The module's backward passes and those BESIDE, and the helpers that these call."""
    functions = functions_of(tree)
    beside = functions if module is keep else BESIDE.get(module, ())
    found = [name for name in functions if name.endswith("_backward") or name in beside]
    for name in found:  # grows while it is walked: helpers of helpers count as well
        called = {node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)}
        found += [other for other in functions if other in called - FORWARD - {*found}]
    return {name: node for name, node in functions.items() if name in found}


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
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Lt: ast.LtE,
    ast.GtE: ast.Gt,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
SWAPPED_ATTRIBUTES = {
    "sum": "mean",
    "mean": "sum",
    "zeros_like": "ones_like",
    "base": "lora",
    "lora": "base",
}
SWAPPED_PARTS = {
    "ln_1": "ln_2",
    "ln_2": "ln_1",
    "up": "down",
    "down": "up",
    "qkv": "o",
    "o": "qkv",
    "gate": "up",
    "rotary": "attention",
    "attention": "rotary",
    "swiglu": "gate",
}
SWAPPED_NAMES = {
    "OF_WEIGHTS": "OF_FACTORS",
    "OF_FACTORS": "OF_WEIGHTS",
    "OF_INPUTS": "INPUTS",
    "INPUTS": "OF_INPUTS",
}
THINNING = ("without", "wanted", "without_output")


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
        case ast.BoolOp(operator, values):
            yield from values  # for two, the other is dropped
            yield changed(op=swapped(operator))
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            yield operand
        case ast.Compare(_, [operator], _):
            if type(operator) in SWAPPED_OPERATORS:
                yield changed(ops=[swapped(operator)])
        case ast.Constant(str() as value) if value in SWAPPED_PARTS:
            yield changed(value=SWAPPED_PARTS[value])
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
        case ast.Name(str() as name) if name in SWAPPED_NAMES:
            yield changed(id=SWAPPED_NAMES[name])
        case ast.Call(ast.Name(str() as name), [first, *_]) if name in THINNING:
            yield first
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
        case ast.Set(elements) if len(elements) > 1:
            for i in range(len(elements)):
                yield changed(elts=elements[:i] + elements[i + 1 :])
        case ast.comprehension(ifs=[_]):
            yield changed(ifs=[])
        case ast.Dict(keys, values):
            for i in range(len(values)):
                yield changed(keys=keys[:i] + keys[i + 1 :], values=values[:i] + values[i + 1 :])
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
            if isinstance(child, ast.AST) and not (is_for_a_gpu(child) or is_inferred(node, child)):
                yield node, field, i
                yield from slots(child)


def is_for_a_gpu(node: ast.AST) -> bool:
    """Whether the statement calls a kernel: no check here runs it; tests/standin plants there."""
    return isinstance(node, ast.If) and "is not np" in ast.unparse(node.test)


def is_inferred(node: ast.AST, child: ast.AST) -> bool:
    """Whether this is the -1 of a reshape: NumPy infers a side from any negative number."""
    is_reshape = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "reshape"
    return is_reshape and ast.unparse(child) == "-1"


def mutants_of(module: types.ModuleType, *names: str) -> Iterator[Mutant]:
    """Every mutant of a module, in the order of its source; no two of a function are the same.

    With names, those of these functions alone.
    """
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    broken = {name: functions_of(tree)[name] for name in names} or to_break(module, tree)
    for name, function in broken.items():
        function.decorator_list = []
        original, seen = ast.unparse(function), {ast.unparse(function)}
        stored = (node for node in ast.walk(function) if isinstance(node, ast.Name))
        names = list(dict.fromkeys(n.id for n in stored if isinstance(n.ctx, ast.Store)))
        for parent, field, i in list(slots(function)):
            node = getattr(parent, field) if i is None else getattr(parent, field)[i]
            for variant in variants(node, names):
                new = ast.Pass() if variant is None else variant
                put(parent, field, i, new)
                text = ast.unparse(ast.fix_missing_locations(function))
                if text not in seen:
                    seen.add(text)
                    yield Mutant(module, name, difference(original, text), compiled(name, function))
                put(parent, field, i, node)


def put(parent: ast.AST, field: str, i: int | None, node: ast.AST) -> None:
    if i is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[i] = node


def compiled(name: str, function: ast.FunctionDef) -> types.CodeType:
    """The code of a function or, inside a class, for `super`, of a method."""
    body: list[ast.stmt] = [function]
    for outer in name.split(".")[:-1]:
        (definition,) = ast.parse(f"class {outer}: pass").body
        definition.body, body = body, [definition]
    flag = __future__.annotations.compiler_flag
    code = compile(ast.Module(body, []), f"<{name}>", "exec", flags=flag)
    for _ in name.split("."):
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType))
    return code


def difference(before: str, after: str) -> str:
    """The lines that differ, as "before → after", as every version of Python writes them."""
    old, new = (UNPACKED.sub(r"\1\2 =", text).splitlines() for text in (before, after))
    while old and new and old[0] == new[0]:
        old, new = old[1:], new[1:]
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    return " → ".join("; ".join(line.strip() for line in lines) for lines in (old, new))


def owner_and_function(module: types.ModuleType, name: str) -> tuple[Any, types.FunctionType]:
    """Where a function or method is found, and itself, without what decorates it."""
    class_name, _, name = name.rpartition(".")
    owner = getattr(module, class_name) if class_name else module
    return owner, inspect.unwrap(getattr(owner, name))


@contextlib.contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """The package with the changed function in the place of the right one, for everyone."""
    owner, function = owner_and_function(mutant.module, mutant.function)
    with contextlib.ExitStack() as stack:
        if owner is not mutant.module:
            method = with_code(function, mutant.code)
            stack.enter_context(patch.object(owner, function.__name__, method))
            yield
            return
        if FORMULAS.get(function.__name__) is mutant.module:  # or what is fused takes its place
            stack.enter_context(patch.object(tiles, "fused", types.SimpleNamespace()))
        stack.callback(setattr, function, "__code__", function.__code__)
        function.__code__ = mutant.code
        if function is tiles.entrywise:
            for name, module in FORMULAS.items():
                again = tiles.entrywise(inspect.unwrap(getattr(module, name)))
                stack.enter_context(patch.object(module, name, again))
        yield


def with_code(method: types.FunctionType, code: types.CodeType) -> types.FunctionType:
    """A method of other code; __class__, which `super` asks for, is where that uses it."""
    cells = dict(zip(method.__code__.co_freevars, method.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in code.co_freevars)
    return types.FunctionType(
        code, method.__globals__, method.__name__, method.__defaults__, closure
    )


# --- whether it is noticed: pairs ----------------------------------------------------------------

# No two sizes of one call are equal, so that none can stand for another.
SIZES = (Sizes(lead=(3, 5), C=4, O=6, R=2, V=7, H=2), Sizes(lead=(2,), C=3, O=1, R=5, V=4, H=3))


PARTLY_FROZEN = {
    "lora, B frozen": PAIRS["lora"]._replace(dropped={lora.LoRACache: ("h",)}, frozen=("B",)),
    "lora, embedding, B frozen": PAIRS["lora, embedding"]._replace(
        dropped={lora.LoRAEmbeddingCache: ("h",)}, frozen=("B",)
    ),
}


class PairCheck:
    """Compares a pair's gradients with differences of its original forward pass.

    Those of large numbers of float32 have to be float32 and finite. Each of the forward pass's
    results is computed once, before anything is changed, and remembered.
    """

    def __init__(self, name: str, pair: Pair, sizes: Sizes) -> None:
        self.pair, self.results = pair, dict[tuple, tuple]()
        self.reached = reached(pair.backward)
        self.arguments, self.constants = pair.make(np.random.default_rng(len(name)), sizes)
        self.singles = [np.float32(300.0) * x.astype(np.float32) for x in self.arguments]
        self.single_constants = {
            key: value.astype(np.float32) if getattr(value, "dtype", None) == np.float64 else value
            for key, value in self.constants.items()
        }

        @functools.wraps(pair.forward)
        def remembered(*arguments: np.ndarray, **constants: Any) -> tuple:
            key = tuple((x.dtype.char, x.tobytes()) for x in arguments)
            if key not in self.results:
                self.results[key] = pair.forward(*arguments, **constants)
            return copy.deepcopy(self.results[key])

        self.forward = remembered
        self()

    def __call__(self) -> None:
        checks = check_pair(
            self.forward, self.pair.backward, self.arguments, self.constants,
            entries=6, frozen=self.pair.frozen, thin=self.pair.thin,
        )  # fmt: skip
        assert_close(checks)
        y, cache = self.forward(*self.singles, **self.single_constants)
        for gradient in self.pair.backward(np.ones_like(y), self.pair.thin(cache)):
            if gradient is not None:
                assert gradient.dtype == np.float32
                assert np.isfinite(gradient).all(), "exp has no maximum taken out"


def as_printed(check: Callable[[], None]) -> None:
    """The check of a formula that has no fused form."""
    with patch.object(tiles, "fused", types.SimpleNamespace()):
        check()


def reached(function: Callable[..., Any]) -> set[str]:
    """The names, such as ops.rows, of a function and of those that it calls, and that they call."""
    found, left = set(), [function]
    while left:
        f = inspect.unwrap(left.pop())
        module = f.__module__.rpartition(".")[2]
        if f"{module}.{f.__name__}" not in found:
            found.add(f"{module}.{f.__name__}")
            called = (f.__globals__.get(name) for name in f.__code__.co_names)
            left += [g for g in called if getattr(g, "__module__", "").startswith("minilora.")
                     and isinstance(g, types.FunctionType)]  # fmt: skip
    applied = {name for name in FORMULAS if found & {f"ops.{name}", f"llama_ops.{name}"}}
    fused_forms = {f"fused.{name}" for name in applied}
    return found | fused_forms | ({"tiles.entrywise"} if applied else set())


# --- whether it is noticed: models ---------------------------------------------------------------


class ModelCheck:
    """Compares a whole model's gradients with differences of the original loss.

    And what it keeps and recomputes for them with what follows from the shapes.
    """

    def __init__(self, net: Net, batch: Batch, plan: Plan) -> None:
        self.net, self.plan, self.targets = net, plan, batch.targets
        self.inputs = {"tokens": batch.tokens, "masks": batch.masks}
        given = flatten([net.base, net.lora, self.inputs]).values()
        self.given = [x for x in given if x is not None]
        for x in self.given:
            x.setflags(write=False)
        names = [name for name in ("base", "lora") if getattr(plan, name)]
        self.trained = {name: getattr(net, name) for name in names}
        self.flat = flatten(self.trained)
        self.losses = dict[tuple, float]()
        self()

    def loss_and_grads(self, net: Net) -> tuple:
        targets = np.where(self.targets == -100, -1, self.targets)
        options = {"targets": targets, "ignore_index": -1, "count": 9}
        return network.loss_and_grads(net, **self.inputs, **options, plan=self.plan)

    def loss(self, flat: dict[str, np.ndarray]) -> float:
        key = tuple((path, x.tobytes()) for path, x in flat.items() if x is not self.flat[path])
        if key not in self.losses:
            leaves = iter(flat.values())
            moved = map_leaves(lambda _: next(leaves), self.trained)
            self.losses[key] = float(self.loss_and_grads(dataclasses.replace(self.net, **moved))[0])
        return self.losses[key]

    def __call__(self) -> None:
        loss, *gradients = self.loss_and_grads(self.net)
        assert float(loss) == self.loss(self.flat)
        named = zip(("base", "lora"), gradients, strict=True)
        given = {key: gradient for key, gradient in named if gradient is not None}
        assert shapes_of(given) == shapes_of(self.trained)
        if given:
            assert_close(check_tree(self.loss, self.flat, flatten(given), entries=2))
        self.check_what_is_kept()

    def check_what_is_kept(self) -> None:
        """The numbers kept for the backward pass; there, what is recomputed, and what is None."""
        x, cache = network.trunk_forward(self.net, **self.inputs, plan=self.plan)
        kept = sum(owner.size for owner in owners(cache, but=self.given))
        shapes = KeptByShapes(self.net, self.plan, has_masks=self.inputs["masks"] is not None)
        expected = self.inputs["tokens"].size * shapes.a_row() + shapes.tables(x.shape[1])
        assert kept == expected, f"{kept} numbers are kept"
        if self.trained:
            with counted_outputs() as outputs:
                dbase, dlora = network.trunk_backward(np.ones_like(x), cache)
            assert outputs.total() == shapes.outputs(), f"{outputs} are recomputed"
            for gradients, name in ((dbase, "base"), (dlora, "lora")):
                assert all(isinstance(block, dict) for block in gradients["blocks"])
                are_there = {leaf is not None for leaf in flatten(gradients).values()}
                assert are_there <= {name in self.trained}, f"{name}: needless, or missing"


def shapes_of(tree: Any) -> Any:
    return map_leaves(np.shape, tree)


def owners(cache: Any, *, but: list[np.ndarray]) -> list[np.ndarray]:
    """The arrays whose memory a cache holds, without those that were there before."""

    def owner(x: np.ndarray) -> np.ndarray:
        return x if x.base is None else owner(x.base)

    def arrays(part: Any) -> Iterator[np.ndarray]:
        if isinstance(part, np.ndarray):
            yield part
        elif isinstance(part, dict | list | tuple):
            for inner in part.values() if isinstance(part, dict) else part:
                yield from arrays(inner)

    there = {id(owner(x)) for x in but}
    found = {id(owner(x)): owner(x) for x in arrays(cache)}
    return [x for key, x in found.items() if key not in there]


@contextlib.contextmanager
def counted_outputs() -> Iterator[Counter[str]]:
    """Counts how often a cache recomputes its output."""
    calls = Counter[str]()

    def counting(output: Callable) -> Callable:
        def count(cache: Any) -> np.ndarray:
            calls[type(cache).__name__] += 1
            return output(cache)

        return count

    with contextlib.ExitStack() as stack:
        kinds = (ops.LayerNormCache, ops.GELUCache, llama_ops.RMSNormCache, llama_ops.SwiGLUCache)
        for kind in kinds:
            stack.enter_context(patch.object(kind, "output", counting(kind.output)))
        yield calls


class KeptByShapes:
    """What a model keeps of one token, and recomputes, as it follows from shapes and plan."""

    PARTS = {  # of a block, in order
        gpt2: ("ln_1", "qkv", "attention", "o", "ln_2", "up", "gelu", "down"),
        llama: (
            "ln_1", "qkv", "rotary", "attention", "o", "ln_2", "gate", "up", "swiglu", "down"
        ),
    }  # fmt: skip
    FROM = {"qkv": "ln_1", "o": "qkv", "gate": "ln_2", "up": "ln_2"}  # the first part it needs

    def __init__(self, net: Net, plan: Plan, *, has_masks: bool) -> None:
        self.config, self.plan, self.has_masks = net.config, plan, has_masks
        self.parts = self.PARTS[net.architecture]
        self.maps = [name for name in self.parts if name in net.architecture.READS]
        self.first = {**self.FROM, "down": self.parts[self.parts.index("ln_2") + 1]}
        block = net.base["blocks"][0]
        q_width, qkv_width = block["attn"]["o"]["w"].shape[0], block["attn"]["qkv"]["w"].shape[1]
        F = self.config.inner
        self.kept = {"ln_1": self.norm, "ln_2": self.norm, "attention": qkv_width}
        self.kept |= {"gelu": F, "swiglu": 2 * F}
        self.attended = q_width
        self.ranks = [Counter[str]() for _ in range(net.config.n_layer)]
        self.embedding = 0
        for path, factors in adapters(net.lora).items() if plan.lora else ():
            rank, name = factors["A"].shape[1], path.rpartition(".")[2]
            if path == "embedding":
                self.embedding = rank
            else:
                self.ranks[int(path.split(".")[1])]["qkv" if name in "qkv" else name] += rank

    @property
    def norm(self) -> int:
        """The normalised row and its scale."""
        return self.config.n_embd + 1

    def needed(self) -> Iterator[tuple[Counter[str], tuple[str, ...]]]:
        """Of each block through which the pass goes the ranks, and the parts that it needs."""
        below = self.plan.base or self.embedding > 0
        for ranks in self.ranks:
            lowest = next((name for name in self.maps if ranks[name]), "qkv")
            start = 0 if below else self.parts.index(self.first[lowest])
            if below or ranks:
                yield ranks, self.parts[start:]
            below = below or bool(ranks)

    def a_row(self) -> int:
        total = self.embedding  # of the embedding s A[token]
        for ranks, needed in self.needed():
            parts = self.of_parts(ranks)
            recomputed = self.config.n_embd + parts["down"]  # the block's input, and s x A
            whole = sum(parts[name] for name in needed)
            total += recomputed if self.plan.recompute else whole
        return total + (self.norm if total else 0)  # of the last norm

    def tables(self, T: int) -> int:
        """The numbers of the tables of cosines and sines, which all blocks share."""
        needed = [self.plan.recompute or "rotary" in parts for _, parts in self.needed()]
        is_llama = "rotary" in self.parts
        return T * self.config.head_width if is_llama and any(needed) else 0

    def of_parts(self, ranks: Counter[str]) -> dict[str, int]:
        inputs = [self.plan.base, ranks["o"] > 0]  # y of the attention; the same, after dropout
        o = self.attended * (sum(inputs) if self.has_masks else any(inputs))
        kept = {**self.kept, "o": o}
        return {name: kept.get(name, 0) + ranks[name] for name in self.parts}

    def outputs(self) -> int:
        """How many inputs of linear maps are recomputed: all but those of o, where one is read."""
        maps = set(self.maps) - {"o"}
        return sum(self.plan.base or ranks[name] > 0 for ranks in self.ranks for name in maps)


def model_checks() -> list[ModelCheck]:
    """A small model with adapters everywhere, and some with few, so that there is less to keep."""
    net, batch = tiny_model()
    no_masks = batch._replace(masks=None)
    base = {**net.base, "blocks": [*net.base["blocks"], net.base["blocks"][0]]}
    deep = Net(base, dataclasses.replace(net.config, n_layer=3))
    untied = dataclasses.replace(net, base={**net.base, "head": net.base["wte"] + 0.3})

    both = Plan(base=True, lora=True)
    return [
        ModelCheck(net, batch, Plan(lora=True)),
        ModelCheck(adapted(deep, "[12].attn.qkv"), no_masks, Plan(lora=True)),
        ModelCheck(net, batch, both._replace(recompute=True)),
        ModelCheck(adapted(net, "up", "down"), no_masks, Plan(lora=True)),
        ModelCheck(adapted(deep, "1.attn.o", "1.mlp.down"), no_masks, Plan(lora=True)),
        ModelCheck(adapted(net, "1.mlp.down"), no_masks, Plan(lora=True, recompute=True)),
        ModelCheck(adapted(untied, "embedding"), no_masks, Plan(lora=True)),
        ModelCheck(untied, batch, Plan(base=True)),
        ModelCheck(deep, no_masks, Plan(base=True)),
        ModelCheck(net, batch, Plan()),
        *llama_checks(),
    ]


def llama_checks() -> list[ModelCheck]:
    """The same of a Llama, and of one with biases, as Qwen2 has them."""
    net, batch = tiny_llama()
    no_masks, lora = batch._replace(masks=None), Plan(lora=True)
    biased = map_leaves(lambda x: x, net.base)
    for block in biased["blocks"]:
        block["attn"]["qkv"]["b"] = block["attn"]["qkv"]["w"][0] + 0.3
    return [
        ModelCheck(net, batch, lora),
        ModelCheck(net, batch, Plan(base=True, lora=True, recompute=True)),
        ModelCheck(adapted(net, "gate"), no_masks, lora),
        ModelCheck(adapted(net, "1.mlp.up"), no_masks, lora),
        ModelCheck(adapted(net, "1.attn.o", "1.mlp.down"), no_masks, lora),
        ModelCheck(adapted(net, "1.mlp.down"), no_masks, Plan(lora=True, recompute=True)),
        ModelCheck(Net(biased, net.config), no_masks, Plan(base=True)),
        ModelCheck(net, batch, Plan()),
    ]


def adapted(net: Net, *targets: str) -> Net:
    """The net with fresh adapters on these targets alone, moved so that B is not 0."""
    config = LoRAConfig(rank=2, alpha=2.0, targets=targets)
    fresh = lora_init(net.base, config, seed=0)
    return Net(net.base, net.config, map_leaves(lambda x: x + 0.3, fresh), config)


def check_the_tiles() -> None:
    """Requires that attention goes back by tiles of queries, each with the keys that it sees."""
    y, cache = ops.attention_forward(np.zeros((1, 5, 6)), heads=2)
    with patch.object(ops, "attention_weights", wraps=ops.attention_weights) as weights:
        ops.attention_backward(y, cache)
    sizes = [tuple(x.shape[-2] for x in call.args) for call in weights.call_args_list]
    assert sizes == [(2, 2), (2, 4), (1, 5)], sizes


def check_the_groups() -> None:
    """Requires that heads of q that those of k and v cannot share equally are refused."""
    try:
        ops.groups(np.zeros((1, 5, 7, 6)), np.zeros((1, 2, 7, 6)))
    except ValueError as error:
        assert "2 heads of k and v cannot share 5" in str(error)
    else:
        raise AssertionError("not refused")


def check_the_fused_form() -> None:
    """Requires that a formula's fused form is computed where it has one."""
    x = np.ones(5)
    with patch.object(fused, "gelu_gradient") as in_place:
        ops.gelu_gradient(x, x, scale=1.0, cubic=1.0)
    assert in_place.call_count == 2  # tiles


def check_without_output() -> None:
    """Requires that of a block all stays as it is but the last map, of which one column is left."""
    net, _ = tiny_model()
    block = net.base["blocks"][0]
    found, flat = flatten(keep.without_output(block, "down")), flatten(block)
    assert found.keys() == flat.keys()
    for path, leaf in flat.items():
        expected = leaf[..., :1] if path.startswith("mlp.down") else leaf
        assert np.array_equal(found[path], expected), path


def check_what_recomputing_leaves_out() -> None:
    """Requires that a recomputed block's last map has neither its outputs nor its adapters."""
    net, batch = tiny_model()
    x, cache = network.trunk_forward(
        net, tokens=batch.tokens, masks=batch.masks, plan=Plan(lora=True, recompute=True)
    )
    with patch.object(gpt2, "adapted_linear_forward", wraps=gpt2.adapted_linear_forward) as map:
        network.trunk_backward(np.ones_like(x), cache)
    columns = [len(call.kwargs["b"]) for call in map.call_args_list]
    assert columns == [12, 4, 6, 1] * 2, columns
    assert [len(call.kwargs["adapters"]) for call in map.call_args_list] == [4, 1, 1, 0] * 2


def check_that_inference_keeps_nothing() -> None:
    """Requires that a block drops each cache at once where no gradient is wanted."""
    net, batch = tiny_model()
    block, places = net.base["blocks"][0], net.adapters(None)["blocks.0"]
    x = np.ones((2, 4, net.config.n_embd))
    constants = {"config": net.config, "plan": Plan(), "attend": ops.attention_forward}
    _, cache = gpt2.block_forward(x, block, places, **constants)
    assert len(cache) == 0


def check_the_past() -> None:
    """Requires that tokens at an offset, with an attention that has a past, give what all do."""
    for net, batch in (tiny_model(), tiny_llama()):
        cache = new_cache(net, length=4, batch=2)
        next_logits(net, tokens=batch.tokens[:, :3], cache=cache, position=0)
        last = next_logits(net, tokens=batch.tokens[:, 3:], cache=cache, position=3)
        expected = network.net_logits(net, tokens=batch.tokens)[:, -1]
        assert np.allclose(last, expected, rtol=1e-9, atol=1e-12)


def check_the_refusals() -> None:
    """Requires that adapters that are not there, and too many tokens, are refused; no others."""
    net, batch = tiny_model()
    bare, inputs = Net(net.base, net.config), {"tokens": batch.tokens, "targets": batch.targets}
    network.loss_and_grads(bare, **inputs, plan=Plan(base=True))
    network.trunk_forward(bare, tokens=np.zeros((1, 5), int))
    network.trunk_forward(bare, tokens=np.zeros((1, 2), int), offset=3)
    lora, both = Plan(lora=True), Plan(base=True, lora=True)
    tokens, targets = batch.tokens, batch.targets
    outside = [np.where(targets == 2, number, targets) for number in (-1, net.config.vocab_size)]
    for words, refused in (
        ("adapters", lambda: network.loss_and_grads(bare, **inputs, plan=lora)),
        ("adapters", lambda: network.loss_and_grads(bare, **inputs, plan=both)),
        ("6 tokens", lambda: network.trunk_forward(bare, tokens=np.zeros((1, 6), int))),
        ("6 tokens", lambda: network.trunk_forward(bare, tokens=np.zeros((1, 2), int), offset=4)),
        ("token id -1", lambda: network.trunk_forward(bare, tokens=tokens - 1 - tokens.min())),
        ("shape", lambda: network.loss_and_grads(net, tokens=tokens, targets=targets[:, :1])),
        ("target -1", lambda: network.loss_and_grads(net, tokens=tokens, targets=outside[0])),
        ("target 7", lambda: network.loss_and_grads(net, tokens=tokens, targets=outside[1])),
        ("target -100", lambda: network.loss_and_grads(net, **inputs, ignore_index=-1)),
    ):
        try:
            refused()
        except MiniloraError as error:
            if words in str(error):
                continue
            raise
        raise AssertionError(f"not refused: {words}")


# --- the run -------------------------------------------------------------------------------------


class Result(NamedTuple):
    """How a mutant fared: noticed by a "check", it "raised" an error of its own, or "survived"."""

    mutant: Mutant
    fate: str


def fate(mutant: Mutant, checks: list[Callable[[], None]]) -> str:
    try:
        with planted(mutant):
            for check in checks:
                check()
    except AssertionError:
        return "check"
    except Exception:
        return "raised"
    return "survived"


def results(word: str = "", make: Callable = mutants_of) -> Iterator[Result]:
    """Every mutant of the core, and how it fared."""
    with contextlib.ExitStack() as stack:
        for module, name, value in TILES:
            stack.enter_context(patch.object(module, name, value))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(np.errstate(all="ignore"))
        warnings.simplefilter("ignore")
        pairs = [
            PairCheck(name, pair, sizes)
            for name, pair in {**PAIRS, **PARTLY_FROZEN}.items()
            if pair.sizes == Sizes()  # the larger ones are for the tiles of ordinary size
            for sizes in SIZES
        ]
        models = [
            *model_checks(),
            check_without_output,
            check_what_recomputing_leaves_out,
            check_that_inference_keeps_nothing,
            check_the_past,
            check_the_refusals,
        ]
        for check in models:
            check()
        for module in MODULES:
            for mutant in make(module):
                if word in mutant.place:
                    checks = [pair for pair in pairs if mutant.place in pair.reached]
                    if module in OF_MODELS or mutant.place in ALSO_OF_MODELS:
                        checks += [check for check in models if may_reach(check, module)]
                    checks += [check_the_tiles, check_the_groups] * (module is ops)
                    if module is tiles:
                        checks += [functools.partial(as_printed, check) for check in checks]
                        checks += [check_the_fused_form]
                    yield Result(mutant, fate(mutant, checks))


def may_reach(check: Callable[[], None], module: types.ModuleType) -> bool:
    """Whether a check runs this module: those of one architecture's models not the other's."""
    other = {gpt2: llama, llama: gpt2, llama_ops: gpt2}.get(module)
    return not (isinstance(check, ModelCheck) and check.net.architecture is other)


def shares(found: list[Result]) -> tuple[float, float]:
    """The share killed of all mutants, and of those that do not raise an error by themselves."""
    fates = Counter(result.fate for result in found)
    killed = fates["check"] + fates["raised"]
    return killed / len(found), fates["check"] / (len(found) - fates["raised"])


def main(words: list[str]) -> None:
    start = time.perf_counter()
    found = list(results(*words))
    if not found:
        sys.exit(f"no function to break has {' '.join(words)!r} in its name")
    print(f"{'function':32s} mutants  noticed by a check  raised  survived")
    for place in dict.fromkeys(result.mutant.place for result in found):
        of_function = [result for result in found if result.mutant.place == place]
        print(line(place, of_function))
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
    return f"{name:32s}{len(found):8d}{counts}"


if __name__ == "__main__":
    main(sys.argv[1:])
