"""A GGUF file, as llama.cpp has its models, to an ordinary folder of a Llama or a Qwen2.

The `gguf` package (extra `gguf`) reads the file and knows its quantised types; what the file means
is settled here. What could change the numbers or the tokens and is not known is refused by name.
Two things differ from Hugging Face's layout: a Llama's rows of q and k stand in pairs (2j, 2j + 1)
instead of (j, j + K/2), and Llama 3's scaling of the angles is a tensor of divisors.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora.backend import Array
from minilora.errors import MiniloraError
from minilora.formats import llama
from minilora.formats.base import CONFIG, WEIGHTS
from minilora.formats.files import Content, check_file, field, json_bytes, shown
from minilora.formats.gguf_tokenizer import tokenizer_files, tokens_of_roles
from minilora.formats.output import new_folder
from minilora.formats.table import HEAD
from minilora.formats.tensors import Shape, check_shapes, tensor_parts
from minilora.formats.tokenizer import GENERATION, load_tokenizer
from minilora.llama import LinearScaling, Llama3Scaling, LlamaConfig, frequencies

ARCHITECTURES = ("llama", "qwen2")
# llama.cpp's names of the tensors, by Hugging Face's in the table of `llama`.
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
EMBEDDING, DIVISORS = "token_embd.weight", "rope_freqs.weight"
# The fields of an architecture that must be there, those that may, and the values of others that
# change nothing. What is none of these is refused.
NEEDED = (
    *("context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon"),
)
UNDERSTOOD = (
    *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("rope.dimension_count", "rope.freq_base", "rope.scaling.original_context_length"),
    *("rope.scaling.factor", "rope.scaling.finetuned", "rope.scaling.type"),
    *("tensor_data_layout", "vocab_size"),
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "rope.scale_linear": (0.0, 1.0),
}


def convert(
    file: str | Path,
    folder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: Any = np.float32,
) -> None:
    """Write a GGUF file as a new folder that `load_model` and transformers open.

    Weights are dequantised to `dtype`. The tokenizer is made of the file's own tokens and merges,
    or is the `tokenizer` given, a tokenizer.json whose tokens have the same ids. Raises
    MiniloraError for a file that is damaged, or of an architecture, type, setting or tokenizer that
    is not known here, for a folder that holds anything, and without the `gguf` package.
    """
    with new_folder(Path(folder)) as write:
        files, vocab_size = folder_files(Path(file), tokenizer, dtype)
        write(files)
        load_tokenizer(folder, vocab_size)  # or all is removed again


def folder_files(
    path: Path, tokenizer: str | Path | None, dtype: Any
) -> tuple[dict[str, Content], int]:
    """The files that `convert` writes, by name, the configuration last; the vocabulary's size."""
    fields, tensors = read_gguf(path)
    config = read_config(fields, tensors, path)
    document = llama.config_document(
        config,
        fields["general.architecture"],
        tied=gguf_name(HEAD) not in tensors,
        with_bias={
            ours
            for module, ours in llama.MODULES.items()
            if gguf_name(f"layers.0.{module}.bias") in tensors
        },
    )
    table = llama.tensor_table(config, document)
    check_shapes(
        f"{path} does not hold the model that its fields describe",
        {name: tensor.shape for name, tensor in tensors.items() if name != DIVISORS},
        {gguf_name(name): stored.shape for name, stored in table.items()},
    )
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    weights = {}
    for name in table:
        weight, module = numbers(tensors[gguf_name(name)], dtype), name.split(".")[-2]
        if module in heads and document["model_type"] == "llama":
            weight = halves(weight, heads[module])
        weights[name if name == HEAD else llama.PREFIX + name] = weight
    roles = tokens_of_roles(fields, path)
    files: dict[str, Content] = {
        **tokenizer_files(fields, config.vocab_size, path, given=tokenizer),
        GENERATION: [json_bytes(roles)],
        WEIGHTS: tensor_parts(weights, {"format": "pt"}),
        CONFIG: [json_bytes(document | roles)],
    }
    return files, config.vocab_size


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of `llama.tensor_table`."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{NAMES[module]}.{kind}"
    _, block, part = module.split(".", 2)
    return f"blk.{block}.{NAMES[part]}.{kind}"


