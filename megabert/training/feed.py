"""Load this rank's batches of the training data, and set their shapes."""

import gc
import multiprocessing
import multiprocessing.process
from collections.abc import Iterator

from megabert.config.recipe import Recipe
from megabert.data.batch import PackedBatch
from megabert.data.masking import masked_count
from megabert.data.shards.source import Corpus
from megabert.data.stream import PREFETCHED, BatchStream, Position, StreamConfig, open_loader
from megabert.process.error_text import first_line
from megabert.training.distributed.watchdog import RankLostError
from megabert.training.run_schedule import RunSchedule


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

    @property
    def prefetched(self) -> int:
        """The most bins that all ranks' workers make before they are trained on."""
        return self.num_workers * PREFETCHED * self.world_size

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
        """Return the next batch, the number of its stream, and the stream's position after it.

        Raises RankLostError if the loader gives nothing for minutes, or if one of its workers died.
        """
        try:
            return next(self.batches)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            raise RankLostError(
                f"data.train: rank {self.rank} gets no more batches: {first_line(error)}. If a worker was "
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


def stream_config(
    recipe: Recipe, schedule: RunSchedule, max_documents: dict[int, int], num_streams: int
) -> StreamConfig:
    """Return the shapes of a batch. max_documents: from `choose_max_documents`."""
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
