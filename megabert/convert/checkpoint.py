"""Read the weights out of one of our training checkpoints, whatever ZeRO stage wrote it."""

from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from megabert import checkpoint_format as layout
from megabert.checkpoint_format import State
from megabert.model.configuration_megabert import MegaBertConfig


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], MegaBertConfig, State]:
    """Read one checkpoint's fp32 weights by parameter name, its architecture and its counters.

    path: a checkpoint, or a run's folder for its newest. Raises ValueError if it is damaged or not there.
    """
    folder = layout.find_checkpoint(path)
    if problem := layout.check_files(folder):
        raise ValueError(f"{folder}: not exported: {problem}.")
    state = layout.read_state(folder)
    bf16 = state.ds_config.get("bf16", {}).get("enabled", False)
    if state.zero_stage < 3 and not bf16:  # every rank holds all weights, in fp32
        file = folder / "mp_rank_00_model_states.pt"
        # A pickle, but one whose hash was just compared with what this project wrote.
        weights = torch.load(file, map_location="cpu", weights_only=False, mmap=True)["module"]
    else:
        weights = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name) or {}
    weights = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    weights.pop("decoder.weight", None)  # tied to the word embeddings
    return weights, MegaBertConfig(**state.model), state
