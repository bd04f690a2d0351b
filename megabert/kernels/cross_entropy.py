"""Compute the masked tokens' loss, its gradient and the number correct without a (T, V) or an fp32 (M, V) matrix.

hidden (M, E) is multiplied with the vocabulary (V, E) in chunks of rows. One kernel overwrites each chunk's logits, in
the precision of the product, with their gradient, for which softmax - onehot needs only the row's log-sum-exp. The
chunk's three products follow at once: the forward pass computes the gradients of hidden, weight and bias, the backward
pass only scales them. The z-loss is z * lse^2 per row (https://arxiv.org/abs/2204.02311, section 5); z = 0 turns it
off.

A vocabulary that is not a multiple of COLUMNS_MULTIPLE, such as BERT's 30,522, gets columns more, whose logits are -inf
and whose gradients 0: then rows begin at multiples of 16 bytes, which vector loads and fast matrix products need. V is
the number with them.

Bytes that the kernel moves per row, with s bytes per logit and l per label:
    3V * s + s + l + 12   reads V twice, the second time mostly from the cache, and the label's logit; writes V, lse,
                          loss, correct
    V * s + s + l + 12    without a gradient
    V * s + l + 12        for IGNORE_INDEX, where it writes zeros (only l + 12 without a gradient)
PyTorch without fusion keeps three (M, V) matrices, two of them in fp32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabert.kernels.row_statistics import accumulator, accumulator_dtype
from megabert.model.ops import IGNORE_INDEX, MaskedLoss

# Columns at a time: sixteen for each of 256 threads, two 16-byte loads of bf16.
BLOCK = 4096
IGNORED = tl.constexpr(IGNORE_INDEX)
# Logits of a chunk: 128 MiB in bf16, 2,198 rows of BERT's vocabulary.
MAX_LOGITS = 1 << 26
# Triton knows that rows are aligned if their length is a multiple of 16.
COLUMNS_MULTIPLE = 16
# A chunk has a multiple of this many rows, so that its matrix products tile.
ROWS_MULTIPLE = 128


@triton.jit
def loss_kernel(
    LOGITS, LABELS, LSE, LOSS, CORRECT, V, num_labels, z_loss,
    GRADIENT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits = LOGITS + row.to(tl.int64) * V
    label = tl.load(LABELS + row)
    # The label is IGNORE_INDEX, or invalid.
    if (label < 0) | (label >= num_labels):
        tl.store(LSE + row, 0.0)
        tl.store(LOSS + row, tl.where(label == IGNORED, 0.0, float("nan")))
        tl.store(CORRECT + row, 0)
        if GRADIENT:
            for first in range(0, V, BLOCK):
                column = first + tl.arange(0, BLOCK)
                tl.store(logits + column, tl.zeros((BLOCK,), LOGITS.dtype.element_ty), mask=column < V)
    else:
        # Each lane keeps its own maximum and sum; they are combined once, after the row.
        highest = tl.full((BLOCK,), float("-inf"), ACC)
        total = tl.zeros((BLOCK,), ACC)
        for first in range(0, V, BLOCK):
            column = first + tl.arange(0, BLOCK)
            x = tl.load(logits + column, mask=column < V, other=float("-inf")).to(ACC)
            ratio = tl.exp(tl.minimum(x, highest) - tl.maximum(x, highest))
            grown = tl.where(x > highest, total * ratio + 1.0, total + ratio)
            # Before the first finite logit the ratio is NaN.
            total = tl.where(x == float("-inf"), total, grown)
            highest = tl.maximum(highest, x)
        top = tl.max(highest, 0)
        mass = tl.sum(total * tl.exp(highest - top), 0)
        lse = top + tl.log(mass)
        target = tl.load(logits + label).to(ACC)
        tl.store(LSE + row, lse)
        tl.store(LOSS + row, lse - target + z_loss * lse * lse)
        tl.store(CORRECT + row, (target == top).to(tl.int32))
        if GRADIENT:
            # The label's logit must be read before another thread overwrites it.
            tl.debug_barrier()
            share = (1.0 + 2.0 * z_loss * lse) / mass
            for first in range(0, V, BLOCK):
                column = first + tl.arange(0, BLOCK)
                x = tl.load(logits + column, mask=column < V, other=float("-inf")).to(ACC)
                slope = tl.exp(x - top) * share - tl.where(column == label, 1.0, 0.0)
                tl.store(logits + column, slope.to(LOGITS.dtype.element_ty), mask=column < V)


@torch.library.custom_op("megabert::cross_entropy_", mutates_args=("logits",))
def loss_in_place(
    logits: Tensor, labels: Tensor, num_labels: int, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite logits (M, V) with the gradient of the summed loss if `gradient`. Return each row's lse, loss, correct.

    num_labels: the size of the vocabulary; the columns after it hold -inf. lse, loss: (M,) in fp32, or fp64 for fp64
    logits; correct: (M,) int32, 0 or 1.
    """
    lse, loss, correct = _per_row(logits)
    if logits.numel():
        constants: dict[str, Any] = {"GRADIENT": gradient, "ACC": accumulator(logits), "BLOCK": BLOCK, "num_warps": 8}
        rows, columns = logits.shape
        loss_kernel[(rows,)](logits, labels, lse, loss, correct, columns, num_labels, z_loss, **constants)
    return lse, loss, correct


