"""Turn a corpus into shards: text chunks, or with --tokenizer the token chunks that training reads.

    python data_prep/write_shards.py --source docstrings --min-chars 200 --out data/quickstart/text
    python data_prep/write_shards.py --source data/quickstart/text --tokenizer data/quickstart/tokenizer --out data/quickstart/tokens

Two passes, both on all cores. First the source becomes runs: its documents, tokenized, sorted by a hash of their text.
Then each shard collects its range of hashes from all runs, so that documents are shuffled globally, copies of one text
meet in one shard, and the held-out part is chosen by the text alone. A run or a shard counts when it is renamed into
place: killed at any moment, the same command goes on and ends with the same bytes.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from data_prep import folder
from data_prep.sources import ReadOptions, Unit, list_units, stamps
from data_prep.sources.base import UNIT_BYTES, is_full
from data_prep.workers import Progress, Workers
from data_prep.writing import length_statistics, shard_writer, sorted_runs
from megabert.config import cli
from megabert.data.shards.manifest import (
    MANIFEST,
    TOKEN_COUNTS,
    TOKENIZER,
    Manifest,
    Shard,
    TokenizerInfo,
    read_manifest,
    write_manifest,
)
from megabert.data.shards.sample_format import MAX_CHUNK_TOKENS, SPECIAL_TOKENS, encode_npy, token_dtype
from megabert.data.shards.tokenizer import TOKENIZER_CONFIG, find_tokenizer
from megabert.files.atomic import write_atomically

# A source is dealt out in about this many tasks, each at most TASK_BYTES: enough to keep every core busy to the end.
# What is dealt out must not depend on --workers.
TASKS = 256
TASK_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Options:
    source: str = "docstrings"
    """docstrings, a folder of our text shards, a file or folder of .txt, .jsonl[.gz|.zst] and .parquet, hf:OWNER/NAME"""
    out: str = "data/quickstart/text"
    """folder to write shards and manifest.json to"""
    tokenizer: str | None = None
    """tokenizer.json, or a folder with one: write token shards; without it, text shards"""
    text_key: str = "text"
    """the field (.jsonl) or column (.parquet, hf:) that holds the text"""
    blank_lines: bool = False
    """whether a blank line separates documents of a .txt; otherwise each file is one document"""
    dataset_config: str | None = None
    """configuration of a data set hf:OWNER/NAME, such as en"""
    dataset_split: str = "train"
    """split of a data set hf:OWNER/NAME"""
    min_chars: int = 1
    """shorter documents are left out, characters"""
    deduplicate: bool = True
    """whether exact copies of a document are left out"""
    heldout: float = 0.0
    """share of the documents to hold out for evaluation, chosen by a hash of their text"""
    min_shards: int = 24
    """fewest training shards; 24 are enough to deal to 8 ranks"""
    shard_mb: int = 64
    """size of a shard, at most about this many MB"""
    chunk_tokens: int = MAX_CHUNK_TOKENS
    """tokens (bytes, for text) of a chunk, at most; a longer document is cut, or as text has a chunk of its own"""
    workers: int = os.cpu_count() or 1
    """processes"""
    seed: int = 0
    """seed of the order within shards"""
    replace: bool = False
    """whether finished shards in out that were asked for in other words may be replaced"""

    def __post_init__(self):
        if not 0 <= self.heldout < 1:
            raise ValueError(f"heldout is {self.heldout}, expected a share in [0, 1).")
        if not 1 <= self.chunk_tokens <= MAX_CHUNK_TOKENS:
            raise ValueError(f"chunk_tokens is {self.chunk_tokens}, expected 1 to {MAX_CHUNK_TOKENS}.")
        if min(self.min_shards, self.shard_mb, self.workers) < 1:
            raise ValueError("min_shards, shard_mb and workers are at least 1.")

    @property
    def read(self) -> ReadOptions:
        return ReadOptions(self.text_key, self.blank_lines, self.dataset_config, self.dataset_split)


class Wanted(NamedTuple):
    """What is asked for. request: a hash of all of it; whatever differs gives other shards."""

    options: Options
    units: list[Unit]
    tokenizer_path: Path | None
    tokenizer: TokenizerInfo | None
    request: str

    @property
    def job(self) -> sorted_runs.Job:
        o = self.options
        dtype = token_dtype(self.tokenizer.vocab_size) if self.tokenizer else np.dtype(np.uint8)
        path = str(self.tokenizer_path) if self.tokenizer_path else None
        return sorted_runs.Job(
            Path(o.out), path, dtype, o.read, o.min_chars, o.heldout, o.deduplicate, o.chunk_tokens, o.seed
        )


def understand(options: Options) -> Wanted:
    """Look at source and tokenizer. Raises ValueError for one that cannot be read."""
    path, tokenizer = find_tokenizer(options.tokenizer) if options.tokenizer else (None, None)
    out = Path(options.out)
    if (out / MANIFEST).is_file() and Path(options.source).resolve() == out.resolve():
        raise ValueError(
            f"{out}: is --source and --out; its shards would be replaced while they are read. Choose another --out."
        )
    units = list_units(options.source, options.read)
    asked = {name: value for name, value in vars(options).items() if name not in ("out", "workers", "replace")}
    request = hashlib.sha256(repr((asked, tokenizer, stamps(units))).encode()).hexdigest()
    return Wanted(options, units, path, tokenizer, request)


def deal(units: list[Unit]) -> list[list[Unit]]:
    """Group units, in their order, into tasks."""
    most = min(TASK_BYTES, max(UNIT_BYTES, sum(unit.size for unit in units) // TASKS))
    tasks: list[list[Unit]] = []
    size = most
    for unit in units:
        cost = most if unit.kind == "hub" else unit.size  # the hub does not say how large a shard is
        if size + cost > most:
            tasks.append([])
            size = 0
        tasks[-1].append(unit)
        size += cost
    return tasks


def write_all_runs(job: sorted_runs.Job, units: list[Unit], workers: Workers) -> list[sorted_runs.Summary]:
    """The first pass, or what an earlier command left of it."""
    tasks = deal(units)
    left = [n for n in range(len(tasks)) if not sorted_runs.summary_path(job, n).is_file()]
    unit = "shard" if units and units[0].kind == "hub" else "B"
    progress = Progress("reading", sum(u.size for u in units), unit)
    progress.start_at(sum(u.size for u in units) - sum(u.size for n in left for u in tasks[n]))
    try:
        workers.run(
            sorted_runs.write_runs, ((job, n, tasks[n]) for n in left), lambda _: progress.show(*workers.counters[:])
        )
    finally:
        progress.close()
    return [sorted_runs.read_summary(job, n) for n in range(len(tasks))]


def shard_counts(options: Options, itemsize: int, summaries: list[sorted_runs.Summary]) -> dict[str, int]:
    """How many shards each part gets: enough of them, none larger than asked."""
    sizes = {part: itemsize * sum(summary.elements[part] for summary in summaries) for part in sorted_runs.PARTS}
    train, heldout = (-(-size // (options.shard_mb << 20)) for size in sizes.values())
    train = max(options.min_shards, train)
    # Held-out shards are no smaller than the others, for want of a reason, but a small corpus has one too.
    return {"train": train} | ({"heldout": max(1, heldout, round(train * options.heldout))} if options.heldout else {})


def write_all_shards(job: sorted_runs.Job, counts: dict[str, int], paths: list[Path], workers: Workers) -> None:
    """The second pass, or what an earlier command left of it."""
    every = [(part, number) for part, total in counts.items() for number in range(total)]
    left = [place for place in every if not shard_writer.report_path(job, *place).is_file()]
    progress = Progress("writing", len(every), "shard")
    progress.start_at(len(every) - len(left))
    written = 0

    def show(result: object) -> None:
        nonlocal written
        written += result is not None
        progress.show(written)

    tasks = ((job, paths, part, number, counts[part]) for part, number in left)
    try:
        workers.run(shard_writer.write_shard, tasks, show)
    finally:
        progress.close()


def collect(wanted: Wanted, counts: dict[str, int], read: int) -> tuple[Manifest, np.ndarray]:
    """Read all shards' reports into a manifest, and add up how often each token occurs in training."""
    splits: dict[str, tuple[Shard, ...]] = {}
    lengths = np.zeros(length_statistics.LONGEST_COUNTED + 1, dtype=np.int64)
    ids = np.zeros(wanted.tokenizer.vocab_size if wanted.tokenizer else 0, dtype=np.int64)
    for part, total in counts.items():
        shards = []
        for number in range(total):
            report = shard_writer.read_report(shard_writer.report_path(wanted.job, part, number))
            shards.append(report.shard)
            lengths += report.lengths
            if part == "train":
                ids[: len(report.ids)] += report.ids
        splits[part] = tuple(shards)
    tokens = sum(shard.tokens for shards in splits.values() for shard in shards)
    unit = "tokens" if wanted.tokenizer else "bytes"
    statistics = length_statistics.summarize(lengths, tokens, unit, read)
    kind = "tokens" if wanted.tokenizer else "text"
    return Manifest(kind, splits, statistics, wanted.tokenizer, wanted.request), ids


