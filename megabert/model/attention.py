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

from .ops import upcast
from .padding import Sequences

Attend = Callable[[Tensor, float], Tensor]

# A bucket's explicit (documents, H, L, L) bias or scores stay below this many elements (64 MiB of fp32),
# so that attention memory grows with tokens, not with documents of one length times its square.
MAX_SCORES = 1 << 24

# Up to this length the backward pass of BucketAttention finds its weights kept: length x heads numbers per token, not much
# beside the other activations. Beyond, it computes them again.
LONGEST_KEPT = 512

# Queries of a longer document that are scored at once, so that scratch memory grows with its length, not its square.
QUERY_ROWS = 256


@functools.cache
def alibi_slopes(num_heads: int) -> Tensor:
    """Give the slopes (H,), fp32: 2^(-8/n), 2^(-16/n), ... for n a power of two.

    Otherwise those of the power of two below, then every other one of the power above, as the paper's authors do.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


def alibi_bias(slopes: Tensor, length: int, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
    """-slope_h * |i - j|, shape (1, H, L, L), or only those rows i of it."""
    place = torch.arange(length, device=slopes.device)
    distance = (place[rows, None] - place[None, :]).abs()
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


class Scorer(NamedTuple):
    """What attention weights are made of, beside queries and keys. slopes, bias: of ALiBi, or None; bias: (1, H, S, S)."""

    scale: float
    slopes: Tensor | None
    bias: Tensor | None

    def weigh(self, query: Tensor, key: Tensor, rows: slice) -> Tensor:
        """Weights (n * H, rows, L) of query (n * H, rows, D), those rows of their documents, on key (n * H, L, D)."""
        length, width = key.shape[1], query.shape[1]
        if self.slopes is None:
            scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.transpose(1, 2), beta=0, alpha=self.scale)
            return torch.softmax(scores, dim=-1)
        if self.bias is None or length > self.bias.shape[-1]:
            bias = alibi_bias(self.slopes, length, query.dtype, rows)
        else:
            bias = self.bias[:, :, rows, :length][:, :, :width]
        bias = bias.expand(len(query) // len(self.slopes), -1, -1, -1).reshape(len(query), width, length)
        return torch.softmax(torch.baddbmm(bias, query, key.transpose(1, 2), alpha=self.scale), dim=-1)


class BucketAttention(torch.autograd.Function):
    """Attention over documents of equal length, bucket by bucket, with explicit matrices.

    On a CPU it takes less time than PyTorch's fused attention, in bf16 less than half: the products are plain batched
    matrix products. One gather makes all operands contiguous, and one gather brings the results back.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, layout: HeadMajor, scorer: Scorer) -> Tensor:  # type: ignore[override]
        """qkv: (T, 3, H, D). Returns (T, H, D)."""
        num_tokens, _, heads, size = qkv.shape
        blocks = qkv.view(-1, size).index_select(0, layout.qkv)
        out = qkv.new_empty(num_tokens * heads, size)
        kept = []
        for (query, key, value), mixed, length in _blocks(blocks, out, layout.buckets, heads):
            for rows in _query_rows(length):
                weights = scorer.weigh(query[:, rows], key, rows)
                if length <= LONGEST_KEPT:
                    torch.bmm(weights, value, out=mixed)
                    kept.append(weights)
                else:
                    mixed[:, rows] = torch.bmm(weights, value)
        ctx.save_for_backward(blocks, *kept)
        ctx.layout, ctx.scorer = layout, scorer
        return out.index_select(0, layout.out_inverse).view(num_tokens, heads, size)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        blocks, *kept = ctx.saved_tensors
        num_tokens, heads, size = grad.shape
        layout, scale = ctx.layout, ctx.scorer.scale
        above = grad.reshape(-1, size).index_select(0, layout.out)
        result = torch.empty_like(blocks)
        given = _blocks(blocks, above, layout.buckets, heads)
        weights = iter(kept)
        for (parts, over, length), (into, _, _) in zip(
            given, _blocks(result, above, layout.buckets, heads), strict=True
        ):
            if length <= LONGEST_KEPT:
                _differentiate(parts, over, next(weights), scale, into)
            else:
                _differentiate_again(parts, over, ctx.scorer, into)
        return result.index_select(0, layout.qkv_inverse).view(num_tokens, 3, heads, size), None, None


