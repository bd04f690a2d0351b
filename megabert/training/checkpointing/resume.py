"""Resume: which checkpoint, whether it is whole and this run's, and the engine as it says. saving.py writes them."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed

from megabert.config.ds_config import numerics_of
from megabert.config.recipe import Recipe
from megabert.data.stream import Position, positions_from_json
from megabert.files import checkpoint_format as layout
from megabert.files.checkpoint_format import State
from megabert.training.checkpointing import universal
from megabert.training.distributed.sync import gather

log = logging.getLogger(__name__)

# Settings that may differ between a run and its continuation: they change what is reported and where, not what is learnt.
FREE_TO_CHANGE = {
    "data.train", "data.heldout", "data.tokenizer", "data.num_workers", "data.on_bad_shard", "data.cache_dir", "data.cache_gb", "run.output_dir", "run.log_every_steps", "run.eval_every_steps",
    "run.eval_tokens", "run.save_every_steps", "run.keep_checkpoints", "run.keep_every_steps", "run.keep_best",
    "run.async_save", "run.trackers", "run.resume", "run.ops",
    "run.max_norm_ratio", "run.rollback_after",
    "probe.task", "probe.data", "probe.protocol", "probe.every_steps", "probe.max_examples",
}  # fmt: skip
SAME_SHARDS = {1, 2}  # the ZeRO stages whose optimizer state is cut alike: one may go on where the other stopped


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
    """What a run's course depends on beside its recipe.

    corpus: its fingerprint; stage: ZeRO's; adamw: whose; numerics: ds_config.py's.
    """

    corpus: str
    stage: int
    world_size: int
    step_batches: int
    total_steps: int
    adamw: str
    numerics: dict[str, Any]


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
    before = numerics_of(state.ds_config)
    if changed := sorted(
        key for key in before.keys() | now.numerics.keys() if before.get(key) != now.numerics.get(key)
    ):
        changes = "; ".join(
            f"{key} was {before.get(key, 'off')} and is {now.numerics.get(key, 'off')}" for key in changed
        )
        raise ValueError(
            f"{path}: was computed otherwise: {changes}. Restore that in the ds_config (torch_autocast.enabled auto asks the "
            "device: say true or false), or begin a new run on its weights with model.init_from."
        )
    if recipe.optimizer.name == "muon" and now.stage > 0 and state.world_size != now.world_size:
        raise ValueError(
            f"{path}: was written by {state.world_size} ranks, these are {now.world_size}: above ZeRO 0 the state of Muon cannot be "
            f"cut anew. Use {state.world_size} ranks, or ZeRO 0 from the start."
        )
    if state.zero_stage != now.stage and not {state.zero_stage, now.stage} <= SAME_SHARDS:
        raise ValueError(
            f"{path}: was written at ZeRO stage {state.zero_stage}, this is stage {now.stage}, whose optimizer state is cut "
            f"otherwise (only 1 and 2 may follow each other). Use stage {state.zero_stage}; or begin a new run on its weights, with a fresh "
            "optimizer: launch/convert_to_hf.py, launch/convert_from_hf.py for a bert recipe, then model.init_from."
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
    file = path / layout.STREAMS
    return positions_from_json(json.loads(file.read_text()), str(file))


def _check_together(path: Path) -> str | None:
    """Check a checkpoint's files, each rank a share. Returns the first problem that any rank found."""
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    try:
        names = sorted(layout.read_manifest(path))
        problem = layout.check_files(path, names[rank::world_size])
    except (ValueError, OSError) as mistake:  # a file system that fails, or forbids
        problem = str(mistake)
    problems = gather({} if problem is None else {rank: problem})
    return problems[min(problems)] if problems else None


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
