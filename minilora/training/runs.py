"""A training run and its folder: started, saved, and resumed after a stop.

During a run its folder is locked and holds a checkpoint. At the end the result is written, then a
record of the run with checksums, and only then is the checkpoint deleted, so that `resume` finds
what it needs at whatever moment the run is killed. Damaged files are never used: an intact result
comes first, then an intact checkpoint, and without either an error says what is damaged.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from minilora import tree
from minilora.adapters import LoRAConfig, lora_init
from minilora.data import Data
from minilora.errors import MiniloraError
from minilora.formats.base import base_files
from minilora.formats.card import card_file, lora_facts
from minilora.formats.companions import companions
from minilora.formats.files import (
    errors_naming,
    file_checksum,
    json_bytes,
    read_json,
    write_json,
)
from minilora.formats.output import entries, held
from minilora.formats.peft import adapter_files
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.model import Model
from minilora.tokenizer import ByteTokenizer
from minilora.training.checkpoint import (
    CHECKPOINT,
    History,
    check_same_run,
    read_history,
    read_settings,
)
from minilora.training.loop import (
    RATES,
    Progress,
    Snapshot,
    TrainConfig,
    Trained,
    run_fingerprint,
    train,
)
from minilora.training.progress import ProgressBar, is_watched
from minilora.training.ranks import Ranks
from minilora.tree import Tree

RECORD = "training.json"
ADAPTER_WEIGHTS, BASE_WEIGHTS = "adapter_model.safetensors", "model.safetensors"
WEIGHTS = {"lora": ADAPTER_WEIGHTS, "full": BASE_WEIGHTS}


@dataclass(frozen=True)
class Run:
    """A finished run: its figures, by the names that `--json` writes, and its losses.

    `was_finished` says that it had ended before, so that nothing was left to do.
    """

    figures: dict[str, float | int]
    history: History
    was_finished: bool = False


Report = Callable[[Progress], None]
Watch = Callable[[Snapshot], None]


def silent(progress: Progress) -> None:
    """A report that shows nothing."""


def unwatched(seen: Snapshot) -> None:
    """A watch that looks at nothing."""


@contextmanager
def shown(report: Report | None, progress: bool | None, steps: int) -> Iterator[Report]:
    """The caller's report, else a bar if `progress` is true or, by default, somebody watches."""
    if report is not None:
        yield report
    elif progress or (progress is None and is_watched()):
        with ProgressBar(steps, "adapt") as bar:
            yield bar
    else:
        yield silent


def adapt(
    model: Model,
    corpus: Data,
    lora_config: LoRAConfig | None = None,
    settings: TrainConfig | None = None,
    *,
    device: str = "cpu",
    report: Report | None = None,
    watch: Watch = unwatched,
    progress: bool | None = None,
    ranks: Ranks | None = None,
) -> tuple[Model, Trained]:
    """The model adapted to a corpus, by a trained adapter or (method `full`) a trained base.

    An adapter that the model has is trained further, with a fresh optimiser: it keeps its rank,
    scale and targets, and `lora_config` may only change the dropout. The given model is not
    changed. A bar shows the progress on a terminal and in a notebook; `progress` turns it on or
    off, and `report` replaces it. `watch` sees the model at each evaluation, as a RunReport does.
    Raises MiniloraError as `lora_init` and `train` do, and for method `full` with an adapter.
    """
    settings = settings or TrainConfig()
    start = _start(model, lora_config, settings)
    with shown(report, progress, settings.steps) as tell:
        trained = train(
            start, corpus, settings=settings, device=device, report=tell, watch=watch, ranks=ranks
        )
    return _with_trained(start, settings, trained.params), trained


