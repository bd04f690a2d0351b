"""Compute the model's operations in plain PyTorch, the specification that every faster kernel is tested against.

Shapes as in layers.py. Nothing here depends on the device; kernels/resolve.py chooses the implementation that runs.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The label of a row without a target; PyTorch's default for cross_entropy.
IGNORE_INDEX = -100


class MaskedLoss(NamedTuple):
    """Sums over the rows whose label is not IGNORE_INDEX; each a scalar. Divide by num_targets for means."""

    loss_sum: Tensor
    num_correct: Tensor
    num_targets: Tensor


class Ops(NamedTuple):
    """One implementation of each operation.

    attention: a planner, see attention.py; None means the one that the config's attn_implementation names.
    """

    attention: Callable | None
    rotate: Callable
    layer_norm: Callable
    geglu: Callable
    add_layer_norm: Callable
    embed_layer_norm: Callable
    masked_cross_entropy: Callable


def upcast(x: Tensor) -> Tensor:
    """Convert half precision to fp32 for sums of many terms; leave fp32 and fp64 unchanged."""
    return x.float() if x.element_size() < 4 else x


def residual_dtype(dtype: torch.dtype, device_type: str, low_precision: bool) -> torch.dtype:
    """Return the dtype of a LayerNorm's result, and so of the residual stream.

    Under autocast: the autocast dtype if low_precision, else fp32. Without autocast: `dtype`, the input's.
    """
    if not torch.is_autocast_enabled(device_type):
        return dtype
    return torch.get_autocast_dtype(device_type) if low_precision else torch.float32


def rope_table(position_ids: Tensor, head_dim: int, theta: float) -> Tensor:
    """Return cosine and sine of RoPE's angles, (T, 2, D / 2) fp32: position * theta^(-2i / D) for feature i.

    In fp32 for every dtype of the model, as in transformers, so that models in fp64 and fp32 are the same function.
    """
    feature = torch.arange(0, head_dim, 2, dtype=torch.float, device=position_ids.device)
    angles = position_ids[:, None].float() * (1.0 / theta ** (feature / head_dim))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def rotate(qkv: Tensor, table: Tensor) -> Tensor:
    """Rotate queries and keys by RoPE's angles (https://arxiv.org/abs/2104.09864); values stay.

    Features i and i + D / 2 are a pair. qkv: (T, 3, H, D); table: rope_table()'s. Returns (T, 3, H, D).
    """
    cosine, sine = table.to(upcast(qkv).dtype)[:, :, None, None].unbind(1)  # (T, 1, 1, D / 2) each
    first, second = upcast(qkv[:, :2]).chunk(2, dim=-1)  # (T, 2, H, D / 2) each
    rotated = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return torch.cat([rotated.to(qkv.dtype), qkv[:, 2:]], dim=1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, low_precision: bool) -> Tensor:
    """Normalise the last dimension. Returns the shape of x in residual_dtype().

    Autocast is disabled inside, since on CUDA it would always compute in fp32.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = residual_dtype(x.dtype, device, low_precision)
        with torch.autocast(device, enabled=False):
            return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def dropout(x: Tensor, dropout_p: float) -> Tensor:
    """Apply dropout unless the probability is 0; a comparison in `training=` would stop torch.compile(dynamic=True)."""
    return F.dropout(x, dropout_p) if dropout_p > 0 else x


def geglu(x: Tensor, dropout_p: float) -> Tensor:
    """Compute GELU(gate) * value (https://arxiv.org/abs/2002.05202), then dropout, where MosaicBERT has it.

    x: (T, 2F), gate first, then value. Exact (erf) GELU. Returns (T, F).
    """
    gate, value = x.chunk(2, dim=-1)
    return dropout(F.gelu(gate) * value, dropout_p)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float, low_precision: bool
) -> tuple[Tensor, Tensor]:
    """Compute LayerNorm(dropout(x) + residual), which ends each half of a post-LN block. All (T, E).

    Returns the result twice, for the next product and as the next residual, so that a kernel can sum their gradients.
    """
    y = layer_norm(dropout(x, dropout_p) + residual, weight, bias, eps, low_precision)
    return y, y


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
    """Compute dropout(LayerNorm(sum of embeddings)).

    ids: (T,) integers, one tensor per table; tables: (rows, E). padding_idx: the row of the first table that gets no
    gradient from here. Returns (T, E). Raises IndexError for an id outside its table (on a GPU: a device-side assert).
    """
    x = F.embedding(ids[0], tables[0], padding_idx)
    for index, table in zip(ids[1:], tables[1:], strict=True):
        x = x + F.embedding(index, table)
    return dropout(layer_norm(x, weight, bias, eps, low_precision), dropout_p)


class SummedCrossEntropy(torch.autograd.Function):
    """The summed loss. Its gradient overwrites the logits: one (M, V) matrix is kept, where autograd keeps three."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """logits: (M, V) fp32 or fp64, overwritten; labels: (M,) int64. Returns the loss and the number correct."""
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

    A row counts as correct if no token scores higher than its label. z_loss times the square of each row's log-sum-exp
    is added to its loss (https://arxiv.org/abs/2204.02311, section 5). Raises RuntimeError or IndexError for a label
    that is neither IGNORE_INDEX nor a row of the vocabulary (on a GPU: a device-side assert; with Triton a NaN loss).
    """
    # The loss may overwrite the logits: the backward pass of F.linear does not need them.
    logits = upcast(F.linear(hidden, weight, bias))  # (M, V)
    loss_sum, num_correct = SummedCrossEntropy.apply(logits, labels.long(), z_loss)
    return MaskedLoss(loss_sum, num_correct, (labels != IGNORE_INDEX).sum())


TORCH_OPS = Ops(
    attention=None,
    rotate=rotate,
    layer_norm=layer_norm,
    geglu=geglu,
    add_layer_norm=add_layer_norm,
    embed_layer_norm=embed_layer_norm,
    masked_cross_entropy=masked_cross_entropy,
)


def alibi_slopes(num_heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ALiBi's slopes (H,): 2^(-8/n), 2^(-16/n), ... for n a power of two.

    Source: https://arxiv.org/abs/2108.12409; symmetric here: -slope_h * |i - j| is added to the scaled scores.

    For any other n: the slopes of the next lower power of two, then every other slope of the next higher one, as in the
    authors' code.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(num_heads - power)]
    return torch.tensor(slopes, dtype=dtype)


def alibi_bias(slopes: Tensor, length: int, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
    """Return -slope_h * |i - j| of shape (1, H, L, L), or only its rows i in `rows`."""
    position = torch.arange(length, device=slopes.device)
    distance = (position[rows, None] - position[None, :]).abs()
    return (-slopes[:, None, None] * distance).to(dtype)[None]