def halves(rows: Array, heads: int) -> Array:
    """The rows of q or k, or its bias, from pairs (2j, 2j + 1) to pairs (j, j + K/2), by head."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


# --- the file ----------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """A tensor of a file: its numbers or, where it is quantised, its blocks of bytes."""

    where: str
    data: Array
    type: Any  # of gguf.GGMLQuantizationType
    shape: Shape
    is_swapped: bool


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of a file and its tensors, by name, those of all parts of a split one.

    Raises MiniloraError for what is damaged or incomplete, and without the `gguf` package.
    """
    fields, tensors = _read_part(path)
    count = field(fields, "split.count", int, 1, where=path)
    if count <= 1:
        return fields, tensors
    name = re.fullmatch(rf"(.*)-\d{{5}}-of-{count:05}\.gguf", path.name)
    if name is None:
        raise MiniloraError(
            f"{path} is one of {count} parts; expected a name that ends in "
            f"-00001-of-{count:05}.gguf"
        )
    parts = []
    for number in range(count):
        part = path.with_name(f"{name[1]}-{number + 1:05}-of-{count:05}.gguf")
        parts.append(_read_part(part))
        its = tuple(parts[-1][0].get(f"split.{key}") for key in ("no", "count"))
        if its != (number, count):
            raise MiniloraError(
                f"{part} says that it is part {its[0]} of {its[1]}, counted from 0; "
                f"expected {number} of {count}"
            )
    fields = parts[0][0]
    tensors = {name: tensor for _, its in parts for name, tensor in its.items()}
    expected = field(fields, "split.tensors.count", int, len(tensors), where=path)
    if len(tensors) != expected:
        raise MiniloraError(f"the parts of {path} hold {len(tensors)} tensors, expected {expected}")
    return fields, tensors


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and the tensors of one file."""
    try:
        import gguf
    except ImportError:
        raise MiniloraError(f"reading {path} needs the gguf package: pip install gguf") from None

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        """Reads nothing beyond the end, of which NumPy would give what there is."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> Any:
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, *args, **kwargs)

    check_file(path)
    try:
        reader = Reader(path)
        fields = {name: entry.contents() for name, entry in reader.fields.items()}
        is_swapped = reader.byte_order == "S"
        tensors = {
            t.name: Tensor(f"{path}: {shown(t.name)}", t.data, t.tensor_type, shape, is_swapped)
            for t in reader.tensors
            for shape in [tuple(map(int, reversed(t.shape)))]  # its own order is the reverse
        }
    except (ValueError, LookupError, OverflowError, RecursionError, OSError) as error:
        raise MiniloraError(
            f"{path} is no GGUF file of version 2 or 3, or a damaged one: {shown(str(error))}"
        ) from None
    return fields, tensors


def numbers(tensor: Tensor, dtype: Any) -> Array:
    """A tensor's numbers in a dtype; MiniloraError for a type that is not known, and for inf."""
    import gguf

    kind = tensor.type.name
    if kind in ("F32", "F16"):
        weight = tensor.data
    elif tensor.is_swapped:
        raise MiniloraError(
            f"{tensor.where} is of type {kind} in a big-endian file, of which minilora reads "
            "F32 and F16 alone"
        )
    else:
        try:
            weight = gguf.dequantize(tensor.data, tensor.type)
        except NotImplementedError:
            raise MiniloraError(
                f"{tensor.where} is of type {kind}, which the gguf package does not dequantise; "
                "expected F32, F16, BF16, Q8_0, Q4_K or another of its types"
            ) from None
    with np.errstate(over="ignore"):
        weight = weight.astype(dtype, copy=False)
    if not np.isfinite(weight).all():
        raise MiniloraError(
            f"{tensor.where} holds numbers that are not finite in {np.dtype(dtype)}"
        )
    return weight


# --- the configuration -------------------------------------------------------------------------


