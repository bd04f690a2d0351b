"""Operations for a CPU, fused by torch.compile: each reads and writes its activations once, forward and backward.

Every Function here keeps what it was given and one seed, and computes the rest again in its backward pass: a hash of
the seed and an element's place says whether dropout keeps it, so no mask is stored. The seed is drawn from torch's
generator, so that torch.manual_seed decides all of it, and activation checkpointing repeats it.

Compiling needs a C++ compiler and takes half a minute once per machine (inductor caches what it built).
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import cpp_builder, exc

from megabert.model.attention import PLANNERS
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.ops import IGNORE_INDEX, TORCH_OPS, MaskedLoss, Ops, upcast

# Shapes may vary from call to call, and from model to model, without compiling again, but not those of an nn.Parameter:
# parameters are passed detached. A fallback to eager would be a silent slow run: fullgraph makes it an error.
compiled = functools.partial(torch.compile, dynamic=True, fullgraph=True)

# Logits made and turned into gradients at once, in bytes: few enough to stay in the cache, enough for a fast product.
PIECE_BYTES = 12 << 20

# Gradients of logits kept at once, in bytes, by bytes per element. Beyond it the gradient of the weight is a sum.
KEPT_BYTES = {2: 256 << 20, 4: 32 << 20, 8: 64 << 20}


class Scratch(threading.local):
    """Where a thread keeps those gradients, by dtype: allocated anew, they would cost a page fault per 4 kB at every step."""

    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}


_scratch = Scratch()


def why_not_compiled() -> str | None:
    """Say what keeps torch.compile from building for this CPU, or None."""
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "torch.compile finds no C++ compiler (install g++, or set CXX)"
    return None


class Dropout(NamedTuple):
    """One dropout: elements whose hash is below the threshold are zeroed, the rest scaled.

    seed: (), int32. threshold: probability p as a signed 32-bit integer, from -2^31 for 0 to 2^31 - 1 for 1.
    """

    seed: Tensor
    threshold: int
    scale: float


def draw_dropout(probability: float) -> Dropout | None:
    """A new dropout, seeded from torch's generator; None where nothing is dropped."""
    if probability == 0:
        return None
    seed = torch.randint(-(1 << 31), 1 << 31, (), dtype=torch.int32)
    if probability == 1:
        return Dropout(seed, (1 << 31) - 1, 0.0)
    return Dropout(seed, round(probability * (1 << 32)) - (1 << 31), 1 / (1 - probability))


def kept(seed: Tensor, threshold: int, rows: int, columns: int) -> Tensor:
    """Where dropout keeps a (rows, columns) matrix: murmur3's finaliser of each place, mixed with the seed."""
    row = torch.arange(rows, dtype=torch.int32)[:, None]
    column = torch.arange(columns, dtype=torch.int32)[None, :]
    bits = (row * columns + column) * -1640531535 ^ seed  # 2^32 / golden ratio spreads the places; int32 wraps around
    bits = (bits ^ (bits >> 16 & 0xFFFF)) * -2048144789  # 0x85EBCA6B
    bits = (bits ^ (bits >> 13 & 0x7FFFF)) * -1028477387  # 0xC2B2AE35
    return (bits ^ (bits >> 16 & 0xFFFF)) >= threshold


def drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Apply dropout to a matrix, or to a gradient, which is the same."""
    if dropout is None:
        return x
    return torch.where(kept(dropout.seed, dropout.threshold, x.shape[0], x.shape[1]), x * dropout.scale, 0.0)


@compiled
def _geglu_forward(gate: Tensor, value: Tensor, dropout: Dropout | None) -> Tensor:
    return drop(F.gelu(upcast(gate)) * upcast(value), dropout).to(gate.dtype)


@functools.partial(compiled, options={"realize_opcount_threshold": 1000})  # else the halves share fp32 scratch memory
def _geglu_backward(
    grad: Tensor, gate: Tensor, value: Tensor, dropout: Dropout | None, to_gate: Tensor, to_value: Tensor
) -> None:
    gate = upcast(gate)
    grad = drop(upcast(grad), dropout)
    normal = 0.5 * (1 + torch.erf(gate * 0.7071067811865476))
    slope = normal + gate * torch.exp(-0.5 * gate * gate) * 0.3989422804014327  # 1 / sqrt(2 pi)
    to_gate.copy_(grad * upcast(value) * slope)
    to_value.copy_(grad * gate * normal)


class Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.dropout = draw_dropout(probability)
        return _geglu_forward(*x.chunk(2, dim=-1), ctx.dropout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        _geglu_backward(grad, *x.chunk(2, dim=-1), ctx.dropout, *out.chunk(2, dim=-1))
        return out, None


def geglu(x: Tensor, dropout_p: float) -> Tensor:
    return Geglu.apply(x, dropout_p)


def residual_dtype(x: Tensor, low_precision: bool) -> torch.dtype:
    """The dtype of LayerNorm's result: see layer_norm in model/ops.py."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") if low_precision else torch.float32
    return x.dtype


