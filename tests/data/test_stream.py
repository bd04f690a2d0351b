"""Streams: every token once per pass, the same bins for any number of ranks, and exact resuming."""

import json
import re
import sys
from dataclasses import replace
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.writing.length_statistics import LONGEST_COUNTED, summarize
from megabert.data.batch_schedule import Length
from megabert.data.bin_shape import default_max_documents, four_medians
from megabert.data.order import ChunkId, SourceOrder, StreamOrder
from megabert.data.packing import SPECIALS_PER_PIECE
from megabert.data.shards.source import Corpus, DamagedShardError
from megabert.data.stream import (
    BatchStream,
    Position,
    StreamConfig,
    filler_batch,
    held_out_batches,
    open_stream,
    positions_from_json,
    positions_to_json,
    worker_count,
)
from tests.data.helpers.synthetic import (
    FIRST_ID,
    SPECIALS,
    SyntheticSource,
    config_of,
    corpus_of,
    originals,
    pieces_of,
    positions_after,
    random_shards,
    rank_batches,
    same,
)
from tests.helpers.runs import REPOSITORY, run_command


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return corpus_of(SyntheticSource(random_shards(np.random.default_rng(0), 40, documents=12)))


@pytest.fixture(scope="module")
def mixture() -> Corpus:
    """Two sources with weights 3 to 1, of which the second is small and is read several times."""
    rng = np.random.default_rng(1)
    large, small = random_shards(rng, 40, documents=12), random_shards(rng, 25, documents=4)
    vocab = FIRST_ID + sum(sum(map(sum, chunks)) for chunks in large + small)
    first = SyntheticSource(large, vocab_size=vocab)
    second = SyntheticSource(small, first_id=FIRST_ID + first.tokens, vocab_size=vocab)
    return corpus_of(first, second, weights=(3, 1))


def order_of(source: SyntheticSource, config: StreamConfig, stream: int) -> SourceOrder:
    """Return the order in which a stream reads a corpus of this source alone."""
    return SourceOrder(source, StreamOrder(stream, config.num_streams, config.seed, config.bin_tokens), 0, 1.0)


def check_batch(batch, config: StreamConfig) -> None:
    cu_seqlens, ids = batch.cu_seqlens.numpy(), originals(batch)
    lengths = np.diff(cu_seqlens)
    assert (cu_seqlens[0], cu_seqlens[-1]) == (0, config.bin_tokens)
    assert (lengths >= 0).all()
    assert lengths.max() <= batch.max_seqlen == config.schedule.at(batch.index).max_seq_len
    assert batch.input_ids.shape == batch.position_ids.shape == (config.bin_tokens,)
    assert len(cu_seqlens) == config.max_documents[batch.max_seqlen] + 1
    assert np.array_equal(batch.position_ids.numpy(), np.concatenate([np.arange(length) for length in lengths]))
    real = ids != SPECIALS["pad"]
    assert real.sum() == batch.num_tokens
    # Filler comes last.
    assert (np.diff(real.astype(int)) <= 0).all()
    pieces = pieces_of(batch)
    assert (ids == SPECIALS["cls"]).sum() == (ids == SPECIALS["sep"]).sum() == len(pieces)
    assert batch.sum_squared_lengths == sum((len(piece) + SPECIALS_PER_PIECE) ** 2 for piece in pieces)
    labels, positions = batch.masked_labels.numpy(), batch.masked_positions.numpy()
    assert (labels != -100).sum() == batch.num_masked == min(round(0.3 * sum(map(len, pieces))), sum(map(len, pieces)))
    # No special token is ever masked.
    assert (labels[: batch.num_masked] >= FIRST_ID).all()
    assert not positions[batch.num_masked :].any()
    changed = np.flatnonzero(batch.input_ids.numpy() != ids)
    assert np.isin(changed, positions[: batch.num_masked]).all()


