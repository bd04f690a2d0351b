"""The second pass: each shard collects its range of hashes from all runs, and is written in an order of its own."""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data_prep.writing.length_statistics import LONGEST_COUNTED
from data_prep.writing.sorted_runs import SortedRun, WriteSettings, finished, is_first_copy
from megabert.data.shards.manifest import Chunk, Shard
from megabert.data.shards.sample_format import TokenChunk, encode_text, encode_tokens, write_sample

COUNTED_AT_ONCE = 1 << 20


class Documents(NamedTuple):
    """payload: token ids or UTF-8 end to end; lengths: of each document."""

    payload: np.ndarray
    lengths: np.ndarray


class ShardRecord(NamedTuple):
    """What a written shard adds to the manifest: its entry, lengths[n] documents of n tokens, ids[i] times id i."""

    shard: Shard
    lengths: np.ndarray
    ids: np.ndarray


def shard_name(part: str, number: int) -> str:
    return f"{part}-{number:05d}.tar"


def record_path(settings: WriteSettings, part: str, number: int) -> Path:
    return settings.work / "shards" / f"{shard_name(part, number)}.npz"


def write_shard(settings: WriteSettings, runs: list[Path], part: str, number: int, total: int) -> str:
    """Write shard `number` of `total` into its folder, and then its report, which makes it count. Returns its name."""
    documents = _collect(settings, runs, part, number, total)
    rng = np.random.default_rng([settings.seed, number, part == "heldout"])
    order = rng.permutation(
        np.flatnonzero(documents.lengths)
    )  # a text may come to nothing, such as a control character
    name = shard_name(part, number)
    with finished(settings.work / "shards" / name) as temporary, open(temporary, "w+b") as file:
        chunks = _write_chunks(file, name, documents, order, settings)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        sha256, size = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
    os.replace(settings.work / "shards" / name, settings.out / name)
    shard = Shard(name, sha256, size, len(order), int(chunks[:, 3].sum()), chunks)
    kept = documents.lengths[order]
    lengths = np.bincount(np.minimum(kept, LONGEST_COUNTED), minlength=LONGEST_COUNTED + 1)
    ids = _count(documents.payload) if settings.tokenizer_path else np.zeros(0, np.int64)
    write_record(record_path(settings, part, number), ShardRecord(shard, lengths, ids))
    return name


def _collect(settings: WriteSettings, runs: list[Path], part: str, number: int, total: int) -> Documents:
    """The shard's documents, sorted by hash, each once. One run is open at a time."""
    low, high = ((1 << 64) * i // total for i in (number, number + 1))
    pieces = [SortedRun(path, settings.dtype).read(part, low, high) for path in runs]
    payload, lengths, hashes = (np.concatenate(column) for column in zip(*pieces, strict=True))
    del pieces
    begins = lengths.cumsum() - lengths
    # Where copies are kept, they are all the same: their order does not matter.
    order = np.lexsort((hashes[:, 0], hashes[:, 1]))
    if settings.deduplicate:
        order = order[is_first_copy(hashes[order])]
    spans = zip(begins[order].tolist(), (begins[order] + lengths[order]).tolist(), strict=True)
    return Documents(np.concatenate([payload[:0], *(payload[a:b] for a, b in spans)]), lengths[order])


def _write_chunks(
    file: BinaryIO, name: str, documents: Documents, order: np.ndarray, settings: WriteSettings
) -> np.ndarray:
    """Write the documents in their order. Returns the shard's rows of the index."""
    begins = documents.lengths.cumsum() - documents.lengths
    chunks = []
    is_text = settings.tokenizer_path is None
    for group in _groups(order, documents.lengths, settings.chunk_tokens, cut=not is_text):
        parts = [documents.payload[begins[i] + a : begins[i] + b] for i, a, b in group]
        sample, tokens = _encode(parts, is_text)
        member = io.BytesIO()
        tar = tarfile.open(fileobj=member, mode="w", format=tarfile.USTAR_FORMAT)
        write_sample(tar, f"{name.removesuffix('.tar')}-{len(chunks):05d}", sample)
        data = member.getvalue()
        chunks.append(Chunk(file.tell(), len(data), len(group), tokens, zlib.crc32(data)))
        file.write(data)
    file.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of an archive
    return np.array(chunks, dtype=np.int64).reshape(-1, len(Chunk._fields))


def _groups(order: np.ndarray, lengths: np.ndarray, most: int, cut: bool) -> Iterator[list[tuple[int, int, int]]]:
    """Deal documents into chunks of at most `most` tokens: lists of (document, start, stop).

    A longer document is cut into several; or, without cut, has a chunk of its own.
    """
    group: list[tuple[int, int, int]] = []
    size = 0
    for document in order.tolist():
        length = int(lengths[document])
        for start in range(0, length, most if cut else length):
            stop = min(start + most, length) if cut else length
            if group and size + stop - start > most:
                yield group
                group, size = [], 0
            group.append((document, start, stop))
            size += stop - start
    if group:
        yield group


def _encode(parts: list[np.ndarray], is_text: bool) -> tuple[dict[str, bytes], int]:
    """One chunk as a sample, and its tokens (characters, for text)."""
    if is_text:
        strings = [part.tobytes().decode() for part in parts]
        return encode_text(strings), sum(map(len, strings))
    tokens = np.concatenate(parts)
    return encode_tokens(TokenChunk(tokens, np.array([len(part) for part in parts], dtype=np.int32))), len(tokens)


def _count(ids: np.ndarray) -> np.ndarray:
    """How often each id occurs. In pieces: bincount widens what it counts to 64 bits."""
    counts = np.zeros(int(ids.max(initial=0)) + 1, np.int64)
    for at in range(0, len(ids), COUNTED_AT_ONCE):
        counts += np.bincount(ids[at : at + COUNTED_AT_ONCE], minlength=len(counts))
    return counts


def write_record(path: Path, report: ShardRecord) -> None:
    plain = {name: getattr(report.shard, name) for name in ("name", "sha256", "bytes", "documents", "tokens")}
    with finished(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file, shard=np.array(json.dumps(plain)), chunks=report.shard.chunks, lengths=report.lengths, ids=report.ids
        )


def read_record(path: Path) -> ShardRecord:
    with np.load(path, allow_pickle=False) as entry:
        shard = Shard(chunks=entry["chunks"], **json.loads(str(entry["shard"])))
        return ShardRecord(shard, entry["lengths"], entry["ids"])
