"""Compute dropout(LayerNorm(sum of embeddings)), and a gradient of the tables that has the same bits in every run.

ids: one (T,) for each of up to three tables (rows, E): words, types and, for BERT, positions. The sum is kept in
registers; the backward pass computes it again from the tables. A table's gradient adds the rows of dz in the order of
their sorted ids, in chunks of about sqrt(T) tokens. A run of one id inside a chunk is written to the table directly;
the parts of a run that crosses chunks (such as all types, [CLS], [MASK]) are added in order afterwards. No atomics.

Bytes moved, with k tables, and t, i, y bytes per number of a table, per id, and per number of y and dz:
    forward   T * (E * (k * t + y) + k * i + 8)         and weight and bias, 8E per row, from the cache
    backward  T * (E * (k * t + 2y) + k * i + 8)        and 12E for each of num_programs()
    scatter, for each table   T * E * y + rows * E * t  and (8 + i) per token and 256 columns: its index and id
With dropout each row reads a seed of 8 bytes; each crossing of a run moves 8E.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabert.kernels.dropout import draw_seed, keep_scale, row_factor, threshold
from megabert.kernels.row_statistics import (
    accumulator,
    accumulator_dtype,
    num_programs,
    row_constants,
    row_gradient,
    row_statistics,
)
from megabert.model.ops import residual_dtype

MAX_TABLES = 3
# Columns of a program of scatter_kernel: eight for each thread of one warp.
SCATTER_BLOCK = 256


@triton.jit
def sum_of_rows(IDS0, IDS1, IDS2, TABLE0, TABLE1, TABLE2, token, column, inside, E, ACC: tl.constexpr):
    """Return the sum of one token's embeddings, (BLOCK,)."""
    z = tl.load(TABLE0 + tl.load(IDS0 + token).to(tl.int64) * E + column, mask=inside, other=0.0).to(ACC)
    if IDS1 is not None:
        z += tl.load(TABLE1 + tl.load(IDS1 + token).to(tl.int64) * E + column, mask=inside, other=0.0).to(ACC)
    if IDS2 is not None:
        z += tl.load(TABLE2 + tl.load(IDS2 + token).to(tl.int64) * E + column, mask=inside, other=0.0).to(ACC)
    return z


