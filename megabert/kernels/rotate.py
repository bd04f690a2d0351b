"""Compute RoPE for queries and keys in one pass over qkv, forward and backward.

The backward pass is the rotation by the opposite angles, so that nothing but the table is saved. Let s be the bytes per
number: each pass reads and writes 3 * H * D numbers per token, and reads D of the table, 6 * H * D * s + 4 * D bytes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of a program's first halves: 16 of each thread, which reads and writes 16 bytes at once.
NUMBERS = 2048


@triton.jit
def rotate_kernel(
    X, TABLE, OUT, rows, sign, H: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr
):
    """Rotate rows of (T * 3 * H, 2 * HALF) that are queries or keys, and copy those that are values."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.arange(0, SIZE)
    token, part = row // (3 * H), row // H % 3
    inside = (row[:, None] < rows) & (pair[None, :] < HALF)
    at = row[:, None].to(tl.int64) * (2 * HALF) + pair[None, :]
    angle = TABLE + token[:, None].to(tl.int64) * (2 * HALF) + pair[None, :]
    turned = inside & (part[:, None] < 2)
    cosine = tl.load(angle, mask=turned, other=1.0)
    sine = tl.load(angle + HALF, mask=turned, other=0.0) * sign
    first = tl.load(X + at, mask=inside, other=0.0).to(cosine.dtype)
    second = tl.load(X + at + HALF, mask=inside, other=0.0).to(cosine.dtype)
    tl.store(OUT + at, (first * cosine - second * sine).to(OUT.dtype.element_ty), mask=inside)
    tl.store(OUT + at + HALF, (second * cosine + first * sine).to(OUT.dtype.element_ty), mask=inside)


@torch.library.custom_op("megabert::rotate", mutates_args=())
def turn(qkv: Tensor, table: Tensor, sign: float) -> Tensor:
    """Rotate queries and keys of (T, 3, H, D) by sign * the table's angles."""
    out = torch.empty_like(qkv)
    _, _, heads, size = qkv.shape
    rows = qkv.numel() // size
    if rows:
        pairs = triton.next_power_of_2(size // 2)
        block = max(1, NUMBERS // pairs)
        shape: dict[str, Any] = {"H": heads, "HALF": size // 2, "BLOCK": block, "SIZE": pairs}
        rotate_kernel[(triton.cdiv(rows, block),)](qkv, table, out, rows, sign, **shape)
    return out


@turn.register_fake
def _(qkv, table, sign):
    return torch.empty_like(qkv)


class Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, table: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(table)
        return turn(qkv, table, 1.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return turn(grad.contiguous(), *ctx.saved_tensors, -1.0), None


def rotate(qkv: Tensor, table: Tensor) -> Tensor:
    """Compute rotate as in model/ops.py."""
    table = table.double() if qkv.dtype == torch.float64 else table
    return Rotate.apply(qkv.contiguous(), table)
