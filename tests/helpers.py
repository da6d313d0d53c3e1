"""What several test files need: random arrays and models, walks through caches, stops, streams."""

import contextlib
import errno
import io
import json
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minilora import loss, ops, tiles
from minilora.adapters import LoRAConfig, dropout_masks, lora_init
from minilora.formats.tensors import read_tensors, write_tensors
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.network import Net
from minilora.training.loop import Progress
from minilora.tree import Tree, flatten, map_leaves

CONFIG = GPTConfig(vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2, n_inner=12)


# --- random arrays and models ------------------------------------------------------------------


def normal(*shape: int, seed: int = 0, dtype: Any = np.float64) -> np.ndarray:
    """Standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def moved(tree: Tree, seed: int) -> Tree:
    """The tree with every leaf moved, so that nothing is zero, one or as it was drawn."""
    rng = np.random.default_rng(seed)
    return map_leaves(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(x.dtype), tree)


def copied(tree: Tree) -> Tree:
    """The same numbers in other memory."""
    return map_leaves(np.copy, tree)


def a_base(config: GPTConfig = CONFIG) -> Tree:
    """A base in float64 in which no bias is 0 and no layer norm 1."""
    return moved(gpt_init(config, seed=0, dtype=np.float64), 0)


def a_net(
    *targets: str, base: Tree | None = None, config: GPTConfig = CONFIG, is_trained: bool = True,
    **options: Any,
) -> Net:  # fmt: skip
    """A base with an adapter on these targets, or none; B is not 0 where it is trained."""
    base = a_base(config) if base is None else base
    if not targets:
        return Net(base, config)
    lora_config = LoRAConfig(**{"rank": 2, "alpha": 3.0, "targets": targets, **options})
    lora = lora_init(base, lora_config, seed=1)
    return Net(base, config, moved(lora, 1) if is_trained else lora, lora_config)


def a_batch(net: Net, B: int = 3, T: int = 5) -> dict[str, Any]:
    """Random tokens, targets and, where the net's adapters have dropout, masks."""
    rng = np.random.default_rng(2)
    tokens, targets = rng.integers(net.config.vocab_size, size=(2, B, T))
    masks = None
    if net.lora is not None and net.lora_config is not None:
        masks = dropout_masks(net.lora, net.lora_config, rng=rng, shape=(B, T))
    return {"tokens": tokens, "targets": targets, "masks": masks}


