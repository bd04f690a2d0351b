"""All that a training run holds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed

from megabert.config.recipe import Recipe
from megabert.data.batch import PackedBatch
from megabert.data.schedule import BatchSchedule
from megabert.data.shards.source import Corpus
from megabert.data.stream import Position
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training.checkpointing.writer import Saver
from megabert.training.distributed.signals import Interrupts
from megabert.training.evaluate import Evaluation
from megabert.training.feed import Batches, Feed
from megabert.training.optim.guard import Guard, Verdict
from megabert.training.telemetry.probe import Prober
from megabert.training.telemetry.reporter import Meter, Reporter
from megabert.training.telemetry.timers import Clock


@dataclass
class Run:
    """step: optimizer steps done; index: the next bin; positions: of this rank's streams; held_out: this rank's bins.

    step_batches: micro-batches of a full step over all ranks. unigram: nats per token of guessing by frequency.
    peak: FLOP/s of this rank's device, where known. left_behind: ranges of bins that rollbacks skipped. reporter: rank 0's, None elsewhere;
    prober: rank 0's, where the recipe asks for one.
    evaluation, evaluated: the last one, and its step.
    """

    recipe: Recipe
    model: MegaBertForMaskedLM
    engine: deepspeed.DeepSpeedEngine
    ds_config: dict[str, Any]
    feed: Feed
    batches: Batches
    held_corpus: Corpus
    held_out: list[PackedBatch]
    step_batches: int
    total_steps: int
    unigram: float
    peak: float | None
    meter: Meter
    verdict: Verdict
    interrupts: Interrupts
    reporter: Reporter | None
    saver: Saver
    clock: Clock
    positions: dict[int, Position]
    step: int = 0
    index: int = 0
    tokens: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    prober: Prober | None = None
    evaluation: Evaluation | None = None
    evaluated: int = -1
    left_behind: list[tuple[int, int]] = field(default_factory=list)
    stopped: str | None = None

    @property
    def is_finished(self) -> bool:
        return self.step >= self.total_steps or self.clock.is_over

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.run.output_dir)

    @property
    def checkpoints(self) -> Path:
        return self.output_dir / "checkpoints"

    @property
    def corpus(self) -> Corpus:
        return self.feed.corpus

    @property
    def plan(self) -> BatchSchedule:
        return self.feed.config.schedule

    @property
    def world_size(self) -> int:
        return self.feed.world_size

    @property
    def guard(self) -> Guard:
        return self.verdict.guard

    def say(self, message: str) -> None:
        """A line in the log, once for all ranks."""
        if self.reporter is not None:
            self.reporter.say(message)
