"""Attend on a CPU with explicit score matrices, to documents of nearly equal length at once.

A *bucket* is a group of documents that get L slots each; a shorter document leaves its last slots empty. Calling an
operation takes as long as computing many thousands of scores, so a few empty slots are cheaper than another bucket.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import alibi_bias, upcast

# Limit on the elements of a bucket's explicit (documents, H, L, L) scores (64 MiB of fp32): attention memory then grows
# with tokens, not with the number of documents of one length times its square.
MAX_SCORES = 1 << 24

# Documents up to this length keep their attention weights for the backward pass: length x heads numbers per token, few
# compared to the other activations. The weights of longer documents are computed again.
LONGEST_KEPT = 512

# Queries of a longer document that are scored at once, so that scratch memory grows with its length, not its square.
QUERY_ROWS = 256

# Number of scores that a bucket may compute for empty slots: they take as long as the calls for another bucket.
MAX_WASTED = 1 << 17

# Up to LONGEST_KEPT, the length of a bucket is a multiple of this: oneDNN compiles a kernel for each new shape, which
# takes as long as ten calls of the kernel, and caches a thousand kernels.
ROUND_TO = 16


class Bucket(NamedTuple):
    """documents: their indices; length: slots of each document."""

    documents: list[int]
    length: int

    @property
    def slots(self) -> int:
        return len(self.documents) * self.length


def exact_buckets(lengths: list[int], heads: int) -> list[Bucket]:
    """Group documents of equal length, longest first. Empty documents are in no bucket."""
    return _buckets(lengths, heads, round_to=1, max_wasted=0)


def near_buckets(lengths: list[int], heads: int) -> list[Bucket]:
    """Group documents of nearly equal length, longest first. Those above LONGEST_KEPT leave no slot empty."""
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
    """Return the token in each slot of all buckets, and whether the slot is empty: (slots,) int64 and bool.

    An empty slot gets the last token of its document.
    """
    documents = torch.tensor([i for bucket in buckets for i in bucket.documents], dtype=torch.long)
    sizes = torch.tensor([bucket.length for bucket in buckets for _ in bucket.documents], dtype=torch.long)
    documents, sizes = documents.to(cu_seqlens.device), sizes.to(cu_seqlens.device)
    starts, lengths = cu_seqlens[documents].long(), cu_seqlens.diff()[documents].long()
    position = torch.arange(int(sizes.sum()), device=sizes.device)
    # From here on, positions count within each document.
    position -= torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    last = torch.repeat_interleave(lengths - 1, sizes)
    return torch.repeat_interleave(starts, sizes) + torch.minimum(position, last), position > last


def invert(order: Tensor) -> Tensor:
    """Return the inverse of a permutation (N,)."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


class RowMap(NamedTuple):
    """Which row of a matrix in token order is which row of the same matrix in bucket order.

    to_buckets: for each row in bucket order, its row in token order; an empty slot has its document's last token.
    to_tokens: for each row in token order, its row in bucket order.
    """

    to_buckets: Tensor
    to_tokens: Tensor


class BucketLayout(NamedTuple):
    """The order of rows in which each bucket is one contiguous block.

    shapes: (number of documents n, length L) of each bucket, in the order of the blocks.
    qkv: for (T * 3 * H, D), whose blocks are (3, n * H, L, D).
    out: for (T * H, D), whose blocks are (n * H, L, D).
    empty: the rows of out, in bucket order, that are empty slots.

    Example: lengths [2, 1] in one bucket with L = 2, H = 1: shapes [(2, 2)], out.to_buckets [0, 1, 2, 2],
    out.to_tokens [0, 1, 2], empty [3].
    """

    shapes: list[tuple[int, int]]
    qkv: RowMap
    out: RowMap
    empty: Tensor


def bucket_layout(cu_seqlens: Tensor, buckets: list[Bucket], heads: int) -> BucketLayout:
    """Lay the rows of qkv and of the output out for these buckets. cu_seqlens: (B + 1,) on a CPU."""
    tokens, empty = token_slots(cu_seqlens, buckets)
    head, part = torch.arange(heads)[:, None], torch.arange(3)[:, None, None, None]
    qkv, out, qkv_empty, out_empty = ([x.new_empty(0)] for x in (tokens, tokens, empty, empty))
    sizes = [bucket.slots for bucket in buckets]
    for bucket, its_tokens, its_empty in zip(buckets, tokens.split(sizes), empty.split(sizes), strict=True):
        token, no_token = (x.view(-1, 1, bucket.length) for x in (its_tokens, its_empty))
        out.append((token * heads + head).flatten())  # (n, H, L)
        qkv.append(((token * 3 + part) * heads + head).flatten())  # (3, n, H, L)
        out_empty.append(no_token.expand(-1, heads, -1).flatten())
        qkv_empty.append(no_token.expand(3, -1, heads, -1).flatten())
    return BucketLayout(
        shapes=[(len(bucket.documents), bucket.length) for bucket in buckets],
        qkv=_row_map(torch.cat(qkv), torch.cat(qkv_empty)),
        out=_row_map(torch.cat(out), torch.cat(out_empty)),
        empty=torch.cat(out_empty).nonzero().flatten(),
    )


