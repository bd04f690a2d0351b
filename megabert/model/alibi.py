"""ALiBi (https://arxiv.org/abs/2108.12409) in its symmetric form: -slope_h * |i - j| added to the scaled score."""

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Give the slopes (H,): 2^(-8/n), 2^(-16/n), ... for n a power of two.

    Otherwise those of the power of two below, then every other one of the power above, as the paper's authors do. Not kept:
    what torch.export makes of them is of no use to anybody else.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(num_heads - power)]
    return torch.tensor(slopes, dtype=dtype)


def alibi_bias(slopes: Tensor, length: int, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
    """-slope_h * |i - j|, shape (1, H, L, L), or only those rows i of it."""
    place = torch.arange(length, device=slopes.device)
    distance = (place[rows, None] - place[None, :]).abs()
    return (-slopes[:, None, None] * distance).to(dtype)[None]
