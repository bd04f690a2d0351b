"""Read the rows of labelled files: .tsv without quotes, .csv, .jsonl, these compressed as .gz, and .parquet.

pandas and datasets do not replace these readers: pandas renames duplicate columns and fills short rows without an
error, neither can name the line of a wrong label, and neither notices a missing part of a parquet set.
"""

import csv
import gzip
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megabert.config.settings import shortened
from megabert.files.json_file import parse_json
from megabert.finetune.tasks.label_names import read_label_names
from megabert.finetune.tasks.task import TableLayout, Task
from megabert.process.error_text import one_line

log = logging.getLogger(__name__)

FORMATS = ".tsv, .csv, .jsonl (each also .gz) or .parquet"
# QQP has a few broken rows among its 364 thousand. More than this share of a file, and more than this many, are an
# error.
MAX_BROKEN_SHARE, MAX_BROKEN_ROWS = 0.001, 3
# A line is held in memory whole. A model reads the first thousands of tokens of a text: longer lines are no single
# text.
MAX_LINE_BYTES = 16_000_000
# Rows of a parquet file that are decoded at once, and bytes of one of its row groups, which pyarrow holds in memory.
BATCH_ROWS, MAX_ROW_GROUP_BYTES = 256, 4_000_000_000
# What the first bytes of a file say, and what to do.
OTHER_CONTENTS = {
    b"\xff\xfe": "UTF-16, expected UTF-8. Convert it: iconv -f UTF-16 -t UTF-8.",
    b"\xfe\xff": "UTF-16, expected UTF-8. Convert it: iconv -f UTF-16 -t UTF-8.",
    b"\x1f\x8b": "compressed by gzip: its name must end with .gz.",
}


class Row(NamedTuple):
    """where: file and line, for error messages; texts, label: as the file has them."""

    where: str
    texts: tuple[object, ...]
    label: object


