"""The manifest of a folder of shards: what it contains, how it is written, and how it is validated.

folder/manifest.json      hash, bytes, documents and tokens of each shard; the tokenizer's fingerprint; statistics
folder/chunks.npy         (chunks, 5) int64: where each chunk of each shard is, and its checksum
folder/train-00000.tar ...  heldout-00000.tar ...  tokenizer.json  token_counts.npy
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np

from megabert.data.shards.sample_format import SPECIAL_TOKENS, Kind, encode_npy, read_npy
from megabert.files.atomic import write_atomically

MANIFEST = "manifest.json"
CHUNKS = "chunks.npy"
TOKENIZER = "tokenizer.json"
TOKEN_COUNTS = "token_counts.npy"
FORMAT = 2

# A manifest may come from an untrusted server, and a shard's name becomes a path in the folder or in the cache.
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.tar")
MAX_CHUNK_BYTES = 1 << 30  # enough for the longest text; a chunk of tokens has less than 2 MB
MAX_VOCAB_SIZE = 1 << 24  # 60 times the largest vocabulary in use


class Chunk(NamedTuple):
    """Where a chunk is in its shard: bytes [offset, offset + size), whose CRC-32 is crc32.

    tokens: for a text shard, characters.
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
    """The tokenizer of a folder of shards.

    fingerprint: sha256 of tokenizer.json. special_ids: {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}.
    all_special_ids: these and any other ids that never represent text.
    """

    fingerprint: str
    vocab_size: int
    special_ids: dict[str, int]
    all_special_ids: tuple[int, ...]

    @cached_property
    def is_special(self) -> np.ndarray:
        """(vocab_size,) bool: True for ids that are never masked and never chosen as a random token."""
        special = np.zeros(self.vocab_size, dtype=bool)
        special[list(self.all_special_ids)] = True
        return special

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """The ids that represent text, int32."""
        return np.flatnonzero(~self.is_special).astype(np.int32)


@dataclass(frozen=True)
class Manifest:
    """splits: the shards of "train" and "heldout". request: a hash of the settings of write_shards.py."""

    kind: Kind
    splits: dict[str, tuple[Shard, ...]]
    statistics: dict = field(default_factory=dict)
    tokenizer: TokenizerInfo | None = None
    request: str = ""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write chunks.npy and then manifest.json, whose presence means that the folder is complete."""
    shards = [shard for part in manifest.splits.values() for shard in part]
    index = encode_npy(np.concatenate([np.empty((0, len(Chunk._fields)), np.int64), *(s.chunks for s in shards)]))
    write_atomically(folder / CHUNKS, index)
    tokenizer = manifest.tokenizer
    raw = {
        "format": FORMAT,
        "kind": manifest.kind,
        "tokenizer": tokenizer and {name: getattr(tokenizer, name) for name in TokenizerInfo.__dataclass_fields__},
        "statistics": manifest.statistics,
        "request": manifest.request,
        "chunks_sha256": hashlib.sha256(index).hexdigest(),
        "splits": {name: [_shard_to_json(shard) for shard in part] for name, part in manifest.splits.items()},
    }
    write_atomically(folder / MANIFEST, json.dumps(raw, indent=1).encode() + b"\n")


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a local folder. Raises ValueError if there is none or it is not valid."""
    path = Path(folder) / MANIFEST
    try:
        data, chunks = path.read_bytes(), path.with_name(CHUNKS).read_bytes()
    except FileNotFoundError as missing:
        raise ValueError(
            f"{missing.filename}: no such file. Write shards there with data_prep/write_shards.py."
        ) from missing
    return parse_manifest(data, chunks, str(path))


