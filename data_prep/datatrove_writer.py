"""Write the documents of a datatrove pipeline as shards, in steps that need the extra [datatrove].

    options = Options(out="data/tokens", tokenizer="data/tokenizer", heldout=0.001)
    written = LocalPipelineExecutor([..., WriteRuns(options)], tasks=64, workers=8)
    LocalPipelineExecutor([FinishShards(options)], depends=written).run()

They are the two passes of write_shards.py: each task of the first executor writes sorted runs of its own documents, and
the only task of the second makes the shards. The shards depend on the documents alone, not on the number of tasks.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline  # pyrefly: ignore[missing-import]
from datatrove.pipeline.base import PipelineStep  # pyrefly: ignore[missing-import]
from datatrove.utils.logging import logger  # pyrefly: ignore[missing-import]

from data_prep.finished import read_result_of
from data_prep.output_folder import PIPELINE, WORK_FORMAT, list_shards, locked_work_folder, remove_results
from data_prep.request_file import REQUEST, request_hash, write_request
from data_prep.source_options import SourceOptions
from data_prep.sources import LeftOut
from data_prep.sources.base import MAX_DOCUMENT_BYTES, NULL, DamagedError, check_text, not_text, too_long
from data_prep.workers import WorkerPool
from data_prep.write_shards import report, write_from_runs
from data_prep.writing import passes, sorted_runs
from data_prep.writing.shard_options import Options, ShardRequest, what_is_asked
from megabert.config.settings import check_limits
from megabert.data.shards.manifest import MANIFEST, read_manifest
from megabert.data.shards.tokenizer import find_tokenizer
from megabert.files.atomic import new_file
from megabert.files.json_file import read_json

# Options of write_shards.py that choose a source or the machines, both of which are the pipeline's.
OF_THE_PIPELINE = {field.name for field in fields(SourceOptions)} - {"on_bad_document"}
OF_THE_PIPELINE |= {"document_end", "trust_tokenizer", "step", "task", "engine", "ray_address"}


class _Step(PipelineStep):
    """options: those of write_shards.py but the source; the same for both steps.

    `out` is on a file system that all machines of the pipeline share.
    """

    type = "MegaBERT"

    def __init__(self, options: Options):
        super().__init__()
        for field in fields(options):
            if field.name in OF_THE_PIPELINE and getattr(options, field.name) != field.default:
                raise ValueError(f"{field.name} has no effect in a datatrove pipeline. Omit it.")
        check_limits(options)
        self.options = options

    def request(self) -> ShardRequest:
        """Return what both steps share. Raises ValueError if the tokenizer cannot be read."""
        options = self.options
        path, tokenizer = find_tokenizer(options.tokenizer) if options.tokenizer else (None, None)
        asked = request_hash(options=what_is_asked(options), tokenizer=tokenizer and asdict(tokenizer))
        return ShardRequest(options, [], path, tokenizer, None, asked, LeftOut(options.read.skip_damaged))


class WriteRuns(_Step):
    """Writes the documents that reach it as sorted runs below OUT/.work; the last step of a pipeline."""

    name = "sorted runs"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        request = self.request()
        _begin(request, world_size)
        # Every core has a task of its own, so threads of the tokenizer would only compete.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        settings, left_out = request.settings, request.left_out
        # What an earlier pipeline left there may be of other documents.
        sorted_runs.summary_path(settings, rank).unlink(missing_ok=True)
        writer = sorted_runs.SortedRunWriter(settings, rank)
        sorted_runs.add_texts(writer, self._texts(data, left_out), f"task {rank} of the pipeline", left_out)
        sorted_runs.write_summary(writer, left_out)
        yield from ()

    def _texts(self, data: DocumentsPipeline, left_out: LeftOut) -> Iterator[str]:
        for document in data:
            self.stat_update("documents")
            if document.text is None:
                left_out.add(NULL, f"document {document.id}")
                continue
            try:
                yield _text(document)
            except DamagedError as error:
                left_out.damaged(error)


class FinishShards(_Step):
    """Makes the shards of all sorted runs, in one task that uses `workers` processes of one machine."""

    name = "shards"

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        request, out = self.request(), Path(self.options.out)
        work = request.settings.work
        if world_size > 1:
            raise ValueError(f"FinishShards has {world_size} tasks. Run it in an executor of its own, with tasks=1.")
        if not (work / PIPELINE).is_file():
            if _is_finished(out, request.request_hash):
                logger.info(f"{out / MANIFEST}: already written with these settings")
                return
            raise ValueError(f"{work}: has no sorted runs. Run a pipeline that ends with WriteRuns first.")
        tasks = _tasks_of(request)
        request = _with_documents(request, tasks)
        if read_result_of(out, request.request_hash) is not None:
            logger.info(f"{out / MANIFEST}: already written of these documents with these settings")
            shutil.rmtree(work)
            return
        _begin_shards(request)
        with (
            locked_work_folder(out, request.request_hash, self.options.replace),
            WorkerPool(self.options.workers) as pool,
        ):
            report(request, write_from_runs(request, tasks, pool))
        yield from ()


def _text(document: Document) -> str:
    """Raise DamagedError if a document is no text, or too long."""
    where = f"document {document.id}"
    if not isinstance(document.text, str):
        raise not_text(where, "text", repr(document.text)[:40])
    if len(document.text) > MAX_DOCUMENT_BYTES:
        raise too_long(where, "Cut it in the pipeline.")
    check_text(document.text, where)
    return document.text


def _begin(request: ShardRequest, tasks: int) -> None:
    """Make the work folder, which all tasks share. Raises ValueError if it or `out` is in use for something else."""
    work = request.settings.work
    _check_free(request)
    if (work / REQUEST).exists():
        raise ValueError(
            f"{work}: shards are being written from what it holds. Finish them with FinishShards or write_shards.py, "
            "or remove the folder to begin anew."
        )
    state = {"format": WORK_FORMAT, "asked": request.request_hash, "tasks": tasks}
    for name in ("runs", "shards"):
        (work / name).mkdir(parents=True, exist_ok=True)
    if not (work / PIPELINE).exists():
        with new_file(work / PIPELINE) as temporary:
            temporary.write_text(json.dumps(state))
    if read_json(work / PIPELINE) != state:
        raise ValueError(
            f"{work}: holds sorted runs of other options, another tokenizer or another number of tasks. Use those "
            "again, remove the folder, or choose another out."
        )


def _check_free(request: ShardRequest) -> None:
    """Raise ValueError if `out` holds shards. Whether they are of the same documents is known at the end only."""
    out = Path(request.options.out)
    if not request.options.replace and ((out / MANIFEST).is_file() or list_shards(out)):
        raise ValueError(f"{out}: holds shards already. Choose another out, or pass replace=True to replace them.")


def _tasks_of(request: ShardRequest) -> int:
    """Return the number of tasks that wrote sorted runs. Raises ValueError if one of them is not done."""
    work = request.settings.work
    state = read_json(work / PIPELINE)
    if (state["format"], state["asked"]) != (WORK_FORMAT, request.request_hash):
        raise ValueError(
            f"{work}: holds sorted runs of other options or another tokenizer. Give FinishShards those of WriteRuns."
        )
    if missing := passes.missing_summaries(request.settings, state["tasks"]):
        raise ValueError(
            f"{work}: lacks the sorted runs of {len(missing)} of {state['tasks']} tasks, such as task {missing[0]}. "
            "Run the pipeline with WriteRuns again, which does what is left."
        )
    return state["tasks"]


def _with_documents(request: ShardRequest, tasks: int) -> ShardRequest:
    """Add to a request's hash what the documents are, which do not depend on the tasks that they were divided into."""
    summaries = passes.read_summaries(request.settings, tasks)
    found = [sum(summary.read for summary in summaries), sum(summary.hash_sum for summary in summaries) % 2**64]
    return request._replace(request_hash=f"{request.request_hash}-{request_hash(documents=found)}")


def _is_finished(out: Path, asked: str) -> bool:
    """Return whether the shards were written with the same options and tokenizer."""
    try:
        return read_manifest(out).request.startswith(asked)
    except ValueError:
        # A manifest that is missing, damaged or of another format version.
        return False


def _begin_shards(request: ShardRequest) -> None:
    """Let the work folder belong to these documents from here on, and `out` to their shards."""
    out, work = Path(request.options.out), request.settings.work
    if not (work / REQUEST).exists():
        _check_free(request)
        remove_results(out)
        write_request(work, WORK_FORMAT, request.request_hash)
