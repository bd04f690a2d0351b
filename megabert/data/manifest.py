"""What a folder of shards says about itself.

folder/manifest.json      per shard its hash, bytes, documents and tokens; the tokenizer's fingerprint; the held-out part
folder/chunks.npy         (chunks, 5) int64: where each chunk of each shard is, and its checksum
folder/train-00000.tar ...  heldout-00000.tar ...  tokenizer.json  token_counts.npy
"""

import hashlib
import io
import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megabert.data.sample_format import Kind

MANIFEST = "manifest.json"
CHUNKS = "chunks.npy"
TOKENIZER = "tokenizer.json"
TOKEN_COUNTS = "token_counts.npy"
FORMAT = 2

# A manifest may come from anywhere, and a name becomes a path: of the folder, or of the cache.
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")


class Chunk(NamedTuple):
    """One sample's place in its shard: bytes [offset, offset + size), whose CRC-32 is crc32.

    tokens: characters, in a text shard.
    """

    offset: int
    size: int
    documents: int
    tokens: int
    crc32: int


@dataclass(frozen=True, eq=False)
class Shard:
    """chunks: (n, 5) int64, rows as in Chunk."""

    name: str
    sha256: str
    bytes: int
    documents: int
    tokens: int
    chunks: np.ndarray

    def chunk(self, number: int) -> Chunk:
        return Chunk(*self.chunks[number].tolist())


@dataclass(frozen=True)
class TokenizerInfo:
    """fingerprint: sha256 of tokenizer.json; special_ids: {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4};
    all_special_ids: those and any other that never stands for text."""

    fingerprint: str
    vocab_size: int
    special_ids: dict[str, int]
    all_special_ids: tuple[int, ...]

    @cached_property
    def is_special(self) -> np.ndarray:
        """(vocab_size,) bool: the ids that are never masked and never a random token."""
        special = np.zeros(self.vocab_size, dtype=bool)
        special[list(self.all_special_ids)] = True
        return special

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """The ids that stand for text, int32."""
        return np.flatnonzero(~self.is_special).astype(np.int32)


@dataclass(frozen=True)
class Manifest:
    """splits: the shards of "train" and "heldout"; request: a hash of what was asked of write_shards.py."""

    kind: Kind
    splits: dict[str, tuple[Shard, ...]]
    statistics: dict = field(default_factory=dict)
    tokenizer: TokenizerInfo | None = None
    request: str = ""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write chunks.npy and then manifest.json, which makes the folder complete."""
    shards = [shard for part in manifest.splits.values() for shard in part]
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate([np.empty((0, len(Chunk._fields)), np.int64), *(s.chunks for s in shards)]))
    write_atomically(folder / CHUNKS, buffer.getvalue())
    tokenizer = manifest.tokenizer
    raw = {
        "format": FORMAT,
        "kind": manifest.kind,
        "tokenizer": tokenizer and {name: getattr(tokenizer, name) for name in TokenizerInfo.__dataclass_fields__},
        "statistics": manifest.statistics,
        "request": manifest.request,
        "chunks_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "splits": {name: [_shard_to_json(shard) for shard in part] for name, part in manifest.splits.items()},
    }
    write_atomically(folder / MANIFEST, json.dumps(raw, indent=1).encode() + b"\n")


def read_manifest(folder: str | Path) -> Manifest:
    """Read a local folder's manifest. Raises ValueError if there is none or it is not ours."""
    path = Path(folder) / MANIFEST
    try:
        data, chunks = path.read_bytes(), path.with_name(CHUNKS).read_bytes()
    except FileNotFoundError as missing:
        raise ValueError(
            f"{missing.filename}: no such file. Write shards there with data_prep/write_shards.py."
        ) from missing
    return parse_manifest(data, chunks, str(path))


def parse_manifest(data: bytes, chunks: bytes, where: str) -> Manifest:
    """Read manifest.json and chunks.npy from their bytes. `where` names the first in errors, all ValueErrors."""
    try:
        raw = json.loads(data)
    except ValueError as mistake:
        raise ValueError(f"{where}: not valid JSON: {mistake}") from mistake
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else None
        raise ValueError(f"{where}: format {found!r}, expected {FORMAT}. Write the shards again.")
    if hashlib.sha256(chunks).hexdigest() != raw["chunks_sha256"]:
        raise ValueError(f"{where}: {CHUNKS} beside it is not the one it was written with. Fetch or write both again.")
    index = np.load(io.BytesIO(chunks), allow_pickle=False)
    splits: dict[str, tuple[Shard, ...]] = {}
    first = 0
    for name, part in raw["splits"].items():
        shards = []
        for shard in part:
            if not SHARD_NAME.fullmatch(shard["name"]):
                raise ValueError(f"{where}: {shard['name']!r} is not a shard's name, such as train-00000.tar.")
            count = shard.pop("num_chunks")
            shards.append(Shard(chunks=index[first : first + count], **shard))
            first += count
        splits[name] = tuple(shards)
    info = raw["tokenizer"]
    tokenizer = info and TokenizerInfo(all_special_ids=tuple(info.pop("all_special_ids")), **info)
    return Manifest(raw["kind"], splits, raw["statistics"], tokenizer, raw["request"])


def _shard_to_json(shard: Shard) -> dict:
    plain = {name: getattr(shard, name) for name in ("name", "sha256", "bytes", "documents", "tokens")}
    return plain | {"num_chunks": len(shard.chunks)}


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step, on disk before it is visible."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
