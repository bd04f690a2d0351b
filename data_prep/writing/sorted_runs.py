"""The first pass: units of a source become runs, files of documents sorted by a hash of their text.

A run holds at most RUN_BYTES, so memory and a kill's loss are bounded however large a unit is; and since it is sorted,
the documents of one shard lie together in it and are found in O(log n).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep import workers
from data_prep.sources import InputSplit, ReadOptions, read_input_split
from megabert.data.shards.tokenizer import encode_flat
from megabert.files.atomic import write_atomically

HASH_BYTES = 16  # blake2b; the first half decides held-out or not, the second the shard
PARTS = ("train", "heldout")

# Of token ids: some 250 MB of text. 100 GB make 400 runs, so that a shard is put together of 400 pieces of 160 kB, long
# enough for any disk. It is also most of what a worker holds in memory.
RUN_BYTES = 128 << 20
RUN_DOCUMENTS = 500_000  # and documents, each of which costs some 100 bytes while a run is collected
BATCH_BYTES = 1 << 20  # text that is tokenized at once: enough to be worth a call, little to hold
GATHERED = 4096  # documents that are brought into order in memory at once

SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class WriteSettings:
    """What every worker needs to know. heldout: share; dtype: of the payload, token ids or UTF-8 bytes."""

    out: Path
    tokenizer_path: str | None
    dtype: np.dtype
    read: ReadOptions
    min_chars: int
    heldout: float
    deduplicate: bool
    chunk_tokens: int
    seed: int

    @property
    def work(self) -> Path:
        return self.out / ".work"


class TaskSummary(NamedTuple):
    """What one task of the first pass left. read: documents before copies are dropped; elements: of kept, per part."""

    runs: int
    read: int
    elements: dict[str, int]


def heldout_below(share: float) -> int:
    """Documents whose first half-hash is below this are held out: a larger share holds out all of a smaller one's."""
    return int(share * 2**64)


def replace_lone_surrogates(text: str) -> tuple[str, bytes]:
    """A text and its UTF-8. JSON may spell half a surrogate pair, which is no character: U+FFFD stands for it."""
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        text = SURROGATES.sub("\ufffd", text)
        return text, text.encode()


def text_hash(raw: bytes) -> bytes:
    """Of the text as its author saw it: line ends are no difference."""
    return hashlib.blake2b(raw.replace(b"\r\n", b"\n"), digest_size=HASH_BYTES).digest()


