"""Turn a corpus into shards: text shards, or with --tokenizer the token shards that training reads.

    python data_prep/write_shards.py --source CORPUS --out data/mine/text
    python data_prep/write_shards.py --source CORPUS --tokenizer data/mine/tokenizer --out data/mine/tokens

There are two passes, and both use all cores. The first writes sorted runs: documents, tokenized, in the order of a hash
of their text. In the second, each shard collects its range of hashes from all sorted runs. So documents are shuffled
globally, copies of one text meet in one shard, and the text alone decides whether a document is held out. A killed
command continues where it stopped when it is run again, and ends with the same bytes.
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from data_prep import output_folder
from data_prep.finished import damaged_files, note_request, read_result_of, restore_tokenizer, was_written_for
from data_prep.request import request_hash
from data_prep.source_options import SourceOptions
from data_prep.sources import LeftOut, list_input_splits, read_input_split, source_state
from data_prep.sources.base import INPUT_SPLIT_BYTES, TOKEN_KINDS, InputSplit, is_disk_full
from data_prep.sources.tokens.check import check_tokenizer
from data_prep.sources.tokens.ids import IdRule, make_rule
from data_prep.workers import Progress, WorkerPool
from data_prep.writing import length_statistics, shard_writer, sorted_runs
from data_prep.writing.sorted_runs import TaskSummary, WriteSettings
from data_prep.writing.unknown_tokens import check_share
from megabert.config import cli
from megabert.data.shards.manifest import (
    FIRST_HELDOUT,
    MANIFEST,
    TOKEN_COUNTS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Manifest,
    Shard,
    TokenizerInfo,
    heldout_that_is_enough,
    write_manifest,
)
from megabert.data.shards.sample_format import MAX_CHUNK_TOKENS, SPECIAL_TOKENS, encode_npy, token_dtype
from megabert.data.shards.side_files import check_tokenizer_config
from megabert.data.shards.tokenizer import find_tokenizer, read_tokenizer
from megabert.files.atomic import write_atomically

# A source is divided into about this many tasks, each of at most TASK_BYTES: enough to keep every core busy to the end.
# The tasks must not depend on --workers, so that a command can continue with another number of them.
TASKS = 256
TASK_BYTES = 256 << 20
NO_EFFECT_ON_SHARDS = ("out", "workers", "replace", "max_unknown")


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions):
    out: str = "data/quickstart/text"
    """folder to write shards and manifest.json to"""
    tokenizer: str | None = None
    """tokenizer.json, or a folder with one: write token shards; without it, write text shards"""
    min_chars: int = 1
    """leave out shorter documents, characters"""
    deduplicate: bool = True
    """whether to leave out exact copies of a document"""
    heldout: float = 0.0
    """share of the documents to hold out for evaluation, chosen by a hash of their text"""
    min_shards: int = 24
    """minimum number of training shards; 24 are enough for up to 8 ranks"""
    shard_mb: int = 64
    """approximate maximum size of a shard, MB"""
    chunk_tokens: int = MAX_CHUNK_TOKENS
    """maximum tokens (bytes, for text) of a chunk; a longer document is cut, or if text, gets a chunk of its own"""
    workers: int = os.cpu_count() or 1
    """processes"""
    seed: int = 0
    """seed of the order within shards"""
    replace: bool = False
    """whether to replace finished shards in `out` that were made with another source, tokenizer or other settings"""
    document_end: str | None = None
    """of a source of tokens: the token at which documents end, such as [SEP]; without it they end where the files say"""
    max_unknown: float = 0.05
    """largest share of [UNK] among the tokens; more ends the command"""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.heldout < 1:
            raise ValueError(f"heldout is {self.heldout}, expected a share in [0, 1).")
        if not 1 <= self.chunk_tokens <= MAX_CHUNK_TOKENS:
            raise ValueError(f"chunk_tokens is {self.chunk_tokens}, expected 1 to {MAX_CHUNK_TOKENS}.")
        if min(self.min_shards, self.shard_mb, self.workers) < 1:
            raise ValueError("min_shards, shard_mb and workers must be at least 1.")
        if not 0 <= self.max_unknown <= 1:
            raise ValueError(f"max_unknown is {self.max_unknown}, expected a share from 0 to 1.")


class ShardRequest(NamedTuple):
    """What a command is asked for.

    ids: which ids a source of tokens may have; request_hash: of everything that determines the bytes of the shards;
    left_out: files of the source.
    """

    options: Options
    splits: list[InputSplit]
    tokenizer_path: Path | None
    tokenizer: TokenizerInfo | None
    ids: IdRule | None
    request_hash: str
    left_out: LeftOut

    @property
    def settings(self) -> WriteSettings:
        o = self.options
        return WriteSettings(
            out=Path(o.out),
            tokenizer_path=str(self.tokenizer_path) if self.tokenizer_path else None,
            dtype=token_dtype(self.tokenizer.vocab_size) if self.tokenizer else np.dtype(np.uint8),
            read=o.read,
            min_chars=o.min_chars,
            heldout=o.heldout,
            deduplicate=o.deduplicate,
            chunk_tokens=o.chunk_tokens,
            seed=o.seed,
            ids=self.ids,
        )


def resolve_request(options: Options) -> ShardRequest:
    """Read the tokenizer and list the input splits. Raises ValueError if the tokenizer or the source cannot be read."""
    path, tokenizer = find_tokenizer(options.tokenizer) if options.tokenizer else (None, None)
    out = Path(options.out)
    if (out / MANIFEST).is_file() and Path(options.source).resolve() == out.resolve():
        raise ValueError(
            f"{out}: is both --source and --out, so its shards would be replaced while they are read. Choose another "
            "--out."
        )
    left_out = LeftOut(options.read.skip_damaged)
    splits = list_input_splits(options.source, options.read, left_out)
    ids = rule_of(options, splits, path, tokenizer)
    asked = {name: value for name, value in vars(options).items() if name not in NO_EFFECT_ON_SHARDS}
    found = request_hash(options=asked, tokenizer=tokenizer and asdict(tokenizer), source=source_state(splits))
    return ShardRequest(options, splits, path, tokenizer, ids, found, left_out)


def rule_of(
    options: Options, splits: list[InputSplit], path: Path | None, tokenizer: TokenizerInfo | None
) -> IdRule | None:
    """Return which ids a source of tokens may have, None for text. Raises ValueError if the tokenizer is not theirs."""
    tokens = [split for split in splits if split.kind in TOKEN_KINDS]
    if not tokens:
        if options.document_end is not None:
            raise ValueError(f"{options.source}: --document-end has no effect on text. Omit it.")
        return None
    first, others = tokens[0].paths[0], [split for split in splits if split.kind not in TOKEN_KINDS]
    if others:
        raise ValueError(
            f"{options.source}: holds tokens ({first}) and text ({others[0].paths[0]}). Pass one of them as --source."
        )
    if path is None or tokenizer is None:
        raise ValueError(f"{first}: holds tokens. Pass the tokenizer that they were made with as --tokenizer.")
    if options.min_chars != Options.min_chars:
        raise ValueError(f"{first}: holds tokens, on which --min-chars has no effect. Omit it.")
    end = None if options.document_end is None else read_tokenizer(path).token_to_id(options.document_end)
    if options.document_end is not None and end is None:
        raise ValueError(f"{path}: has no token {options.document_end!r}. Pass one of its tokens as --document-end.")
    rule = make_rule(tokenizer, end)
    print(check_tokenizer(tokens, options.read, rule, path))
    return rule


def group_into_tasks(splits: list[InputSplit]) -> list[list[InputSplit]]:
    """Group input splits, in their order, into tasks."""
    task_bytes = min(TASK_BYTES, max(INPUT_SPLIT_BYTES, sum(split.size for split in splits) // TASKS))
    tasks: list[list[InputSplit]] = []
    size = task_bytes + 1  # so that the first input split begins a task, though it may be empty
    for split in splits:
        cost = task_bytes if split.kind == "hub" else split.size  # the hub does not tell the size of a shard
        if size + cost > task_bytes:
            tasks.append([])
            size = 0
        tasks[-1].append(split)
        size += cost
    return tasks


def write_all_sorted_runs(settings: WriteSettings, splits: list[InputSplit], pool: WorkerPool) -> list[TaskSummary]:
    """Do the first pass, or what is left of it. Returns the summaries of all tasks."""
    tasks = group_into_tasks(splits)
    left = [n for n in range(len(tasks)) if not sorted_runs.summary_path(settings, n).is_file()]
    progress = Progress("reading", sum(split.size for split in splits), _progress_unit(splits))
    progress.start_at(sum(split.size for split in splits) - sum(split.size for n in left for split in tasks[n]))
    try:
        pool.run(
            sorted_runs.write_sorted_runs,
            ((settings, n, tasks[n]) for n in left),
            lambda _: progress.show(*pool.counters[:]),
        )
    finally:
        progress.close()
    return [sorted_runs.read_summary(settings, n) for n in range(len(tasks))]


def _progress_unit(splits: list[InputSplit]) -> str:
    return "shard" if splits and splits[0].kind == "hub" else "B"


def shard_counts(options: Options, itemsize: int, summaries: list[TaskSummary]) -> dict[str, int]:
    """Return the number of shards of each part: enough training shards, and none larger than allowed."""
    sizes = {part: itemsize * sum(summary.elements[part] for summary in summaries) for part in sorted_runs.PARTS}
    train, heldout = (-(-size // (options.shard_mb << 20)) for size in sizes.values())
    train = max(options.min_shards, train)
    if not options.heldout:
        return {"train": train}
    # Held-out shards have the same size limit as training shards. There is at least one.
    return {"train": train, "heldout": max(1, heldout, round(train * options.heldout))}


def write_all_shards(settings: WriteSettings, counts: dict[str, int], paths: list[Path], pool: WorkerPool) -> None:
    """Do the second pass, or what is left of it. paths: the sorted runs."""
    shards = [(part, number) for part, total in counts.items() for number in range(total)]
    left = [shard for shard in shards if not shard_writer.record_path(settings, *shard).is_file()]
    progress = Progress("writing", len(shards), "shard")
    progress.start_at(len(shards) - len(left))
    written = 0

    def show(name: str | None) -> None:
        nonlocal written
        written += name is not None
        progress.show(written)

    tasks = ((settings, paths, part, number, counts[part]) for part, number in left)
    try:
        pool.run(shard_writer.write_shard, tasks, show)
    finally:
        progress.close()


def build_manifest(
    request: ShardRequest, counts: dict[str, int], read: int, first_heldout: float
) -> tuple[Manifest, np.ndarray]:
    """Combine the records of all shards. read: documents of the source; first_heldout: as in TaskSummary.

    Returns the manifest and how often each token id occurs in the training part, (vocab_size,).
    """
    splits: dict[str, tuple[Shard, ...]] = {}
    lengths = np.zeros(length_statistics.LONGEST_COUNTED + 1, dtype=np.int64)
    ids = np.zeros(request.tokenizer.vocab_size if request.tokenizer else 0, dtype=np.int64)
    unknown_id = request.tokenizer.special_ids["unk"] if request.tokenizer else 0
    unknown = 0
    for part, total in counts.items():
        shards = []
        for number in range(total):
            record = shard_writer.read_record(shard_writer.record_path(request.settings, part, number))
            shards.append(record.shard)
            lengths += record.lengths
            unknown += int(record.ids[unknown_id : unknown_id + 1].sum())
            if part == "train":
                ids[: len(record.ids)] += record.ids
        splits[part] = tuple(shards)
    tokens = sum(shard.tokens for shards in splits.values() for shard in shards)
    unit = "tokens" if request.tokenizer else "bytes"
    statistics = length_statistics.summarize(lengths, tokens, unit, read)
    if request.tokenizer:
        statistics["unknown_tokens"] = unknown
    statistics |= {"left_out": request.left_out.counts, FIRST_HELDOUT: first_heldout}
    kind = "tokens" if request.tokenizer else "text"
    return Manifest(kind, splits, statistics, request.tokenizer, request.request_hash), ids


def write_metadata(request: ShardRequest, manifest: Manifest, ids: np.ndarray) -> None:
    """Write all other files of the folder. The manifest comes last, because it makes the folder complete."""
    out = Path(request.options.out)
    files = tokenizer_files(request) | ({TOKEN_COUNTS: encode_npy(ids)} if request.tokenizer else {})
    for name, data in files.items():
        write_atomically(out / name, data)
    write_atomically(out / length_statistics.PLOT, length_statistics.plot(manifest.statistics))
    note_request(out, request.request_hash)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != TOKENIZER}
    write_manifest(out, replace(manifest, files=hashes))


def tokenizer_files(request: ShardRequest) -> dict[str, bytes]:
    """Return the files of the tokenizer, which are copied beside the shards. Raises ValueError for a damaged config."""
    path = request.tokenizer_path
    if path is None:
        return {}
    config = path.with_name(TOKENIZER_CONFIG)
    data = config.read_bytes() if config.is_file() else plain_tokenizer_config()
    check_tokenizer_config(data, str(config))
    return {TOKENIZER: path.read_bytes(), TOKENIZER_CONFIG: data}


def plain_tokenizer_config() -> bytes:
    """Return a tokenizer_config.json with which AutoTokenizer loads a bare tokenizer.json."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
    return json.dumps(config, indent=1).encode()


