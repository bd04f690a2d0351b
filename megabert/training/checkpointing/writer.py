"""Writing checkpoints: complete or not at all, while training goes on.

DeepSpeed's own saving is not atomic, writes `latest` before all ranks are done, and a rank whose disk is full leaves the
others waiting. So it is only asked for its state, which is copied to host memory; a thread of every rank writes, hashes and
syncs its files under a temporary name, and rank 0 makes the checkpoint appear by one rename when all are on disk.
DeepSpeed 0.19.8's own asynchronous writers do not work on a CPU, and would change nothing of this.
"""

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
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from megabert.data.shards.manifest import TOKENIZER
from megabert.data.shards.source import Source
from megabert.data.shards.tokenizer import TOKENIZER_CONFIG
from megabert.data.stream import Position, positions_to_json
from megabert.files import checkpoint_format as layout
from megabert.files import hashing
from megabert.files.atomic import write_atomically
from megabert.files.checkpoint_format import State, step_of
from megabert.training.distributed.sync import gather

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Retention:
    """last: how many of the newest; every_steps: all of multiples of so many steps, 0: none; best: the lowest loss."""

    last: int
    every_steps: int = 0
    best: bool = False

    def expendable(self, heldout_loss: Mapping[str, float | None], good: int | None = None) -> list[str]:
        """The tags to delete, newest first. heldout_loss: of each tag, None where it was not measured.

        good: the step of the last update that was made, if some after it were refused: a rollback wants the newest
        checkpoint up to there.

        Retention(last=1, best=True) on step 10: 3.0, step 20: 2.0, step 30: 2.5 -> step 10.
        """
        tags = sorted(heldout_loss, key=step_of, reverse=True)
        kept = set(tags[: self.last])
        if good is not None:
            kept |= set([tag for tag in tags if step_of(tag) <= good][:1])
        if self.every_steps:
            kept |= {tag for tag in tags if step_of(tag) % self.every_steps == 0}
        if self.best and (measured := {tag: loss for tag, loss in heldout_loss.items() if loss is not None}):
            kept.add(min(measured, key=lambda tag: (measured[tag], step_of(tag))))
        return [tag for tag in tags if tag not in kept]


class Job(NamedTuple):
    """One rank's part of a checkpoint. files: name -> what torch saves there; texts: name -> bytes, rank 0's."""

    state: State
    files: dict[str, Any]
    texts: dict[str, bytes]
    positions: dict[int, Position]


