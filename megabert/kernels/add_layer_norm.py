"""Compute LayerNorm(dropout(x) + residual), which ends each half of a post-LN block, and store neither sum nor mask.

x, residual, y: (T, E), each in its own precision: bf16 + bf16 -> bf16 is the low-precision LayerNorm, bf16 + fp32 ->
fp32 the fp32 residual stream. The sum is kept in registers, in fp32. The backward pass computes it again from x and
residual, which takes as long as reading a stored sum. Bytes moved, with x, r, y bytes per element of x, residual and y:
    forward   T * (E * (x + r + y) + 8)              and weight and bias, 8E per row, from the cache
    backward  T * (E * (2y + x + r + dx + dr) + 8)   and 12E for each of num_programs(): weight, and both sums
y is returned twice, for the next product and as the next residual: the backward pass reads both gradients and sums them
itself, where autograd would move three matrices more for the sum and then read it. If y has one use, it reads y once.
Without a residual, r and dr are 0. Without dropout and with equal types, dx and dr are one matrix, written once. With
dropout each row reads a seed of 8 bytes. PyTorch without fusion moves 7.5 matrices forward (dropout and its mask 2.5,
sum 3, LayerNorm 2); this kernel moves 3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabert.kernels.dropout import draw_seed, keep_scale, row_factor, threshold
from megabert.kernels.row_statistics import (
    accumulator_dtype,
    num_programs,
    row_constants,
    row_gradient,
    row_statistics,
)
from megabert.model.ops import residual_dtype


@triton.jit
def forward_kernel(
    X, RESIDUAL, WEIGHT, BIAS, Y, MEAN, RSTD, SEED, E, eps, below, scale,
    DROPOUT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < E
    offset = row.to(tl.int64) * E + column
    z = tl.load(X + offset, mask=inside, other=0.0).to(ACC)
    z *= row_factor(SEED, row, 0, below, scale, DROPOUT, BLOCK)
    if RESIDUAL is not None:
        z += tl.load(RESIDUAL + offset, mask=inside, other=0.0).to(ACC)
    mean, rstd = row_statistics(z, inside, E, eps)
    tl.store(MEAN + row, mean)
    tl.store(RSTD + row, rstd)
    weight = tl.load(WEIGHT + column, mask=inside, other=0.0).to(ACC)
    bias = tl.load(BIAS + column, mask=inside, other=0.0).to(ACC)
    tl.store(Y + offset, ((z - mean) * rstd * weight + bias).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    DY, DY_OF_RESIDUAL, X, RESIDUAL, WEIGHT, MEAN, RSTD, DX, DRESIDUAL, SUMS, SEED, T, E, below, scale,
    DROPOUT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < E
    weight = tl.load(WEIGHT + column, mask=inside, other=0.0).to(ACC)
    dweight = tl.zeros((BLOCK,), ACC)
    dbias = tl.zeros((BLOCK,), ACC)
    for row in range(program, T, tl.num_programs(0)):
        offset = tl.cast(row, tl.int64) * E + column
        factor = row_factor(SEED, row, 0, below, scale, DROPOUT, BLOCK)
        z = tl.load(X + offset, mask=inside, other=0.0).to(ACC) * factor
        if RESIDUAL is not None:
            z += tl.load(RESIDUAL + offset, mask=inside, other=0.0).to(ACC)
        dy = tl.load(DY + offset, mask=inside, other=0.0).to(ACC)
        if DY_OF_RESIDUAL is not None:
            dy += tl.load(DY_OF_RESIDUAL + offset, mask=inside, other=0.0).to(ACC)
        rstd = tl.load(RSTD + row)
        normed = tl.where(inside, (z - tl.load(MEAN + row)) * rstd, 0.0)
        dweight += dy * normed
        dbias += dy
        dz = row_gradient(dy, normed, weight, rstd, E)
        if DRESIDUAL is not None:
            tl.store(DRESIDUAL + offset, dz.to(DRESIDUAL.dtype.element_ty), mask=inside)
        tl.store(DX + offset, (dz * factor).to(DX.dtype.element_ty), mask=inside)
    tl.store(SUMS + program * E + column, dweight, mask=inside)
    tl.store(SUMS + (tl.num_programs(0) + program) * E + column, dbias, mask=inside)


@torch.library.custom_op("megabert::add_layer_norm", mutates_args=())
def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, seed: Tensor | None,
    eps: float, dropout_p: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y (T, E) in dtype, and each row's mean and 1 / standard deviation, (T,)."""
    y, mean, rstd = _outputs(x, dtype)
    if x.numel():
        width = x.shape[1]
        forward_kernel[(x.shape[0],)](
            x, residual, weight, bias, y, mean, rstd, seed, width, eps, threshold(dropout_p), keep_scale(dropout_p),
            **row_constants(width, dropout_p, x),
        )  # fmt: skip
    return y, mean, rstd


