"""Draw dropout masks from a seed, so that the backward pass draws them again and none is stored.

Philox 4x32-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405) is a function of (seed, counter). The
counter here is the element's position, so a mask depends neither on a kernel's block sizes nor on the machine. One call
returns 128 bits: eight draws of 16 bits, for eight neighbouring columns. With one call per element, drawing would take
longer than the memory traffic of an elementwise kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# This many neighbouring columns share one Philox call.
GROUP = tl.constexpr(8)


def draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """Draw a seed (1,) int64 from PyTorch's generator of x's device, without synchronising; None without dropout.

    torch.manual_seed therefore determines the mask, and activation checkpointing, which restores the generator, repeats
    it. A kernel reads the seed from the device's memory, and torch refreshes the generator there before it replays a
    CUDA graph, so each replay draws the mask of its own torch.manual_seed.
    """
    if dropout_p == 0.0:
        return None
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def threshold(dropout_p: float) -> int:
    """Return the number below which a draw drops its element: p in units of 2^-16, from 1 to 2^16 - 1."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout is {dropout_p}, expected at least 0 and less than 1.")
    return min(max(1, round(dropout_p * 2**16)), 2**16 - 1)


def keep_scale(dropout_p: float) -> float:
    """Return the factor of a kept element, as in torch.nn.functional.dropout."""
    return 1.0 / (1.0 - dropout_p)


@triton.jit
def draws(seed, row, group, head):
    """Draw eight numbers from 0 to 65535 for each group: (..., G) -> (..., G, 2, 2, 2). row, group, head: int32."""
    # Philox takes counters of one shape.
    group = group + row * 0
    a, b, c, d = tl.philox(seed, group, row + group * 0, head + group * 0, group * 0)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.join(words & 0xFFFF, words >> 16).to(tl.int32)


@triton.jit
def row_factor(SEED, row, first_group, below, scale, DROPOUT: tl.constexpr, BLOCK: tl.constexpr):
    """Return the factors of BLOCK columns of one row: (BLOCK,), each scale or 0; without dropout the number 1.

    first_group: the first column // GROUP; below: threshold().
    """
    if DROPOUT:
        group = first_group + tl.arange(0, BLOCK // GROUP)
        return tl.where(tl.reshape(draws(tl.load(SEED), row, group, 0), (BLOCK,)) >= below, scale, 0.0)
    else:
        return 1.0


@triton.jit
def tile_factor(seed, rows, first_group, head, below, scale, BLOCK: tl.constexpr):
    """Return the factors of BLOCK columns of several rows: rows (R,) -> (R, BLOCK), each scale or 0."""
    group = first_group + tl.arange(0, BLOCK // GROUP)
    numbers = tl.reshape(draws(seed, rows[:, None], group[None, :], head), (rows.shape[0], BLOCK))
    return tl.where(numbers >= below, scale, 0.0)
