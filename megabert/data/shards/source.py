"""A corpus to read from: its sources, the splits they are dealt in, and one chunk of them at a time."""

import hashlib
import logging
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from megabert.data.shards.cache import CacheOptions, Expected, WrongContentError
from megabert.data.shards.manifest import (
    CHUNKS,
    MANIFEST,
    TOKEN_COUNTS,
    TOKENIZER,
    Manifest,
    Shard,
    TokenizerInfo,
    parse_manifest,
)
from megabert.data.shards.sample_format import (
    TokenChunk,
    decode_text,
    decode_tokens,
    read_npy,
    read_sample,
    token_dtype,
)
from megabert.data.shards.storage import Storage, open_storage
from megabert.data.shards.tokenizer import encode_flat, find_tokenizer, read_tokenizer

log = logging.getLogger(__name__)

# A source with fewer shards than this has each cut into equal ranges of its chunks: enough to deal to 8 ranks,
# 3 streams each. More than any cluster's ranks would only make the ranges shorter than a read-ahead.
MIN_SPLITS = 24

# Text that is tokenized on the fly has no statistics of its tokens; those of this many chunks stand for all.
SAMPLED_CHUNKS = 16


class DamagedShardError(ValueError):
    """A shard that is missing, cut short, or not what its manifest says; names shard and chunk."""


