"""Open a corpus of one or more sources, and read the chunks of their shards."""

import logging
import socket
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from megabert.data.shards.cache import CacheOptions, ExpectedFile, WrongContentError
from megabert.data.shards.manifest import (
    MAX_TOKENIZER_BYTES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Manifest,
    Shard,
    TokenizerInfo,
)
from megabert.data.shards.sample_format import (
    TokenChunk,
    decode_text,
    decode_tokens,
    read_sample,
    token_dtype,
)
from megabert.data.shards.shard_list import DamagedShardError, shards_of
from megabert.data.shards.side_files import SideFiles, check_mapped_chunks, check_tokenizer_config, fetch_manifest
from megabert.data.shards.storage import Storage, open_storage
from megabert.data.shards.tokenizer import describe_tokenizer, encode_flat, find_tokenizer, parse_tokenizer
from megabert.files.bounded_reads import has_file, read_bounded
from megabert.files.hashing import texts_sha256

log = logging.getLogger(__name__)

# Text that is tokenized on the fly has no token statistics. They are estimated from this many chunks.
SAMPLED_CHUNKS = 16


@dataclass(frozen=True, eq=False)
class Source:
    """The shards of one folder that a run reads, all of one part ("train" or "heldout").

    tokenizer_path: only for text shards, which are tokenized when they are read.
    """

    folder: str
    storage: Storage
    manifest: Manifest
    shards: tuple[Shard, ...]
    tokenizer_path: Path | None = None

    @cached_property
    def tokenizer(self) -> TokenizerInfo:
        if self.tokenizer_path is not None:
            return describe_tokenizer(self._text_tokenizer, str(self.tokenizer_path))
        assert self.manifest.tokenizer is not None, f"{self.folder}: the manifest of token shards names no tokenizer"
        return self.manifest.tokenizer

    @property
    def tokens(self) -> int:
        """The tokens of all documents; for text shards, their characters."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """A hash of these tokens in this order: sha256 over the shards' hashes, and over the tokenizer's for text."""
        parts = [shard.sha256 for shard in self.shards]
        if self.tokenizer_path is not None:
            parts.append(self.tokenizer.fingerprint)
        return texts_sha256(parts)

    def __reduce__(self) -> tuple[Callable[..., "Source"], tuple[Any, ...]]:
        # The shards are those of the manifest, which is pickled once for all sources of a folder.
        every = [shard for part in self.manifest.splits.values() for shard in part]
        numbers = {id(shard): number for number, shard in enumerate(every)}
        chosen = np.array([numbers[id(shard)] for shard in self.shards], np.int64)
        fingerprint = self.tokenizer.fingerprint if self.tokenizer_path else ""
        return _unpickle, (self.folder, self.storage, self.manifest, chosen, self.tokenizer_path, fingerprint)

    def other_part(self, part: str, on_bad_shard: str) -> "Source":
        """Return the source of another part of this folder, without reading the manifest again."""
        return replace(self, shards=shards_of(self.storage, self.manifest, part, on_bad_shard))

    @cached_property
    def num_chunks(self) -> int:
        return sum(len(shard.chunks) for shard in self.shards)

    @cached_property
    def reported_damaged(self) -> set[tuple[int, int]]:
        """(shard, chunk) of the damaged chunks that this process has logged."""
        return set()

    def read_chunk(self, shard: int, chunk: int) -> TokenChunk:
        """Read one chunk's tokens. Raises DamagedShardError if it is damaged, OSError if it cannot be fetched."""
        check_mapped_chunks(self.manifest)
        entry = self.shards[shard]
        location = entry.chunk(chunk)
        url = self.storage.url(entry.name)
        where = f"{url} chunk {chunk} (byte {location.offset})"
        expected = ExpectedFile(entry.bytes, entry.sha256)
        try:
            data = self.storage.read(entry.name, location.offset, location.size, expected)
            # A damaged copy in the cache is fetched again.
            if zlib.crc32(data) != location.crc32 and self.storage.discard(entry.name, expected):
                data = self.storage.read(entry.name, location.offset, location.size, expected)
        except FileNotFoundError as missing:
            raise DamagedShardError(f"{where}: the shard is missing. Fetch or write it again.") from missing
        except WrongContentError as error:
            raise DamagedShardError(f"{where}: {error}. Fetch or write the shard again.") from error
        if len(data) != location.size:
            raise DamagedShardError(
                f"{where}: {len(data)} bytes, expected {location.size}: the shard is truncated. "
                "Fetch or write it again."
            )
        if zlib.crc32(data) != location.crc32:
            raise DamagedShardError(
                f"{where}: damaged: its checksum differs from the manifest's. Fetch or write the shard again."
            )
        try:
            decoded = self._decode(data, where)
        except ValueError as error:
            raise DamagedShardError(str(error)) from error
        if len(decoded.lengths) != location.documents:
            raise DamagedShardError(
                f"{where}: {len(decoded.lengths)} documents, but the manifest says {location.documents}. "
                "Write the shards again."
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
        """The tokenizer that turns text into ids."""
        assert self.tokenizer_path is not None, f"{self.folder}: holds tokens, which need no tokenizer to encode them"
        return parse_tokenizer(self._text_tokenizer, str(self.tokenizer_path))

    @cached_property
    def _text_tokenizer(self) -> bytes:
        """The tokenizer.json for text, read once: whoever replaces the file later does not change this run."""
        assert self.tokenizer_path is not None, f"{self.folder}: holds tokens, whose tokenizer lies beside them"
        return read_bounded(self.tokenizer_path, MAX_TOKENIZER_BYTES)

    def prefetch(self, shard: int) -> None:
        """Start to fetch a shard that will be read soon, if its storage fetches whole shards."""
        entry = self.shards[shard]
        self.storage.prefetch(entry.name, ExpectedFile(entry.bytes, entry.sha256))

    @cached_property
    def median_document_tokens(self) -> int:
        if self.tokenizer_path is None:
            return int(self.manifest.statistics["median_document_tokens"])
        lengths = self._sampled_lengths
        return int(np.median(lengths)) if len(lengths) else 1

    @cached_property
    def _sampled_lengths(self) -> np.ndarray:
        """(documents,) lengths in tokens of a sample of a text source's documents."""
        return np.concatenate([chunk.lengths for chunk in self._sample()])

    def document_lengths(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return lengths in tokens, and how many documents have about each of them; None if the manifest lacks that."""
        if self.tokenizer_path is not None:
            return self._sampled_lengths, np.ones(len(self._sampled_lengths))
        histogram = self.manifest.statistics.get("length_histogram")
        if histogram is None:
            return None
        documents, tokens = np.array(histogram["documents"]), np.array(histogram["tokens"])
        used = documents > 0
        return tokens[used] / documents[used], documents[used]

    @cached_property
    def token_counts(self) -> np.ndarray:
        """(vocab_size,) how often each id occurs in the training shards; for text, in a sample of them."""
        size = self.tokenizer.vocab_size
        if self.tokenizer_path is None:
            return self._side_files.read_token_counts()
        return sum((np.bincount(chunk.tokens, minlength=size) for chunk in self._sample()), np.zeros(size, np.int64))

    def _sample(self) -> list[TokenChunk]:
        """Read chunks at equal distances over all shards. Damaged ones are left out: training will report them."""
        chunks = [(number, chunk) for number, shard in enumerate(self.shards) for chunk in range(len(shard.chunks))]
        found = []
        for i in range(0, len(chunks), -(-len(chunks) // SAMPLED_CHUNKS)):
            with suppress(DamagedShardError):
                found.append(self.read_chunk(*chunks[i]))
        if not found:
            raise DamagedShardError(f"{self.folder}: none of {SAMPLED_CHUNKS} chunks across its shards can be read.")
        return found

    def read_tokenizer_file(self) -> bytes:
        """Read the tokenizer.json of the shards. Raises ValueError if it is not the one they were written with."""
        if self.tokenizer_path is not None:
            return self._text_tokenizer
        return self._side_files.read_tokenizer()

    def read_optional(self, name: str) -> bytes | None:
        """Read a small file from the tokenizer's folder, or return None if there is none.

        Raises ValueError if the manifest says that it is another file.
        """
        if self.tokenizer_path is None:
            return self._side_files.read(name)
        path = self.tokenizer_path.with_name(name)
        return read_bounded(path, MAX_TOKENIZER_BYTES) if has_file(path) else None

    def check_files(self) -> None:
        """Raise ValueError unless the tokenizer, its config and the token counts are those that the manifest means."""
        if self.tokenizer_path is None:
            self._side_files.check()
        elif (config := self.read_optional(TOKENIZER_CONFIG)) is not None:
            check_tokenizer_config(config, str(self.tokenizer_path.with_name(TOKENIZER_CONFIG)))

    @property
    def _side_files(self) -> SideFiles:
        return SideFiles(self.storage, self.manifest)


def _unpickle(
    folder: str, storage: Storage, manifest: Manifest, chosen: np.ndarray, tokenizer_path: Path | None, fingerprint: str
) -> Source:
    """Return the source of another rank. Raises ValueError if this machine has another tokenizer than rank 0's."""
    every = [shard for part in manifest.splits.values() for shard in part]
    source = Source(folder, storage, manifest, tuple(every[number] for number in chosen.tolist()), tokenizer_path)
    if tokenizer_path is not None and source.tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"{tokenizer_path}: on {socket.gethostname()} it is another file than on rank 0's machine. Copy that one "
            "there, or name a data.tokenizer that all machines share."
        )
    return source


@dataclass(frozen=True, eq=False)
class Corpus:
    """The sources of a run. weights: the share of the tokens that each source contributes; they sum to 1.

    later: the weights of the mixtures after the first one, where the mixture changes over the run.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    on_bad_shard: str = "stop"
    later: tuple[tuple[float, ...], ...] = ()

    def mixture(self, number: int) -> tuple[float, ...]:
        """Return the weights of a mixture, counted from 0."""
        return self.later[number - 1] if number else self.weights

    def largest_share(self, source: int) -> float:
        """Return the largest weight that a source has in any mixture."""
        return max(weights[source] for weights in (self.weights, *self.later))

    def held_out(self) -> "Corpus":
        """Return the held-out part of the sources of the first mixture."""
        used = [number for number, weight in enumerate(self.weights) if weight]
        sources = tuple(self.sources[number].other_part("heldout", self.on_bad_shard) for number in used)
        return Corpus(sources, tuple(self.weights[number] for number in used), self.on_bad_shard)

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
    def fingerprint(self) -> str:
        """A hash of these shards in these mixtures."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        parts = [f"{source.fingerprint} {weight!r}" for source, weight in zip(self.sources, self.weights, strict=True)]
        parts += map(repr, self.later)
        return texts_sha256(parts)

    @property
    def median_document_tokens(self) -> int:
        """The shortest of the sources' medians: a bin must have room for the documents of any source."""
        return min(source.median_document_tokens for source in self.sources)

    @property
    def token_shares(self) -> np.ndarray:
        """(vocab_size,) share of each id among the training tokens. Every count is increased by one."""
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
    later: Sequence[Sequence[tuple[str, float]]] = (),
) -> Corpus:
    """Open every (location, weight). later: the mixtures after the first one; they share the sources that both name.

    Raises what open_source raises, and ValueError if tokenizers differ.
    """
    tables = [_numbered(mixture) for mixture in (parts, *later)]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    sources = tuple(
        open_source(location, part, tokenizer=tokenizer, cache=cache, on_bad_shard=on_bad_shard) for location, _ in keys
    )
    for source in sources[1:]:
        check_same_tokenizer(sources[0], source)
    _warn_of_common_shards(sources)
    weights = [tuple(table.get(key, 0.0) / sum(table.values()) for key in keys) for table in tables]
    return Corpus(sources, weights[0], on_bad_shard, tuple(weights[1:]))


