"""Ctrl-C while the command line is still being loaded: it ends in a line, not in a traceback.

NumPy takes a tenth of a second to load, on a busy machine seconds, and is loaded before any code of
the command line runs. So this module is imported first, and imports only what Python has loaded
itself. In other programs than the command line it does nothing.
"""

import os
import signal
import sys


def is_command() -> bool:
    """Whether this process is `minilora` or `python -m minilora`, about to load the package."""
    words = getattr(sys, "argv", None) or [""]
    if words[0] == "-m":  # until the module is found
        return sys.orig_argv[-len(words)] in ("minilora", "-mminilora")
    return os.path.basename(words[0]) in ("minilora", "minilora.exe")


def stop(*_: object) -> None:
    """End the process as Ctrl-C does later, when there is something to end in order."""
    try:
        os.write(2, b"minilora: stopped\n")
    finally:
        os._exit(130)


def loaded() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, as it always does in Python."""
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop)
