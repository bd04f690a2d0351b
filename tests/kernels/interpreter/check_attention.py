"""Attention in Triton's interpreter: results, gradients, dropout, bytes moved."""

from itertools import product

import pytest
import torch

from megabert.kernels import attention as kernels
from megabert.kernels.dropout import draw_seed
from megabert.model.attention import plan_eager
from megabert.model.ops import alibi_slopes
from megabert.model.padding import Sequences
from tests.helpers.cases import cases
from tests.kernels.helpers import interpreter
from tests.kernels.helpers.interpreter import counted
from tests.kernels.helpers.masked_attention import masked_attention, masks_of
from tests.kernels.helpers.yardstick import assert_as_good, assert_gradients, results

interpreter.install()

BF16, FP32 = torch.bfloat16, torch.float32


def packed(lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return Sequences(cu_seqlens, max(lengths))


def qkv_for(sequences, heads, size, dtype=FP32):
    return torch.randn(int(sequences.cu_seqlens[-1]), 3, heads, size).to(dtype)


def plain(sequences, slopes, size, reach=None):
    """The specification, in the precision of its input."""
    return lambda qkv: plan_eager(sequences, None if slopes is None else slopes.to(qkv.dtype), size, reach)(qkv, 0.0)


def ours(sequences, slopes, size, dropout_p=0.0, reach=None):
    def function(qkv):
        if dropout_p:
            torch.manual_seed(5)
        return kernels.plan_triton(sequences, slopes, size, reach)(qkv, dropout_p)

    return function


CASES = {
    "one token": [1],
    "short": [37, 128, 1, 90],
    "empty documents": [0, 5, 0, 0, 17, 0],
    "padded with empty documents": [20, 9, 0, 0, 0, 0],
    "two tiles": [140],
    "long": [300],
    "long and short": [130, 1, 0, 257],
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    cases(
        per_push=[("one token", FP32), ("empty documents", BF16), ("two tiles", BF16)],
        nightly=product(CASES, [FP32, BF16]),
    ),
)
def test_equals_the_specification(name, dtype):
    sequences = packed(CASES[name])
    slopes = alibi_slopes(2)
    assert_as_good(ours(sequences, slopes, 64), plain(sequences, slopes, 64), [qkv_for(sequences, 2, 64, dtype)])


@pytest.mark.parametrize(
    ("lengths", "reach", "alibi", "short", "dtype"),
    cases(
        per_push=[([70, 1, 0, 20], 20, False, 8, FP32), ([40, 7], 3, True, kernels.SHORT, BF16)],
        nightly=product(
            [[70, 1, 0, 20], [300], [64, 65]], [1, 20, 64, 400], [False, True], [8, kernels.SHORT], [FP32, BF16]
        ),
    ),
)
def test_equals_it_with_a_window(monkeypatch, lengths, reach, alibi, short, dtype):
    monkeypatch.setattr(kernels, "SHORT", short)
    sequences, slopes = packed(lengths), alibi_slopes(2) if alibi else None
    qkv = qkv_for(sequences, 2, 32, dtype)
    assert_as_good(ours(sequences, slopes, 32, reach=reach), plain(sequences, slopes, 32, reach), [qkv])


@pytest.mark.nightly
def test_is_the_specification_with_a_window_in_fp64():
    sequences = packed([20, 140])
    qkv = qkv_for(sequences, 2, 32, torch.float64)
    assert (ours(sequences, None, 32, reach=9)(qkv) - plain(sequences, None, 32, 9)(qkv)).abs().max() < 1e-12


def test_padded_rows_with_a_window_attend_to_no_padding():
    rows = packed([40, 40])._replace(num_keys=torch.tensor([40, 11], dtype=torch.int32))
    qkv = qkv_for(rows, 2, 32, torch.float64)
    got, wanted = ours(rows, None, 32, reach=5)(qkv), plain(rows, None, 32, 5)(qkv)
    real = torch.cat([torch.arange(40), torch.arange(40, 51)])
    assert (got[real] - wanted[real]).abs().max() < 1e-12
    assert got.isfinite().all()


@pytest.mark.parametrize("dropout_p", cases(per_push=[], nightly=[[0.0], [0.3]]))
def test_gradients_with_a_window(monkeypatch, dropout_p):
    monkeypatch.setattr(kernels, "SHORT", 8)
    sequences = packed([20, 0, 3])
    assert_gradients(ours(sequences, None, 16, dropout_p, reach=4), [qkv_for(sequences, 2, 16)])


@pytest.mark.nightly
def test_a_window_moves_bytes_in_proportion_to_the_length():
    moved = []
    for length in (1024, 2048):
        sequences = packed([length])
        qkv = qkv_for(sequences, 1, 16, BF16).requires_grad_()
        with counted() as traffic:
            ours(sequences, None, 16, reach=64)(qkv).sum().backward()
        moved.append(traffic.total)
    assert moved[1] == pytest.approx(2 * moved[0], rel=0.1)


SHORT_AND_LONG = [[70, 3], [131, 40]]


@pytest.mark.parametrize(
    ("size", "lengths"),
    cases(
        per_push=[(16, [70, 3]), (32, [131, 40]), (128, [7, 3])],
        nightly=product(kernels.HEAD_DIMS, SHORT_AND_LONG),
    ),
)
def test_equals_it_for_every_head_size(size, lengths):
    sequences, slopes = packed(lengths), alibi_slopes(3)
    assert_as_good(ours(sequences, slopes, size), plain(sequences, slopes, size), [qkv_for(sequences, 3, size, BF16)])


def test_is_the_specification_in_fp64():
    sequences, slopes = packed([20, 140]), alibi_slopes(2)
    qkv = qkv_for(sequences, 2, 64, torch.float64)
    assert (ours(sequences, slopes, 64)(qkv) - plain(sequences, slopes, 64)(qkv)).abs().max() < 1e-12


@pytest.mark.parametrize("lengths", [[40, 7], [140]], ids=["short", "long"])
def test_equals_it_without_alibi(lengths):
    sequences = packed(lengths)
    assert_as_good(ours(sequences, None, 32), plain(sequences, None, 32), [qkv_for(sequences, 2, 32)])


@pytest.mark.parametrize(
    ("length", "short"),
    cases(per_push=[(33, 8)], nightly=[(33, kernels.SHORT), (150, kernels.SHORT)]),
)
def test_padded_rows_attend_to_no_padding(monkeypatch, length, short):
    """Rows of one length with padding, which is computed but never attended to."""
    monkeypatch.setattr(kernels, "SHORT", short)
    rows = packed([length, length])._replace(num_keys=torch.tensor([length, 11], dtype=torch.int32))
    slopes = alibi_slopes(2)
    assert_as_good(ours(rows, slopes, 32), plain(rows, slopes, 32), [qkv_for(rows, 2, 32)])
    dqkv = results(ours(rows, slopes, 32), [qkv_for(rows, 2, 32)], torch.randn(2 * length, 2, 32))[1]
    assert not dqkv[length + 11 :, 1:].any()


def test_a_row_of_only_padding_gives_finite_numbers():
    rows = packed([8, 8])._replace(num_keys=torch.tensor([8, 0], dtype=torch.int32))
    assert all(x.isfinite().all() for x in results(ours(rows, None, 32), [qkv_for(rows, 2, 32)], torch.ones(16, 2, 32)))


def test_large_scores_do_not_overflow():
    sequences, slopes = packed([50]), alibi_slopes(2)
    qkv = qkv_for(sequences, 2, 32)
    qkv[:, :2] *= 8
    assert_as_good(ours(sequences, slopes, 32), plain(sequences, slopes, 32), [qkv])


@pytest.mark.parametrize(
    ("dropout_p", "lengths", "short"),
    cases(
        per_push=[(0.3, [5, 0, 3], kernels.SHORT), (0.3, [9, 0, 1], 8)],
        nightly=product([0.0, 0.3], [[5, 0, 3], [129]], [kernels.SHORT]),
    ),
)
def test_gradients(monkeypatch, dropout_p, lengths, short):
    """short: the longest document whose gradients one program computes."""
    monkeypatch.setattr(kernels, "SHORT", short)
    sequences = packed(lengths)
    assert_gradients(ours(sequences, alibi_slopes(2), 16, dropout_p), [qkv_for(sequences, 2, 16)])


@pytest.mark.parametrize(
    ("lengths", "dtype", "short"),
    cases(
        per_push=[([20, 37], FP32, 8), ([20, 7], BF16, kernels.SHORT)],
        nightly=product([[20, 37], [140, 6]], [FP32, BF16], [kernels.SHORT]),
    ),
)
def test_dropout_is_on_the_weights(monkeypatch, lengths, dtype, short):
    """The specification with the same masks gives the same; a mask is a function of (seed, row, key, head) alone."""
    monkeypatch.setattr(kernels, "SHORT", short)
    dropout_p, heads, size = 0.25, 2, 32
    sequences, slopes = packed(lengths), alibi_slopes(heads)
    qkv = qkv_for(sequences, heads, size, dtype)
    torch.manual_seed(5)
    masks = masks_of(lengths, heads, dropout_p, draw_seed(qkv, dropout_p))
    assert 0.7 < torch.cat([mask.flatten() for mask in masks]).mean() < 0.8
    masked = masked_attention(slopes, size, masks, dropout_p)
    assert_as_good(ours(sequences, slopes, size, dropout_p), masked, [qkv])


def test_documents_do_not_see_each_other():
    lengths = [40, 150, 9]
    sequences, slopes = packed(lengths), alibi_slopes(2)
    qkv = qkv_for(sequences, 2, 32)
    together = ours(sequences, slopes, 32)(qkv)
    for part, length, mine in zip(qkv.split(lengths), lengths, together.split(lengths), strict=True):
        assert torch.equal(ours(packed([length]), slopes, 32)(part), mine)


def test_every_row_is_in_one_tile():
    for lengths in ([1], [0, 0], [3, 2], [0, 64, 1, 0, 130, 63, 65], [5] * 40):
        for rows in (2, 64, 128):
            sequences = packed(lengths)
            tokens = sum(lengths)
            tiles = kernels.tiles_of(sequences.cu_seqlens, tokens, rows)
            assert len(tiles) == tokens // rows + len(lengths)
            inside = [(document, first) for document, first in tiles.tolist() if first < lengths[document]]
            assert inside == [(document, first) for document, n in enumerate(lengths) for first in range(0, n, rows)]
    assert kernels.tiles_of(packed([3, 2]).cu_seqlens, 5, 2).tolist() == [[0, 0], [0, 2], [1, 0], [1, 2]]


def test_no_tokens():
    qkv = torch.randn(0, 3, 2, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(ours(packed([0]), alibi_slopes(2), 32)(qkv).sum(), qkv)
    assert gradient.shape == qkv.shape


def test_an_unknown_head_size_is_refused():
    with pytest.raises(ValueError, match="head size 48: the Triton attention computes .* run.ops torch"):
        kernels.plan_triton(packed([3]), None, 48)


def blocks(length, size):
    return -(-length // size)


@pytest.mark.parametrize("lengths", [[100, 0, 28], [130, 20]], ids=["short", "long"])
def test_moves_the_bytes_of_its_formula(lengths):
    heads, size, s = 2, 64, 2
    sequences, slopes = packed(lengths), alibi_slopes(heads)
    qkv = qkv_for(sequences, heads, size, BF16).requires_grad_()
    tokens, short = sum(lengths), max(lengths) <= kernels.SHORT
    row, key = kernels.tile_of("forward", size, False), kernels.tile_of("key", size, False)
    query = kernels.tile_of("query", size, False)
    tiles = len(kernels.tiles_of(sequences.cu_seqlens, tokens, row.rows))
    key_tiles = len(kernels.tiles_of(sequences.cu_seqlens, tokens, key.columns))

    def swept(outer, inner):
        """Return the tokens read for all tiles, and the bytes of the slopes that are read."""
        return (
            sum(blocks(n, outer) * n for n in lengths),
            4 * sum(blocks(n, outer) * blocks(n, inner) for n in lengths),
        )

    with counted() as forward:
        out = ours(sequences, slopes, size)(qkv)
    again, slope_reads = swept(row.rows, row.columns)
    assert forward.total == heads * (
        tokens * (2 * size * s + 4) + again * 2 * size * s + 16 * tiles + slope_reads
    )  # fmt: skip
    with counted() as backward:
        out.backward(torch.ones_like(out))
    if short:
        step = kernels.tile_of("short", size, False).columns
        slope_reads = 4 * sum(blocks(n, step) for n in lengths)
        assert backward.total == heads * (tokens * (8 * size * s + 4) + 8 * len(lengths) + slope_reads)
    else:
        again, slope_reads = swept(query.rows, query.columns)
        again_keys, more_reads = swept(key.columns, key.rows)
        assert backward.total == heads * (
            tokens * (8 * size * s + 8) + again * 2 * size * s + again_keys * (2 * size * s + 8)
            + 16 * (tiles + key_tiles) + slope_reads + more_reads
        )  # fmt: skip


def test_memory_grows_with_tokens():
    saved = []
    sequences = packed([150, 20])
    qkv = qkv_for(sequences, 2, 32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ours(sequences, alibi_slopes(2), 32, 0.1)(qkv)
    assert sum(x.numel() for x in saved) < 170 * (4 * 2 * 32 + 2) + 64


@pytest.mark.parametrize(
    ("lengths", "short"),
    cases(per_push=[([20, 7], 8)], nightly=[([20, 7], kernels.SHORT), ([140], kernels.SHORT)]),
)
def test_torch_compile_sees_one_operation(monkeypatch, lengths, short):
    monkeypatch.setattr(kernels, "SHORT", short)
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    sequences, slopes = packed(lengths), alibi_slopes(2)
    qkv = qkv_for(sequences, 2, 32)
    tiles = kernels.tiles_of(sequences.cu_seqlens, len(qkv), 128)
    key_tiles = None if max(lengths) <= short else kernels.tiles_of(sequences.cu_seqlens, len(qkv), 64)
    shared = (sequences.cu_seqlens, None, slopes, None, tiles)
    assert torch.library.opcheck(kernels.forward, (qkv, *shared, None, 0.0), **tests)
    out, lse = kernels.forward(qkv, *shared, None, 0.0)
    assert torch.library.opcheck(kernels.backward, (out, qkv, out, lse, *shared, key_tiles, None, 0.0), **tests)
    compiled = torch.compile(ours(sequences, slopes, 32), fullgraph=True, backend="aot_eager")
    assert_as_good(compiled, plain(sequences, slopes, 32), [qkv])
