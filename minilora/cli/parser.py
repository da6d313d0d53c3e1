"""The command line: `minilora COMMAND`, or `python -m minilora COMMAND`.

The parser is built from the commands in `register`; their functions are in `commands`.
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
from minilora.cli.register import COMMANDS, Command, Group, OneOf, Option, listed, natural, option
from minilora.cli.streams import Output, one_line, standard_streams
from minilora.errors import MiniloraError
from minilora.settings import closest
from minilora.training import ranks
from minilora.training.loop import Interrupted

UNREAD = 141  # the status of a program that a closed pipe ended: 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; under MPI, one status for all processes."""
    words = sys.argv[1:] if argv is None else list(argv)
    return ranks.as_one(lambda: answer(words))


def answer(words: list[str]) -> int:
    """Run one command and return its exit status.

    0: done. 1: a gradient check failed. 2: bad input, with one sentence saying what was expected.
    130: stopped by Ctrl-C. 141: the output was not read, and no file holds the result.
    """
    arguments = argparse.Namespace()
    with standard_streams() as out:
        try:
            start.loaded()
            arguments = parser().parse_args(asked_for(words))
            if not arguments.command.parallel:
                ranks.check_alone()
            check_outputs(arguments)
            with np.errstate(all="ignore"):  # an overflow that matters is reported in a sentence
                status: int = arguments.command.function(arguments)
            return status or status_of(out, arguments)
        except KeyboardInterrupt as interrupt:
            print(f"minilora: stopped{interrupt}{how_to_resume(interrupt, words)}", file=sys.stderr)
            return 130
        except MemoryError as error:
            message = f"not enough memory: {error}"
        except (MiniloraError, OSError) as error:
            message = as_typed(str(error), arguments)
        print(f"minilora: {one_line(message)}", file=sys.stderr)
        return 2


def status_of(out: Output, arguments: argparse.Namespace) -> int:
    """0, unless the result went only to standard output and was not read there."""
    out.flush()
    if out.error is None:
        return 0
    if not out.is_gone:
        raise MiniloraError(f"cannot write to standard output: {out.error.strerror}")
    return 0 if arguments.json is not None or "out" in arguments else UNREAD


def how_to_resume(interrupt: KeyboardInterrupt, words: list[str]) -> str:
    """The command that resumes a stopped run, if its state was saved."""
    if not isinstance(interrupt, Interrupted) or not interrupt.is_saved:
        return ""
    if ranks.launched()[1] > 1:
        return ". To resume, start as many processes again with --resume"
    more = [] if "--resume" in words else ["--resume"]
    return f". To resume: {command_line(words[0], *more, *words[1:])}"


# --- words in, words out -----------------------------------------------------------------------


def asked_for(words: list[str]) -> list[str]:
    """The words for the parser; no words, and `help`, ask for the help.

    Raises MiniloraError unless a command comes first, or an option that needs none.
    """
    if words[:1] in ([], ["help"]):
        return [*asked_for(words[1:])[:1], "--help"] if words[1:] else ["--help"]
    names = [command.name for command in COMMANDS]
    if words[0].startswith("-") and words[0] not in ("-h", "--help", "--version"):
        parser().error(f"{words[0]}: expected a command first, such as demo")
    if words[0] not in names and not words[0].startswith("-"):
        parser().error(f"there is no command {words[0]!r}{did_you_mean(words[0], names)}")
    return words


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A question that suggests the most similar word, if there is one."""
    bare = {name.lstrip("-"): name for name in words}
    meant = closest(word.lstrip("-"), list(bare))
    return f"; did you mean {bare[meant]}?" if meant else ""


def as_typed(message: str, arguments: argparse.Namespace) -> str:
    """A message about an argument or a folder, with the option that was typed.

    An error is raised where it is found, and its message begins with what is wrong: the name of an
    argument, as in `max_tokens -3 is negative`, or a path, as in `x/config.json does not exist`.
    """
    command: Command | None = getattr(arguments, "command", None)
    for one in command.every_option() if command else ():
        if one.dest in FOLDERS and one.flag.startswith("-"):
            given = getattr(arguments, one.dest)
            for folder in given if isinstance(given, list) else [given]:
                if folder is not None and re.match(message_about(folder, one.dest), message):
                    return f"{one.flag}: {message}"
        elif one.flag.startswith("-"):
            is_word = "_" not in one.dest  # of English, too, unless the message begins with it
            message = re.sub(rf"{'^' if is_word else ''}\b{one.dest}\b", one.flag, message)
    return message


# The arguments that are folders or lists of them, and how a message about one goes on.
FOLDERS = {
    "base": r"[/\\]| (is|has)\b",
    "adapter": r"[/\\]| (is|holds adapters)\b",
    "out": r"[/\\]| (is a file|already|holds)\b",
}


def message_about(folder: str | Path, dest: str) -> str:
    """A regular expression for messages about a folder, or a file in it, as typed or as a Path."""
    names = "|".join({re.escape(str(folder)), re.escape(str(Path(folder)))})
    in_here = r"|[\w.]+\.(json|safetensors)\b" if str(Path(folder)) == "." else ""
    return rf"({names})({FOLDERS[dest]}){in_here}"


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
    """The line that shows a command's required words; the options are listed below it."""
    words = [f"minilora {command.name}"]
    for one in command.every_option():
        metavar = one.keywords.get("metavar")
        if one.keywords.get("required"):
            words.append(f"{one.flag} {metavar}")
        elif not one.flag.startswith("-"):
            many = {"+": f"{metavar} [{metavar} ...]", "?": f"[{metavar}]"}
            words.append(many.get(str(one.keywords.get("nargs")), str(metavar)))
    return " ".join([*words, "[OPTION ...]"])


def json_option(command: Command) -> Option:
    """The option --json, of every command that has figures; its help names them."""
    text = f"write the figures to this file: {listed(command.figures)}"
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
    """A parser that reports what is wrong with the options as a MiniloraError, in one sentence."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, except that a command reports unknown words itself, with its own help."""
        found, unknown = super().parse_known_args(self.joined(list(args or ())), namespace)
        if unknown:
            options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            if options:
                hint = did_you_mean(options[0], self._option_string_actions)
                self.error(f"there is no option {options[0]}{hint}")
            self.error(f"unexpected argument {unknown[0]!r}")
        return found, []

    def joined(self, words: list[str]) -> list[str]:
        """The words, an option and a value that begins with a dash, such as -1e-1, joined by "=".

        argparse would take such a value for an option; a value that is an option is not joined.
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
        """Raise MiniloraError with a message of argparse's in our words."""
        for theirs, ours in WORDING.items():
            message = re.sub(theirs, ours, message)
        see = " See" if message.endswith("?") else "; see"
        raise MiniloraError(f"{message}{see} {self.prog} --help")


# What argparse says, as a regular expression, and how we say it.
WORDING = {
    r"^argument (\S+): ": r"\1: ",
    r"invalid int value: (.*)": r"expected a whole number, not \1",
    r"invalid float value: (.*)": r"expected a number, not \1",
    r"invalid choice: (.*?) \(choose from (.*)\)": r"expected one of \2, not \1",
    r"expected (?:at least )?one argument": "expected a value",
    r"not allowed with argument (\S+)": r"cannot be combined with \1",
    r"the following arguments are required: (.*)": r"expected \1",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds the default to each option's help, if it has one; N and X stand for numbers."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        absent = action.default is None or action.default is False or action.default == []
        return action.help if absent else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        letters: dict[Any, str] = {int: "N", natural: "N", float: "X", Path: "DIR"}
        return letters.get(action.type) or super()._get_default_metavar_for_optional(action)
