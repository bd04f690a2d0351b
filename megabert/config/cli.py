"""Make command-line parsers from dataclasses, where every field is a flag, and print every error on one line."""

import argparse
import contextlib
import difflib
import logging
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, MappingProxyType, UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from megabert.config.settings import check_limits, limits_of
from megabert.files.disk import FULL, explain, is_user_error
from megabert.files.redact import RedactedRecord, redact
from megabert.process.exit_codes import EXIT_DISK, EXIT_INTERRUPTED, EXIT_USER_ERROR
from megabert.process.interrupts import missing_package
from megabert.process.standard_streams import keep_streams_writable

set_parsing_settings(docstring_parse_attribute_docstrings=True)

T = TypeVar("T")

WORDS_OF_TYPES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a text"}

# Installed commands, named in messages instead of the scripts where there is no checkout; setup.py makes them.
INSTALLED = {
    "pretrain": "megabert-pretrain",
    "convert_to_hf": "megabert-export",
    "convert_from_hf": "megabert-import",
    "finetune_glue": "megabert-finetune",
    "write_shards": "megabert-shards",
    "train_tokenizer": "megabert-tokenizer",
    "check_shards": "python -m data_prep.check_shards",
    "fetch_tasks": "python -m data_prep.fetch_tasks",
}
SCRIPT = re.compile(rf"(?<![\w./-])(?:python )?(?:launch/|data_prep/)?({'|'.join(INSTALLED)})\.py\b")
DS_CONFIG = re.compile(r"(?<![\w./-])(?:--ds_config )?ds_configs/(\w+)\.json\b")
# What only the repository has.
NOT_INSTALLED = re.compile(
    r"(?<![\w./-])(?:launch|data_prep|megabert|ds_configs)/(?:[\w-]+/)*[\w-]+\.(?:md|sh|sbatch)\b"
)
CHECKOUT = Path(__file__).resolve().parents[2]

# A message may quote a line of megabytes; its end has the remedy.
MAX_MESSAGE = 2000

OR_FILE = "or for a file of this name ."

# The only words that a switch takes as its value: any other word after it is a positional argument.
SWITCH_VALUES = {"true": "true", "yes": "true", "1": "true", "false": "false", "no": "false", "0": "false"}


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description, which holds commands to copy, and names commands that exist here."""

    def _get_help_string(self, action: argparse.Action) -> str:
        # This precedes the wrapping, which could break a command in two.
        return name_commands(super()._get_help_string(action) or "")

    def _split_lines(self, text: str, width: int) -> list[str]:
        # argparse breaks a line within megabert-export, too.
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(ArgumentParser):
    """jsonargparse's parser, stricter: no abbreviations, no empty values, no flag twice; errors name the nearest flag.

    A field of type bool is a switch: `--replace` means `--replace true`. `--some-flag` and `--some_flag` are the same.
    """

    def __init__(self, prog: str = "", description: str = "", **nested: Any):
        """nested: what jsonargparse passes when it makes a parser of this class for a part of a setting."""
        options: dict[str, Any] = {"allow_abbrev": False} | nested
        description = name_commands(description)
        super().__init__(prog=name_commands(prog), description=description, formatter_class=_HelpFormatter, **options)

    def add_class_arguments(self, theclass: type, *rest: Any, **options: Any) -> Any:  # type: ignore[override]
        added = super().add_class_arguments(theclass, *rest, **options)
        for key, limits in limits_of(theclass).items():
            for action in self._actions:
                if action.dest == key:
                    action.help = f"{action.help} (range {limits})"
        self._rename_keywords()
        self._let_lists_take_words()
        return added

    def _rename_keywords(self) -> None:
        """Call the flag of a field --for whose name, for_, ends in an underscore, because `for` is Python's."""
        for action in self._actions:
            if action.option_strings == [f"--{action.dest}"] and action.dest.endswith("_"):
                del self._option_string_actions[f"--{action.dest}"]
                action.option_strings = [f"--{action.dest[:-1]}"]
                action.metavar = action.dest[:-1].upper()
                self._option_string_actions[action.option_strings[0]] = action

    def _let_lists_take_words(self) -> None:
        """Let a positional field of type list[str] take one or more words, instead of one list in brackets."""
        for action in self._actions:
            if not action.option_strings and getattr(action, "_typehint", None) == list[str]:
                # With nargs, jsonargparse checks each word against the type.
                vars(action).update(nargs="+", metavar=action.dest, _typehint=str)

    def known_keys(self) -> list[str]:
        """List every dotted name that a flag sets."""
        return sorted(option.removeprefix("--") for option in self._option_string_actions if option.startswith("--"))

    def normalize(self, words: Sequence[str] | None = None) -> list[str]:
        """Rewrite a command line (by default the process's) as normalize_flags does; exit with 2 where it refuses."""
        try:
            return normalize_flags(sys.argv[1:] if words is None else words, self._switches())
        except ValueError as error:
            self.error(str(error))

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:  # type: ignore[override]
        words = self.normalize(args)
        namespace = super().parse_args(words, *rest, **options)
        for flag, value in flags_with_values(words):
            # jsonargparse takes what YAML reads as null, such as "~" and "# a", for no value; it may be the name of a
            # file.
            action = self._option_string_actions.get(flag)
            if value != "null" and action is not None and namespace.get(action.dest, "") is None:
                self.error(f"{flag} is {value!r}. Pass null for no value, {OR_FILE}/{value}.")
        return namespace

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        if not self.exit_on_error:
            super().error(message, ex)
        sys.stderr.write(f"{self.prog}: {redact(name_commands(_explain(message, self.known_keys())))}\n")
        sys.exit(EXIT_USER_ERROR)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Raise a ValueError for a user's error, instead of exiting, as long as the block runs."""
        self.exit_on_error = False
        try:
            yield
        except argparse.ArgumentError as error:
            raise ValueError(_explain(error.message, self.known_keys())) from error
        finally:
            self.exit_on_error = True

    def _switches(self) -> dict[str, set[str]]:
        """Return the flags of type bool, and what else each may be, after telling --help that a value is optional."""
        switches: dict[str, set[str]] = {}
        for action in self._actions:
            hint = getattr(action, "_typehint", None)
            if hint is bool or (get_origin(hint) in (Union, UnionType) and bool in get_args(hint)):
                action.nargs = "?"
                words = {word for kind in get_args(hint) for word in get_args(kind)}
                switches |= dict.fromkeys(action.option_strings, words)
        return switches


