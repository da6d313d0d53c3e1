"""What the repository's own files say of each other: versions, names, links, sessions."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import minilora

ROOT = Path(__file__).parents[2]


def text(path):
    return (ROOT / path).read_text(encoding="utf-8")


PROJECT = text("pyproject.toml")


def test_pre_commit_runs_the_ruff_of_the_extra():
    (hook,) = re.findall(r"ruff-pre-commit\n +rev: v(\S+)", text(".pre-commit-config.yaml"))
    assert f'"ruff=={hook}"' in PROJECT


def test_an_index_shows_no_link_or_picture_that_leads_nowhere():
    found = re.findall(r"""pattern = '(.*?)', replacement = ["'](.*?)["']""", PROJECT)
    assert len(found) == 2
    shown = text("README.md")
    for pattern, replacement in found:
        shown = re.sub(pattern.replace("\\\\", "\\"), replacement, shown)
    assert re.search(r"\]\(https://", shown), "the links that lead somewhere stay"
    assert re.findall(r"\]\((?!https?:)[^)]*\)|<img[^>]*>", shown) == []


def test_the_version_is_that_of_the_project_and_is_written_once():
    (version,) = re.findall(r'^version = "(.*)"', PROJECT, re.MULTILINE)
    assert minilora.__version__ in (version, "unknown")
    assert version not in text("minilora/__init__.py") + text("CITATION.cff")


def test_the_version_is_looked_up_when_it_is_asked_for_and_unknown_without_metadata(monkeypatch):
    code = "import sys, minilora; print('importlib.metadata' in sys.modules)"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n", "importing the package reads metadata"

    def nothing_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing_installed)
    assert minilora.__version__ == "unknown"
    with pytest.raises(AttributeError, match="'minilora' has no attribute 'versoin'"):
        _ = minilora.versoin


def test_the_changelog_has_the_form_that_it_names():
    changes = text("CHANGELOG.md")
    releases = re.findall(r"^## (.*)$", changes, re.MULTILINE)
    assert releases[0] == "[Unreleased]"
    for release in releases[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", release)
    kinds = set(re.findall(r"^### (.*)$", changes, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_names_the_holder_of_the_licence():
    (holder,) = re.findall(r"^Copyright \(c\) \d+ (.*)$", text("LICENSE"), re.MULTILINE)
    assert f"  - name: {holder}\n" in text("CITATION.cff")


@pytest.mark.parametrize(
    "path", ["CONTRIBUTING.md", ".ci/run", ".github/workflows/checks.yml", "noxfile.py"]
)
def test_a_session_that_is_named_exists(path):
    sessions = re.findall(r"^@nox\.session.*\ndef (\w+)", text("noxfile.py"), re.MULTILINE)
    named = {
        name
        for command in re.findall(r"\bnox\S* -s((?: [a-z]+)+)", text(path))
        for name in command.split()
    } | {name for row in re.findall(r"session: \[(.*)\]", text(path)) for name in row.split(", ")}
    assert named, f"{path} names no session"
    assert named <= set(sessions), f"{path} names {sorted(named - set(sessions))}"