class Saver:
    """Writes a run's checkpoints. Every rank has one and calls the same methods in the same order.

    overlap: whether training goes on while a checkpoint is written, for which this rank's state is held twice.
    say: is told when a checkpoint is there.
    """

    def __init__(self, folder: Path, retention: Retention, overlap: bool, say: Callable[[str], None]):
        self.folder = folder
        self.retention = retention
        self.overlap = overlap
        self.say = say
        self.rank = deepspeed.comm.get_rank()
        # The writing thread's collectives go through a group of their own: they may come between any two of the training.
        group = torch.distributed.new_group(backend="gloo")
        assert isinstance(group, torch.distributed.ProcessGroup), "every rank is in it"
        self.group = group
        self.thread: threading.Thread | None = None
        self.finished = True
        self.problem: str | None = None

    def save(self, engine: deepspeed.DeepSpeedEngine, state: State, positions: dict[int, Position], source: Source):
        """Begin a checkpoint; waits for the one before. positions: of this rank's streams; source: whose tokenizer to keep.

        Raises ValueError, on all ranks, if the one before failed, or this one and nothing overlaps.
        """
        self.wait()
        texts: dict[str, bytes] = {}
        if self.rank == 0:
            texts = {layout.STATE: _json(vars(state)), TOKENIZER: source.read_tokenizer_file()}
            if (config := source.read_optional(TOKENIZER_CONFIG)) is not None:
                texts[TOKENIZER_CONFIG] = config
        job = Job(state, _states_of(engine, copy=self.overlap), texts, dict(positions))
        if self.overlap:
            self.thread = threading.Thread(target=self._write, args=(job,), name="checkpoint", daemon=True)
            self.thread.start()
        else:
            self._write(job)
            self.wait()

    def wait(self) -> None:
        """Return when the last checkpoint is there. Raises ValueError, on all ranks, if it could not be written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.problem is None and not self.finished:
            self.problem = "the last checkpoint was not finished; its error stands above."
        if self.problem is not None:
            raise ValueError(self.problem)

    def _write(self, job: Job) -> None:
        """Set self.problem to what went wrong anywhere, the same on all ranks."""
        self.finished = False
        tag = layout.tag_of(job.state.step)
        temporary = self.folder / f"{layout.TEMPORARY}{tag}"
        needed = sum(self._agreed(lambda: _bytes_of(job.files) + _bytes_of(job.texts)))
        try:
            self._agreed(lambda: self._begin(temporary, needed))
            hashes = self._agreed(lambda: _write_files(temporary, job))
            positions = self._agreed(lambda: job.positions)
            self._agreed(lambda: self._publish(temporary, job.state, _merge(hashes), _merge(positions)))
            if self.rank == 0:
                self.say(f"step {job.state.step}: saved {self.folder / tag}")
        except OSError as mistake:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            self.problem = self._explain(tag, mistake, needed)
        self.finished = True

    def _agreed(self, action: Callable[[], T]) -> list[T]:
        """Do something on every rank. Returns all results; raises OSError on all ranks if it did on any."""
        problem, result = None, None
        try:
            result = action()
        except OSError as mistake:
            problem = str(mistake)
        outcomes = gather({self.rank: (problem, result)}, self.group)
        for problem, _ in outcomes.values():
            if problem is not None:
                raise OSError(problem)
        return [result for _, result in outcomes.values()]

    def _begin(self, temporary: Path, needed: int) -> None:
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"{layout.TEMPORARY}*"):
                _discard(leftover)
            temporary.mkdir()
            if needed > shutil.disk_usage(temporary).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))

    def _publish(
        self, temporary: Path, state: State, hashes: dict[str, tuple[int, str]], positions: dict[int, Position]
    ) -> None:
        if self.rank != 0:
            return
        streams, manifest = temporary / layout.STREAMS, temporary / layout.MANIFEST
        streams.write_bytes(_json(positions_to_json(positions)))
        hashes |= {streams.name: hashing.hash_and_sync(streams)}
        manifest.write_bytes(_json({name: hashes[name] for name in sorted(hashes)}))
        hashing.hash_and_sync(manifest)
        hashing.sync_folder(temporary)
        final = self.folder / temporary.name.removeprefix(layout.TEMPORARY)
        if final.exists():  # a damaged one of this step, which was passed over
            remove(final)
        os.rename(temporary, final)
        write_atomically(self.folder / layout.LATEST, final.name.encode())
        hashing.sync_folder(self.folder)
        good = state.step - state.guard["in_a_row"]
        for tag in self.retention.expendable(layout.heldout_losses(self.folder), good):
            remove(self.folder / tag)

    def _explain(self, tag: str, mistake: OSError, needed: int) -> str:
        free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
        return (
            f"checkpoint {tag} could not be written: {mistake}. It needs {_mb(needed)}; {_mb(free)} are free in {self.folder}. "
            "Earlier checkpoints are untouched: make room there, and the same command goes on from the last one."
        )


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; renamed first, because half of one must not look like one."""
    doomed = checkpoint.with_name(f"{layout.TEMPORARY}old-{checkpoint.name}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def _discard(leftover: Path) -> None:
    """Delete what is in the way: a folder, a file or a link."""
    if leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover)
    else:
        leftover.unlink()


