"""The directive `cli-reference`: every command and option, from the parsers themselves.

Usage, values and defaults are those of `--help`, from the parser's own formatter. autoprogram and
sphinx-argparse leave out defaults or values, and sphinx-argparse-cli formats the usage anew.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from minilora.cli.parser import parser


def commands(root: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by its name."""
    (sub,) = (a for a in root._actions if isinstance(a, argparse._SubParsersAction))
    return dict(sub.choices)


def described(name: str, command: argparse.ArgumentParser) -> Iterator[str]:
    """The Markdown of a command: heading, summary, usage, options by group."""
    formatter = command._get_formatter()
    yield from (f"## minilora {name}", "", command.description or "", "")
    yield from ("```text", command.format_usage().strip(), "```", "")
    yield from (f"```{{program}} minilora {name}", "```", "")
    for group in command._action_groups:
        actions = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
        if actions:
            yield from (f"**{(group.title or '').capitalize()}**", "")
        for action in actions:
            names = action.option_strings or [action.metavar or action.dest]
            value = formatter._format_args(
                action, formatter._get_default_metavar_for_optional(action)
            )
            shown = ", ".join(f"{name} {value}".strip() for name in names)
            yield from (f":::{{option}} {shown if action.option_strings else names[0]}", "")
            yield from (formatter._expand_help(action), ":::", "")


class CliReference(SphinxDirective):
    """The sections of all commands."""

    def run(self) -> list[nodes.Node]:
        os.environ["COLUMNS"] = "72"  # the width of the usage, the same on every terminal
        text = [line for item in commands(parser()).items() for line in described(*item)]
        return self.parse_text_to_nodes("\n".join(text), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("cli-reference", CliReference)
    return {"parallel_read_safe": True}
