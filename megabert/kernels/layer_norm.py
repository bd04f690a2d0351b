"""What the kernels with a LayerNorm share: its statistics, its gradient, its precision.

One program holds a whole row (E,) in registers; statistics are in fp32 whatever the stream is (fp64 for fp64).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabert.kernels import MAX_WIDTH

# Programs of a backward pass: each adds up its share of the weights' gradient. A constant, so that the order of the
# sum, and with it every bit, is the same on all GPUs; two for each of an A100's 108 multiprocessors, rounded up.
PARTIALS = 256


@triton.jit
def row_statistics(z, inside, E, eps):
    """Mean and 1 / standard deviation of a row. z: (BLOCK,), zero where not inside."""
    mean = tl.sum(z, 0) / E
    centred = tl.where(inside, z - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 0) / E + eps)


@triton.jit
def row_gradient(dy, normed, weight, rstd, E):
    """Gradient by the row. dy, normed: (BLOCK,), zero outside the row."""
    weighted = dy * weight
    along = tl.sum(weighted * normed, 0) / E
    return (weighted - normed * along - tl.sum(weighted, 0) / E) * rstd


def accumulator(*tensors: Tensor) -> Any:
    """The type to compute in."""
    return tl.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else tl.float32


def accumulator_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def row_constants(width: int, dropout_p: float, *tensors: Tensor) -> dict[str, Any]:
    """What a kernel with one row in each program is compiled for.

    About eight columns for each thread, so that loads are 16 bytes. Raises ValueError for rows too wide for registers.
    """
    if width > MAX_WIDTH:
        raise ValueError(f"hidden_size is {width}, the LayerNorm kernels take at most {MAX_WIDTH}. Use run.ops torch.")
    block = 1 << max(4, (width - 1).bit_length())
    warps = min(16, max(1, block // 256))
    return {"DROPOUT": dropout_p > 0, "ACC": accumulator(*tensors), "BLOCK": block, "num_warps": warps}


def stream_dtype(dtype: torch.dtype, device_type: str, low_precision: bool) -> torch.dtype:
    """The dtype of a LayerNorm's result, as model/ops.py has it: under autocast its dtype or fp32, else that of x."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type) if low_precision else torch.float32
    return dtype
