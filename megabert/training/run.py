"""A run: its plan, its training state, and the services that act on them."""

from dataclasses import dataclass, field

import deepspeed

from megabert.data.stream import Position
from megabert.files.checkpoint_format import State
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.training.checkpointing.writer import CheckpointWriter
from megabert.training.distributed.signals import StopSignals
from megabert.training.evaluate import Evaluation, HeldOut
from megabert.training.feed import Feed
from megabert.training.optim.guard import Guard, UpdateGate
from megabert.training.plan import RunPlan
from megabert.training.telemetry.probe import ProbeRunner
from megabert.training.telemetry.reporter import Meter, Reporter
from megabert.training.telemetry.timers import TimeBudget


@dataclass
class TrainState:
    """The values that change while a run trains, all of which a checkpoint saves."""

    guard: Guard
    time_budget: TimeBudget
    step: int = 0
    """optimizer steps done"""
    next_index: int = 0
    """the first bin not used yet"""
    positions: dict[int, Position] = field(default_factory=dict)
    """position of each of this rank's streams"""
    tokens: int = 0
    """real tokens seen"""
    seconds: float = 0.0
    """training time, without evaluation and saving"""
    rolled_back_bins: list[tuple[int, int]] = field(default_factory=list)
    """[first, last) ranges of bins that rollbacks skipped"""
    evaluation: Evaluation | None = None
    """the last evaluation of this process"""
    evaluated_step: int = -1

    def restore(self, saved: State, positions: dict[int, Position]) -> None:
        """Continue from a checkpoint. positions: of this rank's streams."""
        self.guard.restore(saved.guard)
        self.time_budget.resume(saved.wall_seconds, saved.max_step_seconds)
        self.step, self.next_index = saved.step, saved.next_index
        self.positions = positions
        self.tokens, self.seconds = saved.tokens, saved.seconds
        self.rolled_back_bins = [(first, last) for first, last in saved.rolled_back_bins]

    def roll_back(self, saved: State, positions: dict[int, Position]) -> None:
        """Return to a checkpoint, but skip the bins used since then and keep counting their tokens and time."""
        self.rolled_back_bins.append((saved.next_index, self.next_index))
        self.guard.restore(saved.guard | {"skipped": self.guard.skipped, "in_a_row": 0})
        self.step = saved.step
        self.positions = positions


@dataclass
class Run:
    """All parts of a run. A rollback replaces the engine; the other services stay."""

    plan: RunPlan
    state: TrainState
    feed: Feed
    held_out: HeldOut
    engine: deepspeed.DeepSpeedEngine
    gate: UpdateGate
    writer: CheckpointWriter
    signals: StopSignals
    meter: Meter
    model_config: MegaBertConfig
    peak_flops: float | None
    """FLOP/s of this rank's device, if known"""
    reporter: Reporter | None
    """only on rank 0"""
    probe_runner: ProbeRunner | None = None
    """only on rank 0, and only if the recipe has a probe"""

    @property
    def is_finished(self) -> bool:
        return self.state.step >= self.plan.schedule.total_steps or self.state.time_budget.is_over

    def log_line(self, message: str) -> None:
        """Print a line of the log, once for all ranks."""
        if self.reporter is not None:
            self.reporter.log_line(message)

    def to_checkpoint(self) -> State:
        """The contents of a checkpoint's state.json."""
        plan, state = self.plan, self.state
        return State(
            step=state.step,
            next_index=state.next_index,
            tokens=state.tokens,
            seconds=state.seconds,
            wall_seconds=state.time_budget.used,
            max_step_seconds=state.time_budget.max_step,
            world_size=plan.world_size,
            num_streams=self.feed.config.num_streams,
            step_batches=plan.schedule.step_batches,
            total_steps=plan.schedule.total_steps,
            corpus=self.feed.corpus.fingerprint,
            recipe=plan.recipe.to_dict(),
            ds_config=plan.ds_config.settings,
            zero_stage=plan.ds_config.zero_stage,
            model=self.model_config.to_dict(),
            optimizer_source=plan.optimizer.source,
            guard=state.guard.to_json(),
            rolled_back_bins=list(state.rolled_back_bins),
            heldout_loss=state.evaluation.loss if state.evaluation and state.evaluated_step == state.step else None,
        )
