"""Read .parquet files: one document per row, in one column.

Needs the package pyarrow, which the extra [prep] installs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.sources.base import InputSplit, ReadOptions, missing_extra, no_field, not_text

if TYPE_CHECKING:
    import pyarrow.parquet

ROWS_AT_ONCE = 1024  # some kB each, so a few MB in memory


def list_input_splits(path: Path, options: ReadOptions) -> list[InputSplit]:
    """List one input split per row group. Raises ValueError if the file has no such column of text."""
    file = _open(str(path))
    schema = file.schema_arrow
    if options.text_key not in schema.names:
        raise no_field(str(path), options.text_key, schema.names)
    kind = schema.field(options.text_key).type
    if str(kind) not in ("string", "large_string", "string_view"):
        raise not_text(str(path), options.text_key, kind)
    splits = []
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group)
        columns = (rows.column(i) for i in range(rows.num_columns))
        size = sum(c.total_compressed_size for c in columns if c.path_in_schema == options.text_key)
        splits.append(InputSplit("parquet", (str(path),), group, group + 1, size))
    return splits


def read(split: InputSplit, options: ReadOptions) -> Iterator[str]:
    file = _open(split.paths[0])
    groups = range(split.start, split.stop)
    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=[options.text_key], use_threads=False):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _open(path: str) -> "pyarrow.parquet.ParquetFile":
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as missing:
        raise missing_extra(path, "pyarrow") from missing
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a .parquet file: {error}. Download it again.") from error
