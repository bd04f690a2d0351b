"""Read Megatron's indexed data sets: token ids in a .bin file, and in an .idx file where sequences and documents end.

The format is that of IndexedDataset, version 1, in Megatron-LM's megatron/core/datasets/indexed_dataset.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.sources.base import DamagedError, InputSplit, LeftOut, ReadOptions
from data_prep.sources.tokens.ids import TokenBatch, batches_of, cut_at_documents

MAGIC = b"MMIDIDX\x00\x00"
HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("dtype", "u1"), ("sequences", "<u8"), ("documents", "<u8")])
# Codes 6 and 7 are floating-point numbers.
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
AGAIN = "Copy both files again, or write them again."


class Index(NamedTuple):
    """lengths: tokens of each sequence; begins: its first byte; documents: the first sequence of each, and the end."""

    dtype: np.dtype
    lengths: np.ndarray
    begins: np.ndarray
    documents: np.ndarray


def index_of(path: Path) -> Path:
    return path.with_suffix(".idx")


def is_index(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def list_input_splits(path: Path, options: ReadOptions) -> list[InputSplit]:
    """Cut a .bin file into ranges of documents. Raises DamagedError if it is not what its index says."""
    index = read_index(path)
    _check(path, index)
    begins = np.append(index.begins, path.stat().st_size)[index.documents]
    return cut_at_documents("megatron", path, begins)


def read(split: InputSplit, options: ReadOptions, left_out: LeftOut) -> Iterator[TokenBatch]:
    path = Path(split.paths[0])
    index = read_index(path)
    tokens = np.append(index.begins, path.stat().st_size) // index.dtype.itemsize
    edges = tokens[index.documents[split.start : split.stop + 1]]
    ids = np.memmap(path, index.dtype, "r") if edges[-1] > edges[0] else np.zeros(0, index.dtype)
    begin = int(edges[0])
    yield from batches_of(ids[begin : int(edges[-1])], edges[1:] - begin, str(path), split.start, left_out)


def read_index(path: Path) -> Index:
    """Read the index of a .bin file. Raises DamagedError if it is cut or of another format."""
    where = index_of(path)
    size = where.stat().st_size
    header = np.fromfile(where, HEADER, 1)
    if not len(header) or header["magic"][0] != MAGIC.rstrip(b"\0") or header["version"][0] != 1:
        raise DamagedError(f"{where}: not an index of Megatron's IndexedDataset, version 1. {AGAIN}")
    code, sequences, documents = (int(header[name][0]) for name in ("dtype", "sequences", "documents"))
    if code not in DTYPES:
        raise DamagedError(f"{where}: says that the tokens are of type {code}, expected integers. {AGAIN}")
    expected = HEADER.itemsize + 12 * sequences + 8 * documents
    # Data of several modalities has one more byte per sequence.
    if size not in (expected, expected + sequences) or not documents:
        raise DamagedError(f"{where}: has {size} bytes, expected {expected}. {AGAIN}")
    data = np.memmap(where, np.uint8, "r", HEADER.itemsize)
    lengths, begins = data[: 4 * sequences].view("<i4"), data[4 * sequences : 12 * sequences].view("<i8")
    ends = data[12 * sequences : 12 * sequences + 8 * documents].view("<i8")
    return Index(np.dtype(DTYPES[code]), lengths, begins, ends)


def _check(path: Path, index: Index) -> None:
    """Raise DamagedError unless the sequences fill the .bin file, in order, and the documents hold all of them."""
    size = path.stat().st_size
    ends = index.lengths.cumsum(dtype=np.int64) * index.dtype.itemsize
    total = int(ends[-1]) if len(ends) else 0
    if size != total:
        raise DamagedError(f"{path}: has {size} bytes, but {index_of(path).name} says {total}. {AGAIN}")
    if (index.lengths < 0).any() or (index.begins[1:] != ends[:-1]).any() or index.begins[:1].any():
        raise DamagedError(f"{index_of(path)}: its sequences do not follow each other. {AGAIN}")
    documents = index.documents
    if documents[0] != 0 or documents[-1] != len(index.lengths) or (np.diff(documents) < 0).any():
        raise DamagedError(f"{index_of(path)}: its documents do not hold all sequences, in order. {AGAIN}")
