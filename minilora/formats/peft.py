"""An adapter as PEFT stores it: a folder of adapter_config.json and adapter_model.safetensors.

PEFT's A is (R, in) and its B is (out, R), the transposes of ours. PEFT has one adapter for GPT-2's
fused c_attn, our `qkv`; adapters on its columns q, k and v are written as one c_attn adapter that
computes exactly the same:

    A = [A_q A_v],   B = [[B_q 0 0], [0 0 B_v]],   R = R_q + R_v

A Llama's q_proj, k_proj and v_proj are modules of their own there. An adapter on our `qkv` is
written as one of each, with the same A and its own columns of B.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from minilora.adapters import LoRAConfig, adapter_tree, adapters, compiled, weight_of
from minilora.backend import Array, to_host
from minilora.errors import MiniloraError
from minilora.formats.base import LAYOUT_OF, AnyConfig, refuse_pickled
from minilora.formats.card import card_file, lora_facts
from minilora.formats.files import Content, field, json_bytes, read_json, shown
from minilora.formats.output import steady, write_folder
from minilora.formats.table import HEAD
from minilora.formats.tensors import (
    Entry,
    Shape,
    check_shapes,
    is_equal,
    listed,
    read_header,
    read_weight,
    tensor_parts,
)
from minilora.tree import Tree, flatten

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

Value = TypeVar("Value", int, float)


# --- modules: PEFT's names of our weights ------------------------------------------------------


class Module(NamedTuple):
    """A weight that PEFT can adapt: its LoRA path (`qkv` for c_attn), and its shape (in, out)."""

    path: str
    shape: Shape


def modules_of(config: AnyConfig) -> dict[str, Module]:
    """The modules of a base by PEFT's names, `transformer.h.0.attn.c_attn` and the like."""
    layout = LAYOUT_OF[type(config)]
    return {
        layout.PREFIX + name.removesuffix(".weight"): Module(
            "embedding" if stored.path == "wte" else stored.path.removesuffix(".w"), stored.ours
        )
        for name, stored in layout.tensor_table(config, {"tie_word_embeddings": True}).items()
        if len(stored.shape) == 2 and stored.path != "wpe"
    }


def tensor_names(name: str, module: Module) -> tuple[str, str]:
    """The names of a module's A and B in PEFT's file."""
    if module.path == "embedding":
        return f"{KEY_PREFIX}{name}.lora_embedding_A", f"{KEY_PREFIX}{name}.lora_embedding_B"
    return f"{KEY_PREFIX}{name}.lora_A.weight", f"{KEY_PREFIX}{name}.lora_B.weight"


def _tensor_shapes(modules: Mapping[str, Module], ranks: Mapping[str, int]) -> dict[str, Shape]:
    """The shapes of PEFT's A (R, in) and B (out, R), by name, for the modules that have a rank."""
    shapes: dict[str, Shape] = {}
    for name, rank in ranks.items():
        n_in, n_out = modules[name].shape
        name_A, name_B = tensor_names(name, modules[name])
        shapes |= {name_A: (rank, n_in), name_B: (n_out, rank)}
    return shapes


def _shorten(names: Iterable[str], every: Iterable[str], kind: Callable[[str], str]) -> list[str]:
    """The names, but one kind for all of its names where none of `every` is missing."""
    names, total = list(names), Counter(map(kind, every))
    present = Counter(map(kind, names))
    return list(dict.fromkeys(kind(n) if present[kind(n)] == total[kind(n)] else n for n in names))


# --- saving ------------------------------------------------------------------------------------


class Fused(NamedTuple):
    """One adapter over a whole weight: A (in, R), B (R, out), and its α."""

    A: Array
    B: Array
    alpha: float


def fused_blocks(lora: Tree) -> list[int]:
    """The blocks of a GPT-2 whose adapters on q, k or v are written as one on c_attn."""
    columns = [path for path in adapters(lora) if path.rpartition(".")[2] in ("q", "k", "v")]
    return sorted({int(path.split(".")[1]) for path in columns})


def rewritten(paths: Iterable[str], config: AnyConfig) -> str:
    """What to tell of adapters at LoRA paths that are no modules in PEFT; empty where all are."""
    modules = {module.path for module in modules_of(config).values()}
    return LAYOUT_OF[type(config)].REWRITTEN if set(paths) - modules else ""


