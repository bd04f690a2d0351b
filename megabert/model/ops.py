"""The operations of the model, in plain PyTorch: the specification that every faster kernel is tested against.

Shapes as in layers.py. Nothing here knows a device; what runs where is decided in kernels/resolve.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # a label that asks for nothing; PyTorch's own default for cross_entropy


class MaskedLoss(NamedTuple):
    """Sums over the rows whose label is not IGNORE_INDEX; each a scalar. Divide by num_targets for means."""

    loss_sum: Tensor
    num_correct: Tensor
    num_targets: Tensor


class Ops(NamedTuple):
    """One implementation of each operation. attention None means: as the config's attn_implementation says."""

    attention: Callable | None
    layer_norm: Callable
    geglu: Callable
    add_layer_norm: Callable
    embed_layer_norm: Callable
    masked_cross_entropy: Callable


def upcast(x: Tensor) -> Tensor:
    """Bring half precision to fp32, where sums of many terms belong; leave fp32 and fp64 as they are."""
    return x.float() if x.element_size() < 4 else x


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, low_precision: bool) -> Tensor:
    """Normalise the last dimension; the result's dtype is the dtype of the residual stream.

    Under autocast: the autocast dtype if low_precision (autocast itself would force fp32 on CUDA), else fp32.
    Without autocast: the dtype of x.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device) if low_precision else torch.float32
        with torch.autocast(device, enabled=False):
            return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def geglu(x: Tensor, dropout_p: float) -> Tensor:
    """GELU(gate) * value, then dropout (https://arxiv.org/abs/2002.05202, with MosaicBERT's dropout place).

    x: (T, 2F), gate first, then value. Exact (erf) GELU. Returns (T, F).
    """
    gate, value = x.chunk(2, dim=-1)
    return F.dropout(F.gelu(gate) * value, dropout_p, training=dropout_p > 0)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float, low_precision: bool
) -> Tensor:
    """LayerNorm(dropout(x) + residual): the end of each half of a post-LN block. All (T, E)."""
    x = F.dropout(x, dropout_p, training=dropout_p > 0)
    return layer_norm(x + residual, weight, bias, eps, low_precision)


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
    """dropout(LayerNorm(sum of embeddings)).

    ids: (T,) integers each, one per table; tables: (rows, E). padding_idx: the row of the first table that gets no gradient
    from here. Returns (T, E). Raises IndexError for an id that a table has no row for (on a GPU: a device-side assertion).
    """
    x = F.embedding(ids[0], tables[0], padding_idx)
    for index, table in zip(ids[1:], tables[1:], strict=True):
        x = x + F.embedding(index, table)
    return F.dropout(layer_norm(x, weight, bias, eps, low_precision), dropout_p, training=dropout_p > 0)


class SummedCrossEntropy(torch.autograd.Function):
    """The summed loss, its gradient made in place of the logits: one (M, V) matrix where autograd keeps three."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """logits: (M, V) fp32 or fp64, overwritten; labels: (M,) int64. Returns the loss and the number predicted right."""
        used = labels != IGNORE_INDEX
        target = torch.where(used, labels, 0)[:, None]
        highest = logits.amax(dim=-1, keepdim=True)
        hit = logits.gather(1, target)
        num_correct = ((hit == highest)[:, 0] & used).sum()
        exponents = logits.sub_(highest).exp_()
        total = exponents.sum(dim=-1, keepdim=True)
        log_sum = total.log() + highest
        loss = ((log_sum - hit + z_loss * log_sum.square())[:, 0] * used).sum()
        ctx.save_for_backward(exponents, (1 + 2 * z_loss * log_sum) / total, target, used)
        ctx.mark_non_differentiable(num_correct)
        return loss, num_correct

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        exponents, share, target, used = ctx.saved_tensors
        scale = (grad_loss * used)[:, None]
        grad = exponents.mul_(scale * share)
        return grad.scatter_add_(1, target, -scale.to(grad.dtype)), None, None


def masked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, z_loss: float = 0.0
) -> MaskedLoss:
    """Score hidden (M, E) against the vocabulary (V, E), bias (V,), with labels (M,); softmax in fp32.

    A row counts as correct if no token scores higher than its label. z_loss times the square of each row's log-sum-exp is
    added to its loss (https://arxiv.org/abs/2204.02311, section 5). Raises RuntimeError or IndexError for a label that is
    neither IGNORE_INDEX nor a row of the vocabulary (on a GPU: a device-side assertion, or with Triton a loss of NaN).
    """
    logits = upcast(
        F.linear(hidden, weight, bias)
    )  # (M, V), which the loss may overwrite: linear's backward needs none
    loss_sum, num_correct = SummedCrossEntropy.apply(logits, labels.long(), z_loss)
    return MaskedLoss(loss_sum, num_correct, (labels != IGNORE_INDEX).sum())


TORCH_OPS = Ops(
    attention=None,
    layer_norm=layer_norm,
    geglu=geglu,
    add_layer_norm=add_layer_norm,
    embed_layer_norm=embed_layer_norm,
    masked_cross_entropy=masked_cross_entropy,
)
