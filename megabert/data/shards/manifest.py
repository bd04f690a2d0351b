"""Write, read and validate the manifest of a folder of shards, which says what the folder contains.

folder/manifest.json      hash, bytes, documents and tokens of each shard; the tokenizer's fingerprint; statistics; the
                          hashes of the other files, and of the manifest itself
folder/chunks.npy         (chunks, 5) int64: where each chunk of each shard is, and its checksum
folder/train-00000.tar ...  heldout-00000.tar ...  tokenizer.json  tokenizer_config.json  token_counts.npy

Format 2 has neither hashes of other files, besides those of chunks.npy and tokenizer.json, nor one of itself. It is
read, and whatever can be compared without them is compared.
"""

import hashlib
import json
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from megabert.data.shards.sample_format import SPECIAL_TOKENS, Kind, encode_npy, read_npy
from megabert.files.atomic import write_atomically
from megabert.files.bounded_reads import read_bounded
from megabert.files.hashing import file_sha256, json_sha256
from megabert.files.json_file import parse_json

MANIFEST = "manifest.json"
CHUNKS = "chunks.npy"
TOKENIZER = "tokenizer.json"
TOKEN_COUNTS = "token_counts.npy"
TOKENIZER_CONFIG = "tokenizer_config.json"
FORMAT = 3
FORMAT_WITHOUT_HASHES = 2

# Among the statistics: the smallest share that --heldout must have so that a document of the corpus is held out.
FIRST_HELDOUT = "first_heldout"

# A manifest may come from an untrusted server, and a shard's name becomes a path in the folder or in the cache.
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.tar")
# Enough for the longest text. A chunk of tokens has less than 2 MB.
MAX_CHUNK_BYTES = 1 << 30
# 60 times the largest vocabulary in use.
MAX_VOCAB_SIZE = 1 << 24
# The limit for manifest.json, which is enough for half a million shards.
MAX_MANIFEST_BYTES = 128 << 20
# The limit for tokenizer.json, and for each of the other small files.
MAX_TOKENIZER_BYTES = 256 << 20
# The limit for chunks.npy: 50 M chunks, which have some 7 T tokens.
MAX_CHUNKS_BYTES = 1 << 31
SAME_SHARDS = "Copy the shards of rank 0's machine there, or name a folder that all machines share."
SHA256 = re.compile(r"[0-9a-f]{64}")


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
    """splits: the shards of "train" and "heldout". request: a hash of the settings of write_shards.py.

    files: sha256 of the other files in the folder; empty for text, and where the manifest has format 2. chunks_file:
    the path of chunks.npy, if each rank can map it into memory: then a pickled manifest has no chunks. chunks_sha256:
    its hash, which the chunks.npy of a rank on another machine must have. mapped_bytes: of the chunks.npy that this
    process maps, or 0.
    """

    kind: Kind
    splits: dict[str, tuple[Shard, ...]]
    statistics: dict = field(default_factory=dict)
    tokenizer: TokenizerInfo | None = None
    request: str = ""
    files: dict[str, str] = field(default_factory=dict)
    chunks_file: str | None = None
    chunks_sha256: str = ""
    mapped_bytes: int = 0

    def __reduce__(self) -> tuple[Callable[..., "Manifest"], tuple[Any, ...]]:
        shards = [shard for part in self.splits.values() for shard in part]
        chunks = None if self.chunks_file else np.concatenate([shard.chunks for shard in shards])
        counts = {name: len(part) for name, part in self.splits.items()}
        return _unpickle, (vars(self) | {"splits": counts}, _pack(shards), chunks)


class _PackedShards(NamedTuple):
    """Shards without their chunks, in a few large objects: quick to pickle, and a fifth of the bytes.

    names: with line ends between them; hashes: 32 bytes each; numbers: (n, 4) bytes, documents, tokens, chunks.
    """

    names: str
    hashes: bytes
    numbers: np.ndarray


def _pack(shards: list[Shard]) -> _PackedShards:
    numbers = [(shard.bytes, shard.documents, shard.tokens, len(shard.chunks)) for shard in shards]
    hashes = bytes.fromhex("".join(shard.sha256 for shard in shards))
    return _PackedShards("\n".join(shard.name for shard in shards), hashes, np.array(numbers, np.int64).reshape(-1, 4))


def _unpickle(settings: dict[str, Any], packed: _PackedShards, chunks: np.ndarray | None) -> Manifest:
    if chunks is None:
        chunks = _map_chunks(Path(settings["chunks_file"]), settings["chunks_sha256"])
        settings["mapped_bytes"] = chunks.offset + chunks.nbytes
    ends = packed.numbers[:, 3].cumsum().tolist()
    hashes = packed.hashes.hex()
    shards = []
    for number, (name, counts, end) in enumerate(
        zip(packed.names.split("\n"), packed.numbers.tolist(), ends, strict=True)
    ):
        size, documents, tokens, count = counts
        digest = hashes[64 * number : 64 * number + 64]
        shards.append(Shard(name, digest, size, documents, tokens, np.asarray(chunks[end - count : end])))
    splits, first = {}, 0
    for part, count in settings["splits"].items():
        splits[part] = tuple(shards[first : first + count])
        first += count
    return Manifest(**settings | {"splits": splits})


