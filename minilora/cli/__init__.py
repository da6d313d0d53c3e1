"""The command line: `minilora COMMAND`, or `python -m minilora COMMAND`."""

from minilora.cli.parser import main

__all__ = ["main"]