def read_config(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> LlamaConfig:
    """The sizes and constants that the fields of a file state."""
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise MiniloraError(
            f"{path}: general.architecture is {reprlib.repr(kind)}, which minilora does not "
            f"convert; expected {' or '.join(map(repr, ARCHITECTURES))}"
        )
    own = {n.removeprefix(f"{kind}."): x for n, x in fields.items() if n.startswith(f"{kind}.")}
    for name, value in own.items():
        if name not in (*NEEDED, *UNDERSTOOD) and value not in NEUTRAL.get(name, ()):
            raise MiniloraError(
                f"{path}: {kind}.{name} is {reprlib.repr(value)}, which minilora does not compute"
            )
    for name in (*NEEDED, EMBEDDING):
        if name not in own and name not in tensors:
            raise MiniloraError(f"{path} has no {name if name == EMBEDDING else f'{kind}.{name}'}")

    def size(name: str, default: int = 0) -> int:
        return field(own, name, int, default, where=f"{path}: {kind}")

    def constant(name: str, default: float = 0.0) -> float:
        """A float32, by its shortest decimal: 1e-05, not 9.99999974e-06."""
        return float(str(np.float32(field(own, name, float, default, where=f"{path}: {kind}"))))

    C, H = size("embedding_length"), size("attention.head_count")
    K = size("attention.key_length", C // max(H, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        if size(name, K) != K:
            raise MiniloraError(
                f"{path}: {kind}.{name} is {size(name)}, but the heads are of width {K}; "
                "expected the same"
            )
    scaling, factor = own.get("rope.scaling.type", "none"), constant("rope.scaling.factor")
    if scaling not in ("none", "linear") or (scaling == "none" and factor not in (0.0, 1.0)):
        raise MiniloraError(
            f"{path}: {kind}.rope.scaling.type is {reprlib.repr(scaling)} with a factor of "
            f"{factor:g}; minilora computes 'linear' and, without a factor, 'none'"
        )
    linear_scaling = LinearScaling(factor) if scaling == "linear" else None
    try:
        config = LlamaConfig(
            vocab_size=tensors[EMBEDDING].shape[0],
            hidden_size=C,
            intermediate_size=size("feed_forward_length"),
            num_hidden_layers=size("block_count"),
            num_attention_heads=H,
            num_key_value_heads=size("attention.head_count_kv", H),
            max_position_embeddings=size("context_length"),
            rms_norm_eps=constant("attention.layer_norm_rms_epsilon"),
            rope_theta=constant("rope.freq_base", 10000.0),
            rope_scaling=linear_scaling,
            head_dim=None if K * H == C else K,
        )
    except MiniloraError as error:
        raise MiniloraError(f"{path}: {error}") from None
    blocks = len({name.split(".")[1] for name in tensors if name.startswith("blk.")})
    if config.n_layer > blocks:  # before a table of as many blocks as the file claims
        raise MiniloraError(
            f"{path}: {kind}.block_count is {config.n_layer}, but there are {blocks} blocks"
        )
    if DIVISORS not in tensors:
        return config
    return replace(config, rope_scaling=scaling_of(tensors[DIVISORS], config))


def scaling_of(tensor: Tensor, config: LlamaConfig) -> Llama3Scaling | None:
    """The scaling whose frequencies are the plain ones over the divisors; None where these are 1.

    Raises MiniloraError where Llama 3's way of scaling does not give them.
    """
    plain, divisors = frequencies(config), numbers(tensor, np.float64)
    if divisors.shape == plain.shape and config.rope_scaling is None:
        if (divisors == 1).all():
            return None
        for scaling in _scalings(plain, divisors):
            scaled = frequencies(replace(config, rope_scaling=scaling))
            if np.allclose(scaled * divisors, plain, rtol=1e-6, atol=0.0):
                return scaling
    raise MiniloraError(
        f"{tensor.where} is no scaling of the angles as in Llama 3, which alone minilora computes"
    )


def _scalings(plain: Array, divisors: Array) -> Iterator[Llama3Scaling]:
    """Settings that may give the divisors: Llama 3's own, and those fitted between the bands.

    Between them, the share of a frequency that is kept is a straight line over the frequencies.
    Only the ratios of `low`, `high` and `original` matter, so that `low` is 1.
    """
    factor = float(str(np.float32(divisors.max())))
    if factor > 1.0:
        yield Llama3Scaling(factor, low=1.0, high=4.0, original=8192)
    between = (divisors > 1.0) & (divisors < divisors.max())
    if between.sum() >= 2:
        kept = (1.0 / divisors[between] - 1.0 / factor) / (1.0 - 1.0 / factor)
        slope, start = np.polyfit(plain[between], kept, 1)
        high, original = 1.0 - 1.0 / start, -2.0 * math.pi * slope / start
        if high > 1.0 and original > 0.5:
            yield Llama3Scaling(factor, low=1.0, high=round(high, 3), original=round(original))
