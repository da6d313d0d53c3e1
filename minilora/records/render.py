"""The process that renders chats: a line of JSON in, a line of JSON out.

The first line gives the template, its variables and the date; every other one messages. What a
template may use is what transformers gives it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import date
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 10_000_000  # characters of a rendered chat
SECONDS = 60  # of the processor for a chat
MEMORY = 2 << 30  # bytes, where the system can limit them


class Generation(Extension):
    """{% generation %} … {% endgeneration %} marks answers for transformers; here it is no mark."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 has it

    def parse(self, parser: Parser) -> nodes.Node:
        """Its body, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Macro) -> str:
        return str(caller())


def environment(today: date) -> ImmutableSandboxedEnvironment:
    """A sandbox with transformers' settings and functions, and a date that stays."""

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": today.strftime}
    return sandbox


def limit_memory() -> None:
    """Let the system end this process rather than give it all its memory."""
    with suppress(ImportError, ValueError, OSError):  # none on Windows; the limit may be lower
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def limit_time() -> None:
    """Let the system end this process after SECONDS more: its parent may be gone by then."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + SECONDS, most))


def answer(render: Any, question: Mapping[str, Any], variables: Mapping[str, str]) -> str:
    """The chat as text; ValueError where it is too long."""
    text: str = render(
        messages=question["messages"],
        add_generation_prompt=question["generation"],
        tools=None,
        documents=None,
        **variables,
    )
    if len(text) > LONGEST:
        raise ValueError(f"it makes a text of {len(text):,} characters")
    return text


def main() -> None:
    """Answer every line, until there are no more."""
    limit_memory()
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    start = json.loads(sys.stdin.readline())
    sandbox = environment(date.fromisoformat(start["today"]))
    template = told(sandbox.from_string, start["template"])
    print(json.dumps({name: str(value) for name, value in template.items()}), flush=True)
    for line in sys.stdin:
        limit_time()
        render = template["text"].render
        print(json.dumps(told(answer, render, json.loads(line), start["variables"])), flush=True)


def told(compute: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What is computed, as `text`; or, whatever a template does, a sentence, as `error`."""
    try:
        return {"text": compute(*arguments)}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except TemplateSyntaxError as error:
        return {"error": f"it is no template of jinja2: {error}"}
    except Exception as error:
        return {"error": str(error) or type(error).__name__}


if __name__ == "__main__":
    main()
