"""Standard output and error in any state: closed, full, missing, or a terminal."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # not tab, line end, return
FAINT, NORMAL = "\x1b[2m", "\x1b[0m"
GONE = (errno.EPIPE, errno.EBADF, errno.EINVAL)  # Windows says EINVAL of a closed pipe


class Output:
    """A stream that never fails: after its first `error` all that is written to it is dropped.

    So a reader that goes away, or a full disk, does not stop the work half-way. A missing stream
    (None, if the descriptor is closed) counts as gone from the start. Control characters become
    visible escapes unless `raw`: a name or a text may hold commands to the terminal.
    """

    def __init__(self, stream: Any, *, raw: bool) -> None:
        self.stream, self.raw = stream, raw
        self.error: OSError | None = None
        if stream is None:
            self.error = OSError(errno.EBADF, os.strerror(errno.EBADF))
        elif hasattr(stream, "reconfigure"):  # a Windows console may not know every character
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Write, unless the stream has failed before."""
        shown = text if self.raw else escaped(text)
        self._attempt(lambda: self.stream.write(shown))
        return len(text)

    def write_faint(self, text: str) -> None:
        """Write; on a terminal in faint letters, unless NO_COLOR is set."""
        is_plain = (
            not self.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        )
        shown = text if self.raw else escaped(text)
        self._attempt(lambda: self.stream.write(shown if is_plain else f"{FAINT}{shown}{NORMAL}"))

    def flush(self) -> None:
        """Flush, unless the stream has failed before."""
        self._attempt(lambda: self.stream.flush())

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.stream is not None and self.stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @property
    def is_gone(self) -> bool:
        """Whether its reader has gone."""
        return self.error is not None and self.error.errno in GONE

    def _attempt(self, act: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            act()
        except (OSError, ValueError) as error:  # ValueError: the stream object was closed
            self.error = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))
            with suppress(OSError, ValueError):  # what is buffered would fail again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def escaped(text: str) -> str:
    """The text with control characters as escapes; tabs, line ends and returns stay."""
    return CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def one_line(message: object, most: int = 2000) -> str:
    """A message on one line; a very long one without its middle."""
    text = " ".join(str(message).splitlines())
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} … {text[-most // 2 :]}"


@contextmanager
def standard_streams() -> Iterator[Output]:
    """In the block sys.stdout (yielded) and sys.stderr are Outputs; a missing stdin is empty.

    If standard output is a file or a pipe, control characters are written as they are.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    out = Output(sys.stdout, raw=sys.stdout is not None and not sys.stdout.isatty())
    err = Output(sys.stderr, raw=False)
    sys.stdin = sys.stdin or io.TextIOWrapper(io.BytesIO())
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdin, sys.stdout, sys.stderr = before
