"""Compute ALiBi (https://arxiv.org/abs/2108.12409), symmetric: -slope_h * |i - j| is added to the scaled scores."""

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the slopes (H,): 2^(-8/n), 2^(-16/n), ... for n a power of two.

    For any other n: the slopes of the next lower power of two, then every other slope of the next higher one, as in the
    authors' code.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(num_heads - power)]
    return torch.tensor(slopes, dtype=dtype)


def alibi_bias(slopes: Tensor, length: int, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
    """Return -slope_h * |i - j| of shape (1, H, L, L), or only its rows i in `rows`."""
    position = torch.arange(length, device=slopes.device)
    distance = (position[rows, None] - position[None, :]).abs()
    return (-slopes[:, None, None] * distance).to(dtype)[None]
