"""JSON Lines in, records out: every line checked, and a bad one named by its number.

A record is one of three forms: a prompt and its completion, a text, or the messages of a chat.
Nothing is repaired: what is not one of these is an error, since it would be learned as it stands.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from minilora.errors import MiniloraError
from minilora.texts import read_bytes

FORMS = {"prompt": ("prompt", "completion"), "text": ("text",), "messages": ("messages",)}
EXPECTED = '{"prompt": …, "completion": …}, {"text": …} or {"messages": […]}'


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """What one line says, and where it stands: "FILE, line N".

    A text is a completion without a prompt (None); a chat has messages in place of both.
    """

    place: str
    prompt: str | None = None
    completion: str = ""
    messages: tuple[Message, ...] = ()

    @property
    def form(self) -> str:
        """The name of its form: messages, text or prompt."""
        return "messages" if self.messages else "text" if self.prompt is None else "prompt"


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a file in JSON Lines, in its order; blank lines count but hold none.

    Lines end with a newline alone: other separators may stand in a text. Raises MiniloraError,
    naming the line, for one that is not JSON or is none of the forms, and for a file that is
    missing, not UTF-8, or without a record.
    """
    try:
        lines = read_bytes(Path(path)).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise MiniloraError(f"{path}, line {line} is not UTF-8 ({error.reason})") from error
    if lines[0].lstrip(" \t\r").startswith("["):
        raise MiniloraError(f"{path}, line 1 begins a list; expected a record a line, {EXPECTED}")
    records = [
        record_of(read_line(line, place), place)
        for place, line in ((f"{path}, line {i}", line) for i, line in enumerate(lines, 1))
        if line.strip(" \t\r")
    ]
    if not records:
        raise MiniloraError(f"{path} has no records; expected lines such as {EXPECTED}")
    return records


def records_of(objects: Iterable[Mapping[str, Any]]) -> list[Record]:
    """Records of a program's own objects, checked like lines of a file."""
    return [record_of(each, f"record {i}") for i, each in enumerate(objects, 1)]


def read_line(line: str, place: str) -> Any:
    """The value of a line of strict JSON: a key twice, NaN and Infinity are errors, too."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key in found if [k for k, _ in pairs].count(key) > 1)
            raise MiniloraError(f"{place} has the key {shortened(twice)} twice")
        return found

    def refuse(constant: str) -> NoReturn:
        raise MiniloraError(f"{place} is not JSON: {constant} is no number of JSON's")

    try:
        return json.loads(line, object_pairs_hook=once, parse_constant=refuse)
    except MiniloraError:  # of the functions above
        raise
    except RecursionError:
        raise MiniloraError(f"{place} is nested too deeply") from None
    except ValueError as error:  # also a number of thousands of digits
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "a number is too long"
        raise MiniloraError(f"{place} is not JSON ({reason}); expected {EXPECTED}") from None


def record_of(value: Any, place: str) -> Record:
    """The record that a line's value is; MiniloraError, naming the place, for anything else."""
    if not isinstance(value, Mapping):
        raise MiniloraError(f"{place} is {kind(value)}; expected an object, {EXPECTED}")
    forms = [form for form, keys in FORMS.items() if set(keys) & set(value)]
    if len(forms) > 1:
        raise MiniloraError(f"{place} has both {' and '.join(forms)}; expected one form of record")
    if not forms or not set(FORMS[forms[0]]) <= set(value):
        keys = ", ".join(shortened(str(key)) for key in value) or "none"
        raise MiniloraError(f"{place} has the keys {keys}; expected {EXPECTED}")
    if forms == ["messages"]:
        return Record(place, messages=messages_of(value["messages"], place))
    texts = [text_of(value[key], f"{place}: {key}") for key in FORMS[forms[0]]]
    if not texts[-1]:
        raise MiniloraError(f"{place}: {FORMS[forms[0]][-1]} is empty; expected the text to learn")
    return Record(place, None if forms == ["text"] else texts[0], texts[-1])


def messages_of(value: Any, place: str) -> tuple[Message, ...]:
    """The messages of a chat, of which the last is the assistant's."""
    if not isinstance(value, list) or not value:
        raise MiniloraError(f"{place}: messages is {kind(value)}; expected a list of messages")
    messages = []
    for i, message in enumerate(value, 1):
        where = f"{place}: message {i}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise MiniloraError(f"{where} is not an object with a role and content")
        if message.get("tool_calls"):
            raise MiniloraError(f"{where} has tool_calls, which are not supported")
        role = text_of(message["role"], f"{where}: role")
        messages.append(Message(role, content_of(message["content"], f"{where}: content")))
    if messages[-1].role != "assistant":
        role = shortened(messages[-1].role)
        raise MiniloraError(f"{place}: the last message is of the role {role}, not the assistant")
    for i, (role, content) in enumerate(messages, 1):
        if role == "assistant" and not content.strip():
            raise MiniloraError(f"{place}: message {i}, an answer, is empty")
    return tuple(messages)


def content_of(value: Any, where: str) -> str:
    """A message's text, or its list of parts of type text, joined."""
    if not isinstance(value, list):
        return text_of(value, where)
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text" or "text" not in part:
            raise MiniloraError(f"{where} has a part that is not text")
    return "".join(text_of(part["text"], where) for part in value)


def text_of(value: Any, where: str) -> str:
    """A string that is text: without NUL, and with no half of a surrogate pair."""
    if not isinstance(value, str):
        raise MiniloraError(f"{where} is {kind(value)}; expected a string")
    if "\0" in value:
        raise MiniloraError(f"{where} has a NUL character, which no text has")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise MiniloraError(f"{where} has half of a surrogate pair, which is no text") from None
    return value


def kind(value: Any) -> str:
    """What JSON calls a value, for a message."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if value == []:
        return "an empty list"
    names = {str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), "a value of another type")


def shortened(text: str) -> str:
    """A key or a role for a message: quoted, and not longer than a line."""
    return ascii(text if len(text) <= 40 else text[:40] + "…")
