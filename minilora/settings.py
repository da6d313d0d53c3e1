"""What the classes of settings share: plain numbers, checked sizes, a hint for an unknown name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from minilora.errors import MiniloraError

LARGEST_SIZE = 2**24  # a product of two such sizes still counts bytes in 64 bits


class Settings:
    """The base of a dataclass of settings: NumPy's scalars become Python's numbers in its fields.

    An unknown argument raises TypeError, as it always does, and the message names the field that
    was meant: the one that another library calls so (`foreign`), or the one spelt most like it.
    """

    foreign: ClassVar[Mapping[str, str]] = {}

    def __new__(cls, *args: Any, **options: Any) -> Any:
        fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in options.keys() - set(fields):
            meant = cls.foreign.get(name) or closest(name, fields)
            hint = f"; did you mean {meant}?" if meant else f"; it has {', '.join(fields)}"
            raise TypeError(f"{cls.__name__} has no argument {name!r}{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Mapping):
                value = {key: plain(entry) for key, entry in value.items()}
            object.__setattr__(self, field.name, plain(value))


def check_sizes(config: Any, *names: str) -> None:
    """Raises MiniloraError for a field that is below 1 or above LARGEST_SIZE."""
    for name in names:
        if (size := getattr(config, name)) < 1:
            raise MiniloraError(f"{name} {size} is too small; it is at least 1")
        if size > LARGEST_SIZE:
            raise MiniloraError(f"{name} {size} is above {LARGEST_SIZE:,}")


def plain(value: Any) -> Any:
    """What has a shape of no axes, as NumPy's scalars, as a Python number; else as it stands."""
    return value.item() if getattr(value, "shape", None) == () else value


def closest(word: str, words: list[str]) -> str | None:
    """The one of the words that is spelt most like a mistyped one, if any is."""
    import difflib

    return next(iter(difflib.get_close_matches(word, words, n=1)), None)
