"""Equations as text, and every small way to get one of them wrong, with its words.

An exercise's gradients are written as equations, a line each, in Python and with their tags:

    dh = scale * dy @ B.T   # LORA.4

A hypothesis is a change of one equation: a factor left out, a sign turned, another variable. It is
worded from the equation itself, so what it says is what it computes.
"""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from minilora import ops
from minilora.backend import Array
from minilora.ops import rows

# --- what equations are made of ----------------------------------------------------------------


def mean(x: Array) -> Array:
    """The mean of each row, kept as a column."""
    return x.mean(axis=-1, keepdims=True)


def sums(x: Array) -> Array:
    """The sum of each row, kept as a column."""
    return x.sum(axis=-1, keepdims=True)


def total(x: Array) -> Array:
    """The sum over the rows."""
    return x.sum(axis=0)


def T(x: Array) -> Array:
    """The transpose of the last two axes."""
    return x.swapaxes(-1, -2)


def softmax(x: Array) -> Array:
    """The softmax of each row."""
    return ops.softmax_forward(x)[0]


def scatter(index: Array, values: Array, like: Array) -> Array:
    """An array like `like` whose row v is the sum of the values whose index is v."""
    y = np.zeros_like(like)
    np.add.at(y, index, values)
    return y


def last_use(index: Array, values: Array, like: Array) -> Array:
    """`scatter` that overwrites where it should add."""
    y = np.zeros_like(like)
    y[index] = values
    return y


def first_use(index: Array, values: Array, like: Array) -> Array:
    """`scatter` of the first use of each index alone."""
    return last_use(index[::-1], values[::-1], like)


def mean_use(index: Array, values: Array, like: Array) -> Array:
    """`scatter` with the mean of the uses of an index for their sum."""
    uses = np.maximum(np.bincount(index, minlength=len(like)), 1)
    return scatter(index, values, like) / uses.reshape(-1, *[1] * (like.ndim - 1))


def scatter_plus_one(index: Array, values: Array, like: Array) -> Array:
    """`scatter` that starts from ones."""
    return scatter(index, values, like) + 1


def in_order(index: Array, values: Array, like: Array) -> Array:
    """The values in the order in which they come, whatever their index."""
    y = np.zeros_like(like)
    n = min(len(like), len(values))
    y[:n] = values[:n]
    return y


FUNCTIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (mean, sums, total, T, softmax, scatter, last_use, first_use, mean_use)
    + (scatter_plus_one, in_order, rows)
} | {
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "absolute": np.abs,
    "size": np.size,
    "number": len,
    "ones": np.ones_like,
    "total_mean": lambda x: x.mean(axis=0),
    "total_first": lambda x: x[0],
    "total_last": lambda x: x[-1],
    "total_all": lambda x: np.broadcast_to(x.sum(), x.shape[1:]),
    "total_columns": lambda x: x.sum(axis=1),
    "mean_all": lambda x: x.mean(),
    "mean_down": lambda x: x.mean(axis=0, keepdims=True),
    "sums_all": lambda x: x.sum(),
    "sums_down": lambda x: x.sum(axis=-2, keepdims=True),
    "largest": lambda x: x.max(axis=-1, keepdims=True),
}

# Another function in the place of one, and in words.
SWAPS: dict[str, tuple[tuple[str, str], ...]] = {
    "total": (
        ("total_mean", "the mean over the rows in place of their sum"),
        ("total_first", "the first row alone in place of the sum over the rows"),
        ("total_last", "the last row alone in place of the sum over the rows"),
        ("total_all", "the sum over rows and columns in place of that over the rows"),
        ("total_columns", "the sum over the columns in place of that over the rows"),
    ),
    "mean": (
        ("sums", "the row's sum in place of its mean"),
        ("mean_all", "the mean over all rows together in place of each row's own"),
        ("mean_down", "the mean of each column in place of that of each row"),
        ("largest", "the row's largest entry in place of its mean"),
    ),
    "sums": (
        ("mean", "the row's mean in place of its sum"),
        ("sums_all", "the sum over all rows together in place of each row's own"),
        ("sums_down", "the sum of each column in place of that of each row"),
        ("largest", "the row's largest entry in place of its sum"),
    ),
    "scatter": (
        ("last_use", "only the last of several uses of an index, overwritten instead of added"),
        ("first_use", "only the first of several uses of an index"),
        ("mean_use", "the mean over the uses of an index in place of their sum"),
        ("scatter_plus_one", "ones, not zeros, to start the sums from"),
        ("in_order", "the rows in the order of the examples, not at their index"),
    ),
    "tanh": (("exp", "exp in place of tanh"),),
    "exp": (("tanh", "tanh in place of exp"),),
    "minimum": (("maximum", "the larger in place of the smaller"),),
}
UNARY = {"exp", "sqrt", "tanh", "softmax", "total", "mean", "sums", "log"}
NAMES = {
    "exp": "exp", "sqrt": "√", "tanh": "tanh", "softmax": "softmax", "total": "Σ_rows",
    "mean": "mean", "sums": "Σ", "T": "T", "scatter": "Σ_index", "minimum": "min", "log": "log",
}  # fmt: skip


