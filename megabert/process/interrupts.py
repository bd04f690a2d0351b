"""End a command quietly at Ctrl-C while it still imports its modules."""

import signal


def end_at_ctrl_c() -> None:
    """Let Ctrl-C end this process at once and without a traceback, until cli.run() handles it.

    A command calls this before the imports that take seconds, because Python's own handler would print a traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
