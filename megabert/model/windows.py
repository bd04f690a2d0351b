"""Attend locally with explicit score matrices, in time and memory that grow with the tokens, not with their square.

The T tokens are cut into blocks of B >= reach tokens, without regard to documents. The queries of a block see at most
the keys of it and of the blocks before and after it: one product of (B, D) and (D, 3B) per block and head, in one batch
for all of them. A mask, the same for all layers, hides other documents and what is out of reach.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import dropout

# Fewest tokens of a block: smaller products take longer per token than the scores that they save.
SMALLEST_BLOCK = 64


class Window(NamedTuple):
    """How T tokens are cut into blocks, and what is added to their scores.

    mask: (N, 1, B, 3B), 0 where a query of a block sees a key of the three blocks around it; alibi: (1, H, B, 3B), or
    None.
    """

    scale: float
    mask: Tensor
    alibi: Tensor | None

    @property
    def blocks(self) -> int:
        return self.mask.shape[0]

    @property
    def size(self) -> int:
        return self.mask.shape[2]


def plan_windows(
    cu_seqlens: Tensor, slopes: Tensor | None, head_dim: int, reach: int
) -> Callable[[Tensor, float], Tensor]:
    """Plan as in attention.py: every token sees the tokens of its document that are at most `reach` away."""

    @functools.cache
    def window_for(num_tokens: int, dtype: torch.dtype) -> Window:
        size = max(reach, SMALLEST_BLOCK)
        blocks = -(-num_tokens // size)
        mask = window_mask(cu_seqlens, blocks, size, reach).to(dtype) * torch.finfo(dtype).min
        if slopes is None:
            return Window(head_dim**-0.5, mask, None)
        place = torch.arange(3 * size, device=cu_seqlens.device)
        distance = (place[None, size : 2 * size].T - place[None, :]).abs()
        return Window(head_dim**-0.5, mask, (-slopes[:, None, None] * distance).to(dtype)[None])

    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        # Without tokens there are no blocks to plan.
        if not qkv.numel():
            return qkv[:, 0]
        return WindowAttention.apply(qkv, window_for(qkv.shape[0], qkv.dtype), dropout_p)

    return attend


def window_mask(cu_seqlens: Tensor, blocks: int, size: int, reach: int) -> Tensor:
    """Return which keys are hidden from which queries, (N, 1, B, 3B) bool. cu_seqlens: (documents + 1,)."""
    slot = torch.arange(-size, (blocks + 1) * size, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, slot.to(cu_seqlens.dtype), right=True)
    documents = document.unfold(0, 3 * size, size)[:, None, None, :]  # (N, 1, 1, 3B)
    own = document[size:-size].view(blocks, 1, size, 1)
    place = torch.arange(3 * size, device=cu_seqlens.device)
    out_of_reach = (place[size : 2 * size, None] - place[None, :]).abs() > reach  # (B, 3B)
    return (own != documents) | out_of_reach


class WindowAttention(torch.autograd.Function):
    """Softmax of the scores within each window, times the values. Each gradient is summed in a fixed order."""

    @staticmethod
    def forward(ctx, qkv: Tensor, window: Window, dropout_p: float) -> Tensor:  # type: ignore[override]
        """qkv: (T, 3, H, D). Returns (T, H, D)."""
        num_tokens, _, heads, size = qkv.shape
        parts = _to_blocks(qkv, window)
        query, key, value = (
            parts[0, :, window.size : -window.size],
            _around(parts[1], window),
            _around(parts[2], window),
        )
        weights = _weights(query.reshape(-1, window.size, size), key, window)
        kept = dropout(torch.ones_like(weights), dropout_p) if dropout_p > 0 else None
        out = torch.bmm(weights if kept is None else weights * kept, value)  # (H * N, B, D)
        ctx.save_for_backward(parts, weights, kept)
        ctx.window, ctx.num_tokens = window, num_tokens
        return out.view(heads, -1, size)[:, :num_tokens].transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        parts, weights, kept = ctx.saved_tensors
        window, num_tokens = ctx.window, ctx.num_tokens
        _, heads, _, size = parts.shape
        query = parts[0, :, window.size : -window.size].reshape(-1, window.size, size)
        key, value = _around(parts[1], window), _around(parts[2], window)
        grad_out = grad.new_zeros(heads, window.blocks * window.size, size)
        grad_out[:, :num_tokens] = grad.transpose(0, 1)
        grad_out = grad_out.view(-1, window.size, size)
        grad_weights = torch.bmm(grad_out, value.transpose(1, 2))
        dropped = weights
        if kept is not None:
            grad_weights, dropped = grad_weights * kept, weights * kept
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        unused = grad.new_empty(1, 1, 1)
        result = grad.new_empty(3, heads, window.blocks * window.size, size)
        torch.baddbmm(unused, grad_scores, key, beta=0, alpha=window.scale, out=result[0].view(query.shape))
        grad_key = torch.baddbmm(unused, grad_scores.transpose(1, 2), query, beta=0, alpha=window.scale)
        result[1] = _sum_around(grad_key, heads, window)
        result[2] = _sum_around(torch.bmm(dropped.transpose(1, 2), grad_out), heads, window)
        return result[:, :, :num_tokens].permute(2, 0, 1, 3).contiguous(), None, None


def _to_blocks(qkv: Tensor, window: Window) -> Tensor:
    """Lay (T, 3, H, D) out as (3, H, (N + 2) * B, D), with a block of zeros before and after the tokens."""
    num_tokens, _, heads, size = qkv.shape
    parts = qkv.new_zeros(3, heads, (window.blocks + 2) * window.size, size)
    parts[:, :, window.size : window.size + num_tokens] = qkv.permute(1, 2, 0, 3)
    return parts


def _around(part: Tensor, window: Window) -> Tensor:
    """Return each block with its neighbours: (H, (N + 2) * B, D) -> (H * N, 3B, D)."""
    heads, _, size = part.shape
    rows = part.unfold(1, 3 * window.size, window.size)  # (H, N, D, 3B)
    return rows.transpose(2, 3).reshape(heads * window.blocks, 3 * window.size, size)


def _sum_around(grad: Tensor, heads: int, window: Window) -> Tensor:
    """Add up what each token got as part of three blocks: (H * N, 3B, D) -> (H, N * B, D)."""
    before, own, after = grad.view(heads, window.blocks, 3, window.size, grad.shape[-1]).unbind(2)  # (H, N, B, D) each
    total = own.clone()
    total[:, :-1] += before[:, 1:]
    total[:, 1:] += after[:, :-1]
    return total.view(heads, -1, grad.shape[-1])


def _weights(query: Tensor, key: Tensor, window: Window) -> Tensor:
    """Return the attention weights, (H * N, B, 3B), of queries (H * N, B, D) and keys (H * N, 3B, D)."""
    unused = query.new_empty(1, 1, 1)
    scores = torch.baddbmm(unused, query, key.transpose(1, 2), beta=0, alpha=window.scale)
    by_head = scores.view(-1, window.blocks, window.size, 3 * window.size)  # (H, N, B, 3B)
    if window.alibi is not None:
        by_head += window.alibi.transpose(0, 1)
    by_head += window.mask.transpose(0, 1)
    return torch.softmax(scores, dim=-1)