def normalize_flags(words: Sequence[str], switches: Mapping[str, Collection[str]] = MappingProxyType({})) -> list[str]:
    """Write flags with underscores and switches with a value: ["--x-y", "out"] -> ["--x_y=true", "out"].

    switches: each with the words that it takes besides true and false. Raises ValueError for an empty word, an empty
    value, and a flag that is given twice. A flag that appends to a list, such as --run.trackers+, may be repeated.
    """
    words = list(words)
    result: list[str] = []
    seen: set[str] = set()
    while words:
        flag, equals, value = split_flag(words.pop(0))
        if flag == "--":
            return [*result, flag, *words]
        is_next_empty = bool(flag and words and not equals and not words[0].strip())
        if is_next_empty or (not value.strip() and (equals or not flag)):
            raise ValueError(f"{flag or 'a word of the command'} is empty, expected a value.")
        if flag in seen:
            raise ValueError(f"{flag} is given twice.")
        if flag in switches:
            if not equals:
                is_value = words and (words[0].lower() in SWITCH_VALUES or words[0] in switches[flag])
                value = words.pop(0) if is_value else "true"
            equals, value = "=", SWITCH_VALUES.get(value.lower(), value)
        if flag and not flag.endswith("+"):
            seen.add(flag)
        result.append(flag + equals + value)
    return result


