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
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from minilora import ops
from minilora.backend import Array

# --- what equations are made of ----------------------------------------------------------------


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


def mean_use(index: Array, values: Array, like: Array) -> Array:
    """`scatter` with the mean of the uses of an index for their sum."""
    uses = np.maximum(np.bincount(index, minlength=len(like)), 1)
    return scatter(index, values, like) / uses.reshape(-1, *[1] * (like.ndim - 1))


def in_order(index: Array, values: Array, like: Array) -> Array:
    """The values in the order in which they come, whatever their index."""
    y, n = np.zeros_like(like), min(len(like), len(values))
    y[:n] = values[:n]
    return y


# Rows are examples: mean and sums go along a row and keep a column, totals go down the rows.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "tanh": np.tanh, "absolute": np.abs,
    "minimum": np.minimum, "maximum": np.maximum, "size": np.size, "number": len,
    "ones": np.ones_like, "rows": ops.rows, "scatter": scatter, "last_use": last_use,
    "first_use": lambda index, values, like: last_use(index[::-1], values[::-1], like),
    "mean_use": mean_use, "in_order": in_order,
    "scatter_plus_one": lambda index, values, like: scatter(index, values, like) + 1,
    "T": lambda x: x.swapaxes(-1, -2),
    "softmax": lambda x: ops.softmax_forward(x)[0],
    "mean": lambda x: x.mean(axis=-1, keepdims=True),
    "mean_all": lambda x: x.mean(),
    "mean_down": lambda x: x.mean(axis=0, keepdims=True),
    "sums": lambda x: x.sum(axis=-1, keepdims=True),
    "sums_all": lambda x: x.sum(),
    "sums_down": lambda x: x.sum(axis=-2, keepdims=True),
    "largest": lambda x: x.max(axis=-1, keepdims=True),
    "total": lambda x: x.sum(axis=0),
    "total_mean": lambda x: x.mean(axis=0),
    "total_first": lambda x: x[0],
    "total_last": lambda x: x[-1],
    "total_all": lambda x: np.broadcast_to(x.sum(), x.shape[1:]),
    "total_columns": lambda x: x.sum(axis=1),
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
    for line in re.split(r"\n|;", text.strip()):
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
            found[equation.name] = scope[equation.name] = eval(code(equation.expression), scope)
    return found


@functools.cache
def code(expression: ast.expr) -> Any:
    """The compiled expression."""
    return compile(ast.fix_missing_locations(ast.Expression(expression)), "<equation>", "eval")


# --- in the letters of the pages ---------------------------------------------------------------

