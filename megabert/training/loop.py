"""Train, evaluate, save and roll back: the main loop."""

import gc
import time
from typing import Any

import deepspeed
import torch
import torch.distributed

from megabert.config.ds_config import DsConfig
from megabert.config.recipe import Recipe
from megabert.data.batch import PackedBatch
from megabert.data.stream import Position
from megabert.process.exit_codes import EXIT_REQUEUE
from megabert.training.checkpointing import resume
from megabert.training.checkpointing.writer import set_aside_after
from megabert.training.distributed.device import peak_memory_bytes, to_device
from megabert.training.distributed.heartbeat import progress
from megabert.training.distributed.process import init_distributed
from megabert.training.distributed.signals import PEER_REASON, StopRequested, StopSignals
from megabert.training.distributed.watchdog import PeerWatchdog
from megabert.training.engine import start_engine
from megabert.training.evaluate import evaluate
from megabert.training.feed import Feed
from megabert.training.micro_batch.choose import resolve_micro_batch
from megabert.training.micro_batch.step import eager_step, graph_step
from megabert.training.plan import RunPlan, make_plan
from megabert.training.run import Run, TrainState, build_run, open_graph
from megabert.training.run_schedule import RunSchedule, lr_factor
from megabert.training.telemetry.flops import step_flops
from megabert.training.updates.guard import DivergedError
from megabert.training.updates.optimizers import peak_lr

# One line for each update that the guard skipped.
SKIPPED = "skipped.jsonl"
# Rollbacks to one checkpoint; if updates are still skipped after them, the data is not the cause.
MAX_ROLLBACKS = 3


def train(run: Run) -> str | None:
    """Train to the end of the recipe, or until a stop is requested. Returns the reason of an early stop."""
    settings, state, stop_reason = run.plan.recipe.run, run.state, None
    while not run.is_finished and stop_reason is None:
        lr = set_learning_rate(run.engine, run.plan, state)
        done, stop_reason = train_step(run)
        if not done:
            run.feed.end_workers()
        elif settings.rollback_after and state.guard.skipped_in_a_row >= settings.rollback_after:
            roll_back(run)
            continue
        last = run.is_finished or stop_reason is not None
        saving = state.step > state.saved_step and (state.step % settings.save_every_steps == 0 or last)
        if state.step % settings.log_every_steps == 0 or saving:
            # Report before every save, so that the checkpoint contains all counts.
            report(run, lr)
        progress.step_done(state.step)
        due = done and state.step % settings.eval_every_steps == 0
        if due or run.is_finished or (saving and settings.keep_best):
            evaluate_held_out(run)
        if saving:
            save(run)
        if run.probe_runner is not None:
            run.probe_runner.poll()
    progress.enter("finishing", long=True)
    run.writer.wait()
    if run.probe_runner is not None and run.is_finished:
        run.probe_runner.finish()
    return stop_reason


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, plan: RunPlan, state: TrainState) -> float:
    """Set and return the learning rate. It depends on the step or the time budget only; it has no state."""
    config, schedule = plan.recipe.optimizer, plan.schedule
    step = state.step if schedule.timed is None else int(share_done(schedule, state) * schedule.total_steps)
    factor = lr_factor(step, schedule.total_steps, config)
    assert engine.optimizer is not None, "the engine was built without an optimizer"
    for group in engine.optimizer.param_groups:
        group["lr"] = peak_lr(group, config) * factor
    return config.lr * factor


def share_done(schedule: RunSchedule, state: TrainState) -> float:
    """Return the share of the run that is done: of its time, or else of its steps."""
    return state.step / schedule.total_steps if schedule.timed is None else state.time_budget.share_of_schedule


def train_step(run: Run) -> tuple[bool, str | None]:
    """Do one step. Returns whether it was done, and the reason to stop early, if there is one.

    If a stop is requested while a rank waits for data, the step is not done and the state is unchanged.
    """
    loaded = next_batches(run)
    num_masked = sum_masked(loaded, run.plan.world_size, run.engine.device)
    if loaded is None or num_masked is None:
        return False, run.signals.reason or PEER_REASON
    batches, before = advance_positions(run.state, loaded, run.plan.schedule)
    sums = take_step(run, batches, num_masked)
    stop_reason = reduce_counts(run, batches, before, sums)
    run.signals.first_step_done()
    return True, stop_reason


