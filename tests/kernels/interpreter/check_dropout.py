"""Dropout masks are Philox's, do not depend on block sizes, and drop with the given probability."""

import pytest
import torch
import triton
import triton.language as tl

from megabert.kernels.dropout import draw_seed, draws, row_factor, threshold, tile_factor
from tests.helpers.cases import cases
from tests.kernels.helpers import interpreter

interpreter.install()


def philox(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Philox 4x32-10 from the paper (Salmon et al. 2011, section 3.3), in plain integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@triton.jit
def write_draws(OUT, SEED, row, head, COLUMNS: tl.constexpr):
    numbers = draws(tl.load(SEED), row, tl.arange(0, COLUMNS // 8), head)
    tl.store(OUT + tl.arange(0, COLUMNS), tl.reshape(numbers, (COLUMNS,)))


@triton.jit
def write_rows(OUT, SEED, below, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    tl.store(OUT + row * COLUMNS + column, row_factor(SEED, row, 0, below, 1.0, True, COLUMNS))


@triton.jit
def write_tile(OUT, SEED, below, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns first to first + COLUMNS of all rows."""
    rows = tl.arange(0, ROWS)
    keep = tile_factor(tl.load(SEED), rows, first // 8, 0, below, 1.0, COLUMNS)
    tl.store(OUT + rows[:, None] * WIDTH + first + tl.arange(0, COLUMNS)[None, :], keep)


def test_draws_are_philox():
    seed = torch.randint(2**63 - 1, (1,))
    row, head, columns = 12_345, 7, 32
    got = torch.zeros(columns, dtype=torch.int32)
    write_draws[(1,)](got, seed, row, head, COLUMNS=columns)
    halves = [
        {half for word in philox(seed.item(), (group, row, head, 0)) for half in (word & 0xFFFF, word >> 16)}
        for group in range(columns // 8)
    ]
    assert [set(eight.tolist()) for eight in got.view(-1, 8)] == halves


def test_a_mask_does_not_depend_on_block_sizes():
    seed = torch.randint(2**63 - 1, (1,))
    by_rows, by_tiles = (torch.zeros(16, 128, dtype=torch.int8) for _ in range(2))
    write_rows[(16,)](by_rows, seed, threshold(0.3), COLUMNS=128)
    for first in (0, 32, 64, 96):
        write_tile[(1,)](by_tiles, seed, threshold(0.3), first, ROWS=16, COLUMNS=32, WIDTH=128)
    assert torch.equal(by_rows, by_tiles)


@pytest.mark.parametrize("dropout_p", cases(per_push=[[0.1]], nightly=[[0.1], [0.5]]))
def test_rows_columns_and_neighbours_drop_with_the_given_probability(dropout_p):
    keep = torch.zeros(64, 1024, dtype=torch.int8)
    write_rows[(64,)](keep, torch.randint(2**63 - 1, (1,)), threshold(dropout_p), COLUMNS=1024)
    kept = keep.double()
    spread = (dropout_p * (1 - dropout_p)) ** 0.5
    assert abs(kept.mean() - (1 - dropout_p)) < 5 * spread / kept.numel() ** 0.5
    assert (kept.mean(0) - (1 - dropout_p)).abs().max() < 6 * spread / 8
    assert (kept.mean(1) - (1 - dropout_p)).abs().max() < 6 * spread / 32
    neighbours = ((kept[:, 1:] - kept.mean()) * (kept[:, :-1] - kept.mean())).mean() / spread**2
    assert abs(neighbours) < 5 / kept.numel() ** 0.5


def test_the_seed_comes_from_pytorchs_generator():
    x = torch.zeros(1)
    torch.manual_seed(1)
    first = draw_seed(x, 0.1)
    assert not torch.equal(draw_seed(x, 0.1), first)
    torch.manual_seed(1)
    assert torch.equal(draw_seed(x, 0.1), first)
    before = torch.get_rng_state()
    assert draw_seed(x, 0.0) is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0])
def test_an_impossible_dropout_is_refused(dropout_p):
    with pytest.raises(ValueError, match="expected at least 0 and less than 1"):
        threshold(dropout_p)