def _row_map(to_buckets: Tensor, empty: Tensor) -> RowMap:
    """Invert to_buckets, leaving out the empty slots."""
    used = (~empty).nonzero().flatten()
    to_tokens = torch.empty_like(used)
    to_tokens[to_buckets[used]] = used
    return RowMap(to_buckets, to_tokens)


class Scorer(NamedTuple):
    """Computes attention weights from queries and keys.

    slopes: ALiBi's, or None.
    biases: for each bucket the tensor that is added to its scores, (n * H, L, L) or (n * H, 1, L): ALiBi's bias and a
        mask of the keys of empty slots. None where there is neither, and for buckets above LONGEST_KEPT.
    """

    scale: float
    slopes: Tensor | None
    biases: list[Tensor | None]

    def weights(self, query: Tensor, key: Tensor, bucket: int, rows: slice) -> Tensor:
        """Return the attention weights (n * H, R, L) of queries (n * H, R, D), rows `rows` of their documents.

        key: (n * H, L, D).
        """
        length, num_rows = key.shape[1], query.shape[1]
        bias = self.biases[bucket]
        if bias is None and self.slopes is not None:
            rows_bias = alibi_bias(self.slopes, length, query.dtype, rows)  # (1, H, R, L)
            num_documents = len(query) // len(self.slopes)
            bias = rows_bias.expand(num_documents, -1, -1, -1).reshape(len(query), num_rows, length)
        if bias is None:
            scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.transpose(1, 2), beta=0, alpha=self.scale)
        else:
            scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=self.scale)
        return torch.softmax(scores, dim=-1)


def bucket_bias(
    bucket: Bucket, lengths: Tensor, slopes: Tensor | None, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Build the bias of a bucket as described in Scorer. lengths: (B,) of all documents."""
    count, length = len(bucket.documents), bucket.length
    if length > LONGEST_KEPT:
        return None
    bias = None if slopes is None else alibi_bias(slopes, length, dtype).expand(count, -1, -1, -1)
    num_keys = lengths[bucket.documents]
    shortest = int(num_keys[-1])
    if shortest < length:
        masked = torch.arange(length) >= num_keys[:, None, None, None]  # (n, 1, 1, L)
        bias = torch.zeros(count, heads, 1, length, dtype=dtype) if bias is None else bias
        bias = bias.masked_fill(masked, torch.finfo(dtype).min)
    return None if bias is None else bias.reshape(count * heads, -1, length)


def plan_buckets(cu_seqlens: Tensor, slopes: Tensor | None, head_dim: int) -> Callable[[Tensor], Tensor]:
    """Plan as in attention.py, for a CPU and without dropout. Returns a function (T, 3, H, D) -> (T, H, D)."""
    lengths = cu_seqlens.diff()

    @functools.cache
    def layout_for(heads: int) -> tuple[list[Bucket], BucketLayout]:
        buckets = near_buckets(lengths.tolist(), heads)
        return buckets, bucket_layout(cu_seqlens, buckets, heads)

    @functools.cache
    def scorer_for(heads: int, dtype: torch.dtype) -> Scorer:
        buckets, _ = layout_for(heads)
        biases = [bucket_bias(bucket, lengths, slopes, heads, dtype) for bucket in buckets]
        return Scorer(head_dim**-0.5, slopes, biases)

    def attend(qkv: Tensor) -> Tensor:
        heads = qkv.shape[2]
        needs_grad = torch.is_grad_enabled() and qkv.requires_grad
        return BucketAttention.apply(qkv, layout_for(heads)[1], scorer_for(heads, qkv.dtype), needs_grad)

    return attend


class BucketAttention(torch.autograd.Function):
    """Attention within documents, bucket by bucket, with explicit matrices.

    On a CPU it takes less time than PyTorch's fused attention, in bf16 less than half: all products are plain batched
    matrix products. One gather makes their operands contiguous, and one gather restores the order of the tokens.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, layout: BucketLayout, scorer: Scorer, needs_grad: bool) -> Tensor:  # type: ignore[override]
        """qkv: (T, 3, H, D); needs_grad: whether a backward pass will follow. Returns (T, H, D)."""
        num_tokens, _, heads, size = qkv.shape
        rows_of_qkv = qkv.view(-1, size).index_select(0, layout.qkv.to_buckets)
        rows_of_out = qkv.new_empty(len(layout.out.to_buckets), size)
        kept = []
        for bucket, block in enumerate(_blocks(rows_of_qkv, rows_of_out, layout.shapes, heads)):
            query, key, value = block.qkv
            for rows in _query_rows(block.length):
                weights = scorer.weights(query[:, rows], key, bucket, rows)
                if block.length <= LONGEST_KEPT:
                    torch.bmm(weights, value, out=block.out)
                    if needs_grad:
                        kept.append(weights)
                else:
                    block.out[:, rows] = torch.bmm(weights, value)
        ctx.save_for_backward(rows_of_qkv, *kept)
        ctx.layout, ctx.scorer = layout, scorer
        return rows_of_out.index_select(0, layout.out.to_tokens).view(num_tokens, heads, size)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        rows_of_qkv, *kept = ctx.saved_tensors
        num_tokens, heads, size = grad.shape
        layout, scale = ctx.layout, ctx.scorer.scale
        grad_out = grad.reshape(-1, size).index_select(0, layout.out.to_buckets)
        # The queries of empty slots must give keys and values no gradient.
        grad_out.index_fill_(0, layout.empty, 0.0)
        grad_qkv = torch.empty_like(rows_of_qkv)
        inputs = _blocks(rows_of_qkv, grad_out, layout.shapes, heads)
        results = _blocks(grad_qkv, grad_out, layout.shapes, heads)
        weights = iter(kept)
        for bucket, (block, result) in enumerate(zip(inputs, results, strict=True)):
            if block.length <= LONGEST_KEPT:
                _write_gradients(block.qkv, block.out, next(weights), scale, result.qkv)
            else:
                _write_gradients_in_parts(block.qkv, block.out, ctx.scorer, bucket, result.qkv)
        return grad_qkv.index_select(0, layout.qkv.to_tokens).view(num_tokens, 3, heads, size), None, None, None


