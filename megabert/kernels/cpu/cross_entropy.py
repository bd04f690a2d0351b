"""Compute the masked tokens' loss on a CPU, with its gradients, while the logits are still in the cache.

A part of the logits is computed at a time, and a loop that torch.compile fuses overwrites it with its gradient.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megabert.kernels.cpu.compiled import check_range, compiled
from megabert.model.ops import IGNORE_INDEX, MaskedLoss, upcast

# Bytes of logits that are computed and turned into gradients at once: few enough to stay in the cache, enough for a
# fast matrix product.
LOGITS_BYTES = 12 << 20

# Bytes of gradients of logits that are kept at once, by bytes per element. Where there are more, the gradient of the
# weight is summed over parts.
GRADIENT_BYTES = {2: 256 << 20, 4: 32 << 20, 8: 64 << 20}


class Scratch(threading.local):
    """Each thread's buffers for gradients of logits, by dtype: to allocate them costs a page fault per 4 kB."""

    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}


_scratch = Scratch()


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
    check_range(labels[labels != IGNORE_INDEX], len(weight), "a label")
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weight, bias))
    # A tensor: a number would be compiled in, and each new value would compile again.
    factor = torch.tensor(z_loss, dtype=torch.float64) if z_loss else None
    loss_sum, num_correct = MaskedCrossEntropy.apply(hidden, weight, bias, labels.long(), factor, needs_grad)
    return MaskedLoss(loss_sum, num_correct, (labels != IGNORE_INDEX).sum())
