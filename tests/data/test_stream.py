"""The stream's promises: every token once, the same bins for any cluster, exact resume."""

from itertools import islice

import numpy as np
import pytest
import torch

from megabert.data.shards import Source, SplitOrder, open_source, stream_count
from megabert.data.stream import (
    BatchStream,
    PackedBatch,
    Position,
    StreamConfig,
    default_max_documents,
    filler_batch,
    held_out_batches,
    open_loader,
    open_stream,
    worker_count,
)

BIN_TOKENS, MAX_SEQ_LEN = 256, 32


@pytest.fixture(scope="module")
def source(corpus) -> Source:
    return open_source(str(corpus.tokens))


@pytest.fixture(scope="module")
def config(source) -> StreamConfig:
    return StreamConfig(
        bin_tokens=BIN_TOKENS,
        max_seq_len=MAX_SEQ_LEN,
        max_documents=default_max_documents(source, BIN_TOKENS, MAX_SEQ_LEN),
        max_masked=77,
        mlm_probability=0.3,
        truncate=False,
        seed=3,
        num_streams=stream_count(len(source.splits()), 8),
    )


def rank_batches(source, config, count, *, rank=0, world_size=1, positions=None, first=0, workers=0):
    """The first `count` (batch, stream, position) of one rank."""
    options = {"positions": positions or {}, "first_index": first}
    dataset = BatchStream(source, config, rank=rank, world_size=world_size, **options)
    return list(islice(iter(open_loader(dataset, workers)), count))


def same(first: PackedBatch, second: PackedBatch) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def originals(batch: PackedBatch) -> np.ndarray:
    """input_ids with the masks taken off again."""
    ids = batch.input_ids.numpy().copy()
    ids[batch.masked_positions[: batch.num_masked].numpy()] = batch.masked_labels[: batch.num_masked].numpy()
    return ids


def raw_tokens(batches: list[PackedBatch], source: Source) -> np.ndarray:
    special = [source.tokenizer.special_ids[name] for name in ("pad", "cls", "sep")]
    ids = np.concatenate([originals(batch) for batch in batches])
    return ids[~np.isin(ids, special)]


def test_every_batch_is_well_formed(source, config):
    for batch, _, _ in rank_batches(source, config, 64):
        cu_seqlens = batch.cu_seqlens.numpy()
        lengths = np.diff(cu_seqlens)
        assert (cu_seqlens[0], cu_seqlens[-1]) == (0, BIN_TOKENS)
        assert (lengths >= 0).all()
        assert lengths.max() <= batch.max_seqlen == MAX_SEQ_LEN
        assert batch.input_ids.shape == batch.position_ids.shape == (BIN_TOKENS,)
        expected = np.concatenate([np.arange(length) for length in lengths])
        assert np.array_equal(batch.position_ids.numpy(), expected)
        ids, special = originals(batch), source.tokenizer.special_ids
        real = ids != special["pad"]
        assert real.sum() == batch.num_tokens
        begins = cu_seqlens[:-1][(lengths > 0) & real[np.minimum(cu_seqlens[:-1], BIN_TOKENS - 1)]]
        assert (ids[begins] == special["cls"]).all()
        assert (ids == special["cls"]).sum() == (ids == special["sep"]).sum() == len(begins)
        labels = batch.masked_labels.numpy()
        assert (labels != -100).sum() == batch.num_masked > 0
        assert not np.isin(labels[: batch.num_masked], list(special.values())).any()


def test_bins_are_full(source, config):
    batches = [batch for batch, _, _ in rank_batches(source, config, 200)]
    assert sum(batch.num_tokens for batch in batches) / (200 * BIN_TOKENS) >= 0.97


