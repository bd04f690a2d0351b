"""Turn a corpus into shards: text shards, or with --tokenizer the token shards that training reads.

    {command} --source CORPUS --out data/mine/text
    {command} --source CORPUS --tokenizer data/mine/tokenizer --out data/mine/tokens

There are two passes, and both use all cores. The first writes sorted runs: documents, tokenized, in the order of a hash
of their text. In the second, each shard collects its range of hashes from all sorted runs. So documents are shuffled
globally, copies of one text meet in one shard, and the text alone decides whether a document is held out. A killed
command continues where it stopped when it is run again, and ends with the same bytes. --step and --engine share the
work between machines.
"""

import sys

try:
    from megabert.process.interrupts import end_at_ctrl_c
except ModuleNotFoundError as error:
    print(f"{error}: run bash launch/install.sh, then source .venv/bin/activate.", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    end_at_ctrl_c()

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

from data_prep import output_folder, separate_tasks
from data_prep.finished import damaged_files, read_result_of, restore_tokenizer
from data_prep.sources import read_input_split
from data_prep.sources.base import TOKEN_KINDS, InputSplit, is_disk_full
from data_prep.workers import WorkerPool
from data_prep.writing import passes
from data_prep.writing.merged_runs import ShardCounts, plan_reads
from data_prep.writing.metadata import build_manifest, tokenizer_files, write_metadata
from data_prep.writing.passes import Part
from data_prep.writing.ray_pool import RayPool
from data_prep.writing.shard_options import Options, ShardRequest, check_unchanged, resolve_request
from data_prep.writing.sorted_runs import TaskSummary
from data_prep.writing.unknown_tokens import check_share
from megabert.config import cli
from megabert.data.shards.manifest import MANIFEST, TOKENIZER, Manifest, heldout_that_is_enough
from megabert.files.disk import explain
from megabert.process.exit_codes import EXIT_INTERRUPTED


def write_shards(request: ShardRequest) -> Manifest:
    """Do both passes and write the manifest. Raises ValueError if the source has no documents, or if it is changed."""
    options, settings = request.options, request.settings
    tasks = passes.group_into_tasks(request.splits)
    with (
        output_folder.locked_work_folder(settings.out, request.request_hash, options.replace),
        open_pool(request) as pool,
    ):
        try:
            passes.write_sorted_runs(settings, dict(enumerate(tasks)), pool)
        except ValueError:
            # A file that something writes to looks damaged, and one that is cut while it is mapped ends the worker.
            check_unchanged(request)
            raise
        check_unchanged(request)
        return write_from_runs(request, len(tasks), pool)


def write_from_runs(request: ShardRequest, tasks: int, pool: passes.Pool) -> Manifest:
    """Do what follows the first pass. tasks: of the first pass."""
    settings = request.settings
    summaries = passes.read_summaries(settings, tasks)
    check_not_empty(request, summaries)
    counts = passes.shard_counts(request.options, settings.dtype, summaries)
    reads = plan_reads(settings, summaries, counts)
    passes.merge_groups(settings, reads, counts, pool, Part())
    passes.write_shards(settings, reads, counts, pool, Part())
    return write_rest(request, summaries, counts, request.splits)


def open_pool(request: ShardRequest) -> AbstractContextManager[passes.Pool]:
    options = request.options
    if options.engine == "ray":
        return RayPool(options.ray_address, request.settings.work)
    return WorkerPool(options.workers)


def check_not_empty(request: ShardRequest, summaries: list[TaskSummary]) -> None:
    """Add up what the first pass left out. Raises ValueError if it found no document."""
    for summary in summaries:
        request.left_out.merge(summary.left_out, summary.examples)
    if not any(summary.read for summary in summaries):
        raise ValueError(
            f"{request.options.source}: has no document of at least {request.options.min_chars} characters; nothing to "
            "write." + (f" Left out: {request.left_out}." if request.left_out.counts else "")
        )


def write_rest(
    request: ShardRequest, summaries: list[TaskSummary], counts: ShardCounts, splits: Iterable[InputSplit]
) -> Manifest:
    """Write all files but the shards. Raises ValueError if no document has a token, or if too many are [UNK]."""
    read = sum(summary.read for summary in summaries)
    manifest, ids = build_manifest(request, counts, read, min(summary.first_heldout for summary in summaries))
    if not manifest.statistics["documents"]:
        what = "has no document with a character"
        if request.tokenizer_path is not None:
            what = f"the tokenizer {request.tokenizer_path} leaves no token of any document"
        raise ValueError(f"{request.options.source}: {what}; nothing to write.")
    if request.tokenizer_path is not None:
        share = manifest.statistics["unknown_tokens"] / max(1, manifest.statistics["tokens"])
        text = (split for split in splits if split.kind not in TOKEN_KINDS)
        documents = (document for split in text for document in read_input_split(split, request.options.read))
        check_share(share, request.options.max_unknown, request.tokenizer_path, documents)
    write_metadata(request, manifest, ids)
    return manifest


def finish(options: Options) -> tuple[ShardRequest, Manifest]:
    """Do the last of the separate steps: write the manifest, and remove the work folder."""
    plan = separate_tasks.read_plan(options)
    with output_folder.locked_work_folder(Path(options.out), plan.request.request_hash, options.replace):
        first = separate_tasks.read_first_pass(plan)
        check_not_empty(plan.request, first.summaries)
        separate_tasks.check_shards(plan, first.counts)
        splits = separate_tasks.splits_of_plan(Path(options.out))
        return plan.request, write_rest(plan.request, first.summaries, first.counts, splits)


def check_tokenizer_replaceable(request: ShardRequest) -> None:
    """Raise ValueError for a folder that another tokenizer was trained to, which only --replace replaces."""
    out, tokenizer = Path(request.options.out), request.tokenizer_path
    begun = any((out / name).exists() for name in (MANIFEST, ".work")) or output_folder.list_shards(out)
    if tokenizer is None or request.options.replace or begun or not (out / TOKENIZER).is_file():
        return
    if (out / TOKENIZER).read_bytes() != tokenizer.read_bytes():
        raise ValueError(f"{out / TOKENIZER}: is another tokenizer. Choose another --out, or pass --replace.")


def reused(request: ShardRequest) -> bool:
    """Return whether the folder already holds the shards of this request, unchanged. Restores a lost tokenizer."""
    out, options = Path(request.options.out), request.options
    finished = read_result_of(out, request.request_hash)
    if finished is None:
        output_folder.check_replaceable(out, request.request_hash, options.replace)
        check_tokenizer_replaceable(request)
        if separate_tasks.plan_path(out).is_file():
            raise ValueError(
                f"{separate_tasks.plan_path(out)}: separate commands with --step may be writing there. End them and "
                "remove this file to continue in one command, or continue with --step."
            )
        return False
    damaged = set(damaged_files(out, finished, options.workers))
    if damaged:
        damaged -= set(restore_tokenizer(out, finished, tokenizer_files(request.tokenizer_file)))
    output_folder.remove_finished_work(out)
    if damaged:
        print(f"{out / min(damaged)}: missing or changed, so the shards are written again")
    else:
        print(f"{out / MANIFEST}: already written from this source with these settings, reused")
    return not damaged


def main(argv: list[str] | None = None, prog: str = "data_prep/write_shards.py") -> int:
    options = cli.read_flags(Options, prog, __doc__ or "", argv)
    out = Path(options.out)
    try:
        if options.step == "plan":
            check_tokenizer_replaceable(resolve_request(options))
            separate_tasks.write_plan(options)
            return 0
        if options.step is not None and separate_tasks.is_finished(options):
            return 0
        if options.step == "finish":
            report(*finish(options))
            return 0
        if options.step is not None:
            separate_tasks.do_part(options)
            return 0
        request = resolve_request(options)
        if not reused(request):
            report(request, write_shards(request))
    except KeyboardInterrupt:
        print(f"\n{out}: interrupted. Run the same command again to continue.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        if not is_disk_full(error):
            raise
        what = explain(error) if error.filename is not None else f"{out}: {explain(error)}"
        raise ValueError(f"{what} What has been written is kept.") from error
    return 0


def report(request: ShardRequest, manifest: Manifest) -> None:
    """Print what was written."""
    options, out = request.options, Path(request.options.out)
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
    elif options.heldout and not any(shard.documents for shard in manifest.splits["train"]):
        print(f"{out}: every document is held out. Write the shards again with a smaller --heldout.")


def command(prog: str = "megabert-shards") -> NoReturn:
    cli.run(lambda: main(prog=prog), prog)


if __name__ == "__main__":
    command(sys.argv[0])