@torch.library.custom_op("megabert::add_layer_norm_backward", mutates_args=())
def backward(
    dy: Tensor, dy_of_residual: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor, mean: Tensor,
    rstd: Tensor, seed: Tensor | None, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, dresidual (empty if it equals dx or there is none), and partial sums of dweight and dbias.

    dy, dy_of_residual: (T, E), the gradients of y's two uses. The partial sums: (2, programs, E).
    """
    dx, dresidual, sums = _gradients(x, residual, dropout_p)
    if x.numel():
        tokens, width = x.shape
        backward_kernel[(sums.shape[1],)](
            dy, dy_of_residual, x, residual, weight, mean, rstd, dx, dresidual if dresidual.numel() else None, sums,
            seed, tokens, width, threshold(dropout_p), keep_scale(dropout_p), **row_constants(width, dropout_p, x),
        )  # fmt: skip
    return dx, dresidual, sums


def _outputs(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[0], dtype=accumulator_dtype(x))
    return x.new_empty(x.shape, dtype=dtype), mean, torch.empty_like(mean)


def _gradients(x: Tensor, residual: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    programs = num_programs(x.shape[0], x.shape[1], x.device) if x.numel() else 0
    sums = x.new_empty((2, programs, x.shape[1]), dtype=accumulator_dtype(x))
    if residual is None or (dropout_p == 0 and residual.dtype == x.dtype):
        dresidual = x.new_empty(0)
    else:
        dresidual = torch.empty_like(residual)
    return torch.empty_like(x), dresidual, sums


@forward.register_fake
def _(x, residual, weight, bias, seed, eps, dropout_p, dtype):
    return _outputs(x, dtype)


@backward.register_fake
def _(dy, dy_of_residual, x, residual, weight, mean, rstd, seed, dropout_p):
    return _gradients(x, residual, dropout_p)


class AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, seed: Tensor | None,
        eps: float, dropout_p: float, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        y, mean, rstd = forward(x, residual, weight, bias, seed, eps, dropout_p, dtype)
        ctx.save_for_backward(x, residual, weight, mean, rstd, seed)
        ctx.dropout_p = dropout_p
        return y, y.view_as(y)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):  # type: ignore[override]
        x, residual, weight, mean, rstd, seed = ctx.saved_tensors
        # One use of the last layer's y has no gradient.
        used = [gradient.contiguous() for gradient in gradients if gradient is not None]
        if not used:
            return (None,) * 8
        other = used[1] if len(used) > 1 else None
        dx, dresidual, sums = backward(used[0], other, x, residual, weight, mean, rstd, seed, ctx.dropout_p)
        if residual is None:
            dresidual = None
        elif not dresidual.numel():
            dresidual = dx
        dweight, dbias = sums.sum(1).to(weight.dtype)
        return dx, dresidual, dweight, dbias, None, None, None, None


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float, low_precision: bool
) -> tuple[Tensor, Tensor]:
    """Compute add_layer_norm as in model/ops.py. x, residual: (T, E) -> (T, E), twice."""
    dtype = residual_dtype(torch.promote_types(x.dtype, residual.dtype), x.device.type, low_precision)
    seed = draw_seed(x, dropout_p)
    return AddLayerNorm.apply(x.contiguous(), residual.contiguous(), weight, bias, seed, eps, dropout_p, dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, low_precision: bool) -> Tensor:
    """Compute layer_norm as in model/ops.py, with the same kernels and no residual. x: (..., E)."""
    dtype = residual_dtype(x.dtype, x.device.type, low_precision)
    rows = x.reshape(-1, x.shape[-1])
    return AddLayerNorm.apply(rows, None, weight, bias, None, eps, 0.0, dtype)[0].view(x.shape)
