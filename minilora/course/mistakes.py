"""The equations of every exercise, and the classic mistakes that are more than one small change.

Each small change of an equation is a hypothesis already (see `edits`). A mistake that is more than
that is a row here: the equation as it then reads → the sentence that names it.
"""

# ruff: noqa: E501 (a mistake is one row: its equation beside its sentence)

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from minilora import lora, ops
from minilora.course.cases import Inputs
from minilora.course.edits import FUNCTIONS, Equation, Factor, equations
from minilora.course.exercises import block_cache
from minilora.keep import Plan

Values = dict[str, Any]


class Lesson(NamedTuple):
    """The equations of an exercise, and what can be said of what does not agree with them.

    `mistakes` are rows of equations, with ";" between them, and after "→" the sentence. `bind`
    gives the equations' variables for a case: matrices whose rows are examples.
    """

    equations: str
    mistakes: str = ""
    letters: Mapping[str, str] = {}
    factors: tuple[Factor, ...] = ()
    bind: Callable[[Inputs], Values] = lambda inputs: matrices(inputs)

    def classics(self) -> list[tuple[tuple[Equation, ...], str]]:
        """The classic mistakes: all equations as they then read, and the sentence."""
        found = []
        for text, sentence in re.findall(r"([^→]+)→ (.+)", self.mistakes):
            new = {e.name: e for e in equations(text)}
            program = tuple(new.pop(e.name, e) for e in equations(self.equations))
            assert not new, f"{', '.join(new)}: no equation of that name"
            found.append((program, sentence))
        return found


# --- variables ---------------------------------------------------------------------------------


def matrices(inputs: Inputs) -> Values:
    """The inputs with leading dimensions made one, indices in a line, and N, the number of rows."""
    values: Values = {}
    for name, x in inputs.items():
        if isinstance(x, np.ndarray) and x.ndim:
            is_index = x.dtype.kind == "i"
            values[name] = x.reshape(-1) if is_index else ops.rows(x) if x.ndim > 2 else x
        elif isinstance(x, int | float | np.ndarray | np.generic):
            values[name] = x
    rows = [inputs[k] for k in ("dy", "dxhat", "logits") if k in inputs]
    values["N"] = float(math.prod(np.shape(rows[0])[:-1])) if rows else 1.0
    return values


def of_normalise(inputs: Inputs) -> Values:
    v = matrices(inputs)
    c = v["x"] - v["x"].mean(-1, keepdims=True)
    rstd = 1.0 / np.sqrt((c * c).mean(-1, keepdims=True) + inputs["eps"])
    shape = inputs["x"].shape

    def over_batch(a: np.ndarray) -> np.ndarray:
        mean = a.reshape(shape).mean(0, keepdims=True)
        return ops.rows(np.broadcast_to(mean, shape))

    own = {"c": c, "rstd": rstd, "xhat": c * rstd, "C": float(shape[-1]), "over_batch": over_batch}
    return v | own


def of_softmax(inputs: Inputs) -> Values:
    v = matrices(inputs)
    return v | {"y": FUNCTIONS["softmax"](v["x"]), "C": float(v["x"].shape[-1])}


def of_rms(inputs: Inputs) -> Values:
    return matrices(inputs) | dict(zip("BnC", map(float, inputs["x"].shape), strict=True))


def of_attend(inputs: Inputs) -> Values:
    q, k, v, dy = (inputs[name] for name in ("q", "k", "v", "dy"))
    P = ops.attention_weights(q, k, mask=inputs["mask"])
    sizes = {"root": math.sqrt(q.shape[-1]), "K": float(q.shape[-1]), "n": float(q.shape[-2])}
    return {"q": q, "k": k, "v": v, "dy": dy, "P": P, **sizes}


def of_attention(inputs: Inputs) -> Values:
    q, k, v = ops.split_heads(inputs["qkv"], inputs["heads"])
    B, H, n, K = q.shape
    return {
        "q": q, "k": k, "v": v, "dy": inputs["dy"].reshape(B, n, H, K).transpose(0, 2, 1, 3),
        "mask": ops.causal_mask(n, q),
        "root": math.sqrt(K), "K": float(K), "n": float(n), "H": float(H),
        "merged": lambda x: x.transpose(0, 2, 1, 3).reshape(B, n, H * K),
        "straight": lambda x: x.reshape(B, n, H * K),
    }  # fmt: skip


def of_cross_entropy(inputs: Inputs) -> Values:
    logits, targets = ops.rows(inputs["logits"]), inputs["targets"].reshape(-1)
    is_counted = targets != inputs.get("ignore_index", -100)
    target = np.where(is_counted, targets, 0)
    divisor = float(inputs.get("count") or max(is_counted.sum(), 1))
    return {
        "logits": logits, "onehot": np.eye(logits.shape[-1])[target],
        "lse": np.log(np.exp(logits).sum(-1, keepdims=True)),
        "weight": is_counted[:, None] / divisor, "target": target,
        "counted": is_counted[:, None].astype(float), "N": divisor,
        "all": float(targets.size), "V": float(logits.shape[-1]), "dloss": inputs["dloss"],
    }  # fmt: skip


def of_position(inputs: Inputs) -> Values:
    x, wpe, dy, offset = (inputs[k] for k in ("x", "wpe", "dy", "offset"))
    n = dy.shape[-2]

    def place(values: np.ndarray, start: int = offset) -> np.ndarray:
        y = np.zeros_like(wpe)
        y[start : start + n] = values[: len(y[start : start + n])]
        return y

    return {
        "x": x, "wpe": wpe, "dy": dy, "N": float(len(dy)), "n": float(n), "place": place,
        "at_zero": lambda values: place(values, 0),
        "in_table": lambda values: wpe * (place(1 + 0 * values) == 0) + place(values),
        "at_next": lambda values: place(values, offset + 1),
        "at_end": lambda values: place(values, len(wpe) - n),
    }  # fmt: skip


def of_dropout(inputs: Inputs) -> Values:
    v = matrices(inputs)
    return v | {"mask": v.get("mask", 1 + 0 * v["x"])}


def of_lora(inputs: Inputs) -> Values:
    v = matrices(inputs)
    return v | {"h": v["scale"] * v["x"] @ v["A"], "xA": v["x"] @ v["A"]}


def of_lora_embedding(inputs: Inputs) -> Values:
    v = matrices(inputs)
    return v | {"h": v["scale"] * v["A"][v["index"]]}


def of_adapted(inputs: Inputs) -> Values:
    v, columns = matrices(inputs), inputs["columns"]
    x = v["x"]
    for end in ("", "_2"):
        if f"A{end}" in v:
            v[f"mask{end}"] = v.get(f"mask{end}", np.ones_like(x))
            v[f"kept{end}"] = x * v[f"mask{end}"]
    if "A_2" not in v:
        v |= {"A_2": 0 * v["A"], "B_2": 0 * v["B"], "scale_2": 0.0}
        v |= {"mask_2": 1 + 0 * x, "kept_2": x}
    for end in ("", "_2"):
        v[f"h{end}"] = v[f"scale{end}"] * v[f"kept{end}"] @ v[f"A{end}"]
    return v | {"dyc": v["dy"][:, columns], "first": v["dy"][:, : columns.stop - columns.start]}


