"""The register of exercises, in the order in which the course teaches them.

An exercise is a row: the functions to write, how they are called, where they are derived, what
comes before, and how long it takes. Its equations and classic mistakes are in `mistakes`.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from minilora import gpt2, keep, lora, loss, mixing, ops, optim
from minilora.adapters import Adapter, LoRAConfig, dropout_mask
from minilora.adapters import adapters as adapters_of
from minilora.backend import Array
from minilora.course import given
from minilora.course.cases import (
    SIZES,
    Functions,
    Inputs,
    Malformed,
    Outputs,
    Task,
    named,
    pair_task,
    whole,
)
from minilora.errors import MiniloraError
from minilora.keep import Plan
from minilora.pairs import PAIRS, Pair, Sizes, page_of
from minilora.tree import Tree, flatten, unflatten


class Exercise(NamedTuple):
    """A row of the register.

    `functions` of `module` are to be written; `helpers` would give the answer away, so they are not
    to be had either. `target` returns a sentence where the functions miss what is asked beside
    being right.
    """

    name: str
    title: str
    module: ModuleType
    functions: tuple[str, ...]
    page: str
    minutes: int
    needs: tuple[str, ...]
    tasks: Mapping[str, Task]
    helpers: tuple[str, ...] = ()
    tags_of: tuple[str, ...] = ()  # where else the equations stand
    pairs: tuple[Pair, ...] = ()
    target: Callable[[Functions, str], str | None] | None = None
    aim: str = ""  # the target, in words
    kind: str = "exercise"

    @property
    def file(self) -> str:
        """The name of the student's file."""
        return f"{self.name}.py"

    def reference(self) -> Functions:
        """The package's own functions."""
        return {name: getattr(self.module, name) for name in self.functions}

    def gradients(self) -> list[str]:
        """The results that are worth a point each."""
        found: dict[str, None] = {}
        for task in self.tasks.values():
            rng = np.random.default_rng(0)
            outputs = task.call(self.reference(), task.make(rng, task.sizes[-1]))
            found |= dict.fromkeys(point_of(name) for name in outputs)
        return list(found)


def point_of(output: str) -> str:
    """The result that an output belongs to: dblock for dblock.ln_1.w."""
    return output.split(".")[0]


# --- pairs -------------------------------------------------------------------------------------


def of_pair(
    backward: Callable[..., Any],
    title: str,
    minutes: int,
    *needs: str,
    varied: Mapping[str, Pair] | None = None,
    task: Callable[[Pair], Task] = pair_task,
    **more: Any,
) -> Exercise:
    """The exercise of a pair, in all rows of its name in the package's register and varied ones."""
    keys = [key for key, pair in PAIRS.items() if pair.backward is backward]
    first = keys[0].split(",")[0]  # which "grouped attention" is not
    page = page_of(first)
    rows = {key: PAIRS[key] for key in keys if key.startswith(first)} | dict(varied or {})
    return Exercise(
        backward.__name__.removesuffix("_backward"), title,
        importlib.import_module(backward.__module__), (backward.__name__,), page, minutes, needs,
        {key: task(pair) for key, pair in rows.items()}, pairs=tuple(rows.values()), **more,
    )  # fmt: skip


def thirds_task(pair: Pair) -> Task:
    """The task of attention, whose gradient's thirds dq, dk and dv are judged one by one."""
    task = pair_task(pair)

    def call(functions: Functions, inputs: Inputs) -> Outputs:
        dqkv, qkv = task.call(functions, inputs)["dqkv"], inputs["qkv"]
        if np.shape(dqkv) != qkv.shape:
            raise Malformed(
                f"dqkv must have the shape of qkv, {qkv.shape}; yours has {np.shape(dqkv)}."
            )
        return dict(zip(("dq", "dk", "dv"), np.split(dqkv, 3, axis=-1), strict=True))

    return task._replace(call=call)


# --- the adapted linear map --------------------------------------------------------------------


