"""Resume a run: find a whole checkpoint, check that it belongs to this run, and load it into the engine."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import deepspeed

from megabert.config.recipe import RunConfig
from megabert.data.shards.source import Corpus
from megabert.data.stream import Position, positions_from_json
from megabert.files import checkpoint_format
from megabert.files.checkpoint_format import State
from megabert.files.disk import DiskError, as_user_error, is_user_error
from megabert.files.json_file import read_json
from megabert.files.pickles import check_pickle
from megabert.training.checkpointing import find, universal
from megabert.training.checkpointing.initial_folder import check_vocabulary_of_checkpoint
from megabert.training.distributed import deepspeed_compat
from megabert.training.distributed.heartbeat import progress
from megabert.training.distributed.sync import gather_dicts
from megabert.training.identity import RunIdentity, check_branch, check_same_run


class Checkpoint(NamedTuple):
    """A checkpoint on disk. positions: of this rank's data streams. branched: whether it is another run's."""

    path: Path
    state: State
    positions: dict[int, Position]
    branched: bool = False


def find_start(
    settings: RunConfig, folder: Path, identity: RunIdentity, corpus: Corpus, rank: int
) -> Checkpoint | None:
    """Find the checkpoint that this run starts from, if any; every rank calls this and gets the same one.

    folder: of this run's checkpoints. identity, corpus: of this run. Raises ValueError if the checkpoint belongs to
    another run, or if this run cannot be a branch of it.
    """
    check = partial(check_together, rank=rank, world_size=identity.world_size)
    path = find.find(settings.resume, folder, check)
    if path is not None:
        checkpoint = read_checkpoint(path, rank, identity.world_size)
        check_same_run(path, checkpoint.state, identity, corpus.fingerprint)
        check_vocabulary_of_checkpoint(path, corpus)
        return checkpoint
    if settings.branch_from is None:
        return None
    path = find.find(settings.branch_from, folder, check)
    assert path is not None, f"run.branch_from {settings.branch_from} named no checkpoint"
    checkpoint = read_checkpoint(path, rank, identity.world_size, branched=True)
    check_branch(path, checkpoint.state, identity, corpus.fingerprint)
    check_vocabulary_of_checkpoint(path, corpus)
    return checkpoint


def newest(folder: Path, rank: int, world_size: int, up_to: int | None = None) -> Path | None:
    """Return the newest undamaged checkpoint, of step `up_to` at most; every rank calls this. Logs the damaged ones."""
    return find.newest(folder, partial(check_together, rank=rank, world_size=world_size), up_to)


def read_checkpoint(path: Path, rank: int, world_size: int, branched: bool = False) -> Checkpoint:
    """Read a checkpoint's state.json, and the positions in its streams.json that belong to this rank.

    branched: for a branch, which begins a new pass over the data where an earlier version read them in another order.
    """
    file = path / checkpoint_format.STREAMS
    positions = positions_from_json(read_json(file), str(file), new_pass=branched)
    own = {stream: position for stream, position in positions.items() if stream % world_size == rank}
    return Checkpoint(path, checkpoint_format.read_state(path), own, branched)


def load(engine: deepspeed.DeepSpeedEngine, path: Path, rank: int, world_size: int) -> None:
    """Load a checkpoint into the engine; every rank calls this.

    Raises ValueError if DeepSpeed finds none, or if one of its files would do more than hold values when it is loaded.
    """
    progress.enter("loading the checkpoint", long=True)
    check_pickles(path, rank, world_size)
    is_universal = engine.load_universal_checkpoint()
    converted = universal.converted(path, rank, world_size) if is_universal else nullcontext(path)
    with deepspeed_compat.literal_folder(path.parent), converted as folder:
        settings = deepspeed_compat.group_settings(engine) if is_universal else []
        with deepspeed_compat.loading_only_weights():
            loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if loaded is None:
            raise ValueError(f"{folder}: DeepSpeed found no checkpoint there.")
        if is_universal:
            deepspeed_compat.repair_universal_load(engine, settings)
    deepspeed_compat.partition_after_load(engine)


def check_pickles(path: Path, rank: int, world_size: int) -> None:
    """Raise ValueError, on all ranks, if a checkpoint's pickles name foreign classes; each rank reads a part of them.

    Also those files that the manifest does not list: DeepSpeed finds its files by their names.
    """
    problem: ValueError | DiskError | None = None
    try:
        for file in sorted(path.rglob("*.pt"))[rank::world_size]:
            check_pickle(file)
    except ValueError as error:
        problem = error
    except OSError as error:
        problem = as_user_error(error, f"{path}: cannot be read: {error}")
    if problems := gather_dicts({} if problem is None else {rank: problem}):
        raise problems[min(problems)]


def check_together(path: Path, rank: int, world_size: int) -> str | None:
    """Check a checkpoint's files, each rank a part of them. Returns the first problem that any rank found.

    Raises DiskError, on all ranks, if the file system fails: that does not mean that the checkpoint is damaged.
    """
    try:
        names = sorted(checkpoint_format.read_manifest(path))
        problem = checkpoint_format.check_files(path, names[rank::world_size])
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        problem = str(error) if is_user_error(error) else DiskError(unreadable(path, error))
    problems = gather_dicts({} if problem is None else {rank: problem})
    if failed := [problem for problem in problems.values() if isinstance(problem, DiskError)]:
        raise failed[0]
    return problems[min(problems)] if problems else None


def unreadable(path: Path, error: OSError) -> str:
    return (
        f"{path}: cannot be read, which does not mean that it is damaged: {error}. Run the same command again when the "
        "file system answers; if it never does, resume from an older checkpoint with --run.resume FOLDER."
    )
