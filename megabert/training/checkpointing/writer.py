"""Write checkpoints that are either complete or absent, while training continues."""

import errno
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import deepspeed
import torch

from megabert.data.shards.manifest import TOKENIZER, TOKENIZER_CONFIG
from megabert.data.shards.source import Source
from megabert.data.stream import Position, positions_to_json
from megabert.files import checkpoint_format, hashing
from megabert.files.atomic import write_atomically
from megabert.files.checkpoint_format import State, step_of
from megabert.files.disk import DiskError, as_user_error, format_bytes
from megabert.process.error_text import first_line
from megabert.training.distributed.deepspeed_compat import capture_checkpoint
from megabert.training.distributed.sync import gather_dicts

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints to keep.

    last: how many of the newest. every_steps: also all whose step is a multiple of this; 0 for none. best: also the
    one with the lowest held-out loss.
    """

    last: int
    every_steps: int = 0
    best: bool = False

    def to_delete(self, heldout_loss: Mapping[str, float | None], last_good_step: int | None = None) -> list[str]:
        """Return the tags to delete, newest first. heldout_loss: each tag's loss; None if it was not measured.

        last_good_step: the step of the last applied update, if later ones were skipped: a rollback needs the newest
        checkpoint up to that step.

        Example: losses 3.0, 2.0, 2.5 at steps 10, 20, 30: last=1, best=True deletes step 10.
        """
        tags = sorted(heldout_loss, key=step_of, reverse=True)
        kept = set(tags[: self.last])
        if last_good_step is not None:
            kept |= set([tag for tag in tags if step_of(tag) <= last_good_step][:1])
        if self.every_steps:
            kept |= {tag for tag in tags if step_of(tag) % self.every_steps == 0}
        if self.best and (measured := {tag: loss for tag, loss in heldout_loss.items() if loss is not None}):
            kept.add(min(measured, key=lambda tag: (measured[tag], step_of(tag))))
        return [tag for tag in tags if tag not in kept]


class CheckpointParts(NamedTuple):
    """What one rank writes of a checkpoint.

    tensor_files: name -> object for torch.save. small_files: name -> bytes; only rank 0 has any. positions: of this
    rank's data streams.
    """

    state: State
    tensor_files: dict[str, object]
    small_files: dict[str, bytes]
    positions: dict[int, Position]


class CheckpointWriter:
    """Writes a run's checkpoints. Every rank has one and calls the same methods in the same order.

    DeepSpeed's own saving is not atomic, writes `latest` before all ranks are done, and hangs when one rank's disk is
    full. Its asynchronous writers (0.19.8) do not run on a CPU and change none of that. So DeepSpeed only provides
    its state, which is copied to host memory. On every rank a thread writes, hashes and syncs that rank's files to a
    folder with a temporary name; when all ranks are done, rank 0 renames the folder. staged_folder() is for one process
    and its main thread.

    overlap: whether training continues while a checkpoint is written; the rank's state is then in memory twice.
    log_line: called with a message when a checkpoint is complete.
    """

    def __init__(self, folder: Path, retention: Retention, overlap: bool, log_line: Callable[[str], None], rank: int):
        self.folder = folder
        self.retention = retention
        self.overlap = overlap
        self.log_line = log_line
        self.rank = rank
        # A process group of its own: the writing thread's collectives run concurrently with the training's.
        group = torch.distributed.new_group(backend="gloo")
        assert isinstance(group, torch.distributed.ProcessGroup), (
            f"rank {self.rank} is not in the group of the writers: got {group!r}"
        )
        self.group = group
        # Gloo connects the ranks at its first collective. With NCCL for the training that would be the first save: a
        # network that gloo cannot use would show only after hours.
        gather_dicts({}, group)
        self.thread: threading.Thread | None = None
        self.finished = True
        self.problem: str | None = None

    def save(self, engine: deepspeed.DeepSpeedEngine, state: State, positions: dict[int, Position], source: Source):
        """Start writing a checkpoint, after the previous one is complete.

        positions: of this rank's streams. source: the shards whose tokenizer is stored in the checkpoint. Raises
        DiskError, on all ranks, if the previous checkpoint failed, or without overlap if this one did.
        """
        self.wait()
        small_files: dict[str, bytes] = {}
        if self.rank == 0:
            small_files = {checkpoint_format.STATE: _json(vars(state)), TOKENIZER: source.read_tokenizer_file()}
            if (config := source.read_optional(TOKENIZER_CONFIG)) is not None:
                small_files[TOKENIZER_CONFIG] = config
        tensor_files = capture_checkpoint(engine, copy_to_host if self.overlap else None)
        parts = CheckpointParts(state, tensor_files, small_files, dict(positions))
        if self.overlap:
            self.thread = threading.Thread(target=self._write, args=(parts,), name="checkpoint", daemon=True)
            self.thread.start()
        else:
            self._write(parts)
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is complete. Raises DiskError, on all ranks, if it could not be written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.problem is None and not self.finished:
            self.problem = "the last checkpoint was not finished; the error is logged above."
        if self.problem is not None:
            raise DiskError(self.problem)

    def _write(self, parts: CheckpointParts) -> None:
        """Write the checkpoint. On failure, set self.problem on all ranks."""
        self.finished = False
        tag = checkpoint_format.tag_of(parts.state.step)
        temporary = self.folder / f"{checkpoint_format.TEMPORARY}{tag}"
        needed = sum(self._on_all_ranks(lambda: _num_bytes(parts.tensor_files) + _num_bytes(parts.small_files)))
        try:
            self._on_all_ranks(lambda: self._begin(temporary, needed))
            hashes = self._on_all_ranks(lambda: _write_files(temporary, parts))
            positions = self._on_all_ranks(lambda: parts.positions)
            self._on_all_ranks(lambda: self._publish(temporary, parts.state, _merge(hashes), _merge(positions)))
            if self.rank == 0:
                self.log_line(f"step {parts.state.step}: saved {self.folder / tag}")
        except OSError as error:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            self.problem = self._explain(tag, error, needed)
        self.finished = True

    def _on_all_ranks(self, action: Callable[[], T]) -> list[T]:
        """Call action() on every rank. Returns all results; raises OSError on all ranks if action() did on any."""
        problem, result = None, None
        try:
            result = action()
        except OSError as error:
            problem = str(error)
        outcomes: dict[int, tuple[str | None, Any]] = gather_dicts({self.rank: (problem, result)}, self.group)
        for problem, _ in outcomes.values():
            if problem is not None:
                raise OSError(problem)
        return [result for _, result in outcomes.values()]

    def _begin(self, temporary: Path, needed: int) -> None:
        """Create the temporary folder on rank 0. Raises OSError if the disk has fewer than `needed` free bytes."""
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"{checkpoint_format.TEMPORARY}*"):
                _delete(leftover)
            temporary.mkdir()
            if needed > shutil.disk_usage(temporary).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))

    def _publish(
        self, temporary: Path, state: State, hashes: dict[str, tuple[int, str]], positions: dict[int, Position]
    ) -> None:
        """Write the last two files, rename the folder, and delete the checkpoints that are not kept; on rank 0.

        MANIFEST.json has no format version: the one in state.json covers both files.
        """
        if self.rank != 0:
            return
        streams, manifest = temporary / checkpoint_format.STREAMS, temporary / checkpoint_format.MANIFEST
        streams.write_bytes(_json(positions_to_json(positions)))
        hashes |= {streams.name: hashing.hash_and_sync(streams)}
        manifest.write_bytes(_json({name: hashes[name] for name in sorted(hashes)}))
        hashing.hash_and_sync(manifest)
        hashing.sync_folder(temporary)
        final = self.folder / temporary.name.removeprefix(checkpoint_format.TEMPORARY)
        # The run did not start from this checkpoint: it started from an earlier step.
        if final.exists():
            _delete_checkpoint(final)
        os.rename(temporary, final)
        write_atomically(self.folder / checkpoint_format.LATEST, final.name.encode())
        hashing.sync_folder(self.folder)
        last_good_step = state.step - state.guard["in_a_row"]
        for tag in self.retention.to_delete(checkpoint_format.heldout_losses(self.folder), last_good_step):
            _delete_checkpoint(self.folder / tag)

    def _explain(self, tag: str, error: OSError, needed: int) -> str:
        free = format_bytes(shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0)
        return (
            f"checkpoint {tag} could not be written: {error}. It needs {format_bytes(needed)}; {free} are free in "
            f"{self.folder}. Earlier checkpoints are intact: free some space there, then run the same command to "
            "resume from the last one."
        )


def _delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that a partly deleted one does not look complete."""
    renamed = checkpoint.with_name(f"{checkpoint_format.TEMPORARY}old-{checkpoint.name}")
    os.rename(checkpoint, renamed)
    shutil.rmtree(renamed)


