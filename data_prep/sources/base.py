"""Define the types, limits and error messages that all sources share."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

from megabert.files.disk import FULL
from megabert.files.redact import redact

T = TypeVar("T")

# About one second of work for a process: small enough to balance the load, large enough to outweigh the scheduling.
INPUT_SPLIT_BYTES = 2 << 20

# A document is held in memory whole, and its tokens take some 30 bytes each. A book is 1 MB; more is not one document.
MAX_DOCUMENT_BYTES = 64 << 20

Kind = Literal[
    "arrow", "datatrove", "docstrings", "hub", "jsonl", "mds", "mds_tokens", "megatron", "parquet", "text_shards", "txt"
]
# Kinds whose documents are token ids already.
TOKEN_KINDS = ("datatrove", "mds_tokens", "megatron")

# What map(), filter() and the like of the package datasets leave beside the files of a data set: copies of its rows.
DATASETS_CACHE = re.compile(r"cache-[0-9a-f]{16}(_\d{5}_of_\d{5})?\.arrow")

# Examples of what is left out for one reason that manifest.json keeps.
KEPT_EXAMPLES = 3

# How texts in ISO-2022, whose bytes are all ASCII, announce Chinese, Japanese or Korean characters.
ISO_2022 = "\x1b$"

# Why something is left out of a source.
HIDDEN = "hidden files and folders"
OTHER_KIND = "files of another kind"
EMPTY_FILE = "empty files"
READ_ALREADY = "files and folders that are read under another name"
OTHER_SPLIT = "other splits"
NULL = "null texts"
DAMAGED = "damaged"
SHORT = "empty or short texts"
NO_TEXT = "docstrings with characters that no text contains"


class DamagedError(ValueError):
    """A file or a document that is not in its format. --on-bad-document skip leaves it out."""

    def __init__(self, message: str):
        # What libraries say of damage may have several lines.
        super().__init__(" ".join(line.strip() for line in message.splitlines() if line.strip()))


class InputSplit(NamedTuple):
    """The part of a source that one process reads at a time.

    paths: files; for a hub data set its name, configuration, split and revision.
    start, stop: byte range of the only file; row groups of a .parquet file; documents of a file of tokens; for the hub,
    shard `start` of `stop`.
    size: bytes of input, for the progress bar.
    """

    kind: Kind
    paths: tuple[str, ...]
    start: int
    stop: int
    size: int


class ReadOptions(NamedTuple):
    """Settings of the readers.

    text_key: field or column that holds the text; blank_lines: whether blank lines separate the documents of a .txt;
    dataset_config, dataset_split: configuration and split of a hub data set; encoding: of text files without a byte
    order mark, by default UTF-8; skip_damaged: whether damaged documents are left out instead of ending the command.
    """

    text_key: str = "text"
    blank_lines: bool = False
    dataset_config: str | None = None
    dataset_split: str = "train"
    encoding: str | None = None
    skip_damaged: bool = False


@dataclass
class LeftOut:
    """What is left out of a source: how much for each reason, and the first KEPT_EXAMPLES different examples.

    skip_damaged: whether damaged documents are among it; otherwise the first one raises its error.
    """

    skip_damaged: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        self._keep(reason, [example])

    def damaged(self, error: DamagedError) -> None:
        """Count what is damaged, or raise the error."""
        if not self.skip_damaged:
            raise DamagedError(f"{error} Or pass --on-bad-document skip, which leaves out what is damaged.") from error
        self.add(DAMAGED, str(error))

    def merge(self, counts: dict[str, int], examples: dict[str, list[str]]) -> None:
        for reason, count in counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self._keep(reason, examples[reason])

    def _keep(self, reason: str, examples: list[str]) -> None:
        kept = self.examples.setdefault(reason, [])
        for example in examples:
            if len(kept) < KEPT_EXAMPLES and example not in kept:
                kept.append(example)

    def __str__(self) -> str:
        """List reasons, counts and examples: "empty files: 1 (a.txt), null texts: 2 (such as b.jsonl at byte 0)"."""
        return ", ".join(
            f"{reason}: {count:,} ({'such as ' if count > 1 else ''}{redact(self.examples[reason][0])})"
            for reason, count in self.counts.items()
        )


def until_damaged(
    items: Iterator[T],
    errors: tuple[type[Exception], ...],
    explain: Callable[[Exception], DamagedError],
    left_out: LeftOut,
) -> Iterator[T]:
    """Yield the items until reading one raises one of the errors, which counts as damage. What follows is lost.

    explain: makes the error for the user.
    """
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except errors as error:
            left_out.damaged(explain(error))
            return
        yield item


def check_text(text: str, path: str) -> None:
    """Raise DamagedError for what a string can hold, but no text contains."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _no_text(text, path, error.start, "half of a surrogate pair") from error
    for sign, what in (("\0", "a NUL"), (ISO_2022, "an escape sequence of ISO-2022")):
        if sign in text:
            raise _no_text(text, path, text.index(sign), what)


