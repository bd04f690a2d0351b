"""Save and resume: engine state, stream positions and counters, complete or not at all.

DeepSpeed's own saving is not atomic and writes `latest` before all ranks are done; so it saves under a temporary name,
and the checkpoint appears by one rename when every file of it is hashed and on disk.
"""

import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed

from megabert import checkpoint_format as layout
from megabert.checkpoint_format import State
from megabert.config import Recipe
from megabert.data.manifest import TOKENIZER, write_atomically
from megabert.data.shards import Source
from megabert.data.stream import Position
from megabert.data.tokenizer import TOKENIZER_CONFIG
from megabert.training import universal
from megabert.training.ranks import gather

log = logging.getLogger(__name__)

# Settings that may differ between a run and its continuation: they change what is reported and where, not what is learnt.
FREE_TO_CHANGE = {
    "data.train", "data.heldout", "data.tokenizer", "data.num_workers", "data.on_bad_shard", "data.cache_dir", "data.cache_gb", "run.output_dir", "run.log_every_steps", "run.eval_every_steps",
    "run.eval_tokens", "run.save_every_steps", "run.keep_checkpoints", "run.resume", "run.ops",
    "run.max_norm_ratio", "run.rollback_after",
}  # fmt: skip
SAME_SHARDS = {1, 2}  # the ZeRO stages whose optimizer state is cut alike: one may go on where the other stopped


def save(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    state: State,
    positions: dict[int, Position],
    source: Source,
    keep: int,
) -> Path:
    """Write a checkpoint; every rank calls this. positions: of this rank's streams; source: whose tokenizer to keep.

    Returns its folder.
    """
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    tag = layout.tag_of(state.step)
    temporary, final = folder / f"{layout.TEMPORARY}{tag}", folder / tag
    if rank == 0:
        for leftover in folder.glob(f"{layout.TEMPORARY}*"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    deepspeed.comm.barrier()
    engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)  # ends in a barrier
    merged = gather({stream: position.to_json() for stream, position in positions.items()})
    if rank == 0:
        _write_json(temporary / layout.STREAMS, {stream: merged[stream] for stream in sorted(merged)})
        _write_json(temporary / layout.STATE, vars(state))
        (temporary / TOKENIZER).write_bytes(source.read_tokenizer_file())
        if (config := source.read_beside(TOKENIZER_CONFIG)) is not None:
            (temporary / TOKENIZER_CONFIG).write_bytes(config)
    deepspeed.comm.barrier()
    mine = layout.files_of(temporary)[rank::world_size]
    hashes = gather({name: layout.hash_and_sync(temporary / name) for name in mine})
    if rank == 0:
        _write_json(temporary / layout.MANIFEST, {name: hashes[name] for name in sorted(hashes)})
        layout.hash_and_sync(temporary / layout.MANIFEST)
        layout.sync_folder(temporary)
        if final.exists():  # a damaged one of this step, which was passed over
            _remove(final)
        os.rename(temporary, final)
        write_atomically(folder / layout.LATEST, tag.encode())
        layout.sync_folder(folder)
        for old in layout.list_tags(folder)[keep:]:
            _remove(folder / old)
    deepspeed.comm.barrier()
    return final


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; renamed first, because half of one must not look like one."""
    doomed = checkpoint.with_name(f"{layout.TEMPORARY}old-{checkpoint.name}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


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


def find(recipe: Recipe, folder: Path) -> Path | None:
    """Decide where to resume from, by run.resume; every rank calls this and gets the same answer.

    auto falls back to the previous checkpoint where the newest is damaged, and says so. Raises ValueError for a named
    checkpoint that is not there or not whole, and when there are checkpoints but none is whole.
    """
    wish = recipe.run.resume
    if wish == "none":
        return None
    if wish != "auto":
        named = layout.find_checkpoint(Path(wish))
        if problem := _check_together(named):
            raise ValueError(f"{named}: cannot resume from it: {problem}. Name another one, or use run.resume auto.")
        return named
    found = newest(folder)
    if found is None and (tags := layout.list_tags(folder)):
        raise ValueError(
            f"{folder}: none of its {len(tags)} checkpoints is whole. Remove them to start anew, or use run.resume none."
        )
    return found


def newest(folder: Path, up_to: int | None = None) -> Path | None:
    """The newest checkpoint that is whole, of step `up_to` at most; every rank calls this.

    Damaged ones are named and passed over.
    """
    for tag in layout.list_tags(folder):
        if up_to is not None and layout.step_of(tag) > up_to:
            continue
        problem = _check_together(folder / tag)
        if problem is None:
            return folder / tag
        log.warning("checkpoint %s is damaged and passed over: %s", tag, problem)
    return None


class Course(NamedTuple):
    """What a run's course depends on beside its recipe. corpus: its fingerprint; stage: ZeRO's; adamw: whose."""

    corpus: str
    stage: int
    world_size: int
    step_batches: int
    total_steps: int
    adamw: str


def check_same_run(path: Path, state: State, recipe: Recipe, now: Course) -> None:
    """Raise ValueError unless this run continues that checkpoint's."""
    ours, theirs = _flat(recipe.to_dict()), _flat(state.recipe)
    different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    different = [key for key in different if key not in FREE_TO_CHANGE]
    if different:
        changes = "; ".join(f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}" for key in different)
        raise ValueError(
            f"{path}: was written by another recipe: {changes}. Restore that, choose another run.output_dir, "
            "or start anew with run.resume none."
        )
    if state.corpus != now.corpus:
        raise ValueError(
            f"{path}: was trained on corpus {state.corpus[:12]}, but data.train is {now.corpus[:12]}. "
            "Put that corpus back, or choose another run.output_dir."
        )
    if (state.step_batches, state.total_steps) != (now.step_batches, now.total_steps):
        raise ValueError(
            f"{path}: a step was {state.step_batches} micro-batches and the run {state.total_steps} steps; now they are "
            f"{now.step_batches} and {now.total_steps}. Use as many ranks as before, or set data.global_batch_tokens to a number."
        )
    if state.adamw != now.adamw:
        raise ValueError(
            f"{path}: was written with AdamW from {state.adamw}, this is {now.adamw}'s, whose state is another. "
            "Install what was there, or use run.ops torch for both."
        )
    if state.zero_stage != now.stage and not {state.zero_stage, now.stage} <= SAME_SHARDS:
        raise ValueError(
            f"{path}: was written at ZeRO stage {state.zero_stage}, this is stage {now.stage}, whose optimizer state is cut "
            f"otherwise (only 1 and 2 may follow each other). Use stage {state.zero_stage}; or export the weights with "
            "launch/convert_to_hf.py and train on from them with a fresh optimizer."
        )


