"""The one exception for mistakes of the user's, as opposed to the program's."""


class MiniloraError(ValueError):
    """A bad option, file or value; its message is one sentence saying what was expected.

    The command line prints the message and exits with 2, without a traceback.
    """
