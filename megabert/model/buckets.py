"""Attention on a CPU: documents of nearly equal length at once, with explicit matrices.

A *bucket* is some documents, L slots each; a document shorter than that leaves slots empty. A call of an operation costs
as much as many thousands of scores, so a few empty slots are cheaper than another bucket.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .alibi import alibi_bias
from .ops import upcast

# A bucket's explicit (documents, H, L, L) scores stay below this many elements (64 MiB of fp32), so that attention memory
# grows with tokens, not with documents of one length times its square.
MAX_SCORES = 1 << 24

# Up to this length the backward pass of BucketAttention finds its weights kept: length x heads numbers per token, not much
# beside the other activations. Beyond, it computes them again.
LONGEST_KEPT = 512

# Queries of a longer document that are scored at once, so that scratch memory grows with its length, not its square.
QUERY_ROWS = 256

# Scores that a bucket may compute for empty slots: they take as long as the calls of another bucket.
MAX_WASTED = 1 << 17

# Up to LONGEST_KEPT, the length of a bucket is a multiple of this: oneDNN compiles a kernel for each shape that it meets,
# which takes as long as ten calls of it, and keeps a thousand of them.
ROUND_TO = 16


class Bucket(NamedTuple):
    """documents: their numbers; length: slots of each."""

    documents: list[int]
    length: int

    @property
    def slots(self) -> int:
        return len(self.documents) * self.length


def exact_buckets(lengths: list[int], heads: int) -> list[Bucket]:
    """Documents of equal length, longest first; none is empty."""
    return _buckets(lengths, heads, round_to=1, max_wasted=0)


def near_buckets(lengths: list[int], heads: int) -> list[Bucket]:
    """Documents of nearly equal length, longest first; those beyond LONGEST_KEPT have buckets without empty slots."""
    return _buckets(lengths, heads, round_to=ROUND_TO, max_wasted=MAX_WASTED)


def _buckets(lengths: list[int], heads: int, round_to: int, max_wasted: int) -> list[Bucket]:
    buckets: list[Bucket] = []
    wasted = 0
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[document]
        if length == 0:
            break
        if buckets:
            bucket = buckets[-1]
            area = heads * bucket.length**2
            wasted += area - heads * length**2
            fits = length == bucket.length or (wasted <= max_wasted and bucket.length <= LONGEST_KEPT)
            if fits and (len(bucket.documents) + 1) * area <= MAX_SCORES:
                bucket.documents.append(document)
                continue
        rounded = min(-(-length // round_to) * round_to, LONGEST_KEPT) if length <= LONGEST_KEPT else length
        buckets.append(Bucket([document], rounded))
        wasted = heads * (rounded**2 - length**2)
    return buckets


def token_slots(cu_seqlens: Tensor, buckets: list[Bucket]) -> tuple[Tensor, Tensor]:
    """For each slot of all buckets, (S,): the token in it, and whether it is empty; then the token is its document's last."""
    documents = torch.tensor([i for bucket in buckets for i in bucket.documents], dtype=torch.long)
    sizes = torch.tensor([bucket.length for bucket in buckets for _ in bucket.documents], dtype=torch.long)
    documents, sizes = documents.to(cu_seqlens.device), sizes.to(cu_seqlens.device)
    starts, lengths = cu_seqlens[documents].long(), cu_seqlens.diff()[documents].long()
    place = torch.arange(int(sizes.sum()), device=sizes.device)
    place -= torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)  # within the document
    last = torch.repeat_interleave(lengths - 1, sizes)
    return torch.repeat_interleave(starts, sizes) + torch.minimum(place, last), place > last


