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
from megabert.training.identity import RunIdentity
from megabert.training.run_schedule import RunSchedule, make_run_schedule
from megabert.training.unsupported import check_compile_and_fp8, choose_cuda_graphs
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
    check_compile_and_fp8(recipe, resolved, device.type, has_fp8(device))
    optimizer = choose_optimizer(recipe, resolved, device)
    identity = RunIdentity.of_run(
        recipe,
        resolved,
        optimizer.source,
        batches_per_step=schedule.batches_per_step,
        total_steps=schedule.total_steps,
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
        why_no_graphs=choose_cuda_graphs(
            recipe, resolved, device.type, lambda: why_not_captured(recipe, device, resolved.bf16)
        ),
    )


def why_not_captured(recipe: Recipe, device: torch.device, bf16: bool) -> str | None:
    """Return why this device's operations cannot be part of a CUDA graph, or None."""
    # No kernel depends on the size of the vocabulary, which is not known yet.
    unfused = why_not_all_fused(device, architecture_of(recipe.model, 1), bf16)
    return unfused and f"plain PyTorch's operations cannot be captured ({unfused})"
