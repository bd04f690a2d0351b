"""Compute what all kernels with a LayerNorm need: statistics, gradient, precision, launch constants.

One program holds a whole row (E,) in registers. Statistics are in fp32 for every dtype of the residual stream but fp64.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabert.kernels import MAX_WIDTH

# Warps of a backward pass on each multiprocessor. Its 65,536 registers hold 21 warps of 96 registers a thread, which is
# the most that any of these kernels needs: all programs run at once, and five of them read five rows while one waits.
RESIDENT_WARPS = 20


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


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a CUDA device; 1 for a CPU, on which Triton's interpreter runs one program."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def num_programs(rows: int, width: int, device: torch.device) -> int:
    """Return the programs of a backward pass, each of which sums its part of the weights' gradient.

    As many as the device can hold at once. The order of the sum, and with it the last bits, depend on their number, so
    they are the same in every run on one kind of GPU. Rows of 768 on an H100: 132 multiprocessors * 5 = 660.
    """
    return max(1, min(rows, multiprocessors(device) * max(1, RESIDENT_WARPS // _block_and_warps(width)[1])))


def _block_and_warps(width: int) -> tuple[int, int]:
    """Return the columns of a program and its warps: about eight columns per thread, so that loads are 16 bytes."""
    block = 1 << max(4, (width - 1).bit_length())
    return block, min(16, max(1, block // 256))


def row_constants(width: int, dropout_p: float, *tensors: Tensor) -> dict[str, Any]:
    """Return the compile-time constants of a kernel with one row in each program.

    Raises ValueError for rows too wide for registers.
    """
    if width > MAX_WIDTH:
        raise ValueError(f"hidden_size is {width}, the LayerNorm kernels take at most {MAX_WIDTH}. Use run.ops torch.")
    block, warps = _block_and_warps(width)
    return {"DROPOUT": dropout_p > 0, "ACC": accumulator(*tensors), "BLOCK": block, "num_warps": warps}
