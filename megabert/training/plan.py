"""The plan of a run: everything that the recipe, the ds_config, the ranks and the device determine, resolved once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megabert.config.ds_config import DsConfig, ResolvedDsConfig
from megabert.config.recipe import Recipe, may_change_at_resume
from megabert.config.settings import flatten
from megabert.data.schedule import Plan
from megabert.files.checkpoint_format import State
from megabert.kernels.resolve import Implementation
from megabert.training.distributed.device import has_fast_bf16, training_device
from megabert.training.optim.optimizers import choose_optimizer
from megabert.training.schedule import batch_schedule, batches_per_step, total_steps


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What a run must have in common with a checkpoint to resume from it."""

    settings: dict[str, Any]
    """settings of the recipe that may not change at a resume, by dotted name"""
    corpus: str
    """fingerprint of the training corpus"""
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
            corpus=state.corpus,
            step_batches=state.step_batches,
            total_steps=state.total_steps,
            optimizer_source=state.optimizer_source,
            numerics=ResolvedDsConfig(state.ds_config).numerics,
            zero_stage=state.zero_stage,
            world_size=state.world_size,
        )


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """All that is decided before a run opens its data or builds its model."""

    recipe: Recipe
    ds_config: ResolvedDsConfig
    optimizer: Implementation
    device: torch.device
    rank: int
    world_size: int
    step_batches: int
    """micro-batches of a full step over all ranks"""
    total_steps: int
    schedule: Plan
    """micro-batches per step and longest piece in each stage of the run"""

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.run.output_dir)

    @property
    def checkpoints(self) -> Path:
        return self.output_dir / "checkpoints"

    @property
    def budget_s(self) -> float | None:
        """Wall-clock seconds of a run whose length is given in hours."""
        hours = self.recipe.run.max_hours
        return None if hours is None else 3600 * hours

    def identity(self, corpus: str) -> RunIdentity:
        """corpus: fingerprint of the training corpus."""
        return RunIdentity(
            settings=fixed_settings(self.recipe.to_dict()),
            corpus=corpus,
            step_batches=self.step_batches,
            total_steps=self.total_steps,
            optimizer_source=self.optimizer.source,
            numerics=self.ds_config.numerics,
            zero_stage=self.ds_config.zero_stage,
            world_size=self.world_size,
        )


def make_plan(recipe: Recipe, ds_config: DsConfig, rank: int, world_size: int) -> RunPlan:
    """Resolve a run's settings for these ranks and this device. Raises ValueError if they do not fit together."""
    device = training_device()
    step_batches = batches_per_step(recipe, world_size)
    steps = total_steps(recipe, step_batches)
    resolved = ds_config.resolve(
        accumulation=step_batches // world_size,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        world_size=world_size,
        fast_bf16=has_fast_bf16(device),
    )
    if recipe.run.compile and (reason := why_not_compile(device, resolved.zero_stage)):
        raise ValueError(reason)
    return RunPlan(
        recipe=recipe,
        ds_config=resolved,
        optimizer=choose_optimizer(recipe, resolved, device),
        device=device,
        rank=rank,
        world_size=world_size,
        step_batches=step_batches,
        total_steps=steps,
        schedule=batch_schedule(recipe, step_batches, steps),
    )


def why_not_compile(device: torch.device, zero_stage: int) -> str | None:
    """Return why torch.compile cannot be applied to the whole model, or None. Not run on a GPU yet."""
    if device.type == "cpu":
        return (
            "run.compile true on a CPU: run.ops auto already compiles each operation there, and attention, which "
            "depends on the documents' lengths, would be compiled again at every step. Set run.compile false."
        )
    if zero_stage == 3:
        return (
            "run.compile true at ZeRO 3: fetching weights breaks the graph in every layer. Use ds_configs/zero2.json, "
            "or set run.compile false."
        )
    return None


def fixed_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe, given as nested dicts, that may not change at a resume, by dotted name."""
    return {name: value for name, value in flatten(recipe).items() if not may_change_at_resume(name)}
