"""Open and restore a run: its plan, its training state, and the services that act on them."""

from dataclasses import dataclass, field
from pathlib import Path

import deepspeed
import torch

from megabert.config.recipe import Recipe
from megabert.data.ranks import choose_streams
from megabert.data.shards.source import Corpus
from megabert.data.stream import Position
from megabert.files.checkpoint_format import State
from megabert.files.redact import redact_all
from megabert.files.run_format import RESULT, write_run_file
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.training.checkpointing.resume import Checkpoint, find_start
from megabert.training.checkpointing.writer import CheckpointWriter, Retention, check_disk_space, set_aside_after
from megabert.training.corpora import choose_max_documents, open_corpora
from megabert.training.distributed.deepspeed_compat import free_accumulators, num_parameters
from megabert.training.distributed.device import device_name, event_class
from megabert.training.distributed.heartbeat import progress
from megabert.training.distributed.signals import StopSignals
from megabert.training.distributed.sync import (
    broadcast_from_rank0,
    check_shared_folder,
    gather_hosts,
    lock_output_dir,
)
from megabert.training.engine import model_of, start_engine
from megabert.training.evaluate import Evaluation, HeldOut, open_held_out
from megabert.training.feed import Feed, stream_config
from megabert.training.micro_batch.graph import MicroBatchGraph
from megabert.training.plan import RunPlan
from megabert.training.run_schedule import part_of_time, shared_batches
from megabert.training.telemetry import probe
from megabert.training.telemetry.flops import peak_flops
from megabert.training.telemetry.probe import ProbeRunner
from megabert.training.telemetry.provenance import start_messages, write_run_json
from megabert.training.telemetry.reporter import Meter, Reporter
from megabert.training.telemetry.straggler import Straggler
from megabert.training.telemetry.timers import TimeBudget
from megabert.training.telemetry.trackers import open_trackers
from megabert.training.telemetry.unigram import UnigramWatch
from megabert.training.unsupported import why_no_trackers
from megabert.training.updates.guard import Guard, UpdateGate


@dataclass
class TrainState:
    """The values that change while a run trains.

    A checkpoint saves all but branched_from and the evaluation, of which it saves the loss if it is that of its step.
    """

    guard: Guard
    time_budget: TimeBudget
    step: int = 0
    """optimizer steps done"""
    saved_step: int = 0
    """step of the newest checkpoint"""
    branched_from: Path | None = None
    """the checkpoint of another run that this process has started from"""
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

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, or branch off from it."""
        saved, self.positions = checkpoint.state, checkpoint.positions
        self.branched_from = checkpoint.path if checkpoint.branched else None
        self.guard.restore(saved.guard)
        self.time_budget.resume(saved.wall_seconds, saved.max_step_seconds, saved.schedule_start_seconds)
        self.step, self.saved_step, self.next_index = saved.step, saved.step, saved.next_index
        self.tokens, self.seconds = saved.tokens, saved.seconds
        self.rolled_back_bins = [(first, last) for first, last in saved.rolled_back_bins]

    def roll_back(self, checkpoint: Checkpoint) -> None:
        """Return to a checkpoint, but skip the bins used since then and keep counting their tokens and time."""
        saved, self.positions = checkpoint.state, checkpoint.positions
        self.rolled_back_bins.append((saved.next_index, self.next_index))
        self.guard.restore(saved.guard | {"skipped": self.guard.skipped, "in_a_row": 0})
        self.step = self.saved_step = saved.step


@dataclass
class Run:
    """All parts of a run. A rollback replaces the engine and the graph; the other services stay."""

    plan: RunPlan
    state: TrainState
    feed: Feed
    held_out: HeldOut
    engine: deepspeed.DeepSpeedEngine
    graph: MicroBatchGraph | None
    """None: micro-batches are computed through the engine"""
    gate: UpdateGate
    writer: CheckpointWriter
    signals: StopSignals
    meter: Meter
    model_config: MegaBertConfig
    peak_flops: float | None
    """FLOP/s of this rank's device, if known"""
    reporter: Reporter | None
    """only on rank 0"""
    straggler: Straggler
    unigram_watch: UnigramWatch
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
        """Return the contents of a checkpoint's state.json."""
        plan, state = self.plan, self.state
        return State(
            step=state.step,
            next_index=state.next_index,
            tokens=state.tokens,
            seconds=state.seconds,
            wall_seconds=state.time_budget.used,
            max_step_seconds=state.time_budget.max_step,
            schedule_start_seconds=state.time_budget.schedule_start,
            world_size=plan.world_size,
            num_streams=self.feed.config.num_streams,
            max_documents=self.feed.config.max_documents,
            batches_per_step=plan.schedule.batches_per_step,
            total_steps=plan.schedule.total_steps,
            corpus=self.feed.corpus.fingerprint,
            recipe=redact_all(plan.recipe.to_dict()),
            ds_config=plan.ds_config.settings,
            zero_stage=plan.ds_config.zero_stage,
            model=self.model_config.to_dict(),
            optimizer_source=plan.optimizer.source,
            guard=state.guard.to_json(),
            rolled_back_bins=list(state.rolled_back_bins),
            time_table=None if plan.schedule.timed is None else plan.schedule.timed.table.to_json(),
            heldout_loss=state.evaluation.loss if state.evaluation and state.evaluated_step == state.step else None,
        )

    def write_result(self, evaluation: Evaluation) -> None:
        """Write the run's final figures to result.json. evaluation: of the last step."""
        state = self.state
        result = {
            "steps": state.step,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "tokens_per_second": state.tokens / state.seconds,
            "unigram_loss": self.held_out.unigram_loss,
            "heldout_loss": evaluation.loss,
            "masked_accuracy": evaluation.accuracy,
            "skipped_updates": state.guard.skipped,
        }
        write_run_file(self.plan.output_dir / RESULT, result)