def adapted_task(
    *, adapters: int = 1, dropped: keep.Fields | None = None, mask: bool = True
) -> Task:
    """A linear map with adapters on the last of its columns, and a dropout mask for each."""
    ending = ["", "_2"][:adapters]

    def make(rng: Any, s: Sizes) -> Inputs:
        outputs = s.O + 1
        inputs: Inputs = {
            "x": whole(rng, s.shape("...C")),
            "w": whole(rng, (s.C, outputs)),
            "b": whole(rng, (outputs,)),
            "columns": slice(1, outputs),
        }
        for i, end in enumerate(ending):
            inputs |= {f"A{end}": whole(rng, s.shape("CR")), f"B{end}": whole(rng, s.shape("RO"))}
            inputs |= {f"scale{end}": 3.0 + i}
            drawn = dropout_mask(rng, s.shape("...C"), 0.5, np.float64) if mask else None
            inputs |= {f"mask{end}": drawn}
        return {**inputs, "dy": whole(rng, (*s.lead, outputs))}

    def call(functions: Functions, v: Inputs) -> Outputs:
        placed = {
            f"adapter{end}": Adapter(
                v[f"A{end}"], v[f"B{end}"], v[f"scale{end}"], v[f"mask{end}"], v["columns"]
            )
            for end in ending
        }
        _, cache = lora.adapted_linear_forward(v["x"], v["w"], v["b"], adapters=placed)
        cache = keep.without(cache, dropped or {})
        result = functions["adapted_linear_backward"](v["dy"], cache)
        found = named(result, ["dx", "dlinear", "dadapters"])
        dw, db = entries(found["dlinear"], "the second result", "w", "b")
        outputs = {"dx": found["dx"], "dw": dw, "db": db}
        factors = entries(found["dadapters"], "the third result", *placed)
        for end, ab in zip(ending, factors, strict=True):
            dA, dB = entries(ab, "an adapter's gradients", "A", "B")
            outputs |= {f"dA{end}": dA, f"dB{end}": dB}
        return outputs

    return Task(make, call, SIZES)


def entries(part: Any, what: str, *names: str) -> list[Any]:
    """The entries of a dict by name; Malformed where it is no dict with just these."""
    listed = ", ".join(f'"{name}"' for name in names)
    if not isinstance(part, Mapping) or set(part) != set(names):
        has = (
            f"has {', '.join(map(repr, part))}" if isinstance(part, Mapping) else f"is {part!r:.40}"
        )
        raise Malformed(f"It must return as {what} a dict with {listed or 'nothing'}; yours {has}.")
    return [part[name] for name in names]


# --- the block ---------------------------------------------------------------------------------

MAPS = {"qkv": "attn", "o": "attn", "up": "mlp", "down": "mlp"}


def block_task(plan: Plan, *adapted: str) -> Task:
    """A block with adapters on these maps, of rank 1."""

    def make(rng: Any, s: Sizes) -> Inputs:
        C, F = s.C * s.H, s.O + 1
        shapes = {"qkv": (C, 3 * C), "o": (C, C), "up": (C, F), "down": (F, C)}
        inputs: Inputs = {"heads": s.H, "x": whole(rng, (*s.lead, C))}
        for name in ("ln_1", "ln_2"):
            inputs |= {f"{name}.w": whole(rng, (C,)), f"{name}.b": whole(rng, (C,))}
        for name, (n_in, n_out) in shapes.items():
            inputs |= {f"{MAPS[name]}.{name}.w": whole(rng, (n_in, n_out)) / 2}
            inputs |= {f"{MAPS[name]}.{name}.b": whole(rng, (n_out,))}
        for name in adapted:
            inputs |= {f"A_{name}": whole(rng, (shapes[name][0], 1))}
            inputs |= {f"B_{name}": whole(rng, (1, shapes[name][1]))}
        return {**inputs, "dy": whole(rng, (*s.lead, C))}

    def call(functions: Functions, v: Inputs) -> Outputs:
        cache = block_cache(v, plan)
        found = named(functions["block_backward"](v["dy"], cache), ["dx", "dblock", "dadapters"])
        outputs = {"dx": found["dx"]}
        for name in ("dblock", "dadapters"):
            if not isinstance(found[name], dict):
                raise Malformed(
                    f"{name} must be a tree, that is, a dict; yours is {found[name]!r:.40}."
                )
            outputs |= flatten(found[name], name)
        return outputs

    return Task(make, call, tuple(s for s in SIZES if s.C * s.H > 1 and s.lead[-1] < 5)[:6])


