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
from megabert.data.shards.source import Corpus, check_same_tokenizer, open_corpus
from megabert.data.stream import BatchStream, Position, StreamConfig, default_max_documents, four_medians, open_loader
from megabert.files.checkpoint_format import State
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


def choose_max_documents(data: DataConfig, corpus: Corpus, saved: State | None) -> dict[int, int]:
    """Choose the most pieces of a bin, for each max_seq_len of the run. saved: of a resumed run, which keeps its bins.

    A bin that has that many pieces would have others with another number.
    """
    lengths, tokens, truncate = (
        [length for length, _ in data.lengths],
        data.bin_tokens,
        data.documents == "truncate",
    )
    if data.max_documents != "auto":
        return dict.fromkeys(lengths, data.max_documents)
    if saved is None:
        return {length: default_max_documents(corpus, tokens, length, truncate) for length in lengths}
    if saved.max_documents is None:
        return {length: four_medians(corpus, tokens, length) for length in lengths}
    return saved.max_documents


def stream_config(
    recipe: Recipe, schedule: RunSchedule, max_documents: dict[int, int], num_streams: int
) -> StreamConfig:
    """The shapes of a batch. max_documents: from `choose_max_documents`."""
    data, masking = recipe.data, schedule.masking
    return StreamConfig(
        bin_tokens=data.bin_tokens,
        schedule=schedule.stages,
        max_documents=max_documents,
        max_masked=masked_count(data.bin_tokens, masking.highest),
        masking=masking,
        truncate=data.documents == "truncate",
        seed=recipe.run.seed,
        num_streams=num_streams,
    )
