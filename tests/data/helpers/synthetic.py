"""Corpora of consecutive numbers: each document contains its own ids in order, so a test can predict every token."""

import json
from collections.abc import Sequence
from itertools import islice, pairwise

import numpy as np

from megabert.data.batch import PackedBatch
from megabert.data.batch_schedule import Length, MaskingRate, make_schedule
from megabert.data.bin_shape import default_max_documents
from megabert.data.masking import masked_count
from megabert.data.shards.cache import ExpectedFile
from megabert.data.shards.manifest import Manifest, Shard, TokenizerInfo
from megabert.data.shards.sample_format import TokenChunk
from megabert.data.shards.source import Corpus, DamagedShardError, Source
from megabert.data.stream import BatchStream, Position, StreamConfig, open_loader

SPECIALS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
FIRST_ID = 5


class NoStorage:
    """The storage of a source whose chunks are in memory."""

    read_ahead = 0
    patience_s = 0.0

    def read(self, name: str, offset: int, size: int, expected: ExpectedFile) -> bytes:
        raise NotImplementedError

    def read_whole(self, name: str, max_bytes: int) -> bytes:
        raise NotImplementedError

    def size(self, name: str) -> int | None:
        return None

    def prefetch(self, name: str, expected: ExpectedFile) -> None:
        pass

    def discard(self, name: str, expected: ExpectedFile) -> bool:
        return False

    def url(self, name: str) -> str:
        return name


def index_of(chunks: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the rows of chunks.npy, as far as the order of reading depends on them."""
    return np.array([[0, 0, len(lengths), sum(lengths), 0] for lengths in chunks], dtype=np.int64)


class SyntheticSource(Source):
    """shards: the lengths of the documents of each chunk of each shard. damaged: (shard, chunk) that cannot be read."""

    def __init__(
        self, shards: Sequence[Sequence[Sequence[int]]], first_id: int = FIRST_ID, vocab_size: int | None = None
    ):
        self.first_id = first_id
        total = sum(sum(map(sum, chunks)) for chunks in shards)
        self.all_lengths = [length for chunks in shards for chunk in chunks for length in chunk]
        tokenizer = TokenizerInfo("f" * 64, vocab_size or first_id + total, SPECIALS, tuple(SPECIALS.values()))
        listed = tuple(
            Shard(f"train-{n:05d}.tar", "", 0, sum(map(len, chunks)), sum(map(sum, chunks)), index_of(chunks))
            for n, chunks in enumerate(shards)
        )
        median = {"median_document_tokens": int(np.median(self.all_lengths))}
        super().__init__("synthetic", NoStorage(), Manifest("tokens", {"train": listed}, median, tokenizer), listed)
        self.damaged: set[tuple[int, int]] = set()
        self.chunks = {}
        token = first_id
        for n, chunks in enumerate(shards):
            for c, lengths in enumerate(chunks):
                size = sum(lengths)
                tokens = np.arange(token, token + size, dtype=np.uint32)
                self.chunks[n, c] = TokenChunk(tokens, np.array(lengths, dtype=np.int32))
                token += size

    def read_chunk(self, shard: int, chunk: int) -> TokenChunk:
        if (shard, chunk) in self.damaged:
            raise DamagedShardError(f"shard {shard} chunk {chunk}: damaged")
        return self.chunks[shard, chunk]


def random_shards(
    rng: np.random.Generator, num_shards: int, chunks: int = 3, documents: int = 6, longest: int = 60
) -> list[list[list[int]]]:
    return [
        [rng.integers(0, longest, rng.integers(1, documents + 1)).tolist() for _ in range(rng.integers(1, chunks + 1))]
        for _ in range(num_shards)
    ]


def corpus_of(*sources: SyntheticSource, weights: Sequence[float] = (1.0,), on_bad_shard: str = "stop") -> Corpus:
    return Corpus(tuple(sources), tuple(np.array(weights) / sum(weights)), on_bad_shard)


def config_of(
    corpus: Corpus, bin_tokens: int = 128, num_streams: int = 8, steps: int = 1000, **changes
) -> StreamConfig:
    """changes: lengths, batches_per_step, first_batches, warmup, probability, masking, truncate, seed."""
    lengths = changes.get("lengths", [Length(32, 1.0)])
    schedule = make_schedule(
        steps,
        changes.get("batches_per_step", 8),
        lengths,
        first_batches=changes.get("first_batches"),
        warmup=changes.get("warmup", 0.0),
    )
    probability = changes.get("probability", 0.3)
    return StreamConfig(
        bin_tokens=bin_tokens,
        schedule=schedule,
        max_documents={
            length: default_max_documents(corpus, bin_tokens, length, changes.get("truncate", False))
            for length, *_ in lengths
        },
        max_masked=masked_count(bin_tokens, probability),
        masking=changes.get("masking", MaskingRate.constant(probability)),
        truncate=changes.get("truncate", False),
        seed=changes.get("seed", 3),
        num_streams=num_streams,
    )


def originals(batch: PackedBatch) -> np.ndarray:
    """Return input_ids with the masked tokens restored."""
    ids = batch.input_ids.numpy().copy()
    ids[batch.masked_positions[: batch.num_masked].numpy()] = batch.masked_labels[: batch.num_masked].numpy()
    return ids


def pieces_of(batch: PackedBatch) -> list[np.ndarray]:
    """Return the text of every piece, without specials and filler."""
    ids = originals(batch)
    bounds = batch.cu_seqlens.numpy()
    parts = (ids[a:b] for a, b in pairwise(bounds) if b > a)
    return [part[1:-1] for part in parts if part[0] != SPECIALS["pad"]]


def same(first: PackedBatch, second: PackedBatch) -> bool:
    """Tell whether two batches are bitwise the same."""
    if first.__getstate__().keys() != second.__getstate__().keys():
        return False
    names = first.shapes.parts()
    plain = ("shapes", "max_seqlen", "index", "num_documents", "num_masked", "num_tokens", "sum_squared_lengths")
    tensors = all(getattr(first, name).equal(getattr(second, name)) for name in names)
    return tensors and all(getattr(first, name) == getattr(second, name) for name in plain)


def rank_batches(corpus, config, count, *, rank=0, world_size=1, positions=None, first=0, workers=0):
    """Return the first `count` (batch, stream, position) of one rank."""
    options = {"positions": positions or {}, "first_index": first}
    dataset = BatchStream(corpus, config, rank=rank, world_size=world_size, **options)
    return list(islice(iter(open_loader(dataset, workers)), count))


def positions_after(done) -> dict[int, Position]:
    """Return each stream's last position, after a round trip through JSON as in a checkpoint."""
    written = {stream: json.dumps(position.to_json()) for _, stream, position in done}
    return {stream: Position.from_json(json.loads(text)) for stream, text in written.items()}
