"""Compute the layers' linear maps in FP8 with torchao. It has not run on a GPU yet."""

import torch
from torch import nn

from megabert.model.layers import Block


def use_fp8(model: nn.Module, device: torch.device) -> None:
    """Let every linear map of the layers multiply in FP8, forward and backward; the head stays as it is.

    Operands are scaled by their largest value and rounded: e4m3 for inputs and weights, e5m2 for gradients
    (https://arxiv.org/abs/2209.05433). Weights, their gradients and their names stay the same. On a CPU the rounded
    operands are multiplied in higher precision.
    """
    # Imported here because it is an extra, and because the import looks for CUDA libraries.
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # The number of tokens, over which weights' gradients sum, need not be a multiple of 16.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=device.type == "cpu")
    for block in model.modules():
        if isinstance(block, Block):
            convert_to_float8_training(block, config=config)