@triton.jit
def forward_kernel(
    IDS0, IDS1, IDS2, TABLE0, TABLE1, TABLE2, WEIGHT, BIAS, Y, MEAN, RSTD, SEED, E, eps, below, scale,
    DROPOUT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < E
    z = sum_of_rows(IDS0, IDS1, IDS2, TABLE0, TABLE1, TABLE2, token, column, inside, E, ACC)
    mean, rstd = row_statistics(z, inside, E, eps)
    tl.store(MEAN + token, mean)
    tl.store(RSTD + token, rstd)
    weight = tl.load(WEIGHT + column, mask=inside, other=0.0).to(ACC)
    bias = tl.load(BIAS + column, mask=inside, other=0.0).to(ACC)
    y = ((z - mean) * rstd * weight + bias) * row_factor(SEED, token, 0, below, scale, DROPOUT, BLOCK)
    tl.store(Y + token.to(tl.int64) * E + column, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    DY, IDS0, IDS1, IDS2, TABLE0, TABLE1, TABLE2, WEIGHT, MEAN, RSTD, DZ, SUMS, SEED, T, E, below, scale,
    DROPOUT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < E
    weight = tl.load(WEIGHT + column, mask=inside, other=0.0).to(ACC)
    dweight = tl.zeros((BLOCK,), ACC)
    dbias = tl.zeros((BLOCK,), ACC)
    for token in range(program, T, tl.num_programs(0)):
        place = tl.cast(token, tl.int64) * E + column
        z = sum_of_rows(IDS0, IDS1, IDS2, TABLE0, TABLE1, TABLE2, token, column, inside, E, ACC)
        rstd = tl.load(RSTD + token)
        normed = tl.where(inside, (z - tl.load(MEAN + token)) * rstd, 0.0)
        dy = tl.load(DY + place, mask=inside, other=0.0).to(ACC)
        dy *= row_factor(SEED, token, 0, below, scale, DROPOUT, BLOCK)
        dweight += dy * normed
        dbias += dy
        dz = row_gradient(dy, normed, weight, rstd, E)
        tl.store(DZ + place, dz.to(DZ.dtype.element_ty), mask=inside)
    tl.store(SUMS + program * E + column, dweight, mask=inside)
    tl.store(SUMS + (tl.num_programs(0) + program) * E + column, dbias, mask=inside)


@triton.jit
def scatter_kernel(
    DZ, IDS, ORDER, DTABLE, LEADING, TRAILING, T, E, chunk_tokens, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """Add the rows of one chunk of the sorted ids, run by run.

    LEADING (chunks, E): the sum of a run that began in an earlier chunk. TRAILING (chunks, E): the sum of a run that
    begins in this chunk and continues in the next.
    """
    chunk = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < E
    begin = chunk * chunk_tokens
    end = tl.minimum(begin + chunk_tokens, T)
    current = tl.load(IDS + begin).to(tl.int64)
    began_before = tl.load(IDS + begin - 1, mask=begin > 0, other=-1).to(tl.int64) == current
    total = tl.zeros((BLOCK,), ACC)
    for place in range(begin, end):
        index = tl.load(IDS + place).to(tl.int64)
        if index != current:
            run = total.to(DTABLE.dtype.element_ty)
            tl.store(DTABLE + current * E + column, run, mask=inside & ~began_before)
            tl.store(LEADING + chunk * E + column, total, mask=inside & began_before)
            total = tl.zeros((BLOCK,), ACC)
            current = index
            # A new run begins here, so this is false. The comparison keeps the variable's type.
            began_before = index < 0
        total += tl.load(DZ + tl.load(ORDER + place) * E + column, mask=inside, other=0.0).to(ACC)
    continues = tl.load(IDS + end, mask=end < T, other=-1).to(tl.int64) == current
    run = total.to(DTABLE.dtype.element_ty)
    tl.store(LEADING + chunk * E + column, total, mask=inside & began_before)
    tl.store(TRAILING + chunk * E + column, total, mask=inside & ~began_before & continues)
    tl.store(DTABLE + current * E + column, run, mask=inside & ~began_before & ~continues)


@triton.jit
def carry_kernel(IDS, DTABLE, LEADING, TRAILING, T, E, chunk_tokens, BLOCK: tl.constexpr):
    """Add the parts of the run that begins in this chunk and crosses its end, if there is one."""
    chunk = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < E
    begin = chunk * chunk_tokens
    # The position where the next chunk begins.
    following = begin + chunk_tokens
    index = tl.load(IDS + following - 1, mask=following < T, other=-1).to(tl.int64)
    before = tl.load(IDS + begin - 1, mask=begin > 0, other=-1).to(tl.int64)
    after = tl.load(IDS + following, mask=following < T, other=-2).to(tl.int64)
    mine = inside & (after == index) & (before != index)
    total = tl.load(TRAILING + chunk * E + column, mask=mine, other=0.0)
    continues = (after == index) & (before != index)
    while continues:
        chunk += 1
        following += chunk_tokens
        total += tl.load(LEADING + chunk * E + column, mask=inside, other=0.0)
        continues = tl.load(IDS + following, mask=following < T, other=-2).to(tl.int64) == index
    tl.store(DTABLE + index * E + column, total.to(DTABLE.dtype.element_ty), mask=mine)


def _three(tensors: list[Tensor]) -> tuple[Any, Any, Any]:
    first, second, third = [*tensors, None, None][:MAX_TABLES]
    return first, second, third


@torch.library.custom_op("megabert::embed_layer_norm", mutates_args=())
def forward(
    ids: list[Tensor], tables: list[Tensor], weight: Tensor, bias: Tensor, seed: Tensor | None,
    eps: float, dropout_p: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y (T, E) in dtype, and each row's mean and 1 / standard deviation, (T,)."""
    y, mean, rstd = _outputs(ids, tables, dtype)
    if y.numel():
        tokens, width = y.shape
        forward_kernel[(tokens,)](
            *_three(ids), *_three(tables), weight, bias, y, mean, rstd, seed, width, eps, threshold(dropout_p),
            keep_scale(dropout_p), **row_constants(width, dropout_p, *tables),
        )  # fmt: skip
    return y, mean, rstd


@torch.library.custom_op("megabert::embed_layer_norm_backward", mutates_args=())
def backward(
    dy: Tensor, ids: list[Tensor], tables: list[Tensor], weight: Tensor, mean: Tensor, rstd: Tensor,
    seed: Tensor | None, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradient of the sum of embeddings (T, E), and partial sums of dweight and dbias, (2, programs, E)."""
    dz, sums = _gradients(dy, tables)
    if dz.numel():
        tokens, width = dz.shape
        backward_kernel[(sums.shape[1],)](
            dy, *_three(ids), *_three(tables), weight, mean, rstd, dz, sums, seed, tokens, width,
            threshold(dropout_p), keep_scale(dropout_p), **row_constants(width, dropout_p, *tables),
        )  # fmt: skip
    return dz, sums


def chunk_size(num_tokens: int) -> int:
    """Return the tokens of a chunk, a power of two near sqrt(T): as many steps as one id can have crossings."""
    return 1 << (max(1, num_tokens).bit_length() // 2)


@torch.library.custom_op("megabert::scatter_rows", mutates_args=())
def scatter_rows(dz: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """Add each row t of dz (T, E) to row ids[t] of a zero table like `table`, always in the same order."""
    dtable = torch.zeros_like(table)
    if dz.numel():
        tokens, width = dz.shape
        size = chunk_size(tokens)
        chunks = -(-tokens // size)
        sorted_ids, order = torch.sort(ids, stable=True)
        parts = dz.new_empty((2, chunks, width), dtype=accumulator_dtype(dz, table))
        grid = (chunks, -(-width // SCATTER_BLOCK))
        constants: dict[str, Any] = {"BLOCK": SCATTER_BLOCK, "num_warps": 1}
        scatter_kernel[grid](
            dz, sorted_ids, order, dtable, parts[0], parts[1], tokens, width, size,
            ACC=accumulator(dz, table), **constants,
        )  # fmt: skip
        if chunks > 1:
            carry_kernel[grid](sorted_ids, dtable, parts[0], parts[1], tokens, width, size, **constants)
    return dtable


def _outputs(ids: list[Tensor], tables: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    tokens = ids[0].shape[0]
    mean = tables[0].new_empty(tokens, dtype=accumulator_dtype(*tables))
    return tables[0].new_empty((tokens, tables[0].shape[1]), dtype=dtype), mean, torch.empty_like(mean)


def _gradients(dy: Tensor, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
    programs = num_programs(dy.shape[0], dy.shape[1], dy.device) if dy.numel() else 0
    return torch.empty_like(dy), dy.new_empty((2, programs, dy.shape[1]), dtype=accumulator_dtype(*tables))


@forward.register_fake
def _(ids, tables, weight, bias, seed, eps, dropout_p, dtype):
    return _outputs(ids, tables, dtype)


@backward.register_fake
def _(dy, ids, tables, weight, mean, rstd, seed, dropout_p):
    return _gradients(dy, tables)


@scatter_rows.register_fake
def _(dz, ids, table):
    return torch.zeros_like(table)


class EmbedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, weight: Tensor, bias: Tensor, seed: Tensor | None, eps: float, dropout_p: float, dtype: torch.dtype,
        padding_idx: int | None, *ids_and_tables: Tensor,
    ) -> Tensor:  # fmt: skip
        half = len(ids_and_tables) // 2
        ids, tables = list(ids_and_tables[:half]), list(ids_and_tables[half:])
        y, mean, rstd = forward(ids, tables, weight, bias, seed, eps, dropout_p, dtype)
        ctx.save_for_backward(weight, mean, rstd, seed, *ids, *tables)
        ctx.dropout_p, ctx.padding_idx = dropout_p, padding_idx
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        weight, mean, rstd, seed, *rest = ctx.saved_tensors
        ids, tables = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        dz, sums = backward(dy.contiguous(), ids, tables, weight, mean, rstd, seed, ctx.dropout_p)
        dtables = [scatter_rows(dz, index, table) for index, table in zip(ids, tables, strict=True)]
        if ctx.padding_idx is not None:
            dtables[0][ctx.padding_idx].zero_()
        dweight, dbias = sums.sum(1).to(weight.dtype)
        return dweight, dbias, None, None, None, None, None, *[None] * len(ids), *dtables


def embed_layer_norm(
    ids: list[Tensor],
    tables: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout_p: float,
    low_precision: bool,
    padding_idx: int | None = None,
) -> Tensor:
    """Compute embed_layer_norm as in model/ops.py. ids: (T,) integers per table; tables: (rows, E). Returns (T, E)."""
    if not 0 < len(tables) == len(ids) <= MAX_TABLES:
        raise ValueError(f"got {len(ids)} ids for {len(tables)} tables, expected one for each of 1 to {MAX_TABLES}.")
    dtype = residual_dtype(tables[0].dtype, tables[0].device.type, low_precision)
    seed = draw_seed(tables[0], dropout_p)
    flat = [index.contiguous() for index in ids]
    return EmbedLayerNorm.apply(weight, bias, seed, eps, dropout_p, dtype, padding_idx, *flat, *tables)
