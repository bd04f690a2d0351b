"""Fuse GeGLU, LayerNorms and embeddings with torch.compile: each reads and writes its activations once per pass.

Every Function here saves its inputs and one seed and computes everything else again in its backward pass. Dropout
stores no mask: a hash of the seed and an element's position decides whether the element is kept. The seed comes from
torch's generator, so torch.manual_seed determines it and activation checkpointing repeats it.

Compiling needs a C++ compiler and takes some fifteen seconds once per machine, since inductor caches its results;
ahead.py compiles everything at once before the first step.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import cpp_builder, exc

from megabert.model.ops import residual_dtype, upcast

# With dynamic=True shapes may vary between calls and models without compiling again, except those of an nn.Parameter:
# parameters are therefore passed detached. So is what needs a gradient in training only. fullgraph=True turns a
# fallback to eager, which is slow, into an error.
compiled = functools.partial(torch.compile, dynamic=True, fullgraph=True)


def why_not_compiled() -> str | None:
    """Return the reason why torch.compile cannot build for this CPU, or None."""
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "torch.compile finds no C++ compiler (install g++, or set CXX)"
    return None


class Dropout(NamedTuple):
    """One application of dropout: elements whose hash is below the threshold are zeroed, the others scaled.

    seed: (), int32. threshold: probability p as a signed 32-bit integer, from -2^31 for 0 to 2^31 - 1 for 1.
    """

    seed: Tensor
    threshold: int
    scale: float


def draw_dropout(probability: float) -> Dropout | None:
    """Draw a seed from torch's generator. Returns None for probability 0."""
    if probability == 0:
        return None
    seed = torch.randint(-(1 << 31), 1 << 31, (), dtype=torch.int32)
    if probability == 1:
        return Dropout(seed, (1 << 31) - 1, 0.0)
    return Dropout(seed, round(probability * (1 << 32)) - (1 << 31), 1 / (1 - probability))


def keep_mask(seed: Tensor, threshold: int, rows: int, columns: int) -> Tensor:
    """Return which elements of a (rows, columns) matrix dropout keeps: MurmurHash3's finaliser of position and seed."""
    row = torch.arange(rows, dtype=torch.int32)[:, None]
    column = torch.arange(columns, dtype=torch.int32)[None, :]
    # The factor, 2^32 divided by the golden ratio, spreads neighbouring positions; int32 wraps around.
    bits = (row * columns + column) * -1640531535 ^ seed
    # The factor is 0x85EBCA6B as an int32.
    bits = (bits ^ (bits >> 16 & 0xFFFF)) * -2048144789
    # The factor is 0xC2B2AE35 as an int32.
    bits = (bits ^ (bits >> 13 & 0x7FFFF)) * -1028477387
    return (bits ^ (bits >> 16 & 0xFFFF)) >= threshold


def drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Apply dropout to a matrix. Its gradient is the same function of the incoming gradient."""
    if dropout is None:
        return x
    return torch.where(keep_mask(dropout.seed, dropout.threshold, x.shape[0], x.shape[1]), x * dropout.scale, 0.0)


@compiled
def _geglu_forward(gate: Tensor, value: Tensor, dropout: Dropout | None) -> Tensor:
    return drop(F.gelu(upcast(gate)) * upcast(value), dropout).to(gate.dtype)


# The high threshold keeps inductor from writing an fp32 intermediate that both gradients read to memory.
@functools.partial(compiled, options={"realize_opcount_threshold": 1000})
def _geglu_backward(
    grad: Tensor, gate: Tensor, value: Tensor, dropout: Dropout | None, grad_gate: Tensor, grad_value: Tensor
) -> None:
    gate = upcast(gate)
    grad = drop(upcast(grad), dropout)
    normal = 0.5 * (1 + torch.erf(gate * 0.7071067811865476))
    # The last factor is 1 / sqrt(2 pi).
    slope = normal + gate * torch.exp(-0.5 * gate * gate) * 0.3989422804014327
    grad_gate.copy_(grad * upcast(value) * slope)
    grad_value.copy_(grad * gate * normal)


class Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.dropout = draw_dropout(probability)
        return _geglu_forward(*x.detach().chunk(2, dim=-1), ctx.dropout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        _geglu_backward(grad, *x.chunk(2, dim=-1), ctx.dropout, *out.chunk(2, dim=-1))
        return out, None


def geglu(x: Tensor, dropout_p: float) -> Tensor:
    """Compute geglu as in model/ops.py."""
    return Geglu.apply(x, dropout_p)


def _normalise(total: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the LayerNorm of total (T, E) in fp32 or fp64, and each row's mean and 1 / standard deviation, (T, 1)."""
    wide = upcast(total)
    variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    return (wide - mean) * rstd * weight + bias, mean, rstd


