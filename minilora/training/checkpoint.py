"""The state of a training run in one file, and what must match for the run to resume from it."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minilora import tree
from minilora.backend import Array, to_device, to_host
from minilora.errors import MiniloraError
from minilora.formats.files import json_number, make_folder, write_file
from minilora.formats.tensors import check_shapes, read_tensors, tensor_parts
from minilora.optim import Moments
from minilora.tree import Tree

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class History:
    """Losses in nats per token: of every step's batch, and of the held-out text at times."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"History({len(self.train)} steps, held-out loss {self.change()})"

    def change(self) -> str:
        """The held-out loss, the first and the last: "2.766 → 1.888 nats per token"."""
        ends = self.held_out[:1] + self.held_out[1:][-1:]
        losses = " → ".join(f"{loss:.3f}" for _, loss in ends)
        return f"{losses} nats per token" if losses else "not measured"


@dataclass
class State:
    """All that a run needs to resume: the trained tree, AdamW's moments, the losses so far."""

    step: int
    params: Tree
    moments: Moments
    history: History
    seconds: float = 0.0


def save_checkpoint(folder: Path, state: State, settings: Mapping[str, Any]) -> None:
    """Write the state and the run's settings as the folder's checkpoint, in place of the last one.

    Raises MiniloraError if it cannot be written; the last checkpoint then stays.
    """
    trees = {"params": state.params, "m": state.moments.m, "v": state.moments.v}
    flat = tree.flatten(to_host(trees))
    metadata = {
        "step": str(state.step),
        "seconds": str(state.seconds),
        "settings": json.dumps(settings, sort_keys=True, default=json_number),
        "history": json.dumps(dataclasses.asdict(state.history), default=json_number),
    }
    metadata["checksum"] = _checksum(flat, metadata)
    write_file(make_folder(folder) / CHECKPOINT, tensor_parts(flat, metadata))


def load_checkpoint(
    folder: Path, settings: Mapping[str, Any], params: Tree, device: str = "cpu"
) -> State | None:
    """The state saved in a folder, its trees like `params`; None if there is none.

    Raises MiniloraError for a file that is damaged or has no checksum (older versions wrote none),
    for a setting that differs from the saved run's, naming the first, and for arrays whose names,
    shapes or dtypes differ from the run's.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    flat, metadata = read_tensors(path)
    if "checksum" not in metadata:
        raise MiniloraError(
            f"{path} has no checksum: it is not a checkpoint of minilora, or one of an older "
            "version; empty the folder to train again"
        )
    if metadata.pop("checksum") != _checksum(flat, metadata):
        raise MiniloraError(
            f"{path} is damaged: its contents do not match its checksum; "
            "empty the folder to train again"
        )
    try:
        saved = dict(json.loads(metadata["settings"]))
        step, seconds = int(metadata["step"]), float(metadata["seconds"])
        history = read_history(json.loads(metadata["history"]))
        if not (0 < step <= saved["steps"] and 0 <= seconds < math.inf):
            raise ValueError(f"step {step} of {saved['steps']}, after {seconds} s")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise MiniloraError(f"{path} is not a checkpoint of minilora") from error
    check_same_run(path, saved, settings)
    # The file does not list blocks without an adapter, so the trees' structure is that of `params`.
    trees = dict.fromkeys(("params", "m", "v"), params)
    _check_arrays(path, flat, tree.flatten(trees))
    leaves = iter([flat[name] for name in tree.flatten(trees)])
    trees = to_device(tree.map_leaves(lambda _: next(leaves), trees), device)
    return State(step, trees["params"], Moments(trees["m"], trees["v"]), history, seconds)


def read_settings(path: Path) -> Any:
    """The settings that a checkpoint was saved with, unchecked."""
    return json.loads(read_tensors(path)[1]["settings"])


def _check_arrays(path: Path, found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """Raise MiniloraError unless the arrays have the names, shapes and dtypes of the run's."""
    check_shapes(
        f"{path} does not hold the arrays of this run",
        {name: array.shape for name, array in found.items()},
        {name: array.shape for name, array in expected.items()},
    )
    for name, array in expected.items():
        if found[name].dtype != array.dtype:
            raise MiniloraError(
                f"{path}: {name} is of dtype {found[name].dtype}, but this run's is {array.dtype}"
            )


def read_history(document: Any) -> History:
    """The losses in a JSON document; ValueError, TypeError or KeyError if it is no history."""
    curves = {name: [(s, loss) for s, loss in document[name]] for name in ("train", "held_out")}
    points = [point for curve in curves.values() for point in curve]
    if not all(
        type(s) is int and type(loss) is float and math.isfinite(loss) for s, loss in points
    ):
        raise ValueError("a history is two lists of [step, loss]")
    if not curves["held_out"]:
        raise ValueError("a history begins with the held-out loss before the first step")
    return History(**curves)


def check_same_run(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise MiniloraError naming a setting in which two runs differ; checksums are named last."""
    now = json.loads(json.dumps(now, default=json_number))
    for name in sorted(saved.keys() | now.keys(), key=lambda n: (n.startswith("checksum"), n)):
        if saved.get(name) != now.get(name):
            raise MiniloraError(
                f"{path} belongs to a run with {name} {saved.get(name)}, but this one has "
                f"{now.get(name)}; resume with the same settings or choose another folder"
            )


# --- checksums ---------------------------------------------------------------------------------


def checksum(arrays: Iterable[Array]) -> int:
    """The CRC-32 of the arrays' bytes, one array after the other."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return crc


def _checksum(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    """The CRC-32 of a whole checkpoint: arrays, their names, dtypes and shapes, and metadata."""
    names = sorted(arrays)
    labels = [(name, str(arrays[name].dtype), arrays[name].shape) for name in names]
    text = json.dumps([labels, sorted(metadata.items())])
    return str(zlib.crc32(text.encode(), checksum(arrays[name] for name in names)))