def flags_with_values(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pair each flag of a normalized command line with its value, which may be the next word."""
    for index, word in enumerate(words):
        flag, equals, value = split_flag(word)
        if flag:
            yield flag, value if equals else next(iter(words[index + 1 : index + 2]), "")


def split_flag(word: str) -> tuple[str, str, str]:
    """Split --some-flag=value into ("--some_flag", "=", "value"); the flag of a word without -- is ""."""
    if not word.startswith("--"):
        return "", "", word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_"), equals, value


def read_flags(options: type[T], prog: str, description: str, argv: Sequence[str] | None = None) -> T:
    """Parse a command line into a dataclass, whose fields without a default are positional; exit with 2 on an error.

    prog: how the command was started: a file, or an installed command. It replaces {command} in the description.
    """
    parser = Parser(prog, description.replace("{command}", f"python {prog}" if prog.endswith(".py") else prog))
    parser.add_class_arguments(options, as_group=False, as_positional=True)
    namespace = parser.parse_args(argv)
    try:
        settings = options(**vars(parser.instantiate(namespace)))
        check_limits(settings, "--")
        return settings
    except ValueError as error:
        parser.error(str(error))


@contextlib.contextmanager
def installed_names() -> Iterator[None]:
    """Let a ValueError of the block name commands as name_commands does: for callers from Python, without run()."""
    try:
        yield
    except ValueError as error:
        error.args = (name_commands(str(error)), *error.args[1:])
        raise


def name_commands(message: str) -> str:
    """Name the installed commands in place of scripts, unless this is a checkout, which has the scripts.

    A ds_config becomes its name, and a file that is not installed is named as the repository's.
    """
    if (CHECKOUT / "launch/pretrain.py").is_file():
        return message
    message = SCRIPT.sub(lambda match: INSTALLED[match[1]], message)
    return NOT_INSTALLED.sub(r"\g<0> of MegaBERT's repository", DS_CONFIG.sub(r"--ds_config \1", message))


class CommandRecord(RedactedRecord):
    """A redacted record of logging that names commands as name_commands does."""

    def getMessage(self) -> str:
        return name_commands(super().getMessage())


def as_line(message: str) -> str:
    """Write a message on one line: a line break, as in a name, as \\n, and "..." for the middle of a very long one."""
    message = message.replace("\r", "\\r").replace("\n", "\\n")
    half = MAX_MESSAGE // 2
    return message if len(message) <= MAX_MESSAGE else f"{message[:half]} ... {message[-half:]}"


def exit_code(error: BaseException) -> int:
    """Return the exit code of a training run that this error ends; launch/README.md lists all of them.

    An error that the user did not make has its code as the attribute `exit_code`; without one the code is 1.
    """
    if isinstance(error, OSError):
        code = EXIT_USER_ERROR if is_user_error(error) else EXIT_DISK if error.errno in FULL else 1
    else:
        code = EXIT_USER_ERROR if isinstance(error, ValueError) else 1
    return getattr(error, "exit_code", code)


def run(main: Callable[[], int | None], prog: str, code_of: Callable[[BaseException], int] = lambda _: 1) -> NoReturn:
    """Run a command and exit with its code.

    A ValueError, an OSError and a missing package become one line on stderr, with the exit code code_of(error). Ctrl-C
    is one line too, with exit code 130 as a shell gives it.
    """
    keep_streams_writable()
    logging.setLogRecordFactory(CommandRecord)
    prog = name_commands(prog)
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda _, frame: _interrupt(prog, frame))
    try:
        sys.exit(main() or 0)
    except (ValueError, OSError) as error:
        # A loader worker's error arrives wrapped in its traceback, whose last line is the error itself.
        message = explain(error) if isinstance(error, (OSError, UnicodeEncodeError)) else str(error)
        if "Original Traceback" in message:
            message = re.sub(r"^[\w.]*Error: ", "", message.strip().splitlines()[-1])
        sys.stderr.write(f"{prog}: {as_line(redact(name_commands(message)))}\n")
        sys.exit(code_of(error))
    except ModuleNotFoundError as error:
        if not (message := missing_package(error)):
            raise
        sys.stderr.write(f"{prog}: {message}\n")
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        sys.exit(EXIT_INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def _interrupt(prog: str, frame: FrameType | None) -> NoReturn:
    """Handle Ctrl-C. During an import it ends the process: libraries take a KeyboardInterrupt for a missing module."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"{prog}: interrupted\n".encode())
            os._exit(EXIT_INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def run_and_leave(main: Callable[[], int | None], prog: str) -> NoReturn:
    """Run a training command as run() does, with exit_code(error) for errors, and flush the output.

    It exits without Python's shutdown, which threads can block.
    """
    code = 1
    try:
        run(main, prog, exit_code)
    except SystemExit as end:
        code = int(end.code or 0)
    # Printed as Python does. Then this process must end, as after any other error.
    except BaseException as error:  # noqa: BLE001
        sys.excepthook(type(error), error, error.__traceback__)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def nearest(name: str, known: list[str], prefix: str = "", otherwise: str = " See --help.") -> str:
    """Return a sentence to append that names the known name closest to `name`; `otherwise` if none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:
        # Perhaps only the group is missing or wrong: lr for optimizer.lr.
        last = name.split(".")[-1]
        close = [key for key in known if key.split(".")[-1] == last]
        if not close and (ends := difflib.get_close_matches(last, [key.split(".")[-1] for key in known], n=1)):
            close = [key for key in known if key.split(".")[-1] == ends[0]]
    return f" Did you mean {prefix}{close[0]}?" if close else otherwise


def _explain(message: str, known: list[str]) -> str:
    """Shorten the parser's message to one line, and name the flag closest to an unknown one."""
    if match := re.search(r"unrecognized arguments: --([\w.]+)", message, re.IGNORECASE):
        return f"unknown setting --{match[1]}.{nearest(match[1], known, '--')}"
    if match := re.search(r"unrecognized arguments: (\S+)", message, re.IGNORECASE):
        return f"unexpected word {match[1]!r}: a value follows its --flag. See --help."
    message = " ".join(message.split())
    if match := re.fullmatch(r"argument --([\w.]+): expected one argument", message):
        flag = match[1].replace("_", "-")
        return f"--{flag} has no value. One that begins with a dash is written as --{flag}=-VALUE."
    if match := re.search(r'Parser key "([\w.]+)": (.*?)(?: Given value type:.*)? (?:Got|Given) value: (.*)', message):
        flag = match[1].rstrip("_").replace("_", "-")
        # A flag that takes several types has an error for each of them, with the value at the end.
        value = match[3].rpartition("Given value: ")[2]
        return f"--{flag} is {value}, expected {_expected_type(match[2])}. See --help."
    return message


def _expected_type(message: str) -> str:
    """Say in words what jsonargparse expected: "Expected a <class 'int'>." -> "an integer"."""
    if literal := re.search(r"Literal\[(.*?)\]", message):
        *names, last = literal[1].replace("'", "").split(", ")
        return f"{', '.join(names)} or {last}" if names else last
    kinds = [WORDS_OF_TYPES[name] for name in re.findall(r"<class '(\w+)'>", message) if name in WORDS_OF_TYPES]
    return " or ".join(dict.fromkeys(kinds)) or "another value"