def texts_only(documents: Iterable[str], path: str, left_out: LeftOut) -> Iterator[str]:
    """Yield the documents of a file without those that check_text refuses, which are damage."""
    for document in documents:
        try:
            check_text(document, path)
        except DamagedError as error:
            left_out.damaged(error)
        else:
            yield document


def _no_text(text: str, path: str, at: int, what: str) -> DamagedError:
    remedy = "Convert it to UTF-8, or remove it." if text.startswith(ISO_2022, at) else "Remove it."
    return DamagedError(
        f"{path}: a document has {what} as its character {at}, which no text contains: {text[at : at + 40]!r}. {remedy}"
    )


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is no part of a source: a program's own, or what macOS adds to an archive."""
    return name.startswith(".") or name == "__MACOSX" or bool(DATASETS_CACHE.fullmatch(name))


def text_of(row: object, text_key: str, where: str) -> str | None:
    """Return the text in a field of a row, None if it is null. "a.b" is field b of field a. Raises DamagedError."""
    if not isinstance(row, dict):
        raise DamagedError(
            f'{where}: is a {type(row).__name__}, {repr(row)[:40]}, expected one object such as {{"text": "..."}} per '
            "line."
        )
    value: object = row
    for name in [text_key] if text_key in row else text_key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise no_field(where, text_key, list(row))
        value = value[name]
        if value is None:
            return None
    if not isinstance(value, str):
        raise not_text(where, text_key, repr(value)[:40])
    return value


def missing_extra(source: str, package: str) -> ValueError:
    """Make the error for a source whose library is not installed."""
    return ValueError(f"{source}: reading it needs the package {package}. Install it: pip install 'megabert[prep]'")


def no_field(where: str, text_key: str, found: list[str]) -> DamagedError:
    if {"id", "attributes"} <= set(found) <= {"id", "attributes", "source"}:
        return DamagedError(
            f"{where}: holds attributes of Dolma and no text. Pass the folder documents beside them as --source."
        )
    return DamagedError(
        f"{where}: has no field {text_key!r}, its fields are: {', '.join(sorted(found)) or 'none'}. "
        "Pass the name of the field that holds the text as --text-key."
    )


def not_text(where: str, text_key: str, got: object) -> DamagedError:
    return DamagedError(
        f"{where}: field {text_key!r} holds {got}, expected text. "
        "Pass the name of the field that holds the text as --text-key."
    )


def too_long(where: str, remedy: str) -> DamagedError:
    """Make the error for a document that is too large to be held in memory."""
    return DamagedError(f"{where}: longer than {MAX_DOCUMENT_BYTES >> 20} MiB, the largest allowed document. {remedy}")


def is_disk_full(error: OSError) -> bool:
    """Return whether a write failed because the disk, the quota or the file size limit is exhausted."""
    return error.errno in FULL