def test_every_batch_is_well_formed(corpus):
    config = config_of(corpus)
    for batch, _, _ in rank_batches(corpus, config, 100):
        check_batch(batch, config)


corpora = st.builds(
    lambda seed, shards: SyntheticSource(random_shards(np.random.default_rng(seed), shards)),
    st.integers(0, 10_000),
    st.integers(1, 40),
)


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(corpora, st.integers(8, 40), st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 6, 8]))
def test_every_token_appears_exactly_once_per_pass(source, max_seq_len, multiple, num_streams):
    """Read all streams to the end of their part of the first two passes: every token appears twice."""
    corpus = corpus_of(source)
    config = config_of(corpus, max_seq_len * multiple, num_streams, lengths=[Length(max_seq_len, 1.0)])
    seen = np.zeros(source.tokens, dtype=int)
    for stream in range(num_streams):
        order = order_of(source, config, stream)
        pieces = [np.empty(0, dtype=np.int64)]
        if order.epoch_of(0) < 2:
            for batch, position in open_stream(corpus, config, stream, Position()):
                pieces += pieces_of(batch)
                # The oldest waiting piece is of a later pass.
                if order.epoch_of(position.sources[0].entry) >= 2:
                    break
        counts = np.bincount(np.concatenate(pieces) - FIRST_ID, minlength=source.tokens)
        expected = np.zeros(source.tokens, dtype=int)
        for ref in takewhile(lambda ref: ref.epoch < 2, order.chunks_from(ChunkId(0, 0))):
            documents = order.documents(ref, source.chunks[ref.shard, ref.chunk])
            for start, size in zip(documents.start, documents.size, strict=True):
                expected[documents.tokens[start : start + size].astype(int) - FIRST_ID] += 1
        assert (counts >= expected).all()
        seen += expected
    assert (seen == 2).all()


def test_a_piece_keeps_the_order_of_its_document(corpus):
    """The tokens of a piece are consecutive numbers, because they come from one document."""
    for batch, _, _ in rank_batches(corpus, config_of(corpus), 50):
        for piece in pieces_of(batch):
            assert np.array_equal(piece, np.arange(piece[0], piece[0] + len(piece)))


@pytest.mark.parametrize("cap", [128, 512, 1024])
def test_bins_are_full_for_real_lengths(cap):
    """Bins of T = 16 x cap are filled to 99.5 % by documents as long as in web text: lognormal(5.5, 1.0)."""
    rng = np.random.default_rng(cap)
    shards = [[np.maximum(1, rng.lognormal(5.5, 1.0, 400)).astype(int).tolist()] for _ in range(48)]
    corpus = corpus_of(SyntheticSource(shards))
    config = config_of(corpus, 16 * cap, lengths=[Length(cap, 1.0)])
    batches = [batch for batch, _, _ in rank_batches(corpus, config, 80)]
    assert sum(batch.num_tokens for batch in batches) / (80 * 16 * cap) >= 0.995