def adapt_in_folder(
    model: Model,
    corpus: Data,
    lora_config: LoRAConfig | None,
    settings: TrainConfig,
    folder: str | Path,
    *,
    dtype: Any = np.float32,
    resume: bool = False,
    device: str = "cpu",
    report: Report = silent,
    watch: Watch = unwatched,
    ranks: Ranks | None = None,
) -> Run:
    """`adapt`, with its result saved in a folder: an adapter in PEFT's layout, or a base (`full`).

    A base is saved in `dtype`, an adapter in its own dtype. With `resume` an unfinished run in the
    folder continues and ends in the same files, bit for bit; if there is none, a new one starts. Of
    several `ranks` only the first needs the folder. Raises MiniloraError as `adapt` does, and if
    the folder holds anything else, another process writes to it, or its run is damaged.
    """
    folder, ranks = Path(folder), ranks or Ranks()
    with held(folder) if ranks.rank == 0 else nullcontext() as hold:
        ranks.of_first(lambda: check_free(folder, resume=resume))
        start = _start(model, lora_config, settings)
        fingerprint = run_fingerprint(start, settings, corpus, device, ranks)
        if settings.method == "full":
            fingerprint["dtype"] = np.dtype(dtype).name
        if resume and (run := ranks.of_first(lambda: _finished_run(folder, fingerprint))):
            return run
        if settings.method == "full":
            companions(model.folder)  # raises before training if they cannot be copied
        trained = train(
            start, corpus, settings=settings, folder=folder, fingerprint=fingerprint,
            resume=resume, device=device, report=report, watch=watch, ranks=ranks,
        )  # fmt: skip

        def save() -> Run:
            adapted = _with_trained(start, settings, trained.params)
            config: Any = model.config
            if adapted.lora_config is None:
                files = base_files(adapted.base, config, dtype=dtype, like=model.folder)
            else:
                files = adapter_files(
                    adapted.lora, adapted.lora_config, config, base_name=model.base_name
                )
            assert hold is not None  # as this is the first rank
            hold.write(files)
            weights = folder / WEIGHTS[settings.method]
            figures = _figures(model.base, trained, weights.stat().st_size, ranks)
            if adapted.lora_config is not None:
                facts = _card_facts(adapted.lora_config, settings, figures)
                hold.write(card_file(folder, model.base_name, facts))
            _write_record(folder, fingerprint, figures, trained.history, list(files))
            _remove(folder, CHECKPOINT)
            return Run(figures, trained.history)

        return ranks.of_first(save)


def _figures(base: Tree, trained: Trained, size: int, ranks: Ranks) -> dict[str, float | int]:
    figures: dict[str, float | int] = {
        "loss_before": trained.history.held_out[0][1],
        "loss_after": trained.history.held_out[-1][1],
        "trainable_parameters": tree.count(trained.params),
        "base_parameters": tree.count(base),
        "adapter_bytes": size,
        "seconds": trained.seconds,
        "tokens_per_second": trained.tokens_per_second,
    }
    if ranks.size > 1:
        figures |= {
            "processes": ranks.size,
            "allreduce_bytes": tree.nbytes(trained.params),
            "allreduce_bytes_full": tree.nbytes(base),
        }
    return figures


