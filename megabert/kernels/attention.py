"""Attend within documents in Triton, with or without ALiBi, without storing bias, scores or weights.

The forward pass is FlashAttention-2's (https://arxiv.org/abs/2307.08691): softmax in one sweep over the keys. The
backward pass computes the weights again from the saved log-sum-exp. Each gradient is written once, by one program:
there are no atomics, and every run gives the same bits. A document of up to 128 tokens takes one program for all three
gradients (5 products); a longer one takes a sweep for dq and a sweep for dk and dv (7 products). Attention dropout is
Philox's, drawn again in the backward pass.

qkv: (T, 3, H, D), out: (T, H, D), D of 16, 32, 64 or 128; cu_seqlens as in model/padding.py; ALiBi as in
model/ops.py. Let s be the bytes per number, and N(L) = ceil(L / rows) and K(L) = ceil(L / columns) a document's
tiles, whose sizes are in tile_of. For each head, a document of L tokens moves:
    forward   L * (2D * s + 4) + N(L) * L * 2D * s      q and out, lse; then k and v for every tile
    backward  L * (8D * s + 4)                          up to 128 tokens: qkv, out, dout, lse; dqkv
    backward  L * (8D * s + 8) + N(L) * L * 2D * s + K(L) * L * (2D * s + 8)
                                                        above: k and v, then q, dout, lse and delta for every tile,
                                                        mostly from the cache
and a few bytes per tile to find its document. An explicit bias and weights would move L * L * s several times.

With a reach R, a tile sweeps only over the tiles that hold a token at most R away from one of its own: at most
ceil((rows + 2R) / columns) + 1 of them instead of K(L), so that a long document moves bytes in proportion to L.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabert.kernels import HEAD_DIMS, SHORT, tile_of
from megabert.kernels.dropout import GROUP, draw_seed, keep_scale, threshold, tile_factor
from megabert.kernels.row_statistics import accumulator, accumulator_dtype
from megabert.model.attention import Attend
from megabert.model.padding import Sequences

# The hardware's exponential is 2^x.
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def document_of(TILES, CU, KEYS, tile):
    """Return a tile's document: its first token, its length and its number of keys; and the tile's first row."""
    document = tl.load(TILES + 2 * tile)
    start = tl.load(CU + document)
    length = tl.load(CU + document + 1) - start
    if KEYS is not None:
        # A softmax over no keys would be NaN.
        keys = tl.maximum(tl.load(KEYS + document), 1)
    else:
        keys = length
    return start, length, keys, tl.load(TILES + 2 * tile + 1)


@triton.jit
def sweep_bounds(first, size: tl.constexpr, end, step: tl.constexpr, REACH: tl.constexpr):
    """Return the first and the end position of the tiles of `step` that `size` positions from `first` can reach."""
    begin = 0
    if REACH is not None:
        # A multiple of step, so that dropout's masks do not depend on the reach.
        begin = tl.maximum(first - REACH, 0) // step * step
        end = tl.minimum(end, first + size + REACH)
    return begin, end


@triton.jit
def visible(rows, columns, length, keys, REACH: tl.constexpr):
    """Return which queries are there and see which keys, (R, C)."""
    seen = (rows[:, None] < length) & (columns[None, :] < keys)
    if REACH is not None:
        seen = seen & (tl.abs(rows[:, None] - columns[None, :]) <= REACH)
    return seen


@triton.jit
def exponents(q, k, rows, columns, SLOPES, head, scale, ACC: tl.constexpr):
    """Return the base-2 exponents of the weights, (R, C): log2(e) * (q k^T / sqrt(D) - slope * |i - j|)."""
    s = tl.dot(q, tl.trans(k), out_dtype=ACC, input_precision="ieee") * (scale * LOG2E)
    if SLOPES is not None:
        slope = tl.load(SLOPES + head).to(ACC) * LOG2E
        s -= slope * tl.abs(rows[:, None] - columns[None, :])
    return s


@triton.jit
def forward_kernel(
    QKV, OUT, LSE, TILES, CU, KEYS, SLOPES, SEED, T, scale, below, kept,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr,
    DROPOUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    start, length, keys, first = document_of(TILES, CU, KEYS, tl.program_id(0))
    if first >= length:
        return
    rows = first + tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    query = QKV + start.to(tl.int64) * (3 * H * D) + head * D
    q = tl.load(query + rows[:, None] * (3 * H * D) + dims[None, :], mask=rows[:, None] < length, other=0.0)
    row_max = tl.full((ROWS,), float("-inf"), ACC)
    row_sum = tl.zeros((ROWS,), ACC)
    weighted_sum = tl.zeros((ROWS, D), ACC)
    begin, end = sweep_bounds(first, ROWS, keys, COLUMNS, REACH)
    for block in range(begin, end, COLUMNS):
        columns = block + tl.arange(0, COLUMNS)
        is_key = columns[:, None] < keys
        key = query + H * D + columns[:, None] * (3 * H * D) + dims[None, :]
        k = tl.load(key, mask=is_key, other=0.0)
        v = tl.load(key + H * D, mask=is_key, other=0.0)
        s = exponents(q, k, rows, columns, SLOPES, head, scale, ACC)
        s = tl.where(visible(rows, columns, ROWS + first, keys, REACH), s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        if REACH is not None:
            # A row may see no key of this tile. With a finite maximum its exponents stay -inf, and its weights are 0.
            new_max = tl.maximum(new_max, -1e30)
        rescale = tl.exp2(row_max - new_max)
        weights = tl.exp2(s - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        if DROPOUT:
            weights *= tile_factor(tl.load(SEED), start + rows, block // GROUP, head, below, kept, COLUMNS)
        weighted_sum *= rescale[:, None]
        weighted_sum = tl.dot(weights.to(v.dtype), v, weighted_sum, out_dtype=ACC, input_precision="ieee")
        row_max = new_max
    if REACH is not None:
        # Padding that is far from every key has no weights, and gives 0.
        row_sum = tl.where(row_sum > 0, row_sum, 1.0)
    inside = rows < length
    tl.store(LSE + head * T + start + rows, row_max + tl.log2(row_sum), mask=inside)
    out = OUT + start.to(tl.int64) * (H * D) + head * D + rows[:, None] * (H * D) + dims[None, :]
    tl.store(out, (weighted_sum / row_sum[:, None]).to(OUT.dtype.element_ty), mask=inside[:, None])


@triton.jit
def query_kernel(
    QKV, OUT, DOUT, LSE, DELTA, DQKV, TILES, CU, KEYS, SLOPES, SEED, T, scale, below, kept,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr,
    DROPOUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute dq of a tile of queries, and each row's delta = sum(out * dout), which key_kernel needs too."""
    head = tl.program_id(1)
    start, length, keys, first = document_of(TILES, CU, KEYS, tl.program_id(0))
    if first >= length:
        return
    rows = first + tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    inside = rows[:, None] < length
    base = start.to(tl.int64) * (3 * H * D) + head * D
    query = rows[:, None] * (3 * H * D) + dims[None, :]
    q = tl.load(QKV + base + query, mask=inside, other=0.0)
    out_at = start.to(tl.int64) * (H * D) + head * D + rows[:, None] * (H * D) + dims[None, :]
    dout = tl.load(DOUT + out_at, mask=inside, other=0.0)
    delta = tl.sum(tl.load(OUT + out_at, mask=inside, other=0.0).to(ACC) * dout.to(ACC), 1)
    row_at = head * T + start + rows
    tl.store(DELTA + row_at, delta, mask=rows < length)
    lse = tl.load(LSE + row_at, mask=rows < length, other=0.0)
    dq = tl.zeros((ROWS, D), ACC)
    begin, end = sweep_bounds(first, ROWS, keys, COLUMNS, REACH)
    for block in range(begin, end, COLUMNS):
        columns = block + tl.arange(0, COLUMNS)
        is_key = columns[:, None] < keys
        key = QKV + base + H * D + columns[:, None] * (3 * H * D) + dims[None, :]
        k = tl.load(key, mask=is_key, other=0.0)
        v = tl.load(key + H * D, mask=is_key, other=0.0)
        s = exponents(q, k, rows, columns, SLOPES, head, scale, ACC)
        weights = tl.where(visible(rows, columns, ROWS + first, keys, REACH), tl.exp2(s - lse[:, None]), 0.0)
        dweights = tl.dot(dout, tl.trans(v), out_dtype=ACC, input_precision="ieee")
        if DROPOUT:
            dweights *= tile_factor(tl.load(SEED), start + rows, block // GROUP, head, below, kept, COLUMNS)
        ds = weights * (dweights - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, out_dtype=ACC, input_precision="ieee")
    tl.store(DQKV + base + query, (dq * scale).to(DQKV.dtype.element_ty), mask=inside)


@triton.jit
def key_kernel(
    QKV, DOUT, LSE, DELTA, DQKV, TILES, CU, KEYS, SLOPES, SEED, T, scale, below, kept,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr,
    DROPOUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of a tile of COLUMNS keys."""
    head = tl.program_id(1)
    start, length, keys, first = document_of(TILES, CU, KEYS, tl.program_id(0))
    if first >= length:
        return
    columns = first + tl.arange(0, COLUMNS)
    dims = tl.arange(0, D)
    base = start.to(tl.int64) * (3 * H * D) + head * D
    key = H * D + columns[:, None] * (3 * H * D) + dims[None, :]
    is_key = columns[:, None] < keys
    k = tl.load(QKV + base + key, mask=is_key, other=0.0)
    v = tl.load(QKV + base + key + H * D, mask=is_key, other=0.0)
    dk = tl.zeros((COLUMNS, D), ACC)
    dv = tl.zeros((COLUMNS, D), ACC)
    begin, end = sweep_bounds(first, COLUMNS, length, ROWS, REACH)
    for block in range(begin, end, ROWS):
        rows = block + tl.arange(0, ROWS)
        is_query = rows[:, None] < length
        q = tl.load(QKV + base + rows[:, None] * (3 * H * D) + dims[None, :], mask=is_query, other=0.0)
        out_at = start.to(tl.int64) * (H * D) + head * D + rows[:, None] * (H * D) + dims[None, :]
        dout = tl.load(DOUT + out_at, mask=is_query, other=0.0)
        row_at = head * T + start + rows
        lse = tl.load(LSE + row_at, mask=rows < length, other=0.0)
        delta = tl.load(DELTA + row_at, mask=rows < length, other=0.0)
        s = exponents(q, k, rows, columns, SLOPES, head, scale, ACC)
        weights = tl.where(visible(rows, columns, length, keys, REACH), tl.exp2(s - lse[:, None]), 0.0)
        dweights = tl.dot(dout, tl.trans(v), out_dtype=ACC, input_precision="ieee")
        if DROPOUT:
            factor = tile_factor(tl.load(SEED), start + rows, first // GROUP, head, below, kept, COLUMNS)
            dropped_out = weights * factor
            dweights *= factor
        else:
            dropped_out = weights
        dv = tl.dot(tl.trans(dropped_out.to(dout.dtype)), dout, dv, out_dtype=ACC, input_precision="ieee")
        ds = weights * (dweights - delta[:, None])
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, out_dtype=ACC, input_precision="ieee")
    # The padding of a row is no key, so its gradient is 0.
    in_document = columns[:, None] < length
    tl.store(DQKV + base + key, (dk * scale).to(DQKV.dtype.element_ty), mask=in_document)
    tl.store(DQKV + base + key + H * D, dv.to(DQKV.dtype.element_ty), mask=in_document)


@triton.jit
def short_kernel(
    QKV, OUT, DOUT, LSE, DQKV, CU, KEYS, SLOPES, SEED, T, scale, below, kept,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr,
    DROPOUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute dq, dk and dv of a whole document of at most ROWS tokens, COLUMNS keys at a time."""
    document, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(CU + document)
    length = tl.load(CU + document + 1) - start
    if length == 0:
        return
    if KEYS is not None:
        keys = tl.maximum(tl.load(KEYS + document), 1)
    else:
        keys = length
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    inside = rows[:, None] < length
    base = start.to(tl.int64) * (3 * H * D) + head * D
    query = rows[:, None] * (3 * H * D) + dims[None, :]
    q = tl.load(QKV + base + query, mask=inside, other=0.0)
    out_at = start.to(tl.int64) * (H * D) + head * D + rows[:, None] * (H * D) + dims[None, :]
    dout = tl.load(DOUT + out_at, mask=inside, other=0.0)
    delta = tl.sum(tl.load(OUT + out_at, mask=inside, other=0.0).to(ACC) * dout.to(ACC), 1)
    lse = tl.load(LSE + head * T + start + rows, mask=rows < length, other=0.0)
    dq = tl.zeros((ROWS, D), ACC)
    for block in range(0, length, COLUMNS):
        columns = block + tl.arange(0, COLUMNS)
        key = H * D + columns[:, None] * (3 * H * D) + dims[None, :]
        k = tl.load(QKV + base + key, mask=columns[:, None] < keys, other=0.0)
        v = tl.load(QKV + base + key + H * D, mask=columns[:, None] < keys, other=0.0)
        s = exponents(q, k, rows, columns, SLOPES, head, scale, ACC)
        weights = tl.where(visible(rows, columns, length, keys, REACH), tl.exp2(s - lse[:, None]), 0.0)
        dweights = tl.dot(dout, tl.trans(v), out_dtype=ACC, input_precision="ieee")
        if DROPOUT:
            factor = tile_factor(tl.load(SEED), start + rows, block // GROUP, head, below, kept, COLUMNS)
            dropped_out = weights * factor
            dweights *= factor
        else:
            dropped_out = weights
        dv = tl.dot(tl.trans(dropped_out.to(dout.dtype)), dout, out_dtype=ACC, input_precision="ieee")
        ds = (weights * (dweights - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, out_dtype=ACC, input_precision="ieee")
        dq = tl.dot(ds, k, dq, out_dtype=ACC, input_precision="ieee")
        tl.store(DQKV + base + key, (dk * scale).to(DQKV.dtype.element_ty), mask=columns[:, None] < length)
        tl.store(DQKV + base + key + H * D, dv.to(DQKV.dtype.element_ty), mask=columns[:, None] < length)
    tl.store(DQKV + base + query, (dq * scale).to(DQKV.dtype.element_ty), mask=inside)


def tiles_of(cu_seqlens: Tensor, num_tokens: int, rows: int) -> Tensor:
    """Cut every document into tiles of `rows` without synchronising with the device. Returns (tiles, 2) int32.

    Each tile is (document, first row). Some lie after their document's end; their programs do nothing. A document gets
    one tile for each multiple of `rows` among the positions of its tokens in the bin, and one more, which always
    suffices. Example: lengths [3, 2], rows 2 -> (0, 0), (0, 2), (1, 0), (1, 2).
    """
    device, num_documents = cu_seqlens.device, cu_seqlens.shape[0] - 1
    first = cu_seqlens.long() // rows + torch.arange(num_documents + 1, device=device)
    tile = torch.arange(num_tokens // rows + num_documents, device=device)
    document = torch.searchsorted(first, tile, right=True) - 1
    return torch.stack([document, (tile - first[document]) * rows], dim=1).int()


def _constants(kernel: str, qkv: Tensor, slopes: Tensor | None, reach: int | None, dropout_p: float) -> dict[str, Any]:
    _, _, heads, size = qkv.shape
    tile = tile_of(kernel, size, dropout_p > 0, reach is not None, slopes is not None)
    shape = {"H": heads, "D": size, "ROWS": tile.rows, "COLUMNS": tile.columns, "REACH": reach}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return shape | {"DROPOUT": dropout_p > 0, "ACC": accumulator(qkv)} | options


def _numbers(qkv: Tensor, dropout_p: float) -> tuple[int, float, int, float]:
    """Return T, the scale of the scores, and dropout's threshold and scale."""
    return qkv.shape[0], qkv.shape[3] ** -0.5, threshold(dropout_p), keep_scale(dropout_p)


@torch.library.custom_op("megabert::attention", mutates_args=())
def forward(
    qkv: Tensor, cu_seqlens: Tensor, num_keys: Tensor | None, slopes: Tensor | None, seed: Tensor | None,
    row_tiles: Tensor, reach: int | None, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out (T, H, D) and each row's log-sum-exp in base 2, (H, T)."""
    out, lse = _outputs(qkv)
    if qkv.numel():
        forward_kernel[(row_tiles.shape[0], qkv.shape[2])](
            qkv, out, lse, row_tiles, cu_seqlens, num_keys, slopes, seed, *_numbers(qkv, dropout_p),
            **_constants("forward", qkv, slopes, reach, dropout_p),
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("megabert::attention_backward", mutates_args=())
def backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, num_keys: Tensor | None,
    slopes: Tensor | None, seed: Tensor | None, row_tiles: Tensor, key_tiles: Tensor | None, reach: int | None,
    dropout_p: float,
) -> Tensor:  # fmt: skip
    """Return dqkv (T, 3, H, D). key_tiles None: no document is longer than SHORT, and each takes one program."""
    dqkv = torch.empty_like(qkv)
    if not qkv.numel():
        return dqkv
    heads = qkv.shape[2]
    shared = (cu_seqlens, num_keys, slopes, seed, *_numbers(qkv, dropout_p))
    if key_tiles is None:
        grid = (cu_seqlens.shape[0] - 1, heads)
        short_kernel[grid](qkv, out, dout, lse, dqkv, *shared, **_constants("short", qkv, slopes, reach, dropout_p))
        return dqkv
    delta = torch.empty_like(lse)
    query_kernel[(row_tiles.shape[0], heads)](
        qkv, out, dout, lse, delta, dqkv, row_tiles, *shared, **_constants("query", qkv, slopes, reach, dropout_p)
    )
    key_kernel[(key_tiles.shape[0], heads)](
        qkv, dout, lse, delta, dqkv, key_tiles, *shared, **_constants("key", qkv, slopes, reach, dropout_p)
    )
    return dqkv


def _outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    tokens, _, heads, size = qkv.shape
    return qkv.new_empty(tokens, heads, size), qkv.new_empty((heads, tokens), dtype=accumulator_dtype(qkv))


@forward.register_fake
def _(qkv, cu_seqlens, num_keys, slopes, seed, row_tiles, reach, dropout_p):
    return _outputs(qkv)


@backward.register_fake
def _(dout, qkv, out, lse, cu_seqlens, num_keys, slopes, seed, row_tiles, key_tiles, reach, dropout_p):
    return torch.empty_like(qkv)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, qkv: Tensor, cu_seqlens: Tensor, num_keys: Tensor | None, slopes: Tensor | None, seed: Tensor | None,
        row_tiles: Tensor, key_tiles: Tensor | None, reach: int | None, dropout_p: float,
    ) -> Tensor:  # fmt: skip
        out, lse = forward(qkv, cu_seqlens, num_keys, slopes, seed, row_tiles, reach, dropout_p)
        ctx.save_for_backward(qkv, out, lse, cu_seqlens, num_keys, slopes, seed, row_tiles, key_tiles)
        ctx.reach, ctx.dropout_p = reach, dropout_p
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        dqkv = backward(dout.contiguous(), *ctx.saved_tensors, ctx.reach, ctx.dropout_p)
        return dqkv, None, None, None, None, None, None, None, None


def plan_triton(sequences: Sequences, slopes: Tensor | None, head_dim: int, reach: int | None = None) -> Attend:
    """Plan as in model/attention.py: cut the tiles once for all layers, without synchronising with the device."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head size {head_dim}: the Triton attention computes {HEAD_DIMS}. Use run.ops torch.")
    cu_seqlens, num_keys = sequences.cu_seqlens.contiguous(), sequences.num_keys
    short = sequences.max_seqlen <= SHORT and head_dim <= 64
    reach = None if reach is not None and reach >= sequences.max_seqlen - 1 else reach

    # By rows. Not functools.cache, which torch.compile cannot trace.
    tiles_by_rows: dict[int, Tensor] = {}

    def tiles(num_tokens: int, rows: int) -> Tensor:
        if rows not in tiles_by_rows:
            tiles_by_rows[rows] = tiles_of(cu_seqlens, num_tokens, rows)
        return tiles_by_rows[rows]

    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        """(T, 3, H, D) -> (T, H, D)."""
        dropout = dropout_p > 0
        kind = head_dim, dropout, reach is not None, slopes is not None
        row_tiles = tiles(qkv.shape[0], tile_of("forward", *kind).rows)
        key_tiles = None if short else tiles(qkv.shape[0], tile_of("key", *kind).columns)
        seed = draw_seed(qkv, dropout_p)
        shared = (cu_seqlens, num_keys, slopes, seed, row_tiles, key_tiles, reach, dropout_p)
        return Attention.apply(qkv.contiguous(), *shared)

    return attend
