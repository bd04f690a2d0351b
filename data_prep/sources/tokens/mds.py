"""Read the MDS shards of mosaicml-streaming: a column of text, or of token ids.

The format is that of MDSWriter in mosaicml-streaming's streaming/base/format/mds.
"""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zstandard

from data_prep.sources import base
from data_prep.sources.base import (
    DamagedError,
    InputSplit,
    LeftOut,
    ReadOptions,
    no_field,
    not_text,
    too_long,
    until_damaged,
)
from data_prep.sources.tokens.ids import BATCH_TOKENS, TokenBatch
from data_prep.sources.tokens.mds_index import AGAIN, INDEX, Shard, read_shards

# A shard is held in memory whole. MDSWriter aims at 64 MB.
MAX_SHARD_BYTES = 1 << 30
# numpy's types by their numbers in a column of arrays that may have any type.
ARRAY_TYPES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
NAMED_TYPES = {np.dtype(name).name: name for name in ARRAY_TYPES.values()}
SHAPE_TYPES = ("u1", "<u2", "<u4", "<u8")


class Column(NamedTuple):
    """A column of a shard: number: its place in a sample; encoding: "str", "bytes", "ndarray:uint16" and others."""

    number: int
    encoding: str


def list_input_splits(folder: Path, options: ReadOptions) -> list[InputSplit]:
    """List one input split per shard. Raises DamagedError if a file is cut, or has no such column."""
    splits = []
    for number, shard in enumerate(read_shards(folder)):
        path, size = _file_of(folder, shard)
        if not path.is_file():
            raise DamagedError(f"{path}: no such file, but {folder / INDEX} lists it. {AGAIN}")
        if path.stat().st_size != size:
            raise DamagedError(f"{path}: has {path.stat().st_size} bytes, but {INDEX} says {size}. {AGAIN}")
        encoding = _column(shard, options.text_key, str(path)).encoding
        kind = "mds" if encoding == "str" else "mds_tokens"
        splits.append(InputSplit(kind, (str(path), str(folder / INDEX)), number, number + 1, size))
    return splits


def read(split: InputSplit, options: ReadOptions, left_out: LeftOut) -> Iterator[str]:
    """Yield the texts of a shard."""
    for where, data in _values(split, options, left_out):
        try:
            yield data.decode()
        except UnicodeDecodeError as error:
            left_out.damaged(DamagedError(f"{where} is not valid UTF-8 at its byte {error.start}. {AGAIN}"))


def read_tokens(split: InputSplit, options: ReadOptions, left_out: LeftOut) -> Iterator[TokenBatch]:
    """Yield the token ids of a shard in batches."""
    path, index = split.paths
    encoding = _column(read_shards(Path(index).parent)[split.start], options.text_key, path).encoding
    group: list[np.ndarray] = []
    first = held = 0
    for number, (where, data) in enumerate(_values(split, options, left_out)):
        try:
            group.append(decode_ids(data, encoding, where))
        except DamagedError as error:
            left_out.damaged(error)
            continue
        held += len(group[-1])
        if held >= BATCH_TOKENS:
            yield _batch(group, path, first)
            group, first, held = [], number + 1, 0
    if group:
        yield _batch(group, path, first)


def decode_ids(data: bytes, encoding: str, where: str) -> np.ndarray:
    """Decode a value to integers in one dimension. Raises DamagedError."""
    name, _, rest = encoding.partition(":")
    dtype, _, shape = rest.partition(":")
    at = 0
    try:
        if name == "bytes":
            # Its type is not recorded. Tokens are written as int64 (llm-foundry); other types give ids beyond any
            # vocabulary.
            return np.frombuffer(data, "<i8")
        kind = NAMED_TYPES[dtype] if dtype else ARRAY_TYPES[data[0]]
        at = 0 if dtype else 1
        if not shape:
            dimensions, width = data[at] >> 2, data[at] & 3
            if dimensions != 1:
                raise not_text(where, "", f"an array of {dimensions} dimensions")
            at += 1 + np.dtype(SHAPE_TYPES[width]).itemsize
        return np.frombuffer(data, kind, offset=at)
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{where}: holds no array of integers: {error}. {AGAIN}") from error


def _batch(group: list[np.ndarray], where: str, first: int) -> TokenBatch:
    # One type for all, because a column may hold arrays of several.
    ids = np.concatenate([part.astype(np.int64, copy=False) for part in group])
    return TokenBatch(ids, np.array([len(part) for part in group], np.int64), where, first)


