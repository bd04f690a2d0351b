"""Read .parquet files: one document per row, in one column.

Needs the package pyarrow, which the extra [prep] installs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from data_prep.sources.base import DamagedError, InputSplit, LeftOut, ReadOptions, missing_extra, until_damaged
from data_prep.sources.columns.arrow import check_column, column_of, damage, explain_damage, read_column
from data_prep.sources.remote import RemotePath, is_remote, open_file

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

# Rows have some kB each, so these take a few MB of memory.
ROWS_AT_ONCE = 1024
READ_BYTES = 1 << 20
# The type of a 32-bit number in Thrift's compact protocol.
INTEGER = 5
# A page is decompressed whole. Writers aim at 1 MB, but those that look at the size once in 1,024 rows exceed it.
MAX_PAGE_BYTES = 1 << 30
# A value can be as large as its page and occur in many rows, so rows are converted in batches of this size at most.
BATCH_BYTES = 64 << 20
# Bytes read for the header of a page. Statistics can make it longer, and then more are read.
HEADER_BYTES = 1 << 13


def list_input_splits(path: Path | RemotePath, options: ReadOptions) -> list[InputSplit]:
    """List one input split per row group. Raises DamagedError if the file has no such column of text."""
    file = _open(str(path))
    check_column(file.schema_arrow, str(path), options.text_key)
    splits = []
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group)
        # An empty table is written as one row group without pages.
        if not rows.num_rows:
            continue
        columns = (rows.column(i) for i in range(rows.num_columns))
        size = sum(
            c.total_compressed_size for c in columns if f"{c.path_in_schema}.".startswith(f"{options.text_key}.")
        )
        splits.append(InputSplit("parquet", (str(path),), group, group + 1, size))
    return splits


def read(split: InputSplit, options: ReadOptions, left_out: LeftOut) -> Iterator[str]:
    path, group = split.paths[0], split.start
    where = f"{path} row group {group}"
    for first, batch in until_damaged(_batches(path, group, options), damage(), explain_damage(where), left_out):
        yield from read_column(column_of(batch, options.text_key), where, first, left_out)


def _batches(path: str, group: int, options: ReadOptions) -> Iterator[tuple[int, "pyarrow.RecordBatch"]]:
    """Yield record batches, each with the number of its first row in the row group."""
    file = _open(path)
    largest = _largest_page(path, file.metadata.row_group(group), options.text_key)
    rows = min(ROWS_AT_ONCE, max(1, BATCH_BYTES // max(1, largest)))
    row = 0
    for batch in file.iter_batches(rows, row_groups=[group], columns=[options.text_key], use_threads=False):
        yield row, batch
        row += len(batch)


def _columns(
    rows: "pyarrow.parquet.RowGroupMetaData", text_key: str
) -> Iterator["pyarrow.parquet.ColumnChunkMetaData"]:
    """Yield the columns of a row group that belong to a field."""
    for number in range(rows.num_columns):
        column = rows.column(number)
        if f"{column.path_in_schema}.".startswith(f"{text_key}."):
            yield column


def _largest_page(path: str, rows: "pyarrow.parquet.RowGroupMetaData", text_key: str) -> int:
    """Return the bytes of the largest page, decompressed. Raises DamagedError for a page beyond MAX_PAGE_BYTES."""
    largest = 0
    with open_file(path) as file:
        for column in _columns(rows, text_key):
            offset = min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)
            stop = offset + column.total_compressed_size
            while offset < stop:
                unpacked, packed, header = _read_page_header(file, path, offset)
                if not 0 <= unpacked <= MAX_PAGE_BYTES or packed < 0:
                    raise DamagedError(
                        f"{path}: the page at byte {offset} takes {unpacked / (1 << 20):,.0f} MiB when it is unpacked, "
                        f"the limit is {MAX_PAGE_BYTES >> 20} MiB. Write the file with fewer rows in a page, such as "
                        "with write_batch_size=16 of pyarrow."
                    )
                largest = max(largest, unpacked)
                offset += header + packed
    return largest


def _read_page_header(file: IO[bytes], path: str, offset: int) -> tuple[int, int, int]:
    """Return the bytes of the page at an offset: decompressed, compressed, and those of its header."""
    size = HEADER_BYTES
    while True:
        file.seek(offset)
        data = file.read(size)
        try:
            return _parse_page_header(data)
        except (IndexError, KeyError, RecursionError) as error:
            if len(data) < size or not isinstance(error, IndexError):
                raise DamagedError(f"{path}: no page at byte {offset}. Download or write it again.") from error
        size *= 4


def _parse_page_header(data: bytes) -> tuple[int, int, int]:
    """Parse a PageHeader, whose fields 2 and 3 are the two sizes.

    Thrift's compact protocol: a field begins with a byte of its number, relative to the one before, and its type; a
    byte 0 ends a struct (https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md).
    """
    sizes: dict[int, int] = {}
    at = number = 0
    while head := data[at]:
        number += head >> 4
        if head & 15 == INTEGER:
            value, at = _varint(data, at + 1)
            sizes[number] = (value >> 1) ^ -(value & 1)
        else:
            at = _skip(data, at + 1, head & 15)
    return sizes[2], sizes[3], at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 128:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
    return value | data[at] << shift, at + 1


def _skip(data: bytes, at: int, kind: int) -> int:
    """Return where a value of Thrift's compact protocol ends that begins at data[at]."""
    # The type itself says true or false.
    if kind in (1, 2):
        return at
    # A byte.
    if kind == 3:
        return at + 1
    # Integers of 16, 32 and 64 bits.
    if kind in (4, 5, 6):
        return _varint(data, at)[1]
    # A double.
    if kind == 7:
        return at + 8
    # Bytes or a text, after their length.
    if kind == 8:
        size, at = _varint(data, at)
        return at + size
    # Anything else but a struct is a list, a set or a map, which a PageHeader never has.
    if kind != 12:
        raise KeyError(kind)
    while head := data[at]:
        at = _skip(data, at + 1, head & 15)
    return at + 1


def _open(path: str) -> "pyarrow.parquet.ParquetFile":
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as missing:
        raise missing_extra(path, "pyarrow") from missing
    try:
        # Without these two options pyarrow holds all compressed bytes of a row group.
        source = open_file(path) if is_remote(path) else path
        return pyarrow.parquet.ParquetFile(source, buffer_size=READ_BYTES, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedError(f"{path}: not a .parquet file: {str(error).strip()}. Download it again.") from error