def save_adapter(
    folder: str | Path,
    lora: Tree,
    lora_config: LoRAConfig,
    config: AnyConfig,
    *,
    base_name: str | None = None,
) -> None:
    """Write an adapter as a folder that PEFT loads, in its own dtype.

    adapter_config.json and adapter_model.safetensors are replaced, both or neither; other files
    stay. A card, README.md, is added if there is none. `base_name` is where PEFT looks for the
    base. An adapter on what is no module in PEFT becomes an equivalent one on what is; `rewritten`
    says so. Raises MiniloraError for a tree that does not fit the two configurations, and where the
    system refuses to write.
    """
    files = adapter_files(lora, lora_config, config, base_name=base_name)
    write_folder(folder, card_file(Path(folder), base_name, lora_facts(lora_config)) | files)


def adapter_files(
    lora: Tree, lora_config: LoRAConfig, config: AnyConfig, *, base_name: str | None = None
) -> dict[str, Content]:
    """The two files of an adapter in PEFT's layout, by name, the configuration last."""
    modules, found = modules_of(config), adapters(to_host(lora))
    widths = LAYOUT_OF[type(config)].qkv_widths(config)
    if not found:
        raise MiniloraError("there is no adapter to save: the tree is empty")
    check_shapes(
        "the adapters do not fit the base and the LoRA configuration",
        {path: factor.shape for path, factor in flatten(lora).items()},
        _tree_shapes(found, lora_config, modules, widths),
    )
    fused = _fuse(found, lora_config, modules, widths)
    tensors: dict[str, Array] = {}
    for name, adapter in fused.items():
        name_A, name_B = tensor_names(name, modules[name])
        tensors |= {name_A: adapter.A.T, name_B: adapter.B.T}
    document = _config_document(fused, config, lora_config, base_name)
    return {WEIGHTS: tensor_parts(tensors, {"format": "pt"}), CONFIG: [json_bytes(document)]}


def _tree_shapes(
    paths: Iterable[str],
    lora_config: LoRAConfig,
    modules: Mapping[str, Module],
    widths: tuple[int, int],
) -> dict[str, Shape]:
    """The shapes that our A and B must have at these LoRA paths; a path of no weight has none."""
    weights: dict[str, Shape] = {}
    for module in modules.values():
        (n_in, n_out), (weight, _) = module.shape, weight_of(module.path, *widths)
        weights[weight] = (n_in, n_out + weights.get(weight, (0, 0))[1])
    shapes: dict[str, Shape] = {}
    for path in paths:
        weight, columns = weight_of(path, *widths)
        if weight in weights:
            n_in, n_out = weights[weight]
            rank = lora_config.rank_of(path)
            shapes |= {f"{path}.A": (n_in, rank), f"{path}.B": (rank, len(range(n_out)[columns]))}
    return shapes


def _overlap(path: str, module: Module, widths: tuple[int, int]) -> tuple[slice, slice] | None:
    """Which columns of B, of the adapter at a LoRA path, act on which of a module's; None: none."""
    (weight, its), (home, own) = weight_of(path, *widths), weight_of(module.path, *widths)
    if weight != home:
        return None
    if its == own:
        return slice(None), slice(None)
    every = range(widths[0] + 2 * widths[1])  # q, k and v side by side
    its_range, own_range = every[its], every[own]
    start, stop = max(its_range.start, own_range.start), min(its_range.stop, own_range.stop)
    if start >= stop:
        return None
    return (
        slice(start - its_range.start, stop - its_range.start),
        slice(start - own_range.start, stop - own_range.start),
    )


def _fuse(
    found: Mapping[str, dict[str, Array]],
    lora_config: LoRAConfig,
    modules: Mapping[str, Module],
    widths: tuple[int, int],
) -> dict[str, Fused]:
    """One adapter for each adapted module, by its name, that computes the sum of those found there.

    Their A side by side, and each B in its own rows and columns. The sum has one scale s: the
    largest of theirs, so that a B of smaller scale is multiplied by the ratio. One adapter over the
    whole module stays as it is, to the last bit.
    """
    fused = {}
    for name, module in modules.items():
        parts = {path: place for path in found if (place := _overlap(path, module, widths))}
        if not parts:
            continue
        scales = {path: lora_config.scale_of(path) for path in parts}
        largest = max(parts, key=lambda path: scales[path])
        A = np.concatenate([found[path]["A"] for path in parts], axis=1)
        rank = A.shape[1]
        B = np.zeros((rank, module.shape[1]), A.dtype)
        row = 0
        for path, (its, own) in parts.items():
            part = found[path]["B"][:, its]
            B[row : row + len(part), own] = part * (scales[path] / scales[largest])
            row += len(part)
        growth = rank / lora_config.rank_of(largest)  # α grows with R, to keep s = α / R or α / √R
        alpha = lora_config.alpha_of(largest) * (
            math.sqrt(growth) if lora_config.rslora else growth
        )
        fused[name] = Fused(A, B, alpha)
    return fused


