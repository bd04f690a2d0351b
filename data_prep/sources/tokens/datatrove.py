"""Read datatrove's tokenized files: token ids in a .ds file, and in .ds.index where documents end.

The format is that of TokenizedFile in datatrove's pipeline/tokens/tokenizer.py.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.sources.base import DamagedError, InputSplit, LeftOut, ReadOptions
from data_prep.sources.tokens.ids import TokenBatch, batches_of, cut_at_documents

SUFFIX = ".ds"
BESIDE = (".ds.index", ".ds.metadata", ".ds.loss")
AGAIN = "Copy both files again, or write them again with save_index=True."


def is_empty(path: Path) -> bool:
    """Return whether neither the file nor its index has a byte."""
    index = Path(f"{path}.index")
    return not path.stat().st_size and index.is_file() and not index.stat().st_size


def list_input_splits(path: Path, options: ReadOptions) -> list[InputSplit]:
    """Cut a .ds file into ranges of documents. Raises DamagedError if it is not what its index says."""
    ends = _ends(path)
    itemsize = _dtype(path, ends).itemsize
    if (np.diff(ends.astype(np.int64), prepend=0) < 0).any():
        raise DamagedError(f"{path}.index: its documents are not in order. {AGAIN}")
    return cut_at_documents("datatrove", path, np.concatenate([[0], ends.astype(np.int64)]) * itemsize)


def read(split: InputSplit, options: ReadOptions, left_out: LeftOut) -> Iterator[TokenBatch]:
    path = Path(split.paths[0])
    ends = _ends(path)
    dtype = _dtype(path, ends)
    begin = int(ends[split.start - 1]) if split.start else 0
    some = ends[split.start : split.stop].astype(np.int64)
    ids = np.memmap(path, dtype, "r") if some[-1] > begin else np.zeros(0, dtype)
    yield from batches_of(ids[begin : int(some[-1])], some - begin, str(path), split.start, left_out)


def tokenizer_name(path: Path) -> str | None:
    """Return the tokenizer that the metadata beside a .ds file names."""
    metadata = Path(f"{path}.metadata")
    if not metadata.is_file():
        return None
    return metadata.read_text(errors="replace").splitlines()[0].rpartition("|")[0] or None


def _ends(path: Path) -> np.ndarray:
    index = Path(f"{path}.index")
    if not index.is_file():
        raise DamagedError(f"{index}: no such file, so it is unknown where the documents of {path.name} end. {AGAIN}")
    if not index.stat().st_size or index.stat().st_size % 8:
        raise DamagedError(f"{index}: has {index.stat().st_size} bytes, expected 8 for each document. {AGAIN}")
    return np.memmap(index, "<u8", "r")


def _dtype(path: Path, ends: np.ndarray) -> np.dtype:
    """Return the type of the ids, which follows from their number."""
    total, size = int(ends[-1]), path.stat().st_size
    for dtype in (np.dtype("<u2"), np.dtype("<u4")):
        if total * dtype.itemsize == size:
            return dtype
    raise DamagedError(f"{path}: has {size} bytes, but its index says {total} tokens of 2 or 4 bytes each. {AGAIN}")