def write_shards(request: ShardRequest) -> Manifest:
    """Do both passes and write the manifest. Raises ValueError if the source has no documents."""
    options, settings = request.options, request.settings
    with (
        output_folder.locked_work_folder(settings.out, request.request_hash, options.replace),
        WorkerPool(options.workers) as pool,
    ):
        summaries = write_all_sorted_runs(settings, request.splits, pool)
        read = sum(summary.read for summary in summaries)
        left_out = request.left_out
        for summary in summaries:
            left_out.merge(summary.left_out, summary.examples)
        if not read:
            raise ValueError(
                f"{options.source}: has no document of at least {options.min_chars} characters; nothing to write."
                + (f" Left out: {left_out}." if left_out.counts else "")
            )
        counts = shard_counts(options, settings.dtype.itemsize, summaries)
        write_all_shards(settings, counts, sorted_runs.run_paths(settings, summaries), pool)
        manifest, ids = build_manifest(request, counts, read, min(summary.first_heldout for summary in summaries))
        if request.tokenizer_path is not None:
            share = manifest.statistics["unknown_tokens"] / max(1, manifest.statistics["tokens"])
            text = [split for split in request.splits if split.kind not in TOKEN_KINDS]
            documents = (document for split in text for document in read_input_split(split, options.read))
            check_share(share, options.max_unknown, request.tokenizer_path, documents)
        write_metadata(request, manifest, ids)
    return manifest


