"""The identity of a run: the properties that it must share with a checkpoint to resume from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabert.config.ds_config import ResolvedDsConfig
from megabert.config.recipe import may_change_at_resume
from megabert.config.settings import flatten
from megabert.files.checkpoint_format import State

# ZeRO stages that partition the optimizer state alike: a run may resume at one of them from a checkpoint of the other.
SAME_SHARDS = {1, 2}


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Everything but the corpus that a run and its checkpoints have in common. world_size matters for Muon only."""

    settings: dict[str, Any]
    """settings of the recipe that may not change at a resume, by dotted name"""
    step_batches: int
    total_steps: int
    optimizer_source: str
    numerics: dict[str, Any]
    zero_stage: int
    world_size: int

    @classmethod
    def of_checkpoint(cls, state: State) -> "RunIdentity":
        return cls(
            settings=fixed_settings(state.recipe),
            step_batches=state.step_batches,
            total_steps=state.total_steps,
            optimizer_source=state.optimizer_source,
            numerics=ResolvedDsConfig(state.ds_config).numerics,
            zero_stage=state.zero_stage,
            world_size=state.world_size,
        )


def fixed_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe, given as nested dicts, that may not change at a resume, by dotted name."""
    return {name: value for name, value in flatten(recipe).items() if not may_change_at_resume(name)}


def check_same_run(path: Path, state: State, current: RunIdentity, corpus: str) -> None:
    """Raise ValueError unless this run continues the one that wrote the checkpoint at path.

    current, corpus: this run's identity and the fingerprint of its training corpus.
    """
    saved = RunIdentity.of_checkpoint(state)
    if changes := _changes(saved.settings, current.settings, absent="not set"):
        raise ValueError(
            f"{path}: was written with other settings: {changes}. Restore them, choose another --run.output_dir, or "
            "start anew with --run.resume none."
        )
    if state.corpus != corpus:
        raise ValueError(
            f"{path}: was trained on corpus {state.corpus[:12]}, but data.train is {corpus[:12]}. "
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


def _changes(saved: dict[str, Any], current: dict[str, Any], absent: str) -> str:
    """Describe every value that differs; a missing value equals None. absent: how to print a missing value."""
    names = sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))
    shown = [[repr(settings[name]) if name in settings else absent for settings in (saved, current)] for name in names]
    return "; ".join(f"{name} was {was} and is {now}" for name, (was, now) in zip(names, shown, strict=True))