@compiled
def _add_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: Dropout | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the result, the sum that was normalised, and its mean and 1 / deviation, (T, 1) each."""
    total = (drop(upcast(x), dropout) + upcast(residual)).to(dtype)
    wide = upcast(total)
    variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + eps)
    return ((wide - mean) * scale * weight + bias).to(dtype), total, mean, scale


@compiled
def _add_norm_backward(
    grad: Tensor,
    total: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    dropout: Dropout | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, residual, weight and bias."""
    grad = upcast(grad)
    normal = (upcast(total) - mean) * scale
    inner = grad * weight
    inner = inner - inner.mean(dim=-1, keepdim=True) - normal * (inner * normal).mean(dim=-1, keepdim=True)
    to_total = inner * scale
    to_weight, to_bias = (grad * normal).sum(dim=0), grad.sum(dim=0)
    return drop(to_total, dropout).to(dtype), to_total.to(total.dtype), to_weight, to_bias


class AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dropout_p: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.dropout = draw_dropout(dropout_p)
        ctx.dtypes = x.dtype, residual.dtype
        out, *kept = _add_norm_forward(x, residual, weight.detach(), bias.detach(), eps, ctx.dropout, dtype)
        ctx.save_for_backward(*kept, weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *kept, weight = ctx.saved_tensors
        to_x, to_residual, *rest = _add_norm_backward(grad, *kept, weight.detach(), ctx.dropout, ctx.dtypes[0])
        return to_x, to_residual.to(ctx.dtypes[1]), *rest, None, None, None


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float, low_precision: bool
) -> Tensor:
    return AddNorm.apply(x, residual, weight, bias, eps, dropout_p, residual_dtype(x, low_precision))


@compiled
def _embed_forward(
    ids: list[Tensor],
    tables: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: Dropout | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = tables[0][ids[0]]
    for index, table in zip(ids[1:], tables[1:], strict=True):
        total = total + table[index]
    total = total.to(dtype)
    wide = upcast(total)
    variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + eps)
    out = drop((wide - mean) * scale * weight + bias, dropout)
    return out.to(dtype), total, mean, scale


