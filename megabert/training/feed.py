"""The training data of a run: opening the corpora, the shapes of a batch, and this rank's batches."""

import gc
import multiprocessing
import multiprocessing.process
from collections.abc import Iterator
from pathlib import Path

from megabert.config.recipe import DataConfig, Recipe
from megabert.data.batch import PackedBatch
from megabert.data.masking import masked_count
from megabert.data.shards.cache import CacheOptions
from megabert.data.shards.source import Corpus, check_same_tokenizer, open_corpus, stream_count
from megabert.data.stream import BatchStream, Position, StreamConfig, default_max_documents, open_loader
from megabert.training.distributed.watchdog import RankLostError
from megabert.training.schedule import RunSchedule


class Feed:
    """This rank's batches. A rollback opens it again at other positions."""

    def __init__(
        self,
        corpus: Corpus,
        config: StreamConfig,
        *,
        rank: int,
        world_size: int,
        num_workers: int,
        pin_memory: bool,
    ):
        """pin_memory: for a device that copies batches from host memory."""
        self.corpus = corpus
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.batches: Iterator[tuple[PackedBatch, int, Position]] = iter(())
        self.workers: set[multiprocessing.process.BaseProcess] = set()

    def open(self, positions: dict[int, Position], first_index: int) -> None:
        """Start loading at bin first_index. positions: of this rank's streams."""
        self.close()
        dataset = BatchStream(
            self.corpus,
            self.config,
            rank=self.rank,
            world_size=self.world_size,
            positions=positions,
            first_index=first_index,
        )
        others = set(multiprocessing.active_children())
        self.batches = iter(open_loader(dataset, self.num_workers, self.pin_memory))
        self.workers = set(multiprocessing.active_children()) - others

    def __next__(self) -> tuple[PackedBatch, int, Position]:
        """The next batch, the number of its stream, and the stream's position after it.

        Raises RankLostError if the loader gives nothing for minutes, or if one of its workers died.
        """
        try:
            return next(self.batches)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            raise RankLostError(
                f"data.train: rank {self.rank} gets no more batches: {str(error).splitlines()[0]}. If a worker was "
                "killed, perhaps memory is short: lower data.num_workers. If nothing arrives, look at where the "
                "shards are, or use data.num_workers 0 to see the error."
            ) from error

    def end_workers(self) -> None:
        """End workers that give nothing: close() would wait seconds for each of them. No batch can be read after it."""
        for worker in self.workers:
            worker.terminate()

    def close(self) -> None:
        """End the loader's worker processes."""
        self.batches = iter(())
        gc.collect()


def open_corpora(data: DataConfig) -> tuple[Corpus, Corpus]:
    """Open the training and the held-out corpus. Raises ValueError if one is missing or their tokenizers differ."""
    options = {
        "tokenizer": data.tokenizer,
        "cache": CacheOptions(Path(data.cache_dir), data.cache_gb << 30, data.store_patience_s),
        "on_bad_shard": data.on_bad_shard,
    }
    corpus = open_corpus(data.corpora, **options)
    held_out = open_corpus([(data.heldout, 1.0)] if data.heldout else data.corpora, "heldout", **options)
    check_same_tokenizer(corpus.sources[0], held_out.sources[0])
    for source in corpus.sources:
        source.check_files()
    return corpus, held_out


def choose_streams(num_splits: int, max_streams: int, world_size: int, saved: int | None) -> int:
    """Choose the number of a run's data streams. num_splits: of the corpus. saved: the number of a resumed run.

    Raises ValueError, saying what would work, if the ranks cannot share the streams evenly.
    """
    num_streams = saved or stream_count(num_splits, max_streams)
    if num_streams % world_size == 0:
        return num_streams
    ranks = max(number for number in range(1, world_size) if num_streams % number == 0)
    other_ranks = f"use {ranks} {'rank' if ranks == 1 else 'ranks'}"
    possible = {stream_count(num_splits, limit) for limit in range(1, num_splits + 1)}
    fitting = [number for number in possible if number % world_size == 0]
    if saved is not None:
        remedy = f"A run keeps its streams: {other_ranks}."
    elif fitting:
        remedy = f"Set data.max_streams {max(fitting)}, or {other_ranks}."
    elif stream_count(world_size, world_size) == world_size:
        remedy = (
            f"These shards have too few parts ({num_splits}): write them with data_prep/write_shards.py --min_shards "
            f"{world_size}, or {other_ranks}."
        )
    else:
        remedy = f"The number of streams is a power of two, or three times one: {other_ranks}."
    raise ValueError(f"the data has {num_streams} streams, which {world_size} ranks cannot share evenly. {remedy}")


def stream_config(recipe: Recipe, schedule: RunSchedule, corpus: Corpus, num_streams: int) -> StreamConfig:
    """The shapes of a batch, from the recipe and the corpus."""
    data, masking = recipe.data, schedule.masking
    max_documents = {
        length: default_max_documents(corpus, data.micro_batch_tokens, length)
        if data.max_documents == "auto"
        else data.max_documents
        for length, _ in data.lengths
    }
    return StreamConfig(
        bin_tokens=data.micro_batch_tokens,
        schedule=schedule.stages,
        max_documents=max_documents,
        max_masked=masked_count(data.micro_batch_tokens, masking.highest),
        masking=masking,
        truncate=data.documents == "truncate",
        seed=recipe.run.seed,
        num_streams=num_streams,
    )
