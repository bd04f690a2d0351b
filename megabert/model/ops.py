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
) -> Tensor:
    """dropout(LayerNorm(sum of embeddings)).

    ids: (T,) integers each, one per table; tables: (rows, E). Returns (T, E).
    """
    x = F.embedding(ids[0], tables[0])
    for index, table in zip(ids[1:], tables[1:], strict=True):
        x = x + F.embedding(index, table)
    return F.dropout(layer_norm(x, weight, bias, eps, low_precision), dropout_p, training=dropout_p > 0)


def masked_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> MaskedLoss:
    """Score hidden (M, E) against the vocabulary (V, E), bias (V,), with labels (M,); softmax in fp32."""
    logits = upcast(F.linear(hidden, weight, bias))  # (M, V)
    loss_sum = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE_INDEX, reduction="sum")
    with torch.no_grad():
        num_correct = (logits.argmax(dim=-1) == labels).sum()
        num_targets = (labels != IGNORE_INDEX).sum()
    return MaskedLoss(loss_sum, num_correct, num_targets)


TORCH_OPS = Ops(
    attention=None,
    layer_norm=layer_norm,
    geglu=geglu,
    add_layer_norm=add_layer_norm,
    embed_layer_norm=embed_layer_norm,
    masked_cross_entropy=masked_cross_entropy,
)
