"""Attention within documents, three ways, chosen by transformers' attn_implementation.

A *planner* takes (sequences, alibi_slopes, head_dim) once per forward pass and returns `attend(qkv, dropout_p)`,
which every layer then calls: (T, 3, H, D) -> (T, H, D). The plan carries what does not change between layers:
where the documents are and their ALiBi bias.

ALiBi (https://arxiv.org/abs/2108.12409) in its symmetric form adds -slope_h * |i - j| to the scaled score.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .padding import Sequences

Attend = Callable[[Tensor, float], Tensor]

# A bucket's explicit (documents, H, L, L) bias or scores stay below this many elements (64 MiB of fp32),
# so that attention memory grows with tokens, not with documents of one length times its square.
MAX_SCORES = 1 << 24

# Up to this length ShortAttention is the faster one on a CPU (by 30 % at 128 tokens, 10 % at 512), and what it keeps,
# length x heads numbers per token, is not much beside the other activations.
LONGEST_SHORT = 512


@functools.cache
def alibi_slopes(num_heads: int) -> Tensor:
    """Give the slopes (H,), fp32: 2^(-8/n), 2^(-16/n), ... for n a power of two.

    Otherwise those of the power of two below, then every other one of the power above, as the paper's authors do.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


def alibi_bias(slopes: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """-slope_h * |i - j|, shape (1, H, L, L)."""
    place = torch.arange(length, device=slopes.device)
    distance = (place[:, None] - place[None, :]).abs()
    return (-slopes[:, None, None] * distance).to(dtype)[None]


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


class ShortAttention(torch.autograd.Function):
    """Attention over documents of equal length, bucket by bucket, with explicit matrices.

    On a CPU it takes two thirds of the time of PyTorch's fused attention for documents of up to a few hundred tokens:
    the products are plain batched matrix products, and the weights are kept instead of computed again.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, buckets: list[tuple[int, int]], bias: Tensor | None, scale: float) -> Tensor:
        """qkv: (T, 3, H, D) in bucket order; buckets: (documents, length); bias: (H, S, S) or None. Returns (T, H, D)."""
        num_tokens, _, heads, size = qkv.shape
        out = qkv.new_empty(num_tokens, heads, size)
        kept = []
        for place, (n, length) in _places(buckets):
            query, key, value = _by_head(qkv, place, n, length)  # each (n * H, L, D)
            scores = torch.bmm(query, key.transpose(1, 2)).mul_(scale)
            if bias is not None:
                scores.view(n, heads, length, length).add_(bias[:, :length, :length])
            weights = torch.softmax(scores, dim=-1)
            mixed = torch.bmm(weights, value).view(n, heads, length, size)
            out[place].view(n, length, heads, size).copy_(mixed.transpose(1, 2))
            kept.append(weights)
        ctx.save_for_backward(qkv, *kept)
        ctx.buckets, ctx.scale = buckets, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        qkv, *kept = ctx.saved_tensors
        heads, size = grad.shape[1:]
        result = torch.empty_like(qkv)
        for (place, (n, length)), weights in zip(_places(ctx.buckets), kept, strict=True):
            query, key, value = _by_head(qkv, place, n, length)
            above = grad[place].view(n, length, heads, size).transpose(1, 2).reshape(-1, length, size)
            grad_value = torch.bmm(weights.transpose(1, 2), above)
            grad_weights = torch.bmm(above, value.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            parts = (torch.bmm(grad_scores, key), torch.bmm(grad_scores.transpose(1, 2), query), grad_value)
            target = result[place].view(n, length, 3, heads, size).permute(2, 0, 3, 1, 4)
            for into, part in zip(target, parts, strict=True):
                into.copy_(part.view(n, heads, length, size))
        return result, None, None, None


def _places(buckets: list[tuple[int, int]]) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Where each bucket's tokens are."""
    begin = 0
    for n, length in buckets:
        yield slice(begin, begin + n * length), (n, length)
        begin += n * length


def _by_head(qkv: Tensor, place: slice, n: int, length: int) -> tuple[Tensor, ...]:
    """Query, key and value of one bucket, each (n * H, L, D)."""
    _, _, heads, size = qkv.shape
    split = qkv[place].view(n, length, 3, heads, size).permute(2, 0, 3, 1, 4)
    return split.reshape(3, n * heads, length, size).unbind(0)


def plan_sdpa(sequences: Sequences, slopes: Tensor | None, head_dim: int) -> Attend:
    """Gather documents of equal length into batches without padding, and attend in each at once.

    On a CPU this beats one padded batch by the square of the padding, and a loop over documents by the calls saved.
    Short documents on a CPU go through ShortAttention, all others through PyTorch's fused attention.
    """
    if sequences.num_keys is not None:
        return _plan_rows(sequences, slopes)
    lengths = sequences.cu_seqlens.diff()
    order = torch.argsort(lengths, stable=True)
    sizes, counts = lengths[order].unique_consecutive(return_counts=True)
    heads = 1 if slopes is None else len(slopes)
    buckets: list[tuple[int, int]] = []  # (documents, length), ascending, as the tokens are gathered
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        step = max(1, MAX_SCORES // max(1, heads * size * size))
        full, rest = divmod(count, step)
        if size:
            buckets += [(step, size)] * full + ([(rest, size)] if rest else [])
    starts = sequences.cu_seqlens[:-1][order].long()
    sorted_lengths = lengths[order].long()
    ends = sorted_lengths.cumsum(0)
    place = torch.arange(int(ends[-1]), device=lengths.device)
    gather = place + torch.repeat_interleave(starts - (ends - sorted_lengths), sorted_lengths)  # (T,)
    scatter = torch.empty_like(gather)
    scatter[gather] = place
    limit = LONGEST_SHORT if lengths.is_cpu else 0
    short = [bucket for bucket in buckets if bucket[1] <= limit]
    long = buckets[len(short) :]
    portions = [sum(n * length for n, length in short), *(n * length for n, length in long)]
    longest = buckets[-1][1] if buckets else 0

    @functools.cache
    def bias_for(dtype: torch.dtype) -> Tensor | None:
        return None if slopes is None else alibi_bias(slopes, longest, dtype)

    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        bias = bias_for(qkv.dtype)
        # split, never slice: the backward of each slice would zero-fill a whole (T, 3, H, D).
        first, *rest = qkv.index_select(0, gather).split(portions)
        if dropout_p > 0:
            outputs = _fused(first.split([n * length for n, length in short]), short, bias, dropout_p)
        else:
            outputs = [ShortAttention.apply(first, short, None if bias is None else bias[0], head_dim**-0.5)]
        outputs += _fused(rest, long, bias, dropout_p)
        return torch.cat(outputs).index_select(0, scatter)  # (T, H, D)

    return attend


def _fused(
    parts: Sequence[Tensor], buckets: list[tuple[int, int]], bias: Tensor | None, dropout_p: float
) -> list[Tensor]:
    """PyTorch's fused attention, bucket by bucket."""
    outputs = []
    for (n, length), part in zip(buckets, parts, strict=True):
        query, key, value = part.view(n, length, *part.shape[1:]).permute(2, 0, 3, 1, 4)  # (n, H, L, D)
        mask = None if bias is None else bias[:, :, :length, :length]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p)
        outputs.append(out.transpose(1, 2).reshape(n * length, *part.shape[2:]))
    return outputs


def _plan_rows(sequences: Sequences, slopes: Tensor | None) -> Attend:
    """Attend over padded rows (B, S), padding included; padded keys are masked, as the padded baseline does it."""
    assert sequences.num_keys is not None, "rows without num_keys are documents"
    length = sequences.max_seqlen
    place = torch.arange(length, device=sequences.num_keys.device)
    # An empty row keeps its first key: a softmax over nothing would be NaN.
    hidden = place[None, :] >= sequences.num_keys.clamp(min=1)[:, None]  # (B, S)

    @functools.cache
    def mask_for(dtype: torch.dtype) -> Tensor:
        mask = torch.zeros((len(hidden), 1, 1, length), dtype=dtype, device=hidden.device)
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
