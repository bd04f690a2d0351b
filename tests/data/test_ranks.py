"""Numbers of ranks: streams that they share, and refusals whose advice works."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabert.data.ranks import check_warmup, choose_batches_per_step, choose_streams, count_streams, possible_ranks
from tests.data.helpers.synthetic import SyntheticSource, config_of, corpus_of, positions_after, rank_batches, same

world_sizes = st.integers(1, 300)


@given(st.lists(st.sampled_from([1, 3, 5, 8, 28, 48, 56, 64]), min_size=1, max_size=3), st.integers(0, 8))
def test_every_listed_number_of_ranks_has_whole_workers(ranks, workers):
    num_streams = count_streams(ranks, workers)
    for number in ranks:
        assert num_streams % (number * max(1, workers)) == 0
        assert num_streams >= 8 * number * max(1, workers)
        assert choose_streams(ranks, workers, number, None) == num_streams


def test_few_ranks_have_the_streams_of_one():
    assert [count_streams([number], 2) for number in (1, 2, 3, 4, 6, 8, 12)] == [192] * 7


@given(world_sizes, st.sampled_from([24, 192, 1152, 2688]))
def test_a_resumed_run_is_told_which_ranks_it_can_have(world_size, saved):
    if saved % world_size == 0:
        assert choose_streams([7], 2, world_size, saved) == saved
        return
    with pytest.raises(ValueError, match=f"{saved} data streams .* which {world_size} ranks cannot share") as error:
        choose_streams(None, 2, world_size, saved)
    for advised in ranks_in(str(error.value)):
        assert choose_streams(None, 2, advised, saved) == saved
    assert choose_streams([world_size], 2, world_size, None) % world_size == 0


@given(world_sizes)
def test_a_rank_count_that_is_not_listed_is_told_what_works(world_size):
    if 1152 % world_size == 0:
        return
    with pytest.raises(ValueError, match=rf"Add {world_size} to data.ranks, or use") as error:
        choose_streams([48, 64], 2, world_size, None)
    for advised in ranks_in(str(error.value)):
        assert choose_streams([48, 64], 2, advised, None) == 1152
    if count_fits([48, 64, world_size]):
        assert choose_streams([48, 64, world_size], 2, world_size, None) % world_size == 0


def count_fits(ranks: list[int]) -> bool:
    try:
        return count_streams(ranks, 2) > 0
    except ValueError:
        return False


def ranks_in(message: str) -> list[int]:
    """The numbers of ranks that a message advises."""
    advised = re.findall(r"[Uu]se ([\d, or]+) ranks?", message)[-1]
    return [int(number) for number in re.findall(r"\d+", advised)]


@given(world_sizes, st.sampled_from([(524_288, 65_536), (4_128_768, 65_536), (786_432, 98_304), (300, 100)]))
def test_every_advice_about_a_batch_works(world_size, batch):
    total, micro = batch
    longest = min(512, micro)
    if total // micro % world_size == 0:
        assert choose_batches_per_step(total, micro, longest, world_size) == total // micro
        return
    with pytest.raises(ValueError, match=f"which {world_size} ranks cannot share evenly") as error:
        choose_batches_per_step(total, micro, longest, world_size)
    message = str(error.value)
    for advised in ranks_in(message):
        assert choose_batches_per_step(total, micro, longest, advised)
    if found := re.search(r"set data.micro_batch_tokens (\d+)(?! and)\b", message):
        assert total % int(found[1]) == 0
        assert choose_batches_per_step(total, int(found[1]), longest, world_size)
    if found := re.search(r"set data.global_batch_tokens (\d+)", message):
        assert choose_batches_per_step(int(found[1]), micro, longest, world_size)
        assert int(found[1]) <= max(1.5 * total, 1024 * world_size)
    if found := re.search(r"set data.micro_batch_tokens (\d+) and data.global_batch_tokens (\d+)", message):
        micro, other = map(int, found.groups())
        assert choose_batches_per_step(other, micro, longest, world_size) == world_size
        assert other <= max(1.5 * total, 1024 * world_size)
    assert "set data." in message


@given(world_sizes, st.sampled_from([(4_718_592, 98_304, 786_432), (5_046_272, 57_344, 458_752), (1200, 100, 300)]))
def test_every_advice_about_a_batch_heeds_the_warmup(world_size, batch):
    total, micro, first = batch
    longest = min(1024, micro)
    try:
        choose_batches_per_step(total, micro, longest, world_size, 0, first)
    except ValueError as error:
        message = str(error)
    else:
        return
    for advised in ranks_in(message):
        check_warmup(range(first // micro, total // micro + 1, first // micro), micro, advised)
    for way in re.findall(r"[Ss]et ((?:data\.\w+ \d+(?:, | and )?)+)", message):
        new = dict(re.findall(r"data\.(\w+) (\d+)", way))
        names = ("global_batch_tokens", "micro_batch_tokens", "batch_warmup_from")
        total, micro, first = (int(new.get(name, old)) for name, old in zip(names, batch, strict=True))
        assert total % first == first % micro == 0
        assert choose_batches_per_step(total, micro, longest, world_size, 0, first)
        check_warmup(range(first // micro, total // micro + 1, first // micro), micro, world_size)


@given(world_sizes, st.sampled_from([(2, 4, 6, 8), (48, 96, 144, 192)]))
def test_every_advice_about_a_batch_warmup_works(world_size, levels):
    if levels[-1] % world_size:
        return
    if all(level % world_size == 0 for level in levels):
        check_warmup(levels, 100, world_size)
        return
    with pytest.raises(ValueError, match="data.batch_warmup_from gives steps of") as error:
        check_warmup(levels, 100, world_size)
    for advised in ranks_in(str(error.value)):
        check_warmup(levels, 100, advised)
    found = re.search(r"Set data.batch_warmup_from (\d+)", str(error.value))
    assert found is not None
    first = int(found[1]) // 100
    check_warmup(range(first, levels[-1] + 1, first), 100, world_size)
    assert levels[-1] % first == 0


def test_possible_ranks_are_the_common_divisors():
    assert possible_ranks(192, 56) == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("num_streams", "counts"),
    [
        (56, (8, 7, 1, 8)),
        pytest.param(168, (8, 6, 7, 1, 8), marks=pytest.mark.nightly),
        pytest.param(1344, (64, 48, 56, 1, 64), marks=pytest.mark.nightly),
    ],
)
def test_other_numbers_of_ranks_give_the_bins_of_the_uninterrupted_run(num_streams, counts):
    """Every number of ranks trains for one step of N bins and hands its positions to the next."""
    assert num_streams in (56, 168, count_streams([48, 56, 64], 1))
    corpus = corpus_of(SyntheticSource([[[20, 30, 7] * 4] * 6] * 30))
    config = config_of(corpus, 64, num_streams, batches_per_step=num_streams)
    whole = rank_batches(corpus, config, len(counts) * num_streams)
    positions, first = {}, 0
    for world_size in counts:
        done = []
        for rank in range(world_size):
            options = {"rank": rank, "world_size": world_size, "positions": positions, "first": first}
            done += rank_batches(corpus, config, num_streams // world_size, **options)
        assert sorted(batch.index for batch, _, _ in done) == list(range(first, first + num_streams))
        assert all(same(batch, whole[batch.index][0]) for batch, _, _ in done)
        positions = positions_after(done)
        first += num_streams
