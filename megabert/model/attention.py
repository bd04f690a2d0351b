"""Attend within documents with the implementation that transformers' attn_implementation names.

A *planner* takes (sequences, alibi_slopes, head_dim, reach) once per forward pass and returns `attend(qkv, dropout_p)`,
which every layer calls: (T, 3, H, D) -> (T, H, D). Document boundaries and ALiBi's bias are prepared once, for all
layers. reach: a token sees this many tokens on each side of it, and itself; None for its whole document.

    eager               plan_eager         the equation, document by document or over padded rows: the specification
    sdpa                plan_sdpa          padded rows: PyTorch's fused attention with a mask
                                           with a reach: explicit matrices, see windows.py
                                           on a CPU without dropout: explicit matrices, see buckets.py
                                           otherwise: PyTorch's fused attention, once for all documents of a small
                                           batch, else one call per document length
    flash_attention_2   plan_flash         flash-attn's varlen kernel

kernels/attention.py has another planner, which kernels/resolve.py may choose instead.
"""

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .buckets import MAX_SCORES, Bucket, exact_buckets, invert, plan_buckets, token_slots
from .configuration_megabert import MegaBertConfig
from .ops import alibi_bias, dropout
from .padding import Sequences
from .windows import plan_windows

Attend = Callable[[Tensor, float], Tensor]


class Planner(Protocol):
    def __call__(
        self, sequences: Sequences, slopes: Tensor | None, head_dim: int, reach: int | None = None, /
    ) -> Attend: ...


def plan_eager(sequences: Sequences, slopes: Tensor | None, head_dim: int, reach: int | None = None) -> Attend:
    """Compute the equation as it is written: document by document, or over padded rows."""

    def weigh(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout_p: float) -> Tensor:
        scores = query @ key.transpose(-1, -2) / math.sqrt(head_dim)
        scores = scores if bias is None else scores + bias
        return dropout(torch.softmax(scores, dim=-1), dropout_p) @ value

    if sequences.num_keys is not None:
        return _plan_rows(sequences, slopes, reach, weigh)
    bounds = sequences.cu_seqlens.tolist()

    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        outputs = []
        for part in qkv.split([b - a for a, b in pairwise(bounds)]):
            bias = score_bias(slopes, reach, len(part), qkv)
            query, key, value = part.permute(1, 2, 0, 3)  # (H, L, D) each
            outputs.append(weigh(query, key, value, bias, dropout_p).transpose(0, 1))  # (L, H, D)
        return torch.cat(outputs)

    return attend


def score_bias(slopes: Tensor | None, reach: int | None, length: int, like: Tensor) -> Tensor | None:
    """Return what is added to the scores of a document: ALiBi's bias, and the mask of what is out of reach.

    Broadcasts to (H, length, length), in the dtype and on the device of `like`.
    """
    bias = None if slopes is None else alibi_bias(slopes, length, like.dtype)[0]
    if reach is None or reach >= length - 1:
        return bias
    place = torch.arange(length, device=like.device)
    out_of_reach = (place[:, None] - place[None, :]).abs() > reach
    bias = like.new_zeros(1, length, length) if bias is None else bias
    return bias.masked_fill(out_of_reach, torch.finfo(like.dtype).min)


def plan_sdpa(sequences: Sequences, slopes: Tensor | None, head_dim: int, reach: int | None = None) -> Attend:
    """Attend without padding, in several documents at once: those of equal, or on a CPU of nearly equal length.

    On a CPU this is faster than one padded batch, which computes the square of its padding, and than a loop over the
    documents, which makes more calls.
    """
    if sequences.num_keys is not None:
        return _plan_rows(sequences, slopes, reach, F.scaled_dot_product_attention)
    if reach is not None and reach < sequences.max_seqlen - 1:
        return plan_windows(sequences.cu_seqlens, slopes, head_dim, reach)
    by_length = functools.cache(lambda: _plan_by_length(sequences.cu_seqlens, slopes))
    if not sequences.cu_seqlens.is_cpu:
        lengths = sequences.cu_seqlens.diff().tolist()
        scores = len(lengths) * max(lengths, default=0) ** 2 * (1 if slopes is None else len(slopes))
        # A GPU computes few scores sooner than the host starts a kernel.
        if len({*lengths}) > 1 and scores <= MAX_SCORES:
            return _plan_padded(sequences.cu_seqlens, lengths, slopes)
        return by_length()
    by_bucket = plan_buckets(sequences.cu_seqlens, slopes, head_dim)

    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        return by_bucket(qkv) if dropout_p == 0 else by_length()(qkv, dropout_p)

    return attend


