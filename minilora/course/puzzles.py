"""Puzzles: small functions that must be right and meet a target besides, such as little memory.

The functions are the solutions; a student is given their signatures and docstrings alone.
"""

from __future__ import annotations

import ast
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.backend import Array
from minilora.course.cases import SIZES, Functions, Inputs, Outputs, Task, named, whole
from minilora.course.exercises import EXERCISES, Exercise
from minilora.pairs import Sizes

# --- the solutions -----------------------------------------------------------------------------


def thin_gradient(x: Array, dy: Array, B: Array, scale: float) -> Array:
    """dA of y = s x A B, never larger than N × R on the way.

    x (N, I), dy (N, O), B (R, O) -> (I, R). It is s xᵀ dy Bᵀ; the order of the products decides.
    """
    return x.T @ (scale * (dy @ B.T))


def two_as_one(
    A1: Array, B1: Array, s1: float, A2: Array, B2: Array, s2: float
) -> tuple[Array, Array]:
    """One adapter A, B whose product is the update of both, A B = s1 A1 B1 + s2 A2 B2.

    (I, R1), (R1, O), (I, R2), (R2, O) -> (I, R1 + R2), (R1 + R2, O).
    """
    return np.concatenate([A1, A2], axis=1), np.concatenate([s1 * B1, s2 * B2], axis=0)


def unswapped(qkv: Array) -> Array:
    """The fused weight (C, 3C) with its columns in the order q, k, v.

    Somebody has stored q, v, k. A new array.
    """
    q, v, k = np.split(qkv, 3, axis=1)
    return np.concatenate([q, k, v], axis=1)


def step_of_update(
    A: Array, B: Array, dA: Array, dB: Array, lr: float, scale: float
) -> tuple[Array, Array]:
    """How the update s A B changes in a step of gradient descent, as two factors.

    A becomes A - lr dA and B becomes B - lr dB. Returns L (I, 2R) and M (2R, O) whose product is
    the change of s A B: so its rank is at most 2R, however large the weight.
    """
    return np.concatenate([A - lr * dA, -lr * dA], axis=1), scale * np.concatenate([-lr * dB, B])


def merged_in_a_line(w: Array, A: Array, B: Array, scale: float) -> Array:
    """The merged weight W + s A B, a new array.  (I, O), (I, R), (R, O) -> (I, O)"""
    return w + scale * A @ B