def build_run(plan: RunPlan, signals: StopSignals) -> Run:
    """Open the data, build the engine and the services, and restore the checkpoint that the run starts from, if any."""
    recipe, rank, world_size = plan.recipe, plan.rank, plan.world_size
    if problem := why_no_trackers(recipe.run.trackers):
        raise ValueError(problem)
    state = TrainState(Guard(recipe.run.max_norm_ratio), TimeBudget(plan.budget_s))
    progress.enter("checking the output folder")
    check_shared_folder(plan.checkpoints, rank, world_size)
    lock_output_dir(plan.output_dir, rank, world_size)
    progress.enter("opening the corpus")
    corpus, held_out_corpus = broadcast_from_rank0(lambda: open_inputs(recipe), rank, world_size)
    progress.enter("checking the checkpoint", long=True)
    checkpoint = find_start(recipe.run, plan.checkpoints, plan.identity, corpus, rank)
    if checkpoint is not None:
        state.restore(checkpoint)
        restore_schedule(plan, checkpoint, state.time_budget)
    feed = make_feed(plan, corpus, checkpoint)
    # The feed opens before the model is built: its workers fork from a small process, and have batches ready in time.
    feed.open(state.positions, state.next_index)
    progress.enter("reading held-out text")
    held_out = open_held_out(recipe, held_out_corpus, corpus, feed.config, rank, world_size)
    gate = UpdateGate(state.guard, recipe.optimizer.max_grad_norm)
    progress.enter("building the model")
    engine = start_engine(plan, corpus, gate, checkpoint)
    model = model_of(engine)
    num_weights = num_parameters(model)
    reporter = open_reporter(plan, state.step) if rank == 0 else None
    precision = torch.bfloat16 if plan.ds_config.bf16 else torch.float32
    run = Run(
        plan=plan,
        state=state,
        feed=feed,
        held_out=held_out,
        engine=engine,
        graph=open_graph(plan, engine),
        gate=gate,
        writer=open_writer(plan, num_weights, reporter),
        signals=signals,
        meter=Meter(event_class()),
        model_config=model.config,
        peak_flops=peak_flops(plan.device, device_name(plan.device), model.config, precision),
        reporter=reporter,
        straggler=Straggler(gather_hosts(world_size)),
        unigram_watch=UnigramWatch(corpus.token_shares, recipe.optimizer),
    )
    if reporter is not None:
        for message in start_messages(plan, corpus, feed.config.num_streams, num_weights, checkpoint):
            reporter.log_line(message)
        write_run_json(plan, corpus, held_out_corpus, state.step)
        set_aside_after(plan.checkpoints, state.step)
        run.probe_runner = open_probe_runner(plan, reporter, state.step)
    return run