def _file_of(folder: Path, shard: Shard) -> tuple[Path, int]:
    """Return the file of a shard, compressed if only that is there, and the bytes that it must have.

    Raises DamagedError for a shard that is too large to be held in memory.
    """
    for file in filter(None, (shard.raw_data, shard.zip_data)):
        path = folder / file.basename
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DamagedError(f"{folder / INDEX}: {file.basename!r} is not below its folder. {AGAIN}")
        if path.is_file() or shard.zip_data is None or file is shard.zip_data:
            break
    if max(file.bytes, shard.raw_data.bytes) > MAX_SHARD_BYTES:
        raise DamagedError(
            f"{path}: has {shard.raw_data.bytes / (1 << 20):,.0f} MiB, the limit of a shard is {MAX_SHARD_BYTES >> 20} "
            "MiB. Write the folder again with smaller shards (size_limit of MDSWriter)."
        )
    return path, file.bytes


def _column(shard: Shard, key: str, where: str) -> Column:
    names, encodings = shard.column_names, shard.column_encodings
    if key not in names:
        raise no_field(where, key, names)
    encoding = encodings[names.index(key)]
    if encoding not in ("str", "bytes") and encoding.partition(":")[0] != "ndarray":
        raise not_text(where, key, encoding)
    return Column(names.index(key), encoding)


def _values(split: InputSplit, options: ReadOptions, left_out: LeftOut) -> Iterator[tuple[str, bytes]]:
    """Yield the value of the column in each sample, with its place."""
    path, index = split.paths
    shard = read_shards(Path(index).parent)[split.start]
    column = _column(shard, options.text_key, path).number

    def explain(error: Exception) -> DamagedError:
        return error if isinstance(error, DamagedError) else DamagedError(f"{path}: damaged: {error}. {AGAIN}")

    errors = (DamagedError, zstandard.ZstdError, ValueError, IndexError)
    for number, sample in enumerate(until_damaged(_samples(Path(path), shard), errors, explain, left_out)):
        where = f"{path}: sample {number}"
        value = _value(sample, shard.column_sizes, column)
        if value is None:
            left_out.damaged(DamagedError(f"{where} is cut. {AGAIN}"))
        elif len(value) > base.MAX_DOCUMENT_BYTES:
            left_out.damaged(too_long(where, "Cut it into documents."))
        else:
            yield where, value


def _samples(path: Path, shard: Shard) -> Iterator[bytes]:
    """Yield the samples of a shard: their number, the places where each begins and ends, a header, and the samples."""
    data = _unpacked(path, shard)
    for algorithm, expected in (shard.raw_data.hashes or {}).items():
        if algorithm in hashlib.algorithms_available and hashlib.new(algorithm, data).hexdigest() != expected:
            raise DamagedError(f"{path}: its {algorithm} differs from that in {INDEX}. {AGAIN}")
    count = int.from_bytes(data[:4], "little")
    if count != shard.samples or len(data) < 4 * (count + 2):
        raise DamagedError(f"{path}: says that it has {count} samples, but {INDEX} says {shard.samples}. {AGAIN}")
    edges = np.frombuffer(data, "<u4", count + 1, 4).astype(np.int64)
    if (np.diff(edges) < 0).any() or int(edges[-1]) != len(data):
        raise DamagedError(f"{path}: its samples do not fill it. {AGAIN}")
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        yield data[begin:end]


def _unpacked(path: Path, shard: Shard) -> bytes:
    data = path.read_bytes()
    if path.name == Path(shard.raw_data.basename).name:
        return data
    method = str(shard.compression).partition(":")[0]
    if method != "zstd":
        raise ValueError(f"{path}: compressed with {method}, expected zstd. Write it again without compression.")
    # decompress() would allocate as much as the file says of itself.
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)) as reader:
        unpacked = reader.read(shard.raw_data.bytes + 1)
    if len(unpacked) != shard.raw_data.bytes:
        raise DamagedError(f"{path}: does not unpack to the {shard.raw_data.bytes} bytes that {INDEX} says. {AGAIN}")
    return unpacked


def _value(sample: bytes, sizes: list[int | None], column: int) -> bytes | None:
    """Return one column of a sample: the sizes of columns without a fixed size come first. None if it is cut."""
    at, found = 0, []
    for size in sizes:
        found.append(size or int.from_bytes(sample[at : at + 4], "little"))
        at += 0 if size else 4
    begin = at + sum(found[:column])
    if at + sum(found) != len(sample):
        return None
    return sample[begin : begin + found[column]]
