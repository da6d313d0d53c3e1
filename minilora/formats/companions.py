"""What a base's folder has beside its configuration and its weights, and what is carried along."""

from __future__ import annotations

from pathlib import Path

from minilora.formats.files import is_there, read_file

COMPANIONS = (
    *("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)


def companions(folder: Path) -> dict[str, bytes]:
    """The contents of those that a folder has, by name; MiniloraError for one that is no file."""
    return {name: read_file(folder / name) for name in COMPANIONS if is_there(folder / name)}