def _norm_gradients(
    grad: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of total (T, E), weight and bias (E,)."""
    normed = (upcast(total) - mean) * rstd
    inner = grad * weight
    inner = inner - inner.mean(dim=-1, keepdim=True) - normed * (inner * normed).mean(dim=-1, keepdim=True)
    return inner * rstd, (grad * normed).sum(dim=0), grad.sum(dim=0)


@compiled
def _add_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: Dropout | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the result, the sum before the LayerNorm, and its mean and 1 / standard deviation."""
    total = (drop(upcast(x), dropout) + upcast(residual)).to(dtype)
    out, mean, rstd = _normalise(total, weight, bias, eps)
    return out.to(dtype), total, mean, rstd


@compiled
def _add_norm_backward(
    grad: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, dropout: Dropout | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, residual, weight and bias."""
    grad_total, grad_weight, grad_bias = _norm_gradients(upcast(grad), total, mean, rstd, weight)
    return drop(grad_total, dropout).to(dtype), grad_total.to(total.dtype), grad_weight, grad_bias


class AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.dropout = draw_dropout(dropout_p)
        ctx.dtypes = x.dtype, residual.dtype
        detached = [tensor.detach() for tensor in (x, residual, weight, bias)]
        out, *saved = _add_norm_forward(*detached, eps, ctx.dropout, dtype)
        ctx.save_for_backward(*saved, weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *saved, weight = ctx.saved_tensors
        grad_x, grad_residual, *rest = _add_norm_backward(grad, *saved, weight.detach(), ctx.dropout, ctx.dtypes[0])
        return grad_x, grad_residual.to(ctx.dtypes[1]), *rest, None, None, None


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float, low_precision: bool
) -> tuple[Tensor, Tensor]:
    """Compute add_layer_norm as in model/ops.py."""
    dtype = residual_dtype(x.dtype, "cpu", low_precision)
    y = AddNorm.apply(x, residual, weight, bias, eps, dropout_p, dtype)
    return y, y


@compiled
def _embed_forward(
    ids: list[Tensor], tables: list[Tensor], weight: Tensor, bias: Tensor, eps: float, dropout: Dropout | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the result, the sum of embeddings, and its mean and 1 / standard deviation."""
    total = tables[0][ids[0]]
    for index, table in zip(ids[1:], tables[1:], strict=True):
        total = total + table[index]
    total = total.to(dtype)
    out, mean, rstd = _normalise(total, weight, bias, eps)
    return drop(out, dropout).to(dtype), total, mean, rstd


@compiled
def _embed_backward(
    grad: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, dropout: Dropout | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the sum of embeddings, of weight and of bias."""
    return _norm_gradients(drop(upcast(grad), dropout), total, mean, rstd, weight)


class EmbedNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, ids: list[Tensor], weight: Tensor, bias: Tensor, eps: float, dropout_p: float,
        low_precision: bool, padding_idx: int | None, *tables: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.dropout = draw_dropout(dropout_p)
        ctx.rows = [len(table) for table in tables]
        ctx.ids = ids
        # The row of each table that gets no gradient; -1 for none.
        ctx.frozen = [-1 if padding_idx is None else padding_idx] + [-1] * (len(tables) - 1)
        dtype = residual_dtype(tables[0].dtype, "cpu", low_precision)
        detached = [table.detach() for table in tables]
        out, *saved = _embed_forward(ids, detached, weight.detach(), bias.detach(), eps, ctx.dropout, dtype)
        ctx.save_for_backward(*saved, weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *saved, weight = ctx.saved_tensors
        grad_total, *rest = _embed_backward(grad, *saved, weight.detach(), ctx.dropout)
        grad_tables = [
            torch.ops.aten.embedding_dense_backward(grad_total, index, rows, frozen, False)
            for index, rows, frozen in zip(ctx.ids, ctx.rows, ctx.frozen, strict=True)
        ]
        return None, *rest, None, None, None, None, *grad_tables


def embed_layer_norm(
    ids: list[Tensor], tables: list[Tensor], weight: Tensor, bias: Tensor, *,
    eps: float, dropout_p: float, low_precision: bool, padding_idx: int | None = None,
) -> Tensor:  # fmt: skip
    """Compute embed_layer_norm as in model/ops.py."""
    for index, table in zip(ids, tables, strict=True):
        check_range(index, len(table), "an id")
    return EmbedNorm.apply(ids, weight, bias, eps, dropout_p, low_precision, padding_idx, *tables)


def check_range(index: Tensor, rows: int, what: str) -> None:
    """Raise IndexError for an index outside 0 to rows - 1.

    Compiled code would abort the process for one that is too large and count a negative one from the end.
    """
    if not index.numel():
        return
    least, most = (int(end) for end in index.aminmax())
    if least < 0 or most >= rows:
        raise IndexError(f"{what} is {least if least < 0 else most}, expected 0 to {rows - 1}.")
