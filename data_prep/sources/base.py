"""Types, limits and error messages that all sources share."""

import errno
from collections.abc import Iterator
from typing import IO, Literal, NamedTuple

# About one second of work for a process: small enough to balance the load, large enough to outweigh the scheduling.
INPUT_SPLIT_BYTES = 4 << 20

# A document is held in memory whole, and its tokens take some 30 bytes each. A book is 1 MB; more is not one document.
MAX_DOCUMENT_BYTES = 64 << 20

Kind = Literal["docstrings", "hub", "jsonl", "parquet", "text_shards", "txt"]


class InputSplit(NamedTuple):
    """The part of a source that one process reads at a time.

    paths: files; for a hub data set its name, configuration, split and revision.
    start, stop: byte range of the only file; row groups of a .parquet file; for the hub, shard `start` of `stop`.
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
    dataset_config, dataset_split: configuration and split of a hub data set.
    """

    text_key: str = "text"
    blank_lines: bool = False
    dataset_config: str | None = None
    dataset_split: str = "train"


def byte_ranges(path: str, size: int, kind: Kind) -> list[InputSplit]:
    """Cut a file into input splits of equal size. A document belongs to the split in which it begins."""
    splits = []
    for start in range(0, size, INPUT_SPLIT_BYTES):
        stop = min(start + INPUT_SPLIT_BYTES, size)
        splits.append(InputSplit(kind, (path,), start, stop, stop - start))
    return splits


def bounded_lines(file: IO[bytes], where: str) -> Iterator[bytes]:
    """Yield lines. Raises ValueError for a line that is too long to be held in memory."""
    number = 0
    while line := file.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if len(line) > MAX_DOCUMENT_BYTES:
            raise ValueError(
                f"{where}: line {number} from there is longer than {MAX_DOCUMENT_BYTES >> 20} MB, the largest allowed "
                "document. Cut it into documents."
            )
        yield line


def missing_extra(source: str, package: str) -> ValueError:
    """Make the error for a source whose library is not installed."""
    return ValueError(f"{source}: reading it needs the package {package}. Install it: pip install -e '.[prep]'")


def no_field(where: str, text_key: str, found: list[str]) -> ValueError:
    return ValueError(
        f"{where}: has no field {text_key!r}, its fields are: {', '.join(sorted(found)) or 'none'}. "
        "Pass the name of the field that holds the text as --text-key."
    )


def not_text(where: str, text_key: str, got: object) -> ValueError:
    return ValueError(
        f"{where}: field {text_key!r} holds {got}, expected text. "
        "Pass the name of the field that holds the text as --text-key."
    )


def is_disk_full(error: OSError) -> bool:
    """Whether a write failed because the disk, the quota or the file size limit is exhausted."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