def block_cache(v: Inputs, plan: Plan) -> Any:
    """What the block's forward pass keeps, for a case's inputs."""
    block = unflatten({k: x for k, x in v.items() if k.startswith(("ln_", "attn.", "mlp."))})
    places: dict[str, dict[str, Adapter]] = {name: {} for name in MAPS}
    for name in MAPS:
        if f"A_{name}" in v:
            factors = v[f"A_{name}"], v[f"B_{name}"]
            places[name][name] = Adapter(*factors, 2.0, None, slice(None))
    width = v["x"].shape[-1]
    config = gpt2.GPTConfig(n_embd=width, n_head=v["heads"], layer_norm_epsilon=0.1)
    attend = ops.attention_forward
    return gpt2.block_forward(v["x"], block, places, config=config, plan=plan, attend=attend)[1]


# --- the optimiser -----------------------------------------------------------------------------


def adamw_task(*, matrix: bool, first: bool = False) -> Task:
    """One AdamW step of a matrix or a vector."""

    def make(rng: Any, s: Sizes) -> Inputs:
        shape = s.shape("VC") if matrix else s.shape("V")
        p, g, m = (whole(rng, shape) for _ in range(3))
        v = np.abs(whole(rng, shape))
        state = {"m": 0 * m, "v": 0 * v, "step": 1} if first else {"m": m, "v": v, "step": 3}
        rates = {"lr": 0.3, "beta1": 0.7, "beta2": 0.9, "eps": 0.11, "weight_decay": 0.23}
        return {"p": p, "g": g, **state, **rates}

    def call(functions: Functions, inputs: Inputs) -> Outputs:
        return named(functions["_adamw_leaf"](*inputs.values()), ["p", "m", "v"])

    return Task(make, call, SIZES)


def clip_task(share: float) -> Task:
    """Gradients whose norm is so many times the largest that is allowed."""

    def make(rng: Any, s: Sizes) -> Inputs:
        a, b = whole(rng, s.shape("CO")), whole(rng, s.shape("V"))
        b[0] = 1.0
        norm = float(np.sqrt((a * a).sum() + (b * b).sum()))
        return {"a": a, "b": b, "max_norm": norm / share}

    def call(functions: Functions, v: Inputs) -> Outputs:
        grads = {"a": v["a"], "more": [v["b"]]}
        clipped, norm = named(
            functions["clip_by_global_norm"](grads, v["max_norm"]), ["grads", "norm"]
        ).values()
        a, more = entries(clipped, "the first result", "a", "more")
        if not isinstance(more, list) or len(more) != 1:
            raise Malformed("The tree must keep its form: a list stays a list of as many arrays.")
        return {"grads.a": a, "grads.b": more[0], "norm": norm}

    return Task(make, call, SIZES)


# --- merging and mixing ------------------------------------------------------------------------


MERGING = {"merge": "merged", "unmerge": "unmerged"}


def _small_tree(rng: Any, s: Sizes) -> Inputs:
    C, F = s.C, s.O + 1
    shapes = {"wte": (3, C), "qkv": (C, 3 * C), "up": (C, F), "down": (F, C)}
    return {name: whole(rng, shape) for name, shape in shapes.items()}


def _base(v: Inputs) -> Tree:
    linear = {name: {"w": v[name], "b": v[name][0]} for name in ("qkv", "up", "down")}
    attn = {"qkv": linear["qkv"], "o": {"w": v["qkv"][:, : v["wte"].shape[1]]}}
    block = {"attn": attn, "mlp": {"up": linear["up"], "down": linear["down"]}}
    return {"wte": v["wte"], "blocks": [block]}


def _adapter(v: Inputs, end: str = "") -> tuple[Tree, LoRAConfig]:
    k = {"A": v[f"A_k{end}"], "B": v[f"B_k{end}"]}
    up = {"A": v[f"A_up{end}"], "B": v[f"B_up{end}"]}
    names = tuple(v.get("adapters", "k up").split())
    rank, others = k["A"].shape[1], {"up": up["A"].shape[1]}
    config = LoRAConfig(rank, v[f"alpha{end}"], targets=names, rank_pattern=others)
    attn = {name: k for name in names if name != "up"}
    return {"blocks": [{"attn": attn, "mlp": {"up": up}}]}, config


