"""Collect the documents of each shard from the sorted runs and write them, the second of the two passes."""

import io
import json
import secrets
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data_prep.writing.length_statistics import LONGEST_COUNTED
from data_prep.writing.merged_runs import ShardCounts, collect, read_shard
from data_prep.writing.sorted_runs import WriteSettings
from megabert.data.shards.manifest import Chunk, Shard
from megabert.data.shards.sample_format import TokenChunk, encode_text, encode_tokens, write_sample
from megabert.files.atomic import new_file
from megabert.files.hashing import hash_and_sync

COUNTED_AT_ONCE = 1 << 20


class Documents(NamedTuple):
    """payload: token ids or UTF-8 of all documents, concatenated; lengths: each document's length."""

    payload: np.ndarray
    lengths: np.ndarray


class ShardRecord(NamedTuple):
    """What a written shard adds to the manifest.

    lengths: (LONGEST_COUNTED + 1,), the number of documents of each length; ids: how often each token id occurs.
    """

    shard: Shard
    lengths: np.ndarray
    ids: np.ndarray


def shard_name(part: str, number: int) -> str:
    return f"{part}-{number:05d}.tar"


def record_path(settings: WriteSettings, part: str, number: int) -> Path:
    return settings.work / "shards" / f"{shard_name(part, number)}.npz"


def write_shard(settings: WriteSettings, files: list[Path], part: str, number: int, counts: ShardCounts) -> str:
    """Write a shard, then its record. A shard without a record is written again. Returns its name.

    files: sorted runs or merged files; counts: shards of each part.
    """
    documents = _collect(settings, files, part, number, counts)
    rng = np.random.default_rng([settings.seed, number, part == "heldout"])
    # The normalizer of a tokenizer can leave nothing of a text, such as of a control character.
    order = rng.permutation(np.flatnonzero(documents.lengths))
    name = shard_name(part, number)
    # Two machines may write the same shard, if one of them is thought to be dead.
    unfinished = settings.work / "shards" / f"{name}.{secrets.token_hex(4)}.tmp"
    with new_file(settings.out / name, unfinished) as temporary:
        with open(temporary, "wb") as file:
            chunks = _write_chunks(file, name, documents, order, settings)
        size, sha256 = hash_and_sync(temporary)
    shard = Shard(name, sha256, size, len(order), int(chunks[:, 3].sum()), chunks)
    kept = documents.lengths[order]
    lengths = np.bincount(np.minimum(kept, LONGEST_COUNTED), minlength=LONGEST_COUNTED + 1)
    ids = _count(documents.payload) if settings.tokenizer else np.zeros(0, np.int64)
    write_shard_record(record_path(settings, part, number), ShardRecord(shard, lengths, ids))
    return name


def _collect(settings: WriteSettings, files: list[Path], part: str, number: int, counts: ShardCounts) -> Documents:
    """Return the documents of a shard, sorted by hash and without copies. Only one file is open at a time."""
    found = collect(settings, [read_shard(path, settings, part, number, counts) for path in files])
    return Documents(np.concatenate([found.payload[:0], *found.gathered()]), found.lengths)


def _write_chunks(
    file: BinaryIO, name: str, documents: Documents, order: np.ndarray, settings: WriteSettings
) -> np.ndarray:
    """Write the documents in the given order. Returns (chunks, 5) int64, rows as in Chunk."""
    begins = documents.lengths.cumsum() - documents.lengths
    chunks = []
    is_text = settings.tokenizer is None
    for group in _chunk_groups(order, documents.lengths, settings.chunk_tokens, cut=not is_text):
        parts = [documents.payload[begins[i] + a : begins[i] + b] for i, a, b in group]
        sample, tokens = _encode(parts, is_text)
        member = io.BytesIO()
        tar = tarfile.open(fileobj=member, mode="w", format=tarfile.USTAR_FORMAT)
        write_sample(tar, f"{name.removesuffix('.tar')}-{len(chunks):05d}", sample)
        data = member.getvalue()
        chunks.append(Chunk(file.tell(), len(data), len(group), tokens, zlib.crc32(data)))
        file.write(data)
    # These zeros are the end marker of a tar archive.
    file.write(bytes(2 * tarfile.BLOCKSIZE))
    return np.array(chunks, dtype=np.int64).reshape(-1, len(Chunk._fields))


def _chunk_groups(
    order: np.ndarray, lengths: np.ndarray, max_tokens: int, cut: bool
) -> Iterator[list[tuple[int, int, int]]]:
    """Group documents into chunks of at most `max_tokens` tokens: lists of (document, start, stop).

    cut: whether a longer document is cut into several chunks; otherwise it gets a chunk of its own.
    """
    group: list[tuple[int, int, int]] = []
    size = 0
    for document in order.tolist():
        length = int(lengths[document])
        for start in range(0, length, max_tokens if cut else length):
            stop = min(start + max_tokens, length) if cut else length
            if group and size + stop - start > max_tokens:
                yield group
                group, size = [], 0
            group.append((document, start, stop))
            size += stop - start
    if group:
        yield group


def _encode(parts: list[np.ndarray], is_text: bool) -> tuple[dict[str, bytes], int]:
    """Encode one chunk as a sample. Returns it and its number of tokens, or of characters for text."""
    if is_text:
        strings = [part.tobytes().decode() for part in parts]
        return encode_text(strings), sum(map(len, strings))
    tokens = np.concatenate(parts)
    return encode_tokens(TokenChunk(tokens, np.array([len(part) for part in parts], dtype=np.int32))), len(tokens)


def _count(ids: np.ndarray) -> np.ndarray:
    """Count how often each id occurs. In pieces, because bincount converts its input to 64 bits."""
    counts = np.zeros(int(ids.max(initial=0)) + 1, np.int64)
    for at in range(0, len(ids), COUNTED_AT_ONCE):
        counts += np.bincount(ids[at : at + COUNTED_AT_ONCE], minlength=len(counts))
    return counts


def write_shard_record(path: Path, record: ShardRecord) -> None:
    shard = record.shard
    plain = {name: getattr(shard, name) for name in ("name", "sha256", "bytes", "documents", "tokens")}
    with new_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, shard=np.array(json.dumps(plain)), chunks=shard.chunks, lengths=record.lengths, ids=record.ids)


def read_record(path: Path) -> ShardRecord:
    with np.load(path, allow_pickle=False) as entry:
        shard = Shard(chunks=entry["chunks"], **json.loads(str(entry["shard"])))
        return ShardRecord(shard, entry["lengths"], entry["ids"])