def causal_weights(scores: Array) -> Array:
    """The softmax of each row t over the times s up to t; 0 after it.  (T, T) -> (T, T)

    Finite for scores of any size, also where a later score is much larger than all that count.
    """
    T = len(scores)
    masked = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    p = np.exp(masked - masked.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def rotated(A: Array, B: Array, M: Array) -> tuple[Array, Array]:
    """Other factors of the same product: A M, and the B that goes with it.

    (I, R), (R, O), an invertible M (R, R) -> (I, R), (R, O). The update does not change: the
    factors of an adapter are not unique.
    """
    return A @ M, np.linalg.solve(M, B)


def best_factors(D: Array, rank: int) -> tuple[Array, Array]:
    """The A (I, R) and B (R, O) whose product is nearest to D (I, O) in the Frobenius norm.

    By the singular value decomposition (Eckart & Young 1936).
    """
    U, S, V = np.linalg.svd(D, full_matrices=False)
    return U[:, :rank] * S[:rank], V[:rank]


def update_norm(A: Array, B: Array) -> float:
    """The Frobenius norm of A B.  (I, R), (R, O) -> a number

    ‖A B‖² is the sum of the entries of (Aᵀ A) ∘ (B Bᵀ), two matrices of R × R.
    """
    return float(np.sqrt(np.maximum(((A.T @ A) * (B @ B.T)).sum(), 0.0)))


def overlap(A1: Array, B1: Array, A2: Array, B2: Array) -> float:
    """The inner product of two updates, <A1 B1, A2 B2>, the sum of the products of their entries.

    (I, R), (R, O), (I, Q), (Q, O) -> a number. Adapters with overlap 0 do not disturb each other.
    """
    return float(((A1.T @ A2) * (B1 @ B2.T)).sum())


def of_larger_rank(A: Array, B: Array, alpha: float, rank: int) -> tuple[Array, Array]:
    """The adapter in factors of a larger rank, with the same α, so that its update stays.

    (I, R), (R, O) -> (I, rank), (rank, O). The update is α / R A B before, α / rank A' B' after.
    """
    R, more = len(B), rank - len(B)
    A = np.concatenate([A, np.zeros((len(A), more), A.dtype)], axis=1)
    return A, np.concatenate([B * (rank / R), np.zeros((more, B.shape[1]), B.dtype)])


def thin_table_gradient(index: Array, dy: Array, rows: int) -> Array:
    """dE of y = E[index], without a one-hot matrix.  (N,), (N, C) -> (rows, C)

    An index may come several times, and then its gradients add up.
    """
    dE = np.zeros((rows, dy.shape[1]), dy.dtype)
    np.add.at(dE, index, dy)
    return dE


def balanced(A: Array, B: Array) -> tuple[Array, Array]:
    """Factors of the same product and the same rank with Aᵀ A = B Bᵀ.

    (I, R), (R, O) -> (I, R), (R, O). Then neither factor learns faster than the other; R is at most
    I and O.
    """
    Q, S = np.linalg.qr(A)
    P, T = np.linalg.qr(B.T)
    U, D, V = np.linalg.svd(S @ T.T)
    return Q @ U * np.sqrt(D), (np.sqrt(D) * (P @ V.T)).T


def reached_by_dropout(x: Array, mask: Array, dy: Array, A: Array, B: Array) -> Array:
    """dx of y = (x ∘ mask) A B.  (N, I), (N, I), (N, O), (I, R), (R, O) -> (N, I)

    Nothing flows to what was dropped, whatever is multiplied first.
    """
    return mask * (dy @ B.T @ A.T)


# --- how they are called -----------------------------------------------------------------------


def task(
    name: str,
    results: str,
    make: Callable[[Any, Sizes], Inputs],
    outputs: Callable[[Outputs, Inputs], Outputs] = lambda found, inputs: found,
) -> Task:
    """A call with the inputs in their order; `outputs` is what is compared of the results."""

    def call(functions: Functions, inputs: Inputs) -> Outputs:
        result = functions[name](*inputs.values())
        names = results.split()
        found = named(result, names) if len(names) > 1 else {names[0]: result}
        return outputs(found, inputs)

    return Task(make, call, SIZES)


def arrays(**shapes: str) -> Callable[[Any, Sizes], Inputs]:
    """Inputs of these shapes in the letters of Sizes; N rows, a number is itself."""

    def make(rng: Any, s: Sizes) -> Inputs:
        sizes = {**s._asdict(), "N": int(np.prod(s.lead)), "I": s.C, "Q": s.R + 1, "T": s.lead[-1]}
        found: Inputs = {}
        for name, shape in shapes.items():
            if shape.replace(".", "").isdigit():
                found[name] = float(shape)
            else:
                found[name] = whole(rng, tuple(sizes[letter] for letter in shape))
        return found

    return make


def product(left: str, right: str, update: str = "update") -> Callable[[Outputs, Inputs], Outputs]:
    """Of two factors their product alone: other factors are as right."""

    def outputs(found: Outputs, inputs: Inputs) -> Outputs:
        return {update: np.asarray(found[left]) @ np.asarray(found[right])}

    return outputs


def _invertible(rng: Any, s: Sizes) -> Inputs:
    inputs = arrays(A="IR", B="RO")(rng, s)
    M = np.triu(whole(rng, (s.R, s.R)), 1) + np.diag(1.0 + np.arange(s.R) % 2)
    return {**inputs, "M": M}


def _fused(rng: Any, s: Sizes) -> Inputs:
    return {"qkv": whole(rng, (s.C, 3 * s.C))}


def _scores(rng: Any, s: Sizes) -> Inputs:
    T = s.lead[-1]
    return {"scores": whole(rng, (T, T))}


def _of_rank(rng: Any, s: Sizes) -> Inputs:
    D = np.random.default_rng(s.C + 10 * s.O).standard_normal((s.C, s.O))  # no value comes twice
    return {"D": D, "rank": min(s.R, s.C, s.O)}


def _larger(rng: Any, s: Sizes) -> Inputs:
    return {**arrays(A="IR", B="RO")(rng, s), "alpha": 4.0, "rank": s.R + 2}


def _table(rng: Any, s: Sizes) -> Inputs:
    N = int(np.prod(s.lead))
    return {"index": rng.integers(s.V, size=N), "dy": whole(rng, (N, s.C)), "rows": s.V}


def _full_rank(rng: Any, s: Sizes) -> Inputs:
    R = min(s.R, s.C, s.O)
    return {"A": whole(rng, (s.C, R)), "B": whole(rng, (R, s.O))}


def _mask(rng: Any, s: Sizes) -> Inputs:
    inputs = arrays(x="NI", mask="NI", dy="NO", A="IR", B="RO")(rng, s)
    return {**inputs, "mask": 2.0 * (inputs["mask"] > 0)}


def _scaled_product(found: Outputs, v: Inputs) -> Outputs:
    return {"update": v["alpha"] / v["rank"] * (np.asarray(found["A"]) @ np.asarray(found["B"]))}


def _balanced(found: Outputs, v: Inputs) -> Outputs:
    A, B = np.asarray(found["A"]), np.asarray(found["B"])
    return {"update": A @ B, "difference": A.T @ A - B @ B.T}


# --- targets -----------------------------------------------------------------------------------

Target = Callable[[Functions, str], str | None]


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory that is held at once by arrays that a call makes."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def little_memory(name: str, most: str, bound: int, **sizes: tuple[int, ...]) -> Target:
    """At most so many numbers at once, for arguments of these shapes; () is the number 1."""

    def target(functions: Functions, source: str) -> str | None:
        rng = np.random.default_rng(0)
        arguments: list[Any] = []
        for key, shape in sizes.items():
            if key == "index":
                arguments.append(rng.integers(1000, size=shape))
            elif key == "rows":
                arguments.append(1000)
            else:
                arguments.append(rng.standard_normal(shape) if shape else 1.0)
        f = functions[name]
        f(*arguments)
        numbers = peak_bytes(lambda: f(*arguments)) // 8
        if numbers <= bound:
            return None
        return (
            f"It makes {numbers:,} numbers at once; with nothing larger than {most} some "
            f"{bound:,} suffice."
        )

    return target


def one_statement(name: str) -> Target:
    """A body of one statement after the docstring."""

    def target(functions: Functions, source: str) -> str | None:
        for node in ast.walk(ast.parse(source)) if source else ():
            if isinstance(node, ast.FunctionDef) and node.name == name:
                body = [
                    s
                    for s in node.body
                    if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
                ]
                if len(body) > 1:
                    return f"Its body has {len(body)} statements; one is asked."
        return None

    return target


def columns_at_most(name: str, arguments: Callable[[], list[Any]], most: int, words: str) -> Target:
    """The first result has at most so many columns."""

    def target(functions: Functions, source: str) -> str | None:
        found = np.shape(functions[name](*arguments())[0])
        return None if found[1] <= most else f"The first factor has {found[1]} columns; {words}."

    return target


def no_leak(functions: Functions, source: str) -> str | None:
    """Later scores, however large, change nothing."""
    scores = np.random.default_rng(0).standard_normal((5, 5))
    later = scores + np.triu(np.full((5, 5), 1e4), 1)
    with np.errstate(all="ignore"):
        a, b = (functions["causal_weights"](x) for x in (scores, later))
    if not np.isfinite(b).all():
        return (
            "A later score of 10,000 makes it infinite or NaN: the maximum is to be that of the "
            "times that count."
        )
    return (
        None
        if np.allclose(a, b, rtol=0, atol=1e-12)
        else "A later score changes the weights: it leaks."
    )


def is_new(functions: Functions, source: str) -> str | None:
    """The result shares no memory with the argument."""
    qkv = np.arange(18.0).reshape(3, 6)
    if np.shares_memory(functions["unswapped"](qkv), qkv):
        return "It returns a view: what is changed there later changes the old weight as well."
    return None


def small_solve(functions: Functions, source: str) -> str | None:
    """No inverse, as source text or in accuracy: an ill-conditioned M keeps the product."""
    if "inv(" in source.replace("pinv(", "inv("):
        return "It inverts M; np.linalg.solve(M, B) is as short, faster and more accurate."
    return None


def _factors() -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = ((9, 2), (2, 8), (9, 2), (2, 8))
    return [*(rng.standard_normal(shape) for shape in shapes), 0.1, 2.0]


def _adapters() -> list[Any]:
    rng = np.random.default_rng(0)
    a1, b1, a2, b2 = (rng.standard_normal(s) for s in ((9, 2), (2, 8), (9, 3), (3, 8)))
    return [a1, b1, 2.0, a2, b2, 3.0]


# --- the register ------------------------------------------------------------------------------

LORA, MIXING = "docs/derivations/lora.md", "docs/mixing.md"
BIG = {"x": (400, 300), "dy": (400, 200), "B": (2, 200), "s": ()}


def _rows() -> list[Exercise]:
    def puzzle(
        function: Callable[..., Any], title: str, page: str, minutes: int, needs: tuple[str, ...],
        how: Task, aim: str = "", target: Target | None = None,
    ) -> Exercise:  # fmt: skip
        name = function.__name__
        return Exercise(
            name=name, title=title, module=sys.modules[__name__], functions=(name,), page=page,
            minutes=minutes, needs=needs, tasks={"puzzle": how}, target=target, aim=aim,
            kind="puzzle",
        )  # fmt: skip

    return [
        puzzle(
            thin_gradient, "dA without a large array", LORA, 10, ("lora",),
            task("thin_gradient", "dA", arrays(x="NI", dy="NO", B="RO", scale="3")),
            "Target: no array larger than N × R or I × R is made; memory is measured.",
            little_memory("thin_gradient", "N × R", 4000, **BIG),
        ),
        puzzle(
            two_as_one, "Two adapters as one", MIXING, 10, ("lora",),
            task("two_as_one", "A B", arrays(A1="IR", B1="RO", s1="3", A2="IQ", B2="QO", s2="5"),
                 product("A", "B")),
            "Target: of rank R1 + R2, not that of the weight.",
            columns_at_most("two_as_one", _adapters, 5, "R1 + R2 = 5 suffice"),
        ),
        puzzle(
            unswapped, "Undo a swap of k and v", "docs/derivations/attention.md", 5, ("attention",),
            task("unswapped", "w", _fused), "Target: a new array, no view of the old.", is_new,
        ),
        puzzle(
            step_of_update, "The update after a step has rank at most 2R", LORA, 20, ("lora",),
            task("step_of_update", "L M",
                 arrays(A="IR", B="RO", dA="IR", dB="RO", lr="0.3", scale="3"),
                 product("L", "M", "change")),
            "Target: factors with 2R columns and rows.",
            columns_at_most("step_of_update", _factors, 4, "2R = 4 suffice"),
        ),
        puzzle(
            merged_in_a_line, "Merge in one line", LORA, 3, ("lora",),
            task("merged_in_a_line", "w", arrays(w="IO", A="IR", B="RO", scale="3")),
            "Target: one statement.", one_statement("merged_in_a_line"),
        ),
        puzzle(
            causal_weights, "A mask that does not leak", "docs/derivations/attention.md", 15,
            ("softmax",), task("causal_weights", "P", _scores),
            "Target: no later score, however large, changes anything.", no_leak,
        ),
        puzzle(
            rotated, "Rotate the factors without changing the product", LORA, 10, ("lora",),
            task("rotated", "A B", _invertible,
                 lambda found, v: {"A": found["A"], **product("A", "B")(found, v)}),
            "Target: no inverse is computed.", small_solve,
        ),
        puzzle(
            best_factors, "The best update of rank R", LORA, 15, ("two_as_one",),
            task("best_factors", "A B", _of_rank, product("A", "B")),
            "Target: factors with R columns and rows.",
            columns_at_most("best_factors", lambda: [_adapters()[0] @ np.ones((2, 8)), 3],
                            3, "R = 3 are asked"),
        ),
        puzzle(
            update_norm, "The size of an update, without the update", LORA, 15, ("lora",),
            task("update_norm", "norm", arrays(A="IR", B="RO")),
            "Target: no array larger than R × R and the factors is made; memory is measured.",
            little_memory("update_norm", "a factor", 1500, A=(300, 2), B=(2, 200)),
        ),
        puzzle(
            overlap, "How much two adapters have in common", MIXING, 15, ("update_norm",),
            task("overlap", "product", arrays(A1="IR", B1="RO", A2="IQ", B2="QO")),
            "Target: no array of I × O is made; memory is measured.",
            little_memory("overlap", "a factor", 2500, A1=(300, 2),
                          B1=(2, 200), A2=(300, 3), B2=(3, 200)),
        ),
        puzzle(
            of_larger_rank, "The same update in a larger rank", LORA, 10, ("lora",),
            task("of_larger_rank", "A B", _larger, _scaled_product),
            "Target: factors of the rank that is asked.",
            columns_at_most("of_larger_rank", lambda: [*_factors()[:2], 4.0, 5], 5, "5 are asked"),
        ),
        puzzle(
            thin_table_gradient, "An embedding's gradient without a one-hot matrix",
            "docs/derivations/embedding.md", 10, ("embedding",),
            task("thin_table_gradient", "dE", _table),
            "Target: no array larger than the gradient is made; memory is measured.",
            little_memory("thin_table_gradient", "dE", 20_000, index=(900,), dy=(900, 4), rows=()),
        ),
        puzzle(
            balanced, "Factors of equal size", LORA, 30, ("rotated", "best_factors"),
            task("balanced", "A B", _full_rank, _balanced),
            "Target: the same rank R.",
            columns_at_most("balanced", lambda: _factors()[:2], 2, "R = 2 are asked"),
        ),
        puzzle(
            reached_by_dropout, "Where dropout lets the gradient through",
            "docs/derivations/dropout.md", 10, ("dropout", "lora"),
            task("reached_by_dropout", "dx", _mask),
            "Target: no array of I × O is made; memory is measured.",
            little_memory("reached_by_dropout", "N × I", 12_000, x=(10, 300), mask=(10, 300),
                          dy=(10, 250), A=(300, 2), B=(2, 250)),
        ),
    ]  # fmt: skip


PUZZLES: dict[str, Exercise] = {row.name: row for row in _rows()}
ALL: dict[str, Exercise] = {**EXERCISES, **PUZZLES}
