"""Write the documents of input splits to sorted runs, the first of the two passes.

A sorted run is a file of documents in the order of a hash of their text. It holds at most RUN_BYTES, which bounds the
memory of a worker and the work that a kill loses, however large an input split is. Because it is sorted, the documents
of one shard are contiguous in it and found in O(log n).
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data_prep import workers
from data_prep.sources import InputSplit, LeftOut, ReadOptions, read_input_split
from data_prep.sources.base import SHORT, TOKEN_KINDS
from data_prep.sources.tokens import read_token_split
from data_prep.sources.tokens.ids import IdRule
from megabert.data.shards.tokenizer import TokenizerFile, encode_flat
from megabert.files.atomic import new_file, write_atomically
from megabert.files.json_file import read_json

# blake2b. The first half decides whether a document is held out, the second half decides its shard.
HASH_BYTES = 16
PARTS = ("train", "heldout")

# As token ids, some 250 MB of text. 100 GB of text make 400 sorted runs, so a shard is collected from 400 pieces of
# 160 kB each, which any disk reads fast. It is also most of the memory of a worker.
RUN_BYTES = 128 << 20
# Each document costs some 100 bytes while a sorted run is collected.
RUN_DOCUMENTS = 500_000
# Text that is tokenized by one call: large enough to outweigh the call, small enough to hold.
BATCH_BYTES = 1 << 20
# Documents that are copied into sorted order by one call.
GATHERED_DOCUMENTS = 4096


@dataclass(frozen=True)
class WriteSettings:
    """Settings of both passes, the same for every worker.

    tokenizer: None for text shards; dtype: of the payload, which is token ids or UTF-8 bytes;
    heldout: share of documents to hold out; ids: which ids a source of tokens may have, None if it is text.
    """

    out: Path
    tokenizer: TokenizerFile | None
    dtype: np.dtype
    read: ReadOptions
    min_chars: int
    heldout: float
    deduplicate: bool
    chunk_tokens: int
    seed: int
    ids: IdRule | None = None

    @property
    def work(self) -> Path:
        return self.out / ".work"


class TaskSummary(NamedTuple):
    """Counts of one task of the first pass.

    runs: sorted runs written; read: documents before copies are dropped; elements: of the payload, per part;
    first_heldout: the smallest share to hold out that holds out one of them; left_out, examples: as in LeftOut;
    hash_sum: of the hashes of all documents, modulo 2^64.
    """

    runs: int
    read: int
    elements: dict[str, int]
    first_heldout: float
    left_out: dict[str, int]
    examples: dict[str, list[str]]
    hash_sum: int


def heldout_below(share: float) -> int:
    """Return the bound below which the first half of a hash means held out. A larger share includes a smaller one."""
    return int(share * 2**64)


def share_that_includes(half: int) -> float:
    """Return the smallest share with three digits that holds out a document, given the first half of its hash."""
    share = (half + 1) / 2**64
    exponent = math.floor(math.log10(share)) - 2
    return round((math.floor(share / 10**exponent) + 1) * 10**exponent, -exponent)


def text_hash(raw: bytes) -> bytes:
    """Hash a text. Texts that differ only in CRLF or LF line ends have the same hash."""
    return hashlib.blake2b(raw.replace(b"\r\n", b"\n"), digest_size=HASH_BYTES).digest()


class SortedRun:
    """A sorted run on disk: a header, then keys, others and ends of the train documents and of the held-out documents,
    each in the order of `keys`, then the payload.

    keys: the half of the hash that decides the shard; others: the other half; ends: where each document's payload ends.
    """

    HEADER = np.dtype([("train", "<i8"), ("heldout", "<i8")])

    @classmethod
    def open(cls, path: Path, dtype: np.dtype) -> "SortedRun":
        return cls(np.memmap(path, mode="r"), dtype)

    def __init__(self, data: np.ndarray, dtype: np.dtype):
        """Find the parts of a file. data: its bytes, which may be mapped into memory."""
        header = data[: self.HEADER.itemsize].view(self.HEADER)[0]
        self._train, total = int(header["train"]), int(header["train"] + header["heldout"])
        columns = data[self.HEADER.itemsize : self.HEADER.itemsize + 24 * total].reshape(3, 8 * total)
        self._keys, self._others = columns[0].view(np.uint64), columns[1].view(np.uint64)
        self._ends = columns[2].view(np.int64)
        self._payload = data[self.HEADER.itemsize + 24 * total :].view(dtype)

    def read(self, part: str, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the documents of a part with low <= key < high: (payload, lengths (n,), hashes (n, 2))."""
        first = 0 if part == "train" else self._train
        keys = self._keys[: self._train] if part == "train" else self._keys[self._train :]
        a = first + int(np.searchsorted(keys, np.uint64(low)))
        b = first + (len(keys) if high >= 1 << 64 else int(np.searchsorted(keys, np.uint64(high))))
        begin = int(self._ends[a - 1]) if a else 0
        ends = np.array(self._ends[a:b])
        hashes = np.stack([self._others[a:b], self._keys[a:b]], axis=1)
        payload = np.array(self._payload[begin : int(ends[-1]) if len(ends) else begin])
        return payload, np.diff(ends, prepend=begin), hashes


