"""Check that a run agrees with a checkpoint in everything that resuming or branching requires."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megabert.config.ds_config import ResolvedDsConfig
from megabert.config.recipe import Recipe, default_settings, may_change_at_branch, may_change_at_resume
from megabert.config.settings import flatten
from megabert.files.checkpoint_format import FIRST_MUON_VERSION, State

# ZeRO stages that partition the optimizer state alike: a run may resume at one of them from a checkpoint of the other.
SAME_SHARDS = {1, 2}
# Removed settings. Checkpoints contain their effect, so they need not be compared.
REMOVED_SETTINGS = {f"{section}.{name}" for section, name in [("data", "max_streams")]}
PHASES = "data.phases"
# The settings that fix the number of steps. run.max_hours does not.
LENGTH_SETTINGS = ("run.max_steps", "run.max_tokens")
NEW_RUN = (
    "start a new run on its weights, with a fresh optimizer: launch/convert_to_hf.py, for a bert recipe "
    "launch/convert_from_hf.py, then model.init_from"
)


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What a run and its checkpoints must have in common, except the corpus. world_size matters for Muon only."""

    settings: dict[str, Any]
    """settings of the recipe that may not change at a resume, by dotted name"""
    batches_per_step: int
    total_steps: int
    optimizer_source: str
    numerics: dict[str, object]
    zero_stage: int
    world_size: int

    @property
    def length(self) -> str:
        """How long the run is."""
        hours = self.settings.get("run.max_hours")
        return f"{self.total_steps} steps" if hours is None else f"{hours:g} hours"

    @classmethod
    def of_run(
        cls,
        recipe: Recipe,
        ds_config: ResolvedDsConfig,
        optimizer_source: str,
        *,
        batches_per_step: int,
        total_steps: int,
        world_size: int,
    ) -> "RunIdentity":
        return cls(
            settings=fixed_settings(recipe.to_dict()),
            batches_per_step=batches_per_step,
            total_steps=total_steps,
            optimizer_source=optimizer_source,
            numerics=ds_config.numerics,
            zero_stage=ds_config.zero_stage,
            world_size=world_size,
        )

    @classmethod
    def of_checkpoint(cls, state: State) -> "RunIdentity":
        return cls(
            # A setting that the version which wrote the checkpoint did not have has its default.
            settings=fixed_settings(default_settings()) | fixed_settings(state.recipe),
            batches_per_step=state.batches_per_step,
            total_steps=state.total_steps,
            optimizer_source=state.optimizer_source,
            numerics=ResolvedDsConfig(state.ds_config).numerics,
            zero_stage=state.zero_stage,
            world_size=state.world_size,
        )


def fixed_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe, given as nested dicts, that may not change at a resume, by dotted name."""
    settings = flatten(recipe)
    if phases := settings.get(PHASES):
        settings[PHASES] = _without_locations(phases, settings.get("data.train"))
    return {
        name: value
        for name, value in settings.items()
        if not may_change_at_resume(name) and name not in REMOVED_SETTINGS
    }


def _without_locations(phases: list[dict[str, Any]], train: object) -> list[dict[str, Any]]:
    """Replace what each phase trains on by the index of its mixture; the corpus's fingerprint identifies the data."""
    mixtures = [train if phase["train"] is None else phase["train"] for phase in phases]
    return [phase | {"train": mixtures.index(mixture)} for phase, mixture in zip(phases, mixtures, strict=True)]


def check_same_run(path: Path, state: State, current: RunIdentity, corpus: str) -> None:
    """Raise ValueError unless this run continues the one that wrote the checkpoint at path, or makes it longer.

    current, corpus: this run's identity and the fingerprint of its training corpus.
    """
    saved = RunIdentity.of_checkpoint(state)
    if _is_longer(saved, current, state.step):
        length = {name: saved.settings.get(name) for name in LENGTH_SETTINGS}
        current = replace(current, settings=current.settings | length, total_steps=saved.total_steps)
    if changed := _names_of_changes(saved.settings, current.settings):
        shown = _describe(changed, saved.settings, current.settings, absent="not set")
        raise ValueError(
            f"{path}: was written with other settings: {shown}. Restore them, {_other_ways(path, changed)}, or start "
            "anew with --run.resume none."
        )
    _check_corpus(path, state, corpus)
    if saved.batches_per_step == current.batches_per_step and saved.total_steps != current.total_steps:
        # An older version, which counted the steps of a batch warm-up as full ones, began this run.
        raise ValueError(
            f"{path}: the run had {saved.total_steps} steps and has {current.total_steps} now. Start a branch with its "
            f"number: --run.branch_from {path} --run.output_dir FOLDER --run.max_tokens null --run.max_steps "
            f"{saved.total_steps}."
        )
    if (saved.batches_per_step, saved.total_steps) != (current.batches_per_step, current.total_steps):
        raise ValueError(
            f"{path}: a step was {saved.batches_per_step} micro-batches and the run {saved.total_steps} steps; now "
            f"they are {current.batches_per_step} and {current.total_steps}. Use as many ranks as before, or set "
            "data.global_batch_tokens to a number."
        )
    _check_engine(path, state, saved, current)