# --- equations ---------------------------------------------------------------------------------


class Equation(NamedTuple):
    """name = expression; `given` where a forward pass has computed it."""

    name: str
    expression: ast.expr
    tag: str
    given: bool


@functools.cache
def equations(text: str) -> tuple[Equation, ...]:
    """The equations of a text; after "#" stands the tag, or the word given."""
    found = []
    for line in text.strip().splitlines():
        left, _, note = line.partition("#")
        name, _, expression = left.partition("=")
        tag = note.strip()
        parsed = ast.parse(expression.strip(), mode="eval").body
        found.append(Equation(name.strip(), parsed, "" if tag == "given" else tag, tag == "given"))
    return tuple(found)


def computed(program: tuple[Equation, ...], values: Mapping[str, Any]) -> dict[str, Any]:
    """What the equations give for these values, by name; raises what NumPy raises."""
    scope = {**FUNCTIONS, **values}
    found = {}
    with np.errstate(all="ignore"):
        for equation in program:
            found[equation.name] = scope[equation.name] = eval(code(equation), scope)
    return found


def code(equation: Equation) -> Any:
    """The compiled expression of an equation."""
    key = id(equation.expression)
    if key not in _CODES:
        tree = ast.fix_missing_locations(ast.Expression(copy.deepcopy(equation.expression)))
        _CODES[key] = (compile(tree, "<equation>", "eval"), equation.expression)
    return _CODES[key][0]


_CODES: dict[int, tuple[Any, ast.expr]] = {}  # with the expression, so that no other has its id


# --- in the letters of the pages ---------------------------------------------------------------


