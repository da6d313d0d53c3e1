"""The register of commands: its rows, what it checks, and README's table beside it."""

import re
from pathlib import Path

import pytest

from minilora.bench import budget
from minilora.cli.register import (
    ADAPTER,
    COMMANDS,
    DATA,
    SEED,
    Command,
    Figure,
    Option,
    figures_named,
    listed,
)
from minilora.errors import MiniloraError
from minilora.training import ranks

README = Path(__file__).parents[2] / "README.md"
ABRIDGED = "bench"  # the row of README that names the first of many figures


def rows_of_readme():
    """The cells of README's table of commands: command, what it does, figures."""
    text = README.read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| command \|.*\n\| --- .*\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]


ROWS = {command.name: command for command in COMMANDS}
OF_README = {cells[0].strip("`").split()[0]: cells for cells in rows_of_readme()}


def always(command):
    """The names of the figures that a command always writes."""
    return [figure.name for figure in command.figures if figure.always]


def takes_data(command):
    return any(option.flag == DATA.flag for option in command.every_option())


def test_no_name_is_given_twice():
    assert len(ROWS) == len(COMMANDS)
    for command in COMMANDS:
        names = [figure.name for figure in command.figures]
        assert len(set(names)) == len(names), command.name


def test_readme_has_the_rows_of_the_register():
    shown = [f"`{c.name} DATA…`" if takes_data(c) else f"`{c.name}`" for c in COMMANDS]
    assert [cells[0] for cells in rows_of_readme()] == shown


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_readme_names_the_figures_of_each_command(command):
    """In their order; the name of another command stands for the figures of that one."""
    cell, names = OF_README[command.name][2], []
    for name in re.findall(r"`(\w+)`", cell):
        names += always(ROWS[name]) if name in ROWS else [name]
    if command.name == ABRIDGED:
        assert cell.endswith(", …")
        assert names == [name for name in always(command) if name in names]
    else:
        assert "…" not in cell
        assert names == always(command)


# --- what a row checks and shows ---------------------------------------------------------------


ROW = Command(
    "row", print, "do it", (), (), (*figures_named("a", "b"), Figure("c", "with --c", False))
)


@pytest.mark.parametrize("names", ["ab", "abc", "cba"])
def test_the_figures_of_the_row_may_be_written(names):
    ROW.check(names)


@pytest.mark.parametrize(
    ("names", "wrong"), [("", "a, b"), ("a", "b"), ("ac", "b"), ("abd", "d"), ("bcd", "a, d")]
)
def test_other_figures_may_not(names, wrong):
    with pytest.raises(MiniloraError, match=f"^--json: expected .* for row; .* them: {wrong}$"):
        ROW.check(names)


def test_a_command_that_writes_other_figures_writes_no_file(cli, tmp_path, monkeypatch):
    """Nothing but a mistake in the code, or a record of another version, leads there."""
    found = budget.figures_of
    monkeypatch.setattr(budget, "figures_of", lambda step: {**found(step), "surplus": 1})
    result = cli("budget", "--json", "x.json")
    assert result.status == 2
    assert len(result.lines) == 1
    assert re.search("--json: expected .* for budget; .* them: surplus$", result.lines[0])
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_several_processes_may_run_the_commands_of_which_the_row_says_so(cli, monkeypatch, command):
    monkeypatch.setattr(ranks, "launched", lambda: (0, 2))
    monkeypatch.setattr(ranks, "as_one", lambda command: command())
    words = ["missing.txt"] if DATA in command.options else []
    words += ["missing.gguf", "out"] if command.name == "convert" else []
    words += ["--adapter", "missing"] if ADAPTER.but(required=True) in command.options else []
    result = cli(command.name, *words)
    assert result.status == 2
    parallel = " and ".join(command.name for command in COMMANDS if command.parallel)
    assert (f"only {parallel} share their work" in result.err) == (not command.parallel)


def test_neighbours_share_a_note():
    row = (*figures_named("a", "b", note="bytes"), Figure("c"), Figure("d", "bytes"))
    assert listed(row) == "a, b (bytes), c, d (bytes)"


def test_a_changed_option_leaves_the_shared_one_as_it_is():
    changed = SEED.but(help="another", default=3)
    assert changed == Option("--seed", SEED.keywords | {"help": "another", "default": 3})
    assert (SEED.keywords["help"], SEED.keywords["default"]) == ("seed of everything random", 0)