@loss_in_place.register_fake
def _(logits, labels, num_labels, z_loss, gradient):
    return _per_row(logits)


def _per_row(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lse = logits.new_empty(logits.shape[0], dtype=accumulator_dtype(logits))
    return lse, torch.empty_like(lse), torch.empty_like(lse, dtype=torch.int32)


def chunk_rows(num_rows: int, vocab_size: int) -> int:
    """Return the rows of a chunk: equal chunks, as few as MAX_LOGITS allows. 2,458 rows of 30,528 -> 1,280."""
    most = max(1, MAX_LOGITS // vocab_size)
    num_rows = max(1, num_rows)
    rows = -(-num_rows // -(-num_rows // most))
    return min(most, -(-rows // ROWS_MULTIPLE) * ROWS_MULTIPLE)


def with_columns(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Convert weight and bias to dtype, with rows of 0 and a bias of -inf up to a multiple of COLUMNS_MULTIPLE."""
    vocab_size = weight.shape[0]
    more = -vocab_size % COLUMNS_MULTIPLE
    if not more:
        return weight.to(dtype), bias.to(dtype)
    padded = weight.new_zeros((vocab_size + more, weight.shape[1]), dtype=dtype)
    padded[:vocab_size] = weight
    padded_bias = bias.new_full((vocab_size + more,), float("-inf"), dtype=dtype)
    padded_bias[:vocab_size] = bias
    return padded, padded_bias


def in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, z_loss: float, gradient: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the summed loss, the number correct, and the gradients of hidden, weight and bias.

    Without `gradient` the gradients are empty.
    dtype: the matrix products' dtype.
    """
    loss_sum, num_correct, dhidden, dweight, dbias = _sums(hidden, weight, bias, gradient)
    narrow = hidden.to(dtype)
    narrow_weight, narrow_bias = with_columns(weight, bias, dtype)
    vocab_size = weight.shape[0]
    size = chunk_rows(hidden.shape[0], narrow_weight.shape[0])
    for start in range(0, hidden.shape[0], size):
        chunk = slice(start, start + size)
        logits = torch.addmm(narrow_bias, narrow[chunk], narrow_weight.t())  # (rows, V)
        _, loss, correct = loss_in_place(logits, labels[chunk], vocab_size, z_loss, gradient)
        loss_sum += loss.sum()
        num_correct += correct.sum()
        if gradient:
            dhidden[chunk] = torch.mm(logits, narrow_weight)
            dweight += torch.mm(logits.t(), narrow[chunk])[:vocab_size]
            dbias += logits.sum(0, dtype=dbias.dtype)[:vocab_size]
    return loss_sum, num_correct, dhidden, dweight, dbias


forward = torch.library.custom_op("megabert::masked_cross_entropy", in_chunks, mutates_args=())


@forward.register_fake
def _(hidden, weight, bias, labels, z_loss, gradient, dtype):
    return _sums(hidden, weight, bias, gradient)


def _sums(
    hidden: Tensor, weight: Tensor, bias: Tensor, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results; sums are in fp32, or fp64 for fp64."""
    wide = accumulator_dtype(hidden, weight)
    loss_sum = hidden.new_zeros((), dtype=wide)
    num_correct = hidden.new_zeros((), dtype=torch.int64)
    if not gradient:
        nothing = [hidden.new_empty(0, dtype=dtype) for dtype in (hidden.dtype, wide, wide)]
        return loss_sum, num_correct, nothing[0], nothing[1], nothing[2]
    dweight, dbias = (x.new_zeros(x.shape, dtype=wide) for x in (weight, bias))
    return loss_sum, num_correct, torch.empty_like(hidden), dweight, dbias


class MaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, z_loss: float, gradient: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        loss_sum, num_correct, *gradients = forward(hidden, weight, bias, labels, z_loss, gradient, dtype)
        ctx.save_for_backward(*gradients)
        ctx.types = (hidden.dtype, weight.dtype, bias.dtype)
        ctx.mark_non_differentiable(num_correct)
        return loss_sum, num_correct

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _: Tensor):  # type: ignore[override]
        scaled = [(x * grad_loss).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.types, strict=True)]
        return *scaled, None, None, None, None


def masked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, z_loss: float = 0.0
) -> MaskedLoss:
    """Compute masked_cross_entropy as in model/ops.py. hidden: (M, E); weight: (V, E); bias: (V,); labels: (M,)."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weight, bias))
    loss_sum, num_correct = MaskedCrossEntropy.apply(hidden, weight, bias, labels.contiguous(), z_loss, gradient, dtype)
    return MaskedLoss(loss_sum, num_correct, (labels != IGNORE_INDEX).sum())
