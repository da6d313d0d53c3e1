"""The state of a training run in one file, and what must be equal for the run to go on from it."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minilora import tree
from minilora.backend import Array, to_device, to_host
from minilora.errors import MiniloraError
from minilora.formats.files import make_folder
from minilora.formats.tensors import read_tensors, write_tensors
from minilora.optim import Moments
from minilora.tree import Tree

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class History:
    """Losses in nats per token: of every step's batch, and of the held-out text now and then."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class State:
    """All that a run needs to go on: the trained tree, AdamW's moments, the losses so far."""

    step: int
    params: Tree
    moments: Moments
    history: History
    seconds: float = 0.0


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Make the folder where it is missing; should the block fail and leave it empty, it goes again.

    Raises MiniloraError where it cannot be made.
    """
    is_new = not folder.exists()
    make_folder(folder)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # it holds a checkpoint
                folder.rmdir()
        raise


def save_checkpoint(folder: Path, state: State, settings: Mapping[str, Any]) -> None:
    """Write the state and the run's settings to one file, atomically."""
    trees = {"params": state.params, "m": state.moments.m, "v": state.moments.v}
    write_tensors(
        folder / CHECKPOINT,
        tree.flatten(to_host(trees)),
        {
            "step": str(state.step),
            "seconds": str(state.seconds),
            "settings": json.dumps(settings, sort_keys=True),
            "history": json.dumps(dataclasses.asdict(state.history)),
        },
    )


def load_checkpoint(
    folder: Path, settings: Mapping[str, Any], params: Tree, device: str = "cpu"
) -> State | None:
    """The state saved in a folder, its trees of the structure of `params`; None if there is none.

    Raises MiniloraError naming the first setting that differs from those of the saved run.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    flat, metadata = read_tensors(path)
    try:
        saved = json.loads(metadata["settings"])
        step, seconds = int(metadata["step"]), float(metadata["seconds"])
        history = History(
            **{
                name: [(int(s), float(loss)) for s, loss in curve]
                for name, curve in json.loads(metadata["history"]).items()
            }
        )
    except (KeyError, ValueError, TypeError) as error:
        raise MiniloraError(f"{path} is not a checkpoint of minilora's training") from error
    check_same_run(path, saved, settings)
    # A file of paths cannot tell of blocks without an adapter, so their places come from `params`.
    trees = dict.fromkeys(("params", "m", "v"), params)
    leaves = iter([flat[name] for name in tree.flatten(trees)])
    trees = to_device(tree.map_leaves(lambda _: next(leaves), trees), device)
    return State(step, trees["params"], Moments(trees["m"], trees["v"]), history, seconds)


def check_same_run(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise MiniloraError naming a setting in which two runs differ."""
    now = json.loads(json.dumps(now))
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            raise MiniloraError(
                f"{path} belongs to a run with {name} {saved.get(name)}, but this one has "
                f"{now.get(name)}; resume with the same settings or choose another folder"
            )


def checksum(arrays: Iterable[Array]) -> int:
    """CRC-32 of the arrays' bytes, one after the other."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return crc