def _config_document(
    fused: Mapping[str, Fused],
    config: AnyConfig,
    lora_config: LoRAConfig,
    base_name: str | None,
) -> dict[str, Any]:
    """PEFT's adapter_config.json: the commonest rank and α, and patterns where they differ."""

    def number(x: float) -> float | int:
        return int(x) if float(x).is_integer() else float(x)

    ranks = {name: len(adapter.B) for name, adapter in fused.items()}
    alphas = {name: number(adapter.alpha) for name, adapter in fused.items()}
    rank, alpha = (Counter(d.values()).most_common(1)[0][0] for d in (ranks, alphas))
    layout = LAYOUT_OF[type(config)]
    return {
        # PEFT's keys are regular expressions, so that the dots are escaped.
        "alpha_pattern": {re.escape(name): a for name, a in alphas.items() if a != alpha},
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": layout.FAN_IN_FAN_OUT,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": float(lora_config.dropout),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        # Its target names match a whole name or its end after a dot.
        "target_modules": _shorten(fused, modules_of(config), layout.kind),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora_config.rslora,
    }


# --- loading -----------------------------------------------------------------------------------

# Fields of adapter_config.json that are read, or that change nothing in what an adapter computes.
# Any other must be empty: what PEFT may one day add is refused by name, never ignored.
UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "bias", "fan_in_fan_out", "task_type", "inference_mode", "runtime_config"),
    *("base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
    *("init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "loftq_config"),
    *("megatron_core", "qalora_group_size"),  # PEFT writes their defaults
}
# The adapter's name in a key, where a program saved the model's own state.
DEFAULT = re.compile(r"(\.lora_(?:embedding_)?[AB])\.default(?=\.|$)")
# Starts of A and B that leave the base's weights as they are. The others (PiSSA, OLoRA, …) train
# against a changed base, which PEFT computes anew when it loads them.
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


def load_adapter(
    folder: str | Path, config: AnyConfig, *, dtype: Any = np.float32, base: Tree | None = None
) -> tuple[Tree, LoRAConfig]:
    """The adapter tree and its configuration from a folder that PEFT or `save_adapter` wrote.

    Every array is of `dtype`. The configuration names each module's rank and α by its exact LoRA
    path. Copies of the embedding and the head, which PEFT can save along, must equal those of
    `base`. Raises MiniloraError for a missing or damaged file, for what minilora does not compute
    (naming the field), and for tensors that are missing, left over or of another shape than the
    base's and the configuration's (listing them with both shapes).
    """
    with steady(Path(folder), CONFIG):
        return _load_adapter(Path(folder), config, dtype, base)


def _load_adapter(
    folder: Path, config: AnyConfig, dtype: Any, base: Tree | None
) -> tuple[Tree, LoRAConfig]:
    path = folder / CONFIG
    named = [] if path.exists() else sorted(found.parent for found in folder.glob(f"*/{CONFIG}"))
    if named:  # PEFT gives every adapter but the one called `default` a folder of its own
        raise MiniloraError(
            f"{folder} holds adapters in folders of their own; "
            f"name one of them: {listed([shown(str(name)) for name in named])}"
        )
    document = read_json(path)
    _refuse_unknown(document, path)
    refuse_pickled(folder / WEIGHTS, "AutoPeftModelForCausalLM")
    layout, modules = LAYOUT_OF[type(config)], modules_of(config)
    entries = _without_copies(_read_entries(folder / WEIGHTS), layout, base)
    adapted = _targets(document, modules, layout, path)
    if adapted is None:
        adapted = [
            n for n, m in modules.items() if any(key in entries for key in tensor_names(n, m))
        ]

    rank = field(document, "r", int, 8, where=path)
    alpha = field(document, "lora_alpha", float, 8.0, where=path)
    dropout = field(document, "lora_dropout", float, 0.0, where=path)
    rslora = document.get("use_rslora") is not None and field(
        document, "use_rslora", bool, False, where=path
    )
    ranks = _resolve(document, "rank_pattern", int, adapted, rank, path)
    alphas = _resolve(document, "alpha_pattern", float, adapted, alpha, path)
    check_shapes(
        f"{folder / WEIGHTS} was made for another base, or does not fit its {CONFIG}",
        {name: entry.shape for name, entry in entries.items()},
        _tensor_shapes(modules, ranks),
    )
    if not adapted:
        raise MiniloraError(f"{folder / WEIGHTS} holds no adapter of its base")

    paths = {name: modules[name].path for name in adapted}
    every = [module.path for module in modules.values()]
    targets = _shorten(paths.values(), every, lambda p: p.rpartition(".")[2])
    try:
        lora_config = LoRAConfig(
            rank=rank,
            alpha=alpha,
            targets=tuple(map(re.escape, targets)),
            dropout=dropout,
            rslora=rslora,
            rank_pattern={re.escape(paths[m]): r for m, r in ranks.items() if r != rank},
            alpha_pattern={re.escape(paths[m]): a for m, a in alphas.items() if a != alpha},
        )
    except MiniloraError as error:
        raise MiniloraError(f"{path}: {error}") from None

    flat = {}
    for name in adapted:
        for factor, key in zip("AB", tensor_names(name, modules[name]), strict=True):
            flat[f"{paths[name]}.{factor}"] = np.ascontiguousarray(
                read_weight(entries[key], dtype).T
            )
    return adapter_tree(flat, config.n_layer), lora_config


def _read_entries(path: Path) -> dict[str, Entry]:
    """What a file holds, by PEFT's names; some programs leave the adapter's, `default`, in them."""
    found, _ = read_header(path)
    entries = {DEFAULT.sub(r"\1", name): entry for name, entry in found.items()}
    if len(entries) < len(found):
        raise MiniloraError(f"{path} holds an adapter twice, once as the one called default")
    return entries


def _without_copies(
    entries: Mapping[str, Entry], layout: Any, base: Tree | None
) -> dict[str, Entry]:
    """The entries but for copies of the base's tables; MiniloraError for one that is changed.

    PEFT saves them with an adapter when tokens were added, and a Llama's adapted embedding always.
    """
    embedding = layout.PREFIX + layout.EMBEDDING
    adapted = embedding.replace(".weight", ".base_layer.weight")
    copies = {embedding: "wte", adapted: "wte", HEAD: "head"}
    tables = {} if base is None else {"wte": base["wte"], "head": base.get("head", base["wte"])}
    rest = dict(entries)
    for name, table in copies.items():
        entry = rest.pop(f"{KEY_PREFIX}{name}", None)
        if entry is not None and not (table in tables and is_equal(entry, to_host(tables[table]))):
            known = "differs from the base's" if tables else "can be compared with no base"
            raise MiniloraError(
                f"{entry.path} holds {KEY_PREFIX}{name}, which {known}; minilora loads an adapter "
                "only with the tables of its base as they were"
            )
    return rest


def _refuse_unknown(document: Mapping[str, Any], path: Path) -> None:
    """Raise MiniloraError naming the first field that asks for more than plain LoRA."""
    accepted = {
        "peft_type": ("LORA",),
        "bias": (None, "none"),
        "init_lora_weights": PLAIN_STARTS,
    }
    for name, values in accepted.items():
        if document.get(name) not in values:
            raise MiniloraError(
                f"{path}: {name} is {reprlib.repr(document.get(name))}, "
                f"expected {' or '.join(map(repr, values))}"
            )
    for name, value in document.items():
        if name not in UNDERSTOOD and value:
            raise MiniloraError(
                f"{path}: {name!r} is {reprlib.repr(value)}, which minilora does not compute; "
                "it loads plain LoRA only"
            )


# --- PEFT's patterns ---------------------------------------------------------------------------


def _targets(
    document: Mapping[str, Any], modules: Mapping[str, Module], layout: Any, path: Path
) -> list[str] | None:
    """The modules that the configuration says are adapted, as PEFT finds them.

    None where it does not say, or says it in a regular expression that is not safe to run: then
    the tensors alone tell. Raises MiniloraError for a value of the wrong kind.
    """
    target = document.get("target_modules")
    if isinstance(target, str) and target.lower() == "all-linear":
        chosen: set[str] | None = {n for n, m in modules.items() if m.path != "embedding"}
    else:
        chosen = _named(document, "target_modules", modules, path)
    excluded = _named(document, "exclude_modules", modules, path)
    if chosen is None or (excluded is None and document.get("exclude_modules")):
        return None
    chosen -= excluded or set()

    layers = document.get("layers_to_transform")
    if isinstance(target, list) and layers is not None and layers != []:
        if document.get("layers_pattern") not in (None, [], "", layout.BLOCKS, [layout.BLOCKS]):
            return None
        numbers = layers if isinstance(layers, list) else [layers]
        if not all(type(number) is int for number in numbers):
            raise MiniloraError(f"{path}: layers_to_transform is no list of block numbers")
        blocks = {f"{layout.PREFIX}{layout.BLOCKS}.{number}" for number in numbers}
        whole = set(target)  # PEFT adapts what a list names in full, in whatever layer it is
        chosen = {name for name in chosen if name in whole or name.rsplit(".", 2)[0] in blocks}
    return [name for name in modules if name in chosen]


def _named(
    document: Mapping[str, Any], name: str, modules: Iterable[str], path: Path
) -> set[str] | None:
    """The modules that a list of names or a regular expression names; None for None or unsafe."""
    value = document.get(name)
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return {module for module in modules if not _ends(module).isdisjoint(value)}
    if not isinstance(value, str):
        raise MiniloraError(
            f"{path}: {name} is {reprlib.repr(value)}, expected a list of names or a text"
        )
    if not is_quick([value], modules):
        return None
    expression = _compile(value, name, path)
    return {module for module in modules if expression.fullmatch(module)}


def _ends(name: str) -> set[str]:
    """A dotted name, and what follows each of its dots."""
    words = name.split(".")
    return {".".join(words[i:]) for i in range(len(words))}


def _resolve(
    document: Mapping[str, Any],
    name: str,
    kind: type[Value],
    modules: list[str],
    default: Value,
    path: Path,
) -> dict[str, Value]:
    """The rank or α of each module: that of the first key that matches it, or the default.

    Raises MiniloraError for a value of the wrong kind or a key that is not safe to run.
    """
    patterns = document.get(name) or {}
    if not isinstance(patterns, dict):
        raise MiniloraError(f"{path}: {name} is {reprlib.repr(patterns)}, expected an object")
    if not is_quick(patterns, modules):
        raise MiniloraError(
            f"{path}: {name} holds patterns that would take too long to match; "
            "expected names of modules, or patterns with few repeats"
        )
    found: dict[str, Value] = {}
    for key in patterns:
        expression = _compile(rf"(.*\.)?({key})$", name, path)  # as in PEFT's get_pattern_key
        value = field(patterns, key, kind, default, where=f"{path}: {name}")
        for module in modules:
            if module not in found and expression.match(module):
                found[module] = value
    return {module: found.get(module, default) for module in modules}


def _compile(pattern: str, name: str, path: Path) -> re.Pattern[str]:
    try:
        return compiled(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise MiniloraError(
            f"{path}: {name} holds {reprlib.repr(pattern)}, no regular expression: {error}"
        ) from None


# What stands for one character: an escape, or a class such as [a-z].
CHARACTER = re.compile(r"\\.|\[\^?\]?(?:\\.|[^]\\])*\]", re.DOTALL)


def is_quick(patterns: Iterable[str], names: Iterable[str], limit: float = 3e7) -> bool:
    """Whether matching each pattern with each name takes at most some `limit` steps (seconds).

    Python's engine tries every choice. With no group repeated, k repeats can share n characters in
    comb(n + k, k) ways, and each group multiplies this by its alternatives; with one repeated,
    (a+)+ alone takes 2^n. Patterns come from files, so that what may be slow is never run.
    """
    names = list(names)
    n = max(map(len, names), default=0)
    steps = 0.0
    for pattern in patterns:
        if len(pattern) > 1000:
            return False
        bare = CHARACTER.sub("x", pattern).replace("(?:", "(")
        repeats, groups = len(re.findall(r"[*+?{]", bare)), bare.count("(")
        if re.search(r"\)[*+{]|\(\?|\[", bare) or max(repeats, groups) > 20:
            return False
        ways = float(math.comb(n + repeats, repeats))
        while group := re.search(r"\([^()]*\)", bare):  # an innermost one
            ways *= group[0].count("|") + 1
            bare = bare.replace(group[0], "x", 1)
        ways *= bare.count("|") + 1
        steps += len(names) * ways + 500 * len(pattern)  # to compile it
        if steps > limit:
            return False
    return True
