"""Resuming: find a whole checkpoint, check that it belongs to this run, and load it into the engine."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed

from megabert.data.stream import Position
from megabert.files import checkpoint_format as layout
from megabert.files.checkpoint_format import State
from megabert.training.checkpointing import universal
from megabert.training.distributed.sync import gather
from megabert.training.plan import RunIdentity, RunPlan

log = logging.getLogger(__name__)

# ZeRO stages that partition the optimizer state alike: a run may resume at one of them from a checkpoint of the other.
SAME_SHARDS = {1, 2}


class Checkpoint(NamedTuple):
    """A checkpoint on disk. positions: of every data stream."""

    path: Path
    state: State
    positions: dict[int, Position]

    def positions_of(self, plan: RunPlan) -> dict[int, Position]:
        """The positions of this rank's streams."""
        return {stream: at for stream, at in self.positions.items() if stream % plan.world_size == plan.rank}


def find_checkpoint(plan: RunPlan, corpus: str) -> Checkpoint | None:
    """Find the checkpoint that this run resumes from, if any; every rank calls this and gets the same one.

    corpus: fingerprint of the training corpus. Raises ValueError if the checkpoint belongs to another run.
    """
    path = find(plan.recipe.run.resume, plan.checkpoints)
    if path is None:
        return None
    checkpoint = read_checkpoint(path)
    check_same_run(path, RunIdentity.of_checkpoint(checkpoint.state), plan.identity(corpus))
    return checkpoint


def find(resume: str, folder: Path) -> Path | None:
    """Choose the checkpoint to resume from; every rank calls this and gets the same one.

    resume: the setting run.resume; auto falls back to an older checkpoint if the newest is damaged, and logs that.
    Raises ValueError if a named checkpoint is missing or damaged, and if there are checkpoints but all are damaged.
    """
    if resume == "none":
        return None
    if resume != "auto":
        named = layout.find_checkpoint(Path(resume))
        if problem := _check_together(named):
            raise ValueError(f"{named}: cannot resume from it: {problem}. Name another one, or use --run.resume auto.")
        return named
    found = newest(folder)
    if found is None and (tags := layout.list_tags(folder)):
        raise ValueError(
            f"{folder}: all {len(tags)} checkpoints are damaged. Remove them, or use --run.resume none, to start anew."
        )
    return found


def newest(folder: Path, up_to: int | None = None) -> Path | None:
    """The newest undamaged checkpoint, of step `up_to` at most; every rank calls this. Logs the damaged ones."""
    for tag in layout.list_tags(folder):
        if up_to is not None and layout.step_of(tag) > up_to:
            continue
        problem = _check_together(folder / tag)
        if problem is None:
            return folder / tag
        log.warning("checkpoint %s is damaged and not used: %s", tag, problem)
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's state.json and streams.json."""
    raw = json.loads((path / layout.STREAMS).read_text())
    positions = {int(stream): Position.from_json(position) for stream, position in raw.items()}
    return Checkpoint(path, layout.read_state(path), positions)


def check_same_run(path: Path, saved: RunIdentity, current: RunIdentity) -> None:
    """Raise ValueError unless the run continues the one that wrote this checkpoint."""
    if changes := _changes(saved.settings, current.settings, absent="not set"):
        raise ValueError(
            f"{path}: was written with other settings: {changes}. Restore them, choose another --run.output_dir, or "
            "start anew with --run.resume none."
        )
    if saved.corpus != current.corpus:
        raise ValueError(
            f"{path}: was trained on corpus {saved.corpus[:12]}, but data.train is {current.corpus[:12]}. "
            "Restore that corpus, or choose another --run.output_dir."
        )
    if (saved.step_batches, saved.total_steps) != (current.step_batches, current.total_steps):
        raise ValueError(
            f"{path}: a step was {saved.step_batches} micro-batches and the run {saved.total_steps} steps; now they "
            f"are {current.step_batches} and {current.total_steps}. Use as many ranks as before, or set "
            "data.global_batch_tokens to a number."
        )
    if saved.optimizer_source != current.optimizer_source:
        raise ValueError(
            f"{path}: was written with the optimizer of {saved.optimizer_source}, whose state the optimizer of "
            f"{current.optimizer_source} cannot load. Install {saved.optimizer_source}'s, or use --run.ops torch for "
            "both."
        )
    if changes := _changes(saved.numerics, current.numerics, absent="off"):
        raise ValueError(
            f"{path}: was trained with other arithmetic: {changes}. Restore that in the ds_config "
            '(torch_autocast.enabled "auto" depends on the device: set true or false), or start a new run on its '
            "weights with model.init_from."
        )
    _check_shards(path, saved, current)


def _check_shards(path: Path, saved: RunIdentity, current: RunIdentity) -> None:
    """Raise ValueError if these ranks cannot load the optimizer state."""
    ranks, stage = saved.world_size, saved.zero_stage
    if current.settings["optimizer.name"] == "muon" and current.zero_stage > 0 and ranks != current.world_size:
        raise ValueError(
            f"{path}: was written by {ranks} ranks, now there are {current.world_size}: above ZeRO 0 the state of Muon "
            f"cannot be partitioned anew. Use {ranks} ranks, or start the run at ZeRO 0."
        )
    if stage != current.zero_stage and not {stage, current.zero_stage} <= SAME_SHARDS:
        raise ValueError(
            f"{path}: was written at ZeRO stage {stage}, this is stage {current.zero_stage}, which partitions the "
            f"optimizer state differently (only 1 and 2 are alike). Use stage {stage}; or start a new run on its "
            "weights, with a fresh optimizer: launch/convert_to_hf.py, for a bert recipe launch/convert_from_hf.py, "
            "then model.init_from."
        )


def load(engine: deepspeed.DeepSpeedEngine, path: Path) -> None:
    """Load a checkpoint into the engine; every rank calls this. Raises ValueError if DeepSpeed finds none."""
    if engine.load_universal_checkpoint():
        with universal.converted(path) as universal_path:
            settings = universal.settings_of(engine)
            _load(engine, universal_path)
            universal.repair_groups(engine, settings)
    else:
        _load(engine, path)
    # At stage 3 DeepSpeed 0.19.8 leaves its small parameters gathered, but the first backward expects them partitioned
    # and fails with "The size of tensor a (0) must match". At other stages this does nothing.
    engine.empty_partition_cache()


def _load(engine: deepspeed.DeepSpeedEngine, path: Path) -> None:
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise ValueError(f"{path}: DeepSpeed found no checkpoint there.")


def _check_together(path: Path) -> str | None:
    """Check a checkpoint's files, each rank a part of them. Returns the first problem that any rank found."""
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    try:
        names = sorted(layout.read_manifest(path))
        problem = layout.check_files(path, names[rank::world_size])
    except (ValueError, OSError) as error:
        # OSError: a file system that fails, or that denies access.
        problem = str(error)
    problems = gather({} if problem is None else {rank: problem})
    return problems[min(problems)] if problems else None


def _changes(saved: dict[str, Any], current: dict[str, Any], absent: str) -> str:
    """Describe every value that differs; a missing value equals None. absent: how to print a missing value."""
    names = sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))
    shown = [[repr(settings[name]) if name in settings else absent for settings in (saved, current)] for name in names]
    return "; ".join(f"{name} was {was} and is {now}" for name, (was, now) in zip(names, shown, strict=True))
