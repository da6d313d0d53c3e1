"""The command line: `minilora COMMAND`, or `python -m minilora COMMAND`.

The parser is made from the commands in `table`; the functions that they run are in `commands`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from minilora.cli.commands import check_writable
from minilora.cli.table import COMMANDS, Command, Group, OneOf, Option, listed, natural, option
from minilora.errors import MiniloraError
from minilora.training import ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, as one where MPI runs several of us."""
    return ranks.as_one(lambda: answer(argv))


def answer(argv: Sequence[str] | None) -> int:
    """Run one command and return its exit status.

    0: done. 1: a gradient check failed. 2: bad input, with one sentence saying what was expected.
    130: stopped by Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console may not know every character
            stream.reconfigure(errors="replace")
    try:
        arguments = parser().parse_args(argv)
        command: Command = arguments.command
        if not command.parallel:
            ranks.check_alone()
        if arguments.json is not None:
            check_writable(arguments.json, "--json")
        with np.errstate(all="ignore"):  # what overflows is told in a sentence, where it matters
            status = command.run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as interrupt:
        print(f"minilora: stopped{interrupt}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError as error:
        print(f"minilora: not enough memory: {error}", file=sys.stderr)
        return 2
    except (MiniloraError, OSError) as error:
        print(f"minilora: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2


# --- the parser --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The parser of every command; the reference of the command line is made from it."""
    from minilora import __version__

    root = Parser(
        prog="minilora",
        description="Low-rank adaptation of a GPT in plain NumPy, every gradient written by hand.",
        epilog="minilora COMMAND --help explains a command; `minilora demo` is the place to start.",
    )
    root.add_argument("--version", action="version", version=f"minilora {__version__}")
    group = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = group.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            formatter_class=HelpFormatter,
        )
        sub.set_defaults(command=command)
        add_options(sub, [json_option(command), *command.options])
    return root


def json_option(command: Command) -> Option:
    """The option that every command has; its help names the figures that are written."""
    text = f"write the figures there: {listed(command.figures)}"
    return option("--json", text, type=Path, metavar="FILE")


def add_options(to: argparse._ActionsContainer, entries: Iterable[Option | Group | OneOf]) -> None:
    """Add the options of a command, or of a group of them, in their order."""
    for entry in entries:
        if isinstance(entry, Option):
            to.add_argument(entry.flag, **entry.keywords)
        elif isinstance(entry, Group):
            add_options(to.add_argument_group(entry.title), entry.options)
        else:
            add_options(to.add_mutually_exclusive_group(), entry.options)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the options in one sentence, as all errors are reported."""

    def error(self, message: str) -> NoReturn:
        raise MiniloraError(f"{message}; {self.prog} --help lists what is expected")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each option's help, if it has one; N and X stand for numbers."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        absent = action.default is None or action.default is False or action.default == []
        return action.help if absent else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        letters: dict[Any, str] = {int: "N", natural: "N", float: "X", Path: "DIR"}
        return letters.get(action.type) or super()._get_default_metavar_for_optional(action)