def of_block(inputs: Inputs) -> Values:
    cache = block_cache(inputs, Plan(base=True, lora=True))
    values: Values = {"dy": inputs["dy"], "x": inputs["x"]}
    for name in ("qkv", "o", "up", "down"):
        values |= _of_map(name, cache[name])
    for name in ("ln_1", "ln_2"):
        for i, word in enumerate(("through", "w", "b")):
            values[f"{word}_{name}"] = lambda d, i=i, name=name: ops.layer_norm_backward(
                d, cache[name]
            )[i]
    values["through_gelu"] = lambda d: ops.gelu_backward(d, cache["gelu"])[0]
    values["through_attention"] = lambda d: ops.attention_backward(d, cache["attention"])[0]
    return values


def _of_map(name: str, cache: Any) -> Values:
    def back(d: Any) -> Any:
        return lora.adapted_linear_backward(d, cache)

    def factor(letter: str) -> Callable[[Any], Any]:
        return lambda d: back(d)[2].get(name, {}).get(letter)

    return {
        f"through_{name}": lambda d: back(d)[0], f"W_{name}": lambda d: ops.linear_backward(d, cache.linear)[0],
        f"w_{name}": lambda d: back(d)[1]["w"], f"b_{name}": lambda d: back(d)[1]["b"],
        f"A_{name}": factor("A"), f"B_{name}": factor("B"),
    }  # fmt: skip


def of_merging(inputs: Inputs) -> Values:
    if "A_k" not in inputs:
        return dict(inputs)
    C, thirds = inputs["up"].shape[0], (1, 2) if "v" in inputs["adapters"] else (1,)
    scales = {f"s_{n}": inputs["alpha"] / inputs[f"A_{n}"].shape[1] for n in ("k", "up")}

    def place(update: np.ndarray, *thirds: int) -> np.ndarray:
        return np.concatenate([thirds.count(i) * update for i in range(3)], axis=1)

    return {
        **{name: x for name, x in inputs.items() if name != "adapters"}, **scales,
        "base_scale": scales["s_k"],
        "others": lambda w: w * (place(np.ones((C, C)), *thirds) == 0),
        "at_k": lambda u: place(u, *thirds),
        "at_q": lambda u: place(u, *(0 for _ in thirds)),
        "at_v": lambda u: place(u, *(2 for _ in thirds)),
        "at_all": lambda u: place(u, *(3 * [0, 1, 2])[: 3 * len(thirds)]),
    }  # fmt: skip


def of_mixing(inputs: Inputs) -> Values:
    ends = [f"{name}{end}" for end in ("", "_2") for name in ("k", "up")]
    scale = {n: inputs["alpha" + "_2" * n.endswith("_2")] / inputs[f"A_{n}"].shape[1] for n in ends}
    return {**inputs, **{f"s_{n}": s for n, s in scale.items()}}


def of_numeric(inputs: Inputs) -> Values:
    x, w, dy, h = (inputs[k] for k in ("x", "w", "dy", "h"))

    def f(x: np.ndarray, d: np.ndarray) -> np.ndarray:
        y = x @ w
        return np.asarray(np.sum(d * (y * y + y)))

    def along(step: float, d: np.ndarray, at: np.ndarray = x, others: float = 0.0) -> np.ndarray:
        dx = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            e = np.full_like(x, others)
            e[i] = step
            dx[i] = f(at + e, d)
        return dx

    return {"x": x, "w": w, "dy": dy, "h": h, "D": along, "size_y": float(dy.size),
            "together": lambda step, d: np.full_like(x, f(x + step, d)), "one": np.ones_like(dy)}  # fmt: skip


# --- words -------------------------------------------------------------------------------------

LETTERS = {
    "scale": "s", "dxA": "d(xA)", "xhat": "x̂", "dxhat": "dx̂", "rstd": "ρ", "root": "√K", "w": "W",
    "kappa": "κ", "slope": "dy/dx", "du": "du/dx", "onehot": "onehot", "drows": "dh",
    "beta1": "β₁", "beta2": "β₂", "lr": "η", "weight_decay": "λ", "eps": "ε", "matrix": "[matrix]",
    "mhat": "m̂", "vhat": "v̂", "scatter": "Σ_index",
}  # fmt: skip
VECTOR = {**LETTERS, "w": "w"}


def factor(expression: str, words: str, again: str = "", once_more: str = "") -> Factor:
    """A factor, by which a whole equation may be divided or multiplied."""
    return expression, f"divided by {words}{again}", f"multiplied by {words}{once_more}"


BY_N, BY_2, BY_K = (
    factor("N", "N, the number of rows"),
    factor("2", "2"),
    factor("K", "K", " once more"),
)
BY_C, BY_T = factor("C", "C, the entries of a row"), factor("n", "T, the number of times")
BY_S, BY_ROOT = factor("scale", "s", "", " once more"), factor("root", "√K", " once more")


def each(text: str) -> str:
    """Every equation with an X in it twice: with k and with up in its place."""

    def both(match: re.Match[str]) -> str:
        return f"{match[0].replace('X', 'k')}; {match[0].replace('X', 'up')}"

    return re.sub(r"[^\n;→]*_X[^\n;→]*[^\n;→ ]", both, text)


# --- the rows ----------------------------------------------------------------------------------

