"""Dropout masks that are never stored: backward draws them again from the same seed.

Philox 4x32-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405) is a function of (seed, counter). Its counter
here is the element's place, so a mask depends neither on how a kernel cuts its work nor on the machine. One call gives
128 bits: eight draws of 16, for eight neighbouring columns. At one call for each element, drawing would cost more than
the memory traffic of an elementwise kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = tl.constexpr(8)  # neighbouring columns that share one Philox call


def draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """A seed (1,) int64 from PyTorch's generator of x's device, without waiting for the device; None without dropout.

    So torch.manual_seed decides the mask, and activation checkpointing, which restores the generator, repeats it.
    """
    if dropout_p == 0.0:
        return None
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def threshold(dropout_p: float) -> int:
    """Draws below it drop their element: p in units of 2^-16, at least one of them, at most all."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout is {dropout_p}, expected at least 0 and less than 1.")
    return min(max(1, round(dropout_p * 2**16)), 2**16 - 1)


def keep_scale(dropout_p: float) -> float:
    """What a kept element is multiplied by, as torch.nn.functional.dropout has it."""
    return 1.0 / (1.0 - dropout_p)


@triton.jit
def draws(seed, row, group, head):
    """Eight numbers from 0 to 65535 for each group: (..., G) -> (..., G, 2, 2, 2). row, group, head: int32."""
    group = group + row * 0  # Philox takes counters of one shape
    a, b, c, d = tl.philox(seed, group, row + group * 0, head + group * 0, group * 0)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.join(words & 0xFFFF, words >> 16).to(tl.int32)


@triton.jit
def row_factor(SEED, row, first_group, below, scale, DROPOUT: tl.constexpr, BLOCK: tl.constexpr):
    """What to multiply BLOCK columns of one row by: (BLOCK,) of scale or 0; 1 without dropout.

    first_group: the first column // GROUP.
    """
    if DROPOUT:
        group = first_group + tl.arange(0, BLOCK // GROUP)
        return tl.where(tl.reshape(draws(tl.load(SEED), row, group, 0), (BLOCK,)) >= below, scale, 0.0)
    else:
        return 1.0


@triton.jit
def tile_factor(seed, rows, first_group, head, below, scale, BLOCK: tl.constexpr):
    """What to multiply BLOCK columns of several rows by: rows (R,) -> (R, BLOCK) of scale or 0."""
    group = first_group + tl.arange(0, BLOCK // GROUP)
    numbers = tl.reshape(draws(seed, rows[:, None], group[None, :], head), (rows.shape[0], BLOCK))
    return tl.where(numbers >= below, scale, 0.0)
