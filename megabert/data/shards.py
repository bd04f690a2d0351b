"""Shards on disk: the manifest that lists them, the splits they are dealt in, and reading one chunk of them.

folder/manifest.json  what is here: per shard its hash, its chunks and where they start; the tokenizer's
                      fingerprint; the held-out part
folder/train-00000.tar ...  heldout-00000.tar ...  tokenizer.json  token_counts.npy
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import braceexpand
import numpy as np

from megabert.data.sample_format import Kind, TokenChunk, decode_tokens, read_sample

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
TOKEN_COUNTS = "token_counts.npy"
FORMAT = 1

# A source with fewer shards than this has each cut into equal ranges of its chunks: enough to deal to 8 ranks,
# 3 streams each. More than any cluster's ranks would only make the ranges shorter than a read-ahead.
MIN_SPLITS = 24


class Chunk(NamedTuple):
    """One sample's place in its shard: bytes [offset, offset + size)."""

    offset: int
    size: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Shard:
    name: str
    sha256: str
    bytes: int
    documents: int
    tokens: int
    chunks: tuple[Chunk, ...]


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
    kind: Kind
    splits: dict[str, tuple[Shard, ...]]
    statistics: dict = field(default_factory=dict)
    tokenizer: TokenizerInfo | None = None
    request: str = ""
    format: int = FORMAT


class Split(NamedTuple):
    """A run of chunks [first, last) of one shard."""

    shard: int
    first: int
    last: int