def load(engine: deepspeed.DeepSpeedEngine, path: Path) -> None:
    """Restore the engine from a checkpoint; every rank calls this. Raises ValueError if DeepSpeed cannot."""
    if engine.load_universal_checkpoint():
        with universal.converted(path) as universal_path:
            settings = universal.settings_of(engine)
            _load(engine, universal_path)
            universal.repair_groups(engine, settings)
    else:
        _load(engine, path)
    # At stage 3 DeepSpeed 0.19.8 leaves its small parameters gathered, where the first backward expects them partitioned and
    # ends with "The size of tensor a (0) must match". At other stages this does nothing.
    engine.empty_partition_cache()


def _load(engine: deepspeed.DeepSpeedEngine, path: Path) -> None:
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise ValueError(f"{path}: DeepSpeed found nothing to load there.")


def read_positions(path: Path) -> dict[int, Position]:
    """Every stream's position in a checkpoint."""
    raw = json.loads((path / layout.STREAMS).read_text())
    return {int(stream): Position.from_json(position) for stream, position in raw.items()}


def _check_together(path: Path) -> str | None:
    """Check a checkpoint's files, each rank a share. Returns the first problem that any rank found."""
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    try:
        names = sorted(layout.read_manifest(path))
        problem = layout.check_files(path, names[rank::world_size])
    except ValueError as mistake:
        problem = str(mistake)
    problems = gather({} if problem is None else {rank: problem})
    return problems[min(problems)] if problems else None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