def invert(order: Tensor) -> Tensor:
    """The inverse of a permutation (N,)."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


class HeadMajor(NamedTuple):
    """Where every token's query, key and value go so that each bucket is one block (3, documents * H, L, D).

    shapes: (documents, length) of each, in the order of the blocks. qkv, out: for row i of the blocks of (T * 3 * H, D)
    and (T * H, D), its row among the tokens'; qkv_inverse, out_inverse: for a row of the tokens', its row of the blocks;
    empty: rows of the blocks of (T * H, D) that no token has.
    """

    shapes: list[tuple[int, int]]
    qkv: Tensor
    qkv_inverse: Tensor
    out: Tensor
    out_inverse: Tensor
    empty: Tensor


def head_major(cu_seqlens: Tensor, buckets: list[Bucket], heads: int) -> HeadMajor:
    tokens, empty = token_slots(cu_seqlens, buckets)
    head, part = torch.arange(heads)[:, None], torch.arange(3)[:, None, None, None]
    qkv, out, no_qkv, no_out = ([x.new_empty(0)] for x in (tokens, tokens, empty, empty))
    sizes = [bucket.slots for bucket in buckets]
    for bucket, places, no_token in zip(buckets, tokens.split(sizes), empty.split(sizes), strict=True):
        place, nothing = (x.view(-1, 1, bucket.length) for x in (places, no_token))
        out.append((place * heads + head).flatten())  # (n, H, L)
        qkv.append(((place * 3 + part) * heads + head).flatten())  # (3, n, H, L)
        no_out.append(nothing.expand(-1, heads, -1).flatten())
        no_qkv.append(nothing.expand(3, -1, heads, -1).flatten())
    to_qkv, to_out, unused = torch.cat(qkv), torch.cat(out), torch.cat(no_out)
    return HeadMajor(
        shapes=[(len(bucket.documents), bucket.length) for bucket in buckets],
        qkv=to_qkv,
        qkv_inverse=_invert_used(to_qkv, torch.cat(no_qkv)),
        out=to_out,
        out_inverse=_invert_used(to_out, unused),
        empty=unused.nonzero().flatten(),
    )


def _invert_used(rows: Tensor, unused: Tensor) -> Tensor:
    """Where each row is in `rows`, but for the unused places."""
    used = (~unused).nonzero().flatten()
    inverse = torch.empty_like(used)
    inverse[rows[used]] = used
    return inverse


class Scorer(NamedTuple):
    """What attention weights are made of, beside queries and keys.

    slopes: of ALiBi, or None. biases: for each bucket up to LONGEST_KEPT what is added to its scores, (n * H, L, L) or
    (n * H, 1, L), or None: ALiBi's, and so much that no key of an empty slot counts.
    """

    scale: float
    slopes: Tensor | None
    biases: list[Tensor | None]

    def weigh(self, query: Tensor, key: Tensor, bucket: int, rows: slice) -> Tensor:
        """Weights (n * H, rows, L) of query (n * H, rows, D), those rows of their documents, on key (n * H, L, D)."""
        length, width = key.shape[1], query.shape[1]
        bias = self.biases[bucket]
        if bias is None and self.slopes is not None:
            some = alibi_bias(self.slopes, length, query.dtype, rows)
            bias = some.expand(len(query) // len(self.slopes), -1, -1, -1).reshape(len(query), width, length)
        if bias is None:
            scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.transpose(1, 2), beta=0, alpha=self.scale)
        else:
            scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=self.scale)
        return torch.softmax(scores, dim=-1)


def bucket_bias(
    bucket: Bucket, lengths: Tensor, slopes: Tensor | None, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """As in Scorer. lengths: (B,) of all documents."""
    count, length = len(bucket.documents), bucket.length
    if length > LONGEST_KEPT:
        return None
    bias = None if slopes is None else alibi_bias(slopes, length, dtype).expand(count, -1, -1, -1)
    keys = lengths[bucket.documents]
    if int(keys[-1]) < length:  # the shortest
        hidden = torch.arange(length) >= keys[:, None, None, None]  # (n, 1, 1, L)
        bias = torch.zeros(count, heads, 1, length, dtype=dtype) if bias is None else bias
        bias = bias.masked_fill(hidden, torch.finfo(dtype).min)
    return None if bias is None else bias.reshape(count * heads, -1, length)


def plan_buckets(cu_seqlens: Tensor, slopes: Tensor | None, head_dim: int) -> Callable[[Tensor], Tensor]:
    """A planner as in attention.py, without dropout."""
    lengths = cu_seqlens.diff()

    @functools.cache
    def layout_for(heads: int) -> tuple[list[Bucket], HeadMajor]:
        buckets = near_buckets(lengths.tolist(), heads)
        return buckets, head_major(cu_seqlens, buckets, heads)

    @functools.cache
    def scorer_for(heads: int, dtype: torch.dtype) -> Scorer:
        buckets, _ = layout_for(heads)
        biases = [bucket_bias(bucket, lengths, slopes, heads, dtype) for bucket in buckets]
        return Scorer(head_dim**-0.5, slopes, biases)

    def attend(qkv: Tensor) -> Tensor:
        heads = qkv.shape[2]
        gradient = torch.is_grad_enabled() and qkv.requires_grad
        return BucketAttention.apply(qkv, layout_for(heads)[1], scorer_for(heads, qkv.dtype), gradient)

    return attend


class BucketAttention(torch.autograd.Function):
    """Attention over documents, bucket by bucket, with explicit matrices.

    On a CPU it takes less time than PyTorch's fused attention, in bf16 less than half: the products are plain batched
    matrix products. One gather makes all operands contiguous, and one gather brings the results back.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, layout: HeadMajor, scorer: Scorer, gradient: bool) -> Tensor:  # type: ignore[override]
        """qkv: (T, 3, H, D); gradient: whether a backward pass will follow. Returns (T, H, D)."""
        num_tokens, _, heads, size = qkv.shape
        blocks = qkv.view(-1, size).index_select(0, layout.qkv)
        out = qkv.new_empty(len(layout.out), size)
        kept = []
        for bucket, ((query, key, value), mixed, length) in enumerate(_blocks(blocks, out, layout.shapes, heads)):
            for rows in _query_rows(length):
                weights = scorer.weigh(query[:, rows], key, bucket, rows)
                if length <= LONGEST_KEPT:
                    torch.bmm(weights, value, out=mixed)
                    if gradient:
                        kept.append(weights)
                else:
                    mixed[:, rows] = torch.bmm(weights, value)
        ctx.save_for_backward(blocks, *kept)
        ctx.layout, ctx.scorer = layout, scorer
        return out.index_select(0, layout.out_inverse).view(num_tokens, heads, size)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        blocks, *kept = ctx.saved_tensors
        num_tokens, heads, size = grad.shape
        layout, scale = ctx.layout, ctx.scorer.scale
        above = grad.reshape(-1, size).index_select(0, layout.out)
        above.index_fill_(0, layout.empty, 0.0)  # so that their queries give keys and values no gradient
        result = torch.empty_like(blocks)
        given = _blocks(blocks, above, layout.shapes, heads)
        found = _blocks(result, above, layout.shapes, heads)
        weights = iter(kept)
        for bucket, ((parts, over, length), (into, _, _)) in enumerate(zip(given, found, strict=True)):
            if length <= LONGEST_KEPT:
                _differentiate(parts, over, next(weights), scale, into)
            else:
                _differentiate_again(parts, over, ctx.scorer, bucket, into)
        return result.index_select(0, layout.qkv_inverse).view(num_tokens, 3, heads, size), None, None, None


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


def _differentiate_again(
    parts: tuple[Tensor, ...], over: Tensor, scorer: Scorer, bucket: int, into: tuple[Tensor, ...]
) -> None:
    """The same for a long document, whose weights are computed again, some queries at a time; sums in fp32."""
    query, key, value = parts
    sums = [torch.zeros_like(upcast(key)), torch.zeros_like(upcast(value))]
    for rows in _query_rows(query.shape[1]):
        some, above = query[:, rows].contiguous(), over[:, rows].contiguous()
        found = torch.empty_like(some), torch.empty_like(key), torch.empty_like(value)
        _differentiate((some, key, value), above, scorer.weigh(some, key, bucket, rows), scorer.scale, found)
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
    qkv: Tensor, out: Tensor, shapes: list[tuple[int, int]], heads: int
) -> Iterator[tuple[tuple[Tensor, ...], Tensor, int]]:
    """Each bucket's query, key and value, its output, (documents * H, L, D) each, views of qkv and out; and L."""
    begin = 0
    for n, length in shapes:
        end = begin + n * length * heads
        shape = (n * heads, length, out.shape[-1])
        yield qkv[3 * begin : 3 * end].view(3, *shape).unbind(0), out[begin:end].view(shape), length
        begin = end
