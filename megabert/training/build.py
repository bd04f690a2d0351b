"""Building a run: data, engine and services, restored from a checkpoint if there is one."""

import torch

from megabert.config.recipe import Recipe
from megabert.data.shards.source import Corpus, stream_count
from megabert.training.checkpointing.resume import Checkpoint, find_checkpoint
from megabert.training.checkpointing.writer import CheckpointWriter, Retention, check_disk_space, set_aside_after
from megabert.training.deepspeed_compat import num_parameters
from megabert.training.distributed.device import device_name, event_class
from megabert.training.distributed.signals import StopSignals
from megabert.training.distributed.sync import broadcast_from_rank0, check_shared_folder, lock_output_dir
from megabert.training.engine import model_of, start_engine
from megabert.training.evaluate import open_held_out
from megabert.training.feed import Feed, open_corpora, stream_config
from megabert.training.optim.guard import Guard, UpdateGate
from megabert.training.plan import RunPlan
from megabert.training.provenance import start_messages, write_run_json
from megabert.training.run import Run, TrainState
from megabert.training.telemetry import probe, trackers
from megabert.training.telemetry.flops import peak_flops
from megabert.training.telemetry.reporter import Meter, Reporter
from megabert.training.telemetry.timers import TimeBudget
from megabert.training.telemetry.trackers import open_trackers


def build_run(plan: RunPlan, signals: StopSignals) -> Run:
    """Open the data, build the engine and the services, and restore the newest checkpoint if there is one."""
    recipe, rank, world_size = plan.recipe, plan.rank, plan.world_size
    if problem := trackers.why_unavailable(recipe.run.trackers):
        raise ValueError(problem)
    state = TrainState(Guard(recipe.run.max_norm_ratio), TimeBudget(plan.budget_s))
    signals.install_handlers()
    check_shared_folder(plan.checkpoints, rank, world_size)
    lock_output_dir(plan.output_dir, rank, world_size)
    corpus, held_out_corpus = broadcast_from_rank0(lambda: open_inputs(recipe), rank, world_size)
    checkpoint = find_checkpoint(recipe.run.resume, plan.checkpoints, plan.identity, corpus.fingerprint, rank)
    if checkpoint is not None:
        state.restore(checkpoint.state, checkpoint.positions)
    feed = make_feed(plan, corpus, checkpoint)
    # Before the model: the loader's workers fork from a small process, and have batches ready when the model is built.
    feed.open(state.positions, state.next_index)
    held_out = open_held_out(recipe, held_out_corpus, corpus, feed.config, rank, world_size)
    gate = UpdateGate(state.guard, recipe.optimizer.max_grad_norm)
    engine = start_engine(plan, corpus, gate, checkpoint)
    model = model_of(engine)
    size = num_parameters(model)
    reporter = open_reporter(plan, state.step) if rank == 0 else None
    precision = torch.bfloat16 if plan.ds_config.bf16 else torch.float32
    run = Run(
        plan=plan,
        state=state,
        feed=feed,
        held_out=held_out,
        engine=engine,
        gate=gate,
        writer=open_writer(plan, size, reporter),
        signals=signals,
        meter=Meter(event_class()),
        model_config=model.config,
        peak_flops=peak_flops(plan.device, device_name(plan.device), model.config, precision),
        reporter=reporter,
    )
    if reporter is not None:
        for message in start_messages(plan, corpus, feed.config.num_streams, size, checkpoint):
            reporter.log_line(message)
        write_run_json(plan, corpus, held_out_corpus, state.step)
        set_aside_after(plan.checkpoints, state.step)
        run.probe_runner = open_probe_runner(plan, reporter, state.step)
    return run


def open_inputs(recipe: Recipe) -> tuple[Corpus, Corpus]:
    """Open the training and the held-out corpus, and check the probe's data. Raises ValueError for unusable ones."""
    corpora = open_corpora(recipe.data)
    probe.check_probe(recipe.probe)
    return corpora


def make_feed(plan: RunPlan, corpus: Corpus, checkpoint: Checkpoint | None) -> Feed:
    """Make this rank's feed. A resumed run has as many data streams as before, on any number of ranks."""
    data = plan.recipe.data
    num_streams = checkpoint.state.num_streams if checkpoint else stream_count(corpus.num_splits, data.max_streams)
    return Feed(
        corpus,
        stream_config(plan.recipe, plan.schedule, corpus, num_streams),
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
    open_ones = open_trackers(plan.recipe.run.trackers, folder, step, plan.recipe.to_dict())
    return Reporter(folder, plan.schedule.total_steps, step, open_ones)


def open_writer(plan: RunPlan, num_parameters: int, reporter: Reporter | None) -> CheckpointWriter:
    """Check the room for checkpoints, and open this rank's writer."""
    settings = plan.recipe.run
    retention = Retention(settings.keep_checkpoints, settings.keep_every_steps, settings.keep_best)
    check_disk_space(plan.checkpoints, num_parameters, plan.ds_config.zero_stage, retention)
    return CheckpointWriter(
        plan.checkpoints, retention, settings.async_save, reporter.log_line if reporter else _discard
    )


def _discard(_: str) -> None:
    """Print nothing: only rank 0 reports."""
