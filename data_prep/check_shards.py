"""Check shards against their manifest: hashes, number of documents and tokens, and the range of the token ids.

    python data_prep/check_shards.py data/quickstart/tokens

Prints one problem per line, with shard, chunk and byte. The exit code is 0 without problems, 1 with problems, 2 if the
folder holds no shards or the command line is wrong.
"""

import sys

try:
    from megabert.process.interrupts import end_at_ctrl_c
except ModuleNotFoundError as error:
    print(f"{error}: run bash launch/install.sh, then source .venv/bin/activate.", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    end_at_ctrl_c()

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.output_folder import WRITTEN_SHARD
from data_prep.request_file import REQUEST
from data_prep.workers import Progress, WorkerPool
from data_prep.writing.length_statistics import PLOT
from megabert.config import cli
from megabert.config.settings import setting
from megabert.data.shards.manifest import (
    CHUNKS,
    MANIFEST,
    TOKEN_COUNTS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Chunk,
    Manifest,
    Shard,
    TokenizerInfo,
    read_manifest,
)
from megabert.data.shards.sample_format import decode_text, decode_tokens, read_npy, read_sample
from megabert.data.shards.side_files import check_tokenizer_config
from megabert.data.shards.tokenizer import find_tokenizer
from megabert.files.hashing import file_sha256


@dataclass(frozen=True)
class Options:
    folder: str
    """folder with a manifest.json"""
    workers: int = setting(os.cpu_count() or 1, "[1, 1024]")
    """processes"""


@dataclass
class ShardFindings:
    """Problems of one shard, and how often each token id occurs in it."""

    problems: list[str] = field(default_factory=list)
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def check_chunk(data: bytes, chunk: Chunk, vocab_size: int | None, where: str) -> tuple[list[str], np.ndarray]:
    """Check the bytes of one chunk. vocab_size: None for text. Returns its problems and its token ids."""
    no_ids = np.zeros(0, np.int64)
    if len(data) != chunk.size:
        return [f"{where}: has {len(data)} bytes, the manifest says {chunk.size}: truncated"], no_ids
    problems = []
    if zlib.crc32(data) != chunk.crc32:
        problems.append(f"{where}: its checksum is {zlib.crc32(data):08x}, the manifest says {chunk.crc32:08x}")
    try:
        sample = read_sample(data, where)
        if vocab_size is None:
            ids, texts = no_ids, decode_text(sample, where)
            found = len(texts), sum(map(len, texts))
        else:
            ids, lengths = decode_tokens(sample, where)
            found = len(lengths), len(ids)
            if (lengths < 0).any():
                problems.append(f"{where}: has a document of {lengths.min()} tokens")
            if len(ids) and ids.max() >= vocab_size:
                problems.append(f"{where}: holds id {ids.max()}, but the vocabulary has {vocab_size}")
    except ValueError as error:
        return [*problems, str(error)], no_ids
    if found != (chunk.documents, chunk.tokens):
        expected = f"{chunk.documents} of {chunk.tokens}"
        problems.append(f"{where}: {found[0]} documents of {found[1]} tokens, the manifest says {expected}")
    return problems, ids


def check_shard(path: Path, shard: Shard, vocab_size: int | None) -> tuple[str, ShardFindings]:
    """Check one shard, with one chunk in memory at a time. Returns its name and the findings."""
    found = ShardFindings(ids=np.zeros(vocab_size or 0, np.int64))
    if not path.is_file():
        found.problems.append(f"{path}: missing")
        return shard.name, found
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != shard.bytes:
            found.problems.append(f"{path}: has {size} bytes, the manifest says {shard.bytes}")
        if file_sha256(path) != shard.sha256:
            found.problems.append(f"{path}: its hash differs from the manifest's")
        for number in range(len(shard.chunks)):
            chunk = shard.chunk(number)
            data = os.pread(file.fileno(), chunk.size, chunk.offset)
            problems, ids = check_chunk(data, chunk, vocab_size, f"{path} chunk {number} (byte {chunk.offset})")
            found.problems += problems
            if not problems and vocab_size is not None:
                found.ids += np.bincount(ids, minlength=vocab_size)
    return shard.name, found


def check_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield unexpected and missing files, and totals in the manifest that its shards do not add up to."""
    listed = {shard.name for part in manifest.splits.values() for shard in part}
    required = {MANIFEST, CHUNKS, PLOT} | ({TOKENIZER, TOKENIZER_CONFIG, TOKEN_COUNTS} if manifest.tokenizer else set())
    for path in sorted(folder.iterdir()):
        if path.name == ".work":
            yield f"{path}: left by an interrupted write_shards.py. Run its command again, or remove the folder"
        elif path.name not in listed | required | {REQUEST}:
            kind = "shard" if WRITTEN_SHARD.fullmatch(path.name) else "file"
            yield f"{path}: a {kind} that the manifest does not list"
    for name in sorted(required):
        if not (folder / name).is_file():
            yield f"{folder / name}: missing"
    for name, expected in manifest.files.items():
        if (folder / name).is_file() and file_sha256(folder / name) != expected:
            yield f"{folder / name}: its hash differs from the manifest's"


def check_tokenizer(folder: Path, expected: TokenizerInfo) -> Iterator[str]:
    try:
        path, found = find_tokenizer(folder)
    except ValueError as error:
        yield str(error)
        return
    if found.fingerprint != expected.fingerprint:
        yield f"{path}: its fingerprint is {found.fingerprint[:12]}, the manifest says {expected.fingerprint[:12]}"
    elif found != expected:
        yield f"{folder / MANIFEST}: its vocabulary and special tokens are not those of {TOKENIZER}"
    config = folder / TOKENIZER_CONFIG
    if config.is_file():
        try:
            check_tokenizer_config(config.read_bytes(), str(config))
        except ValueError as error:
            yield str(error)


def check_token_counts(path: Path, expected: np.ndarray) -> Iterator[str]:
    try:
        found = read_npy(path.read_bytes(), str(path))
    except ValueError as error:
        yield str(error)
        return
    if found.shape != expected.shape:
        yield f"{path}: has shape {found.shape}, expected {expected.shape}"
    elif (found != expected).any():
        number = (found != expected).argmax()
        yield f"{path}: counts id {number} {found[number]} times, the training shards hold it {expected[number]} times"


def check(folder: Path, manifest: Manifest, workers: int) -> list[str]:
    """Check all shards and other files of a folder. Returns the problems."""
    vocab_size = manifest.tokenizer.vocab_size if manifest.tokenizer else None
    shards = [shard for part in manifest.splits.values() for shard in part]
    found: dict[str, ShardFindings] = {}
    progress = Progress("checking", len(shards), "shard")

    def collect(result: tuple[str, ShardFindings] | None) -> None:
        found.update([result] if result else [])
        progress.show(len(found))

    with WorkerPool(min(workers, len(shards) or 1)) as pool:
        pool.run(check_shard, ((folder / shard.name, shard, vocab_size) for shard in shards), collect)
    progress.close()
    problems = [problem for shard in shards for problem in found[shard.name].problems]
    problems += check_files(folder, manifest)
    if manifest.tokenizer is not None and (folder / TOKENIZER).is_file():
        problems += check_tokenizer(folder, manifest.tokenizer)
    if manifest.tokenizer is not None and (folder / TOKEN_COUNTS).is_file() and not problems:
        train = [found[shard.name].ids for shard in manifest.splits["train"]]
        problems += check_token_counts(folder / TOKEN_COUNTS, np.sum(train, axis=0))
    return problems


def main(argv: list[str] | None = None) -> int:
    options = cli.read_flags(Options, "data_prep/check_shards.py", __doc__ or "", argv)
    folder = Path(options.folder)
    if not (folder / MANIFEST).is_file():
        print(f"{folder / MANIFEST}: no such file; expected a folder of shards.", file=sys.stderr)
        return 2
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        print(cli.name_commands(str(error)))
        return 1
    problems = check(folder, manifest, options.workers)
    for problem in problems:
        print(cli.name_commands(problem))
    count = sum(map(len, manifest.splits.values()))
    print(f"{folder}: {count} shards, {manifest.statistics.get('documents')} documents, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    cli.run(main, sys.argv[0])