class SortedDocuments(NamedTuple):
    """Documents in the order of their hashes. Document i is payload[begins[i] : begins[i] + lengths[i]]."""

    payload: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray

    def gathered(self) -> Iterator[np.ndarray]:
        """Yield the payload in the order of the documents, some thousand at a time."""
        for at in range(0, len(self.begins), GATHERED_DOCUMENTS):
            some = slice(at, at + GATHERED_DOCUMENTS)
            spans = zip(self.begins[some].tolist(), (self.begins[some] + self.lengths[some]).tolist(), strict=True)
            yield np.concatenate([self.payload[a:b] for a, b in spans])


def write_columns(file: BinaryIO, documents: SortedDocuments, train: int) -> None:
    """Write a sorted run. train: how many of the documents belong to the training part, which come first."""
    header = np.array([(train, len(documents.begins) - train)], SortedRun.HEADER)
    for piece in (header, documents.hashes[:, 1], documents.hashes[:, 0], documents.lengths.cumsum()):
        file.write(np.ascontiguousarray(piece).data)
    for payload in documents.gathered():
        file.write(payload.data)


def write_run(file: BinaryIO, part: str, documents: SortedDocuments, some: slice) -> None:
    """Write a sorted run of some documents, which belong to one part."""
    begins = documents.begins[some]
    chosen = SortedDocuments(documents.payload, begins, documents.lengths[some], documents.hashes[some])
    write_columns(file, chosen, len(begins) if part == "train" else 0)


