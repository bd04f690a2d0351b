"""Fuse operations for a CPU with torch.compile: each reads and writes its activations once, forward and backward.

Every Function here saves its inputs and one seed and computes everything else again in its backward pass. Dropout
stores no mask: a hash of the seed and an element's position decides whether the element is kept. The seed comes from
torch's generator, so torch.manual_seed determines it and activation checkpointing repeats it.

Compiling needs a C++ compiler and takes some fifteen seconds once per machine, since inductor caches its results;
ahead.py compiles everything at once before the first step.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import cpp_builder, exc

from megabert.model.ops import IGNORE_INDEX, TORCH_OPS, MaskedLoss, residual_dtype, upcast

# With dynamic=True shapes may vary between calls and models without compiling again, except those of an nn.Parameter:
# parameters are therefore passed detached. So is what needs a gradient in training only. fullgraph=True turns a
# fallback to eager, which is slow, into an error.
compiled = functools.partial(torch.compile, dynamic=True, fullgraph=True)

# Bytes of logits that are computed and turned into gradients at once: few enough to stay in the cache, enough for a
# fast matrix product.
LOGITS_BYTES = 12 << 20

# Bytes of gradients of logits that are kept at once, by bytes per element. Where there are more, the gradient of the
# weight is summed over parts.
GRADIENT_BYTES = {2: 256 << 20, 4: 32 << 20, 8: 64 << 20}


class Scratch(threading.local):
    """Each thread's buffers for these gradients, by dtype: to allocate them costs a page fault per 4 kB."""

    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}


_scratch = Scratch()


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
        _check_range(index, len(table), "an id")
    return EmbedNorm.apply(ids, weight, bias, eps, dropout_p, low_precision, padding_idx, *tables)


def _check_range(index: Tensor, rows: int, what: str) -> None:
    """Raise IndexError for an index outside 0 to rows - 1.

    Compiled code would abort the process for one that is too large and count a negative one from the end.
    """
    if not index.numel():
        return
    least, most = (int(end) for end in index.aminmax())
    if least < 0 or most >= rows:
        raise IndexError(f"{what} is {least if least < 0 else most}, expected 0 to {rows - 1}.")


