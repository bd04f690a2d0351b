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
from typing import NamedTuple

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


class HeadMajor(NamedTuple):
    """Where every token's query, key and value go so that each bucket is one block (3, documents * H, L, D).

    buckets: (documents, length) each, in the order of the blocks. qkv, out: for row i of the blocks of (T * 3 * H, D)
    and (T * H, D), its row among the tokens'; and the two inverses.
    """

    buckets: list[tuple[int, int]]
    qkv: Tensor
    qkv_inverse: Tensor
    out: Tensor
    out_inverse: Tensor


def head_major(tokens: Tensor, buckets: list[tuple[int, int]], heads: int) -> HeadMajor:
    """tokens: (T,) the place of each token, in bucket order."""
    head = torch.arange(heads, device=tokens.device)
    part = torch.arange(3, device=tokens.device)
    qkv, out = [tokens.new_empty(0)], [tokens.new_empty(0)]
    for places, (n, length) in zip(tokens.split([n * length for n, length in buckets]), buckets, strict=True):
        place = places.view(n, 1, length)
        out.append((place * heads + head[:, None]).flatten())  # (n, H, L)
        qkv.append(((place * 3 + part[:, None, None, None]) * heads + head[:, None]).flatten())  # (3, n, H, L)
    to_qkv, to_out = torch.cat(qkv), torch.cat(out)
    return HeadMajor(buckets, to_qkv, _inverse(to_qkv), to_out, _inverse(to_out))


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


class ShortAttention(torch.autograd.Function):
    """Attention over documents of equal length, bucket by bucket, with explicit matrices.

    On a CPU it takes less time than PyTorch's fused attention for documents of up to a few hundred tokens: the products
    are plain batched matrix products, and the weights are kept instead of computed again. One gather makes all operands
    contiguous, and one gather brings the results back.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, layout: HeadMajor, bias: Tensor | None, scale: float) -> Tensor:
        """qkv: (T, 3, H, D); bias: (1, H, S, S) or None. Returns (T, H, D)."""
        num_tokens, _, heads, size = qkv.shape
        blocks = qkv.view(-1, size).index_select(0, layout.qkv)
        out = qkv.new_empty(num_tokens * heads, size)
        kept = []
        for (query, key, value), mixed, (n, length) in _blocks(blocks, out, layout.buckets, heads):
            shape = (n * heads, length, length)
            if bias is None:
                scores = torch.baddbmm(qkv.new_empty(1, 1, 1), query, key.transpose(1, 2), beta=0, alpha=scale)
            else:
                here = bias[:, :, :length, :length].expand(n, -1, -1, -1).reshape(shape)
                scores = torch.baddbmm(here, query, key.transpose(1, 2), alpha=scale)
            weights = torch.softmax(scores, dim=-1)
            torch.bmm(weights, value, out=mixed)
            kept.append(weights)
        ctx.save_for_backward(blocks, *kept)
        ctx.layout, ctx.scale = layout, scale
        return out.index_select(0, layout.out_inverse).view(num_tokens, heads, size)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        blocks, *kept = ctx.saved_tensors
        num_tokens, heads, size = grad.shape
        layout, scale = ctx.layout, ctx.scale
        above = grad.reshape(-1, size).index_select(0, layout.out)
        result = torch.empty_like(blocks)
        into = _blocks(result, above, layout.buckets, heads)
        given = _blocks(blocks, above, layout.buckets, heads)
        nothing = grad.new_empty(1, 1, 1)
        for ((query, key, value), over, _), (to_parts, _, _), weights in zip(given, into, kept, strict=True):
            to_query, to_key, to_value = to_parts
            torch.bmm(weights.transpose(1, 2), over, out=to_value)
            to_weights = torch.bmm(over, value.transpose(1, 2))
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            torch.baddbmm(nothing, to_scores, key, beta=0, alpha=scale, out=to_query)
            torch.baddbmm(nothing, to_scores.transpose(1, 2), query, beta=0, alpha=scale, out=to_key)
        return result.index_select(0, layout.qkv_inverse).view(num_tokens, 3, heads, size), None, None, None


def _blocks(
    qkv: Tensor, out: Tensor, buckets: list[tuple[int, int]], heads: int
) -> Iterator[tuple[tuple[Tensor, ...], Tensor, tuple[int, int]]]:
    """Each bucket's query, key and value, and its output, (documents * H, L, D) each: views of qkv and out."""
    begin = 0
    for n, length in buckets:
        end = begin + n * length * heads
        shape = (n * heads, length, out.shape[-1])
        yield qkv[3 * begin : 3 * end].view(3, *shape).unbind(0), out[begin:end].view(shape), (n, length)
        begin = end


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
    def layout_for(num_heads: int, gathered: bool) -> HeadMajor:
        return head_major(place[: portions[0]] if gathered else gather, short, num_heads)

    @functools.cache
    def bias_for(dtype: torch.dtype) -> Tensor | None:
        return None if slopes is None else alibi_bias(slopes, longest, dtype)

    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        bias = bias_for(qkv.dtype)
        num_heads = qkv.shape[2]
        if dropout_p == 0 and not long:
            return ShortAttention.apply(qkv, layout_for(num_heads, False), bias, head_dim**-0.5)
        # split, never slice: the backward of each slice would zero-fill a whole (T, 3, H, D).
        first, *rest = qkv.index_select(0, gather).split(portions)
        if dropout_p > 0:
            outputs = _fused(first.split([n * length for n, length in short]), short, bias, dropout_p)
        else:
            outputs = [ShortAttention.apply(first, layout_for(num_heads, True), bias, head_dim**-0.5)]
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