@pytest.mark.parametrize("which", ["mixture", pytest.param("corpus", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    ("world_size", "workers"), [(1, 1), (1, 2), (1, 4), (2, 0), (2, 2), (4, 1), (4, 2), (8, 0), (8, 1)]
)
def test_bins_do_not_depend_on_ranks_or_workers(which, world_size, workers, request):
    data = request.getfixturevalue(which)
    config = config_of(data, lengths=[Length(32, 0.003), Length(48, 1.0)])
    total = 48
    expected = [batch for batch, _, _ in rank_batches(data, config, total)]
    assert {batch.max_seqlen for batch in expected} == {32, 48}
    for rank in range(world_size):
        mine = rank_batches(data, config, total // world_size, rank=rank, world_size=world_size, workers=workers)
        assert [batch.index for batch, _, _ in mine] == list(range(rank, total, world_size))
        assert all(same(batch, expected[batch.index]) for batch, _, _ in mine)


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_resuming_is_bitwise_on_any_number_of_ranks(data):
    """Resume after any step, in any phase, in mixtures that change, and during a batch warm-up."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    sources = [
        SyntheticSource(random_shards(rng, int(n)), vocab_size=20_000) for n in rng.integers(1, 40, rng.integers(1, 4))
    ]
    # With integer weights, pieces of two sources often have the same merge key.
    weights = data.draw(st.sampled_from([rng.random(len(sources)) + 0.1, rng.integers(1, 4, len(sources))]))
    corpus = corpus_of(*sources, weights=weights)
    mixtures = data.draw(st.sampled_from([(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 2, 1)]))
    # Each mixture leaves out all but one source, or none.
    others = [np.eye(len(sources))[-1], rng.random(len(sources)) + 0.1]
    corpus = replace(corpus, later=tuple(tuple(other / other.sum()) for other in others))
    num_streams = data.draw(st.sampled_from([1, 2, 4, 8, 12]))
    config = config_of(
        corpus,
        bin_tokens=int(rng.integers(64, 200)),
        num_streams=num_streams,
        steps=12,
        batches_per_step=4 * num_streams,
        first_batches=num_streams,
        warmup=0.5,
        lengths=[Length(*phase) for phase in zip((32, 64, 16), (0.4, 0.7, 1.0), mixtures, strict=True)],
        truncate=data.draw(st.booleans()),
    )
    world_size = data.draw(st.sampled_from([w for w in (1, 2, 3, 4, 6, 8, 12) if num_streams % w == 0]))
    total = 24 * num_streams
    whole = rank_batches(corpus, config, total)
    done = data.draw(st.integers(0, 20)) * num_streams
    positions = positions_after(whole[:done])
    for rank in range(world_size):
        count = (total - done) // world_size
        rest = rank_batches(corpus, config, count, rank=rank, world_size=world_size, positions=positions, first=done)
        assert rest[0][0].index == done + rank
        assert all(same(batch, whole[batch.index][0]) for batch, _, _ in rest)
        assert all(position == whole[batch.index][2] for batch, _, position in rest)


def test_every_phase_has_its_mixture_and_no_token_comes_again_before_its_source_is_through():
    rng = np.random.default_rng(2)
    shards = [random_shards(rng, 30, documents=20) for _ in range(3)]
    sizes = [sum(sum(map(sum, chunks)) for chunks in part) for part in shards]
    firsts = FIRST_ID + np.cumsum([0, *sizes])
    sources = [
        SyntheticSource(part, first_id=int(first), vocab_size=int(firsts[-1]))
        for part, first in zip(shards, firsts, strict=False)
    ]
    mixtures = [(1.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.0, 0.25, 0.75), (0.2, 0.0, 0.8)]
    corpus = replace(corpus_of(*sources), weights=mixtures[0], later=tuple(mixtures[1:]))
    lengths = [Length(32, 0.25, 0), Length(32, 0.5, 1), Length(48, 0.75, 2), Length(48, 1.0, 3)]
    config = config_of(corpus, 256, 2, steps=40, batches_per_step=2, lengths=lengths)
    batches = [batch for batch, _, _ in rank_batches(corpus, config, 80)]
    found = [np.concatenate(pieces_of(batch)) for batch in batches]
    ids, counts = np.unique(np.concatenate(found), return_counts=True)
    assert len(ids) < 0.9 * sum(sizes), "no source has been through"
    assert counts.max() == 1
    for phase, mixture in enumerate(mixtures):
        of_phase = np.concatenate(found[20 * phase : 20 * phase + 20])
        shares = np.histogram(of_phase, firsts)[0] / len(of_phase)
        assert shares == pytest.approx(mixture, abs=0.06)
        assert [share == 0 for share in shares] == [weight == 0 for weight in mixture]


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("documents", ["split", "truncate"])
def test_resuming_is_bitwise_around_a_length_change(corpus, offset, documents):
    """The length changes at step 10, and the run stops one step before, at or after it."""
    source = SyntheticSource(random_shards(np.random.default_rng(5), 28))
    corpus = corpus_of(source)
    lengths = [Length(16, 0.5), Length(48, 1.0)]
    config = config_of(corpus, steps=20, lengths=lengths, truncate=documents == "truncate")
    whole = rank_batches(corpus, config, 160)
    assert [batch.max_seqlen for batch, _, _ in whole] == [16] * 80 + [48] * 80
    done = 8 * (10 + offset)
    rest = rank_batches(corpus, config, 160 - done, positions=positions_after(whole[:done]), first=done)
    assert all(same(batch, whole[batch.index][0]) for batch, _, _ in rest)


def test_a_length_change_neither_loses_nor_repeats_tokens(corpus):
    config = config_of(
        corpus, steps=20, num_streams=1, batches_per_step=1, lengths=[Length(16, 0.2), Length(48, 0.6), Length(24, 1.0)]
    )
    source = corpus.sources[0]
    seen = np.zeros(source.tokens, dtype=int)
    for batch, position in open_stream(corpus, config, 0, Position()):
        np.add.at(seen, np.concatenate(pieces_of(batch)) - FIRST_ID, 1)
        if order_of(source, config, 0).epoch_of(position.sources[0].entry):
            break
    assert seen.min() == 1
    assert (seen > 1).mean() < 0.5


def test_a_rollback_skips_bins_and_continues_after_them(corpus):
    """Roll back from step 7 to step 3: bins 24 to 55 are not issued again, and the bins after them do not change."""
    config = config_of(corpus)
    whole = rank_batches(corpus, config, 120)
    again = rank_batches(corpus, config, 64, positions=positions_after(whole[:24]), first=56)
    assert [batch.index for batch, _, _ in again] == list(range(56, 120))
    assert all(same(batch, whole[batch.index][0]) for batch, _, _ in again)
    # Stop before every stream has issued a bin after the rollback: the other streams keep their positions.
    positions = positions_after(whole[:24]) | positions_after(again[:4])
    rest = rank_batches(corpus, config, 40, positions=positions, first=60)
    assert all(same(batch, whole[batch.index][0]) for batch, _, _ in rest)


def test_every_stretch_of_a_mixture_has_the_weights(mixture):
    config = config_of(mixture, bin_tokens=512, num_streams=4)
    border = FIRST_ID + mixture.sources[0].tokens
    batches = [batch for batch, _, _ in rank_batches(mixture, config, 160)]
    for begin in range(0, 160, 40):
        text = np.concatenate([piece for batch in batches[begin : begin + 40] for piece in pieces_of(batch)])
        assert (text < border).mean() == pytest.approx(0.75, abs=0.02)


def test_a_mixture_reads_every_token_of_a_source_once_per_pass(mixture):
    """At the end of the first pass over the large source, all of its tokens have been seen."""
    config = config_of(mixture, num_streams=1, batches_per_step=1)
    source = mixture.sources[0]
    seen = np.zeros(sum(s.tokens for s in mixture.sources), dtype=int)
    for batch, position in open_stream(mixture, config, 0, Position()):
        np.add.at(seen, np.concatenate(pieces_of(batch)) - FIRST_ID, 1)
        if order_of(source, config, 0).epoch_of(position.sources[0].entry):
            break
    assert seen[: source.tokens].min() == 1


def test_a_damaged_chunk_stops_the_run_or_is_skipped_and_counted(caplog):
    source = SyntheticSource(random_shards(np.random.default_rng(2), 30))
    damaged = SyntheticSource(random_shards(np.random.default_rng(2), 30))
    damaged.damaged = {(3, 0), (17, 0)}
    stopping, skipping = corpus_of(damaged), corpus_of(damaged, on_bad_shard="skip")
    config = config_of(skipping, num_streams=2, batches_per_step=2)
    with pytest.raises(DamagedShardError, match="chunk 0: damaged"):
        rank_batches(stopping, config, 200)
    whole = rank_batches(skipping, config, 200)
    assert "skipped: shard 3 chunk 0: damaged" in caplog.text
    lost = {int(t) for chunk in damaged.damaged for t in damaged.chunks[chunk].tokens}
    text = {int(t) for batch, _, _ in whole for piece in pieces_of(batch) for t in piece}
    assert not lost & text
    assert lost | text == set(range(FIRST_ID, FIRST_ID + source.tokens))
    counts = [sum(p.skipped for p in positions_after(whole[:done]).values()) for done in range(0, 201, 20)]
    assert counts == sorted(counts)
    assert counts[-1] >= 2
    # A chunk that was repaired before a resume is still skipped where it was skipped, so that the bins stay the same.
    compared = 0
    for done in range(0, 196, 14):
        repaired = corpus_of(source, on_bad_shard="skip")
        positions = positions_after(whole[:done])
        skipped_chunks = {chunk_id for p in positions.values() for chunk_id in p.sources[0].damaged}
        rest = rank_batches(skipping, config, 200 - done, positions=positions, first=done)
        assert all(same(batch, whole[batch.index][0]) for batch, _, _ in rest)
        later = [sum(p.skipped for p in positions_after(whole[:end]).values()) for end in (done, done + 2)]
        # No other damaged chunk is read meanwhile.
        if skipped_chunks and later[0] == later[1]:
            compared += 1
            rest = rank_batches(repaired, config, 2, positions=positions, first=done)
            assert all(same(batch, whole[batch.index][0]) for batch, _, _ in rest)
    assert compared


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 1, 1)])
def test_a_mixture_of_equal_documents_resumes_bitwise(weights):
    """With equal lengths and integer weights, merge keys occur twice or more, and their order must stay the same."""
    sources = [SyntheticSource([[[20] * 6] * 3] * 24, vocab_size=20_000) for _ in weights]
    corpus = corpus_of(*sources, weights=weights)
    config = config_of(corpus)
    whole = rank_batches(corpus, config, 160)
    for done in range(8, 150, 16):
        rest = rank_batches(corpus, config, 16, positions=positions_after(whole[:done]), first=done)
        assert all(same(batch, whole[batch.index][0]) for batch, _, _ in rest[: 160 - done])


@pytest.mark.parametrize("count", [129, 257])
def test_a_mixture_may_have_hundreds_of_sources(count):
    """As of the languages of a corpus. The last ones have several chunks, so that their numbers are told apart."""
    shards = [[[[20] * 3]]] * (count - 2) + [[[[20] * 3] * 12] * 2] * 2
    begins = FIRST_ID + np.cumsum([0, *(sum(sum(map(sum, chunks)) for chunks in source) for source in shards)])
    sources = [SyntheticSource(part, int(begins[n]), int(begins[-1])) for n, part in enumerate(shards)]
    corpus = corpus_of(*sources, weights=[0.001] * (count - 2) + [1, 1])
    config = config_of(corpus, num_streams=2, batches_per_step=2)
    whole = rank_batches(corpus, config, 20)
    seen = np.bincount(np.concatenate([piece for batch, _, _ in whole for piece in pieces_of(batch)]))
    assert seen[begins[-3] :].max() == 1
    assert seen[begins[-3] :].mean() > 0.5
    rest = rank_batches(corpus, config, 10, positions=positions_after(whole[:10]), first=10)
    assert all(same(batch, whole[batch.index][0]) for batch, _, _ in rest)


def test_a_rare_source_is_rare_from_the_start():
    rng = np.random.default_rng(3)
    large, rare = random_shards(rng, 200, documents=12), random_shards(rng, 24)
    vocab = FIRST_ID + sum(sum(map(sum, chunks)) for chunks in large + rare)
    first = SyntheticSource(large, vocab_size=vocab)
    corpus = corpus_of(first, SyntheticSource(rare, FIRST_ID + first.tokens, vocab), weights=(99, 1))
    config = config_of(corpus, num_streams=96, batches_per_step=96)
    text = np.concatenate([piece for batch, _, _ in rank_batches(corpus, config, 192) for piece in pieces_of(batch)])
    assert (text >= FIRST_ID + first.tokens).mean() == pytest.approx(0.01, abs=0.006)


@pytest.mark.parametrize("mixed", [False, True])
def test_an_unreadable_source_raises(mixed):
    damaged = SyntheticSource(random_shards(np.random.default_rng(2), 30), vocab_size=20_000)
    damaged.damaged = set(damaged.chunks)
    whole = SyntheticSource(random_shards(np.random.default_rng(3), 30), vocab_size=20_000)
    corpus = corpus_of(
        *([whole, damaged] if mixed else [damaged]), weights=(1, 1) if mixed else (1,), on_bad_shard="skip"
    )
    config = config_of(corpus, num_streams=2, batches_per_step=2)
    with pytest.raises(DamagedShardError, match=r"none of its \d+ chunks can be read"):
        rank_batches(corpus, config, 500)


def test_damage_before_a_resume_loses_only_that_chunk():
    """The bits of the damaged chunk in the position are dropped, and the pieces of other chunks are all given once."""
    source, damaged = (SyntheticSource(random_shards(np.random.default_rng(2), 30)) for _ in range(2))
    corpus = corpus_of(source, on_bad_shard="skip")
    config = config_of(corpus, num_streams=1, batches_per_step=1)
    for done in (3, 8, 21):
        whole = rank_batches(corpus, config, done)
        position = whole[-1][2].sources[0]
        place = next(order_of(source, config, 0).chunks_from(ChunkId(position.entry, position.chunk)))
        damaged.damaged = {(place.shard, place.chunk)}
        positions = positions_after(whole)
        rest = rank_batches(corpus_of(damaged, on_bad_shard="skip"), config, 50, positions=positions, first=done)
        lost = set(damaged.chunks[place.shard, place.chunk].tokens.tolist())
        wanted = rank_batches(corpus, config, 40, positions=positions, first=done)
        after, expected = (
            {int(t) for batch, _, _ in part for piece in pieces_of(batch) for t in piece} for part in (rest, wanted)
        )
        assert not after & lost
        assert expected - lost <= after


def test_short_documents_do_not_pile_up_in_the_buffer():
    """Half of the documents have one token, and a bin may have as few documents as is allowed."""
    rng = np.random.default_rng(0)
    shards = [[np.where(rng.random(200) < 0.5, 1, 500).tolist()] for _ in range(48)]
    corpus = corpus_of(SyntheticSource(shards))
    config = config_of(corpus, 16_384, 1, lengths=[Length(512, 1.0)], batches_per_step=1)
    config = StreamConfig(**(vars(config) | {"max_documents": {512: 64}}))
    positions = [position for _, _, position in rank_batches(corpus, config, 400)]
    assert max(len(json.dumps(position.to_json())) for position in positions) <= 16_384
    assert max(len(position.sources[0].pieces) for position in positions) <= 16


@pytest.fixture(scope="module")
def positions(mixture) -> dict[int, Position]:
    """Positions of 8 streams with two sources, after a change of the length."""
    config = config_of(mixture, steps=20, lengths=[Length(16, 0.5), Length(48, 1.0)])
    return positions_after(rank_batches(mixture, config, 96))


def test_positions_keep_their_format(positions):
    """These keys are in the checkpoints of every run."""
    raw = positions_to_json(positions)
    assert (raw["format"], list(raw["streams"])) == (5, [str(stream) for stream in range(8)])
    position = raw["streams"]["0"]
    assert list(position) == ["bins", "sources"]
    keys = ["entry", "chunk", "used_tokens", "pieces", "taken", "phases", "damaged", "skipped", "first_epoch"]
    assert [list(source) for source in position["sources"]] == [keys, keys]
    assert any(source["phases"] for source in position["sources"])
    assert positions_from_json(json.loads(json.dumps(raw)), "here") == positions


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_positions_of_another_order_are_refused_but_may_begin_a_branch(positions, version):
    streams = {str(stream): position.to_json() for stream, position in positions.items()}
    raw = streams if version == 1 else {"format": version, "streams": streams}
    message = rf"runs/a/streams.json: format {version}: .* start a branch: --run.branch_from runs/a --run.output_dir"
    with pytest.raises(ValueError, match=message):
        positions_from_json(raw, "runs/a/streams.json")
    begun = positions_from_json(raw, "here", new_pass=True)
    assert begun == {stream: Position(position.bins) for stream, position in positions.items()}


def test_positions_of_a_newer_version_are_refused():
    message = "streams.json: has format 6, this MegaBERT reads versions 1 to 5. Upgrade megabert"
    with pytest.raises(ValueError, match=message):
        positions_from_json({"format": 6, "streams": {}}, "streams.json")


@pytest.mark.parametrize("longest", [1, 40, 4000])
def test_a_position_is_small(longest):
    """The worst case is chunks of one-token documents with a look-ahead of 4 T = 262,144 tokens."""
    rng = np.random.default_rng(0)
    count = max(1, 131_072 // longest)
    shards = [[rng.integers(1, longest + 1, count).tolist()] * 2 for _ in range(24)]
    corpus = corpus_of(SyntheticSource(shards, vocab_size=30_000_000))
    lengths = [Length(128, 0.5), Length(512, 1.0)]
    config = config_of(corpus, bin_tokens=65_536, num_streams=1, batches_per_step=1, steps=16, lengths=lengths)
    for _, _, position in rank_batches(corpus, config, 16):
        assert len(json.dumps(position.to_json())) <= 16_384


def test_held_out_bins_are_fixed_and_complete(corpus):
    config = config_of(corpus)
    first, second = (held_out_batches(corpus, config, 0.15, 10_000) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    text = np.concatenate([piece for batch in first for piece in pieces_of(batch)])
    assert sorted(text.tolist()) == list(range(FIRST_ID, FIRST_ID + corpus.tokens))
    other_seed = held_out_batches(corpus, config_of(corpus, seed=99), 0.15, 10_000)
    assert all(same(a, b) for a, b in zip(first, other_seed, strict=True))
    assert sum(batch.num_masked for batch in first) / corpus.tokens == pytest.approx(0.15, abs=0.01)
    assert len(held_out_batches(corpus, config, 0.15, 3)) == 3


def test_held_out_bins_contain_the_whole_mixture(mixture):
    batches = held_out_batches(mixture, config_of(mixture), 0.15, 10_000)
    text = np.concatenate([piece for batch in batches for piece in pieces_of(batch)])
    assert sorted(text.tolist()) == list(range(FIRST_ID, FIRST_ID + mixture.tokens))


def test_a_filler_batch_has_only_padding(corpus):
    batch = filler_batch(corpus.tokenizer, config_of(corpus), 0.15, 7)
    assert (batch.num_tokens, batch.num_masked, batch.sum_squared_lengths) == (0, 0, 0)
    assert (batch.input_ids == SPECIALS["pad"]).all()
    assert (batch.masked_labels == -100).all()


def test_ranks_must_divide_every_step(corpus):
    options = {"rank": 0, "positions": {}, "first_index": 0}
    config = config_of(corpus, first_batches=2, warmup=0.5)
    with pytest.raises(ValueError, match="a step of 2 micro-batches cannot be shared evenly by 8 ranks"):
        BatchStream(corpus, config, world_size=8, **options)


def test_max_documents_has_a_minimum(corpus):
    config = config_of(corpus)
    with pytest.raises(ValueError, match="max_documents is 4, expected at least 5"):
        StreamConfig(**(vars(config) | {"max_documents": {32: 4}}))


@pytest.mark.parametrize("bin_tokens", [32, 40, 48, 64, 70, 96, 100, 130])
def test_the_minimum_of_max_documents_has_room_for_a_short_piece(bin_tokens):
    """The oldest piece is always in the bin, also if it is short and no other fits: then the rest is filler."""
    corpus = corpus_of(SyntheticSource([[[1, 30, 1, 2, 30] * 4]] * 8))
    config = config_of(corpus, bin_tokens=bin_tokens)
    with pytest.raises(ValueError, match="max_documents is 1, expected at least") as refused:
        StreamConfig(**(vars(config) | {"max_documents": {32: 1}}))
    least = int(re.findall(r"at least (\d+)", str(refused.value))[0])
    smallest = StreamConfig(**(vars(config) | {"max_documents": {32: least}}))
    for batch, _, _ in rank_batches(corpus, smallest, 64):
        assert batch.num_documents <= least
        assert batch.cu_seqlens[-1] == bin_tokens


@pytest.mark.parametrize(
    ("truncate", "bin_tokens", "most"), [(True, 14_720, 190), (False, 14_720, 194), (False, 1024, 23)]
)
def test_places_for_documents_suffice_and_are_few(truncate, bin_tokens, most):
    """Lengths as of web documents: the places that the histogram gives suffice for nearly every bin, and fill it."""
    rng = np.random.default_rng(4)
    lengths = np.clip(rng.lognormal(5.0, 1.0, 6000), 3, 4000).astype(int)
    source = SyntheticSource([[part.tolist()] for part in lengths.reshape(24, -1)])
    corpus = corpus_of(source)
    assert default_max_documents(corpus, bin_tokens, 128, truncate) == four_medians(corpus, bin_tokens, 128)
    counts = np.bincount(lengths, minlength=LONGEST_COUNTED + 1)
    source.manifest.statistics.update(summarize(counts, int(lengths.sum()), "tokens", len(lengths)))
    config = config_of(corpus, bin_tokens, 1, lengths=[Length(128, 1.0)], batches_per_step=1, truncate=truncate)
    assert config.max_documents == {128: most}
    batches = [batch for batch, _, _ in rank_batches(corpus, config, 60)]
    assert sum(batch.num_documents == most for batch in batches) <= 1
    # With truncate the batches pass the end of the first epoch, which leaves one bin half empty.
    assert np.mean(sorted(batch.num_tokens for batch in batches)[truncate:]) > 0.99 * bin_tokens
    for batch in batches:
        assert (batch.cu_seqlens.diff() > 0).sum() == batch.num_documents
        assert batch.cu_seqlens[batch.num_documents] == bin_tokens


EXITING = """
from itertools import islice, takewhile
from megabert.data.stream import BatchStream, open_loader
from tests.data.helpers.synthetic import SyntheticSource, config_of, corpus_of

if __name__ == "__main__":
    corpus = corpus_of(SyntheticSource([[[20] * 6] * 3] * 24))
    dataset = BatchStream(corpus, config_of(corpus), rank=0, world_size=1, positions={}, first_index=0)
    batches = iter(open_loader(dataset, 2))
    print(len(list(islice(batches, 3))))
"""


def test_a_process_can_exit_while_its_workers_run():
    """multiprocessing ends workers by SIGTERM and waits for them, but other SIGTERMs must not end them."""
    done = run_command([sys.executable, "-c", EXITING], timeout_s=120, PYTHONPATH=str(REPOSITORY))
    assert (done.code, done.output.strip()) == (0, "3")


def test_the_worker_count_is_rounded_down_to_a_divisor():
    assert [worker_count(requested, 8) for requested in (0, 1, 3, 4, 7, 20)] == [0, 1, 2, 4, 4, 8]