OF_NORM = """
dx = dxhat * rstd → dx is that of a plain scaling: μ and σ depend on x too, and both terms that [LN.6] subtracts are missing.
dx = (dxhat - mean(dxhat)) * rstd - xhat * mean(dxhat * xhat) → ρ multiplies all of the bracket of [LN.6]; the term with x̂ is outside of it in yours.
dx = (dxhat - xhat * mean(dxhat * xhat)) * rstd - mean(dxhat)
    → ρ multiplies all of the bracket of [LN.6]; the term mean(dx̂) is outside of it in yours.
dx = dxhat * rstd - mean(dxhat) - xhat * mean(dxhat * xhat) → ρ multiplies all of the bracket of [LN.6], in yours only its first term.
dx = (dxhat - mean(dxhat)) * rstd → dx lacks the term x̂ mean(dx̂ ∘ x̂) of [LN.6] (with mean(dx̂) mean(x̂) in its place it is zero, as mean(x̂) is).
dx = (dxhat - over_batch(dxhat) - xhat * mean(dxhat * xhat)) * rstd
    → mean(dx̂) is taken along the first axis: each row has its own mean, axis=-1, keepdims=True. [LN.6]
dx = (dxhat - mean(dxhat) - xhat * over_batch(dxhat * xhat)) * rstd
    → mean(dx̂ ∘ x̂) is taken along the first axis: each row has its own mean, axis=-1, keepdims=True. [LN.6]
dx = (dxhat - over_batch(dxhat) - xhat * over_batch(dxhat * xhat)) * rstd
    → Both means are taken along the first axis: each row has its own, axis=-1, keepdims=True. [LN.6]
dx = (dxhat - mean(dxhat) - xhat * sums(dxhat * xhat) / (C - 1 + (C == 1))) * rstd
    → mean(dx̂ ∘ x̂) is divided by C − 1 in yours: the variance of a layer norm divides by C. [LN.6]
dx = (dxhat - mean(dxhat) - xhat * xhat * mean(dxhat)) * rstd → The last term of [LN.6] is x̂ mean(dx̂ ∘ x̂); x̂ has left the mean in yours.
dx = (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)) * rstd * rstd * rstd
    → dx has the factor ρ three times, as in dσ² = −½ ρ³ …: in [LN.6] two of them are in x̂ already.
dx = (dxhat - mean(dxhat) - 2 * xhat * mean(dxhat * xhat)) * rstd → The last term of [LN.6] is there twice: the 2 of dσ² meets the −½ of dρ.
dx = (dxhat - mean(dxhat) - 0.5 * xhat * mean(dxhat * xhat)) * rstd → The last term of [LN.6] is halved: the −½ of dρ meets the 2 of dσ².
dx = (dxhat - mean(dxhat) - c * mean(dxhat * c)) * rstd → x − μ stands in both places of the last term where [LN.6] has x̂.
dx = (dxhat - mean(dxhat) + xhat * mean(xhat * xhat)) * rstd → The last term of [LN.6] multiplies x̂ by itself, where dx̂ ∘ x̂ belongs.
dx = (dxhat + mean(dxhat) + xhat * mean(dxhat * xhat)) * rstd → Both terms of [LN.6] are added in yours: they are subtracted.
dx = (dxhat - sums(dxhat) - xhat * sums(dxhat * xhat)) * rstd → Sums stand in both places where [LN.6] has means: divide them by C.
"""
OF_ATTEND = """
dS = P * dP → dS is P ∘ dP alone: the softmax's Σ dP ∘ P is missing. [ATT.6]
dS = dP → The softmax is passed over: dS is dP in yours. [ATT.6]
dS = P * (1 - P) * dP → dS takes the diagonal of the softmax's Jacobian alone: each weight depends on every score of its row. [ATT.6]
dS = P * dP - sums(dP * P) → P multiplies all of the bracket of [ATT.6], in yours only its first term.
dS = dP - P * sums(dP * P) → P multiplies all of the bracket of [ATT.6], in yours only its second term.
dS = P * (dP - sums(dP) * sums(P)) → The sum of a product is not the product of the sums: [ATT.6] has Σ dP ∘ P.
dS = T(T(P) * (T(dP) - sums(T(dP) * T(P)))) → The softmax's sum runs over the queries in yours: each query's row sums over its keys. [ATT.6]
"""

