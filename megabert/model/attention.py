"""Attention within documents, three ways, chosen by transformers' attn_implementation.

A *planner* takes (sequences, alibi_slopes, head_dim) once per forward pass and returns `attend(qkv, dropout_p)`,
which every layer then calls: (T, 3, H, D) -> (T, H, D). The plan carries what does not change between layers:
where the documents are and their ALiBi bias.
"""

import functools
import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .alibi import alibi_bias
from .buckets import exact_buckets, invert, plan_buckets, token_slots
from .padding import Sequences

Attend = Callable[[Tensor, float], Tensor]


def plan_eager(sequences: Sequences, slopes: Tensor | None, head_dim: int) -> Attend:
    """Spell the equation out, document by document: the specification."""
    bounds = sequences.cu_seqlens.tolist()
    num_keys = None if sequences.num_keys is None else sequences.num_keys.tolist()

    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        outputs = []
        for document, part in enumerate(qkv.split([b - a for a, b in pairwise(bounds)])):
            query, key, value = part.permute(1, 2, 0, 3)  # each (H, L, D)
            scores = query @ key.transpose(-1, -2) / math.sqrt(head_dim)
            if slopes is not None:
                scores = scores + alibi_bias(slopes, len(part), scores.dtype)[0]
            if num_keys is not None:
                scores[:, :, num_keys[document] :] = torch.finfo(scores.dtype).min
            weights = F.dropout(torch.softmax(scores, dim=-1), dropout_p, training=dropout_p > 0)
            outputs.append((weights @ value).transpose(0, 1))  # (L, H, D)
        return torch.cat(outputs)

    return attend


def plan_sdpa(sequences: Sequences, slopes: Tensor | None, head_dim: int) -> Attend:
    """Attend in documents of equal length at once, without padding, and on a CPU in those of nearly equal length.

    On a CPU this beats one padded batch by the square of the padding, and a loop over documents by the calls saved.
    There, and without dropout, it goes through BucketAttention; else through PyTorch's fused attention.
    """
    if sequences.num_keys is not None:
        return _plan_rows(sequences, slopes)
    by_bucket = plan_buckets(sequences.cu_seqlens, slopes, head_dim)
    by_length = functools.cache(lambda: _plan_fused(sequences.cu_seqlens, slopes))

    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        return by_bucket(qkv) if qkv.is_cpu and dropout_p == 0 else by_length()(qkv, dropout_p)

    return attend


def _plan_fused(cu_seqlens: Tensor, slopes: Tensor | None) -> Attend:
    """PyTorch's fused attention, a call for each length."""
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


def _plan_rows(sequences: Sequences, slopes: Tensor | None) -> Attend:
    """Attend over padded rows (B, S), padding included; padded keys are masked, as the padded baseline does it."""
    assert sequences.num_keys is not None, "rows without num_keys are documents"
    length = sequences.max_seqlen
    place = torch.arange(length, device=sequences.num_keys.device)
    # An empty row keeps its first key: a softmax over nothing would be NaN.
    hidden = place[None, :] >= sequences.num_keys.clamp(min=1)[:, None]  # (B, S)

    @functools.cache
    def mask_for(dtype: torch.dtype) -> Tensor:
        mask = torch.zeros((hidden.shape[0], 1, 1, length), dtype=dtype, device=hidden.device)
        mask = mask.masked_fill(hidden[:, None, None, :], torch.finfo(dtype).min)
        return mask if slopes is None else mask + alibi_bias(slopes, length, dtype)

    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        rows = qkv.view(-1, length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)  # (3, B, H, S, D)
        out = F.scaled_dot_product_attention(*rows, attn_mask=mask_for(qkv.dtype), dropout_p=dropout_p)
        return out.transpose(1, 2).reshape(-1, *qkv.shape[2:])  # (B * S, H, D)

    return attend


def plan_flash(sequences: Sequences, slopes: Tensor | None, head_dim: int) -> Attend:
    """Call flash-attn's varlen kernel with its native ALiBi (>= 2.4). Not run on a GPU yet."""
    from flash_attn import flash_attn_varlen_qkvpacked_func  # pyrefly: ignore[missing-import] # an optional import: only where it was asked for

    if sequences.num_keys is not None:
        raise ValueError("padding: padded measures computed padding, which flash_attention_2 cannot do. Use sdpa.")

    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        return flash_attn_varlen_qkvpacked_func(
            qkv,
            sequences.cu_seqlens,
            sequences.max_seqlen,
            dropout_p=dropout_p,
            alibi_slopes=slopes,
            deterministic=True,
        )

    return attend


PLANNERS = {"eager": plan_eager, "sdpa": plan_sdpa, "flash_attention_2": plan_flash}
