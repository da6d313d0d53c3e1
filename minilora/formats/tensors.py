"""Safetensors files: named arrays behind a JSON header, and no code that could run.

The layout is eight bytes of header length, the header, and the arrays' bytes. The safetensors
package checks headers; the arrays themselves are read here, a part at a time, since its NumPy side
knows no bfloat16 and keeps the whole file mapped, and written here (see `tensor_parts`).
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora.backend import Array, to_host
from minilora.errors import MiniloraError
from minilora.formats.files import check_file, read_json, shown, write_file

Shape = tuple[int, ...]

# Everything is little-endian. A bfloat16 is the upper half of a float32.
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
# Ours have no bfloat16.
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items() if name != "BF16"}
FLOATS = ("F64", "F32", "F16", "BF16")
PART = 1 << 20  # numbers of an array that are converted at once


class Entry(NamedTuple):
    """One array in a file: its dtype by safetensors' name, its shape, its first byte."""

    path: Path
    name: str
    dtype: str
    shape: Shape
    offset: int


# --- reading -----------------------------------------------------------------------------------


def read_header(path: str | Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """What a safetensors file holds, by name, and its metadata; no array is read.

    Raises MiniloraError for a file that is missing, empty, cut off, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    path = check_file(path)
    try:
        with safe_open(str(path), framework="numpy") as checked:  # sizes, offsets, overlaps, ends
            metadata = checked.metadata() or {}
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, ValueError) as error:  # the latter if it was just replaced
        raise MiniloraError(
            f"{path} is no safetensors file, or a damaged one: {shown(str(error))}"
        ) from None
    except OSError as error:
        raise MiniloraError(f"{path} cannot be read: {error.strerror or error}") from error
    header.pop("__metadata__", None)
    entries = {
        name: Entry(path, name, e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
        for name, e in header.items()
    }
    return entries, metadata


def read_index(path: str | Path) -> dict[str, Entry]:
    """What the files that an index (`model.safetensors.index.json`) names hold together, by name.

    Raises MiniloraError for an index without its map from names to files beside it, for a file that
    is missing or damaged, and unless each array that it names lies in that file alone. What
    else the files hold counts too, as in transformers.
    """
    path = Path(path)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MiniloraError(f"{path}: weight_map is no object from tensor names to file names")
    for file in weight_map.values():
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", file):
            raise MiniloraError(
                f"{path}: weight_map names the file {reprlib.repr(file)}, "
                "expected a plain name such as model-00001-of-00002.safetensors"
            )
    entries: dict[str, Entry] = {}
    for file in sorted(set(weight_map.values())):
        for name, entry in read_header(path.parent / file)[0].items():
            if weight_map.get(name, file) != file or name in entries:
                raise MiniloraError(
                    f"{entry.path} holds {shown(name)}, which weight_map in {path} "
                    f"places in {reprlib.repr(weight_map.get(name))}"
                )
            entries[name] = entry
    missing = [shown(name) for name in weight_map if name not in entries]
    if missing:
        raise MiniloraError(f"{path} names {listed(missing)}, which its files do not hold")
    return entries


def read_array(entry: Entry) -> Array:
    """The array of an entry in its own dtype, bfloat16 as float32.

    Raises MiniloraError for a dtype that NumPy lacks (eight bits and less).
    """
    if entry.dtype not in DTYPES:
        raise MiniloraError(
            f"{entry.path}: {shown(entry.name)} is of the unsupported dtype {shown(entry.dtype)}"
        )
    return _read(entry, 0, math.prod(entry.shape)).reshape(entry.shape)


def read_weight(entry: Entry, dtype: Any) -> Array:
    """The array of an entry in a floating-point dtype of our choice; errors as in `read_parts`."""
    weight = np.empty(entry.shape, dtype)
    for part, numbers in read_parts(entry, dtype):
        weight.reshape(-1)[part] = numbers
    return weight


def read_parts(entry: Entry, dtype: Any) -> Iterator[tuple[slice, Array]]:
    """The numbers of an entry in a floating-point dtype, a part of the flattened array at a time.

    Raises MiniloraError unless the file has floating-point numbers there, all of them finite.
    """
    if entry.dtype not in FLOATS:
        raise MiniloraError(
            f"{entry.path}: {shown(entry.name)} is of dtype {shown(entry.dtype)}, "
            f"expected {', '.join(FLOATS)}"
        )
    size = math.prod(entry.shape)
    for start in range(0, size, PART):
        part = slice(start, min(start + PART, size))
        with np.errstate(over="ignore"):
            numbers = _read(entry, start, part.stop - start).astype(dtype, copy=False)
        if not np.isfinite(numbers).all():
            raise MiniloraError(
                f"{entry.path}: {shown(entry.name)} holds numbers that are not finite"
            )
        yield part, numbers


def is_equal(entry: Entry, array: Array) -> bool:
    """Whether an entry is equal to an array on the host, in the array's dtype."""
    numbers = array.reshape(-1)
    return entry.shape == array.shape and all(
        np.array_equal(part, numbers[where]) for where, part in read_parts(entry, array.dtype)
    )


def _read(entry: Entry, start: int, count: int) -> Array:
    """`count` numbers of the flattened array from `start` on, bfloat16 as float32."""
    dtype = np.dtype(DTYPES[entry.dtype])
    offset = entry.offset + start * dtype.itemsize
    try:
        numbers = np.fromfile(entry.path, dtype, count=count, offset=offset)
    except OSError as error:  # it was there when its header was read
        raise MiniloraError(f"{entry.path} cannot be read: {error.strerror or error}") from error
    if numbers.size < count:
        raise MiniloraError(f"{entry.path} was cut off while it was read")
    if entry.dtype != "BF16":
        return numbers
    wide = numbers.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def read_tensors(path: str | Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Every array of a safetensors file by name, and its metadata; errors as in `read_header`."""
    entries, metadata = read_header(path)
    return {name: read_array(entry) for name, entry in entries.items()}, metadata


def check_shapes(problem: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Raise MiniloraError, `problem` and the names with their shapes, unless the two are equal."""
    missing = [f"{name} {expected[name]}" for name in expected if name not in found]
    left_over = [f"{shown(name)} {found[name]}" for name in found if name not in expected]
    wrong = [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    kinds = {"of the wrong shape": wrong, "missing": missing, "left over": left_over}
    lists = [f"{kind}: {listed(names)}" for kind, names in kinds.items() if names]
    if lists:
        raise MiniloraError(f"{problem}; {'; '.join(lists)}")


def listed(names: Sequence[str]) -> str:
    """The first six names, and how many more there are."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if names[6:] else "")


# --- writing -----------------------------------------------------------------------------------


def write_tensors(
    path: str | Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Replace one file by a safetensors file, as `write_file` does."""
    write_file(path, tensor_parts(tensors, metadata))


def tensor_parts(
    tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> list[bytes | memoryview]:
    """A safetensors file of these arrays, brought to the host: its header, and their own memory.

    Equal arrays and metadata give equal files. The package's own writer shuffles the metadata and,
    when it is killed, leaves a half-written file of a name that nobody knows. Raises MiniloraError
    for a dtype that the format does not know.
    """
    # An array's memory is written as it lies, so a transpose must be copied first. Large numbers
    # first, so that each array starts at a multiple of its numbers' size.
    arrays = {name: np.asarray(to_host(array), order="C") for name, array in tensors.items()}
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    parts: list[bytes | memoryview] = []
    end = 0
    for name in names:
        little = arrays[name].astype(arrays[name].dtype.newbyteorder("<"), copy=False)
        if little.dtype not in NAMES:
            raise MiniloraError(f"cannot save {name}: safetensors has no dtype {little.dtype}")
        start, end = end, end + little.nbytes
        header[name] = {
            "dtype": NAMES[little.dtype], "shape": little.shape, "data_offsets": (start, end)
        }  # fmt: skip
        parts.append(little.reshape(-1).view(np.uint8).data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *parts]
