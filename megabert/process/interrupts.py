"""End a command quietly while it still imports its modules: at Ctrl-C, or if packages are not installed."""

import os
import signal
import sys
from types import TracebackType

from megabert.process.exit_codes import EXIT_USER_ERROR

OWN_PACKAGES = ("megabert", "data_prep")


def end_at_ctrl_c() -> None:
    """Let Ctrl-C end this process at once and without a traceback, until cli.run() handles it.

    A command calls this before the imports that take seconds, because Python's own handler would print a traceback. A
    package that those imports do not find is reported in one line too.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = _report_missing_package


def missing_package(error: ModuleNotFoundError) -> str:
    """Say that this Python lacks a package and how to get it; "" for a module of MegaBERT's own, which is a fault."""
    package = (error.name or "").split(".")[0]
    if not package or package in OWN_PACKAGES:
        return ""
    return (
        f"{sys.executable} has no package {package}. In a checkout of MegaBERT run bash launch/install.sh, then source "
        ".venv/bin/activate; otherwise install MegaBERT's wheel with its dependencies."
    )


def _report_missing_package(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    message = missing_package(error) if isinstance(error, ModuleNotFoundError) else ""
    if message:
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
        # Python itself would exit with 1, the code of a crash, which is worth another attempt.
        os._exit(EXIT_USER_ERROR)
    else:
        sys.__excepthook__(kind, error, where)