def next_batches(run: Run) -> list[tuple[PackedBatch, int, Position]] | None:
    """Load this rank's micro-batches of the next step, each with its stream and the stream's position after it.

    Returns None if a stop is requested while this rank waits for them.
    """
    plan, state = run.plan, run.state
    if plan.schedule.timed is not None:
        plan.schedule.timed.plan_ahead(state.next_index, state.time_budget.share_of_schedule, run.feed.prefetched)
    batches_per_step = plan.schedule.stages.at(state.next_index).batches_per_step
    try:
        with run.meter.timer.time("data"), run.signals.interrupting():
            return [next(run.feed) for _ in range(batches_per_step // plan.world_size)]
    except StopRequested:
        return None


def advance_positions(
    state: TrainState, loaded: list[tuple[PackedBatch, int, Position]], schedule: RunSchedule
) -> tuple[list[PackedBatch], dict[int, Position]]:
    """Advance the state by the loaded micro-batches of a step. Also returns their streams' positions before it."""
    before: dict[int, Position] = {}
    for _, stream, position in loaded:
        before.setdefault(stream, state.positions.get(stream, Position()))
        state.positions[stream] = position
    state.next_index += schedule.stages.at(state.next_index).batches_per_step
    return [batch for batch, _, _ in loaded], before


def take_step(run: Run, batches: list[PackedBatch], num_masked: torch.Tensor) -> torch.Tensor:
    """Run forward and backward for every micro-batch, then one update. Returns the MaskedLoss sums, (3,) fp64.

    num_masked: all ranks' number, from `sum_masked`.
    """
    run.gate.start_step()
    # The loss is the mean over all masked tokens of the global batch; DeepSpeed takes the average over ranks.
    scale = run.plan.world_size / num_masked
    seed, timed = run.plan.recipe.run.seed, run.meter.timer.time
    if run.graph is None:
        return eager_step(run.engine, batches, scale, seed, timed)
    return graph_step(run.engine, run.graph, batches, scale, seed, timed)


def sum_masked(
    loaded: list[tuple[PackedBatch, int, Position]] | None, world_size: int, device: torch.device
) -> torch.Tensor | None:
    """Sum the masked tokens of a step over ranks, at least 1; None if a rank has no batches.

    The host of one of several ranks waits for the others' data: at this moment the device has no work left.
    """
    progress.enter("waiting for the other ranks' data")
    counts = [float(sum(batch.num_masked for batch, _, _ in loaded or [])), float(loaded is None)]
    total, without_batches = packed = to_device(counts, torch.float32, device)
    # A batch without a masked token has a loss of 0, not 0 / 0.
    if world_size == 1:
        return None if loaded is None else total.clamp(min=1)
    deepspeed.comm.all_reduce(packed)
    return None if without_batches.item() else total.clamp(min=1)


def reduce_counts(run: Run, batches: list[PackedBatch], before: dict[int, Position], sums: torch.Tensor) -> str | None:
    """Add up the step's counts over all ranks, in one all-reduce that waits for the device once.

    before: positions of the streams before the step. sums: from `take_step`. Returns the reason to stop early, or None.
    """
    state, meter = run.state, run.meter
    stop_requested, save_failed = float(run.signals.reason is not None), float(run.writer.problem is not None)
    tokens, slots = sum(batch.num_tokens for batch in batches), len(batches) * run.plan.recipe.data.bin_tokens
    wall_seconds = state.time_budget.elapsed() if run.plan.rank == 0 else 0.0
    squared_lengths = sum(batch.sum_squared_lengths for batch in batches)
    own = [tokens, slots, squared_lengths, stop_requested, save_failed, wall_seconds]
    packed = torch.cat([sums, to_device(own, torch.float64, run.engine.device)])
    with meter.timer.time("agree"):
        deepspeed.comm.all_reduce(packed)
    # This waits for the device.
    *counts, any_stop, any_failure, wall_seconds = packed.tolist()
    state.step += 1
    state.time_budget.update(wall_seconds)
    if any_failure:
        progress.enter("saving", long=True)
        # The wait raises the error on every rank.
        run.writer.wait()
    if run.gate.finish_step():
        meter.add_step(counts)
        meter.local_tokens += tokens
    else:
        loss_sum, _, num_targets, *_ = counts
        log_skipped_update(run, before, loss_sum / max(1.0, num_targets))
    if not any_stop:
        return None
    return run.signals.reason or PEER_REASON


def log_skipped_update(run: Run, before: dict[int, Position], loss: float) -> None:
    """Report a skipped update, with its bins and the positions of their streams; every rank calls this."""
    step, end, norm = run.state.step, run.state.next_index, run.gate.norm
    first = end - run.plan.schedule.stages.at(end - 1).batches_per_step
    parts: list[Any] = [None] * run.plan.world_size
    torch.distributed.all_gather_object(parts, {stream: position.to_json() for stream, position in before.items()})
    if run.reporter is not None:
        run.reporter.log_line(
            f"step {step}: update skipped, gradient norm {norm:.3g}, loss {loss:.3f}, bins {first} to {end - 1}"
        )
        positions = {stream: position for part in parts for stream, position in part.items()}
        facts = {"step": step, "bins": [first, end], "norm": repr(norm), "loss": repr(loss)}
        run.reporter.append_json(SKIPPED, facts | {"positions": positions})


def roll_back(run: Run) -> None:
    """Return to the newest checkpoint before the skipped updates, and continue with the bins after theirs.

    Raises DivergedError if there is no checkpoint, or if rollbacks to it have not helped.
    """
    plan, state = run.plan, run.state
    skipped = state.guard.skipped_in_a_row
    progress.enter("rolling back", long=True)
    run.writer.wait()
    newest = resume.newest(plan.checkpoints, plan.rank, plan.world_size, up_to=state.step - skipped)
    path = newest or state.branched_from
    if path is None:
        raise DivergedError(
            f"{skipped} updates in a row were skipped, and {plan.checkpoints} has no checkpoint to return to. "
            "Lower optimizer.lr or run.save_every_steps."
        )
    checkpoint = resume.read_checkpoint(path, plan.rank, plan.world_size, branched=path == state.branched_from)
    if sum(first == checkpoint.state.next_index for first, _ in state.rolled_back_bins) >= MAX_ROLLBACKS:
        raise DivergedError(
            f"{skipped} updates in a row were skipped, again after {MAX_ROLLBACKS} rollbacks to {path}, so the data is "
            f"not the cause. Lower optimizer.lr, or look at {SKIPPED}."
        )
    run.gate.detach()
    run.graph = None
    run.engine.destroy()
    del run.engine
    gc.collect()
    run.engine = start_engine(plan, run.feed.corpus, run.gate, checkpoint)
    run.graph = open_graph(plan, run.engine)
    state.roll_back(checkpoint)
    run.feed.open(state.positions, state.next_index)
    if run.reporter is not None:
        set_aside_after(plan.checkpoints, state.step)
    if run.probe_runner is not None:
        run.probe_runner.discard_after(state.step)
    run.log_line(f"rolled back to {path} after {skipped} skipped updates; continuing at bin {state.next_index}")


def report(run: Run, lr: float) -> None:
    """Write one line of the log and one record of the metrics. lr: the learning rate of the last step."""
    progress.enter("reporting")
    state, meter, world_size = run.state, run.meter, run.plan.world_size
    seconds = meter.seconds()
    state.tokens += int(meter.tokens)
    state.seconds += seconds
    parts, steps = meter.timer.totals(), max(1, meter.steps)
    # Only the time of data and forward: in the other parts every rank waits for the slowest. It is 0 if no step was
    # counted.
    speed = meter.local_tokens / max(parts["data"] + parts["forward"], 1e-9)
    skipped = float(sum(position.skipped for position in state.positions.values()))
    ranks = gather_ranks(run.plan, [speed, skipped], run.engine.device)
    mfu = {}
    if run.peak_flops is not None:
        needed = step_flops(run.model_config, meter.tokens, meter.num_targets, meter.squared_lengths)
        mfu = {"mfu": needed / (seconds * run.peak_flops * world_size)}
    values = {
        "loss": meter.loss_sum / max(1.0, meter.num_targets),
        "masked_accuracy": meter.num_correct / max(1.0, meter.num_targets),
        "lr": lr,
        "masked_share": meter.num_targets / max(1.0, meter.tokens),
        "grad_norm": run.gate.norm,
        "skipped_updates": state.guard.skipped,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "tokens_per_s": meter.tokens / seconds,
        "tokens_per_s_per_rank": meter.tokens / seconds / world_size,
        "slowest_rank": min(speed for speed, _ in ranks),
        "fastest_rank": max(speed for speed, _ in ranks),
        "seconds_per_step": seconds / steps,
        "fill": meter.tokens / max(1.0, meter.slots),
        "loader_wait": parts["data"] / seconds,
        **{f"time/{part}": spent / steps for part, spent in parts.items()},
        "memory_gb": peak_memory_bytes(run.engine.device) / 1e9,
        **mfu,
        "skipped_chunks": sum(skipped for _, skipped in ranks),
    }
    log_warnings(run, values["loss"], [speed for speed, _ in ranks])
    if run.reporter is not None and meter.steps:
        if run.plan.schedule.timed is not None:
            left = state.time_budget.left / values["seconds_per_step"]
            run.reporter.set_total_steps(state.step + round(left))
        run.reporter.log_step(state.step, values)
    meter.reset()


def log_warnings(run: Run, loss: float, speeds: list[float]) -> None:
    """Log a slow rank, and a loss that stands at the unigram's.

    loss: the mean over the steps since the last report. speeds: each rank's tokens per second.
    """
    lines = [run.straggler.update(speeds)]
    if run.meter.steps:
        lines.append(run.unigram_watch.update(run.state.step, share_done(run.plan.schedule, run.state), loss))
    for line in lines:
        if line is not None:
            run.log_line(line)


def gather_ranks(plan: RunPlan, own: list[float], device: torch.device) -> list[list[float]]:
    """Gather a few numbers from every rank. The host waits for them once."""
    table = torch.zeros(plan.world_size, len(own), dtype=torch.float64, device=device)
    table[plan.rank] = to_device(own, torch.float64, device)
    deepspeed.comm.all_reduce(table)
    return table.tolist()


def evaluate_held_out(run: Run) -> None:
    """Evaluate, and report how far the loss is below the unigram loss."""
    progress.enter("evaluating")
    began = time.perf_counter()
    state, unigram = run.state, run.held_out.unigram_loss
    state.evaluation, state.evaluated_step = evaluate(run.engine, run.held_out.batches), state.step
    if run.reporter is not None:
        loss, accuracy, masked = state.evaluation
        run.reporter.log_metrics(
            state.step, {"heldout_loss": loss, "heldout_accuracy": accuracy, "tokens": state.tokens}
        )
        gain = f"{abs(unigram - loss):.3f} nats {'better' if loss <= unigram else 'worse'}"
        run.reporter.log_line(
            f"step {state.step}: held-out loss {loss:.3f} (unigram {unigram:.3f}, {gain}), accuracy {accuracy:.3f}, "
            f"{masked:,} masked tokens"
        )
    run.meter.excluded_seconds += time.perf_counter() - began


def save(run: Run) -> None:
    """Start to write a checkpoint; with run.async_save it is complete some steps later."""
    progress.enter("saving", long=True)
    began = time.perf_counter()
    run.writer.save(run.engine, run.to_checkpoint(), run.state.positions, run.feed.corpus.sources[0])
    run.state.saved_step = run.state.step
    if run.probe_runner is not None:
        run.probe_runner.checkpoint_saved(run.state.step)
    run.meter.excluded_seconds += time.perf_counter() - began


def pretrain(recipe: Recipe, ds_config: DsConfig, signals: StopSignals) -> int:
    """Run a recipe from its start, or from its last checkpoint, to its end. Every rank calls this.

    signals: its handlers must be installed. Returns the exit code: 0 at the end, or EXIT_REQUEUE after a
    requested stop, with a checkpoint saved. Raises ValueError for a corpus, recipe, ds_config or checkpoint that the
    user must change, and DivergedError, which is one, if too many updates were skipped.
    """
    rank, world_size = init_distributed()
    with PeerWatchdog(rank, world_size, signals, recipe.run.hang_timeout_s):
        progress.enter("choosing the micro-batch")
        recipe = resolve_micro_batch(recipe, ds_config, rank, world_size)
        plan = make_plan(recipe, ds_config, rank, world_size)
        run = build_run(plan, signals)
        return run_training(run)


def run_training(run: Run) -> int:
    """Train, and write the results. Returns the exit code."""
    state = run.state
    try:
        stop_reason = train(run)
        if stop_reason is not None:
            saved = "checkpoint saved, " if state.step else ""
            run.log_line(f"stopped at step {state.step}: {stop_reason}; {saved}run the same command to resume")
    finally:
        if run.probe_runner is not None:
            run.probe_runner.stop()
        if run.reporter is not None:
            run.reporter.close()
    if stop_reason is None:
        if not state.guard.norms:
            raise DivergedError(
                f"all {state.step} updates were skipped, see {SKIPPED} in {run.plan.output_dir}: the weights are still "
                "the initial ones. Lower optimizer.lr."
            )
        # A finished run that is started again has made no evaluation.
        evaluation = state.evaluation or evaluate(run.engine, run.held_out.batches)
        if run.reporter is not None:
            run.write_result(evaluation)
    shutdown(run.feed)
    return 0 if stop_reason is None else EXIT_REQUEUE


def shutdown(feed: Feed) -> None:
    """End the loader and the process group on all ranks together: a rank that ends early makes the others fail."""
    feed.close()
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()
