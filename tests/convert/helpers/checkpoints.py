"""Write training checkpoints of any ZeRO stage and world size without training, in the format of DeepSpeed 0.19.8.

A test compares them with what DeepSpeed's own reader finds in them.
"""

import json
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabert.config.recipe import Recipe, RunConfig
from megabert.convert.weight_names import TIED_DECODER, WORD_EMBEDDINGS
from megabert.files import checkpoint_format as layout
from megabert.files import hashing
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForMaskedLM


def write_checkpoint(
    run: Path,
    model: MegaBertForMaskedLM,
    tokenizer: Path,
    *,
    step: int = 2,
    stage: int = 2,
    world_size: int = 1,
    half: bool = False,
) -> Path:
    """Write one checkpoint of a run and return its folder. half: the module is in bf16, as with bf16.enabled."""
    folder = run / "checkpoints" / layout.tag_of(step)
    folder.mkdir(parents=True)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    named = {name: tensor for name, tensor in weights.items() if name != TIED_DECODER}
    groups = [[name for name in named if (named[name].dim() > 1) == decays] for decays in (True, False)]
    shared: dict[str, Any] = {
        "buffer_names": [],
        "param_shapes": [{name: named[name].shape for name in group} for group in groups],
        "shared_params": {TIED_DECODER: WORD_EMBEDDINGS},
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        "ds_version": "0.19.8",
    }
    module = {name: tensor.bfloat16() if half else tensor for name, tensor in weights.items()}
    for rank in range(world_size if stage == 3 else 1):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        held = {name: tensor.new_empty(0) for name, tensor in module.items()} if stage == 3 else module
        torch.save({"module": held, **shared}, folder / name)
    for rank in range(world_size if stage else 0):
        parts = [partition([named[name] for name in group], stage, rank, world_size) for group in groups]
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        state = {"zero_stage": stage, "partition_count": world_size, key: parts}
        prefix = "bf16_" if half else ""
        torch.save({"optimizer_state_dict": state}, folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    for path in (tokenizer / "tokenizer.json", tokenizer / "tokenizer_config.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    write_state(folder, model, step, stage, world_size)
    return folder


def partition(tensors: list[Tensor], stage: int, rank: int, world_size: int) -> Tensor:
    """Return a rank's share of a parameter group, 1-D."""
    # Every parameter is cut on its own.
    if stage == 3:
        return torch.cat([_share(tensor.flatten(), rank, world_size, 1) for tensor in tensors])
    return _share(torch.cat([tensor.flatten() for tensor in tensors]), rank, world_size, 2).clone()


def _share(flat: Tensor, rank: int, world_size: int, multiple: int) -> Tensor:
    size = -(-len(flat) // (world_size * multiple)) * multiple
    share = flat[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(share, (0, size - len(share))) if len(share) < size else share


def write_state(folder: Path, model: MegaBertForMaskedLM, step: int, stage: int, world_size: int) -> None:
    config = model.config.to_dict()
    kept = signature(MegaBertConfig.__init__).parameters.keys() - {"self", "kwargs"}
    recipe = Recipe(run=RunConfig(max_steps=step))
    state = layout.State(
        step=step, next_index=step, tokens=1000 * step, seconds=1.0, world_size=world_size, num_streams=1,
        batches_per_step=1, total_steps=step, corpus="0" * 64, recipe=recipe.to_dict(), ds_config={}, zero_stage=stage,
        model={name: config[name] for name in kept}, optimizer_source="PyTorch", guard={}, rolled_back_bins=[],
        wall_seconds=0.0, max_step_seconds=0.0,
    )  # fmt: skip
    (folder / layout.STATE).write_text(json.dumps(vars(state)))
    paths = {name: folder / name for name in layout.files_of(folder)}
    files = {name: (path.stat().st_size, hashing.file_sha256(path)) for name, path in paths.items()}
    (folder / layout.MANIFEST).write_text(json.dumps(files))