def _write_gradients(
    qkv: tuple[Tensor, ...], grad_out: Tensor, weights: Tensor, scale: float, grad_qkv: tuple[Tensor, ...]
) -> None:
    """Write the gradients of query, key and value to grad_qkv. grad_out: the gradient of the output."""
    query, key, value = qkv
    unused = grad_out.new_empty(1, 1, 1)
    torch.bmm(weights.transpose(1, 2), grad_out, out=grad_qkv[2])
    grad_weights = torch.bmm(grad_out, value.transpose(1, 2))
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    torch.baddbmm(unused, grad_scores, key, beta=0, alpha=scale, out=grad_qkv[0])
    torch.baddbmm(unused, grad_scores.transpose(1, 2), query, beta=0, alpha=scale, out=grad_qkv[1])


def _write_gradients_in_parts(
    qkv: tuple[Tensor, ...], grad_out: Tensor, scorer: Scorer, bucket: int, grad_qkv: tuple[Tensor, ...]
) -> None:
    """Do the same for a long document: compute the weights again, QUERY_ROWS queries at a time, and sum in fp32."""
    query, key, value = qkv
    sums = [torch.zeros_like(upcast(key)), torch.zeros_like(upcast(value))]
    for rows in _query_rows(query.shape[1]):
        some_queries, some_grads = query[:, rows].contiguous(), grad_out[:, rows].contiguous()
        part = torch.empty_like(some_queries), torch.empty_like(key), torch.empty_like(value)
        weights = scorer.weights(some_queries, key, bucket, rows)
        _write_gradients((some_queries, key, value), some_grads, weights, scorer.scale, part)
        grad_qkv[0][:, rows] = part[0]
        sums[0] += part[1]
        sums[1] += part[2]
    grad_qkv[1].copy_(sums[0])
    grad_qkv[2].copy_(sums[1])


def _query_rows(length: int) -> list[slice]:
    """Return the queries of a document in one part, or in parts of QUERY_ROWS above LONGEST_KEPT."""
    step = length if length <= LONGEST_KEPT else QUERY_ROWS
    return [slice(begin, begin + step) for begin in range(0, length, step)]


class _Block(NamedTuple):
    """One bucket's part of qkv and out. qkv: query, key and value, (n * H, L, D) each, as is out; length: L."""

    qkv: tuple[Tensor, ...]
    out: Tensor
    length: int


def _blocks(qkv: Tensor, out: Tensor, shapes: list[tuple[int, int]], heads: int) -> Iterator[_Block]:
    """Yield views of each bucket's rows of qkv and out, which are in bucket order."""
    begin = 0
    for n, length in shapes:
        end = begin + n * length * heads
        shape = (n * heads, length, out.shape[-1])
        yield _Block(qkv[3 * begin : 3 * end].view(3, *shape).unbind(0), out[begin:end].view(shape), length)
        begin = end
