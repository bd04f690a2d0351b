"""The state in a checkpoint of a run of 10 steps, and a comparison of what two checkpoints hold."""

from pathlib import Path
from typing import Any

import torch

from megabert.config.recipe import Recipe, RunConfig
from megabert.files.checkpoint_format import State, tag_of
from megabert.training.updates.guard import Guard

RECIPE = Recipe(run=RunConfig(max_steps=10))
STATE = State(
    step=4,
    next_index=8,
    tokens=1000,
    seconds=1.0,
    world_size=2,
    num_streams=24,
    batches_per_step=4,
    total_steps=10,
    corpus="c" * 64,
    recipe=RECIPE.to_dict(),
    ds_config={"zero_optimization": {"stage": 2}},
    zero_stage=2,
    model={},
    optimizer_source="PyTorch",
    guard=Guard(0.0).to_json(),
    rolled_back_bins=[],
    wall_seconds=60.0,
    max_step_seconds=2.0,
)


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """The places where the contents of two checkpoints differ in any bit."""
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{where}: {first.keys() ^ second.keys()}"]
        return [found for key in first for found in differences(first[key], second[key], f"{where}/{key}")]
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [f"{where}: {len(first)} and {len(second)} items"]
        pairs = enumerate(zip(first, second, strict=True))
        return [found for i, (a, b) in pairs for found in differences(a, b, f"{where}/{i}")]
    if isinstance(first, torch.Tensor):
        return [] if first.dtype == second.dtype and torch.equal(first, second) else [where]
    return []


def assert_same_end(first: Path, second: Path, step: int) -> None:
    """Assert that the checkpoints of two runs at a step hold the same weights and optimizer state."""
    ends = [out / "checkpoints" / tag_of(step) for out in (first, second)]
    files = [sorted(path.name for path in end.glob("*.pt")) for end in ends]
    assert files[0] == files[1]
    tensors = 0
    for name in files[0]:
        states = [torch.load(end / name, weights_only=False) for end in ends]
        assert not differences(*states, where=name)
        tensors += sum(isinstance(value, torch.Tensor) for value in states[0].get("module", {}).values())
    assert tensors > 10
