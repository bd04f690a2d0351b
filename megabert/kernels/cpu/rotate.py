"""Compute RoPE on a CPU, fused by torch.compile: one pass over queries, keys and values, forward and backward."""

from typing import Any

import torch
from torch import Tensor

from megabert.kernels.cpu.compiled import compiled
from megabert.model.ops import upcast


@compiled
def _rotate(qkv: Tensor, table: Tensor, sign: float, out: Tensor) -> None:
    """Write queries and keys, rotated by sign * the table's angles, and values to `out`. All (T, 3, H, D)."""
    cosine, sine = table[:, 0, None, None, :], sign * table[:, 1, None, None, :]
    half = qkv.shape[-1] // 2
    first, second = upcast(qkv[:, :2, :, :half]), upcast(qkv[:, :2, :, half:])
    out[:, :2, :, :half] = (first * cosine - second * sine).to(qkv.dtype)
    out[:, :2, :, half:] = (second * cosine + first * sine).to(qkv.dtype)
    out[:, 2] = qkv[:, 2]


class Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(table)
        out = torch.empty_like(qkv)
        _rotate(qkv, table, 1.0, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        out = torch.empty_like(grad)
        _rotate(grad, ctx.saved_tensors[0], -1.0, out)
        return out, None


def rotate(qkv: Tensor, table: Tensor) -> Tensor:
    """Compute rotate as in model/ops.py."""
    return Rotate.apply(qkv, table)