def restore_schedule(plan: RunPlan, checkpoint: Checkpoint, time_budget: TimeBudget) -> None:
    """Let a run whose length is given in hours continue with the schedule of its bins.

    A branch of another length has a new one: its data do not depend on its length, and its masking begins anew.
    """
    timed, saved = plan.schedule.timed, checkpoint.state
    if timed is None:
        return
    if saved.time_table is not None and saved.recipe["run"].get("max_hours") == plan.recipe.run.max_hours:
        timed.table.restore(saved.time_table)
    else:
        timed.table.begin(part_of_time(time_budget.share_of_schedule), saved.next_index)


def open_inputs(recipe: Recipe) -> tuple[Corpus, Corpus]:
    """Open the training and the held-out corpus, and check the probe's data. Raises ValueError for unusable ones."""
    corpora = open_corpora(recipe.data)
    probe.check_probe(recipe.probe)
    return corpora


def make_feed(plan: RunPlan, corpus: Corpus, checkpoint: Checkpoint | None) -> Feed:
    """Make this rank's feed. A resumed run has as many data streams as before, on any number of ranks, and its bins."""
    data = plan.recipe.data
    saved = checkpoint.state.num_streams if checkpoint else None
    num_streams = choose_streams(
        data.ranks, data.num_workers, plan.world_size, saved, shared_batches(plan.recipe.data, plan.schedule)
    )
    max_documents = choose_max_documents(data, corpus, checkpoint.state if checkpoint else None)
    return Feed(
        corpus,
        stream_config(plan.recipe, plan.schedule, max_documents, num_streams),
        rank=plan.rank,
        world_size=plan.world_size,
        num_workers=data.num_workers,
        pin_memory=plan.device.type != "cpu",
    )


def open_probe_runner(plan: RunPlan, reporter: Reporter, step: int) -> probe.ProbeRunner | None:
    """Start the probe if the recipe has one. step: where the run starts or resumes."""
    if plan.recipe.probe.task is None:
        return None
    # No operation is fused on a CPU, where the probe runs.
    ops = "torch" if plan.recipe.run.ops == "torch" else "auto"
    return probe.ProbeRunner(plan.recipe.probe, ops, plan.output_dir, reporter, step)


def open_reporter(plan: RunPlan, step: int) -> Reporter:
    """Open the reporter with the recipe's trackers. step: where the run starts or resumes."""
    folder = plan.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    open_ones = open_trackers(plan.recipe.run.trackers, folder, step, redact_all(plan.recipe.to_dict()))
    return Reporter(folder, plan.schedule.total_steps, step, open_ones)


def open_graph(plan: RunPlan, engine: deepspeed.DeepSpeedEngine) -> MicroBatchGraph | None:
    """Prepare the CUDA graph of the engine's micro-batches, if the plan has one."""
    if plan.why_no_graphs is not None:
        return None
    free_accumulators(engine)
    return MicroBatchGraph(model_of(engine), plan.ds_config.bf16)


def open_writer(plan: RunPlan, num_parameters: int, reporter: Reporter | None) -> CheckpointWriter:
    """Check the room for checkpoints, and open this rank's writer."""
    progress.enter("connecting the ranks by gloo, whose interface GLOO_SOCKET_IFNAME names")
    settings = plan.recipe.run
    retention = Retention(settings.keep_checkpoints, settings.keep_every_steps, settings.keep_best)
    check_disk_space(plan.checkpoints, num_parameters, plan.ds_config.zero_stage, retention, plan.rank)
    return CheckpointWriter(
        plan.checkpoints, retention, settings.async_save, reporter.log_line if reporter else _discard, plan.rank
    )


def _discard(_: str) -> None:
    """Print nothing: only rank 0 reports."""
