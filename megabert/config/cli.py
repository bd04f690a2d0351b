"""Command lines from dataclasses: every field a flag with its type, unit and default; a mistake is one line, not a trace."""

import argparse
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)

T = TypeVar("T")


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description: its examples are lines to type."""


class Parser(ArgumentParser):
    """jsonargparse's parser, whose errors name the nearest known setting. --some-flag and --some_flag are the same."""

    def __init__(self, prog: str = "", description: str = "", **nested: Any):
        """nested: what jsonargparse passes when it makes one of these for the parts of a setting."""
        super().__init__(prog=prog, description=description, formatter_class=_HelpFormatter, **nested)

    def known_keys(self) -> list[str]:
        """Every dotted name that a flag may set."""
        return sorted(option.removeprefix("--") for option in self._option_string_actions if option.startswith("--"))

    def parse_args(self, args: list[str] | None = None, *rest: Any, **options: Any) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else args
        return super().parse_args([with_underscores(word) for word in words], *rest, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        if not self.exit_on_error:
            super().error(message, ex)
        sys.stderr.write(f"{self.prog}: {_explain(message, self.known_keys())}\n")
        sys.exit(2)


def read_flags(options: type[T], prog: str, description: str, argv: list[str] | None = None) -> T:
    """Parse a command line into a dataclass; its fields without a default are positional. Exits with 2 on mistakes."""
    parser = Parser(prog=prog, description=description)
    parser.add_class_arguments(options, as_group=False, as_positional=True)
    namespace = parser.parse_args(argv)
    try:
        return options(**vars(parser.instantiate(namespace)))
    except ValueError as mistake:
        parser.error(str(mistake))


def run(main: Callable[[], int | None], prog: str) -> NoReturn:
    """Run a command. A user's mistake (ValueError) or a file in the way (OSError) is one line on stderr and exit 1.

    Ctrl-C is one too, with the exit code that a shell gives it.
    """
    try:
        sys.exit(main() or 0)
    except (ValueError, OSError) as mistake:
        # A loader worker's error comes wrapped in its trace; its last line is the error itself.
        message = str(mistake)
        if "Original Traceback" in message:
            message = re.sub(r"^[\w.]*Error: ", "", message.strip().splitlines()[-1])
        sys.stderr.write(f"{prog}: {message}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        sys.exit(130)


def run_and_leave(main: Callable[[], int | None], prog: str) -> NoReturn:
    """As run(), but without Python's own end, which other threads can outlive; what is printed and logged is written."""
    try:
        run(main, prog)
    except SystemExit as end:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))


def nearest(name: str, known: list[str], prefix: str = "", otherwise: str = " See --help.") -> str:
    """Return a sentence to append that names the known name closest to `name`; `otherwise` if none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:  # perhaps only the group is missing or wrong: lr for optimizer.lr
        last = name.split(".")[-1]
        close = [key for key in known if key.split(".")[-1] == last]
        if not close and (ends := difflib.get_close_matches(last, [key.split(".")[-1] for key in known], n=1)):
            close = [key for key in known if key.split(".")[-1] == ends[0]]
    return f" Did you mean {prefix}{close[0]}?" if close else otherwise


def with_underscores(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _explain(message: str, known: list[str]) -> str:
    """Turn the parser's message into one that names the nearest known setting."""
    if match := re.search(r"unrecognized arguments: --([\w.]+)", message, re.IGNORECASE):
        return f"unknown setting --{match[1]}.{nearest(match[1], known, '--')}"
    return " ".join(message.split())