def _card_facts(
    lora_config: LoRAConfig, settings: TrainConfig, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """What an adapter's card says: nothing about the machine, so equal runs have equal cards."""
    facts = lora_facts(lora_config)
    facts |= {name: getattr(settings, name) for name in ("steps", "batch", "context", "lr", "seed")}
    names = ("trainable_parameters", "base_parameters", "loss_before", "loss_after")
    return facts | {name.replace("_", " "): figures[name] for name in names}


def pretrain_in_folder(
    config: GPTConfig, corpus: Data, settings: TrainConfig, folder: str | Path, **options: Any
) -> Run:
    """A byte-level base trained from scratch, saved as by `adapt_in_folder`, whose options it has.

    Raises MiniloraError as `adapt_in_folder` does.
    """
    base = gpt_init(config, seed=settings.seed)
    fresh = Model(base, config, tokenizer=ByteTokenizer(), folder=Path(folder))
    lr = settings.lr if settings.lr != RATES[settings.method] else RATES["full"]
    settings = dataclasses.replace(settings, method="full", lr=lr)
    return adapt_in_folder(fresh, corpus, None, settings, folder, **options)


def _start(model: Model, lora_config: LoRAConfig | None, settings: TrainConfig) -> Model:
    """The model to train: with its own adapter, a fresh one or, for full training, none."""
    own = model.lora_config
    if settings.method == "full":
        if model.lora is not None:
            raise MiniloraError(
                "method 'full' trains a base without an adapter; merge the adapter into it first, "
                "or train the adapter further with method 'lora'"
            )
        return model
    if model.lora is None or own is None:
        lora_config = lora_config or LoRAConfig()
        return model.with_adapter(
            lora_init(model.base, lora_config, seed=settings.seed), lora_config
        )
    asked = dataclasses.replace(lora_config or own)
    for name, value in dataclasses.asdict(own).items():
        if name != "dropout" and getattr(asked, name) != value:
            raise MiniloraError(
                f"{name} {getattr(asked, name)} was asked for, but the adapter has {name} {value}; "
                "training it further keeps its rank, scale and targets"
            )
    return model.with_adapter(model.lora, asked)


def _with_trained(model: Model, settings: TrainConfig, params: Tree) -> Model:
    trained = {"lora" if settings.method == "lora" else "base": params}
    return dataclasses.replace(model, **trained)


# --- the folder --------------------------------------------------------------------------------


def check_free(folder: Path, *, resume: bool) -> None:
    """Raise MiniloraError unless a folder is empty or, with `resume`, holds a run."""
    there = entries(folder)
    run_is_here = CHECKPOINT in there or RECORD in there
    if run_is_here and not resume:
        raise MiniloraError(
            f"{folder} holds another training run; expected a new or an empty output folder"
        )
    if there and not run_is_here:
        raise MiniloraError(
            f"{folder} already holds {there[0]}; expected a new or an empty output folder"
        )


def date_of_run(folder: Path) -> date | None:
    """The date that a run in a folder gave its chat template, if there is such a run."""
    with suppress(MiniloraError, ValueError, TypeError, AttributeError):
        if (folder / CHECKPOINT).exists():
            settings = read_settings(folder / CHECKPOINT)
        else:
            settings = read_json(folder / RECORD)["settings"] if (folder / RECORD).exists() else {}
        return date.fromisoformat(settings["today"]) if "today" in settings else None
    return None  # what is damaged is said where it is read


def _remove(folder: Path, *names: str) -> None:
    for name in names:
        with errors_naming(folder / name):
            (folder / name).unlink(missing_ok=True)


def _write_record(
    folder: Path,
    settings: Mapping[str, Any],
    figures: Mapping[str, Any],
    history: History,
    files: list[str],
) -> None:
    """Write the record of a finished run, with checksums of its files and of itself."""
    record = {
        "settings": settings,
        "figures": figures,
        "history": dataclasses.asdict(history),
        "files": {name: file_checksum(folder / name) for name in files},
    }
    write_json(folder / RECORD, record | {"checksum": zlib.crc32(json_bytes(record))})


def _finished_run(folder: Path, fingerprint: Mapping[str, Any]) -> Run | None:
    """The finished run in a folder; None if there is none.

    None, too, if its record or files are damaged but a checkpoint is left to resume from. Raises
    MiniloraError if they are damaged and none is left, or if the run is another.
    """
    if not (folder / RECORD).exists():
        return None
    try:
        record = _read_record(folder)
    except MiniloraError:
        if (folder / CHECKPOINT).exists():
            return None
        raise
    check_same_run(folder / RECORD, record["settings"], fingerprint)
    _remove(folder, CHECKPOINT)
    return Run(record["figures"], record["history"], was_finished=True)


def _read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished run; MiniloraError if it or a file of the run is damaged."""
    path = folder / RECORD
    record = read_json(path)
    try:
        if record.pop("checksum") != zlib.crc32(json_bytes(record)):
            raise ValueError("its checksum is another")
        figures, files = record["figures"], dict(record["files"])
        record["history"] = read_history(record["history"])
        if not all(type(x) in (int, float) and math.isfinite(x) for x in figures.values()):
            raise ValueError("a figure is no number")
        dict(record["settings"])
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise MiniloraError(
            f"{path} is not the record of a training run, or is damaged; "
            "empty the folder to train again"
        ) from error
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise MiniloraError(
                f"{folder} holds the record of a finished run but not its {name}; "
                "empty the folder to train again"
            )
        if file_checksum(folder / name) != expected:
            raise MiniloraError(
                f"{folder / name} has changed since its run saved it; "
                "empty the folder to train again"
            )
    return record
