"""The one exception that stands for a mistake of the user's, not of the program's."""


class MiniloraError(ValueError):
    """A bad option, file or value; its message is one sentence saying what was expected.

    The command line prints the message and exits with 2, without a traceback.
    """