NAMES = {"sqrt": "√", "total": "Σ_rows", "sums": "Σ", "scatter": "Σ_index", "minimum": "min"}
SCALARS = {"scale", "lr", "beta1", "beta2", "eps", "weight_decay", "N", "root", "dloss", "max_norm"}
POWERS = str.maketrans("0123456789-t", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵗ")


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
        case ast.Constant(int() | float() as value):
            return f"{value:g}"
        case ast.Attribute(value, "T") | ast.Call(ast.Name("T"), [value]):
            return f"{tight(value)}ᵀ"
        case ast.UnaryOp(ast.USub(), operand):
            return f"−{tight(operand)}"
        case ast.BinOp(left, ast.Add(), right):
            return f"{of(left)} + {of(right)}"
        case ast.BinOp(left, ast.Sub(), right):
            return f"{of(left)} − {tight(right)}"
        case ast.BinOp(left, ast.Div(), ast.BinOp() as right):
            return f"{tight(left)} / ({of(right)})"
        case ast.BinOp(left, ast.Div(), right):
            return f"{tight(left)} / {of(right)}"
        case ast.BinOp(left, ast.Pow(), right):
            return f"{tight(left)}{of(right).translate(POWERS)}"
        case ast.BinOp(left, ast.Mult(), right) if is_array(left) and is_array(right):
            return f"{tight(left)} ∘ {tight(right)}"
        case ast.BinOp(left, ast.Mult() | ast.MatMult(), right):
            return f"{tight(left)} {tight(right)}"
        case ast.Call(ast.Name(name), arguments):
            inside = ", ".join(of(a) for a in arguments)
            return f"{NAMES.get(name, letters.get(name, name))}({inside})"
        case ast.Subscript(value, index):
            return f"{of(value)}[{ast.unparse(index)}]"
    return ast.unparse(node)


def is_array(node: ast.AST) -> bool:
    """Whether an expression is an array, as far as its names tell."""
    return bool({n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - SCALARS)


# --- every small change ------------------------------------------------------------------------

Rule: TypeAlias = tuple[str, str]
"""What stands in the place of an expression with the parts a and b, and its words."""

CHANGES: dict[type, tuple[Rule, ...]] = {
    ast.Add: (
        ("a", "without the term {b}"),
        ("b", "without the term {a}"),
        ("a + 2 * b", "with the term {b} twice"),
        ("a - b", "with − in place of + before {b}"),
        ("b - a", "with − before {a}"),
    ),
    ast.Sub: (
        ("a", "without the term {b}, which is subtracted"),
        ("-b", "without the term {a}"),
        ("a - 2 * b", "with the term {b} subtracted twice"),
        ("a + b", "with + in place of − before {b}"),
        ("b - a", "with {b} and {a} exchanged in the difference"),
        ("b", "with {b} alone in place of the difference from {a}"),
    ),
    ast.Mult: (
        ("a", "without the factor {b}"),
        ("b", "without the factor {a}"),
        ("a * b * b", "with the factor {b} twice"),
        ("a * b * a", "with the factor {a} twice"),
        ("a / b", "divided by {b} instead of multiplied"),
        ("b / a", "divided by {a} instead of multiplied"),
        ("a + b", "with + in place of × between {a} and {b}"),
    ),
    ast.Div: (
        ("a", "without the division by {b}"),
        ("a * b", "multiplied by {b} instead of divided"),
        ("a / b / b", "divided by {b} twice"),
        ("b / a", "with the quotient {a / b} upside down"),
        ("b", "with {b} alone in place of the quotient {a / b}"),
    ),
    ast.MatMult: (
        ("a", "without the factor {b}"),
        ("b", "without the factor {a}"),
        ("b @ a", "with {b} and {a} in the other order"),
    ),
    ast.Pow: (
        ("a", "with {a} in place of {a ** b}"),
        ("a * b", "with the product of {a} and {b} in place of the power"),
    ),
}
LEFT_TURNED: tuple[Rule, ...] = (("T(a) @ b", "with {T(a)} in place of {a}"),)
RIGHT_TURNED: tuple[Rule, ...] = (("a @ T(b)", "with {T(b)} in place of {b}"),)
OF_ONE_ROW: tuple[Rule, ...] = (  # of a.T @ b
    ("T(a[:1]) @ b[:1]", "with the first row alone in place of the sum over all rows"),
    ("T(a[-1:]) @ b[-1:]", "with the last row alone in place of the sum over all rows"),
)
SWAPS: dict[str, tuple[Rule, ...]] = {  # another function in the place of one
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
LEFT_OUT = {"exp", "sqrt", "tanh", "softmax", "total", "mean", "sums", "log", "minimum", "T"}
EVERYWHERE = {
    "sums": "sums in place of all its means",
    "mean_all": "means over all rows together in place of each row's own",
    "mean_down": "means of the columns in place of those of the rows",
}  # for mean, where it stands twice or more


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


def variants(
    node: ast.AST, others: tuple[str, ...], letters: Mapping[str, str]
) -> Iterator[tuple[ast.expr, str]]:
    """The changed forms of one node, each in words."""

    def of(rules: tuple[Rule, ...], a: ast.expr, b: ast.expr) -> Iterator[tuple[ast.expr, str]]:
        for new, words in rules:
            told = re.sub(r"\{(.+?)\}", lambda m: maths(filled(m[1], a, b), letters), words)
            yield filled(new, a, b), told

    def instead(new: ast.expr) -> tuple[ast.expr, str]:
        return new, f"with {maths(new, letters)} in place of {maths(node, letters)}"

    match node:
        case ast.BinOp(left, ast.Pow(), ast.Constant(int(power))):
            yield instead(left)
            yield instead(ast.BinOp(left, ast.Pow(), ast.Constant(power + 1)))
        case ast.BinOp(left, operator, right):
            yield from of(CHANGES[type(operator)], left, right)
            if isinstance(operator, ast.MatMult):
                yield from of(() if is_transposed(left) else LEFT_TURNED, left, right)
                yield from of(() if is_transposed(right) else RIGHT_TURNED, left, right)
                if isinstance(left, ast.Attribute):
                    yield from of(OF_ONE_ROW, left.value, right)
        case ast.UnaryOp(ast.USub(), operand):
            yield operand, "without the minus sign"
        case ast.Attribute(value, "T"):
            yield instead(value)
        case ast.Call(ast.Name(name), arguments):
            for other, words in SWAPS.get(name, ()):
                yield call(other, *arguments), f"with {words}"
            yield from map(instead, arguments if name in LEFT_OUT else ())
        case ast.Constant(int() | float() as value):
            for new in (value + 1, value - 1, value * 2, value / 2, -value):
                yield ast.Constant(new), f"with {new:g} in place of {value:g}"
        case ast.Name(name):
            for other in others:
                if other != name:
                    yield instead(ast.Name(other, ast.Load()))
            yield call("ones", node), f"with ones in place of {maths(node, letters)}"


def call(name: str, *arguments: ast.expr) -> ast.Call:
    """name(arguments)."""
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


def filled(form: str, a: ast.expr, b: ast.expr) -> ast.expr:
    """The expression of a form in a and b."""

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return {"a": a, "b": b}.get(node.id, node)

    found: ast.expr = Fill().visit(ast.parse(form, mode="eval").body)
    return found


def is_transposed(node: ast.AST) -> bool:
    """Whether a node is x.T or T(x)."""
    is_call = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "T"
    return is_call or (isinstance(node, ast.Attribute) and node.attr == "T")


def everywhere(node: ast.expr) -> Iterator[tuple[ast.expr, str]]:
    """The expression with another function for mean wherever it stands, if twice or more."""
    means = [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == "mean"]
    for other, words in EVERYWHERE.items() if len(means) > 1 else ():
        yield renamed(node, {"mean": other}), f"with {words}"


def renamed(node: ast.expr, new: Mapping[str, str]) -> ast.expr:
    """The expression with other names in the place of these."""
    node = copy.deepcopy(node)
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            part.id = new.get(part.id, part.id)
    return node


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
    """Every small change of one equation, no two of them in the same words.

    Changes of a part come first: those of a whole equation say less.
    """
    program, spelling = equations(text), dict(letters)
    names = {*inputs, *(e.name for e in program)}
    twins = {name: f"{name}_2" for name in names if f"{name}_2" in names}
    found = list[tuple[str, Change, tuple[Equation, ...]]]()
    for of_a_part in (True, False):
        for i, equation in enumerate(program):
            if equation.given:
                continue
            named = f"the equation of {spelling.get(equation.name, equation.name)}"
            where = f"[{equation.tag}]" if equation.tag else named
            known = (*inputs, *(e.name for e in program[:i]))
            if of_a_part:
                here = _of_a_part(equation.expression, known, spelling)
            else:
                here = _of_the_whole(equation.expression, known, spelling, scalars)
            for change in here:
                new = {equation.name: change.expression}
                if equation.name in twins:  # the same for a second adapter
                    new[twins[equation.name]] = renamed(change.expression, twins)
                changed = (e._replace(expression=new.get(e.name, e.expression)) for e in program)
                found.append((where, change, tuple(changed)))
    words = _told_apart([(where, change) for where, change, _ in found])
    return tuple(
        Hypothesis(where, text, new) for (where, _, new), text in zip(found, words, strict=True)
    )


def _of_a_part(
    whole: ast.expr, known: tuple[str, ...], letters: Mapping[str, str]
) -> Iterator[Change]:
    for new, words in everywhere(whole):
        yield Change(new, words, ())
    yield from changes(whole, known, letters)


def _of_the_whole(
    whole: ast.expr, known: tuple[str, ...], letters: Mapping[str, str], scalars: tuple[Factor, ...]
) -> Iterator[Change]:
    yield Change(filled("-a", whole, whole), "with the opposite sign", ())
    yield Change(filled("a * 0.0", whole, whole), "set to zero", ())
    for name in known:
        words = f"with {letters.get(name, name)} in place of all of it"
        yield Change(ast.Name(name, ast.Load()), words, ())
    for expression, divided, multiplied in scalars:
        scalar = ast.parse(expression, mode="eval").body
        used = {n.id for n in ast.walk(scalar) if isinstance(n, ast.Name)}
        if used <= {*known, *FUNCTIONS}:
            yield Change(filled("a / b", whole, scalar), divided, ())
            yield Change(filled("a * b", whole, scalar), multiplied, ())


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
    if is_plain(want) and not is_plain(got):
        return False
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


def is_plain(x: Any) -> bool:
    """Whether a value is a number, or an array of floating-point numbers of NumPy's own class."""
    is_array = type(x) is np.ndarray and x.dtype.kind == "f"
    return is_array or isinstance(x, int | float | np.floating)