@contextlib.contextmanager
def small_tiles() -> Iterator[None]:
    """Several tiles of entries, of queries and of the vocabulary even at small sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", 5)
        patch.setattr(ops, "QUERY_TILE", 2)
        patch.setattr(loss, "VOCAB_CHUNK", 3)
        yield


# --- comparison --------------------------------------------------------------------------------


def assert_trees_equal(actual: Tree, expected: Tree) -> None:
    """The same paths with the same bits."""
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        assert np.array_equal(actual[path], leaf), f"{path} differs"


def assert_trees_close(actual: Tree, expected: Tree, rtol: float = 1e-9) -> None:
    """The same paths with the same numbers up to rounding."""
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(actual[path], leaf, rtol=rtol, atol=1e-12, err_msg=path)


def close(actual: Any, expected: Any, **tolerance: float) -> None:
    """The same numbers up to the rounding of a few operations in float64."""
    np.testing.assert_allclose(actual, expected, **{"rtol": 1e-12, "atol": 1e-13, **tolerance})


# --- caches ------------------------------------------------------------------------------------


def parts_of(value: Any, path: str = "") -> dict[str, Any]:
    """Everything inside nested caches, tuples, lists and dicts, and they themselves, by path."""
    if isinstance(value, Mapping):
        inside = dict(value)
    elif hasattr(value, "_fields"):
        inside = value._asdict()
    elif isinstance(value, tuple | list):
        inside = dict(enumerate(value))
    else:
        inside = {}
    found = {path: value}
    for name, part in inside.items():
        found |= parts_of(part, f"{path}.{name}" if path else str(name))
    return found


def arrays_in(cache: Any) -> dict[str, np.ndarray]:
    """Every array inside nested caches, tuples, lists and dicts, by path."""
    return {path: x for path, x in parts_of(cache).items() if isinstance(x, np.ndarray)}


def owner_of(x: np.ndarray) -> np.ndarray:
    """The array whose memory a view shows; the array itself where it is no view."""
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


def numbers_kept(cache: Any, *, of: Tree) -> dict[str, np.ndarray]:
    """The arrays of real numbers that a cache keeps alive, by the first path of each.

    A view counts as the array it shows. Those of the tree `of`, the parameters, are left out.
    """
    seen = {id(owner_of(leaf)) for leaf in flatten(of).values() if leaf is not None}
    kept = {}
    for path, x in arrays_in(cache).items():
        x = owner_of(x)
        if x.dtype.kind == "f" and id(x) not in seen:
            seen.add(id(x))
            kept[path] = x
    return kept


# --- runs --------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_at(step: int) -> Callable[[Progress], None]:
    """A report that ends the run at a step."""

    def report(progress: Progress) -> None:
        if progress.step == step:
            raise Killed

    return report


def adapter_bytes(folder: Path) -> list[bytes]:
    """The two files of an adapter."""
    return [
        (folder / name).read_bytes()
        for name in ("adapter_model.safetensors", "adapter_config.json")
    ]


# --- a disk on which something happens ---------------------------------------------------------

NEEDS_SPACE = {"open", "write", "flush", "truncate", "fsync", "mkdir"}


class Disk:
    """Every change that the program makes to the disk, counted; at one of them something happens.

    `killed`: the process ends there, so that nothing later happens either. `refused`: this one
    operation fails. `full`: from there on, all that needs space fails.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mode: str = "", at: int = -1) -> None:
        self.mode, self.at = mode, at
        self.done: list[str] = []
        self.files: list[CountedFile] = []
        for name in ("mkdir", "rmdir", "unlink", "chmod"):
            monkeypatch.setattr(Path, name, self.counted(name, getattr(Path, name)))
        for name in ("replace", "fsync"):
            monkeypatch.setattr(os, name, self.counted(name, getattr(os, name)))
        opened = Path.open

        def open_counted(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+"):
                return opened(path, mode, *args, **options)
            self.step("open", path)
            self.files.append(CountedFile(self, opened(path, mode, *args, **options)))
            return self.files[-1]

        monkeypatch.setattr(Path, "open", open_counted)

    def counted(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(subject: Any, *args: Any, **options: Any) -> Any:
            self.step(name, subject)
            return operation(subject, *args, **options)

        return run

    def step(self, name: str, subject: Any) -> None:
        """Count an operation; here what happens at one of them does."""
        index = len(self.done)
        self.done.append(f"{name} {getattr(subject, 'name', subject)}")
        if self.mode == "killed" and index >= self.at:
            raise Killed
        here = index == self.at and self.mode in ("refused", "full")
        if here or (self.mode == "full" and index > self.at >= 0 and name in NEEDS_SPACE):
            raise OSError(errno.ENOSPC, "No space left on device")

    def end_of_process(self) -> None:
        """Close what is open, as the system does."""
        for file in self.files:
            file.file.close()


class CountedFile:
    """A file that is open for writing; a write at which something happens is done by half."""

    def __init__(self, disk: Disk, file: Any) -> None:
        self.disk, self.file = disk, file

    def write(self, data: Any) -> int:
        try:
            self.disk.step("write", self.file)
        except BaseException:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            raise
        return int(self.file.write(data))

    def flush(self) -> None:
        self.disk.step("flush", self.file)
        self.file.flush()

    def truncate(self, size: int) -> int:
        self.disk.step("truncate", self.file)
        return int(self.file.truncate(size))

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


# --- files and streams -------------------------------------------------------------------------


def bytes_of(folder: Path) -> dict[str, bytes]:
    """What is in each file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files, by their paths in the folder, and the folders between."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def set_stdin(patch: pytest.MonkeyPatch, data: bytes) -> None:
    """Put these bytes on standard input."""
    patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


# --- memory ------------------------------------------------------------------------------------


def peak_of(f: Callable[[], Any]) -> int:
    """The most bytes that were allocated at a time during a call, above those before it."""
    f()  # what is imported or made once and kept
    tracemalloc.start()
    try:
        f()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def edit_config(folder: Path, **fields: Any) -> None:
    """Change fields of a base's config.json; `...` takes one away."""
    path = folder / "config.json"
    document = json.loads(path.read_text(encoding="utf-8")) | fields
    kept = {name: value for name, value in document.items() if value is not ...}
    path.write_text(json.dumps(kept), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the tensors of a base's model.safetensors in place."""
    path = folder / "model.safetensors"
    tensors, metadata = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors, metadata)