def _factors(rng: Any, s: Sizes, end: str = "", more: int = 0) -> Inputs:
    C, F, R = s.C, s.O + 1, s.R + more
    shapes = {"A_k": (C, R), "B_k": (R, C), "A_up": (C, R + 1), "B_up": (R + 1, F)}
    drawn = {f"{name}{end}": whole(rng, shape) for name, shape in shapes.items()}
    return {**drawn, f"alpha{end}": (6.0 + more) * R}


def merge_task(adapters: str) -> Task:
    """A base of one block, with an adapter on up and another on thirds of the fused weight."""

    def make(rng: Any, s: Sizes) -> Inputs:
        return {**_small_tree(rng, s), **_factors(rng, s), "adapters": adapters}

    def call(functions: Functions, v: Inputs) -> Outputs:
        outputs: Outputs = {}
        for name, result in MERGING.items():
            tree = functions[name](_base(v), *_adapter(v))
            if not isinstance(tree, Mapping):
                raise Malformed(f"{name} must return a tree; yours is {tree!r:.40}.")
            found, base = flatten(tree), flatten(_base(v))
            if found.keys() != base.keys():
                odd = ", ".join(sorted(found.keys() ^ base.keys()))
                raise Malformed(
                    f"{name} must return a tree of the base's form; these differ: {odd}."
                )
            del found["blocks.0.attn.o.w"]
            for path, leaf in found.items():
                outputs[f"{result}.{path.removeprefix('blocks.0.')}"] = leaf
        return outputs

    return Task(make, call, SIZES)


def refuses(function: Callable[..., Any], *arguments: Any) -> Array:
    """1 where a call raises MiniloraError, else 0."""
    try:
        function(*arguments)
    except MiniloraError:
        return np.array(1.0)
    return np.array(0.0)


def table_task() -> Task:
    """An adapter of the embedding: merged where the head is another table, refused where not."""

    def make(rng: Any, s: Sizes) -> Inputs:
        factors = {"A": whole(rng, (3, s.R)), "B": whole(rng, (s.R, s.C))}
        return {**_small_tree(rng, s), **factors, "head": whole(rng, (3, s.C))}

    def call(functions: Functions, v: Inputs) -> Outputs:
        adapter = {"embedding": {"A": v["A"], "B": v["B"]}, "blocks": [{}]}
        config = LoRAConfig(rank=v["A"].shape[1], alpha=2.0, targets=("embedding",))
        outputs: Outputs = {}
        for name, result in MERGING.items():
            tied, untied = _base(v), {**_base(v), "head": v["head"]}
            outputs[f"{result}.table"] = functions[name](untied, adapter, config)["wte"]
            outputs[f"{result}.refused"] = refuses(functions[name], tied, adapter, config)
        return outputs

    return Task(make, call, SIZES[:2])


def mix_task(*, negative: bool = False) -> Task:
    """Two adapters of different ranks and scales, and their weights."""

    def make(rng: Any, s: Sizes) -> Inputs:
        weights = {"weight": 2.0, "weight_2": -3.0 if negative else 5.0}
        return {**_factors(rng, s), **_factors(rng, s, "_2", more=1), **weights}

    def call(functions: Functions, v: Inputs) -> Outputs:
        parts = [_adapter(v), _adapter(v, "_2")]
        result = functions["mix"](parts, [v["weight"], v["weight_2"]])
        tree, config = named(result, ["tree", "config"]).values()
        try:
            found = adapters_of(tree)
            scales = {path: config.scale_of(path) for path in found}
        except (AttributeError, TypeError) as error:
            raise Malformed(f"It must return an adapter tree and a LoRAConfig: {error}.") from None
        if set(found) != {"blocks.0.attn.k", "blocks.0.mlp.up"}:
            raise Malformed(f"Its tree has adapters at {', '.join(found) or 'no path'}.")
        return {
            f"update_{path.rpartition('.')[2]}": scales[path] * (ab["A"] @ ab["B"])
            for path, ab in found.items()
        }

    return Task(make, call, SIZES)


