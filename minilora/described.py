"""Values that describe themselves: as lines of text, and as a table in a notebook."""

from abc import ABC, abstractmethod
from html import escape


class Described(ABC):
    """A value that is shown as facts, by name; the first name is its class's.

    A dataclass that inherits from it is declared with `repr=False`.
    """

    @abstractmethod
    def _described(self) -> dict[str, str]:
        """What there is to know at a glance, by name."""

    def __repr__(self) -> str:
        return "\n".join(f"{name:<10} {fact}" for name, fact in self._described().items())

    def _repr_html_(self) -> str:
        """What a notebook shows: the lines of `repr` as a table."""
        rows = (
            f"<tr><th style='text-align: left'>{escape(name)}</th>"
            f"<td style='text-align: left'>{escape(fact)}</td></tr>"
            for name, fact in self._described().items()
        )
        return f"<table>{''.join(rows)}</table>"