@compiled
def _embed_backward(
    grad: Tensor, total: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, dropout: Dropout | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of the sum of embeddings, of weight and of bias."""
    grad = drop(upcast(grad), dropout)
    normal = (upcast(total) - mean) * scale
    inner = grad * weight
    inner = inner - inner.mean(dim=-1, keepdim=True) - normal * (inner * normal).mean(dim=-1, keepdim=True)
    return inner * scale, (grad * normal).sum(dim=0), grad.sum(dim=0)


class EmbedNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        ids: list[Tensor],
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dropout_p: float,
        low_precision: bool,
        padding_idx: int | None,
        *tables: Tensor,
    ) -> Tensor:
        ctx.dropout = draw_dropout(dropout_p)
        ctx.rows = [len(table) for table in tables]
        ctx.ids = ids
        ctx.frozen = [-1 if padding_idx is None else padding_idx] + [-1] * (len(tables) - 1)
        dtype = residual_dtype(tables[0], low_precision)
        detached = [table.detach() for table in tables]
        out, *kept = _embed_forward(ids, detached, weight.detach(), bias.detach(), eps, ctx.dropout, dtype)
        ctx.save_for_backward(*kept, weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *kept, weight = ctx.saved_tensors
        to_total, *rest = _embed_backward(grad, *kept, weight.detach(), ctx.dropout)
        to_tables = [
            torch.ops.aten.embedding_dense_backward(to_total, index, rows, frozen, False)
            for index, rows, frozen in zip(ctx.ids, ctx.rows, ctx.frozen, strict=True)
        ]
        return None, *rest, None, None, None, None, *to_tables


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
    for index, table in zip(ids, tables, strict=True):
        _check(index, len(table), "an id")
    return EmbedNorm.apply(ids, weight, bias, eps, dropout_p, low_precision, padding_idx, *tables)


def _check(index: Tensor, rows: int, what: str) -> None:
    """Raise IndexError for a number beyond the rows: compiled code would end the process, or take a negative one for another."""
    if not index.numel():
        return
    least, most = (int(end) for end in index.aminmax())
    if least < 0 or most >= rows:
        raise IndexError(f"{what} is {least if least < 0 else most}, expected 0 to {rows - 1}.")


@compiled
def _logits_to_gradients(
    logits: Tensor, bias: Tensor, labels: Tensor, z_loss: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the gradient of the summed loss of logits (C, V), still without their bias (V,). Returns that loss and the number right.

    out: (C, V), which may be the logits.
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
    column = torch.arange(logits.shape[1], device=logits.device)
    out.copy_((exponents * share - torch.where(column == target, 1.0, 0.0)) * used[:, None])
    return loss, num_correct


@compiled
def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (upcast(x) * scale).to(dtype)


class MaskedCrossEntropy(torch.autograd.Function):
    """The summed loss; its gradients are made on the way forward, where each piece of logits is still in the cache."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, z_loss: Tensor | None, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype
        with torch.autocast("cpu", enabled=False):
            loss, num_correct, *grads = _loss_and_gradients(
                hidden.to(dtype), weight.to(dtype), bias.detach(), labels, z_loss, gradient
            )
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(num_correct)
        return loss, num_correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(_scaled(grad, grad_loss, dtype) for grad, dtype in grads), None, None, None


def _workspace(size: int, dtype: torch.dtype) -> Tensor:
    """At least as many elements as were asked for before, of which the first `size`."""
    workspaces = _scratch.by_dtype
    if dtype not in workspaces or len(workspaces[dtype]) < size:
        with torch.inference_mode(False):  # one made in inference mode could not be written to in training
            workspaces[dtype] = torch.empty(size, dtype=dtype)
    return workspaces[dtype][:size]


def free_workspaces() -> None:
    """Give this thread's scratch memory back; the next loss allocates it again."""
    _scratch.by_dtype.clear()


def has_bf16_products() -> bool:
    """Whether oneDNN multiplies bf16 matrices on this CPU."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _scorer(weight: Tensor, rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of some hidden (C, E) and scratch (C, V), to logits (C, V), which may be in the scratch.

    For bf16, oneDNN brings the weight (V, E) into its own layout once, best for `rows` rows, not at every product.
    """
    if weight.dtype != torch.bfloat16 or not has_bf16_products():
        return lambda hidden, scratch: torch.mm(hidden, weight.t(), out=scratch)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda hidden, scratch: torch.ops.mkldnn._linear_pointwise(hidden, packed, None, "none", [], "")


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, z_loss: Tensor | None, wanted: bool
) -> tuple[Tensor, ...]:
    """The summed loss, the number right, and where wanted the gradients of hidden, weight and bias."""
    row_bytes = len(weight) * hidden.element_size()
    most = min(len(hidden), max(1, KEPT_BYTES[hidden.element_size()] // row_bytes))
    rows = max(1, PIECE_BYTES // row_bytes)
    score = _scorer(weight, rows)
    sums, grads = [], []
    kept = _workspace(max(1, most) * len(weight), hidden.dtype).view(-1, len(weight))  # (most, V)
    for part, wants in zip(hidden.split(max(1, most)), labels.split(max(1, most)), strict=True):
        grad = kept[: len(part)]
        for piece, some, their in zip(grad.split(rows), part.split(rows), wants.split(rows), strict=True):
            sums.append(_logits_to_gradients(score(some, piece), bias, their, z_loss, piece))
        if wanted:
            grads.append((grad @ weight, grad.t() @ part, grad.sum(dim=0)))
    loss, num_correct = (torch.stack(parts).sum() for parts in zip(*sums, strict=True))
    if not wanted:
        return loss, num_correct
    to_hidden, to_weight, to_bias = zip(*grads, strict=True)
    return loss, num_correct, torch.cat(to_hidden), sum(to_weight[1:], to_weight[0]), sum(to_bias[1:], to_bias[0])


def masked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, z_loss: float = 0.0
) -> MaskedLoss:
    _check(labels[labels != IGNORE_INDEX], len(weight), "a label")
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weight, bias))
    factor = torch.tensor(z_loss, dtype=torch.float64) if z_loss else None  # a tensor, so that no value is compiled in
    loss_sum, num_correct = MaskedCrossEntropy.apply(hidden, weight, bias, labels.long(), factor, gradient)
    return MaskedLoss(loss_sum, num_correct, (labels != IGNORE_INDEX).sum())


CPU_OPS = TORCH_OPS._replace(
    geglu=geglu,
    add_layer_norm=add_layer_norm,
    embed_layer_norm=embed_layer_norm,
    masked_cross_entropy=masked_cross_entropy,
)


def why_not_fused(config: MegaBertConfig, bf16: bool) -> str | None:
    """Say why plain PyTorch is the better choice for this model on a CPU, or None.

    In fp32 without dropout the products take nearly all of the time and compiled calls cost as much as they save: a
    quickstart step takes 110 ms with them, 103 ms without.
    """
    if not bf16 and config.hidden_dropout_prob == 0:
        return "in fp32 without dropout fusing them gains nothing"
    return why_not_compiled()


def cpu_ops(config: MegaBertConfig, bf16: bool) -> tuple[Ops, str]:
    """The fastest operations for a CPU, and what to say about them."""
    attention = PLANNERS["sdpa"]
    where = "over padded rows" if config.padding == "padded" else "by document length"
    if reason := why_not_fused(config, bf16):
        return TORCH_OPS._replace(attention=attention), f"attention {where}, the rest plain PyTorch ({reason})"
    # Dropout or none, dtypes, and shapes that happen to be equal: each combination compiles once. At torch's limit of 8 a
    # long-lived process would stop with an error.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    said = f"attention {where}; geglu, add_layer_norm, embed_layer_norm, masked_cross_entropy fused by torch.compile"
    return CPU_OPS._replace(attention=attention), f"{said}; layer_norm, the head's, plain PyTorch"
