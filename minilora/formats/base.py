"""A base as transformers stores it: a folder with config.json and model.safetensors.

Large models come in several files, with an index that says which tensor lies in which. What differs
between architectures is in a module of each (`gpt2`, `llama`): its configuration and the table of
its tensors, by which those are renamed, transposed and put side by side.
"""

from __future__ import annotations

import json
import reprlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from minilora.backend import Array, to_host
from minilora.errors import MiniloraError
from minilora.formats import gpt2, llama
from minilora.formats.companions import companions
from minilora.formats.files import (
    Content,
    field,
    is_there,
    json_bytes,
    read_json,
    shown,
)
from minilora.formats.output import steady, write_folder
from minilora.formats.table import HEAD, Stored, place
from minilora.formats.tensors import (
    Entry,
    Shape,
    check_shapes,
    is_equal,
    read_header,
    read_index,
    read_weight,
    tensor_parts,
)
from minilora.gpt2 import GPTConfig
from minilora.llama import LlamaConfig
from minilora.tree import Tree, flatten, unflatten

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

AnyConfig: TypeAlias = GPTConfig | LlamaConfig
# The module that knows the files of an architecture: by the model_type of a file, by our sizes.
LAYOUTS: dict[str, Any] = {"gpt2": gpt2, "llama": llama, "qwen2": llama}
LAYOUT_OF: dict[type, Any] = {layout.Config: layout for layout in (gpt2, llama)}


# --- configuration -----------------------------------------------------------------------------


def read_config(document: Mapping[str, Any], path: Path) -> AnyConfig:
    """The sizes that a config.json means, as transformers reads it.

    Raises MiniloraError naming the field whose value is no size or asks for another mathematics.
    """
    kind = document.get("model_type", "gpt2")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise MiniloraError(
            f"{path}: model_type is {reprlib.repr(kind)}, which minilora does not compute; "
            f"expected {' or '.join(map(repr, LAYOUTS))}"
        )
    sizes = LAYOUTS[kind].sizes(document, path)
    try:
        config: AnyConfig = LAYOUTS[kind].Config(**sizes)
    except MiniloraError as error:
        raise MiniloraError(f"{path}: {error}") from None
    return config


def is_tied(document: Mapping[str, Any], path: Path) -> bool:
    """Whether a config.json says that the head is the table of the embedding."""
    tied: bool = LAYOUTS[document.get("model_type", "gpt2")].TIED
    return field(document, "tie_word_embeddings", bool, tied, where=path)


# --- loading -----------------------------------------------------------------------------------


def load_base(folder: str | Path, *, dtype: Any = np.float32) -> tuple[Tree, AnyConfig]:
    """The base tree and its configuration from a folder in Hugging Face's layout.

    Every array is of `dtype`, float32 or float64, whatever the file holds. The tree has a "head"
    where tie_word_embeddings is false. Raises MiniloraError for a missing or damaged file, for a
    configuration that is not computed here (naming the field), for tensors that are missing, left
    over or of another shape (listing them), and for a tied head that differs from the embedding.
    """
    with steady(Path(folder), CONFIG):
        return _load_base(Path(folder), dtype)


def _load_base(folder: Path, dtype: Any) -> tuple[Tree, AnyConfig]:
    document = read_json(folder / CONFIG)
    config, tied = read_config(document, folder / CONFIG), is_tied(document, folder / CONFIG)
    layout = LAYOUT_OF[type(config)]
    weights, entries = _read_entries(folder, layout)
    tied_head = entries.pop(HEAD, None) if tied else None
    if tied_head is not None:  # safetensors' save_model keeps one of two names of a table
        entries.setdefault(layout.EMBEDDING, tied_head)
    if not tied and HEAD not in entries:
        raise MiniloraError(f"{weights}: tie_word_embeddings is false, but there is no {HEAD}")

    start = f"{layout.BLOCKS}."
    blocks = len({name.split(".")[1] for name in entries if name.startswith(start)})
    if config.n_layer != blocks:  # before a table of as many blocks as the configuration claims
        raise MiniloraError(
            f"{folder / CONFIG}: {layout.N_LAYER} is {config.n_layer}, but {weights.name} holds "
            f"{blocks} blocks (tensors named {start}0.…, {start}1.…)"
        )
    table = layout.tensor_table(config, document)
    check_shapes(
        f"{weights} does not hold the model that its {CONFIG} describes",
        {name: entry.shape for name, entry in entries.items()},
        {name: stored.shape for name, stored in table.items()},
    )
    flat = _read_tree(table, entries, layout.qkv_widths(config), dtype)
    if tied_head is not None:
        _check_tied(tied_head, flat["wte"], layout.EMBEDDING)
    return unflatten(flat), config


def _read_tree(
    table: Mapping[str, Stored], entries: Mapping[str, Entry], widths: tuple[int, int], dtype: Any
) -> dict[str, Array]:
    """Our arrays by path, those of several tensors put together by columns."""
    parts: dict[str, list[str]] = defaultdict(list)
    for name, stored in table.items():
        parts[place(stored.path, widths)[0]].append(name)
    flat = {}
    for path, names in parts.items():
        columns = [_read(table[name], entries[name], dtype) for name in names]
        one = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=-1)
        flat[path] = np.ascontiguousarray(one)
    return flat