def _delete(path: Path) -> None:
    """Delete a folder, a file or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def set_aside_after(folder: Path, step: int) -> None:
    """Move checkpoints of steps after `step`, where the run continues, into a new subfolder. Call on rank 0.

    The run will write other checkpoints of these steps. Left in place, the old ones would count as the newest.
    """
    later = [tag for tag in checkpoint_format.list_tags(folder) if checkpoint_format.step_of(tag) > step]
    if later:
        aside = Path(tempfile.mkdtemp(prefix=f"set-aside-{time.strftime('%Y%m%d-%H%M%S')}-", dir=folder))
        for tag in later:
            os.rename(folder / tag, aside / tag)
        log.warning("checkpoints of later steps are moved to %s: %s", aside, ", ".join(later))


def check_disk_space(folder: Path, num_parameters: int, stage: int, retention: Retention, rank: int) -> None:
    """Warn, before a run, if its checkpoints will not fit.

    Raises ValueError or DiskError, on all ranks, if none can be written.
    """
    problem = None
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            problem = as_user_error(
                error, f"{folder}: checkpoints cannot be written here: {error}. Choose another run.output_dir."
            )
    if problems := gather_dicts({} if problem is None else {rank: problem}):
        raise problems[0]
    # An old checkpoint is deleted after the new one is complete: the disk briefly holds one more than retention.last.
    size = checkpoint_format.bytes_of(num_parameters, stage)
    missing = retention.last + 1 - len(checkpoint_format.list_tags(folder))
    free = shutil.disk_usage(folder).free
    if rank == 0 and missing * size > free:
        log.warning(
            "%s: %d more checkpoints of %s will not fit, %s are free: free some space, or lower run.keep_checkpoints.",
            folder, missing, format_bytes(size), format_bytes(free),
        )  # fmt: skip


def copy_to_host(content: object) -> object:
    """Copy all tensors of nested containers to host memory."""
    return _host_copy(content, {})


def _host_copy(item: object, copies: dict[tuple, torch.Tensor]) -> object:
    """Copy tensors in nested containers to host memory. copies: made so far, so that tied weights stay one tensor."""
    if isinstance(item, torch.Tensor):
        storage = item.untyped_storage().data_ptr()
        key = (item.device, storage, item.storage_offset(), item.shape, item.stride(), item.dtype)
        if key not in copies:
            copies[key] = item.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(item, dict):
        return type(item)((key, _host_copy(value, copies)) for key, value in item.items())
    if isinstance(item, list):
        return [_host_copy(value, copies) for value in item]
    if type(item) is tuple:
        return tuple(_host_copy(value, copies) for value in item)
    return item


def _write_files(folder: Path, parts: CheckpointParts) -> dict[str, tuple[int, str]]:
    """Write this rank's files. Returns name -> (bytes, sha256) once they are on disk."""
    for name, content in parts.tensor_files.items():
        try:
            torch.save(content, folder / name)
        except RuntimeError as error:
            # torch reports a full disk as a RuntimeError.
            raise OSError(errno.EIO, first_line(error), str(folder / name)) from error
    for name, content in parts.small_files.items():
        (folder / name).write_bytes(content)
    return {name: hashing.hash_and_sync(folder / name) for name in [*parts.tensor_files, *parts.small_files]}


def _num_bytes(item: object) -> int:
    """Count the bytes of tensors and byte strings in nested containers."""
    if isinstance(item, torch.Tensor):
        return item.numel() * item.element_size()
    if isinstance(item, bytes):
        return len(item)
    values = item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else ()
    return sum(_num_bytes(value) for value in values)


def _merge(parts: list[dict]) -> dict:
    return {key: value for part in parts for key, value in part.items()}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