class SortedRunWriter:
    """Collects the documents of a task and writes them as sorted runs of at most RUN_BYTES."""

    def __init__(self, settings: WriteSettings, task: int):
        self.settings = settings
        self.task = task
        # Pages that are never written take no memory.
        self._buffer = np.empty(RUN_BYTES // settings.dtype.itemsize, settings.dtype)
        self._used = 0
        self._lengths: list[np.ndarray] = []
        self._hashes: list[bytes] = []
        self._runs = self._read = 0
        self._smallest_hash = 1 << 64
        self._hash_sum = 0
        self._elements = dict.fromkeys(PARTS, 0)

    def add(self, payload: np.ndarray, lengths: np.ndarray, hashes: list[bytes]) -> None:
        """Add documents. payload: those of all documents, concatenated."""
        full = self._used + len(payload) > len(self._buffer) or len(self._hashes) + len(hashes) > RUN_DOCUMENTS
        if self._hashes and full:
            self._flush()
        if len(payload) > len(self._buffer):
            self._buffer = np.empty(len(payload), self.settings.dtype)
        self._buffer[self._used : self._used + len(payload)] = payload
        self._used += len(payload)
        self._lengths.append(lengths)
        self._hashes += hashes

    def finish(self, left_out: LeftOut) -> TaskSummary:
        """Write the last sorted run."""
        if self._hashes:
            self._flush()
        first = share_that_includes(self._smallest_hash)
        counts, examples = left_out.counts, left_out.examples
        return TaskSummary(self._runs, self._read, self._elements, first, counts, examples, self._hash_sum)

    def _flush(self) -> None:
        lengths = np.concatenate(self._lengths)
        hashes = np.frombuffer(b"".join(self._hashes), dtype=np.uint64).reshape(-1, 2)
        begins = lengths.cumsum() - lengths
        self._smallest_hash = min(self._smallest_hash, int(hashes[:, 0].min()))
        self._hash_sum = (self._hash_sum + int(hashes[:, 1].sum())) % 2**64
        held = is_held_out(hashes, self.settings.heldout)
        order = np.lexsort((hashes[:, 0], hashes[:, 1], held))
        # All copies of one text belong to one shard. Many of them would fill the memory of the worker that writes it.
        if self.settings.deduplicate:
            order = order[is_first_copy(hashes[order])]
        train = int((~held[order]).sum())
        for part, documents in (("train", order[:train]), ("heldout", order[train:])):
            self._elements[part] += int(lengths[documents].sum())
        sorted_documents = SortedDocuments(self._buffer, begins[order], lengths[order], hashes[order])
        with new_file(run_path(self.settings, self.task, self._runs)) as temporary:
            with open(temporary, "wb") as file:
                write_columns(file, sorted_documents, train)
                file.flush()
                os.fsync(file.fileno())
        self._runs += 1
        self._read += len(lengths)
        self._used, self._lengths, self._hashes = 0, [], []


def is_held_out(hashes: np.ndarray, share: float) -> np.ndarray:
    return hashes[:, 0] < np.uint64(heldout_below(share))


def is_first_copy(hashes: np.ndarray) -> np.ndarray:
    """Return which rows of sorted hashes (n, 2) differ from the row before."""
    return np.concatenate([np.ones(min(1, len(hashes)), bool), (hashes[1:] != hashes[:-1]).any(axis=1)])


def in_batches(
    documents: Iterable[str], where: str, settings: WriteSettings, left_out: LeftOut
) -> Iterator[tuple[list[str], list[bytes]]]:
    """Yield batches of documents, stripped of white space, as text and as UTF-8. where: their file, for messages."""
    texts: list[str] = []
    raws: list[bytes] = []
    size = 0
    for document in documents:
        text = document.strip()
        raw = text.encode()
        if len(text) < settings.min_chars:
            left_out.add(SHORT, where)
            continue
        texts.append(text)
        raws.append(raw)
        size += len(raw)
        if size >= BATCH_BYTES:
            yield texts, raws
            texts, raws, size = [], [], 0
    if texts:
        yield texts, raws


def write_sorted_runs(settings: WriteSettings, task: int, splits: list[InputSplit]) -> None:
    """Write the sorted runs of one task, then its summary. A task without a summary is done again."""
    writer = SortedRunWriter(settings, task)
    left_out = LeftOut(settings.read.skip_damaged)
    for split in splits:
        if split.kind in TOKEN_KINDS:
            _add_tokens(writer, split, settings, left_out)
        else:
            add_texts(writer, read_input_split(split, settings.read, left_out), split.paths[0], left_out)
        workers.add_progress(input_bytes=split.size)
    write_summary(writer, left_out)


def write_summary(writer: SortedRunWriter, left_out: LeftOut) -> None:
    """Write the last sorted run of a task and its summary, after which it counts as done."""
    path = summary_path(writer.settings, writer.task)
    write_atomically(path, json.dumps(writer.finish(left_out)._asdict()).encode())


def add_texts(writer: SortedRunWriter, documents: Iterable[str], where: str, left_out: LeftOut) -> None:
    """Add documents to the sorted runs of a task. where: their file, for messages."""
    settings = writer.settings
    for texts, raws in in_batches(documents, where, settings, left_out):
        if settings.tokenizer is None:
            payload = np.frombuffer(b"".join(raws), dtype=np.uint8)
            lengths = np.fromiter(map(len, raws), np.int64, len(raws))
        else:
            payload, lengths = encode_flat(workers.worker_tokenizer(settings.tokenizer), texts, settings.dtype)
        writer.add(payload, lengths, list(map(text_hash, raws)))
        workers.add_progress(text_bytes=sum(map(len, raws)))


def _add_tokens(writer: SortedRunWriter, split: InputSplit, settings: WriteSettings, left_out: LeftOut) -> None:
    assert settings.ids is not None, f"{split}: has token ids, and no rule for them was given"
    for batch in read_token_split(split, settings.read, settings.ids, left_out):
        # Ids are hashed in 4 bytes, so that the same ids have the same hash whatever type a file has them in.
        raw, ends = batch.ids.astype("<u4").tobytes(), 4 * batch.lengths.cumsum()
        filled = np.flatnonzero(batch.lengths)
        if len(filled) < len(ends):
            left_out.add(SHORT, split.paths[0], len(ends) - len(filled))
        spans = zip((ends - 4 * batch.lengths)[filled].tolist(), ends[filled].tolist(), strict=True)
        hashes = [hashlib.blake2b(raw[a:b], digest_size=HASH_BYTES).digest() for a, b in spans]
        if hashes:
            writer.add(batch.ids.astype(settings.dtype), batch.lengths[filled], hashes)


def summary_path(settings: WriteSettings, task: int) -> Path:
    return settings.work / "runs" / f"{task:06d}.json"


def read_summary(settings: WriteSettings, task: int) -> TaskSummary:
    return TaskSummary(**read_json(summary_path(settings, task)))


def run_path(settings: WriteSettings, task: int, number: int) -> Path:
    """Return the file of a task's sorted run."""
    return settings.work / "runs" / f"{task:06d}-{number:03d}.run"
