"""The order of documents: no copies in a batch, other bin-mates in every epoch, equal shares of the streams."""

from itertools import takewhile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megabert.data.batch_schedule import Length
from megabert.data.order import ChunkId, SourceOrder, StreamOrder, cut_into_splits
from megabert.data.packing_buffer import PackingBuffer
from megabert.data.stream import next_bin
from tests.data.helpers import synthetic
from tests.data.helpers.synthetic import FIRST_ID, SyntheticSource, random_shards
from tests.helpers.order_quality import (
    NumberedSource,
    config_of,
    copies_in_batch,
    copies_in_batches,
    mixture_of,
    reads_per_chunk,
    repeated_binmates,
)

sources = st.builds(
    lambda seed, shards, chunks, documents: random_shards(np.random.default_rng(seed), shards, chunks, documents),
    st.integers(0, 10_000),
    st.integers(1, 30),
    st.integers(1, 4),
    st.integers(1, 12),
).filter(lambda shards: any(length for chunks in shards for lengths in chunks for length in lengths))


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(sources, st.integers(1, 300))
def test_the_streams_share_every_document_of_an_epoch(shards, num_streams):
    """In each of two epochs, every document is read by one stream, once."""
    source = SyntheticSource(shards)
    seen = np.zeros((2, source.tokens), dtype=int)
    for stream in range(num_streams):
        order = SourceOrder(source, StreamOrder(stream, num_streams, 3, 128), 0, 1.0)
        for ref in takewhile(lambda ref: ref.epoch < 2, order.chunks_from(ChunkId(0, 0))):
            documents = order.documents(ref, source.chunks[ref.shard, ref.chunk])
            for start, size in zip(documents.start, documents.size, strict=True):
                seen[ref.epoch, documents.tokens[start : start + size].astype(int) - FIRST_ID] += 1
    assert (seen == 1).all()


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(sources, min_size=1, max_size=2), st.data())
def test_no_piece_is_twice_in_a_batch_before_its_source_has_been_through(corpora, data):
    """Among the first N bins, no token of a source comes twice before as many as it has were used.

    Each source has at least as many documents as there are streams, and none of them is empty.
    """
    corpora = [[[[length + 1 for length in chunk] for chunk in chunks] for chunks in shards] for shards in corpora]
    documents = min(sum(len(chunk) for chunks in shards for chunk in chunks) for shards in corpora)
    num_streams = data.draw(st.integers(1, min(40, documents)))
    bin_pieces, truncate = data.draw(st.sampled_from([1, 2, 8])), data.draw(st.booleans())
    seed = data.draw(st.integers(0, 99))
    first, parts = FIRST_ID, []
    vocab = FIRST_ID + sum(sum(map(sum, chunks)) for shards in corpora for chunks in shards)
    for shards in corpora:
        parts.append(SyntheticSource(shards, first_id=first, vocab_size=vocab))
        first += parts[-1].tokens
    corpus = synthetic.corpus_of(*parts, weights=np.random.default_rng(seed).random(len(parts)) + 0.1)
    options = {"lengths": [Length(32, 1.0)], "truncate": truncate, "seed": seed}
    config = synthetic.config_of(corpus, 32 * bin_pieces, num_streams, **options)
    copies = np.zeros(vocab, dtype=int)
    for stream in range(num_streams):
        stream_order = StreamOrder(stream, num_streams, config.seed, config.bin_tokens)
        chosen = next_bin(PackingBuffer(corpus, stream_order, config.piece_options(0), ()), config)
        assert chosen is not None
        np.add.at(copies, np.concatenate(chosen.parts), 1)
        for part in parts:
            own = copies[part.first_id : part.first_id + part.tokens]
            usable = np.minimum(part.all_lengths, 30).sum() if truncate else part.tokens
            assert own.max() <= 1 or own.sum() >= usable