def read_rows(task: Task, path: Path, layout: TableLayout) -> Iterator[Row]:
    """Yield the rows of a file. Raises ValueError naming file and line of the first that is damaged."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    if path.suffix == ".parquet":
        return _read_parquet(task, path, layout)
    if kind == ".jsonl":
        return _read_jsonl(path, layout)
    if kind in (".tsv", ".csv"):
        return _read_delimited(path, layout, has_quotes=kind == ".csv")
    raise ValueError(f"{path}: expected a {FORMATS} file.")


def _read_delimited(path: Path, layout: TableLayout, has_quotes: bool) -> Iterator[Row]:
    """Read a .csv file with the usual quotes, or a .tsv file without; columns go by the names in the header line."""
    rows = _csv_rows(path) if has_quotes else ((number, line.split("\t")) for number, line in _lines(path))
    header = list(layout.columns) or next(rows, (1, []))[1]
    texts = [_column(path, header, name) for name in layout.texts]
    label = None if layout.label is None else _column(path, header, layout.label)
    total, broken = 0, 0
    for number, cells in rows:
        total += 1
        if len(cells) != len(header) and layout.has_broken_rows:
            broken += 1
            continue
        where = f"{path}, line {number}"
        _check_width(where, header, cells)
        yield Row(where, tuple(cells[column] for column in texts), None if label is None else cells[label])
    if broken > max(MAX_BROKEN_ROWS, MAX_BROKEN_SHARE * total):
        raise ValueError(
            f"{path}: {broken:,} of its {total:,} rows do not have {len(header)} columns; only a few may be broken."
        )
    if broken:
        log.info("%s: skipped %d rows that do not have %d columns", path, broken, len(header))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers from 1 and lines without their ends. Raises ValueError for a line that is not UTF-8 text."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                yield number, _decode(line, number, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, line {number + 1}: damaged gzip data: {error}. Copy the file again.") from error


def _decode(line: bytes, number: int, path: Path) -> str:
    """Decode a line of a text file. A UTF-8 byte order mark in the first line is removed."""
    where = f"{path}, line {number}"
    if number == 1 and (content := OTHER_CONTENTS.get(line[:2])):
        raise ValueError(f"{where}: is {content}")
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"{where}: has more than {MAX_LINE_BYTES:,} bytes, too many for one example.")
    if b"\0" in line:
        raise ValueError(
            f"{where}: has a NUL byte, expected UTF-8. For UTF-16, convert it: iconv -f UTF-16LE -t UTF-8."
        )
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}. Convert it, from Latin-1 with "
            "iconv -f LATIN1 -t UTF-8."
        ) from error
    if number == 1 and "\r" in text:
        raise ValueError(f"{where}: lines end with a carriage return alone. Convert them: tr '\\r' '\\n'.")
    return text


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each row's last line, and the row. Raises ValueError for rows that csv cannot read."""
    # This limit is the whole process's. Its default, 131,072 characters, is less than a text may have.
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader((line + "\n" for _, line in _lines(path)), strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; is a quote not closed?") from error


def _column(path: Path, header: list[str], name: str) -> int:
    """Return the index of a column. Raises ValueError unless the header has it once."""
    if header.count(name) != 1:
        problem = "has two columns" if name in header else "has no column"
        found = _brief(", ".join(header).strip()) or "nothing"
        raise ValueError(f"{path}, line 1: {problem} {name}, only {found}.")
    return header.index(name)


def _check_width(where: str, header: list[str], cells: list[str]) -> None:
    """Raise ValueError unless a row has the header's columns; more, empty ones at its end are accepted."""
    if len(cells) < len(header):
        raise ValueError(f"{where}: has {len(cells)} columns, expected {len(header)}: {header[len(cells)]} is missing.")
    if any(cells[len(header) :]):
        raise ValueError(f"{where}: has {len(cells)} columns, expected {len(header)}: a tab or comma too many.")


def _read_jsonl(path: Path, layout: TableLayout) -> Iterator[Row]:
    """Read a JSON object per line, with at least the columns of the layout; blank lines are skipped."""
    wanted = [*layout.texts, *([] if layout.label is None else [layout.label])]
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not valid JSON: {_brief(one_line(error))}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: is {shortened(row)}, expected an object with {', '.join(wanted)}.")
        for name in wanted:
            if name not in row:
                raise ValueError(f"{where}: has no column {name}, only {_brief(', '.join(row)) or 'nothing'}.")
        yield Row(where, tuple(row[name] for name in layout.texts), row[layout.label] if layout.label else None)


def _read_parquet(task: Task, path: Path, layout: TableLayout) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: needs pyarrow: pip install 'megabert[prep]'.") from error
    wanted = [*layout.texts, *([] if layout.label is None else [layout.label])]
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            _check_parquet(path, file, wanted)
            names = None
            if layout.label is not None and task.labels and pyarrow.types.is_integer(schema.field(layout.label).type):
                names = read_label_names(task, path, schema.metadata or {})
            number = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
                for row in batch.to_pylist():
                    label = None if layout.label is None else row[layout.label]
                    where = f"{path}, row {number}"
                    yield Row(where, tuple(row[name] for name in layout.texts), _name(label, names, where, layout))
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a parquet file that can be read: {one_line(error)}") from error


def _check_parquet(path: Path, file: Any, wanted: list[str]) -> None:
    """Raise ValueError unless a pyarrow.parquet.ParquetFile has each column once, in row groups that fit in memory."""
    columns = file.schema_arrow.names
    for name in wanted:
        if (count := columns.count(name)) != 1:
            raise ValueError(
                f"{path}: has {f'{count} columns' if count else 'no column'} {name}, only {_brief(', '.join(columns))}."
            )
    for number in range(file.metadata.num_row_groups):
        if (size := file.metadata.row_group(number).total_byte_size) > MAX_ROW_GROUP_BYTES:
            raise ValueError(
                f"{path}: its row group {number} has {size:,} bytes, more than {MAX_ROW_GROUP_BYTES:,}, which are held "
                "in memory. Write the file with smaller row groups."
            )


def _name(label: Any, names: list[str] | None, where: str, layout: TableLayout) -> object:
    """Return the name of a label that a parquet file holds as a number. names: None if the file has no such numbers."""
    if names is None:
        return label
    if label not in range(len(names)):
        raise ValueError(f"{where}, column {layout.label}: is {label}, expected 0 to {len(names) - 1}.")
    return names[label]


def _brief(text: str) -> str:
    """Cut a text of a message to 300 characters."""
    return text if len(text) <= 300 else f"{text[:297]}..."