def _differentiate(
    parts: tuple[Tensor, ...], over: Tensor, weights: Tensor, scale: float, into: tuple[Tensor, ...]
) -> None:
    """Write the gradients of a query, its key and value into `into`; over: that of their output."""
    query, key, value = parts
    nothing = over.new_empty(1, 1, 1)
    torch.bmm(weights.transpose(1, 2), over, out=into[2])
    to_weights = torch.bmm(over, value.transpose(1, 2))
    to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
    torch.baddbmm(nothing, to_scores, key, beta=0, alpha=scale, out=into[0])
    torch.baddbmm(nothing, to_scores.transpose(1, 2), query, beta=0, alpha=scale, out=into[1])


def _differentiate_again(parts: tuple[Tensor, ...], over: Tensor, scorer: Scorer, into: tuple[Tensor, ...]) -> None:
    """The same for a long document, whose weights are computed again, some queries at a time; sums in fp32."""
    query, key, value = parts
    sums = [torch.zeros_like(upcast(key)), torch.zeros_like(upcast(value))]
    for rows in _query_rows(query.shape[1]):
        some, above = query[:, rows].contiguous(), over[:, rows].contiguous()
        found = torch.empty_like(some), torch.empty_like(key), torch.empty_like(value)
        _differentiate((some, key, value), above, scorer.weigh(some, key, rows), scorer.scale, found)
        into[0][:, rows] = found[0]
        sums[0] += found[1]
        sums[1] += found[2]
    into[1].copy_(sums[0])
    into[2].copy_(sums[1])


def _query_rows(length: int) -> list[slice]:
    """All of a document's queries at once, or some at a time."""
    step = length if length <= LONGEST_KEPT else QUERY_ROWS
    return [slice(begin, begin + step) for begin in range(0, length, step)]


def _blocks(
    qkv: Tensor, out: Tensor, buckets: list[tuple[int, int]], heads: int
) -> Iterator[tuple[tuple[Tensor, ...], Tensor, int]]:
    """Each bucket's query, key and value, its output, (documents * H, L, D) each, views of qkv and out; and L."""
    begin = 0
    for n, length in buckets:
        end = begin + n * length * heads
        shape = (n * heads, length, out.shape[-1])
        yield qkv[3 * begin : 3 * end].view(3, *shape).unbind(0), out[begin:end].view(shape), length
        begin = end


def plan_sdpa(sequences: Sequences, slopes: Tensor | None, head_dim: int) -> Attend:
    """Gather documents of equal length into batches without padding, and attend in each at once.

    On a CPU this beats one padded batch by the square of the padding, and a loop over documents by the calls saved.
    There, and without dropout, it goes through BucketAttention; else through PyTorch's fused attention.
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
    longest = buckets[-1][1] if buckets else 0

    @functools.cache
    def layout_for(num_heads: int) -> HeadMajor:
        return head_major(gather, buckets, num_heads)

    @functools.cache
    def bias_for(dtype: torch.dtype, length: int) -> Tensor | None:
        return None if slopes is None else alibi_bias(slopes, length, dtype)

    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        if lengths.is_cpu and dropout_p == 0:
            scorer = Scorer(head_dim**-0.5, slopes, bias_for(qkv.dtype, min(longest, LONGEST_KEPT)))
            return BucketAttention.apply(qkv, layout_for(qkv.shape[2]), scorer)
        # split, never slice: the backward of each slice would zero-fill a whole (T, 3, H, D).
        parts = qkv.index_select(0, gather).split([n * length for n, length in buckets])
        outputs = _fused(parts, buckets, bias_for(qkv.dtype, longest), dropout_p)
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