def _map_chunks(path: Path, sha256: str) -> np.memmap:
    """Map this machine's chunks.npy into memory. Raises ValueError if it is missing, or not the one of rank 0."""
    try:
        is_the_same = file_sha256(path) == sha256
    except FileNotFoundError as missing:
        raise ValueError(f"{path}: no such file on {socket.gethostname()}. {SAME_SHARDS}") from missing
    if not is_the_same:
        raise ValueError(
            f"{path}: on {socket.gethostname()} it is another file than on rank 0's machine. {SAME_SHARDS}"
        )
    return np.load(path, mmap_mode="r")


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
        "files": manifest.files,
        "chunks_sha256": hashlib.sha256(index).hexdigest(),
        "splits": {name: [_shard_to_json(shard) for shard in part] for name, part in manifest.splits.items()},
    }
    write_atomically(folder / MANIFEST, json.dumps(raw | {"sha256": own_hash(raw)}, indent=1).encode() + b"\n")


def own_hash(raw: dict) -> str:
    """Hash the content of a manifest.json, without the hash in it."""
    content = {name: value for name, value in raw.items() if name != "sha256"}
    return json_sha256(content)


def heldout_that_is_enough(statistics: dict) -> str:
    """Return the flag of write_shards.py that holds out at least one document of this corpus."""
    share = max(0.001, statistics.get(FIRST_HELDOUT, 0.1))
    return f"--heldout {share:g} or more" if share < 1 else "more documents and --heldout 0.1"


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a local folder. Raises ValueError if there is none or it is not valid."""
    path = Path(folder) / MANIFEST
    try:
        data = read_bounded(path, MAX_MANIFEST_BYTES)
        chunks = read_bounded(path.with_name(CHUNKS), MAX_CHUNKS_BYTES)
    except FileNotFoundError as missing:
        raise ValueError(
            f"{missing.filename}: no such file. Write shards there with data_prep/write_shards.py."
        ) from missing
    return parse_manifest(data, chunks, str(path))


def parse_manifest(data: bytes, chunks: bytes, where: str) -> Manifest:
    """Parse the bytes of manifest.json and chunks.npy. Raises ValueError, naming the file by `where`."""
    try:
        raw = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if type(found) is not int or found not in (FORMAT, FORMAT_WITHOUT_HASHES):
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
        files = raw["files"] if found == FORMAT else {}
        settings = (raw["kind"], splits, raw["statistics"], tokenizer, raw["request"], files)
        manifest = Manifest(*settings, chunks_sha256=raw["chunks_sha256"])
        problem = _find_problem(manifest, index)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not a manifest of write_shards.py: {error!r}. Write the shards again.") from error
    if problem:
        raise ValueError(f"{where}: {problem}. Write the shards again.")
    if found == FORMAT and raw.get("sha256") != own_hash(raw):
        raise ValueError(
            f"{where}: was changed after it had been written: its hash of itself differs. Fetch or write it again."
        )
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
    if first != len(index):
        raise ValueError(f"{where}: its shards have {first} chunks, {CHUNKS} has {len(index)}. Write the shards again.")
    return splits


def _find_problem(manifest: Manifest, index: np.ndarray) -> str | None:
    """Describe a value that contradicts another, or would make a reader fetch, allocate or index something impossible.

    Returns None if there is none.
    """
    info, statistics = manifest.tokenizer, manifest.statistics
    if manifest.kind not in get_args(Kind) or (manifest.kind == "tokens") != (info is not None):
        return (
            f"kind {manifest.kind!r} with {'a' if info else 'no'} tokenizer, expected tokens with one or text without"
        )
    if not isinstance(statistics, dict):
        return "statistics that are not a table"
    if info is not None and (problem := _find_tokenizer_problem(info)):
        return problem
    median = statistics.get("median_document_tokens")
    if info is not None and (type(median) is not int or median < 0):
        return "no median_document_tokens among its statistics"
    if info is not None and not _is_histogram(statistics.get("length_histogram")):
        return "a length_histogram that does not list documents and tokens"
    if not isinstance(manifest.files, dict) or not all(_is_sha256(digest) for digest in manifest.files.values()):
        return "files without a sha256"
    shards = [shard for part in manifest.splits.values() for shard in part]
    for shard in _suspicious(shards, index):
        if problem := _find_shard_problem(shard):
            return problem
    for name in ("documents", "tokens"):
        if statistics.get(name, total := sum(getattr(shard, name) for shard in shards)) != total:
            return f"statistics of {statistics[name]!r} {name}, its shards have {total}"
    return None


def _find_tokenizer_problem(info: TokenizerInfo) -> str | None:
    if type(info.vocab_size) is not int or not 0 < info.vocab_size <= MAX_VOCAB_SIZE:
        return f"a vocabulary of {info.vocab_size}, expected 1 to {MAX_VOCAB_SIZE}"
    special = (*info.special_ids.values(), *info.all_special_ids)
    if info.special_ids.keys() != SPECIAL_TOKENS.keys():
        return f"the special tokens {', '.join(info.special_ids)}, expected {', '.join(SPECIAL_TOKENS)}"
    if not all(type(number) is int and 0 <= number < info.vocab_size for number in special):
        return f"a special id beyond its vocabulary of {info.vocab_size}"
    own = set(info.special_ids.values())
    if len(own) < len(SPECIAL_TOKENS) or own - set(info.all_special_ids):
        return "special tokens that share an id, or are not among all_special_ids"
    if not isinstance(info.fingerprint, str):
        return f"a fingerprint {info.fingerprint!r}"
    return None


def _suspicious(shards: list[Shard], index: np.ndarray) -> list[Shard]:
    """Return the shards that `_find_shard_problem` may object to, found over all chunks at once: there are millions.

    index: the chunks of all shards, in their order.
    """
    if index.dtype != np.int64 or index.shape[1:] != (len(Chunk._fields),) or any(map(_find_entry_problem, shards)):
        return shards
    counts = np.array([len(shard.chunks) for shard in shards], np.int64)
    size_of = np.repeat(np.array([shard.bytes for shard in shards], np.int64), counts)
    offsets, sizes = index[:, 0], index[:, 1]
    wrong = (index < 0).any(1) | (sizes > MAX_CHUNK_BYTES) | (offsets > size_of - sizes)
    edges = np.concatenate([[0], counts.cumsum()])
    wrong_chunks, documents, tokens = (
        np.diff(np.concatenate([[0], column.cumsum()])[edges]) for column in (wrong.astype(np.int64), *index.T[2:4])
    )
    entries = np.array([(shard.documents, shard.tokens) for shard in shards], np.int64).reshape(-1, 2)
    bad = (wrong_chunks > 0) | (tokens != entries[:, 1]) | (documents < entries[:, 0])
    return [shards[number] for number in np.flatnonzero(bad).tolist()]


def _find_entry_problem(shard: Shard) -> str | None:
    counts = (shard.bytes, shard.documents, shard.tokens)
    if not all(type(count) is int and 0 <= count < 1 << 62 for count in counts):
        return f"{shard.name} with {shard.bytes!r} bytes, {shard.documents!r} documents, {shard.tokens!r} tokens"
    return None if _is_sha256(shard.sha256) else f"{shard.name} with a sha256 {shard.sha256!r}"


def _find_shard_problem(shard: Shard) -> str | None:
    if problem := _find_entry_problem(shard):
        return problem
    if shard.chunks.dtype != np.int64 or shard.chunks.shape[1:] != (len(Chunk._fields),):
        return (
            f"{CHUNKS} has {shard.chunks.dtype} of shape {shard.chunks.shape}, "
            f"expected int64 in {len(Chunk._fields)} columns"
        )
    offsets, sizes = shard.chunks[:, 0], shard.chunks[:, 1]
    if (shard.chunks < 0).any() or (sizes > MAX_CHUNK_BYTES).any() or (offsets > shard.bytes - sizes).any():
        return f"{shard.name} has a chunk outside its {shard.bytes} bytes, or of more than {MAX_CHUNK_BYTES >> 20} MiB"
    documents, tokens = shard.chunks[:, 2:4].sum(axis=0).tolist()
    # The chunks may have more documents than the shard, because a long document is cut into several.
    if tokens != shard.tokens or documents < shard.documents:
        return (
            f"{shard.name} with {shard.documents} documents of {shard.tokens} tokens, its chunks have {documents} of "
            f"{tokens}"
        )
    return None


def _is_histogram(value: object) -> bool:
    """Tell whether a value is a histogram of lengths, or None, as in manifests that lack it."""
    if not isinstance(value, dict):
        return value is None
    documents, tokens = value.get("documents"), value.get("tokens")
    if not isinstance(documents, list) or not isinstance(tokens, list) or len(documents) != len(tokens):
        return False
    return all(type(count) is int and 0 <= count < 1 << 62 for count in documents + tokens)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and SHA256.fullmatch(value) is not None


def _shard_to_json(shard: Shard) -> dict:
    plain = {name: getattr(shard, name) for name in ("name", "sha256", "bytes", "documents", "tokens")}
    return plain | {"num_chunks": len(shard.chunks)}
