"""Shared parts of the kernels with a LayerNorm: statistics, gradient, precision, launch constants.

One program holds a whole row (E,) in registers. Statistics are in fp32 for every dtype of the residual stream but fp64.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabert.kernels import MAX_WIDTH

# Programs of a backward pass; each sums its part of the weights' gradient. A constant, so that the order of the sum,
# and with it every bit, is the same on all GPUs: two for each of an A100's 108 multiprocessors, rounded up.
PARTIALS = 256


@triton.jit
def row_statistics(z, inside, E, eps):
    """Return a row's mean and 1 / standard deviation. z: (BLOCK,), zero outside the row."""
    mean = tl.sum(z, 0) / E
    centred = tl.where(inside, z - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 0) / E + eps)


@triton.jit
def row_gradient(dy, normed, weight, rstd, E):
    """Return the gradient of the row before the LayerNorm. dy, normed: (BLOCK,), zero outside the row."""
    weighted = dy * weight
    projection = tl.sum(weighted * normed, 0) / E
    return (weighted - normed * projection - tl.sum(weighted, 0) / E) * rstd


def accumulator(*tensors: Tensor) -> Any:
    """Return the Triton type to compute in: fp64 if a tensor has it, else fp32."""
    return tl.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else tl.float32


def accumulator_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def row_constants(width: int, dropout_p: float, *tensors: Tensor) -> dict[str, Any]:
    """Return the compile-time constants of a kernel with one row in each program.

    About eight columns per thread, so that loads are 16 bytes. Raises ValueError for rows too wide for registers.
    """
    if width > MAX_WIDTH:
        raise ValueError(f"hidden_size is {width}, the LayerNorm kernels take at most {MAX_WIDTH}. Use run.ops torch.")
    block = 1 << max(4, (width - 1).bit_length())
    warps = min(16, max(1, block // 256))
    return {"DROPOUT": dropout_p > 0, "ACC": accumulator(*tensors), "BLOCK": block, "num_warps": warps}
