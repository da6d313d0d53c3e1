"""A training run and its folder: claimed, trained, saved, and taken up again after a stop.

While a run goes on, its folder holds a checkpoint. When it ends, the result is written, then a
record of the run, and only then is the checkpoint deleted: whatever moment a run is killed at,
`resume` finds what it needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora import tree
from minilora.adapters import LoRAConfig, lora_init
from minilora.data import Corpus
from minilora.errors import MiniloraError
from minilora.formats import save_adapter, save_base
from minilora.formats.files import read_json, write_json
from minilora.gpt2 import GPTConfig, gpt_init
from minilora.model import Model
from minilora.tokenizer import ByteTokenizer
from minilora.training.checkpoint import CHECKPOINT, History, check_same_run
from minilora.training.loop import Progress, TrainConfig, Trained, run_fingerprint, train
from minilora.training.ranks import Ranks
from minilora.tree import Tree

RECORD = "training.json"
ADAPTER_WEIGHTS, BASE_WEIGHTS = "adapter_model.safetensors", "model.safetensors"
RESULT = {"lora": ("adapter_config.json", ADAPTER_WEIGHTS), "full": ("config.json", BASE_WEIGHTS)}


@dataclass(frozen=True)
class Run:
    """A finished run: its figures by the names that `--json` writes, and its losses."""

    figures: dict[str, float | int]
    history: History
    was_finished: bool = False


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """A report that shows nothing."""


def adapt(
    model: Model,
    corpus: Corpus,
    lora_config: LoRAConfig | None = None,
    settings: TrainConfig | None = None,
    *,
    device: str = "cpu",
    report: Report = silent,
    ranks: Ranks | None = None,
) -> tuple[Model, Trained]:
    """A model adapted to a corpus: with a trained adapter, or a trained base (method `full`).

    The given model stays as it is. Raises MiniloraError as `lora_init` and `train` do.
    """
    settings = settings or TrainConfig()
    fresh = _fresh(model, lora_config or LoRAConfig(), settings)
    trained = train(fresh, corpus, settings=settings, device=device, report=report, ranks=ranks)
    return _with_trained(fresh, settings, trained.params), trained


def adapt_in_folder(
    model: Model,
    corpus: Corpus,
    lora_config: LoRAConfig,
    settings: TrainConfig,
    folder: str | Path,
    *,
    dtype: Any = np.float32,
    resume: bool = False,
    device: str = "cpu",
    report: Report = silent,
    ranks: Ranks | None = None,
) -> Run:
    """`adapt`, its result saved in a folder: an adapter in PEFT's layout, or a base (`full`).

    A base is saved as `dtype`, an adapter in its own. With `resume`, an unfinished run in the
    folder goes on and ends in the same files, bit for bit; where there is none, a new one starts.
    Of several `ranks` only the first needs the folder. Raises MiniloraError when it holds anything
    else.
    """
    folder, ranks = Path(folder), ranks or Ranks()
    finished = ranks.of_first(lambda: claim_folder(folder, resume=resume))
    fresh = _fresh(model, lora_config, settings)
    fingerprint = run_fingerprint(fresh, settings, corpus, device, ranks)
    if finished is not None:
        return ranks.of_first(lambda: _finished_run(folder, finished, fingerprint))
    trained = train(
        fresh, corpus, settings=settings, folder=folder, fingerprint=fingerprint, resume=resume,
        device=device, report=report, ranks=ranks,
    )  # fmt: skip

    def save() -> Run:
        adapted = _with_trained(fresh, settings, trained.params)
        if adapted.lora is not None:
            save_adapter(folder, adapted.lora, lora_config, model.config, base_name=model.base_name)
        else:
            save_base(folder, adapted.base, model.config, dtype=dtype, like=model.folder)
        weights = folder / RESULT[settings.method][-1]
        figures = _figures(model.base, trained, weights.stat().st_size, ranks)
        record = {
            "settings": fingerprint,
            "figures": figures,
            "history": dataclasses.asdict(trained.history),
        }
        write_json(folder / RECORD, record)
        (folder / CHECKPOINT).unlink(missing_ok=True)
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


def pretrain_in_folder(
    config: GPTConfig, corpus: Corpus, settings: TrainConfig, folder: str | Path, **options: Any
) -> Run:
    """A byte-level base trained from `gpt_init` on: full training, saved as `adapt_in_folder` does.

    The options are those of `adapt_in_folder`.
    """
    base = gpt_init(config, seed=settings.seed)
    fresh = Model(base, config, tokenizer=ByteTokenizer(), folder=Path(folder))
    settings = dataclasses.replace(settings, method="full")
    return adapt_in_folder(fresh, corpus, LoRAConfig(), settings, folder, **options)


def _fresh(model: Model, lora_config: LoRAConfig, settings: TrainConfig) -> Model:
    """The model with fresh adapters, or with none for full training."""
    if settings.method == "lora":
        lora = lora_init(model.base, lora_config, seed=settings.seed)
        return model.with_adapter(lora, lora_config)
    return dataclasses.replace(model, lora=None, lora_config=None)


def _with_trained(model: Model, settings: TrainConfig, params: Tree) -> Model:
    trained = {"lora" if settings.method == "lora" else "base": params}
    return dataclasses.replace(model, **trained)


def _finished_run(folder: Path, record: dict[str, Any], fingerprint: Mapping[str, Any]) -> Run:
    check_same_run(folder / RECORD, record["settings"], fingerprint)
    for name in RESULT[fingerprint["method"]]:
        if not (folder / name).is_file():
            raise MiniloraError(
                f"{folder} holds the record of a finished run but not its {name}; "
                "empty the folder to train again"
            )
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return Run(record["figures"], History(**record["history"]), was_finished=True)


def claim_folder(folder: Path, *, resume: bool) -> dict[str, Any] | None:
    """See that a folder is free to write to; the record of the run that ended there, if resumed.

    Raises MiniloraError when it holds anything but, with `resume`, a run's files.
    """
    if folder.exists() and not folder.is_dir():
        raise MiniloraError(f"{folder} is a file; expected a folder to write to")
    entries = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    entries = [name for name in entries if name != CHECKPOINT + ".tmp"]  # of a run just begun
    run_is_here = CHECKPOINT in entries or RECORD in entries
    if resume and RECORD in entries:
        record = read_json(folder / RECORD)
        if not all(type(record.get(part)) is dict for part in ("settings", "figures", "history")):
            raise MiniloraError(f"{folder / RECORD} is not the record of a training run")
        return record
    if run_is_here and not resume:
        raise MiniloraError(
            f"{folder} holds another training run; continue it with --resume "
            "or choose another output folder"
        )
    if entries and not run_is_here:
        raise MiniloraError(
            f"{folder} already holds {entries[0]}; expected a new or an empty output folder"
        )
    return None
