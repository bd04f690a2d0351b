"""Read Arrow columns of text: .arrow files, and the folders that save_to_disk of the package datasets writes.

Needs the package pyarrow, which the extra [prep] installs.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.sources import base
from data_prep.sources.base import (
    NULL,
    OTHER_SPLIT,
    DamagedError,
    InputSplit,
    LeftOut,
    ReadOptions,
    missing_extra,
    no_field,
    not_text,
    too_long,
    until_damaged,
)
from data_prep.sources.columns.message_sizes import unpacked_size
from data_prep.sources.remote import RemotePath, is_remote, open_file, size_of
from data_prep.sources.text_encoding import ChunkStream
from megabert.files.bounded_reads import read_bounded
from megabert.files.json_file import parse_json
from megabert.process.error_text import one_line

if TYPE_CHECKING:
    import pyarrow

DATA_SET = "state.json"
DATA_SETS = "dataset_dict.json"
# The limit for each of the two JSON files of a saved data set: a million names.
MAX_NAMES_BYTES = 1 << 26
# A batch is unpacked whole. datasets writes 1,000 rows, and compresses none.
MAX_BATCH_BYTES = 1 << 30
# ARROW_FILE and padding.
FILE_HEAD_BYTES = 8
# The first bytes of a file in Arrow's file format. The stream format has none.
ARROW_FILE = b"ARROW1"


def is_saved_data_set(path: Path) -> bool:
    """Return whether save_to_disk wrote this folder, or what is left of one."""
    try:
        return bool(_names_in(path / DATA_SET, "_data_files") or _names_in(path / DATA_SETS, "splits"))
    except DamagedError:
        return True


def list_saved(folder: Path, options: ReadOptions, left_out: LeftOut) -> list[InputSplit]:
    """List one input split per file of a saved data set, or of its split --dataset-split if it has several.

    Raises ValueError for a split that it does not have. Other .arrow files in the folder are caches of datasets.
    """
    if splits := _names_in(folder / DATA_SETS, "splits"):
        if options.dataset_split not in splits:
            raise ValueError(
                f"{folder}: has no split {options.dataset_split!r}. Pass one of these as --dataset-split: "
                f"{', '.join(splits)}."
            )
        for split in splits:
            if split != options.dataset_split:
                left_out.add(OTHER_SPLIT, str(folder / split))
        folder = folder / options.dataset_split
    files = [folder / name for name in _names_in(folder / DATA_SET, "_data_files")]
    return [split for file in files for split in list_input_splits(file, options)]


def list_input_splits(path: Path | RemotePath, options: ReadOptions) -> list[InputSplit]:
    """Return the one input split of a .arrow file. Raises DamagedError if it has no such column of text."""
    with _opened(str(path)) as (schema, _):
        check_column(schema, str(path), options.text_key)
    size = size_of(path)
    return [InputSplit("arrow", (str(path),), 0, size, size)]


def read(split: InputSplit, options: ReadOptions, left_out: LeftOut) -> Iterator[str]:
    path = split.paths[0]
    columns = _columns(path, options.text_key)
    for first, column in until_damaged(columns, damage(), explain_damage(path), left_out):
        yield from read_column(column, path, first, left_out)


def check_column(schema: "pyarrow.Schema", where: str, text_key: str) -> None:
    """Raise DamagedError if a schema has no column of text with this name; "a.b" is field b of struct a."""
    import pyarrow

    kind = pyarrow.struct(list(schema))
    for name in [text_key] if text_key in schema.names else text_key.split("."):
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(name) < 0:
            if schema.names.count(name) > 1:
                raise DamagedError(f"{where}: has several fields {name!r}. Write it again with one of them.")
            raise no_field(where, text_key, schema.names)
        kind = kind.field(name).type
    if isinstance(kind, pyarrow.DictionaryType):
        kind = kind.value_type
    # A column without any text, as pandas writes it, has the type null.
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null()):
        raise not_text(where, text_key, kind)


def column_of(batch: "pyarrow.RecordBatch", text_key: str) -> "pyarrow.Array":
    """Return the column of a batch; "a.b" is field b of struct a."""
    if text_key in batch.schema.names:
        return batch.column(text_key)
    name, *inner = text_key.split(".")
    column = batch.column(name)
    for name in inner:
        column = column.flatten()[column.type.get_field_index(name)]
    return column


def read_column(column: "pyarrow.Array", where: str, first: int, left_out: LeftOut) -> Iterator[str]:
    """Yield the texts of a column. first: the number of its first row, for messages."""
    may_be_long = column.nbytes > base.MAX_DOCUMENT_BYTES
    for row, value in enumerate(column, first):
        if may_be_long and value.is_valid and _size(value) > base.MAX_DOCUMENT_BYTES:
            left_out.damaged(too_long(f"{where}: row {row}", "Cut it into documents."))
            continue
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            left_out.damaged(
                DamagedError(f"{where}: row {row} is not valid UTF-8 at its byte {error.start}. Write the file again.")
            )
            continue
        if text is None:
            left_out.add(NULL, f"{where}: row {row}")
        else:
            yield text


def damage() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises for damaged files."""
    import pyarrow

    return DamagedError, pyarrow.ArrowException, OSError, UnicodeDecodeError


def explain_damage(where: str) -> Callable[[Exception], DamagedError]:
    """Return what makes the error for the user. It raises an OSError of the system again, which is no damage."""

    def explain(error: Exception) -> DamagedError:
        if isinstance(error, DamagedError):
            return error
        if isinstance(error, OSError) and error.errno is not None:
            raise error
        return DamagedError(f"{where}: damaged: {one_line(error)} Download or write it again.")

    return explain