LESSONS: dict[str, Lesson] = {
    "linear": Lesson(
        """
        dx = dy @ w.T      # LIN.2
        dw = x.T @ dy      # LIN.3
        db = total(dy)     # LIN.4
        """,
        "",
        LETTERS, (BY_N, BY_2),
    ),
    "embedding": Lesson(
        "dtable = scatter(index, dy, table)  # EMB.2",
        """
        dtable = scatter(index, dy, table) + table → The gradient was added to the table itself, not to zeros: dtable starts at 0. [EMB.2]
        dtable = scatter(index, dy, table)[::-1] → The rows of dtable stand in reverse order. [EMB.2]
        dtable = scatter(index, dy, table) * table → dtable was multiplied by the table: y is linear in it, so its gradient does not depend on it. [EMB.2]
        dtable = scatter(index[::-1], dy, table) → The indices and the rows of dy run in opposite directions. [EMB.2]
        dtable = scatter((index + 1) % number(table), dy, table) → Each gradient lies one row too low: rows count from 0. [EMB.2]
        dtable = scatter((index - 1) % number(table), dy, table) → Each gradient lies one row too high: rows count from 0. [EMB.2]
        dtable = scatter(0 * index, dy, table) → All gradients lie in row 0: each belongs to the row of its index. [EMB.2]
        dtable = scatter(index, ones(dy) * mean(dy), table) → Each row got the mean of its entries, not the entries. [EMB.2]
        """,
        LETTERS, (BY_N, BY_2),
    ),
    "position": Lesson(
        """
        dx = dy                        # POS.1
        dwpe = place(total(dy))        # POS.2
        """,
        """
        dwpe = in_table(total(dy)) → dwpe starts from the table, not from zeros: rows that are not used have the gradient 0. [POS.2]
        dwpe = at_zero(total(dy)) → dwpe is written at the positions from 0 on: it begins at the offset. [POS.2]
        dwpe = at_next(total(dy)) → dwpe begins one position after the offset. [POS.2]
        dwpe = at_end(total(dy)) → dwpe is written at the last positions of the table: it begins at the offset. [POS.2]
        dwpe = place(total(dy)[::-1]) → The times run backwards in dwpe. [POS.2]
        dwpe = place(total(dy)) + wpe → The table was added to dwpe. [POS.2]
        dwpe = place(total(dy).sum(axis=0, keepdims=True) + 0 * total(dy))
            → dwpe is summed over the times as well: each position has its own gradient. [POS.2]
        dx = dy + wpe[:number(dy[0])] → The positions were added to dx, as the forward pass adds them to x. [POS.1]
        """,
        LETTERS | {"place": "at offset"}, (factor("N", "B, the number of sequences"), BY_T, BY_2), of_position,
    ),
    "affine": Lesson(
        """
        dx = dy * w             # LN.5
        dw = total(dy * x)      # LN.7
        db = total(dy)          # LN.8
        """,
        "",
        VECTOR | {"x": "x"}, (BY_N, BY_2),
    ),
    "normalise": Lesson(
        "dx = (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)) * rstd   # LN.6",
        OF_NORM,
        VECTOR, (BY_N, BY_2, BY_C), of_normalise,
    ),
    "layer_norm": Lesson(
        """
        dxhat = dy * w             # LN.5
        dx = (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)) * rstd   # LN.6
        dw = total(dy * xhat)      # LN.7
        db = total(dy)             # LN.8
        """,
        OF_NORM + """
        dx = (dxhat - w * mean(dy) - xhat * w * mean(dy * xhat)) * rstd → w must be inside the means: [LN.6] takes the means of dx̂ = dy ∘ w.
        dx = (dy - mean(dy) - xhat * mean(dy * xhat)) * rstd * w → w multiplies at the end in yours; it belongs to dx̂ = dy ∘ w, before the means. [LN.5]
        dw = total(dxhat * xhat) → dw is made of dx̂ = dy ∘ w: y = w ∘ x̂ + b, so the gradient of w is Σ dy ∘ x̂, without w. [LN.7]
        db = total(dxhat) → db is made of dx̂ = dy ∘ w: b is added after w has multiplied, so it gets dy itself. [LN.8]
        dw = total(dy * x) → dw is made of x where x̂ belongs: w multiplies the normalised row. [LN.7]
        dw = total(dy * c) → dw is made of x − μ, which is not yet divided by √(σ² + ε): w multiplies x̂. [LN.7]
        dw = total(dy * (w * xhat + b)) → dw is made of the output y where x̂ belongs. [LN.7]
        """,
        VECTOR, (BY_N, BY_2, BY_C), of_normalise,
    ),
    "rms_norm": Lesson(
        """
        r = 1 / sqrt(sums(x ** 2) / C + eps)
        xhat = x * r
        y = w * xhat
        dxhat = dy * w
        dx = (dxhat - xhat * mean(dxhat * xhat)) * r
        dw = total(dy * xhat)
        """,
        """
        r = 1 / (sqrt(mean(x ** 2)) + eps) → ε is added outside of the root: it belongs under it.
        y = w * (x - mean(x)) * r → The forward pass subtracts the mean, as a layer norm does; RMSNorm does not.
        r = 1 / sqrt(sums(x ** 2) + eps) → The forward pass has the sum of the squares where their mean belongs.
        dx = dxhat * r → dx is that of a plain scaling: the root of the mean square depends on x too, and its term is missing.
        dx = (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)) * r → dx has the term mean(dx̂) of the layer norm; RMSNorm subtracts no mean, so it has none.
        dx = (dxhat - x * mean(dxhat * x)) * r → dx has x in both places of the second term where x̂ = x r belongs.
        dxhat = dy * r; dx = (dxhat - xhat * mean(dxhat * xhat)) * w → w and r are exchanged: the cache is unpacked in another order than it was packed.
        """,
        VECTOR | {"n": "T", "B": "the number of sequences"}, (BY_N, BY_2, BY_C), of_rms,
    ),
    "gelu": Lesson(
        """
        t = tanh(kappa * (x + a * x * x * x))
        du = kappa * (1 + 3 * a * x * x)                      # GELU.3
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du    # GELU.4
        dx = dy * slope                                       # GELU.5
        """,
        """
        dx = dy * (x > 0) → dx is the gradient of ReLU, not of GELU. [GELU.4]
        dx = dy * (0.5 * x * (1 + t)) → dx is dy times GELU's value: its slope belongs there. [GELU.5]
        dx = dy * 0.5 * (1 + t) → dx lacks the second term of the product rule: tanh u depends on x too. [GELU.4]
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t) * du → The derivative of tanh u is 1 − tanh² u; the square is missing. [GELU.4]
        slope = 0.5 * (1 + t) + 0.5 * (1 - t * t) * du → The second term of the product rule lacks its factor x. [GELU.4]
        t = tanh(kappa * x); du = kappa + 0 * x → u is κ x in yours: its cubic term a x³ is missing. [GELU.3]
        slope = (1 + t) + x * (1 - t * t) * du → Both terms lack the factor ½ of y = ½ x (1 + tanh u). [GELU.4]
        """,
        LETTERS | {"t": "tanh u"}, (BY_2, BY_N), lambda v: matrices(v) | {"kappa": ops.GELU_SCALE, "a": ops.GELU_CUBIC},
    ),
    "softmax": Lesson(
        "dx = y * (dy - sums(dy * y))   # SM.2",
        """
        dx = dy * y * (1 - y) → dx takes the diagonal of the Jacobian alone: each output depends on every input of its row. [SM.2]
        dx = dy * y - sums(dy * y) → y multiplies all of the bracket of [SM.2], in yours only its first term.
        dx = dy - y * sums(dy * y) → y multiplies all of the bracket of [SM.2], in yours only its second term.
        dx = dy * y * y → dx is dy ∘ y²: the bracket of [SM.2] is a difference.
        dx = y - dy → dx is y − dy, as for softmax and cross-entropy in one; here dy is any gradient. [SM.2]
        dx = dy - y → dx is dy − y; [SM.2] is a product.
        dx = y * (dy - sums(y) * sums(dy)) → The sum of a product is not the product of the sums: [SM.2] has Σ dy ∘ y.
        dx = y * (dy - exp(x) * sums(dy * y)) → The sum in [SM.2] is multiplied by exp(x) besides.
        dx = y * (dy - sums(dy * y)) * (1 - y) → The factor 1 − y is one too many: [SM.2] accounts for it in its sum.
        """,
        LETTERS, (BY_C, BY_2, BY_N), of_softmax,
    ),
    "attend": Lesson(
        """
        dv = T(P) @ dy                    # ATT.4
        dP = dy @ T(v)                    # ATT.5
        dS = P * (dP - sums(dP * P))      # ATT.6
        dq = dS @ k / root                # ATT.7
        dk = T(dS) @ q / root             # ATT.8
        """,
        OF_ATTEND,
        LETTERS, (BY_ROOT, BY_K, BY_2, BY_T), of_attend,
    ),
    "attention": Lesson(
        """
        P = softmax(q @ T(k) / root + mask)  # ATT.2
        dv_h = T(P) @ dy                  # ATT.4
        dP = dy @ T(v)                    # ATT.5
        dS = P * (dP - sums(dP * P))      # ATT.6
        dq_h = dS @ k / root              # ATT.7
        dk_h = T(dS) @ q / root           # ATT.8
        dq = merged(dq_h)  # given
        dk = merged(dk_h)  # given
        dv = merged(dv_h)  # given
        """,
        OF_ATTEND + """
        P = softmax(q @ T(k) / root) → The causal mask is missing where P is recomputed: a time must not see later ones. [ATT.6]
        dq = straight(dq_h); dk = straight(dk_h); dv = straight(dv_h)
            → The heads are put together without moving their axis behind the time: (B, H, T, K) needs a transpose before the reshape. [ATT.8]
        dq = merged(dk_h); dk = merged(dq_h) → dq and dk stand in each other's third of dqkv. [ATT.7]
        dq = merged(dv_h); dv = merged(dq_h) → dq and dv stand in each other's third of dqkv. [ATT.7]
        dk = merged(dv_h); dv = merged(dk_h) → dk and dv stand in each other's third of dqkv. [ATT.8]
        """,
        LETTERS | {"dq_h": "dq", "dk_h": "dk", "dv_h": "dv", "mask": "mask"},
        (BY_ROOT, BY_K, BY_2, BY_T, factor("H", "H, the number of heads")),
        of_attention,
    ),
    "head": Lesson(
        """
        dx = dy @ table       # HEAD.2
        dtable = dy.T @ x     # HEAD.3
        """,
        "",
        LETTERS | {"table": "wte"}, (BY_N, BY_2, factor("size(dy) / N", "V, the number of tokens")),
    ),
    "cross_entropy": Lesson(
        """
        p = exp(logits - lse)                           # CE.1
        dlogits = (p - onehot) * weight * dloss         # CE.3
        """,
        """
        dlogits = (p - onehot) * counted * dloss / all
            → The mean is over all rows in yours: N counts the targets that are not ignored, or is the count given. [CE.3]
        dlogits = (p - onehot) * dloss / all
            → The mean is over all rows, and rows whose target is ignored have a gradient: weight holds 1 / N, or 0 for those. [CE.3]
        dlogits = p - onehot → Neither dloss nor the 1 / N of the mean is there. [CE.3]
        dlogits = (p - onehot) / (weight * dloss) → dloss / N divides in yours: it multiplies. [CE.3]
        dlogits = 0 * p + weight * dloss → dlogits is dloss / N alone: p less the one-hot target is missing. [CE.3]
        dlogits = (p - 2 * onehot) * weight * dloss → 2 is subtracted at the target, where 1 belongs. [CE.3]
        dlogits = (p * (1 - onehot) + onehot) * weight * dloss → The target's entry is set to 1: 1 is subtracted from p there. [CE.3]
        dlogits = (p * (1 - onehot) - onehot) * weight * dloss → The target's entry is set to −1: 1 is subtracted from p there. [CE.3]
        p = exp(lse - logits) → The exponent has the wrong sign: p = exp(z − log Σ exp z). [CE.3]
        dlogits = (logits - onehot) * weight * dloss → The logits stand where their softmax p belongs. [CE.3]
        dlogits = (exp(logits) - onehot) * weight * dloss → exp(z) is not divided by its sum: p = exp(z − log Σ exp z). [CE.3]
        dlogits = (log(p) - onehot) * weight * dloss → log p stands where p belongs: exp is missing. [CE.3]
        dlogits = (p - onehot * counted) * dloss / N → Rows whose target is ignored get the gradient p: theirs is 0. [CE.3]
        dlogits = p * onehot * weight * dloss → p is multiplied by the one-hot target where that is subtracted. [CE.3]
        dlogits = -onehot / p * weight * dloss
            → dlogits is the gradient of the probabilities, −1 / p at the target; the softmax's own is still to come. [CE.3]
        """,
        LETTERS | {"weight": "1 / N", "logits": "z", "lse": "log Σ exp z"},
        (BY_2, factor("V", "V, the number of tokens"),
         ("all", "divided by the number of rows besides", "multiplied by the number of rows")),
        of_cross_entropy,
    ),
    "dropout": Lesson(
        "dx = dy * mask   # DROP.2",
        """
        dx = dy * (mask != 0) → dx has 1 where the mask has 1 / (1 − p): what was kept was also scaled up. [DROP.2]
        dx = dy * (mask == 0) → The gradient is where the mask is 0: what was dropped must get none. [DROP.2]
        dx = dy * (maximum(mask, 1) - mask) → The gradient flows where x was dropped, not where it was kept. [DROP.2]
        dx = dy * mask * (x != 0) → dx is zero where x is zero: the mask alone decides. [DROP.2]
        dx = dy * mean(mask) → Each row is multiplied by the mean of its mask: the mask is of single entries. [DROP.2]
        dx = dy + mask → The mask is added: it multiplies. [DROP.2]
        dx = dy * (mask - 1) → The mask less 1 stands where the mask belongs. [DROP.2]
        dx = dy * (1 - mask) → 1 − mask stands where the mask belongs. [DROP.2]
        """,
        LETTERS, (BY_2, BY_N), of_dropout,
    ),
    "lora": Lesson(
        """
        dB = h.T @ dy                    # LORA.3
        dxA = scale * (dy @ B.T)         # LORA.4
        dA = x.T @ dxA                   # LORA.5
        dx = dxA @ A.T                   # LORA.6
        """,
        """
        dB = xA.T @ dy → dB lacks the factor s: it is made of h = s x A, not of x A. [LORA.3]
        dA = x.T @ (dy @ B.T) → dA lacks the factor s: [LORA.5] takes d(xA) = s dy Bᵀ.
        dx = dy @ B.T @ A.T → dx lacks the factor s: [LORA.6] takes d(xA) = s dy Bᵀ.
        dA = scale * x.T @ dxA → dA has the factor s twice: d(xA) = s dy Bᵀ has it already. [LORA.5]
        dx = scale * dxA @ A.T → dx has the factor s twice: d(xA) = s dy Bᵀ has it already. [LORA.6]
        dB = scale * h.T @ dy → dB has the factor s twice: h = s x A has it already. [LORA.3]
        dA = x.T @ dxA / N → dA is a mean over the rows: each row adds to A's gradient, so it is a sum. [LORA.5]
        dB = h.T @ dy / N → dB is a mean over the rows: each row adds to B's gradient, so it is a sum. [LORA.3]
        dA = x.T @ dy @ ones(B).T * scale → dA has ones where Bᵀ belongs: A is seen through B. [LORA.5]
        dxA = 2 * (dy @ B.T) → The scale is 2 in yours, whatever s is: take it from the cache. [LORA.4]
        """,
        LETTERS, (BY_N, BY_S, BY_2, ("scale ** 2", "divided by s²", "multiplied by s² once more")), of_lora,
    ),
    "lora_embedding": Lesson(
        """
        dB = h.T @ dy                     # LORA.8
        drows = scale * (dy @ B.T)        # LORA.9
        dA = scatter(index, drows, A)     # LORA.9
        """,
        """
        dB = h.T @ dy / scale → dB lacks the factor s: it is made of h = s A[index]. [LORA.8]
        dA = scatter(index, drows, A) + A → dA starts from A, not from zeros. [LORA.9]
        dA = scatter(0 * index, drows, A) → All of dA lies in row 0: each gradient belongs to the row of its index. [LORA.9]
        dB = A[:number(dy)].T @ dy if number(A) >= number(dy) else h.T @ dy * 0 → dB takes the first rows of A, not those of the index. [LORA.8]
        """,
        LETTERS, (BY_N, BY_S, BY_2), of_lora_embedding,
    ),
    "adapted_linear": Lesson(
        """
        dw = x.T @ dy                               # LIN.3
        db = total(dy)                              # LIN.4
        dxA = scale * (dyc @ B.T)                   # LORA.4
        dxA_2 = scale_2 * (dyc @ B_2.T)             # LORA.4
        dA = kept.T @ dxA                           # LORA.5
        dA_2 = kept_2.T @ dxA_2                     # LORA.5
        dB = h.T @ dyc                              # LORA.3
        dB_2 = h_2.T @ dyc                          # LORA.3
        base = dy @ w.T                             # ADAPT.2
        path = mask * (dxA @ A.T)                   # ADAPT.2
        path_2 = mask_2 * (dxA_2 @ A_2.T)           # ADAPT.2
        dx = base + path + path_2                   # ADAPT.2
        """,
        """
        dx = base → dx is that of the frozen map alone: the path through the adapter is missing. [ADAPT.2]
        dx = path * (absolute(path_2).sum() == 0) + path_2
            → dx is that of the last adapter alone: what comes through W, and through other adapters, is missing. [ADAPT.2]
        dx = path + path_2 → dx is that of the adapters alone: the path through W is missing. [ADAPT.2]
        path = scale * (dyc @ B.T @ A.T); path_2 = scale_2 * (dyc @ B_2.T @ A_2.T)
            → dropout's mask is not applied to the adapter's part of dx: what the forward pass dropped gets no gradient. [ADAPT.2]
        dx = mask * (base + scale * (dyc @ B.T @ A.T)) → dropout's mask is applied to all of dx: only the adapter's input was dropped, W's was not. [ADAPT.2]
        path = mask * mask * (scale * (dyc @ B.T @ A.T)); path_2 = mask_2 * mask_2 * (scale_2 * (dyc @ B_2.T @ A_2.T))
            → dropout's mask is applied twice to the adapter's part of dx. [ADAPT.2]
        dA = x.T @ (scale * (dyc @ B.T)); dA_2 = x.T @ (scale_2 * (dyc @ B_2.T)) → dA is made of x as it came: A has seen x ∘ mask. [LORA.5]
        dB = (scale * (x @ A)).T @ dyc; dB_2 = (scale_2 * (x @ A_2)).T @ dyc → dB is made of x as it came: B has seen (x ∘ mask) A. [LORA.3]
        dA = kept.T @ (scale * (first @ B.T)); dA_2 = kept_2.T @ (scale_2 * (first @ B_2.T)); dB = (scale * (kept @ A)).T @ first; dB_2 = (scale_2 * (kept_2 @ A_2)).T @ first; path = mask * (scale * (first @ B.T @ A.T)); path_2 = mask_2 * (scale_2 * (first @ B_2.T @ A_2.T))
            → The adapter's gradients are made of the first columns of dy, not of the adapter's own. [ADAPT.2]
        dx = base - path - path_2 → The adapter's part of dx is subtracted: it is added. [ADAPT.2]
        dx = base + path + 0 * path_2 → dx has the path through the first adapter alone: every adapter adds its own. [ADAPT.2]
        dx = base + path * (sums(absolute(path_2)) == 0) + path_2 → dx has the path through the last adapter alone: every adapter adds its own. [ADAPT.2]
        dw = kept.T @ dy → dw is made of x ∘ mask: W has seen x as it came. [LIN.3]
        dx = dy @ w.T + path / scale + path_2 / maximum(scale_2, 1) → The adapter's part of dx lacks its factor s. [ADAPT.2]
        """,
        LETTERS | {"kept": "(x ∘ mask)", "dyc": "dy[columns]", "path": "mask ∘ s (dy Bᵀ) Aᵀ", "base": "dy Wᵀ",
         "kept_2": "(x ∘ mask₂)", "path_2": "mask₂ ∘ s₂ (dy B₂ᵀ) A₂ᵀ", "scale_2": "s₂", "A_2": "A₂", "B_2": "B₂",
         "mask_2": "mask₂", "first": "the first columns of dy", "dxA_2": "d(xA)₂", "h_2": "h₂", "dyc_2": "dy[columns]"},
        (BY_N, BY_S, BY_2),
        of_adapted,
    ),
    "block": Lesson(
        """
        d_gelu = through_down(dy)
        d_up = through_gelu(d_gelu)
        d_ln_2 = through_up(d_up)
        d_mlp = through_ln_2(d_ln_2)
        d_mid = dy + d_mlp                # BLOCK.3
        d_heads = through_o(d_mid)
        d_qkv = through_attention(d_heads)
        d_ln_1 = through_qkv(d_qkv)
        d_attn = through_ln_1(d_ln_1)
        dx = d_mid + d_attn               # BLOCK.4
        dblock_mlp_down_w = w_down(dy)
        dblock_mlp_down_b = b_down(dy)
        dblock_mlp_up_w = w_up(d_up)
        dblock_mlp_up_b = b_up(d_up)
        dblock_ln_2_w = w_ln_2(d_ln_2)
        dblock_ln_2_b = b_ln_2(d_ln_2)
        dblock_attn_o_w = w_o(d_mid)
        dblock_attn_o_b = b_o(d_mid)
        dblock_attn_qkv_w = w_qkv(d_qkv)
        dblock_attn_qkv_b = b_qkv(d_qkv)
        dblock_ln_1_w = w_ln_1(d_ln_1)
        dblock_ln_1_b = b_ln_1(d_ln_1)
        dadapters_mlp_down_A = A_down(dy)
        dadapters_mlp_down_B = B_down(dy)
        dadapters_mlp_up_A = A_up(d_up)
        dadapters_mlp_up_B = B_up(d_up)
        dadapters_attn_o_A = A_o(d_mid)
        dadapters_attn_o_B = B_o(d_mid)
        dadapters_attn_qkv_A = A_qkv(d_qkv)
        dadapters_attn_qkv_B = B_qkv(d_qkv)
        """,
        """
        d_mid = d_mlp; dx = d_attn → Both residual paths are missing: x is added to each sublayer, so dy also goes straight through. [BLOCK.3]
        dx = dy + d_attn → dx adds dy where the gradient between the two sublayers belongs: [BLOCK.4] goes on from [BLOCK.3].
        d_heads = through_o(dy); dblock_attn_o_w = w_o(dy); dblock_attn_o_b = b_o(dy); dadapters_attn_o_A = A_o(dy); dadapters_attn_o_B = B_o(dy)
            → The attention's sublayer is given dy, where the gradient between the two sublayers belongs. [BLOCK.3]
        d_heads = through_o(d_mlp); dblock_attn_o_w = w_o(d_mlp); dblock_attn_o_b = b_o(d_mlp); dadapters_attn_o_A = A_o(d_mlp); dadapters_attn_o_B = B_o(d_mlp)
            → The attention's sublayer is given the gradient through the MLP alone: dy is to be added first. [BLOCK.3]
        d_ln_2 = through_up(d_gelu); dblock_mlp_up_w = w_up(d_gelu); dblock_mlp_up_b = b_up(d_gelu); dadapters_mlp_up_A = A_up(d_gelu); dadapters_mlp_up_B = B_up(d_gelu)
            → GELU's backward pass is missing between down and up.
        d_mid = 2 * dy + d_mlp → dy is added twice between the sublayers. [BLOCK.3]
        dx = dy + d_mlp + d_mid + d_attn → The gradient between the sublayers is added twice. [BLOCK.4]
        dx = dy + d_mid + d_attn → dy is added twice: the gradient between the sublayers has it already. [BLOCK.4]
        """,
        {
            "d_gelu": "the gradient of GELU's output", "d_up": "the gradient of up's output",
            "d_ln_2": "the gradient of LN₂'s output", "d_mlp": "the gradient through the MLP",
            "d_mid": "the gradient between the sublayers", "d_heads": "the gradient of the attention's output",
            "d_qkv": "the gradient of qkv's output", "d_ln_1": "the gradient of LN₁'s output",
            "d_attn": "the gradient through the attention",
        },
        (BY_2,),
        of_block,
    ),
    "adamw": Lesson(
        """
        m_ = beta1 * m + (1 - beta1) * g                                        # ADAMW.1
        v_ = beta2 * v + (1 - beta2) * (g * g)                                  # ADAMW.2
        vhat = v_ / (1 - beta2 ** t)                                            # ADAMW.3
        mhat = m_ / (1 - beta1 ** t)                                            # ADAMW.4
        update = lr * mhat / (sqrt(vhat) + eps)                                 # ADAMW.4
        p = p * (1 - lr * weight_decay * matrix) - update                       # ADAMW.5
        m = m_
        v = v_
        """,
        """
        update = lr * mhat / sqrt(vhat + eps) → ε is under the root: it is added to √v̂. [ADAMW.4]
        p = p * (1 - lr * weight_decay) - update → Vectors decay too in yours: the decay acts on matrices only. [ADAMW.5]
        p = p * (1 - weight_decay * matrix) - update → The decay lacks its factor η. [ADAMW.5]
        m_ = beta1 * m + (1 - beta1) * (g + weight_decay * p * matrix); v_ = beta2 * v + (1 - beta2) * (g + weight_decay * p * matrix) * (g + weight_decay * p * matrix); p = p - update
            → The decay is added to the gradient, as in Adam with L2: AdamW's is apart from it. [ADAMW.5]
        vhat = v_; mhat = m_ → Both bias corrections are missing. [ADAMW.3]
        vhat = v_ / (1 - beta2 ** (t + 1)); mhat = m_ / (1 - beta1 ** (t + 1)) → The bias corrections count the steps from 0: `step` counts from 1. [ADAMW.3]
        mhat = m_ / (1 - beta1 ** (t + 1)) → The correction of m̂ counts the steps from 0: `step` counts from 1. [ADAMW.4]
        vhat = v_ / (1 - beta2 ** (t + 1)) → The correction of v̂ counts the steps from 0: `step` counts from 1. [ADAMW.3]
        m = mhat; v = vhat → The moments returned are m̂ and v̂: the next step needs m and v, which are not corrected. [ADAMW.3]
        update = lr * g / (sqrt(vhat) + eps) → The gradient itself stands where its running mean m̂ belongs. [ADAMW.4]
        vhat = v / (1 - beta2 ** t); mhat = m / (1 - beta1 ** t) → The update is made of the moments before this step. [ADAMW.4]
        m_ = beta2 * m + (1 - beta2) * g; v_ = beta1 * v + (1 - beta1) * (g * g) → β₁ and β₂ are exchanged in the running means. [ADAMW.1]
        update = lr * (sqrt(vhat) + eps) / m_ / (1 - beta1 ** t) → The quotient m / (√v̂ + ε) is upside down. [ADAMW.4]
        update = (1 - beta1 ** t) / lr * m_ / (sqrt(vhat) + eps) → η / (1 − β₁ᵗ) divides the update: it multiplies it. [ADAMW.4]
        update = lr * (sqrt(vhat) + eps) / (1 - beta1 ** t) → The update lacks m̂: it is η m̂ / (√v̂ + ε). [ADAMW.4]
        update = lr / (1 - beta1 ** t) + 0 * g → The update is η / (1 − β₁ᵗ) alone, the same for every entry. [ADAMW.4]
        p = p * (1 - lr * weight_decay * matrix) + update → The step goes uphill: the update is subtracted. [ADAMW.5]
        """,
        LETTERS | {"m_": "m", "v_": "v", "p": "θ"}, (BY_2,), lambda v: {**v, "matrix": float(v["p"].ndim >= 2), "t": v["step"]},
    ),
    "clipping": Lesson(
        """
        length = sqrt((a * a).sum() + (b * b).sum())
        share = minimum(1.0, max_norm / (length + 1e-6))    # CLIP.1
        grads_a = a * share                                 # CLIP.1
        grads_b = b * share                                 # CLIP.1
        norm = length * 1
        """,
        """
        grads_a = minimum(maximum(a, -max_norm), max_norm); grads_b = minimum(maximum(b, -max_norm), max_norm)
            → Each entry is clipped by itself, which changes the direction: one scale for all is asked. [CLIP.1]
        grads_a = a * minimum(1.0, max_norm / (sqrt((a * a).sum()) + 1e-6)); grads_b = b * minimum(1.0, max_norm / (sqrt((b * b).sum()) + 1e-6))
            → Each array is clipped by its own norm: the global norm is that of all of them together. [CLIP.1]
        share = max_norm / (length + 1e-6) → Small gradients are scaled up: the scale is at most 1. [CLIP.1]
        grads_a = a; grads_b = b → The gradients come back as they were. [CLIP.1]
        share = minimum(1.0, length / max_norm) → The scale is norm / max_norm, upside down. [CLIP.1]
        norm = share → The scale is returned where the norm is asked. [CLIP.1]
        length = sqrt((a * a).mean() + (b * b).mean()) → The squares are averaged in each array: they are summed over all of them. [CLIP.1]
        length = sqrt((a * a).sum()) + sqrt((b * b).sum()) → The norm is the sum of the arrays' norms: the squares are summed, then comes one root. [CLIP.1]
        length = absolute(a).sum() + absolute(b).sum() → The norm is the sum of the absolute values: the Euclidean norm is asked. [CLIP.1]
        length = maximum(absolute(a).max(), absolute(b).max()) → The norm is the largest absolute value: the Euclidean norm is asked. [CLIP.1]
        norm = minimum(length, max_norm) → The norm returned is that after clipping: the one before is asked. [CLIP.1]
        length = sqrt(((a * a).sum() + (b * b).sum()) / (size(a) + size(b))) → The norm is the root of the mean square: the squares are summed. [CLIP.1]
        """,
        LETTERS | {"max_norm": "max_norm", "share": "the scale", "length": "the norm"}, (BY_2,), dict,
    ),
    "merging": Lesson(
        each("""
        update_X = s_X * (A_X @ B_X)
        merged_attn_qkv_w = qkv + at_k(update_k)     # LORA.10
        merged_mlp_up_w = up + update_up             # LORA.10
        unmerged_attn_qkv_w = qkv - at_k(update_k)   # LORA.10
        unmerged_mlp_up_w = up - update_up           # LORA.10
        """) + "\n".join(
            f"{sort}_mlp_down_w = down * 1; {sort}_wte = wte * 1; {sort}_attn_qkv_b = qkv[0] * 1; "
            f"{sort}_mlp_up_b = up[0] * 1; {sort}_mlp_down_b = down[0] * 1"
            for sort in ("merged", "unmerged")
        ),
        each("""
        update_X = A_X @ B_X → The updates lack the factor s. [LORA.10]
        update_X = -s_X * (A_X @ B_X) → The updates have the opposite sign: merging adds them, unmerging subtracts them. [LORA.10]
        unmerged_attn_qkv_w = qkv + at_k(update_k); unmerged_mlp_up_w = up + update_up → unmerge adds the updates: it subtracts them. [LORA.10]
        merged_attn_qkv_w = qkv - at_k(update_k); merged_mlp_up_w = up - update_up → merge subtracts the updates: it adds them. [LORA.10]
        update_X = s_X * s_X * (A_X @ B_X) → The updates have the factor s twice. [LORA.10]
        merged_attn_qkv_w = qkv + at_q(update_k); unmerged_attn_qkv_w = qkv - at_q(update_k) → The update of k lies in q's columns of the fused weight. [LORA.10]
        merged_attn_qkv_w = qkv + at_v(update_k); unmerged_attn_qkv_w = qkv - at_v(update_k) → The update of k lies in v's columns of the fused weight. [LORA.10]
        merged_attn_qkv_w = qkv + at_all(update_k); unmerged_attn_qkv_w = qkv - at_all(update_k) → The update of k is added to q and v as well. [LORA.10]
        update_up = base_scale * (A_up @ B_up) → The update of up has the scale of another rank: `scale_of(path)` knows each adapter's own. [LORA.10]
        update_X = 2 * s_X * (A_X @ B_X) → The updates are added twice. [LORA.10]
        update_X = 0 * (A_X @ B_X) → The weights come back without any update. [LORA.10]
        merged_attn_qkv_w = others(qkv) + at_k(update_k); merged_mlp_up_w = update_up; unmerged_attn_qkv_w = others(qkv) - at_k(update_k); unmerged_mlp_up_w = -update_up
            → The updates alone come back: they are added to the weights. [LORA.10]
        update_k = 0 * (A_k @ B_k) → The update of k is missing: its columns lie in the fused weight qkv. [LORA.10]
        """),
        LETTERS | {"s_k": "s", "s_up": "s", "A_k": "A", "B_k": "B", "A_up": "A", "B_up": "B", "at_k": "at k's columns",
                   "update_k": "the update of k", "update_up": "the update of up"},
        (BY_2,), of_merging,
    ),
    "mixing": Lesson(
        each("update_X = weight * s_X * (A_X @ B_X) + weight_2 * s_X_2 * (A_X_2 @ B_X_2)"),
        each("""
        update_X = s_X * (A_X @ B_X) + s_X_2 * (A_X_2 @ B_X_2) → The weights are missing: each update is multiplied by its own.
        update_X = weight * (A_X @ B_X) + weight_2 * (A_X_2 @ B_X_2) → The scales are missing: an adapter's update is s A B.
        update_X = A_X @ B_X + A_X_2 @ B_X_2 → Weights and scales are both missing: the update is Σ wᵢ sᵢ Aᵢ Bᵢ.
        update_X = weight ** 2 * s_X * (A_X @ B_X) + weight_2 ** 2 * s_X_2 * (A_X_2 @ B_X_2) → The weights are there twice: give them to A or to B, not to both.
        update_X = weight * s_X ** 2 * (A_X @ B_X) + weight_2 * s_X_2 ** 2 * (A_X_2 @ B_X_2)
            → The scales are there twice: in a factor and in the new configuration, or in both factors.
        update_X = weight / s_X * (A_X @ B_X) + weight_2 / s_X_2 * (A_X_2 @ B_X_2) → The scales divide the updates: they multiply them.
        update_X = weight * s_X * (A_X @ B_X) → Only the first adapter is there.
        update_X = weight_2 * s_X_2 * (A_X_2 @ B_X_2) → Only the last adapter is there.
        update_X = weight_2 * s_X * (A_X @ B_X) + weight * s_X_2 * (A_X_2 @ B_X_2) → The weights are exchanged between the adapters.
        update_X = weight * s_X_2 * (A_X @ B_X) + weight_2 * s_X * (A_X_2 @ B_X_2) → The scales are exchanged between the adapters.
        update_X = (weight * s_X * (A_X @ B_X) + weight_2 * s_X_2 * (A_X_2 @ B_X_2)) / 2 → The sum is halved: it is a weighted sum, not a mean.
        update_X = (weight * s_X * (A_X @ B_X) + weight_2 * s_X_2 * (A_X_2 @ B_X_2)) / (weight + weight_2) → The sum is divided by the sum of the weights: it is no mean.
        update_X = absolute(weight) * s_X * (A_X @ B_X) + absolute(weight_2) * s_X_2 * (A_X_2 @ B_X_2) → The sign of a weight is lost: weights may be negative.
        update_X = weight * s_X * (A_X @ B_X) - weight_2 * s_X_2 * (A_X_2 @ B_X_2) → The second update is subtracted: the sum adds it.
        update_X = weight * s_X * (A_X @ B_X) + weight_2 * s_X * (A_X_2 @ B_X_2) → The first adapter's scale multiplies both: each has its own.
        update_X = weight * s_X_2 * (A_X @ B_X) + weight_2 * s_X_2 * (A_X_2 @ B_X_2) → The last adapter's scale multiplies both: each has its own.
        update_X = sqrt(absolute(weight)) * s_X * (A_X @ B_X) + sqrt(absolute(weight_2)) * s_X_2 * (A_X_2 @ B_X_2)
            → The root of each weight multiplies its update once: it must be in both factors, or the weight in one.
        """),
        {"weight": "w₁", "weight_2": "w₂", "update_k": "the update of k", "update_up": "the update of up",
         **{f"{x}_{n}{e}": f"{x.lower() if x == 's' else x}{'₂' if e else '₁'}" for x in "sAB" for n in ("k", "up") for e in ("", "_2")}},
        (BY_2,), of_mixing,
    ),
    "numeric_gradient": Lesson(
        "dx = (D(h, dy) - D(-h, dy)) / (2 * h)",
        """
        dx = (D(h, dy) - D(0, dy)) / h → The difference is one-sided, (f(x + h e) − f(x)) / h: its error is of order h, the central one's of order h².
        dx = (D(0, dy) - D(-h, dy)) / h → The difference is one-sided, (f(x) − f(x − h e)) / h: its error is of order h, the central one's of order h².
        dx = (D(0, dy) - D(-h, dy)) / (2 * h) → The difference is one-sided, from x − h e to x, but divided by 2h, so it is half of the gradient.
        dx = (D(h, dy) - D(-h, dy)) / h → The difference is divided by h: x + h e and x − h e are 2h apart.
        dx = (D(h, dy) - D(-h, dy)) / 2 → The difference is divided by 2, not by 2h.
        dx = D(h, dy) - D(-h, dy) → The difference is not divided by 2h.
        dx = (D(-h, dy) - D(h, dy)) / (2 * h) → The two sides of the difference are exchanged, which turns the sign.
        dx = (D(h, one) - D(-h, one)) / (2 * h) → dy is missing: the gradient of <dy, f(x)> weights each output with dy before it sums.
        dx = (D(h, dy) + D(-h, dy)) / (2 * h) → The two sides are added: they are subtracted.
        dx = (D(h, dy) - D(-h, dy)) / (2 * h) / size_y → The outputs are averaged: <dy, f(x)> is a sum.
        dx = (together(h, dy) - together(-h, dy)) / (2 * h) → All entries are moved together: each has a difference of its own.
        dx = (D(h, dy) - D(-h, dy)) / (4 * h) → The difference is divided by 4h: the two sides are 2h apart.
        dx = (D(h, dy) - 2 * D(0, dy) + D(-h, dy)) / h ** 2 → This is the second derivative, (f(x + h) − 2 f(x) + f(x − h)) / h².
        dx = (D(h, dy) - D(0, dy)) / (2 * h) → The difference is one-sided but divided by 2h, so it is half of the gradient.
        dx = (D(h, absolute(dy)) - D(-h, absolute(dy))) / (2 * h) → The sign of dy is lost.
        dx = (D(h, dy ** 2) - D(-h, dy ** 2)) / (2 * h) → dy multiplies twice.
        dx = (D(h, dy, x, 1.0) - D(-h, dy, x, -1.0)) / (2 * h) → The other entries move as well: e is h at entry i and 0 elsewhere.
        dx = (D(h, dy, 0 * x) - D(-h, dy)) / (2 * h) → x is missing on the upper side: f(h e) stands where f(x + h e) belongs.
        dx = (D(h, dy) - D(h, dy, 0 * x)) / (2 * h) → x is missing on the lower side: f(h e) stands where f(x − h e) belongs.
        dx = (D(h, dy) - D(h, dy, -x)) / (2 * h) → The lower side is f(h e − x): it is f(x − h e).
        dx = (D(2 * h, dy) - D(0, dy)) / (2 * h) → The difference is taken about x + h e, not about x: one side is x + 2h e, the other x itself.
        """,
        {"D": "", "dx": "dx"}, (BY_2,), of_numeric,
    ),
}  # fmt: skip
