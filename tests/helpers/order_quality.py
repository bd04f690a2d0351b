"""How well streams mix documents: copies of one in a global batch, and bin-mates that are bin-mates again."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from megabert.data.batch_schedule import Length, MaskingRate, make_schedule
from megabert.data.bin_shape import default_max_documents
from megabert.data.masking import masked_count
from megabert.data.order import StreamOrder
from megabert.data.packing_buffer import PackingBuffer
from megabert.data.shards.manifest import Manifest, Shard, TokenizerInfo
from megabert.data.shards.sample_format import TokenChunk
from megabert.data.shards.source import Corpus, Source
from megabert.data.stream import StreamConfig, next_bin
from tests.data.helpers.synthetic import FIRST_ID, SPECIALS, NoStorage


class NumberedSource(Source):
    """A source whose documents consist of their own number, from `first_id` on, and have web-like lengths.

    lengths are lognormal, `documents` in each of chunks_per_shard chunks of each shard.
    """

    def __init__(self, num_shards: int, chunks_per_shard: int, documents: int = 40, first_id: int = FIRST_ID):
        self.documents, self.chunks_per_shard, self.first_id = documents, chunks_per_shard, first_id
        self.num_documents = num_shards * chunks_per_shard * documents
        lengths = np.random.default_rng(first_id).lognormal(4.5, 0.8, self.num_documents)
        self.all_lengths = np.clip(lengths, 8, 126).astype(np.int32)
        chunks = np.zeros((num_shards * chunks_per_shard, 5), dtype=np.int64)
        chunks[:, 2], chunks[:, 3] = documents, self.all_lengths.reshape(len(chunks), documents).sum(1)
        shards = tuple(
            Shard(f"train-{n:05d}.tar", "", 0, int(part[:, 2].sum()), int(part[:, 3].sum()), part)
            for n, part in enumerate(np.split(chunks, num_shards))
        )
        special = tuple(SPECIALS.values())
        tokenizer = TokenizerInfo("f" * 64, first_id + self.num_documents, SPECIALS, special)
        statistics = {"median_document_tokens": int(np.median(self.all_lengths))}
        manifest = Manifest("tokens", {"train": shards}, statistics, tokenizer)
        super().__init__("numbered", NoStorage(), manifest, shards)
        self.reads = 0

    def read_chunk(self, shard: int, chunk: int) -> TokenChunk:
        self.reads += 1
        first = (shard * self.chunks_per_shard + chunk) * self.documents
        lengths = self.all_lengths[first : first + self.documents]
        numbers = np.arange(self.first_id + first, self.first_id + first + self.documents, dtype=np.uint32)
        return TokenChunk(np.repeat(numbers, lengths), lengths)


def mixture_of(*sources: NumberedSource, weights: tuple[float, ...] = (1.0,)) -> Corpus:
    return Corpus(sources, tuple(np.array(weights) / sum(weights)))


def config_of(
    corpus: Corpus, num_streams: int, bin_tokens: int, cap: int = 128, truncate: bool = False
) -> StreamConfig:
    return StreamConfig(
        bin_tokens=bin_tokens,
        schedule=make_schedule(1_000_000, num_streams, [Length(cap, 1.0)]),
        max_documents={cap: default_max_documents(corpus, bin_tokens, cap, truncate=False)},
        max_masked=masked_count(bin_tokens, 0.3),
        masking=MaskingRate.constant(0.3),
        truncate=truncate,
        seed=17,
        num_streams=num_streams,
    )


def bins_of(corpus: Corpus, config: StreamConfig, stream: int) -> Iterator[np.ndarray]:
    """Yield the numbers of the documents in each bin of a stream."""
    stream_order = StreamOrder(stream, config.num_streams, config.seed, config.bin_tokens)
    buffer = PackingBuffer(corpus, stream_order, config.piece_options(0), ())
    while (chosen := next_bin(buffer, config)) is not None:
        ids = np.concatenate(chosen.parts)
        yield ids[chosen.lengths.cumsum() - chosen.lengths + 1]


def batches_of(corpus: Corpus, config: StreamConfig, count: int) -> Iterator[np.ndarray]:
    """Yield the numbers of the documents in each of `count` global batches of one bin from every stream."""
    streams = [bins_of(corpus, config, stream) for stream in range(config.num_streams)]
    for _ in range(count):
        yield np.concatenate([next(stream) for stream in streams])


def copies_in_batch(corpus: Corpus, config: StreamConfig, numbers: range, count: int = 10) -> int:
    """The most copies of one document, of those with these numbers, in one of the first batches."""
    most = 0
    for batch in batches_of(corpus, config, count):
        own = batch[(batch >= numbers.start) & (batch < numbers.stop)]
        most = max(most, *Counter(own.tolist()).values(), 0)
    return most


def copies_in_batches(corpus: Corpus, config: StreamConfig, numbers: range, count: int) -> int:
    """The most copies of one document, of those with these numbers, in the first `count` batches together."""
    given = np.concatenate(list(batches_of(corpus, config, count)))
    return int(np.bincount(given)[numbers.start : numbers.stop].max())


def repeated_binmates(corpus: Corpus, config: StreamConfig, documents: int) -> float:
    """The share of a document's bin-mates in the first epoch that are its bin-mates in the second one, too.

    corpus: of one NumberedSource. Measured over the streams' bins until every document has been seen twice.
    """
    seen = np.zeros(documents, dtype=np.int64)
    bin_of = np.zeros((2, documents), dtype=np.int64)
    streams = [bins_of(corpus, config, stream) for stream in range(config.num_streams)]
    number = 0
    while seen.min() < 2:
        for stream in streams:
            chosen = np.unique(next(stream) - FIRST_ID)
            for epoch in (0, 1):
                bin_of[epoch, chosen[seen[chosen] == epoch]] = number
            seen[chosen] += 1
            number += 1
    pairs, mates = (np.unique(part, return_counts=True)[1] for part in (bin_of[0] * number + bin_of[1], bin_of[0]))
    return float((pairs * (pairs - 1)).sum() / (mates * (mates - 1)).sum())


def reads_per_chunk(corpus: Corpus, config: StreamConfig, tokens: int) -> float:
    """Chunks read for each chunk's worth of tokens that is given, over about `tokens` tokens of one NumberedSource."""
    source = corpus.sources[0]
    assert isinstance(source, NumberedSource)
    source.reads = given = 0
    streams = [bins_of(corpus, config, stream) for stream in range(config.num_streams)]
    while given < tokens:
        given += sum(source.all_lengths[next(stream) - FIRST_ID].sum() for stream in streams)
    return source.reads * source.tokens / source.num_chunks / given