class Split(NamedTuple):
    """A run of chunks [first, last) of one shard."""

    shard: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Source:
    """The shards of one part ("train" or "heldout") of one folder that a run reads.

    tokenizer_path: for text, which is tokenized as it is read.
    """

    folder: str
    storage: Storage
    manifest: Manifest
    shards: tuple[Shard, ...]
    tokenizer_path: Path | None = None

    @cached_property
    def tokenizer(self) -> TokenizerInfo:
        if self.tokenizer_path is not None:
            return find_tokenizer(self.tokenizer_path)[1]
        assert self.manifest.tokenizer is not None, "token shards have a tokenizer"
        return self.manifest.tokenizer

    @property
    def tokens(self) -> int:
        """Tokens of all documents; characters, for text."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """A name for exactly these tokens in this order: sha256 over every shard's hash, and for text the tokenizer's."""
        parts = [shard.sha256 for shard in self.shards]
        if self.tokenizer_path is not None:
            parts.append(self.tokenizer.fingerprint)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @cached_property
    def num_chunks(self) -> int:
        return sum(len(shard.chunks) for shard in self.shards)

    @cached_property
    def known_damaged(self) -> set[tuple[int, int]]:
        """(shard, chunk) that this process has said something about."""
        return set()

    @cached_property
    def splits(self) -> list[Split]:
        """The shards cut into splits: one each, or equal ranges of chunks where there are few."""
        pieces = max(1, -(-MIN_SPLITS // len(self.shards)))
        splits = []
        for number, shard in enumerate(self.shards):
            bounds = np.linspace(0, len(shard.chunks), min(pieces, len(shard.chunks)) + 1).round().astype(int).tolist()
            splits += [Split(number, a, b) for a, b in pairwise(bounds)]
        return splits

    def read_chunk(self, shard: int, chunk: int) -> TokenChunk:
        """Read one chunk's tokens. Raises DamagedShardError if it is, OSError if it cannot be fetched."""
        entry = self.shards[shard]
        place = entry.chunk(chunk)
        url = self.storage.url(entry.name)
        where = f"{url} chunk {chunk} (byte {place.offset})"
        expected = Expected(entry.bytes, entry.sha256)
        try:
            data = self.storage.read(entry.name, place.offset, place.size, expected)
            if zlib.crc32(data) != place.crc32 and self.storage.forget(entry.name, expected):  # rotten in the cache
                data = self.storage.read(entry.name, place.offset, place.size, expected)
        except FileNotFoundError as missing:
            raise DamagedShardError(f"{where}: the shard is missing. Fetch or write it again.") from missing
        except WrongContentError as mistake:
            raise DamagedShardError(f"{where}: {mistake}. Fetch or write the shard again.") from mistake
        if len(data) != place.size:
            raise DamagedShardError(
                f"{where}: {len(data)} bytes, expected {place.size}: the shard is truncated. Fetch or write it again."
            )
        if zlib.crc32(data) != place.crc32:
            raise DamagedShardError(f"{where}: its checksum is not the manifest's: damaged. Fetch or write it again.")
        try:
            decoded = self._decode(data, where)
        except ValueError as mistake:
            raise DamagedShardError(str(mistake)) from mistake
        if len(decoded.lengths) != place.documents:
            raise DamagedShardError(
                f"{where}: {len(decoded.lengths)} documents, but the manifest says {place.documents}. Write both again."
            )
        return decoded

    def _decode(self, data: bytes, where: str) -> TokenChunk:
        sample = read_sample(data, where)
        if self.tokenizer_path is None:
            decoded = decode_tokens(sample, where)
            if len(decoded.tokens) and decoded.tokens.max() >= self.tokenizer.vocab_size:
                raise ValueError(
                    f"{where}: holds id {decoded.tokens.max()}, but the vocabulary has {self.tokenizer.vocab_size}."
                )
            return decoded
        dtype = token_dtype(self.tokenizer.vocab_size)
        return TokenChunk(*encode_flat(self.encoder, decode_text(sample, where), dtype))

    @cached_property
    def encoder(self) -> Tokenizer:
        """What turns text into ids."""
        assert self.tokenizer_path is not None, "only text is encoded"
        return read_tokenizer(self.tokenizer_path)

    def prefetch(self, shard: int) -> None:
        """Begin to fetch a shard that will be read soon, where shards are fetched whole."""
        entry = self.shards[shard]
        self.storage.prefetch(entry.name, Expected(entry.bytes, entry.sha256))

    @cached_property
    def median_document_tokens(self) -> int:
        if self.tokenizer_path is None:
            return int(self.manifest.statistics["median_document_tokens"])
        lengths = np.concatenate([chunk.lengths for chunk in self._sample()])
        return int(np.median(lengths)) if len(lengths) else 1

    @cached_property
    def token_counts(self) -> np.ndarray:
        """(vocab_size,) how often each id occurs in the training shards (text: in a sample of these)."""
        size = self.tokenizer.vocab_size
        if self.tokenizer_path is None:
            url = self.storage.url(TOKEN_COUNTS)
            counts = read_npy(self.storage.read_whole(TOKEN_COUNTS), url)
            if counts.shape != (size,) or counts.dtype.kind not in "iu" or counts.min() < 0:
                raise ValueError(
                    f"{url}: {counts.dtype} of shape {counts.shape}, expected {size} counts. Write the shards again."
                )
            return counts
        return sum((np.bincount(chunk.tokens, minlength=size) for chunk in self._sample()), np.zeros(size, np.int64))

    def _sample(self) -> list[TokenChunk]:
        """Some chunks from all over. Damaged ones are left out: reading them for training says so."""
        chunks = [(number, chunk) for number, shard in enumerate(self.shards) for chunk in range(len(shard.chunks))]
        found = []
        for i in range(0, len(chunks), -(-len(chunks) // SAMPLED_CHUNKS)):
            with suppress(DamagedShardError):
                found.append(self.read_chunk(*chunks[i]))
        if not found:
            raise DamagedShardError(f"{self.folder}: none of {SAMPLED_CHUNKS} chunks from all over it can be read.")
        return found

    def read_tokenizer_file(self) -> bytes:
        """The tokenizer.json that the ids belong to. Raises ValueError if it is not the one they were written with."""
        if self.tokenizer_path is not None:
            return self.tokenizer_path.read_bytes()
        url = self.storage.url(TOKENIZER)
        try:
            data = self.storage.read_whole(TOKENIZER)
        except FileNotFoundError as missing:
            raise ValueError(
                f"{url}: no such file; it belongs beside the shards. Write them again, or copy it there."
            ) from missing
        fingerprint = hashlib.sha256(data).hexdigest()
        if fingerprint != self.tokenizer.fingerprint:
            raise ValueError(
                f"{url}: its fingerprint is {fingerprint[:12]}, but the shards were written with "
                f"{self.tokenizer.fingerprint[:12]}. Put that tokenizer back, or write the shards again."
            )
        return data

    def read_beside(self, name: str) -> bytes | None:
        """A small file beside the tokenizer, or None if there is none."""
        try:
            if self.tokenizer_path is not None:
                return self.tokenizer_path.with_name(name).read_bytes()
            return self.storage.read_whole(name)
        except OSError:  # a web server may answer anything for a file that it has not
            return None


@dataclass(frozen=True, eq=False)
class Corpus:
    """Sources and the share of the tokens that each contributes; a single source has all. Weights sum to 1."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    on_bad_shard: str = "stop"

    @property
    def tokenizer(self) -> TokenizerInfo:
        return self.sources[0].tokenizer

    @property
    def name(self) -> str:
        return ", ".join(source.folder for source in self.sources)

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources)

    @property
    def num_splits(self) -> int:
        """Of the source that has most: the others are read through more than once while it is."""
        return max(len(source.splits) for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """A name for exactly these shards in this mixture."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        parts = [f"{source.fingerprint} {weight!r}" for source, weight in zip(self.sources, self.weights, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def median_document_tokens(self) -> int:
        """The shortest of the sources' medians: what bounds the documents of a bin must suit them all."""
        return min(source.median_document_tokens for source in self.sources)

    @property
    def token_shares(self) -> np.ndarray:
        """(vocab_size,) share of each id among the tokens that training sees. Counts are smoothed by one."""
        shares = np.zeros(self.tokenizer.vocab_size)
        for source, weight in zip(self.sources, self.weights, strict=True):
            counts = source.token_counts.astype(np.float64) + 1
            shares += weight * counts / counts.sum()
        return shares


def open_corpus(
    parts: Sequence[tuple[str, float]],
    part: str = "train",
    *,
    tokenizer: str | None = None,
    cache: CacheOptions = CacheOptions(),  # noqa: B008 (immutable)
    on_bad_shard: str = "stop",
) -> Corpus:
    """Open every (location, weight). Raises ValueError as open_source does, and for sources of different tokenizers."""
    sources = tuple(
        open_source(location, part, tokenizer=tokenizer, cache=cache, on_bad_shard=on_bad_shard)
        for location, _ in parts
    )
    for source in sources[1:]:
        check_same_tokenizer(sources[0], source)
    total = sum(weight for _, weight in parts)
    return Corpus(sources, tuple(weight / total for _, weight in parts), on_bad_shard)


def open_source(
    location: str,
    part: str = "train",
    *,
    tokenizer: str | None = None,
    cache: CacheOptions = CacheOptions(),  # noqa: B008 (immutable)
    on_bad_shard: str = "stop",
) -> Source:
    """Find the shards that a recipe names: a folder with a manifest, or tar files of one in brace notation.

    Raises ValueError for a missing manifest or shard, an unknown shard name, a part without documents, or text without
    a tokenizer.
    """
    storage, names = open_storage(location, cache)
    folder = storage.url("").rstrip("/")
    manifest = fetch_manifest(storage)
    shards = manifest.splits.get(part, ())
    if names is not None and part == "train":
        known = {shard.name for shard in shards}
        if unknown := sorted(set(names) - known):
            raise ValueError(f"{folder}: {unknown[0]} is not among the manifest's {len(known)} {part} shards.")
        shards = tuple(shard for shard in shards if shard.name in set(names))
    shards = tuple(shard for shard in shards if shard.documents)
    if not shards:
        remedy = "with --heldout 0.001 or more" if part == "heldout" else "from a corpus that has some"
        raise ValueError(f"{folder}: the {part} part has no documents. Write the shards again {remedy}.")
    for problem in _sizes_that_differ(storage, shards):
        if on_bad_shard == "stop":
            raise DamagedShardError(problem)
        log.warning("%s", problem)
    if manifest.kind == "text" and tokenizer is None:
        raise ValueError(
            f"{folder}: holds text, expected tokens. Name a tokenizer with data.tokenizer to tokenize it on the fly, "
            "or write token shards with data_prep/write_shards.py --tokenizer."
        )
    path = find_tokenizer(tokenizer)[0] if manifest.kind == "text" and tokenizer else None
    return Source(folder, storage, manifest, shards, path)


def fetch_manifest(storage: Storage) -> Manifest:
    """Read the manifest beside the shards. Raises ValueError if there is none or it is not ours."""
    found = []
    for name in (MANIFEST, CHUNKS):
        try:
            found.append(storage.read_whole(name))
        except (FileNotFoundError, NotADirectoryError) as missing:
            raise ValueError(
                f"{storage.url(name)}: no such file. Write shards there with data_prep/write_shards.py."
            ) from missing
    return parse_manifest(found[0], found[1], storage.url(MANIFEST))


def _sizes_that_differ(storage: Storage, shards: tuple[Shard, ...]) -> list[str]:
    """What is wrong with shards at first sight, where looking is cheap."""
    problems = []
    for shard in shards:
        url = storage.url(shard.name)
        try:
            size = storage.size(shard.name)
        except FileNotFoundError:
            problems.append(f"{url}: the manifest lists this shard, but it is missing. Fetch or write it again.")
            continue
        if size not in (None, shard.bytes):
            problems.append(f"{url}: {size} bytes, but the manifest says {shard.bytes}. Fetch or write it again.")
    return problems


def check_same_tokenizer(source: Source, other: Source) -> None:
    """Raise ValueError unless both speak of one tokenizer."""
    first, second = source.tokenizer, other.tokenizer
    if first.fingerprint != second.fingerprint:
        raise ValueError(
            f"{other.folder}: written with tokenizer {second.fingerprint[:12]}, but {source.folder} with "
            f"{first.fingerprint[:12]}. Write one of them again with the other's {TOKENIZER}."
        )


def stream_count(num_splits: int, max_streams: int) -> int:
    """Give N, the streams of a run: the largest 2^a or 3 * 2^a that neither splits nor max_streams are fewer than."""
    limit = min(num_splits, max_streams)
    return max(n for a in range(limit.bit_length()) for n in (1 << a, 3 << a) if n <= limit)


class SplitOrder:
    """The endless list of splits: each epoch is a fresh seeded permutation of all, one after the other.

    Stream n of N reads entries n, n + N, n + 2N, ... source: its number in a mixture, each of which has its own order.
    """

    def __init__(self, num_splits: int, seed: int, source: int = 0):
        self.num_splits = num_splits
        self.seed = seed
        self.source = source
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __getitem__(self, entry: int) -> int:
        epoch, place = divmod(entry, self.num_splits)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch, self.source]).permutation(self.num_splits)
            self._epoch = epoch
        return int(self._order[place])