def test_every_token_appears_exactly_once_per_epoch(source, config):
    """One stream over all splits: its first epoch's tokens, as a multiset, are the corpus."""
    alone = StreamConfig(**{**vars(config), "num_streams": 1})
    splits = source.splits()
    corpus_tokens = np.concatenate(
        [source.read_chunk(s.shard, c).tokens for s in splits for c in range(s.first, s.last)]
    )
    seen: list[PackedBatch] = []
    for batch, position in open_stream(source, alone, 0, Position()):
        seen.append(batch)
        if position.entry > len(splits):  # every piece of the first epoch is packed
            break
    counts = np.bincount(raw_tokens(seen, source), minlength=source.tokenizer.vocab_size)
    # The window has also packed a beginning of the second epoch: never less than once, and no more than its share.
    expected = np.bincount(corpus_tokens, minlength=source.tokenizer.vocab_size)
    assert (counts >= expected).all()
    assert counts.sum() - expected.sum() < 2 * max(s.tokens for s in source.shards) + 8 * BIN_TOKENS


def test_streams_divide_the_list_of_splits():
    order = SplitOrder(10, seed=1)
    epochs = [[order[e * 10 + i] for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [order[i] for i in (25, 3, 25)] == [epochs[2][5], epochs[0][3], epochs[2][5]]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (2, 2), (4, 1), (8, 0)])
def test_bins_do_not_depend_on_ranks_or_workers(source, config, world_size, workers):
    total = 48
    expected = [batch for batch, _, _ in rank_batches(source, config, total)]
    for rank in range(world_size):
        mine = rank_batches(source, config, total // world_size, rank=rank, world_size=world_size, workers=workers)
        assert [batch.index for batch, _, _ in mine] == list(range(rank, total, world_size))
        assert all(same(batch, expected[batch.index]) for batch, _, _ in mine)


@pytest.mark.parametrize("done", [8, 24, 200])
@pytest.mark.parametrize("world_size", [1, 4])
def test_resume_continues_bitwise_on_any_number_of_ranks(source, config, done, world_size):
    whole = rank_batches(source, config, done + 32)
    positions = {}
    for _, stream, position in whole[:done]:
        positions[stream] = Position.from_json(position.to_json())
    for rank in range(world_size):
        rest = rank_batches(
            source, config, 32 // world_size, rank=rank, world_size=world_size, positions=positions, first=done
        )
        assert all(same(batch, whole[batch.index][0]) for batch, _, _ in rest)
        assert rest[0][0].index == done + rank


def test_a_position_is_small(source, config):
    for _, _, position in rank_batches(source, config, 100):
        assert len(str(position.to_json())) <= 16_384


def test_held_out_bins_are_fixed_and_end_with_the_documents(corpus, config):
    held = open_source(str(corpus.tokens), "heldout")
    first, second = (held_out_batches(held, config, 0.15, 10_000) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert len(raw_tokens(first, held)) == held.tokens
    other_seed = held_out_batches(held, StreamConfig(**{**vars(config), "seed": 99}), 0.15, 10_000)
    assert all(same(a, b) for a, b in zip(first, other_seed, strict=True))
    unknown = (raw_tokens(first, held) == held.tokenizer.special_ids["unk"]).sum()
    share = sum(batch.num_masked for batch in first) / (held.tokens - unknown)
    assert abs(share - 0.15) < 0.01


def test_a_filler_batch_is_nothing(source, config):
    batch = filler_batch(source.tokenizer, config, 0.15, 7)
    assert (batch.num_tokens, batch.num_masked) == (0, 0)
    assert (batch.input_ids == source.tokenizer.special_ids["pad"]).all()
    assert (batch.masked_labels == -100).all()


def test_ranks_that_do_not_divide_the_streams_are_refused(source, config):
    with pytest.raises(ValueError, match=r"8 streams, which 3 ranks cannot share.*divides 8"):
        BatchStream(source, config, rank=0, world_size=3, positions={}, first_index=0)


def test_workers_are_rounded_down_to_a_divisor():
    assert [worker_count(wanted, 8) for wanted in (0, 1, 3, 4, 7, 20)] == [0, 1, 2, 4, 4, 8]


def test_streams_are_a_power_of_two_or_three_times_one():
    assert [stream_count(n, 192) for n in (1, 5, 24, 28, 100, 5000)] == [1, 4, 24, 24, 96, 192]