def mix_refusal_task() -> Task:
    """What is not to be mixed: 1 where it is refused."""

    def make(rng: Any, s: Sizes) -> Inputs:
        return _factors(rng, s)

    def call(functions: Functions, v: Inputs) -> Outputs:
        lora, config = _adapter(v)
        wider = {**v, "A_k": np.concatenate([v["A_k"], v["A_k"]])}
        asked = {
            "weights": ([(lora, config)] * 2, [1.0]),
            "infinite": ([(lora, config)], [np.inf]),
            "blocks": ([(lora, config), ({"blocks": lora["blocks"] * 2}, config)], [1.0, 1.0]),
            "sides": ([(lora, config), _adapter(wider)], [1.0, 1.0]),
        }
        mix = functions["mix"]
        return {f"refused.{name}": refuses(mix, *arguments) for name, arguments in asked.items()}

    return Task(make, call, SIZES[:2])


# --- one's own ---------------------------------------------------------------------------------


def numeric_task(shape: str) -> Task:
    """f(x) = (x W)² + x W, whose central differences are exact but for rounding."""

    def make(rng: Any, s: Sizes) -> Inputs:
        x = whole(rng, s.shape(shape))
        w = whole(rng, (x.shape[-1], s.O))
        return {"x": x, "w": w, "dy": whole(rng, (x @ w).shape), "h": 2.0**-10}

    def call(functions: Functions, v: Inputs) -> Outputs:
        def f(x: Array) -> Array:
            y: Array = x @ v["w"]
            return y * y + y

        return {"dx": functions["numeric_gradient"](f, v["x"], v["dy"], h=v["h"])}

    return Task(make, call, SIZES)


def rms_norm_task() -> Task:
    """Both passes, the cache being the student's own."""

    def make(rng: Any, s: Sizes) -> Inputs:
        x, w = whole(rng, s.shape("...C")), whole(rng, s.shape("C"))
        return {"x": x, "w": w, "eps": 0.25, "dy": whole(rng, x.shape)}

    def call(functions: Functions, v: Inputs) -> Outputs:
        forward = functions["rms_norm_forward"](v["x"], v["w"], eps=v["eps"])
        y, cache = named(forward, ["y", "cache"]).values()
        backward = functions["rms_norm_backward"](v["dy"], cache)
        return {"y": y, **named(backward, ["dx", "dw"])}

    return Task(make, call, SIZES)


# --- the register ------------------------------------------------------------------------------