@compiled
def _logits_to_gradients(
    logits: Tensor, bias: Tensor, labels: Tensor, z_loss: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the gradient of the summed loss to `out`. Returns the loss and the number of correct rows.

    logits: (C, V), to which bias (V,) is still to be added; out: (C, V), may be the logits.
    """
    wide = upcast(logits) + bias
    used = labels != IGNORE_INDEX
    target = labels.clamp(min=0)[:, None]
    highest = wide.amax(dim=-1, keepdim=True)
    exponents = torch.exp(wide - highest)
    total = exponents.sum(dim=-1, keepdim=True)
    hit = wide.gather(1, target)
    log_sum = total.log() + highest
    loss, share = log_sum - hit, 1 / total
    if z_loss is not None:
        loss, share = loss + z_loss * log_sum * log_sum, share * (1 + 2 * z_loss * log_sum)
    loss = (loss[:, 0] * used).sum()
    num_correct = ((hit == highest)[:, 0] & used).sum()
    # Columns are compared in int32: in int64 a comparison takes four times the registers of the other terms, and the
    # whole loop a third longer.
    column = torch.arange(logits.shape[1], dtype=torch.int32)
    hot = torch.where(column == target.int(), 1.0, 0.0)
    out.copy_((exponents * share - hot) * used[:, None])
    return loss, num_correct


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # A vector is too short to gain from code of its own.
    return _scaled_vector(x, scale, dtype) if x.dim() == 1 else _scaled_matrix(x, scale, dtype)


def _scaled_vector(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (upcast(x) * scale).to(dtype)


_scaled_matrix = compiled(_scaled_vector)


class MaskedCrossEntropy(torch.autograd.Function):
    """The summed loss. Its gradients are computed in the forward pass, while the logits are still in the cache."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, z_loss: Tensor | None, needs_grad: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype
        with torch.autocast("cpu", enabled=False):
            loss, num_correct, *grads = _loss_and_gradients(
                hidden.to(dtype), weight.to(dtype), bias.detach(), labels, z_loss, needs_grad
            )
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(num_correct)
        return loss, num_correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(_scaled(grad, grad_loss, dtype) for grad, dtype in grads), None, None, None


def _workspace(size: int, dtype: torch.dtype) -> Tensor:
    """Return the first `size` elements of this thread's buffer, which grows to the largest size asked for."""
    workspaces = _scratch.by_dtype
    if dtype not in workspaces or len(workspaces[dtype]) < size:
        # A tensor that is allocated in inference mode could not be written to in training.
        with torch.inference_mode(False):
            workspaces[dtype] = torch.empty(size, dtype=dtype)
    return workspaces[dtype][:size]


def free_workspaces() -> None:
    """Free this thread's buffers; the next loss allocates them again."""
    _scratch.by_dtype.clear()


def has_bf16_products() -> bool:
    """Whether oneDNN multiplies bf16 matrices on this CPU."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _scorer(weight: Tensor, rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of hidden (C, E) and scratch (C, V) that computes logits (C, V), possibly in the scratch.

    For bf16, oneDNN converts weight (V, E) to its own layout, the best for `rows` rows, once and not at every product.
    """
    if weight.dtype != torch.bfloat16 or not has_bf16_products():
        return lambda hidden, scratch: torch.mm(hidden, weight.t(), out=scratch)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda hidden, scratch: torch.ops.mkldnn._linear_pointwise(hidden, packed, None, "none", [], "")


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, z_loss: Tensor | None, needs_grad: bool
) -> tuple[Tensor, ...]:
    """Return the summed loss, the number of correct rows, and with needs_grad all three gradients."""
    row_bytes = len(weight) * hidden.element_size()
    rows_of_logits = max(1, LOGITS_BYTES // row_bytes)
    rows_of_grads = max(1, min(len(hidden), GRADIENT_BYTES[hidden.element_size()] // row_bytes))
    score = _scorer(weight, rows_of_logits)
    buffer = _workspace(rows_of_grads * len(weight), hidden.dtype).view(-1, len(weight))  # (rows_of_grads, V)
    sums, grads = [], []
    for part, part_labels in zip(hidden.split(rows_of_grads), labels.split(rows_of_grads), strict=True):
        grad_logits = buffer[: len(part)]
        pieces = (x.split(rows_of_logits) for x in (grad_logits, part, part_labels))
        for out, some_hidden, some_labels in zip(*pieces, strict=True):
            sums.append(_logits_to_gradients(score(some_hidden, out), bias, some_labels, z_loss, out))
        if needs_grad:
            grads.append((grad_logits @ weight, grad_logits.t() @ part, grad_logits.sum(dim=0)))
    loss, num_correct = (torch.stack(parts).sum() for parts in zip(*sums, strict=True))
    if not needs_grad:
        return loss, num_correct
    of_hidden, of_weight, of_bias = zip(*grads, strict=True)
    return loss, num_correct, torch.cat(of_hidden), sum(of_weight[1:], of_weight[0]), sum(of_bias[1:], of_bias[0])


def masked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, z_loss: float = 0.0
) -> MaskedLoss:
    """Compute masked_cross_entropy as in model/ops.py."""
    _check_range(labels[labels != IGNORE_INDEX], len(weight), "a label")
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weight, bias))
    # A tensor: a number would be compiled in, and each new value would compile again.
    factor = torch.tensor(z_loss, dtype=torch.float64) if z_loss else None
    loss_sum, num_correct = MaskedCrossEntropy.apply(hidden, weight, bias, labels.long(), factor, needs_grad)
    return MaskedLoss(loss_sum, num_correct, (labels != IGNORE_INDEX).sum())


CPU_OPS = TORCH_OPS._replace(
    geglu=geglu,
    add_layer_norm=add_layer_norm,
    embed_layer_norm=embed_layer_norm,
    masked_cross_entropy=masked_cross_entropy,
)