def _read(stored: Stored, entry: Entry, dtype: Any) -> Array:
    """A tensor as our tree has it."""
    weight = read_weight(entry, dtype)
    return weight.T if stored.transposed else weight


def _read_entries(folder: Path, layout: Any) -> tuple[Path, dict[str, Entry]]:
    """The file that says what a base holds, and that by name, without prefix and constants."""
    weights = folder / WEIGHTS
    if is_there(weights) or not is_there(folder / INDEX):
        refuse_pickled(weights, "AutoModelForCausalLM")
        found = read_header(weights)[0]
    else:
        weights = folder / INDEX
        found = read_index(weights)
    entries: dict[str, Entry] = {}
    for name, entry in found.items():
        short = name.removeprefix(layout.PREFIX)  # only a model with a head has it in its names
        if short in entries:
            raise MiniloraError(
                f"{entry.path} holds {shown(short)} twice, once with {layout.PREFIX}"
            )
        if not layout.CONSTANT.fullmatch(short):
            entries[short] = entry
    return weights, entries


def refuse_pickled(weights: Path, reader: str) -> None:
    """Say how to convert weights that are there in PyTorch's own format alone."""
    pickled = "pytorch_model.bin" if weights.name == WEIGHTS else weights.with_suffix(".bin").name
    found = sorted(path.name for path in weights.parent.glob(f"{pickled}*"))
    if found and not is_there(weights):
        raise MiniloraError(
            f"{weights} does not exist, and {found[0]} beside it can hold code, so that it is not "
            f"read; transformers' {reader}.from_pretrained(FOLDER).save_pretrained(FOLDER) "
            f"writes {weights.name}"
        )


def _check_tied(head: Entry, wte: Array, embedding: str) -> None:
    """Refuse a file whose two tables differ although its configuration says that they are one."""
    if not is_equal(head, wte):
        raise MiniloraError(
            f"{head.path}: {HEAD} differs from {embedding}, but {CONFIG} says that they are tied; "
            "expected tie_word_embeddings false for a head of its own"
        )


# --- saving ------------------------------------------------------------------------------------


def save_base(
    folder: str | Path,
    base: Tree,
    config: AnyConfig,
    *,
    dtype: Any = np.float32,
    like: str | Path | None = None,
) -> None:
    """Write a base as a folder that transformers opens, in `dtype`.

    `like` is the folder of the base that it was made from: all that its config.json says and that
    still holds, and its tokenizer's and generation's files, are carried over. Only files of the
    names written are replaced, all or none. Raises MiniloraError for a weight that `dtype` cannot
    hold, a `like` of other sizes, and where the system refuses to read or write.
    """
    write_folder(folder, base_files(base, config, dtype=dtype, like=like))


def base_files(
    base: Tree,
    config: AnyConfig,
    *,
    dtype: Any = np.float32,
    like: str | Path | None = None,
) -> dict[str, Content]:
    """The files that `save_base` writes, by name, the configuration last."""
    carried = {} if like is None else companions(Path(like))
    layout, document = LAYOUT_OF[type(config)], _config_document(base, config, like)
    weights, table = flatten(to_host(base)), layout.tensor_table(config, document)
    check_shapes(
        "the base is not one of its configuration",
        {path: x.shape for path, x in weights.items()},
        _tree_shapes(table, layout.qkv_widths(config)),
    )
    tensors = {}
    for name, stored in table.items():
        path, columns = place(stored.path, layout.qkv_widths(config))
        name = name if name == HEAD else layout.PREFIX + name
        weight = weights[path][..., columns]
        with np.errstate(over="ignore"):
            tensors[name] = (weight.T if stored.transposed else weight).astype(dtype, copy=False)
        if not np.isfinite(tensors[name]).all():
            raise MiniloraError(
                f"{path} holds numbers that are not finite in {np.dtype(dtype)}; nothing was saved"
            )
    return {
        **{name: [data] for name, data in carried.items()},
        WEIGHTS: tensor_parts(tensors, {"format": "pt"}),
        CONFIG: [json_bytes(document)],
    }


def _tree_shapes(table: Mapping[str, Stored], widths: tuple[int, int]) -> dict[str, Shape]:
    """The shapes of our arrays, by path, that the tensors of a table make."""
    shapes: dict[str, Shape] = {}
    for stored in table.values():
        path, _ = place(stored.path, widths)
        *rows, columns = stored.ours
        shapes[path] = (*rows, columns + shapes.get(path, (0,))[-1])
    return shapes


def _config_document(base: Tree, config: AnyConfig, like: str | Path | None) -> dict[str, Any]:
    """The fields of the config.json in `like`, but for those that describe the new weights.

    Where there is none, the fields of transformers' configuration that say what is computed here.
    """
    new = LAYOUT_OF[type(config)].fresh_document(base, config)
    path = None if like is None else Path(like) / CONFIG
    if path is None or not is_there(path):
        return new
    document = read_json(path)
    if read_config(document, path) != config:
        raise MiniloraError(f"{path} describes a base of other sizes than the one to save")
    try:
        json.dumps(document, allow_nan=False)
    except ValueError:
        raise MiniloraError(f"{path} holds a number that is not finite") from None
    document.pop("torch_dtype", None)  # the older name of dtype
    if is_tied(document, path) != new["tie_word_embeddings"]:
        document["tie_word_embeddings"] = new["tie_word_embeddings"]
    return document | {name: new[name] for name in ("architectures", "dtype", "model_type")}
