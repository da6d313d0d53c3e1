"""The chat template of a base, rendered as transformers renders it, and kept within limits.

A template is a program out of somebody's file. It runs in jinja2's immutable sandbox, which knows
strings, lists and objects alone, and in a process of its own: within one process nothing could stop
a loop of 10^9 rounds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from minilora.errors import MiniloraError
from minilora.formats.files import is_there, read_json, read_text, shown
from minilora.records.lines import Message

TEMPLATE, SETTINGS, SPECIAL = (
    *("chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"),
)
SECONDS = 30.0  # for one rendering


class Template:
    """A template that renders chats, as long as it is open; `today` is what it may ask for.

    Raises MiniloraError where the base has no template or jinja2 is missing.
    """

    def __init__(self, folder: Path, today: date) -> None:
        try:
            import jinja2  # noqa: F401
        except ImportError as error:
            raise MiniloraError(
                "records with messages need jinja2: pip install 'jinja2>=3.1.6'"
            ) from error
        settings = settings_of(folder)
        self.source = folder
        text = template_of(folder, settings)
        self.asks_for_date = "strftime_now" in text
        self.start = {
            "template": text,
            "variables": special_tokens(settings),
            "today": today.isoformat(),
        }

    def __enter__(self) -> Template:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minilora.records.render"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        self.answers: SimpleQueue[str] = SimpleQueue()
        Thread(target=self._listen, daemon=True).start()
        self._ask(self.start)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")  # it ended

    def _ask(self, question: Any) -> str:
        """The text that the process answers with; MiniloraError for an error, or for no answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            answer = self.answers.get(timeout=SECONDS)
        except OSError:
            answer = ""
        except Empty:
            self.process.kill()
            answer = json.dumps({"error": f"it takes longer than {SECONDS:g} s"})
        found = json.loads(answer or '{"error": "it needs too much memory"}')
        if "error" in found:
            raise MiniloraError(f"the chat template in {self.source}: {shown(found['error'])}")
        return str(found["text"])

    def render(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        """The chat as text; with `generation`, as far as the assistant's next answer.

        Raises MiniloraError with the template's own words where it refuses the chat.
        """
        plain = [{"role": role, "content": content} for role, content in messages]
        return self._ask({"messages": plain, "generation": generation})

    @cached_property
    def closing(self) -> str:
        """The mark that ends an answer, such as <|im_end|>; empty where there is none."""
        try:
            shown = self.render([Message("user", "x"), Message("assistant", "\ufdd0")])
        except MiniloraError:
            return ""
        return shown.rpartition("\ufdd0")[2].strip()


def has_template(folder: Path) -> bool:
    """Whether a base's folder has a chat template."""
    try:
        return bool(template_of(folder, settings_of(folder)))
    except MiniloraError:
        return False


def settings_of(folder: Path) -> dict[str, Any]:
    """The fields of special_tokens_map.json and tokenizer_config.json, where these are."""
    settings: dict[str, Any] = {}
    for name in (SPECIAL, SETTINGS):
        settings |= read_json(folder / name) if is_there(folder / name) else {}
    return settings


def template_of(folder: Path, settings: dict[str, Any]) -> str:
    """The template in a base's folder: a file of its own, or a field of tokenizer_config.json.

    Of several by name it is the one named default.
    """
    if is_there(folder / TEMPLATE):
        return read_text(folder / TEMPLATE)
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise MiniloraError(
            f"the base in {folder} has no chat template, which records with messages need; "
            f"expected {TEMPLATE} there"
        )
    return found


def special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The tokens that a template may name, such as bos_token, by their names."""
    tokens = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def until_mark(pieces: Iterable[str], mark: str) -> Iterator[str]:
    """The pieces of a text up to a mark, even one split between pieces."""
    text = ""
    for piece in pieces:
        text += piece
        if mark and mark in text:
            yield text.partition(mark)[0]
            return
        kept = next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
        yield text[: len(text) - kept]
        text = text[len(text) - kept :]
    yield text
