"""What a base's folder has beside its configuration and its weights, and what is carried along."""

from __future__ import annotations

import os
from pathlib import Path

from minilora.errors import MiniloraError
from minilora.formats.files import is_there, read_file

COMPANIONS = (
    *("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)
TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja


def companions(folder: Path) -> dict[str, bytes]:
    """The contents of those that a folder has, by name; MiniloraError for one that is no file."""
    try:
        templates = os.listdir(folder / TEMPLATES) if (folder / TEMPLATES).is_dir() else []
    except OSError as error:
        raise MiniloraError(f"{folder / TEMPLATES} cannot be read: {error.strerror}") from error
    names = [f"{TEMPLATES}/{name}" for name in sorted(templates) if name.endswith(".jinja")]
    present = [name for name in COMPANIONS if is_there(folder / name)]
    return {name: read_file(folder / name) for name in [*present, *names]}