def _rows() -> list[Exercise]:
    model, adamw_page = "docs/derivations/model.md", "docs/derivations/adamw.md"
    no_mask = PAIRS["dropout"]._replace(constants=lambda rng, s: {"mask": None})
    offset = {
        name: PAIRS[name]._replace(constants=lambda rng, s: {"offset": int(rng.integers(3))})
        for name in ("position", "position, frozen")
    }
    B_frozen = {
        f"{name}, B frozen": PAIRS[name]._replace(dropped={cache: ("h",)}, frozen=("B",))
        for name, cache in (("lora", lora.LoRACache), ("lora, embedding", lora.LoRAEmbeddingCache))
    }
    lora_B, embedding_B = ({name: pair} for name, pair in B_frozen.items())
    return [
        Exercise(
            "numeric_gradient", "The numeric gradient, by which all others are checked", given,
            ("numeric_gradient",), "docs/notation.md", 20, (),
            {"a matrix": numeric_task("...C"), "a vector": numeric_task("C")},
        ),
        of_pair(ops.linear_backward, "The linear map, the model of all the others", 30,
                "numeric_gradient", helpers=("matmul_backward",), tags_of=("matmul_backward",)),
        of_pair(ops.embedding_backward, "The embedding: rows of a table", 20, "linear"),
        of_pair(ops.position_backward, "Positions", 15, "embedding", varied=offset),
        of_pair(ops.affine_backward, "Scale and shift, the second half of the layer norm", 15,
                "linear"),
        of_pair(ops.normalise_backward, "Normalising a row", 60, "affine"),
        of_pair(ops.layer_norm_backward, "The layer norm: affine and normalise", 20, "normalise",
                tags_of=("affine_backward", "normalise_backward")),
        Exercise(
            "rms_norm", "RMSNorm, a pair of your own", given,
            ("rms_norm_forward", "rms_norm_backward"), "docs/derivations/layer_norm.md", 45,
            ("layer_norm",), {"rms norm": rms_norm_task()},
        ),
        of_pair(ops.gelu_backward, "GELU", 25, "linear", helpers=("gelu_gradient",),
                tags_of=("gelu_gradient",)),
        of_pair(ops.softmax_backward, "The softmax", 30, "linear"),
        of_pair(ops.attend_backward, "Attention in one head", 45, "softmax"),
        of_pair(ops.attention_backward, "Causal attention in all heads", 45, "attend",
                tags_of=("attend_backward",), task=thirds_task),
        of_pair(ops.head_backward, "The head: logits", 10, "linear"),
        of_pair(loss.cross_entropy_backward, "The cross-entropy", 25, "softmax"),
        of_pair(ops.dropout_backward, "Dropout", 10, "linear",
                varied={"dropout, none": no_mask}),
        of_pair(lora.lora_backward, "Low-rank adaptation", 40, "linear", varied=lora_B),
        of_pair(lora.lora_embedding_backward, "LoRA of an embedding", 25, "lora", "embedding",
                varied=embedding_B),
        Exercise(
            "adapted_linear", "A linear map with its adapters", lora, ("adapted_linear_backward",),
            model, 30, ("lora", "dropout"),
            {
                "an adapter, with dropout": adapted_task(),
                "an adapter, without dropout": adapted_task(mask=False),
                "two adapters": adapted_task(adapters=2),
                "a frozen base": adapted_task(dropped=keep.OF_WEIGHTS),
                "frozen adapters": adapted_task(dropped=keep.OF_FACTORS),
                "no dx": adapted_task(dropped=keep.OF_INPUTS),
            },
        ),
        Exercise(
            "block", "The block", gpt2, ("block_backward",), model, 60,
            ("adapted_linear", "layer_norm", "gelu", "attention"),
            {
                "all trained": block_task(Plan(base=True, lora=True), *MAPS),
                "a frozen base": block_task(Plan(lora=True), *MAPS),
                "ends at the MLP": block_task(Plan(lora=True, end="up"), "up", "down"),
                "ends at the attention": block_task(Plan(lora=True, end="qkv"), "qkv", "o", "down"),
            },
        ),
        Exercise(
            "adamw", "AdamW", optim, ("_adamw_leaf",), adamw_page, 35, ("linear",),
            {
                "a matrix": adamw_task(matrix=True),
                "a vector": adamw_task(matrix=False),
                "the first step": adamw_task(matrix=True, first=True),
            },
        ),
        Exercise(
            "clipping", "Clipping by the global norm", optim, ("clip_by_global_norm",), adamw_page,
            15, (), {"above": clip_task(2.0), "below": clip_task(0.5)},
        ),
        Exercise(
            "merging", "Merging and unmerging", lora, ("merge", "unmerge"),
            "docs/derivations/lora.md", 30, ("lora",),
            {
                "adapters of k and up": merge_task("k up"),
                "adapters of k, v and up": merge_task("k v up"),
                "an adapter of the embedding": table_task(),
            },
            helpers=("_with_updates",), tags_of=("_with_updates",),
        ),
        Exercise(
            "mixing", "The weighted sum of adapters", mixing,
            ("mix",), "docs/mixing.md", 30, ("merging",),
            {
                "two adapters": mix_task(),
                "a negative weight": mix_task(negative=True),
                "what is refused": mix_refusal_task(),
            },
        ),
    ]  # fmt: skip


EXERCISES: dict[str, Exercise] = {row.name: row for row in _rows()}


def tags(exercise: Exercise) -> list[tuple[str, str]]:
    """The equations to write, in the order of the package's source: the tag, and what it says."""
    found: dict[str, str] = {}
    for name in (*exercise.tags_of, *exercise.functions):
        lines, _ = inspect.getsourcelines(inspect.unwrap(getattr(exercise.module, name)))
        for line in lines:
            for tag, text in re.findall(r"# [\[(]([A-Z]+\.\d+)[\])]\s*(.*)$", line):
                found.setdefault(tag, text)
    return list(found.items())