def finish(wanted: Wanted, manifest: Manifest, ids: np.ndarray) -> None:
    """Write what stands beside the shards, and the manifest last."""
    out = Path(wanted.options.out)
    if path := wanted.tokenizer_path:
        write_atomically(out / TOKENIZER, path.read_bytes())
        config = path.with_name(TOKENIZER_CONFIG)
        write_atomically(out / TOKENIZER_CONFIG, config.read_bytes() if config.is_file() else plain_tokenizer_config())
        write_atomically(out / TOKEN_COUNTS, encode_npy(ids))
    write_atomically(out / length_statistics.PICTURE, length_statistics.draw(manifest.statistics))
    write_manifest(out, manifest)


def plain_tokenizer_config() -> bytes:
    """What makes AutoTokenizer load a bare tokenizer.json with BERT's special tokens."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
    return json.dumps(config, indent=1).encode()


def prepare(wanted: Wanted) -> Manifest:
    """Both passes. Raises ValueError for a source without documents."""
    options = wanted.options
    with folder.work_folder(Path(options.out), wanted.request), Workers(options.workers) as workers:
        summaries = write_all_runs(wanted.job, wanted.units, workers)
        read = sum(summary.read for summary in summaries)
        if not read:
            raise ValueError(
                f"{options.source}: has no document of at least {options.min_chars} characters; nothing to write."
            )
        counts = shard_counts(options, wanted.job.dtype.itemsize, summaries)
        write_all_shards(wanted.job, counts, sorted_runs.run_paths(wanted.job, summaries), workers)
        manifest, ids = collect(wanted, counts, read)
        finish(wanted, manifest, ids)
    return manifest


def main(argv: list[str] | None = None) -> int:
    options = cli.read_flags(Options, "write_shards.py", __doc__ or "", argv)
    wanted = understand(options)
    out = Path(options.out)
    if (out / MANIFEST).is_file() and is_from(wanted.request, out):
        folder.sweep(out)
        print(f"{out / MANIFEST}: already written from this, reused")
        return 0
    if (out / MANIFEST).is_file() and not options.replace:
        raise ValueError(
            f"{out}: holds finished shards of another source, tokenizer or other settings. Choose another --out, or pass "
            "--replace."
        )
    try:
        manifest = prepare(wanted)
    except KeyboardInterrupt:
        print(f"\n{out}: interrupted. The same command goes on from here.", file=sys.stderr)
        return 130  # what a shell gives for Ctrl-C
    except OSError as mistake:
        if not is_full(mistake):
            raise
        raise ValueError(
            f"{out}: no room left for what has to be written ({mistake.strerror}). Free some, or choose another --out; "
            "the same command goes on from here."
        ) from mistake
    parts = ", ".join(f"{len(shards)} {part}" for part, shards in manifest.splits.items())
    unit = "tokens" if wanted.tokenizer else "characters"
    statistics = manifest.statistics
    print(f"{out}: {statistics['documents']:,} documents, {statistics['tokens']:,} {unit}, shards: {parts}")
    return 0


def is_from(request: str, out: Path) -> bool:
    """Whether the shards that are there were asked for in the same words."""
    try:
        return read_manifest(out).request == request
    except ValueError:  # of an older format, or damaged: written again
        return False


def command(prog: str = "megabert-shards") -> NoReturn:
    cli.run(main, prog)


if __name__ == "__main__":
    command(sys.argv[0])
