"""Make the plan of a run: resolve once all that the recipe, the ds_config, the ranks and the device determine."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megabert.config.ds_config import DsConfig, ResolvedDsConfig
from megabert.config.recipe import Recipe
from megabert.kernels.devices import has_fast_bf16, has_fp8
from megabert.kernels.resolve import Implementation, why_not_all_fused
from megabert.training.architecture import architecture_of
from megabert.training.distributed.device import training_device
from megabert.training.identity import RunIdentity, fixed_settings
from megabert.training.run_schedule import RunSchedule, make_run_schedule
from megabert.training.unsupported import (
    refusal_of_fp8,
    refusal_of_graphs,
    why_not_compile,
    why_not_cuda_graphs,
    why_not_fp8,
)
from megabert.training.updates.optimizers import choose_optimizer


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """All that is decided before a run opens its data or builds its model."""

    recipe: Recipe
    ds_config: ResolvedDsConfig
    optimizer: Implementation
    device: torch.device
    rank: int
    world_size: int
    schedule: RunSchedule
    identity: RunIdentity
    why_no_graphs: str | None
    """why micro-batches are not launched as CUDA graphs; None: they are"""

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


def make_plan(recipe: Recipe, ds_config: DsConfig, rank: int, world_size: int) -> RunPlan:
    """Resolve a run's settings for these ranks and this device. Raises ValueError if they do not fit together."""
    device = training_device()
    schedule = make_run_schedule(recipe, world_size)
    resolved = ds_config.resolve(
        accumulation=schedule.batches_per_step // world_size,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        world_size=world_size,
        fast_bf16=has_fast_bf16(device),
    )
    if recipe.run.compile and (reason := why_not_compile(device.type, resolved.zero_stage)):
        raise ValueError(reason)
    if recipe.run.fp8 != "none" and (reason := why_not_fp8(recipe, resolved, has_fp8(device))):
        raise ValueError(refusal_of_fp8(reason))
    optimizer = choose_optimizer(recipe, resolved, device)
    identity = RunIdentity(
        settings=fixed_settings(recipe.to_dict()),
        batches_per_step=schedule.batches_per_step,
        total_steps=schedule.total_steps,
        optimizer_source=optimizer.source,
        numerics=resolved.numerics,
        zero_stage=resolved.zero_stage,
        world_size=world_size,
    )
    return RunPlan(
        recipe=recipe,
        ds_config=resolved,
        optimizer=optimizer,
        device=device,
        rank=rank,
        world_size=world_size,
        schedule=schedule,
        identity=identity,
        why_no_graphs=choose_cuda_graphs(recipe, resolved, device),
    )


def choose_cuda_graphs(recipe: Recipe, ds_config: ResolvedDsConfig, device: torch.device) -> str | None:
    """Return why micro-batches are not launched as CUDA graphs, or None.

    Raises ValueError if they must be (run.cuda_graphs true) and cannot.
    """
    wanted, model = recipe.run.cuda_graphs, recipe.model
    if wanted is False:
        return "run.cuda_graphs is false"
    reason = why_not_cuda_graphs(recipe, ds_config, device.type)
    if reason is None:
        # No kernel depends on the size of the vocabulary, which is not known yet.
        unfused = why_not_all_fused(device, architecture_of(model, 1), ds_config.bf16)
        reason = unfused and f"plain PyTorch's operations cannot be captured ({unfused})"
    if reason and wanted is True:
        raise ValueError(refusal_of_graphs(reason))
    return reason
