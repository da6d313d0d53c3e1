"""Bases from the Hugging Face hub, by its own client and into its own cache."""

from __future__ import annotations

import re
from pathlib import Path

from minilora.errors import MiniloraError
from minilora.formats.base import CONFIG, INDEX
from minilora.formats.companions import COMPANIONS, TEMPLATES
from minilora.formats.files import is_there, shown

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
FILES = (
    *(CONFIG, "model*.safetensors", INDEX),
    *COMPANIONS,
    f"{TEMPLATES}/*.jinja",
)
TIMEOUT = 5.0  # seconds


def is_hub_id(base: str | Path) -> bool:
    """Whether a base is named as the hub names models, `owner/model`, and is no path here.

    Where there is a folder `owner`, it is that folder's entry `model`, mistyped or not.
    """
    return (
        isinstance(base, str)
        and HUB_ID.fullmatch(base) is not None
        and not is_there(Path(base).parent)
    )


def check_folder(base: str | Path) -> Path:
    """The folder of a base; MiniloraError, which tells of the hub's names, where it is none."""
    folder = Path(base)
    if not folder.is_dir():
        raise MiniloraError(
            f"{shown(str(folder / CONFIG))} does not exist; expected a base's folder, or the name "
            "of a model on the hub with its owner, such as openai-community/gpt2"
        )
    return folder


def fetch_base(name: str) -> Path:
    """The folder that holds the hub's model of that name, downloaded unless the cache has it.

    Without a connection, the cache alone must have it. Only the files that minilora reads are
    fetched. Raises MiniloraError when huggingface_hub is not installed, or cannot fetch the model.
    """
    wanted = f"{name} is no folder here, and as the name of a model on the hub it"
    try:
        import huggingface_hub
    except ImportError:
        raise MiniloraError(f"{wanted} needs huggingface_hub: pip install it") from None
    problem = None
    try:  # snapshot_download has no time limit of its own
        huggingface_hub.HfApi().model_info(name, timeout=TIMEOUT)
    except Exception as error:  # its errors, and those of the HTTP client that it happens to use
        problem = error
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=list(FILES), local_files_only=problem is not None
            )
        )
    except Exception as error:
        reason = " ".join(str(problem or error).split())
        raise MiniloraError(f"{wanted} cannot be fetched: {reason}") from error
