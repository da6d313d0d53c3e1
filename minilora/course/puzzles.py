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

Make = Callable[[Any, Sizes], Inputs]
Compared = Callable[[Outputs, Inputs], Outputs]
"""What is compared of the results, by name."""


def arrays(**shapes: str) -> Make:
    """Inputs of these shapes, in the letters of Sizes and of `sizes`; a number is itself."""

    def make(rng: Any, s: Sizes) -> Inputs:
        own = {"N": int(np.prod(s.lead)), "I": s.C, "Q": s.R + 1, "T": s.lead[-1], "F": 3 * s.C}
        sizes = {**s._asdict(), **own, "r": min(s.R, s.C, s.O)}
        return {
            name: float(shape) if shape[0].isdigit() else whole(rng, tuple(sizes[k] for k in shape))
            for name, shape in shapes.items()
        }

    return make


def product(left: str, right: str, update: str = "update") -> Compared:
    """Of two factors their product alone: other factors are as right."""
    return lambda found, v: {update: np.asarray(found[left]) @ np.asarray(found[right])}


def _invertible(rng: Any, s: Sizes) -> Inputs:
    M = np.triu(whole(rng, (s.R, s.R)), 1) + np.diag(1.0 + np.arange(s.R) % 2)
    return {**arrays(A="IR", B="RO")(rng, s), "M": M}


def _of_rank(rng: Any, s: Sizes) -> Inputs:
    D = np.random.default_rng(s.C + 10 * s.O).standard_normal((s.C, s.O))  # no value comes twice
    return {"D": D, "rank": min(s.R, s.C, s.O)}


def _larger(rng: Any, s: Sizes) -> Inputs:
    return {**arrays(A="IR", B="RO", alpha="4")(rng, s), "rank": s.R + 2}


def _table(rng: Any, s: Sizes) -> Inputs:
    N = int(np.prod(s.lead))
    return {"index": rng.integers(s.V, size=N), "dy": whole(rng, (N, s.C)), "rows": s.V}


def _mask(rng: Any, s: Sizes) -> Inputs:
    inputs = arrays(x="NI", mask="NI", dy="NO", A="IR", B="RO")(rng, s)
    return {**inputs, "mask": 2.0 * (inputs["mask"] > 0)}


def _with_A(found: Outputs, v: Inputs) -> Outputs:
    return {"A": found["A"], **product("A", "B")(found, v)}


def _scaled_product(found: Outputs, v: Inputs) -> Outputs:
    return {"update": v["alpha"] / v["rank"] * (np.asarray(found["A"]) @ np.asarray(found["B"]))}


def _balanced(found: Outputs, v: Inputs) -> Outputs:
    A, B = np.asarray(found["A"]), np.asarray(found["B"])
    return {"update": A @ B, "difference": A.T @ A - B @ B.T}


# --- targets -----------------------------------------------------------------------------------

Target = Callable[[Callable[..., Any], str], str | None]
"""Of a function and its source: a sentence where the target is missed."""


def drawn(*shapes: tuple[int, ...] | float) -> list[Any]:
    """Random arrays of these shapes; a number is itself."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s) if isinstance(s, tuple) else s for s in shapes]


def little_memory(most: str, bound: int, arguments: list[Any]) -> Target:
    """At most so many numbers at once."""

    def target(f: Callable[..., Any], source: str) -> str | None:
        f(*arguments)
        tracemalloc.start()
        try:
            f(*arguments)
            numbers = tracemalloc.get_traced_memory()[1] // 8
        finally:
            tracemalloc.stop()
        if numbers <= bound:
            return None
        return (
            f"It makes {numbers:,} numbers at once; with nothing larger than {most} some "
            f"{bound:,} suffice."
        )

    return target


def columns_at_most(most: int, words: str, arguments: list[Any]) -> Target:
    """The first result has at most so many columns."""

    def target(f: Callable[..., Any], source: str) -> str | None:
        found = np.shape(f(*arguments)[0])[1]
        return None if found <= most else f"The first factor has {found} columns; {words}."

    return target


def one_statement(f: Callable[..., Any], source: str) -> str | None:
    """A body of one statement after the docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == getattr(f, "__name__", ""):
            count = len(node.body) - (ast.get_docstring(node) is not None)
            return None if count == 1 else f"Its body has {count} statements; one is asked."
    return None


def no_leak(f: Callable[..., Any], source: str) -> str | None:
    """Later scores, however large, change nothing."""
    scores = np.random.default_rng(0).standard_normal((5, 5))
    a, b = f(scores), f(scores + np.triu(np.full((5, 5), 1e4), 1))
    if not np.isfinite(b).all():
        return (
            "A later score of 10,000 makes it infinite or NaN: the maximum is to be that of the "
            "times that count."
        )
    leaks = not np.allclose(a, b, rtol=0, atol=1e-12)
    return "A later score changes the weights: it leaks." if leaks else None


def is_new(f: Callable[..., Any], source: str) -> str | None:
    """The result shares no memory with the argument."""
    qkv = np.arange(18.0).reshape(3, 6)
    if np.shares_memory(f(qkv), qkv):
        return "It returns a view: what is changed there later changes the old weight as well."
    return None


def no_inverse(f: Callable[..., Any], source: str) -> str | None:
    """No inverse in the source text."""
    if "inv(" in source.replace("pinv(", "inv("):
        return "It inverts M; np.linalg.solve(M, B) is as short, faster and more accurate."
    return None