@dataclass(frozen=True)
class Source:
    """The shards of one part of a folder ("train" or "heldout") that a run reads."""

    folder: str
    manifest: Manifest
    shards: tuple[Shard, ...]

    @property
    def tokenizer(self) -> TokenizerInfo:
        if self.manifest.tokenizer is None:
            raise ValueError(
                f"{self.folder}: holds text, expected tokens. Tokenize it with data_prep/write_shards.py --tokenizer."
            )
        return self.manifest.tokenizer

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """A name for exactly these shards in this order: sha256 over every one's hash."""
        return hashlib.sha256("\n".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def splits(self) -> list[Split]:
        """Cut the shards into splits: one each, or equal ranges of chunks where there are few."""
        pieces = max(1, -(-MIN_SPLITS // len(self.shards)))
        splits = []
        for number, shard in enumerate(self.shards):
            bounds = np.linspace(0, len(shard.chunks), min(pieces, len(shard.chunks)) + 1).round().astype(int).tolist()
            splits += [Split(number, a, b) for a, b in pairwise(bounds)]
        return splits

    def read_chunk(self, shard: int, chunk: int) -> TokenChunk:
        """Read one chunk's tokens. Raises ValueError naming shard and chunk if it is damaged."""
        entry = self.shards[shard]
        place = entry.chunks[chunk]
        path = os.path.join(self.folder, entry.name)
        where = f"{path} chunk {chunk} (byte {place.offset})"
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as missing:
            raise ValueError(f"{path}: the shard is missing.") from missing
        try:
            data = os.pread(descriptor, place.size, place.offset)
        finally:
            os.close(descriptor)
        if len(data) != place.size:
            raise ValueError(
                f"{where}: {len(data)} bytes, expected {place.size}: the shard is truncated. Fetch or write it again."
            )
        decoded = decode_tokens(read_sample(data, where), where)
        if (len(decoded.lengths), len(decoded.tokens)) != (place.documents, place.tokens):
            raise ValueError(
                f"{where}: {len(decoded.lengths)} documents of {len(decoded.tokens)} tokens, but the manifest says "
                f"{place.documents} of {place.tokens}. Fetch or write both again."
            )
        return decoded


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, complete or not at all."""
    write_atomically(folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode() + b"\n")


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step, on disk before it is visible."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_manifest(folder: str | Path) -> Manifest:
    """Read a folder's manifest. Raises ValueError if there is none or it is not ours."""
    path = Path(folder) / MANIFEST
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError as missing:
        raise ValueError(f"{path}: no such file. Write shards there with data_prep/write_shards.py.") from missing
    except json.JSONDecodeError as mistake:
        raise ValueError(f"{path}: not valid JSON: {mistake}") from mistake
    if raw.get("format") != FORMAT:
        raise ValueError(f"{path}: format {raw.get('format')!r}, expected {FORMAT}. Write the shards again.")
    splits = {
        name: tuple(Shard(chunks=tuple(Chunk(*chunk) for chunk in shard.pop("chunks")), **shard) for shard in shards)
        for name, shards in raw.pop("splits").items()
    }
    info = raw.pop("tokenizer")
    tokenizer = info and TokenizerInfo(all_special_ids=tuple(info.pop("all_special_ids")), **info)
    return Manifest(splits=splits, tokenizer=tokenizer, **raw)


def open_source(pattern: str, part: str = "train") -> Source:
    """Find the shards that a recipe names: a folder with a manifest, or tar files of one in brace notation.

    Raises ValueError for a missing manifest or shard, an unknown shard name, or a part without documents.
    """
    names: set[str] | None = None
    folder = pattern
    if pattern.endswith(".tar"):
        paths = [Path(path) for path in braceexpand.braceexpand(pattern)]
        folders = sorted({str(path.parent) for path in paths})
        if len(folders) != 1:
            raise ValueError(f"{pattern}: spans the folders {', '.join(folders)}, expected one with one manifest.")
        folder, names = folders[0], {path.name for path in paths}
    manifest = read_manifest(folder)
    shards = manifest.splits.get(part, ())
    if names is not None:
        known = {shard.name for shard in shards}
        if unknown := sorted(names - known):
            raise ValueError(f"{folder}: {unknown[0]} is not among the manifest's {len(known)} {part} shards.")
        shards = tuple(shard for shard in shards if shard.name in names)
    shards = tuple(shard for shard in shards if shard.documents)
    if not shards:
        remedy = "with --heldout 0.001 or more" if part == "heldout" else "from a corpus that has some"
        raise ValueError(f"{folder}: the {part} part has no documents. Write the shards again {remedy}.")
    for shard in shards:
        path = Path(folder, shard.name)
        if not path.is_file():
            raise ValueError(f"{path}: the manifest lists this shard, but it is missing. Fetch or write it again.")
        if (size := path.stat().st_size) != shard.bytes:
            raise ValueError(f"{path}: {size} bytes, but the manifest says {shard.bytes}. Fetch or write it again.")
    return Source(folder, manifest, shards)


def check_same_tokenizer(source: Source, other: Source) -> None:
    """Raise ValueError unless both were written with one tokenizer."""
    first, second = source.tokenizer, other.tokenizer
    if first.fingerprint != second.fingerprint:
        raise ValueError(
            f"{other.folder}: written with tokenizer {second.fingerprint[:12]}, but {source.folder} with "
            f"{first.fingerprint[:12]}. Write one of them again with the other's {TOKENIZER}."
        )


def check_tokenizer_file(source: Source) -> Path:
    """Find the tokenizer.json beside the shards. Raises ValueError if it is not the one they were written with."""
    path = Path(source.folder) / TOKENIZER
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it belongs beside the shards. Write them again, or copy it there.")
    fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
    if fingerprint != source.tokenizer.fingerprint:
        raise ValueError(
            f"{path}: its fingerprint is {fingerprint[:12]}, but the shards were written with "
            f"{source.tokenizer.fingerprint[:12]}. Put that tokenizer back, or write the shards again."
        )
    return path


def stream_count(num_splits: int, max_streams: int) -> int:
    """Give N, the streams of a run: the largest 2^a or 3 * 2^a that neither splits nor max_streams are fewer than."""
    limit = min(num_splits, max_streams)
    return max(n for a in range(limit.bit_length()) for n in (1 << a, 3 << a) if n <= limit)


class SplitOrder:
    """The endless list of splits: each epoch is a fresh seeded permutation of all, one after the other.

    Stream n of N reads entries n, n + N, n + 2N, ...
    """

    def __init__(self, num_splits: int, seed: int):
        self.num_splits = num_splits
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __getitem__(self, entry: int) -> int:
        epoch, place = divmod(entry, self.num_splits)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.num_splits)
            self._epoch = epoch
        return int(self._order[place])