def _plan_by_length(cu_seqlens: Tensor, slopes: Tensor | None) -> Attend:
    """Call PyTorch's fused attention once per document length."""
    buckets = exact_buckets(cu_seqlens.diff().tolist(), 1 if slopes is None else len(slopes))
    gather, _ = token_slots(cu_seqlens, buckets)  # (T,)
    scatter = invert(gather)
    longest = max((bucket.length for bucket in buckets), default=0)

    @functools.cache
    def bias_for(dtype: torch.dtype) -> Tensor | None:
        return None if slopes is None else alibi_bias(slopes, longest, dtype)

    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        bias = bias_for(qkv.dtype)
        # split, never slice: the backward of each slice would zero-fill a whole (T, 3, H, D).
        parts = qkv.index_select(0, gather).split([bucket.slots for bucket in buckets])
        outputs = [qkv.new_empty(0, *qkv.shape[2:])]
        for bucket, part in zip(buckets, parts, strict=True):
            rows = part.view(-1, bucket.length, *part.shape[1:])
            query, key, value = rows.permute(2, 0, 3, 1, 4)  # (n, H, L, D)
            mask = None if bias is None else bias[:, :, : bucket.length, : bucket.length]
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p)
            outputs.append(out.transpose(1, 2).reshape(-1, *part.shape[2:]))
        return torch.cat(outputs).index_select(0, scatter)  # (T, H, D)

    return attend


def _plan_padded(cu_seqlens: Tensor, lengths: list[int], slopes: Tensor | None) -> Attend:
    """Call PyTorch's fused attention once, with every document padded to the longest. lengths: of the documents."""
    documents = [index for index, length in enumerate(lengths) if length]
    # PyTorch's fused attention copies a mask whose rows are no multiple of 8.
    longest = -(-max(lengths) // 8) * 8
    gather, empty = token_slots(cu_seqlens, [Bucket(documents, longest)])
    used = (~empty).nonzero().flatten()  # (T,)
    rows = Sequences(cu_seqlens, longest, num_keys=cu_seqlens.diff()[documents])
    attend_rows = _plan_rows(rows, slopes, None, F.scaled_dot_product_attention)

    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        return attend_rows(qkv.index_select(0, gather), dropout_p).index_select(0, used)

    return attend


def _plan_rows(sequences: Sequences, slopes: Tensor | None, reach: int | None, weigh: Callable[..., Tensor]) -> Attend:
    """Attend over padded rows (B, S) and compute their padding; padded keys are masked, as in a padded baseline.

    weigh: (query, key, value, mask, dropout_p), each (B, H, S, D), as in PyTorch's scaled_dot_product_attention.
    """
    assert sequences.num_keys is not None, "padded rows came without num_keys"
    length = sequences.max_seqlen
    position = torch.arange(length, device=sequences.num_keys.device)
    # An empty row keeps its first key: a softmax over no keys would be NaN.
    masked = position[None, :] >= sequences.num_keys.clamp(min=1)[:, None]  # (B, S)
    masks: dict[torch.dtype, Tensor] = {}

    def mask_for(dtype: torch.dtype) -> Tensor:
        if dtype not in masks:
            mask = torch.zeros((masked.shape[0], 1, 1, length), dtype=dtype, device=masked.device)
            mask = mask.masked_fill(masked[:, None, None, :], torch.finfo(dtype).min)
            masks[dtype] = mask if slopes is None else mask + alibi_bias(slopes, length, dtype)
            if reach is not None:
                out_of_reach = (position[:, None] - position[None, :]).abs() > reach
                masks[dtype] = masks[dtype].masked_fill(out_of_reach, torch.finfo(dtype).min)
        return masks[dtype]

    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        rows = qkv.view(-1, length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)  # (3, B, H, S, D)
        out = weigh(*rows.unbind(0), mask_for(qkv.dtype), dropout_p)
        return out.transpose(1, 2).reshape(-1, *qkv.shape[2:])  # (B * S, H, D)

    return attend


def plan_flash(sequences: Sequences, slopes: Tensor | None, head_dim: int, reach: int | None = None) -> Attend:
    """Call flash-attn's varlen kernel with its own ALiBi and window (flash-attn >= 2.4). Not run on a GPU yet."""
    # flash-attn is optional and imported only where it was asked for.
    from flash_attn import flash_attn_varlen_qkvpacked_func  # pyrefly: ignore[missing-import]

    if sequences.num_keys is not None:
        raise ValueError("padding: padded computes the padding, which flash_attention_2 cannot do. Use sdpa.")

    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        return flash_attn_varlen_qkvpacked_func(
            qkv,
            sequences.cu_seqlens,
            sequences.max_seqlen,
            dropout_p=dropout_p,
            window_size=(-1, -1) if reach is None else (reach, reach),
            alibi_slopes=slopes,
            deterministic=True,
        )

    return attend


PLANNERS: dict[str, Planner] = {"eager": plan_eager, "sdpa": plan_sdpa, "flash_attention_2": plan_flash}


def plan_as_configured(
    config: MegaBertConfig, sequences: Sequences, slopes: Tensor | None, head_dim: int, reach: int | None = None
) -> Attend:
    """Plan with the implementation that the config names now: transformers lets callers change it at any time."""
    return PLANNERS[config._attn_implementation or "sdpa"](sequences, slopes, head_dim, reach)
