"""The command line: `minilora COMMAND`, or `python -m minilora COMMAND`.

The parser is made from the commands in `table`; the functions that they run are in `commands`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from minilora import start
from minilora.cli.commands import check_outputs, command_line
from minilora.cli.streams import Output, one_line, standard_streams
from minilora.cli.table import COMMANDS, Command, Group, OneOf, Option, listed, natural, option
from minilora.errors import MiniloraError
from minilora.settings import closest
from minilora.training import ranks
from minilora.training.loop import Interrupted

UNREAD = 141  # as of a program that a closed pipe ended: 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, as one where MPI runs several of us."""
    words = sys.argv[1:] if argv is None else list(argv)
    return ranks.as_one(lambda: answer(words))


def answer(words: list[str]) -> int:
    """Run one command and return its exit status.

    0: done. 1: a gradient check failed. 2: bad input, with one sentence saying what was expected.
    130: stopped by Ctrl-C. 141: the output was not read, and no file holds what was asked for.
    """
    arguments = argparse.Namespace()
    with standard_streams() as out:
        try:
            start.loaded()
            arguments = parser().parse_args(asked_for(words))
            if not arguments.command.parallel:
                ranks.check_alone()
            check_outputs(arguments)
            with np.errstate(
                all="ignore"
            ):  # what overflows is told in a sentence, where it matters
                status: int = arguments.command.run(arguments)
            return status or status_of(out, arguments)
        except KeyboardInterrupt as interrupt:
            print(f"minilora: stopped{interrupt}{how_to_go_on(interrupt, words)}", file=sys.stderr)
            return 130
        except MemoryError as error:
            message = f"not enough memory: {error}"
        except (MiniloraError, OSError) as error:
            message = as_typed(str(error), arguments)
        print(f"minilora: {one_line(message)}", file=sys.stderr)
        return 2


def status_of(out: Output, arguments: argparse.Namespace) -> int:
    """0, unless what was asked for went to standard output alone and was not read there."""
    out.flush()
    if out.error is None:
        return 0
    if not out.is_gone:
        raise MiniloraError(f"cannot write to standard output: {out.error.strerror}")
    return 0 if arguments.json is not None or "out" in arguments else UNREAD


def how_to_go_on(interrupt: KeyboardInterrupt, words: list[str]) -> str:
    """The command that takes a stopped run up again, where its state was saved."""
    if not isinstance(interrupt, Interrupted) or not interrupt.is_saved:
        return ""
    if ranks.launched()[1] > 1:
        return ". To go on, start as many processes again with --resume"
    more = [] if "--resume" in words else ["--resume"]
    return f". To go on: {command_line(words[0], *more, *words[1:])}"


# --- words in, words out -----------------------------------------------------------------------


def asked_for(words: list[str]) -> list[str]:
    """The words for the parser; none at all and `help` ask for the help.

    Raises MiniloraError for a command that does not exist.
    """
    if words[:1] in ([], ["help"]):
        return [*asked_for(words[1:])[:1], "--help"] if words[1:] else ["--help"]
    names = [command.name for command in COMMANDS]
    if words[0] not in names and not words[0].startswith("-"):
        parser().error(f"there is no command {words[0]!r}{did_you_mean(words[0], names)}")
    return words


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The question whether a similar word was meant, if there is one."""
    bare = {name.lstrip("-"): name for name in words}
    meant = closest(word.lstrip("-"), list(bare))
    return f"; did you mean {bare[meant]}?" if meant else ""


def as_typed(message: str, arguments: argparse.Namespace) -> str:
    """A message about an argument or a folder, told of the option that gave it.

    An error is raised where it is found, and its message begins with what is wrong: the name of an
    argument, as in `max_tokens -3 is negative`, or a path, as in `x/config.json does not exist`.
    """
    command: Command | None = getattr(arguments, "command", None)
    for one in command.every_option() if command else ():
        if one.dest in FOLDERS:
            given = getattr(arguments, one.dest)
            for folder in given if isinstance(given, list) else [given]:
                if re.match(rf"{re.escape(str(folder))}({FOLDERS[one.dest]})", message):
                    return f"{one.flag}: {message}"
        elif one.flag.startswith("-"):
            is_word = "_" not in one.dest  # of English, too, unless the message begins with it
            message = re.sub(rf"{'^' if is_word else ''}\b{one.dest}\b", one.flag, message)
    return message


# The arguments that are folders or lists of them, and how a message goes on after one.
FOLDERS = {
    "base": r"[/\\]| (is not|has)\b",
    "adapter": r"[/\\]| (is not|holds adapters)\b",
    "out": r"[/\\]| (is a file|already|holds)\b",
}


# --- the parser --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The parser of every command; the reference of the command line is made from it."""
    from minilora import __version__

    root = Parser(
        prog="minilora",
        usage="minilora COMMAND [OPTION ...]",
        description="Low-rank adaptation of a GPT in plain NumPy, every gradient written by hand.",
        epilog="`minilora COMMAND --help` or `minilora help COMMAND` explains a command; "
        "`minilora demo` is the place to start.",
    )
    root.add_argument("--version", action="version", version=f"minilora {__version__}")
    group = root.add_subparsers(prog="minilora", title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = group.add_parser(
            command.name,
            usage=usage(command),
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog="\n  ".join(["examples:", *command.examples]),
            formatter_class=HelpFormatter,
        )
        sub.set_defaults(command=command, json=None)
        add_options(sub, [*command.options, *([json_option(command)] if command.figures else [])])
    return root


def usage(command: Command) -> str:
    """How the words of a command follow each other; its many options are listed below."""
    words = [f"minilora {command.name}"]
    for one in command.every_option():
        metavar = one.keywords.get("metavar")
        if one.keywords.get("required"):
            words.append(f"{one.flag} {metavar}")
        elif not one.flag.startswith("-"):
            words.append(
                {"+": f"{metavar} [{metavar} ...]", "?": f"[{metavar}]"}[one.keywords["nargs"]]
            )
    return " ".join([*words, "[OPTION ...]"])


def json_option(command: Command) -> Option:
    """The option of every command that has figures; its help names those that are written."""
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

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but a command refuses what it does not know itself, with its own help."""
        found, unknown = super().parse_known_args(self.joined(list(args or ())), namespace)
        if unknown:
            word = next((word for word in unknown if word.startswith("-")), "")
            hint = did_you_mean(word.partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, []

    def joined(self, words: list[str]) -> list[str]:
        """An option and a value that begins with a dash, such as -1e-1 or ---, as one word.

        Alone, argparse would take such a value for an option; one that is an option stays alone.
        """
        known, result = self._option_string_actions, list[str]()
        for word in words:
            before = result[-1] if result else ""
            wants_value = before in known and known[before].nargs is None
            is_option = word.partition("=")[0] in known or word == "--"
            if wants_value and word.startswith("-") and not is_option:
                result[-1] = f"{before}={word}"
            else:
                result.append(word)
        return result

    def error(self, message: str) -> NoReturn:
        and_so = " " if message.endswith("?") else "; "
        raise MiniloraError(f"{message}{and_so}{self.prog} --help lists what is expected")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds the default to each option's help, if it has one; N and X stand for numbers."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        absent = action.default is None or action.default is False or action.default == []
        return action.help if absent else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        letters: dict[Any, str] = {int: "N", natural: "N", float: "X", Path: "DIR"}
        return letters.get(action.type) or super()._get_default_metavar_for_optional(action)
