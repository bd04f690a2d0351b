"""What one process reads at a time, and what a reader needs to know."""

import errno
from collections.abc import Iterator
from typing import IO, Literal, NamedTuple

INPUT_SPLIT_BYTES = (
    4 << 20
)  # a second's work for a process: short enough to share out, long enough to be worth a switch

# A document is held in memory whole, and its tokens at some 30 bytes each. A book is 1 MB; more is not one document.
MAX_DOCUMENT_BYTES = 64 << 20

Kind = Literal["docstrings", "hub", "jsonl", "parquet", "text_shards", "txt"]


class InputSplit(NamedTuple):
    """A part of a source. size: bytes of input, for progress.

    paths: files; for a data set of the hub its name, configuration, split and revision.
    start, stop: bytes of the one file; row groups of a .parquet; for the hub, shard `start` of `stop`.
    """

    kind: Kind
    paths: tuple[str, ...]
    start: int
    stop: int
    size: int


class ReadOptions(NamedTuple):
    """text_key: the field that holds the text; blank_lines: whether a blank line separates documents of a .txt.

    dataset_config, dataset_split: of a data set of the hub.
    """

    text_key: str = "text"
    blank_lines: bool = False
    dataset_config: str | None = None
    dataset_split: str = "train"


def byte_ranges(path: str, size: int, kind: Kind) -> list[InputSplit]:
    """Cut a file into units of equal size. What begins in a range belongs to it."""
    starts = range(0, size, INPUT_SPLIT_BYTES)
    return [
        InputSplit(kind, (path,), a, min(a + INPUT_SPLIT_BYTES, size), min(INPUT_SPLIT_BYTES, size - a)) for a in starts
    ]


def bounded_lines(file: IO[bytes], where: str) -> Iterator[bytes]:
    """Yield lines. Raises ValueError for one that is too long to be held in memory."""
    number = 0
    while line := file.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if len(line) > MAX_DOCUMENT_BYTES:
            raise ValueError(
                f"{where}: line {number} from there is longer than {MAX_DOCUMENT_BYTES >> 20} MB, the most of one "
                "document. Cut it into documents."
            )
        yield line


def missing_extra(what: str, package: str) -> ValueError:
    """The error of a source whose library is not installed."""
    return ValueError(f"{what}: reading it needs the package {package}. Install it: pip install -e '.[prep]'")


def no_field(where: str, text_key: str, found: list[str]) -> ValueError:
    return ValueError(
        f"{where}: has no field {text_key!r}, but {', '.join(sorted(found)) or 'none'}. "
        "Name the one that holds the text with --text-key."
    )


def not_text(where: str, text_key: str, got: object) -> ValueError:
    return ValueError(f"{where}: field {text_key!r} holds {got}, expected text. Name the right one with --text-key.")


def is_disk_full(error: OSError) -> bool:
    """Whether a write failed because there is no room for it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