def maths(node: ast.AST, letters: Mapping[str, str]) -> str:
    """An expression as the pages write it."""

    def of(child: ast.AST) -> str:
        return maths(child, letters)

    def tight(child: ast.AST) -> str:
        is_sum = isinstance(child, ast.BinOp) and isinstance(child.op, ast.Add | ast.Sub)
        return f"({of(child)})" if is_sum else of(child)

    match node:
        case ast.Name(name):
            return letters.get(name, name)
        case ast.Constant(value):
            return f"{value:g}" if isinstance(value, int | float) else str(value)
        case ast.Attribute(value, "T"):
            return f"{tight(value)}ᵀ"
        case ast.Attribute(value, name):
            return f"{of(value)}.{name}"
        case ast.UnaryOp(ast.USub(), operand):
            return f"−{tight(operand)}"
        case ast.BinOp(left, ast.Add(), right):
            return f"{of(left)} + {of(right)}"
        case ast.BinOp(left, ast.Sub(), right):
            return f"{of(left)} − {tight(right)}"
        case ast.BinOp(left, ast.Div(), right):
            compound = isinstance(right, ast.BinOp)
            return f"{tight(left)} / {f'({of(right)})' if compound else of(right)}"
        case ast.BinOp(left, ast.MatMult(), right):
            return f"{tight(left)} {tight(right)}"
        case ast.BinOp(left, ast.Pow(), right):
            power = of(right).translate(str.maketrans("0123456789-t", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵗ"))
            return f"{tight(left)}{power}"
        case ast.BinOp(left, ast.Mult(), right):
            return (
                f"{tight(left)} ∘ {tight(right)}"
                if entrywise(node)
                else f"{tight(left)} {tight(right)}"
            )
        case ast.Call(ast.Name("T"), [argument]):
            return f"{tight(argument)}ᵀ"
        case ast.Call(ast.Name(name), arguments):
            inside = ", ".join(of(a) for a in arguments)
            return f"{NAMES.get(name, letters.get(name, name))}({inside})"
        case ast.Subscript(value, index):
            return f"{of(value)}[{ast.unparse(index)}]"
    return ast.unparse(node)


SCALARS = {"scale", "lr", "beta1", "beta2", "eps", "weight_decay", "N", "root", "dloss", "max_norm"}


def entrywise(node: ast.BinOp) -> bool:
    """Whether a product is one of arrays, entry by entry, as far as its names tell."""

    def is_array(child: ast.AST) -> bool:
        return any(isinstance(n, ast.Name) and n.id not in SCALARS for n in ast.walk(child))

    return is_array(node.left) and is_array(node.right)


# --- every small change ------------------------------------------------------------------------


class Change(NamedTuple):
    """An expression changed in one place: in words, and what stands around that place."""

    expression: ast.expr
    words: str
    around: tuple[str, ...]  # the expressions around it, the smallest first


def changes(node: ast.AST, others: tuple[str, ...], letters: Mapping[str, str]) -> Iterator[Change]:
    """Every expression with one small change; `others` are the variables in reach."""
    for new, words in variants(node, others, letters):
        yield Change(new, words, ())
    for field, value in ast.iter_fields(node):
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            is_name_of_function = isinstance(node, ast.Call) and field == "func"
            if not isinstance(child, ast.expr) or is_name_of_function:
                continue
            for change in changes(child, others, letters):
                whole = copy.copy(node)
                part: Any = change.expression
                if i is not None:
                    part = [*value[:i], part, *value[i + 1 :]]
                setattr(whole, field, part)
                assert isinstance(whole, ast.expr)
                yield Change(whole, change.words, (*change.around, maths(node, letters)))


def binary(left: ast.expr, operator: ast.operator, right: ast.expr) -> ast.BinOp:
    """left operator right."""
    return ast.BinOp(left, operator, right)


def call(name: str, *arguments: ast.expr) -> ast.Call:
    """name(arguments)."""
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


def variants(
    node: ast.AST, others: tuple[str, ...], letters: Mapping[str, str]
) -> Iterator[tuple[ast.expr, str]]:
    """The changed forms of one node, each in words."""

    def m(part: ast.AST) -> str:
        return maths(part, letters)

    match node:
        case ast.BinOp(left, ast.Add(), right):
            yield left, f"without the term {m(right)}"
            yield right, f"without the term {m(left)}"
            doubled = binary(ast.Constant(2), ast.Mult(), right)
            yield binary(left, ast.Add(), doubled), f"with the term {m(right)} twice"
            yield binary(left, ast.Sub(), right), f"with − in place of + before {m(right)}"
            yield binary(right, ast.Sub(), left), f"with − before {m(left)}"
        case ast.BinOp(left, ast.Sub(), right):
            yield left, f"without the term {m(right)}, which is subtracted"
            yield ast.UnaryOp(ast.USub(), right), f"without the term {m(left)}"
            doubled = binary(ast.Constant(2), ast.Mult(), right)
            yield binary(left, ast.Sub(), doubled), f"with the term {m(right)} subtracted twice"
            yield binary(left, ast.Add(), right), f"with + in place of − before {m(right)}"
            yield (
                binary(right, ast.Sub(), left),
                f"with {m(right)} and {m(left)} exchanged in the difference",
            )
            yield right, f"with {m(right)} alone in place of the difference from {m(left)}"
        case ast.BinOp(left, ast.Mult(), right):
            yield left, f"without the factor {m(right)}"
            yield right, f"without the factor {m(left)}"
            yield binary(node, ast.Mult(), right), f"with the factor {m(right)} twice"
            yield binary(node, ast.Mult(), left), f"with the factor {m(left)} twice"
            yield binary(left, ast.Div(), right), f"divided by {m(right)} instead of multiplied"
            yield binary(right, ast.Div(), left), f"divided by {m(left)} instead of multiplied"
            yield (
                binary(left, ast.Add(), right),
                f"with + in place of × between {m(left)} and {m(right)}",
            )
        case ast.BinOp(left, ast.Div(), right):
            yield left, f"without the division by {m(right)}"
            yield binary(left, ast.Mult(), right), f"multiplied by {m(right)} instead of divided"
            yield binary(node, ast.Div(), right), f"divided by {m(right)} twice"
            yield binary(right, ast.Div(), left), f"with the quotient {m(node)} upside down"
            yield right, f"with {m(right)} alone in place of the quotient {m(node)}"
        case ast.BinOp(left, ast.MatMult(), right):
            yield left, f"without the factor {m(right)}"
            yield right, f"without the factor {m(left)}"
            yield (
                binary(right, ast.MatMult(), left),
                f"with {m(right)} and {m(left)} in the other order",
            )
            for side, (a, b) in {"left": (left, right), "right": (right, left)}.items():
                if not is_transposed(a):
                    turned = call("T", a)
                    pair = (turned, b) if side == "left" else (b, turned)
                    yield (
                        binary(pair[0], ast.MatMult(), pair[1]),
                        f"with {m(turned)} in place of {m(a)}",
                    )
            if is_transposed(left):
                inner = left.value if isinstance(left, ast.Attribute) else left.args[0]  # type: ignore[attr-defined]
                for which, words in ((slice(None, 1), "first"), (slice(-1, None), "last")):
                    lower, upper = (ast.Constant(which.start), ast.Constant(which.stop))
                    cut = ast.Slice(lower if which.start else None, upper if which.stop else None)
                    if isinstance(left, ast.Attribute):
                        a = ast.Subscript(inner, cut, ast.Load())
                        b = ast.Subscript(right, cut, ast.Load())
                        yield (
                            binary(call("T", a), ast.MatMult(), b),
                            f"with the {words} row alone in place of the sum over all rows",
                        )
        case ast.BinOp(left, ast.Pow(), ast.Constant(int(power))):
            yield left, f"with {m(left)} in place of {m(node)}"
            higher = binary(left, ast.Pow(), ast.Constant(power + 1))
            yield higher, f"with {m(higher)} in place of {m(node)}"
        case ast.BinOp(left, ast.Pow(), right):
            yield left, f"with {m(left)} in place of {m(node)}"
            yield (
                binary(left, ast.Mult(), right),
                f"with the product of {m(left)} and {m(right)} in place of the power",
            )
        case ast.Attribute(value, "T"):
            yield value, f"with {m(value)} in place of {m(node)}"
        case ast.Call(ast.Name("T"), [value]):
            yield value, f"with {m(value)} in place of {m(node)}"
        case ast.Call(ast.Name(name), arguments):
            for other_name, words in SWAPS.get(name, ()):
                yield call(other_name, *arguments), f"with {words}"
            if name in UNARY:
                yield arguments[0], f"with {m(arguments[0])} in place of {m(node)}"
            if name == "minimum":
                yield arguments[0], f"with {m(arguments[0])} in place of {m(node)}"
                yield arguments[1], f"with {m(arguments[1])} in place of {m(node)}"
        case ast.UnaryOp(ast.USub(), operand):
            yield operand, "without the minus sign"
        case ast.Constant(int() | float() as value):
            for new in (value + 1, value - 1, value * 2, value / 2, -value):
                yield ast.Constant(new), f"with {new:g} in place of {value:g}"
        case ast.Name(name):
            for other in others:
                if other != name:
                    replaced = ast.Name(str(other), ast.Load())
                    yield replaced, f"with {m(replaced)} in place of {m(node)}"
            yield call("ones", node), f"with ones in place of {m(node)}"
        case _:
            return


def is_transposed(node: ast.AST) -> bool:
    """Whether a node is x.T or T(x)."""
    is_call = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "T"
    return is_call or (isinstance(node, ast.Attribute) and node.attr == "T")


EVERYWHERE = {
    "mean": (("sums", "sums in place of all its means"),
             ("mean_all", "means over all rows together in place of each row's own"),
             ("mean_down", "means of the columns in place of those of the rows")),
}  # fmt: skip


def everywhere(node: ast.expr) -> Iterator[tuple[ast.expr, str]]:
    """The expression with a function exchanged wherever it stands, if twice or more."""
    for name, swaps in EVERYWHERE.items():
        is_there = [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == name]
        for other, words in swaps if len(is_there) > 1 else ():
            new = copy.deepcopy(node)
            for part in ast.walk(new):
                if isinstance(part, ast.Name) and part.id == name:
                    part.id = other
            yield new, f"with {words}"


# --- hypotheses --------------------------------------------------------------------------------


class Hypothesis(NamedTuple):
    """One wrong way to compute the gradients: where and how it is wrong, and its equations."""

    where: str  # the tag of the equation, or its name
    words: str
    program: tuple[Equation, ...]


Factor: TypeAlias = tuple[str, str, str]
"""An expression, and in words: divided by it, multiplied by it."""


@functools.cache
def hypotheses(
    text: str,
    inputs: tuple[str, ...],
    letters: tuple[tuple[str, str], ...],
    scalars: tuple[Factor, ...],
) -> tuple[Hypothesis, ...]:
    """Every small change of one equation, no two of them in the same words."""
    program, found = equations(text), list[tuple[str, Change, tuple[Equation, ...]]]()
    spelling, names = dict(letters), {e.name for e in program}
    for i, equation, part in [(i, e, p) for p in (True, False) for i, e in enumerate(program)]:
        if equation.given:
            continue
        where = (
            f"[{equation.tag}]"
            if equation.tag
            else f"the equation of {spelling.get(equation.name, equation.name)}"
        )
        known = (*inputs, *(e.name for e in program[:i]))

        found_here = (
            _of_equation(equation, known, spelling)
            if part
            else _of_the_whole(equation, known, scalars)
        )
        for change in found_here:
            new = {equation.name: change.expression}
            if f"{equation.name}_2" in names:  # the same for a second adapter
                new[f"{equation.name}_2"] = twin(change.expression, {*names, *inputs})
            changed = tuple(e._replace(expression=new.get(e.name, e.expression)) for e in program)
            found.append((where, change, changed))
    words = _told_apart([(where, change) for where, change, _ in found])
    return tuple(
        Hypothesis(where, text, new) for (where, _, new), text in zip(found, words, strict=True)
    )


def twin(expression: ast.expr, names: set[str]) -> ast.expr:
    """The expression with each variable x replaced by x_2, where there is one of that name."""
    new = copy.deepcopy(expression)
    for node in ast.walk(new):
        if isinstance(node, ast.Name) and f"{node.id}_2" in names:
            node.id = f"{node.id}_2"
    return new


def _of_equation(
    equation: Equation, known: tuple[str, ...], letters: Mapping[str, str]
) -> Iterator[Change]:
    """Changes of its parts."""
    whole = equation.expression
    for new, words in everywhere(whole):
        yield Change(new, words, ())
    yield from changes(whole, known, letters)


def _of_the_whole(
    equation: Equation, known: tuple[str, ...], scalars: tuple[Factor, ...]
) -> Iterator[Change]:
    """Changes that say less: where a part of another equation explains as much, it comes first."""
    whole = equation.expression
    yield Change(ast.UnaryOp(ast.USub(), whole), "with the opposite sign", ())
    yield Change(binary(whole, ast.Mult(), ast.Constant(0.0)), "set to zero", ())
    for expression, divided, multiplied in scalars:
        scalar = ast.parse(expression, mode="eval").body
        if set(_names(scalar)) <= {*known, *FUNCTIONS}:
            yield Change(binary(whole, ast.Div(), scalar), divided, ())
            yield Change(binary(whole, ast.Mult(), scalar), multiplied, ())


def _names(node: ast.AST) -> list[str]:
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]


def _told_apart(found: list[tuple[str, Change]]) -> list[str]:
    """The words of each change, with so much of what stands around it as makes them its own."""
    words = [change.words for _, change in found]
    for depth in range(5):
        groups: dict[tuple[str, str], list[int]] = {}
        for i, (where, _) in enumerate(found):
            groups.setdefault((where, words[i]), []).append(i)
        for members in groups.values():
            for i in members if len(members) > 1 else ():
                change = found[i][1]
                if depth < len(change.around):
                    words[i] = f"{change.words} (in {change.around[depth]})"
    for members in groups.values():
        for place, i in enumerate(members if len(members) > 1 else ()):
            words[i] += f", at place {place + 1}"
    return words


def is_close(got: Any, want: Any) -> bool:
    """Whether two gradients agree: both None, or of one shape and equal but for rounding."""
    if got is None or want is None:
        return got is None and want is None
    try:
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    except (TypeError, ValueError):
        return False
    if got.shape != want.shape or not got.size:
        return bool(got.shape == want.shape)
    with np.errstate(all="ignore"):
        off, size = np.abs(got - want).max(), np.abs(want).max()
    if not np.isfinite(off) or not np.isfinite(size):
        return bool(np.allclose(got, want, rtol=1e-7, equal_nan=True))
    return bool(off <= 1e-8 * size + 1e-12)
