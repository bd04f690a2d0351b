"""Compute GELU(gate) * value, then dropout (https://arxiv.org/abs/2002.05202); read and write every number once.

x: (T, 2F), gate first, the output of the up-projection; y: (T, F). Exact (erf) GELU, computed in fp32. Bytes moved,
with s bytes per element:
    forward   T * 3F * s   (reads 2F, writes F)
    backward  T * 5F * s   (reads 2F and F, writes 2F)
With dropout each of the T * ceil(F / 1024) programs also reads a seed of 8 bytes.
PyTorch without fusion moves 7.5F forward (GELU 2, product 3, dropout and its mask 2.5) and 15.5F backward (2.5, 6, 3,
and 4 to join the gradients of the halves), and keeps the GELU, the product and the mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabert.kernels.dropout import GROUP, draw_seed, keep_scale, row_factor, threshold
from megabert.kernels.row_statistics import accumulator

# Columns of a program: eight for each of 128 threads, one 16-byte load of bf16.
BLOCK = 1024
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def forward_kernel(
    X, Y, SEED, F, below, scale, DROPOUT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate_at = X + row.to(tl.int64) * 2 * F + column
    gate = tl.load(gate_at, mask=inside, other=0.0).to(ACC)
    value = tl.load(gate_at + F, mask=inside, other=0.0).to(ACC)
    factor = row_factor(SEED, row, block * (BLOCK // GROUP), below, scale, DROPOUT, BLOCK)
    y = gate * 0.5 * (1.0 + tl.math.erf(gate * SQRT_HALF)) * value * factor
    tl.store(Y + row.to(tl.int64) * F + column, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    X, DY, DX, SEED, F, below, scale, DROPOUT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    place = row.to(tl.int64) * 2 * F + column
    gate = tl.load(X + place, mask=inside, other=0.0).to(ACC)
    value = tl.load(X + place + F, mask=inside, other=0.0).to(ACC)
    dy = tl.load(DY + row.to(tl.int64) * F + column, mask=inside, other=0.0).to(ACC)
    dy *= row_factor(SEED, row, block * (BLOCK // GROUP), below, scale, DROPOUT, BLOCK)
    cdf = 0.5 * (1.0 + tl.math.erf(gate * SQRT_HALF))
    pdf = INV_SQRT_2PI * tl.exp(-0.5 * gate * gate)
    tl.store(DX + place, (dy * value * (cdf + gate * pdf)).to(DX.dtype.element_ty), mask=inside)
    tl.store(DX + place + F, (dy * gate * cdf).to(DX.dtype.element_ty), mask=inside)


def _launch(x: Tensor, dropout_p: float) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return the grid and the compile-time constants of both kernels."""
    width = x.shape[1] // 2
    constants = {"DROPOUT": dropout_p > 0, "ACC": accumulator(x), "BLOCK": BLOCK, "num_warps": 4}
    return (x.shape[0], -(-width // BLOCK)), constants


@torch.library.custom_op("megabert::geglu", mutates_args=())
def forward(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    y = x.new_empty(x.shape[0], x.shape[1] // 2)
    if y.numel():
        grid, constants = _launch(x, dropout_p)
        forward_kernel[grid](x, y, seed, y.shape[1], threshold(dropout_p), keep_scale(dropout_p), **constants)
    return y


@torch.library.custom_op("megabert::geglu_backward", mutates_args=())
def backward(x: Tensor, dy: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    dx = torch.empty_like(x)
    if dy.numel():
        grid, constants = _launch(x, dropout_p)
        backward_kernel[grid](x, dy, dx, seed, dy.shape[1], threshold(dropout_p), keep_scale(dropout_p), **constants)
    return dx


@forward.register_fake
def _(x, seed, dropout_p):
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@backward.register_fake
def _(x, dy, seed, dropout_p):
    return torch.empty_like(x)


class Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, seed)
        ctx.dropout_p = dropout_p
        return forward(x, seed, dropout_p)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, seed = ctx.saved_tensors
        return backward(x, dy.contiguous(), seed, ctx.dropout_p), None, None


def geglu(x: Tensor, dropout_p: float) -> Tensor:
    """Compute geglu as in model/ops.py. x: (T, 2F) -> (T, F)."""
    return Geglu.apply(x.contiguous(), draw_seed(x, dropout_p), dropout_p)
