"""Turn a corpus into shards: text chunks, or with --tokenizer the token chunks that training reads.

    python data_prep/write_shards.py --source docstrings --min-chars 200 --out data/quickstart/text
    python data_prep/write_shards.py --source data/quickstart/text --tokenizer data/quickstart/tokenizer --out data/quickstart/tokens

Two passes, both on all cores. First each unit of the source becomes a run: its documents, tokenized, sorted by a hash of
their text. Then each shard collects its range of hashes from all runs, so that documents are shuffled globally, copies of
one text meet in one shard, and the held-out part is chosen by the text alone. A run or a shard counts when it is renamed
into place: killed at any moment, the same command goes on and ends with the same bytes.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from data_prep.sources import ReadOptions, Unit, list_units, read_unit, stamps
from megabert import flags
from megabert.data.manifest import (
    MANIFEST,
    TOKEN_COUNTS,
    TOKENIZER,
    Chunk,
    Manifest,
    Shard,
    TokenizerInfo,
    read_manifest,
    write_atomically,
    write_manifest,
)
from megabert.data.sample_format import (
    MAX_CHUNK_TOKENS,
    SPECIAL_TOKENS,
    TokenChunk,
    encode_text,
    encode_tokens,
    token_dtype,
    write_sample,
)
from megabert.data.shards import MIN_SPLITS
from megabert.data.tokenizer import TOKENIZER_CONFIG, encode, find_tokenizer, read_tokenizer

HASH_BYTES = 16  # blake2b; the first half decides held-out or not, the second the shard
LONGEST_COUNTED = 65_535  # documents longer than this share the last bin of the length histogram


@dataclass(frozen=True, kw_only=True)
class Options:
    source: str = "docstrings"
    """docstrings, a folder of our text shards, a file, or a folder of .txt and .jsonl[.gz|.zst] files"""
    out: str = "data/quickstart/text"
    """folder to write shards and manifest.json to"""
    tokenizer: str | None = None
    """tokenizer.json, or a folder with one: write token shards; without it, text shards"""
    text_key: str = "text"
    """the field of a .jsonl line that holds the text"""
    blank_lines: bool = False
    """whether a blank line separates documents of a .txt; otherwise each file is one document"""
    min_chars: int = 1
    """shorter documents are left out, characters"""
    deduplicate: bool = True
    """whether exact copies of a document are left out"""
    heldout: float = 0.0
    """share of the documents to hold out for evaluation, chosen by a hash of their text"""
    min_shards: int = MIN_SPLITS
    """fewest training shards"""
    shard_mb: int = 64
    """size of a shard, at most about this many MB"""
    chunk_tokens: int = MAX_CHUNK_TOKENS
    """tokens (bytes, for text) of a chunk, at most; a longer document is cut, or as text has a chunk of its own"""
    workers: int = os.cpu_count() or 1
    """processes"""
    seed: int = 0
    """seed of the order within shards"""

    def __post_init__(self):
        if not 0 <= self.heldout < 1:
            raise ValueError(f"heldout is {self.heldout}, expected a share in [0, 1).")
        if not 1 <= self.chunk_tokens <= MAX_CHUNK_TOKENS:
            raise ValueError(f"chunk_tokens is {self.chunk_tokens}, expected 1 to {MAX_CHUNK_TOKENS}.")
        if min(self.min_shards, self.shard_mb, self.workers) < 1:
            raise ValueError("min_shards, shard_mb and workers are at least 1.")


@dataclass(frozen=True)
class Job:
    """What every worker needs to know. num_shards: per part, once it is known."""

    options: Options
    tokenizer_path: str | None
    dtype: np.dtype
    num_units: int
    num_shards: dict[str, int]

    @property
    def work(self) -> Path:
        return Path(self.options.out, ".work")


class Run:
    """One unit's documents on disk, sorted by hash: payload (tokens or UTF-8 bytes), lengths, hashes (n, 2) uint64."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, payloads: list[np.ndarray], hashes: np.ndarray, dtype: np.dtype) -> None:
        temporary = self.folder.with_name(self.folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        order = np.lexsort((hashes[:, 0], hashes[:, 1]))
        np.save(temporary / "hashes.npy", hashes[order])
        np.save(temporary / "lengths.npy", np.array([len(payloads[i]) for i in order], dtype=np.int64))
        np.save(temporary / "payload.npy", np.concatenate([np.empty(0, dtype), *(payloads[i] for i in order)]))
        os.rename(temporary, self.folder)

    def read(self, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents with low <= shard hash < high: (payload, lengths, hashes)."""
        hashes = np.load(self.folder / "hashes.npy", mmap_mode="r")
        a = int(np.searchsorted(hashes[:, 1], np.uint64(low)))
        b = len(hashes) if high > np.iinfo(np.uint64).max else int(np.searchsorted(hashes[:, 1], np.uint64(high)))
        lengths = np.load(self.folder / "lengths.npy")
        ends = lengths.cumsum()
        begin, end = (int(ends[i - 1]) if i else 0 for i in (a, b))
        payload = np.load(self.folder / "payload.npy", mmap_mode="r")[begin:end]
        return np.array(payload), lengths[a:b], np.array(hashes[a:b])

    def totals(self) -> tuple[int, int]:
        """(documents, payload elements)"""
        lengths = np.load(self.folder / "lengths.npy", mmap_mode="r")
        return len(lengths), int(lengths.sum())


def text_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest()


def documents(unit: Unit, options: Options) -> Iterator[str]:
    for text in read_unit(unit, ReadOptions(options.text_key, options.blank_lines)):
        stripped = text.strip()
        if len(stripped) >= options.min_chars:
            yield stripped


_tokenizer: Tokenizer | None = None  # one per worker process


def _start_worker(tokenizer_path: str | None) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    if tokenizer_path:
        _tokenizer = read_tokenizer(Path(tokenizer_path))


def write_run(task: tuple[Job, int, Unit]) -> int:
    """First pass: one unit of the source to one run. Returns the unit's size, for progress."""
    job, number, unit = task
    run = Run(job.work / f"run-{number:06d}")
    if run.folder.is_dir():
        return unit.size
    texts = list(documents(unit, job.options))
    hashes = np.frombuffer(b"".join(map(text_hash, texts)), dtype=np.uint64).reshape(-1, 2)
    if _tokenizer is None:
        payloads = [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8) for text in texts]
    else:
        payloads = [np.array(ids, dtype=job.dtype) for ids in encode(_tokenizer, texts)]
    run.write(payloads, hashes, job.dtype)
    return unit.size


def write_shard(task: tuple[Job, str, int]) -> tuple[str, int]:
    """Second pass: one shard from all runs. Leaves the tar, and beside it its manifest entry and counts."""
    job, part, number = task
    name = f"{part}-{number:05d}.tar"
    entry = job.work / f"{name}.npz"
    if entry.is_file():
        return part, number
    total = job.num_shards[part]
    low, high = ((1 << 64) * i // total for i in (number, number + 1))
    payloads, lengths, hashes = zip(
        *(Run(job.work / f"run-{i:06d}").read(low, high) for i in range(job.num_units)), strict=True
    )
    payload, lengths, hashes = np.concatenate(payloads), np.concatenate(lengths), np.concatenate(hashes)
    keep = (hashes[:, 0] < _heldout_below(job.options.heldout)) == (part == "heldout")
    if job.options.deduplicate:
        _, first = np.unique(hashes, axis=0, return_index=True)
        copies = np.ones(len(hashes), dtype=bool)
        copies[first] = False
        keep &= ~copies
    begins = lengths.cumsum() - lengths
    chosen = np.flatnonzero(keep & (lengths > 0))
    order = np.random.default_rng([job.options.seed, number, part == "heldout"]).permutation(chosen)
    chunks, histogram, counts = [], np.zeros(LONGEST_COUNTED + 1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    temporary = Path(job.options.out, f"{name}.tmp")
    with open(temporary, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for group in _groups(order, lengths, job.options.chunk_tokens, cut=bool(job.tokenizer_path)):
            parts = [payload[begins[i] + a : begins[i] + b] for i, a, b in group]
            sample, chunk = _encode(parts, job.tokenizer_path is None)
            offset = tar.offset
            write_sample(tar, f"{part}-{number:05d}-{len(chunks):05d}", sample)
            chunks.append([offset, tar.offset - offset, len(group), chunk, 0])
        if job.tokenizer_path:
            counts = np.bincount(payload[np.repeat(keep, lengths)], minlength=0)
        histogram += np.bincount(np.minimum(lengths[order], LONGEST_COUNTED), minlength=LONGEST_COUNTED + 1)
        tar.close()
        file.flush()
        os.fsync(file.fileno())
    data = temporary.read_bytes()
    chunks = [Chunk(*chunk)._replace(crc32=zlib.crc32(data[chunk[0] : chunk[0] + chunk[1]])) for chunk in chunks]
    shard = (name, hashlib.sha256(data).hexdigest(), len(data), len(order), int(lengths[order].sum()))
    os.replace(temporary, Path(job.options.out, name))
    staged = entry.with_suffix(".tmp.npz")
    np.savez(
        staged,
        shard=json.dumps(shard),
        chunks=np.array(chunks, dtype=np.int64).reshape(-1, len(Chunk._fields)),
        histogram=histogram,
        counts=counts,
    )
    os.replace(staged, entry)
    return part, number


def _heldout_below(share: float) -> np.uint64:
    return np.uint64(share * 2**64)


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


def _encode(parts: list[np.ndarray], text: bool) -> tuple[dict[str, bytes], int]:
    """One chunk as a sample, and its tokens (characters, for text)."""
    if text:
        strings = [part.tobytes().decode("utf-8", "replace") for part in parts]
        return encode_text(strings), sum(map(len, strings))
    tokens = np.concatenate(parts)
    return encode_tokens(TokenChunk(tokens, np.array([len(part) for part in parts], dtype=np.int32))), len(tokens)


def plain_tokenizer_config() -> bytes:
    """What makes AutoTokenizer load a bare tokenizer.json with BERT's special tokens."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
    return json.dumps(config, indent=1).encode()


def shard_counts(job: Job, heldout_documents: int, elements: int) -> dict[str, int]:
    """How many shards each part gets: enough of them, none larger than asked."""
    size = elements * job.dtype.itemsize
    train = max(job.options.min_shards, -(-size // (job.options.shard_mb << 20)))
    return {"train": train} | ({"heldout": max(1, round(train * job.options.heldout))} if heldout_documents else {})


def collect(job: Job, tokenizer: TokenizerInfo | None, request: str) -> tuple[Manifest, np.ndarray]:
    """Read all shards' entries into a manifest, and add up how often each token occurs in training."""
    splits: dict[str, tuple[Shard, ...]] = {}
    histogram = np.zeros(LONGEST_COUNTED + 1, dtype=np.int64)
    counts = np.zeros(tokenizer.vocab_size if tokenizer else 0, dtype=np.int64)
    for part, total in job.num_shards.items():
        shards = []
        for number in range(total):
            with np.load(job.work / f"{part}-{number:05d}.tar.npz") as entry:
                name, sha256, size, num_documents, tokens = json.loads(str(entry["shard"]))
                shards.append(Shard(name, sha256, size, num_documents, tokens, entry["chunks"]))
                histogram += entry["histogram"]
                if part == "train":
                    counts[: len(entry["counts"])] += entry["counts"]
        splits[part] = tuple(shards)
    below = histogram.cumsum()
    statistics = {
        "documents": int(below[-1]),
        "tokens": sum(shard.tokens for shards in splits.values() for shard in shards),
        "median_document_tokens": int(np.searchsorted(below, below[-1] / 2)),
        "documents_of_length_at_most": {str(1 << k): int(below[min(1 << k, LONGEST_COUNTED)]) for k in range(4, 17)},
    }
    kind = "tokens" if tokenizer else "text"
    return Manifest(kind, splits, statistics, tokenizer, request), counts


def main(argv: list[str] | None = None) -> None:
    options = flags.read_flags(Options, "write_shards.py", __doc__ or "", argv)
    out = Path(options.out)
    path, tokenizer = find_tokenizer(options.tokenizer) if options.tokenizer else (None, None)
    units = list_units(options.source)
    asked = {name: value for name, value in vars(options).items() if name not in ("out", "workers")}
    request = hashlib.sha256(repr((asked, tokenizer, stamps(units))).encode()).hexdigest()
    if (out / MANIFEST).is_file():
        if read_manifest(out).request == request:
            print(f"{out / MANIFEST}: already written from this, reused")
            return
        (out / MANIFEST).unlink()  # from here on the folder is unfinished, and says so by having none
    dtype = token_dtype(tokenizer.vocab_size) if tokenizer else np.dtype(np.uint8)
    job = Job(options, str(path) if path else None, dtype, len(units), {})
    _start_work(job.work, request)
    with multiprocessing.get_context("forkserver").Pool(options.workers, _start_worker, (job.tokenizer_path,)) as pool:
        _progress(pool, write_run, [(job, i, unit) for i, unit in enumerate(units)], sum(unit.size for unit in units))
        totals = [Run(job.work / f"run-{i:06d}").totals() for i in range(len(units))]
        num_documents, elements = (sum(column) for column in zip(*totals, strict=True))
        if not num_documents:
            raise ValueError(
                f"{options.source}: has no document of at least {options.min_chars} characters; nothing to write."
            )
        counts = shard_counts(job, int(options.heldout > 0), elements)
        job = Job(options, job.tokenizer_path, dtype, len(units), counts)
        tasks = [(job, part, number) for part, total in counts.items() for number in range(total)]
        for _ in pool.imap_unordered(write_shard, tasks):
            pass
    manifest, token_counts = collect(job, tokenizer, request)
    if path:
        write_atomically(out / TOKENIZER, path.read_bytes())
        config = path.with_name(TOKENIZER_CONFIG)
        write_atomically(out / TOKENIZER_CONFIG, config.read_bytes() if config.is_file() else plain_tokenizer_config())
        np.save(job.work / TOKEN_COUNTS, token_counts)
        os.replace(job.work / TOKEN_COUNTS, out / TOKEN_COUNTS)
    write_manifest(out, manifest)
    shutil.rmtree(job.work)
    parts = ", ".join(f"{len(shards)} {part}" for part, shards in manifest.splits.items())
    unit_name = "tokens" if tokenizer else "characters"
    size = sum(int(shard.chunks[:, 3].sum()) for shards in manifest.splits.values() for shard in shards)
    print(f"{out}: {manifest.statistics['documents']:,} documents, {size:,} {unit_name}, shards: {parts}")


def _start_work(work: Path, request: str) -> None:
    """Begin, or go on with, the work of this very request; what another request left is removed."""
    marker = work / "request"
    if not (marker.is_file() and marker.read_text() == request):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_atomically(marker, request.encode())


def _progress(pool, function, tasks: list, total: int) -> None:
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        for size in pool.imap_unordered(function, tasks):
            bar.update(size)


if __name__ == "__main__":
    flags.run(main, sys.argv[0])