def parse_manifest(data: bytes, chunks: bytes, where: str) -> Manifest:
    """Parse the bytes of manifest.json and chunks.npy. Raises ValueError, naming the file by `where`."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        remedy = "Upgrade megabert, or write the shards again" if newer else "Write the shards again"
        raise ValueError(f"{where}: format {found!r}, expected {FORMAT}. {remedy}.")
    if hashlib.sha256(chunks).hexdigest() != raw.get("chunks_sha256"):
        raise ValueError(f"{where}: belongs to another {CHUNKS} than the one next to it. Fetch or write both again.")
    index = read_npy(chunks, f"{where}: {CHUNKS}")
    try:
        splits = _splits(raw["splits"], index, where)
        info = raw["tokenizer"]
        tokenizer = info and TokenizerInfo(**info | {"all_special_ids": tuple(info["all_special_ids"])})
        manifest = Manifest(raw["kind"], splits, raw["statistics"], tokenizer, raw["request"])
        problem = _find_problem(manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not a manifest of write_shards.py: {error!r}. Write the shards again.") from error
    if problem:
        raise ValueError(f"{where}: {problem}. Write the shards again.")
    return manifest


def _splits(raw: dict, index: np.ndarray, where: str) -> dict[str, tuple[Shard, ...]]:
    splits: dict[str, tuple[Shard, ...]] = {}
    first = 0
    for name, part in raw.items():
        shards = []
        for entry in part:
            plain = entry.copy()
            count = plain.pop("num_chunks")
            if not SHARD_NAME.fullmatch(plain["name"]):
                raise ValueError(f"{where}: {plain['name']!r} is not a shard's name, such as train-00000.tar.")
            if type(count) is not int or not 0 <= count <= len(index) - first:
                raise ValueError(
                    f"{where}: {plain['name']} has {count!r} chunks, {CHUNKS} has {len(index) - first} left."
                )
            shards.append(Shard(chunks=index[first : first + count], **plain))
            first += count
        splits[name] = tuple(shards)
    return splits


def _find_problem(manifest: Manifest) -> str | None:
    """Describe a value that would make a reader fetch, allocate or index something impossible, or return None."""
    info = manifest.tokenizer
    if manifest.kind not in get_args(Kind) or (manifest.kind == "tokens") != (info is not None):
        return (
            f"kind {manifest.kind!r} with {'a' if info else 'no'} tokenizer, expected tokens with one or text without"
        )
    if info is not None:
        if type(info.vocab_size) is not int or not 0 < info.vocab_size <= MAX_VOCAB_SIZE:
            return f"a vocabulary of {info.vocab_size}, expected 1 to {MAX_VOCAB_SIZE}"
        special = (*info.special_ids.values(), *info.all_special_ids)
        if info.special_ids.keys() != SPECIAL_TOKENS.keys():
            return f"the special tokens {', '.join(info.special_ids)}, expected {', '.join(SPECIAL_TOKENS)}"
        if not all(type(number) is int and 0 <= number < info.vocab_size for number in special):
            return f"a special id beyond its vocabulary of {info.vocab_size}"
        if len(set(info.special_ids.values())) < len(SPECIAL_TOKENS) or set(info.special_ids.values()) - set(
            info.all_special_ids
        ):
            return "special tokens that share an id, or are not among all_special_ids"
        if not isinstance(info.fingerprint, str):
            return f"a fingerprint {info.fingerprint!r}"
        median = isinstance(manifest.statistics, dict) and manifest.statistics.get("median_document_tokens")
        if type(median) is not int or median < 0:
            return "no median_document_tokens among its statistics"
    if not isinstance(manifest.statistics, dict):
        return "statistics that are not a table"
    for shard in (shard for part in manifest.splits.values() for shard in part):
        if not all(type(count) is int and count >= 0 for count in (shard.bytes, shard.documents, shard.tokens)):
            return f"{shard.name} with {shard.bytes!r} bytes, {shard.documents!r} documents, {shard.tokens!r} tokens"
        if shard.chunks.dtype != np.int64 or shard.chunks.shape[1:] != (len(Chunk._fields),):
            return (
                f"{CHUNKS} has {shard.chunks.dtype} of shape {shard.chunks.shape}, "
                f"expected int64 in {len(Chunk._fields)} columns"
            )
        offsets, sizes = shard.chunks[:, 0], shard.chunks[:, 1]
        if (shard.chunks < 0).any() or (sizes > MAX_CHUNK_BYTES).any() or (offsets > shard.bytes - sizes).any():
            return (
                f"{shard.name} has a chunk outside its {shard.bytes} bytes, or of more than {MAX_CHUNK_BYTES >> 20} MB"
            )
    return None


def _shard_to_json(shard: Shard) -> dict:
    plain = {name: getattr(shard, name) for name in ("name", "sha256", "bytes", "documents", "tokens")}
    return plain | {"num_chunks": len(shard.chunks)}