@pytest.mark.parametrize(("num_shards", "chunks", "num_streams"), [(1, 100, 8), (24, 1, 24), (3, 8, 96), (1, 1, 8)])
def test_shares_of_an_epoch_are_nearly_equal(num_shards, chunks, num_streams):
    """So no stream begins the second epoch while another is in the first half of the first one."""
    source = NumberedSource(num_shards, chunks, documents=400)
    tokens = []
    for stream in range(num_streams):
        order = SourceOrder(source, StreamOrder(stream, num_streams, 3, 4096), 0, 1.0)
        refs = takewhile(lambda ref: ref.epoch == 0, order.chunks_from(ChunkId(0, 0)))
        tokens.append(sum(order.documents(ref, source.read_chunk(ref.shard, ref.chunk)).size.sum() for ref in refs))
    assert sum(tokens) == source.tokens
    assert min(tokens) >= 0.6 * np.mean(tokens)


def test_a_small_source_of_a_mixture_has_no_copies_in_a_batch():
    """24 shards of a mixture of 192 streams: with as few splits as shards, a batch had 8 copies of a document."""
    large = NumberedSource(192, 4)
    small = NumberedSource(24, 30, first_id=FIRST_ID + large.num_documents)
    corpus = mixture_of(large, small, weights=(0.9, 0.1))
    numbers = range(small.first_id, small.first_id + small.num_documents)
    assert copies_in_batch(corpus, config_of(corpus, 192, 2048), numbers, count=3) == 1


@pytest.mark.parametrize(
    ("num_shards", "chunks", "documents", "num_streams", "bin_tokens"),
    [(24, 2, 400, 192, 2048), (24, 1, 400, 24, 4096), (3, 8, 400, 96, 4096), (24, 10, 40, 60, 4096)],
)
def test_few_chunks_give_no_copies_while_the_source_is_read_once(
    num_shards, chunks, documents, num_streams, bin_tokens
):
    """Streams with 4 or 5 chunks an epoch mixed documents of the second one into the first bins: up to 434 copies."""
    source = NumberedSource(num_shards, chunks, documents)
    corpus = mixture_of(source)
    config = config_of(corpus, num_streams, bin_tokens)
    numbers = range(source.first_id, source.first_id + source.num_documents)
    batches = min(3, source.tokens // (num_streams * bin_tokens))
    assert copies_in_batches(corpus, config, numbers, batches) == 1


@pytest.mark.parametrize(("num_shards", "chunks", "bin_tokens"), [(24, 12, 1024), (300, 1, 1024), (3, 96, 1024)])
def test_documents_have_other_bin_mates_in_the_next_epoch(num_shards, chunks, bin_tokens):
    """When only shards were shuffled, 61 % of a document's bin-mates were so again. Chance is 0.1 %."""
    source = NumberedSource(num_shards, chunks)
    corpus = mixture_of(source)
    assert repeated_binmates(corpus, config_of(corpus, 4, bin_tokens), source.num_documents) <= 0.01


def test_chunks_are_read_once_where_there_are_enough():
    """Only a source with fewer chunks than 4 for each stream is read more than once for one use."""
    source = NumberedSource(24, 12)
    corpus = mixture_of(source)
    assert reads_per_chunk(corpus, config_of(corpus, 4, 1024), 2 * source.tokens) == pytest.approx(1, abs=0.15)


def test_few_documents_make_fewer_splits_than_streams():
    splits = cut_into_splits(SyntheticSource([[[5, 6], [7]]]), 1000)
    assert (splits.shard.tolist(), splits.first.tolist(), splits.part.tolist()) == ([0, 0, 0], [0, 0, 1], [0, 1, 0])


def test_epochs_differ_and_their_groups_end_with_them():
    source = NumberedSource(10, 1, documents=4)
    order = SourceOrder(source, StreamOrder(0, 1, 3, 64), 0, 1.0)
    entries, entry = [], 0
    while order.epoch_of(entry) < 3:
        group = order.group(entry)
        assert {order.epoch_of(e) for e in group} == {order.epoch_of(entry)}
        assert all(order.group(e) == group for e in group)
        entries.append((order.epoch_of(entry), order.chunks_of(group)[:, 0].tolist()))
        entry = group.stop
    epochs = [[n for e, shards in entries if e == epoch for n in shards] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