def set_aside_after(folder: Path, step: int) -> None:
    """Move checkpoints of later steps than the one a run starts from into a folder of their own; rank 0 calls this.

    They belong to another course of the run: left in place, retention would take them for the newest.
    """
    later = [tag for tag in layout.list_tags(folder) if layout.step_of(tag) > step]
    if later:
        aside = Path(tempfile.mkdtemp(prefix=f"set-aside-{time.strftime('%Y%m%d-%H%M%S')}-", dir=folder))
        for tag in later:
            os.rename(folder / tag, aside / tag)
        log.warning("checkpoints of later steps are set aside in %s: %s", aside, ", ".join(later))


def check_room(folder: Path, num_parameters: int, stage: int, retention: Retention) -> None:
    """Before a run: warn if its checkpoints will not fit. Raises ValueError, on all ranks, if none can be written there.

    AdamW has 12 bytes per parameter, fp32 weights and two moments; ZeRO 1 and 2 keep the weights twice.
    """
    problem, rank = None, deepspeed.comm.get_rank()
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as mistake:
            problem = f"{folder}: no checkpoint can be written here: {mistake}. Choose another run.output_dir."
    if problems := gather({} if problem is None else {rank: problem}):
        raise ValueError(problems[0])
    # The old ones go when the new one is complete, so for a moment there is one more.
    each, missing = num_parameters * (16 if stage in (1, 2) else 12), retention.last + 1 - len(layout.list_tags(folder))
    free = shutil.disk_usage(folder).free
    if rank == 0 and missing * each > free:
        log.warning(
            "%s: %d more checkpoints of %s will not fit, %s are free: make room, or lower run.keep_checkpoints.",
            folder, missing, _mb(each), _mb(free),
        )  # fmt: skip


class _States(TorchCheckpointEngine):
    """Takes what DeepSpeed would write: file name -> state."""

    def __init__(self, copy: bool) -> None:
        super().__init__(None)
        self.copy = copy
        self.files: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[os.path.basename(path)] = _host_copy(state_dict, {}) if self.copy else state_dict


def _states_of(engine: deepspeed.DeepSpeedEngine, copy: bool) -> dict[str, Any]:
    """What DeepSpeed would write of this rank, by file name; every rank calls this. copy: to host memory."""
    states, usual = _States(copy), engine.checkpoint_engine
    engine.checkpoint_engine = states
    try:
        with tempfile.TemporaryDirectory() as scratch:  # DeepSpeed puts a script for users there
            engine.save_checkpoint(scratch, tag="state", save_latest=False)
    finally:
        engine.checkpoint_engine = usual
    return states.files


def _host_copy(item: Any, copies: dict[tuple, torch.Tensor]) -> Any:
    """Copy the tensors in nested containers; the same tensor twice (tied weights) stays one. copies: those so far."""
    if isinstance(item, torch.Tensor):
        key = (
            item.device,
            item.untyped_storage().data_ptr(),
            item.storage_offset(),
            item.shape,
            item.stride(),
            item.dtype,
        )
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


def _write_files(folder: Path, job: Job) -> dict[str, tuple[int, str]]:
    """Returns name -> (bytes, sha256) of this rank's files, which are on disk."""
    for name, state in job.files.items():
        try:
            torch.save(state, folder / name)
        except RuntimeError as mistake:  # what torch makes of a full disk
            raise OSError(errno.EIO, str(mistake).splitlines()[0], str(folder / name)) from mistake
    for name, text in job.texts.items():
        (folder / name).write_bytes(text)
    return {name: hashing.hash_and_sync(folder / name) for name in [*job.files, *job.texts]}


def _bytes_of(item: Any) -> int:
    """Of tensors and bytes in nested containers."""
    if isinstance(item, torch.Tensor):
        return item.numel() * item.element_size()
    if isinstance(item, bytes):
        return len(item)
    values = item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else ()
    return sum(_bytes_of(value) for value in values)


def _merge(parts: list[dict]) -> dict:
    return {key: value for part in parts for key, value in part.items()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