# --- the register ------------------------------------------------------------------------------


def puzzle(
    function: Callable[..., Any], title: str, page: str, minutes: int, needs: tuple[str, ...],
    results: str, make: Make, compared: Compared | None, aim: str, target: Target,
) -> Exercise:  # fmt: skip
    """A row: `results` names what the function returns."""
    name, names = function.__name__, results.split()

    def call(functions: Functions, inputs: Inputs) -> Outputs:
        result = functions[name](*inputs.values())
        found = named(result, names) if len(names) > 1 else {results: result}
        return compared(found, inputs) if compared else found

    return Exercise(
        name, title, sys.modules[__name__], (name,), f"docs/{page}.md", minutes, needs,
        {"puzzle": Task(make, call, SIZES)}, aim=f"Target: {aim}.", kind="puzzle",
        target=lambda functions, source: target(functions[name], source),
    )  # fmt: skip


ATTENTION, EMBEDDING, DROPOUT, LORA = (
    f"derivations/{page}" for page in ("attention", "embedding", "dropout", "lora")
)
TALL, WIDE, SMALL = (300, 2), (2, 200), ((9, 2), (2, 8))  # factors
MEMORY = "is made; memory is measured"
PUZZLES: dict[str, Exercise] = {row.name: row for row in (
    puzzle(thin_gradient, "dA without a large array", LORA, 10, ("lora",),
           "dA", arrays(x="NI", dy="NO", B="RO", scale="3"), None,
           f"no array larger than N × R or I × R {MEMORY}",
           little_memory("N × R", 4000, drawn((400, 300), (400, 200), WIDE, 1.0))),
    puzzle(two_as_one, "Two adapters as one", "mixing", 10, ("lora",),
           "A B", arrays(A1="IR", B1="RO", s1="3", A2="IQ", B2="QO", s2="5"), product("A", "B"),
           "of rank R1 + R2, not that of the weight",
           columns_at_most(5, "R1 + R2 = 5 suffice", drawn(*SMALL, 2.0, (9, 3), (3, 8), 3.0))),
    puzzle(unswapped, "Undo a swap of k and v", ATTENTION, 5, ("attention",),
           "w", arrays(qkv="IF"), None,
           "a new array, no view of the old", is_new),
    puzzle(step_of_update, "The update after a step has rank at most 2R", LORA, 20, ("lora",),
           "L M", arrays(A="IR", B="RO", dA="IR", dB="RO", lr="0.3", scale="3"),
           product("L", "M", "change"),
           "factors with 2R columns and rows",
           columns_at_most(4, "2R = 4 suffice", drawn(*SMALL, *SMALL, 0.1, 2.0))),
    puzzle(merged_in_a_line, "Merge in one line", LORA, 3, ("lora",),
           "w", arrays(w="IO", A="IR", B="RO", scale="3"), None,
           "one statement", one_statement),
    puzzle(causal_weights, "A mask that does not leak", ATTENTION, 15, ("softmax",),
           "P", arrays(scores="TT"), None,
           "no later score, however large, changes anything", no_leak),
    puzzle(rotated, "Rotate the factors without changing the product", LORA, 10, ("lora",),
           "A B", _invertible, _with_A,
           "no inverse is computed", no_inverse),
    puzzle(best_factors, "The best update of rank R", LORA, 15, ("two_as_one",),
           "A B", _of_rank, product("A", "B"),
           "factors with R columns and rows",
           columns_at_most(3, "R = 3 are asked", [*drawn((9, 8)), 3])),
    puzzle(update_norm, "The size of an update, without the update", LORA, 15, ("lora",),
           "norm", arrays(A="IR", B="RO"), None,
           f"no array larger than R × R and the factors {MEMORY}",
           little_memory("a factor", 1500, drawn(TALL, WIDE))),
    puzzle(overlap, "How much two adapters have in common", "mixing", 15, ("update_norm",),
           "product", arrays(A1="IR", B1="RO", A2="IQ", B2="QO"), None,
           f"no array of I × O {MEMORY}",
           little_memory("a factor", 2500, drawn(TALL, WIDE, (300, 3), (3, 200)))),
    puzzle(of_larger_rank, "The same update in a larger rank", LORA, 10, ("lora",),
           "A B", _larger, _scaled_product,
           "factors of the rank that is asked",
           columns_at_most(5, "5 are asked", drawn(*SMALL, 4.0, 5))),
    puzzle(thin_table_gradient, "An embedding's gradient without a one-hot matrix", EMBEDDING, 10,
           ("embedding",), "dE", _table, None,
           f"no array larger than the gradient {MEMORY}",
           little_memory("dE", 20_000, [np.arange(900), *drawn((900, 4), 1000)])),
    puzzle(balanced, "Factors of equal size", LORA, 30, ("rotated", "best_factors"),
           "A B", arrays(A="Ir", B="rO"), _balanced,
           "the same rank R",
           columns_at_most(2, "R = 2 are asked", drawn(*SMALL))),
    puzzle(reached_by_dropout, "Where dropout lets the gradient through", DROPOUT, 10,
           ("dropout", "lora"),
           "dx", _mask, None,
           f"no array of I × O {MEMORY}",
           little_memory("N × I", 12_000, drawn((10, 300), (10, 300), (10, 250), TALL, (2, 250)))),
)}  # fmt: skip
ALL: dict[str, Exercise] = {**EXERCISES, **PUZZLES}