class SortedRun:
    """One run on disk: a header, then per part and in the order of `keys`: keys, others, ends; then the payload.

    keys: the half of the hash that decides the shard; others: the other half; ends: where each document's payload ends.
    """

    HEADER = np.dtype([("version", "<i8"), ("train", "<i8"), ("heldout", "<i8"), ("itemsize", "<i8")])

    def __init__(self, path: Path, dtype: np.dtype):
        data = np.memmap(path, mode="r")
        header = data[: self.HEADER.itemsize].view(self.HEADER)[0]
        self._train, total = int(header["train"]), int(header["train"] + header["heldout"])
        columns = data[self.HEADER.itemsize : self.HEADER.itemsize + 24 * total].reshape(3, 8 * total)
        self._keys, self._others = columns[0].view(np.uint64), columns[1].view(np.uint64)
        self._ends = columns[2].view(np.int64)
        self._payload = data[self.HEADER.itemsize + 24 * total :].view(dtype)

    def read(self, part: str, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents of a part with low <= key < high: (payload, lengths, hashes (n, 2))."""
        first = 0 if part == "train" else self._train
        keys = self._keys[: self._train] if part == "train" else self._keys[self._train :]
        a = first + int(np.searchsorted(keys, np.uint64(low)))
        b = first + (len(keys) if high >= 1 << 64 else int(np.searchsorted(keys, np.uint64(high))))
        begin = int(self._ends[a - 1]) if a else 0
        ends = np.array(self._ends[a:b])
        hashes = np.stack([self._others[a:b], self._keys[a:b]], axis=1)
        return (
            np.array(self._payload[begin : int(ends[-1]) if len(ends) else begin]),
            np.diff(ends, prepend=begin),
            hashes,
        )


class SortedRunWriter:
    """Collects documents and writes them as runs `stem`-000.run, -001.run, ... of at most RUN_BYTES."""

    def __init__(self, settings: WriteSettings, stem: str):
        self._job = settings
        self._stem = stem
        self._buffer = np.empty(
            RUN_BYTES // settings.dtype.itemsize, settings.dtype
        )  # pages that are never used cost nothing
        self._used = 0
        self._lengths: list[np.ndarray] = []
        self._hashes: list[bytes] = []
        self._runs = self._read = 0
        self._elements = dict.fromkeys(PARTS, 0)

    def add(self, payload: np.ndarray, lengths: np.ndarray, hashes: list[bytes]) -> None:
        """Add documents: payload end to end."""
        full = self._used + len(payload) > len(self._buffer) or len(self._hashes) + len(hashes) > RUN_DOCUMENTS
        if self._hashes and full:
            self._flush()
        if len(payload) > len(self._buffer):
            self._buffer = np.empty(len(payload), self._job.dtype)
        self._buffer[self._used : self._used + len(payload)] = payload
        self._used += len(payload)
        self._lengths.append(lengths)
        self._hashes += hashes

    def finish(self) -> TaskSummary:
        if self._hashes:
            self._flush()
        return TaskSummary(self._runs, self._read, self._elements)

    def _flush(self) -> None:
        lengths = np.concatenate(self._lengths)
        hashes = np.frombuffer(b"".join(self._hashes), dtype=np.uint64).reshape(-1, 2)
        begins = lengths.cumsum() - lengths
        held = is_held_out(hashes, self._job.heldout)
        order = np.lexsort((hashes[:, 0], hashes[:, 1], held))
        if self._job.deduplicate:  # many copies of one text would all meet in one shard, and in its worker's memory
            order = order[is_first_copy(hashes[order])]
        train = int((~held[order]).sum())
        for part, documents in (("train", order[:train]), ("heldout", order[train:])):
            self._elements[part] += int(lengths[documents].sum())
        header = np.array([(1, train, len(order) - train, self._buffer.itemsize)], SortedRun.HEADER)
        pieces = [header, hashes[order, 1], hashes[order, 0], lengths[order].cumsum()]
        with finished(self._job.work / "runs" / f"{self._stem}-{self._runs:03d}.run") as temporary:
            with open(temporary, "wb") as file:
                for piece in pieces:
                    file.write(np.ascontiguousarray(piece).data)
                for at in range(0, len(order), GATHERED):
                    some = order[at : at + GATHERED]
                    spans = zip(begins[some].tolist(), (begins[some] + lengths[some]).tolist(), strict=True)
                    file.write(np.concatenate([self._buffer[a:b] for a, b in spans]).data)
                file.flush()
                os.fsync(file.fileno())
        self._runs += 1
        self._read += len(lengths)
        self._used, self._lengths, self._hashes = 0, [], []


@contextmanager
def finished(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which becomes it if nothing fails. Every process has its own."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_held_out(hashes: np.ndarray, share: float) -> np.ndarray:
    return hashes[:, 0] < np.uint64(heldout_below(share))


def is_first_copy(hashes: np.ndarray) -> np.ndarray:
    """Which of sorted hashes (n, 2) are not the same as the one before."""
    return np.concatenate([np.ones(min(1, len(hashes)), bool), (hashes[1:] != hashes[:-1]).any(axis=1)])


def batches(unit: InputSplit, settings: WriteSettings) -> Iterator[tuple[list[str], list[bytes]]]:
    """Yield a unit's documents, stripped, some at once: as text and as UTF-8."""
    texts: list[str] = []
    raws: list[bytes] = []
    size = 0
    for document in read_input_split(unit, settings.read):
        text, raw = replace_lone_surrogates(document.strip())
        if len(text) < settings.min_chars:
            continue
        texts.append(text)
        raws.append(raw)
        size += len(raw)
        if size >= BATCH_BYTES:
            yield texts, raws
            texts, raws, size = [], [], 0
    if texts:
        yield texts, raws


def write_sorted_runs(settings: WriteSettings, number: int, units: list[InputSplit]) -> None:
    """Write the runs of some units, and at last their summary, which makes them count."""
    writer = SortedRunWriter(settings, f"{number:06d}")
    for unit in units:
        for texts, raws in batches(unit, settings):
            tokenizer = workers.tokenizer(settings.tokenizer_path)
            if tokenizer is None:
                payload = np.frombuffer(b"".join(raws), dtype=np.uint8)
                lengths = np.fromiter(map(len, raws), np.int64, len(raws))
            else:
                payload, lengths = encode_flat(tokenizer, texts, settings.dtype)
            writer.add(payload, lengths, list(map(text_hash, raws)))
            workers.report(text_bytes=sum(map(len, raws)))
        workers.report(input_bytes=unit.size)
    write_atomically(summary_path(settings, number), json.dumps(writer.finish()._asdict()).encode())


def summary_path(settings: WriteSettings, number: int) -> Path:
    return settings.work / "runs" / f"{number:06d}.json"


def read_summary(settings: WriteSettings, number: int) -> TaskSummary:
    return TaskSummary(**json.loads(summary_path(settings, number).read_bytes()))


def run_paths(settings: WriteSettings, summaries: list[TaskSummary]) -> list[Path]:
    return [
        settings.work / "runs" / f"{n:06d}-{i:03d}.run"
        for n, summary in enumerate(summaries)
        for i in range(summary.runs)
    ]