def _size(value: "pyarrow.Scalar") -> int:
    import pyarrow

    value = value.value if isinstance(value, pyarrow.DictionaryScalar) else value
    return value.as_buffer().size


def _columns(path: str, text_key: str) -> Iterator[tuple[int, "pyarrow.Array"]]:
    """Yield the column of each batch, with the number of its first row. Raises ArrowInvalid for a damaged one."""
    row = 0
    with _opened(path) as (_, batches):
        for batch in batches:
            batch.validate()
            column = column_of(batch, text_key)
            _check_places(column)
            yield row, column
            row += len(batch)


def _check_places(column: "pyarrow.Array") -> None:
    """Raise ArrowInvalid if a text is not within its buffer: reading it would end the process."""
    import pyarrow

    # The texts are read as bytes, because one that is not UTF-8 must not condemn the others.
    as_bytes = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
    }
    if isinstance(column, pyarrow.DictionaryArray):
        column.dictionary.validate()
        values = column.dictionary.view(as_bytes[column.dictionary.type])
        column = pyarrow.DictionaryArray.from_arrays(column.indices, values, safe=False)
    elif column.type in as_bytes:
        column = column.view(as_bytes[column.type])
    column.validate(full=True)


@contextmanager
def _opened(path: str) -> Iterator[tuple["pyarrow.Schema", Iterator["pyarrow.RecordBatch"]]]:
    """Open a file in one of Arrow's two formats, the stream of save_to_disk or the file. Yields schema and batches.

    Raises DamagedError for another file.
    """
    try:
        import pyarrow
    except ImportError as missing:
        raise missing_extra(path, "pyarrow") from missing
    try:
        with _open(path) as data:
            is_file = data.read(len(ARROW_FILE)) == ARROW_FILE
            data.seek(0)
            reader = pyarrow.ipc.open_file(data) if is_file else pyarrow.ipc.open_stream(data)
            batches = _fetched(reader, data, path, is_file) if is_remote(path) else _in_order(reader, path, is_file)
            yield reader.schema, batches
    except (pyarrow.ArrowException, OSError) as error:
        raise explain_damage(path)(error) from error


def _in_order(reader: "pyarrow.ipc.RecordBatchReader", path: str, is_file: bool) -> Iterator["pyarrow.RecordBatch"]:
    """Yield the batches of a file. Raises DamagedError, before any is unpacked, for one that takes too much memory."""
    import pyarrow

    # An exception is suppressed here, because the reader will raise it, too.
    with _open(path) as data, contextlib.suppress(pyarrow.ArrowException):
        for _ in _checked_messages(data, path, is_file):
            pass
    yield from map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader


def _fetched(
    reader: "pyarrow.ipc.RecordBatchReader", data: "pyarrow.NativeFile", path: str, is_file: bool
) -> Iterator["pyarrow.RecordBatch"]:
    """Yield the batches of a remote file. Each is checked as it comes, so that no byte is fetched twice."""
    import pyarrow

    messages = (message.serialize().to_pybytes() for message in _checked_messages(data, path, is_file))
    stream = io.BufferedReader(ChunkStream(messages), io.DEFAULT_BUFFER_SIZE)
    count = 0
    for batch in pyarrow.ipc.open_stream(pyarrow.PythonFile(stream, "r")):
        yield batch
        count += 1
    if is_file and count != reader.num_record_batches:
        raise DamagedError(f"{path}: has {count} of {reader.num_record_batches} batches. Download or write it again.")


def _checked_messages(data: "pyarrow.NativeFile", path: str, is_file: bool) -> Iterator["pyarrow.ipc.Message"]:
    """Yield the messages of a file. Raises DamagedError for one that takes more than MAX_BATCH_BYTES when unpacked."""
    import pyarrow

    # A file is a stream too, after its head.
    data.seek(FILE_HEAD_BYTES if is_file else 0)
    for number, message in enumerate(pyarrow.ipc.MessageReader.open_stream(data)):
        try:
            size = unpacked_size(memoryview(message.metadata), memoryview(message.body or b""))
        except IndexError as error:
            raise DamagedError(f"{path}: message {number} is damaged. Download or write it again.") from error
        if size > MAX_BATCH_BYTES:
            raise DamagedError(
                f"{path}: message {number} takes {size / (1 << 20):,.0f} MiB when it is unpacked, the limit is "
                f"{MAX_BATCH_BYTES >> 20} MiB. Write the file with fewer rows in a batch, or without compression."
            )
        yield message


def _open(path: str) -> "pyarrow.NativeFile":
    import pyarrow

    return pyarrow.PythonFile(open_file(path), "r") if is_remote(path) else pyarrow.memory_map(path)


def _names_in(path: Path, key: str) -> list[str]:
    """Return the names of files or folders in a file of save_to_disk, [] if it is none.

    Raises DamagedError if it is damaged: then nothing says which files and splits are to be read.
    """
    if not path.is_file():
        return []
    try:
        content = parse_json(read_bounded(path, MAX_NAMES_BYTES))
        entries = content[key] if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{key} is a {type(entries).__name__}, expected a list")
        names = [entry["filename"] if isinstance(entry, dict) else entry for entry in entries]
    except (ValueError, KeyError, RecursionError) as error:
        if not _is_beside_arrow(path):
            return []
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DamagedError(f"{path}: damaged: {what}. Save the data set again.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise DamagedError(f"{path}: {name!r} is not a name in its folder. Save the data set again.")
    return names


def _is_beside_arrow(path: Path) -> bool:
    """Return whether .arrow files are beside it or in folders beside it: other programs have a state.json, too."""
    return any(path.parent.glob("*.arrow")) or any(path.parent.glob("*/*.arrow"))
