"""`minilora play`: a prompt line that keeps the model loaded.

If the base has a chat template, each line is a turn of the user's in a chat; otherwise it is a text
to be continued. A line that begins with a slash is a command.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import date
from typing import NamedTuple

import numpy as np

from minilora.errors import MiniloraError
from minilora.model import Model, complete
from minilora.records.chat import Template, has_template, until_mark
from minilora.records.lines import Message
from minilora.settings import closest

HELP = """\
/adapter DIR ...   use this adapter, or the sum of several; alone: the base
/compare           show the base's answer beside the adapted one; again: stop
/temp X            temperature of the draws; 0 always takes the likeliest token
/tokens N          how many tokens an answer may have
/seed N            seed of the draws
/new               start a new chat
/help              show these lines
/quit              leave, as Ctrl-D does; Ctrl-C stops an answer"""


class Draws(NamedTuple):
    """How tokens are drawn; the options of `generate`."""

    max_tokens: int = 300
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass
class Player:
    """A conversation with a model: `answer` takes a line and gives the pieces of what to show."""

    model: Model
    draws: Draws = field(default_factory=Draws)
    template: Template | None = None
    compares: bool = False
    chat: list[Message] = field(default_factory=list)

    @property
    def base(self) -> Model:
        """The model without its adapter."""
        return replace(self.model, lora=None, lora_config=None)

    def answer(self, line: str) -> Iterator[str]:
        """What to show for a line; MiniloraError for a mistake, which changes nothing."""
        if line.startswith("/"):
            yield self.obey(line)
            return
        if not line:
            return
        prompt, chat = self.prompt_of(line)
        if self.template and len(chat) <= len(self.chat):
            yield "(the oldest messages no longer fit the context and are left out)\n"
        models = {"": self.model}
        if self.compares and self.model.lora is not None:
            models = {"base:    ": self.base, "\nadapted: ": self.model}
        said = ""
        try:
            for name, model in models.items():
                yield name
                said = ""
                for piece in self.continued(model, prompt):
                    said += piece
                    yield piece
            yield "\n"
        finally:  # of an answer that is stopped, the chat keeps what was shown
            if self.template and said.strip():
                self.chat = [*chat, Message("assistant", said.strip())]

    # --- the prompt ----------------------------------------------------------------------------

    def prompt_of(self, line: str) -> tuple[np.ndarray, list[Message]]:
        """The tokens to continue and the chat they come from; without a template, the line's.

        The oldest exchanges of a chat are left out if they leave no room for an answer.
        """
        if self.template is None:
            return self.fitting(self.model.tokenizer.encode(line)), []
        chat = [*self.chat, Message("user", line)]
        while True:
            ids = self.model.tokenizer.encode(self.template.render(chat, generation=True))
            first = next(i for i, message in enumerate(chat) if message.role != "system")
            if len(ids) + self.draws.max_tokens <= self.context or len(chat) - first < 3:
                break
            del chat[first : first + 2]
        return self.fitting(ids), chat

    @property
    def context(self) -> int:
        """How many tokens the base reads at most."""
        return self.model.config.n_positions

    def fitting(self, ids: np.ndarray) -> np.ndarray:
        """The ids; MiniloraError if the context has no room for another token."""
        if len(ids) >= self.context:
            raise MiniloraError(
                f"this has {len(ids)} tokens, which leaves no room in a context of {self.context}"
            )
        return ids

    def continued(self, model: Model, prompt: np.ndarray) -> Iterator[str]:
        """The pieces of a model's continuation, up to the end of its answer."""
        pieces = model.tokenizer.stream(complete(model, prompt, **self.draws._asdict()))
        return until_mark(pieces, self.template.closing if self.template else "")

    # --- commands ------------------------------------------------------------------------------

    def obey(self, line: str) -> str:
        """Do what a command says; the text to show."""
        name, *words = line[1:].split() or [""]
        commands: dict[str, Callable[[list[str]], str]] = {
            "adapter": self.use_adapters,
            "compare": self.turn_comparing,
            "temp": lambda words: self.set("temperature", float, name, words),
            "tokens": lambda words: self.set("max_tokens", int, name, words),
            "seed": lambda words: self.set("seed", int, name, words),
            "new": self.forget,
            "help": lambda words: HELP,
        }
        if name not in commands:
            meant = closest(name, list(commands))
            hint = f"; did you mean /{meant}?" if meant else "; /help lists the commands"
            raise MiniloraError(f"there is no command /{name}{hint}")
        return commands[name](words) + "\n"

    def use_adapters(self, folders: list[str]) -> str:
        self.model = self.base.with_adapters_from(*folders) if folders else self.base
        return f"the adapter is {' + '.join(folders)}" if folders else "the base alone"

    def turn_comparing(self, words: list[str]) -> str:
        if self.model.lora is None:
            raise MiniloraError("there is no adapter to compare with the base; /adapter DIR loads")
        self.compares = not self.compares
        return "the base beside the adapter" if self.compares else "no longer the base"

    def set(self, option: str, kind: Callable[[str], float], command: str, words: list[str]) -> str:
        """Set one of the draws' options to the number after a command."""
        try:
            (value,) = map(kind, words)
        except ValueError:
            value = -1
        if not 0 <= value < math.inf:
            what = "whole number" if kind is int else "number"
            raise MiniloraError(f"/{command}: expected one {what} of at least 0")
        self.draws = Draws(**{**self.draws._asdict(), option: value})
        return f"{option.replace('_', ' ')} {value:g}"

    def forget(self, words: list[str]) -> str:
        self.chat = [message for message in self.chat if message.role == "system"]
        return "a new chat"


def ask() -> str:
    """A line that is typed, in a terminal or a notebook; EOFError after the last."""
    return input("> ")


def tell(text: str) -> None:
    """Show a piece of text at once."""
    print(text, end="", flush=True)


def play(
    model: Model,
    draws: Draws = Draws(),  # noqa: B008  # a tuple
    *,
    read: Callable[[], str] = ask,
    show: Callable[[str], None] = tell,
) -> None:
    """Read lines and show answers, until there are no more lines or one is /quit.

    `read` returns a line and raises EOFError after the last; a KeyboardInterrupt stops the answer,
    or drops the line. Mistakes are answered in a sentence.
    """
    with ExitStack() as stack:
        template = None
        if has_template(model.folder):
            template = stack.enter_context(Template(model.folder, date.today()))
        player = Player(model, draws, template)
        form = "a chat" if template else "texts to be continued"
        show(f"{model.base_name}: {form}; /help lists the commands, Ctrl-D leaves\n")
        while True:
            try:
                line = read().rstrip("\n")
                if line.split()[:1] == ["/quit"]:
                    return
                for piece in player.answer(line):
                    show(piece)
            except EOFError:
                return
            except KeyboardInterrupt:
                show("\n")
            except MiniloraError as error:
                show(f"{error}\n")
