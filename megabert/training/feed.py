"""From a recipe to the batches that a run trains and is evaluated on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megabert.config.recipe import Recipe
from megabert.data.batch import PackedBatch
from megabert.data.masking import masked_count
from megabert.data.schedule import BatchSchedule, Length, MaskingRate, make_schedule
from megabert.data.shards.cache import CacheOptions
from megabert.data.shards.source import Corpus, check_same_tokenizer, open_corpus
from megabert.data.stream import (
    BatchStream,
    Position,
    StreamConfig,
    default_max_documents,
    filler_batch,
    held_out_batches,
    open_loader,
)

Batches = Iterator[tuple[PackedBatch, int, Position]]


@dataclass(frozen=True)
class Feed:
    """Where the run's batches come from. rank, world_size: of this process; pin_memory: for a device that copies."""

    corpus: Corpus
    config: StreamConfig
    rank: int
    world_size: int
    num_workers: int
    pin_memory: bool

    def open(self, positions: dict[int, Position], first_index: int) -> Batches:
        """This rank's batches from first_index on, its streams from these positions."""
        options = {"rank": self.rank, "world_size": self.world_size, "first_index": first_index}
        dataset = BatchStream(self.corpus, self.config, positions=positions, **options)
        return iter(open_loader(dataset, self.num_workers, self.pin_memory))

    def mine(self, positions: dict[int, Position]) -> dict[int, Position]:
        """Those of this rank's streams."""
        return {stream: position for stream, position in positions.items() if stream % self.world_size == self.rank}


def open_corpora(recipe: Recipe) -> tuple[Corpus, Corpus]:
    """The training corpus and the held-out one. Raises ValueError for what is missing or does not fit together."""
    data = recipe.data
    options = {
        "tokenizer": data.tokenizer,
        "cache": CacheOptions(Path(data.cache_dir), data.cache_gb << 30),
        "on_bad_shard": data.on_bad_shard,
    }
    corpus = open_corpus(data.corpora, **options)
    held = open_corpus([(data.heldout, 1.0)] if data.heldout else data.corpora, "heldout", **options)
    check_same_tokenizer(corpus.sources[0], held.sources[0])
    for source in corpus.sources:
        source.read_tokenizer_file()
    return corpus, held


def plan_of(recipe: Recipe, step_batches: int, total_steps: int) -> BatchSchedule:
    """The stages of the run: what a step is, and how long pieces may be."""
    data = recipe.data
    first = data.batch_warmup_from and data.batch_warmup_from // data.micro_batch_tokens
    lengths = [Length(*phase) for phase in data.lengths]
    return make_schedule(total_steps, step_batches, lengths, first_batches=first, warmup=data.batch_warmup)


def masking_rate(recipe: Recipe, plan: BatchSchedule, total_steps: int) -> MaskingRate:
    """The share of masked tokens over the run."""
    masking = recipe.masking
    if masking.schedule == "constant":
        return MaskingRate.constant(masking.mlm_probability)
    over = plan.bins_before(total_steps)
    return MaskingRate(masking.mlm_probability, masking.final_mlm_probability, over, masking.schedule)


def stream_config(
    recipe: Recipe, corpus: Corpus, plan: BatchSchedule, total_steps: int, num_streams: int
) -> StreamConfig:
    """The shapes of a batch, from the recipe and the corpus."""
    data = recipe.data
    masking = masking_rate(recipe, plan, total_steps)
    most = {
        length: default_max_documents(corpus, data.micro_batch_tokens, length)
        if data.max_documents == "auto"
        else data.max_documents
        for length, _ in data.lengths
    }
    return StreamConfig(
        bin_tokens=data.micro_batch_tokens,
        schedule=plan,
        max_documents=most,
        max_masked=masked_count(data.micro_batch_tokens, masking.highest),
        masking=masking,
        truncate=data.documents == "truncate",
        seed=recipe.run.seed,
        num_streams=num_streams,
    )


def open_held_out(recipe: Recipe, held: Corpus, config: StreamConfig) -> list[PackedBatch]:
    """Every rank's bins to evaluate on. Raises ValueError if there is nothing in them to predict."""
    most = max(1, recipe.run.eval_tokens // config.bin_tokens)
    batches = held_out_batches(held, config, recipe.masking.eval_mlm_probability, most)
    if not sum(batch.num_masked for batch in batches):
        raise ValueError(f"{held.name}: the held-out part has too few tokens to mask any. Hold out more of the corpus.")
    return batches


def share_of(
    batches: list[PackedBatch], recipe: Recipe, corpus: Corpus, config: StreamConfig, rank: int, world_size: int
) -> list[PackedBatch]:
    """This rank's part of the held-out bins, as many on every rank: ZeRO 3 computes together or not at all."""
    missing = -len(batches) % world_size
    probability = recipe.masking.eval_mlm_probability
    filler = [filler_batch(corpus.tokenizer, config, probability, len(batches) + i) for i in range(missing)]
    return (batches + filler)[rank::world_size]