def _numbered(mixture: Sequence[tuple[str, float]]) -> dict[tuple[str, int], float]:
    """Give each part of a mixture a key of its location and how often that was named before, which is usually 0."""
    found: dict[tuple[str, int], float] = {}
    for location, weight in mixture:
        found[location, sum(other == location for other, _ in found)] = weight
    return found


def _warn_of_common_shards(sources: Sequence[Source]) -> None:
    """Log which sources hold the same shards: they count as two, so a phase begins anew with the documents of one."""
    first: dict[str, Source] = {}
    for source in sources:
        common = [
            first[shard.sha256] for shard in source.shards if first.setdefault(shard.sha256, source) is not source
        ]
        if common:
            log.warning(
                "%s and %s have %d shards in common, whose documents are read for each of them. In data.phases, write "
                "the location of a corpus alike in all phases.", common[0].folder, source.folder, len(common),
            )  # fmt: skip


def open_source(
    location: str,
    part: str = "train",
    *,
    tokenizer: str | None = None,
    cache: CacheOptions = CacheOptions(),  # noqa: B008 (immutable)
    on_bad_shard: str = "stop",
) -> Source:
    """Open the shards at a location of a recipe: a folder with a manifest, or some of its tar files in brace notation.

    Raises ValueError for a missing manifest or shard, an unknown shard name, a part without documents, and text shards
    without a tokenizer.
    """
    storage, names = open_storage(location, cache)
    folder = storage.url("").rstrip("/")
    manifest = fetch_manifest(storage)
    shards = shards_of(storage, manifest, part, on_bad_shard, names if part == "train" else None)
    if manifest.kind == "text" and tokenizer is None:
        raise ValueError(
            f"{folder}: holds text, expected tokens. Name a tokenizer with data.tokenizer to tokenize it on the fly, "
            "or write token shards with data_prep/write_shards.py --tokenizer."
        )
    path = None
    if tokenizer is not None:
        path, info = find_tokenizer(tokenizer)
        if manifest.tokenizer is not None:
            if info.fingerprint != manifest.tokenizer.fingerprint:
                raise ValueError(
                    f"{folder}: written with tokenizer {manifest.tokenizer.fingerprint[:12]}, but data.tokenizer "
                    f"{path} is {info.fingerprint[:12]}. Remove data.tokenizer, or write the shards again with it."
                )
            path = None
    return Source(folder, storage, manifest, shards, path)


def check_same_tokenizer(source: Source, other: Source) -> None:
    """Raise ValueError unless both sources have the same tokenizer."""
    first, second = source.tokenizer, other.tokenizer
    if first.fingerprint != second.fingerprint:
        raise ValueError(
            f"{other.folder}: written with tokenizer {second.fingerprint[:12]}, but {source.folder} with "
            f"{first.fingerprint[:12]}. Write one of them again with the {TOKENIZER} of the other."
        )