def main(argv: list[str] | None = None) -> int:
    options = cli.read_flags(Options, "write_shards.py", __doc__ or "", argv)
    request = resolve_request(options)
    out = Path(options.out)
    finished = read_result_of(out, request.request_hash)
    if finished is not None:
        damaged = set(damaged_files(out, finished, options.workers))
        if damaged:
            damaged -= set(restore_tokenizer(out, finished, tokenizer_files(request)))
        if not damaged:
            output_folder.remove_finished_work(out)
            print(f"{out / MANIFEST}: already written from this source with these settings, reused")
            return 0
        print(f"{out / min(damaged)}: missing or changed, so the shards are written again")
        output_folder.remove_finished_work(out)
    elif (out / MANIFEST).is_file() and not (options.replace or was_written_for(out, request.request_hash)):
        raise ValueError(
            f"{out}: holds finished shards of another source, tokenizer or other settings. Choose another --out, or "
            "pass --replace."
        )
    try:
        manifest = write_shards(request)
    except KeyboardInterrupt:
        print(f"\n{out}: interrupted. Run the same command again to continue.", file=sys.stderr)
        return 130  # the exit code of a shell after Ctrl-C
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise ValueError(
            f"{out}: no space left for the output ({error.strerror}). Free some space and run the same command again "
            "to continue, or choose another --out."
        ) from error
    parts = ", ".join(f"{len(shards)} {part}" for part, shards in manifest.splits.items())
    unit = "tokens" if request.tokenizer else "characters"
    statistics = manifest.statistics
    print(f"{out}: {statistics['documents']:,} documents, {statistics['tokens']:,} {unit}, shards: {parts}")
    if request.tokenizer:
        print(f"{out}: {statistics['unknown_tokens'] / max(1, statistics['tokens']):.2%} of the tokens are [UNK]")
    if request.left_out.counts:
        print(f"left out: {request.left_out}")
    if options.heldout and not any(shard.documents for shard in manifest.splits["heldout"]):
        print(f"{out}: no document is held out. Write the shards again with {heldout_that_is_enough(statistics)}.")
    return 0


def command(prog: str = "megabert-shards") -> NoReturn:
    cli.run(main, prog)


if __name__ == "__main__":
    command(sys.argv[0])
