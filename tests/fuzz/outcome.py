"""Run a function on a hostile input, and classify what a user would see."""

import signal
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import NamedTuple

ACCEPTED, CLEAR, TRACEBACK, HANG, SILENT, UNNAMED = (
    "accepted",
    "one_clear_line",
    "traceback",
    "hang",
    "silent",
    "named_nothing",
)
# A case takes milliseconds.
HANG_S = 20
# What the commands print as one line: megabert/config/cli.py.
USER_ERRORS = (ValueError, OSError)


class Case(NamedTuple):
    """One hostile input.

    describe: for the report. run: reads it. is_right: whether a result of `run` is what the input says. names: an error
    must contain one of them.
    """

    describe: str
    run: Callable[[], object]
    is_right: Callable[[object], bool]
    names: tuple[str, ...]


class Tally:
    """Counts of the outcomes of one kind of input, and the first bad examples of each."""

    def __init__(self, kind: str):
        self.kind = kind
        self.counts: Counter[str] = Counter()
        self.bad: dict[str, list[str]] = {}

    def add(self, case: Case) -> None:
        """Run a case and count its outcome."""
        outcome, detail = classify(case)
        self.counts[outcome] += 1
        if outcome not in (ACCEPTED, CLEAR):
            self.bad.setdefault(outcome, []).append(f"{case.describe}: {detail}")

    @property
    def figures(self) -> dict[str, int]:
        """The counts by the names of the columns."""
        columns = (ACCEPTED, CLEAR, TRACEBACK, HANG, SILENT, UNNAMED)
        return {"tried": self.counts.total()} | {name: self.counts[name] for name in columns}


class _HangError(BaseException):
    """A case took longer than HANG_S."""


def classify(case: Case) -> tuple[str, str]:
    """Run a case; returns its outcome and the message or result."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_S)
    try:
        result = case.run()
    except USER_ERRORS as error:
        message = str(error)
        if "\n" in message.strip():
            return TRACEBACK, f"{type(error).__name__} of several lines: {message[:300]!r}"
        return (CLEAR if any(name in message for name in case.names) else UNNAMED), message
    except _HangError:
        return HANG, f"longer than {HANG_S} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return TRACEBACK, f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return (ACCEPTED if case.is_right(result) else SILENT), repr(result)[:300]