def check_branch(path: Path, state: State, current: RunIdentity, corpus: str) -> None:
    """Raise ValueError unless this run may branch off from the one that wrote the checkpoint at path.

    As check_same_run, except for the run's length and for the settings that may change at a branch.
    """
    saved = RunIdentity.of_checkpoint(state)
    names = _names_of_changes(saved.settings, current.settings)
    if changed := [name for name in names if not may_change_at_branch(name)]:
        shown = _describe(changed, saved.settings, current.settings, absent="not set")
        raise ValueError(
            f"run.branch_from {path}: was written with other settings, which a branch keeps: {shown}. Restore them, or "
            f"{NEW_RUN}."
        )
    _check_corpus(path, state, corpus)
    if saved.batches_per_step != current.batches_per_step:
        raise ValueError(
            f"run.branch_from {path}: a step was {saved.batches_per_step} micro-batches and is "
            f"{current.batches_per_step}. Use as many ranks as before, or set data.global_batch_tokens to a number."
        )
    if saved.length != current.length and _changes_over_run(current.settings):
        raise ValueError(
            f"run.branch_from {path}: batch or data change over the run (data.batch_warmup, data.max_seq_len, "
            f"data.phases), so a branch is as long as the run itself: {saved.length}, not {current.length}."
        )
    if state.step >= current.total_steps:
        raise ValueError(
            f"run.branch_from {path}: has done {state.step} steps already, and this run has {current.total_steps}. Set "
            "run.max_steps to more: it counts the steps before the branch, too."
        )
    hours = current.settings.get("run.max_hours")
    # The run would be over before its first step, see TimeBudget.is_over.
    if hours is not None and state.wall_seconds + state.max_step_seconds > 3600 * hours:
        raise ValueError(
            f"run.branch_from {path}: has used {state.wall_seconds / 3600:.3g} hours already, and this run has "
            f"{hours:g}. Set run.max_hours to more: it counts the time before the branch, too."
        )
    _check_engine(path, state, saved, current)


def _check_corpus(path: Path, state: State, corpus: str) -> None:
    if state.corpus != corpus:
        raise ValueError(
            f"{path}: was trained on corpus {state.corpus[:12]}, but data.train is {corpus[:12]}. "
            f"Restore that corpus, choose another --run.output_dir, or {NEW_RUN}."
        )


def _is_longer(saved: RunIdentity, current: RunIdentity, step: int) -> bool:
    """Return whether this is the saved run with more steps, at a step whose learning rate is the peak in both.

    Such a run equals one that was that long from its first step, except for the length of the warm-up. This requires
    data that do not depend on the length of the run.
    """
    if saved.total_steps >= current.total_steps or _changes_over_run(saved.settings):
        return False
    if saved.settings.get("masking.schedule") != "constant":
        return False
    return all(_is_on_plateau(run.settings, run.total_steps, step) for run in (saved, current))


def _is_on_plateau(settings: dict[str, Any], total_steps: int, step: int) -> bool:
    """Return whether a step has the peak learning rate of a schedule that keeps it for a while."""
    schedule, warmup = settings.get("optimizer.schedule"), round(settings["optimizer.warmup"] * total_steps)
    decay = round(settings["optimizer.decay"] * total_steps) if schedule == "wsd" else 0
    return schedule in ("wsd", "constant") and warmup <= step <= total_steps - decay


def _changes_over_run(settings: dict[str, Any]) -> bool:
    """Return whether the data depend on the run's length.

    Pieces of documents in the packing buffer are cut to the max_seq_len of the phase in which they were read.
    """
    in_phases = isinstance(settings["data.max_seq_len"], list) or bool(settings.get(PHASES))
    return bool(settings["data.batch_warmup"]) or in_phases


def _other_ways(path: Path, changed: list[str]) -> str:
    """Name how to train on with other values of these settings: a branch if it may change them, or a new run."""
    if all(may_change_at_branch(name) for name in changed):
        return f"start a branch in another folder with --run.branch_from {path} --run.output_dir FOLDER"
    return f"choose another --run.output_dir, {NEW_RUN}"


def _check_engine(path: Path, state: State, saved: RunIdentity, current: RunIdentity) -> None:
    """Raise ValueError if the weights or the optimizer state cannot be loaded, or mean something else here."""
    if current.settings["optimizer.name"] == "muon" and state.format_version < FIRST_MUON_VERSION:
        raise ValueError(
            f"{path}: was written by an earlier version of megabert, whose Muon took other steps. Finish the run with "
            f"the version that began it, or {NEW_RUN}."
        )
    if saved.optimizer_source != current.optimizer_source:
        raise ValueError(
            f"{path}: was written with the optimizer of {saved.optimizer_source}, whose state the optimizer of "
            f"{current.optimizer_source} cannot load. Install {saved.optimizer_source}'s, or use --run.ops torch for "
            "both."
        )
    if changed := _names_of_changes(saved.numerics, current.numerics):
        shown = _describe(changed, saved.numerics, current.numerics, absent="off")
        raise ValueError(
            f"{path}: was trained with other arithmetic: {shown}. Restore that in the ds_config "
            f'(torch_autocast.enabled "auto" depends on the device: set true or false), or {NEW_RUN}.'
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
            f"optimizer state differently (only 1 and 2 are alike). Use stage {stage}; or {NEW_RUN}."
        )


def _names_of_changes(saved: dict[str, object], current: dict[str, object]) -> list[str]:
    """List every name whose values differ; a missing value equals None."""
    return sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))


def _describe(names: list[str], saved: dict[str, object], current: dict[str, object], absent: str) -> str:
    """Describe both values of these names. absent: how to print a missing value."""
    shown = [[repr(settings[name]) if name in settings else absent for settings in (saved, current)] for name in names]
    return "; ".join(f"{name} was {was} and is {now}" for name, (was, now) in zip(names, shown, strict=True))
