"""What the classes of settings share: plain numbers, checked sizes, a hint for an unknown name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from minilora.errors import MiniloraError

LARGEST_SIZE = 2**24  # a product of two such sizes still counts bytes in 64 bits
LARGEST_COUNT = 2**31 - 1  # of steps, sequences and tokens
DERIVED: Any = None
"""The default of a field whose value then follows from other fields: `__post_init__` sets it."""


class Settings:
    """The base of a dataclass of settings: its fields hold Python's numbers, never NumPy's scalars.

    An unknown argument raises TypeError as in any dataclass; the message suggests a field: the one
    that goes by this name in another library (`foreign`), or the one with the closest spelling.
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


def check_sizes(config: object, *names: str, largest: int = LARGEST_SIZE) -> None:
    """Raise MiniloraError for a field that is below 1 or above `largest`."""
    for name in names:
        if (size := getattr(config, name)) < 1:
            raise MiniloraError(f"{name} {size} is too small; the minimum is 1")
        if size > largest:
            raise MiniloraError(f"{name} {size} is too large; the maximum is {largest:,}")


def plain(value: Any) -> Any:
    """Of an array without axes, such as NumPy's scalars, the Python number; else the value."""
    return value.item() if getattr(value, "shape", None) == () else value


def closest(word: str, words: list[str]) -> str | None:
    """The word whose spelling is closest to that of a mistyped one; None if none is close."""
    import difflib

    return next(iter(difflib.get_close_matches(word, words, n=1)), None)
