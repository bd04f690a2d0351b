"""The training loop: the story of a run."""

import gc
import json
import math
import time
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed

from megabert.config.recipe import Recipe
from megabert.data.batch import PackedBatch
from megabert.data.stream import DROPOUT, Position, philox
from megabert.files.atomic import write_atomically
from megabert.files.checkpoint_format import State, read_state
from megabert.training.build import prepare, rebuild
from megabert.training.checkpointing import resume
from megabert.training.checkpointing.writer import set_aside_after
from megabert.training.distributed.device import peak_memory_bytes
from megabert.training.distributed.signals import EXIT_REQUEUE, StopSignals
from megabert.training.distributed.watchdog import PeerWatchdog
from megabert.training.engine import choose
from megabert.training.evaluate import evaluate
from megabert.training.optim.lr_schedule import lr_factor
from megabert.training.optim.optimizers import peak_lr
from megabert.training.process import init_distributed
from megabert.training.provenance import write_run_json
from megabert.training.run import Run
from megabert.training.telemetry.flops import step_flops

RESULT = "result.json"
SKIPPED = "skipped.jsonl"  # one line per update that the guard refused
MOST_ROLLBACKS = 3  # to one checkpoint: what fails a fourth time is not the data


def train(run: Run) -> None:
    """Train to the end of the recipe, or until told to stop."""
    every = run.recipe.run
    while not run.is_finished and run.stopped is None:
        set_learning_rate(run)
        batches, before = next_batches(run)
        sums = take_step(run, batches)
        settle(run, batches, before, sums)
        if every.rollback_after and run.guard.skipped_in_a_row >= every.rollback_after:
            roll_back(run)
            continue
        last = run.is_finished or run.stopped is not None
        saving = run.step % every.save_every_steps == 0 or last
        if run.step % every.log_every_steps == 0 or saving:
            report(run)  # before a save too: nothing that is counted is left out of the checkpoint
        if run.step % every.eval_every_steps == 0 or run.is_finished or (saving and every.keep_best):
            check_held_out(run)
        if saving:
            save(run)
        if run.prober is not None:
            run.prober.poll()
    run.saver.wait()
    if run.prober is not None and run.is_finished:
        run.prober.finish()


def set_learning_rate(run: Run) -> None:
    """A function of the step alone, or of the share of the hours, so that no scheduler has a state of its own to lose."""
    config = run.recipe.optimizer
    step = run.step if run.clock.limit is None else int(run.clock.fraction_used * run.total_steps)
    factor = lr_factor(step, run.total_steps, config)
    run.lr = config.lr * factor
    assert run.engine.optimizer is not None, "an engine for training has one"
    for group in run.engine.optimizer.param_groups:
        group["lr"] = peak_lr(group, config) * factor


def next_batches(run: Run) -> tuple[list[PackedBatch], dict[int, Position]]:
    """This rank's micro-batches of the next step, and where their streams were before."""
    batches, before = [], {}
    step_batches = run.plan.at(run.index).step_batches
    with run.meter.timer.time("data"):
        for _ in range(step_batches // run.world_size):
            batch, stream, position = next(run.batches)
            before.setdefault(stream, run.positions.get(stream, Position()))
            run.positions[stream] = position
            batches.append(batch)
    run.index += step_batches
    return batches, before


def take_step(run: Run, batches: list[PackedBatch]) -> torch.Tensor:
    """Forward and backward of every micro-batch, and one update. Returns this rank's sums as in MaskedLoss, (3,) fp64."""
    num_masked = global_count(sum(batch.num_masked for batch in batches), run.engine.device)
    sums = torch.zeros(3, dtype=torch.float64, device=run.engine.device)
    run.verdict.start_step()
    timer = run.meter.timer
    for batch in batches:
        seed_dropout(run.recipe.run.seed, batch.index)
        # Said each time: in a batch warm-up, DeepSpeed's own count of micro-batches is another.
        run.engine.set_gradient_accumulation_boundary(batch is batches[-1])
        with timer.time("forward"):
            output = run.engine(**batch.model_inputs(run.engine.device))
            # The mean over all masked tokens of the global batch: DeepSpeed averages over ranks, so undo that.
            scale = run.world_size / num_masked
            # A loss that is not finite may have gradients that are: times NaN, the guard refuses them on every rank.
            loss = output.loss_sum * torch.where(output.loss_sum.isfinite(), scale, math.nan)
        with timer.time("backward"):
            run.engine.backward(loss, scale_wrt_gas=False)
        with timer.time("optimizer"):
            run.engine.step()
        sums += torch.stack([part.detach().double() for part in output])
    return sums


def global_count(value: int, device: torch.device) -> torch.Tensor:
    """Sum over ranks, at least 1, left on the device: nothing waits for it."""
    total = torch.tensor(float(value), device=device)
    deepspeed.comm.all_reduce(total)
    return total.clamp(min=1)  # a batch without a masked token has a loss of 0, not 0 / 0


def seed_dropout(seed: int, index: int) -> None:
    """Make a bin's dropout a function of (seed, index), whichever rank computes it."""
    torch.manual_seed(int(philox(seed, DROPOUT, index).integers(1 << 63)))


def settle(run: Run, batches: list[PackedBatch], before: dict[int, Position], sums: torch.Tensor) -> None:
    """Agree with all ranks on what the step was, and whether to go on: one all-reduce, one read of the host."""
    told, failed = float(run.interrupts.reason is not None), float(run.saver.problem is not None)
    tokens, slots = sum(batch.num_tokens for batch in batches), len(batches) * run.recipe.data.micro_batch_tokens
    used = run.clock.elapsed() if run.feed.rank == 0 else 0.0
    mine = [tokens, slots, sum(batch.sum_squared_lengths for batch in batches), told, failed, used]
    packed = torch.cat([sums, torch.tensor(mine, dtype=torch.float64, device=run.engine.device)])
    with run.meter.timer.time("agree"):
        deepspeed.comm.all_reduce(packed)
    *counted, stopping, failing, used = packed.tolist()  # synchronises
    run.step += 1
    run.clock.update(used)
    if failing:
        run.saver.wait()  # raises on every rank
    if stopping:
        run.stopped = run.interrupts.reason or "another rank was told to stop"
    if run.verdict.finish_step():
        run.meter.add_step(counted)
        run.meter.local_tokens += tokens
    else:
        note_skipped(run, before, counted[0] / max(1.0, counted[2]))


def note_skipped(run: Run, before: dict[int, Position], loss: float) -> None:
    """Say that an update was not made, and write down which bins were behind it and where they come from."""
    parts: list[Any] = [None] * run.world_size
    torch.distributed.all_gather_object(parts, {stream: position.to_json() for stream, position in before.items()})
    last = run.index
    first = last - run.plan.at(last - 1).step_batches
    run.say(
        f"step {run.step}: update skipped, gradient norm {run.verdict.norm:.3g}, loss {loss:.3f}, bins {first} to {last - 1}"
    )
    if run.reporter is not None:
        positions = {stream: position for part in parts for stream, position in part.items()}
        facts = {"step": run.step, "bins": [first, last], "norm": repr(run.verdict.norm), "loss": repr(loss)}
        run.reporter.append_json(SKIPPED, facts | {"positions": positions})


def roll_back(run: Run) -> None:
    """Go back to the newest checkpoint before the refused updates, and on past the bins that led there.

    Raises ValueError if there is none, or if going back to it has not helped.
    """
    refused = run.guard.skipped_in_a_row
    run.saver.wait()
    path = resume.newest(run.checkpoints, up_to=run.step - refused)
    if path is None:
        raise ValueError(
            f"{refused} updates in a row were refused, and {run.checkpoints} has no checkpoint to go back to."
        )
    state = read_state(path)
    if sum(first == state.next_index for first, _ in run.left_behind) >= MOST_ROLLBACKS:
        raise ValueError(
            f"{refused} updates in a row were refused, for the {MOST_ROLLBACKS + 1}th time after {path}: not the data's fault. "
            "Lower optimizer.lr, or look at skipped.jsonl."
        )
    rebuild(run, path)
    positions = resume.read_positions(path)
    run.left_behind.append((state.next_index, run.index))
    del run.batches  # and with it its workers
    gc.collect()
    run.batches = run.feed.open(positions, run.index)
    run.positions = run.feed.mine(positions)
    skipped = run.guard.skipped
    run.guard.restore(state.guard | {"skipped": skipped, "in_a_row": 0})
    run.step = state.step
    if run.reporter is not None:
        set_aside_after(run.checkpoints, run.step)
    if run.prober is not None:
        run.prober.discard_after(run.step)
    run.say(f"rolled back to {path} after {refused} refused updates; going on at bin {run.index}")


def report(run: Run) -> None:
    """Write one line of the log."""
    meter = run.meter
    seconds = meter.seconds()
    run.tokens += int(meter.tokens)
    run.seconds += seconds
    parts, steps = meter.timer.totals(), max(1, meter.steps)
    ranks = of_every_rank(run, parts)
    values = {
        "loss": meter.loss_sum / max(1.0, meter.num_targets),
        "masked_accuracy": meter.num_correct / max(1.0, meter.num_targets),
        "lr": run.lr,
        "masked_share": meter.num_targets / max(1.0, meter.tokens),
        "grad_norm": run.verdict.norm,
        "skipped_updates": run.guard.skipped,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "tokens_per_s": meter.tokens / seconds,
        "tokens_per_s_per_rank": meter.tokens / seconds / run.world_size,
        "slowest_rank": ranks.speeds.min().item(),
        "fastest_rank": ranks.speeds.max().item(),
        "seconds_per_step": seconds / steps,
        "fill": meter.tokens / max(1.0, meter.slots),
        "loader_wait": parts["data"] / seconds,
        **{f"time/{part}": spent / steps for part, spent in parts.items()},
        "memory_gb": peak_memory_bytes(run.engine.device) / 1e9,
        **model_flops(run, seconds),
        "skipped_chunks": ranks.skipped,
    }
    if run.reporter is not None and meter.steps:
        if run.clock.limit is not None:
            left = max(0.0, run.clock.limit - run.clock.used)
            run.reporter.set_total_steps(run.step + round(left / values["seconds_per_step"]))
        run.reporter.log_step(run.step, values)
    meter.reset()


class Ranks(NamedTuple):
    """speeds: of each rank alone, real tokens per second of loading and forward, (ranks,); skipped: chunks, of all ranks."""

    speeds: torch.Tensor
    skipped: float


def of_every_rank(run: Run, parts: dict[str, float]) -> Ranks:
    """What each rank says of itself. In the other parts of a step all take as long as the slowest, whom they wait for."""
    own = max(parts["data"] + parts["forward"], 1e-9)  # nothing was done where nothing is counted
    skipped = float(sum(position.skipped for position in run.positions.values()))
    table = torch.zeros(run.world_size, 2, dtype=torch.float64, device=run.engine.device)
    table[run.feed.rank] = torch.tensor([run.meter.local_tokens / own, skipped], dtype=torch.float64)
    deepspeed.comm.all_reduce(table)
    return Ranks(table[:, 0], table[:, 1].sum().item())


def model_flops(run: Run, seconds: float) -> dict[str, float]:
    """MFU: the rate of needed FLOPs over what all ranks' devices could do. Nothing where that is not known."""
    if run.peak is None:
        return {}
    meter = run.meter
    needed = step_flops(run.model.config, meter.tokens, meter.num_targets, meter.squared_lengths)
    return {"mfu": needed / (seconds * run.peak * run.world_size)}


def check_held_out(run: Run) -> None:
    """Evaluate, and say how far below the unigram bar the loss is."""
    began = time.perf_counter()
    run.evaluation, run.evaluated = evaluate(run.engine, run.held_out), run.step
    if run.reporter is not None:
        loss, accuracy, masked = run.evaluation
        run.reporter.log_metrics(run.step, {"heldout_loss": loss, "heldout_accuracy": accuracy, "tokens": run.tokens})
        run.reporter.log_line(
            f"step {run.step}: held-out loss {loss:.3f} (unigram {run.unigram:.3f}, {run.unigram - loss:+.3f} nats better), "
            f"accuracy {accuracy:.3f}, {masked:,} masked tokens"
        )
    run.meter.excluded_seconds += time.perf_counter() - began


def save(run: Run) -> None:
    """Begin to write a checkpoint; with run.async_save it is there some steps later."""
    began = time.perf_counter()
    state = State(
        step=run.step,
        next_index=run.index,
        tokens=run.tokens,
        seconds=run.seconds,
        world_size=run.world_size,
        num_streams=run.feed.config.num_streams,
        step_batches=run.step_batches,
        total_steps=run.total_steps,
        corpus=run.corpus.fingerprint,
        recipe=run.recipe.to_dict(),
        ds_config=run.ds_config,
        model=run.model.config.to_dict(),
        adamw=choose(run.recipe, run.ds_config).source,
        guard=run.guard.to_json(),
        left_behind=list(run.left_behind),
        used=run.clock.used,
        slowest=run.clock.max_step,
        heldout_loss=run.evaluation.loss if run.evaluation and run.evaluated == run.step else None,
    )
    run.saver.save(run.engine, state, run.positions, run.corpus.sources[0])
    if run.prober is not None:
        run.prober.checkpoint_saved(run.step)
    run.meter.excluded_seconds += time.perf_counter() - began


def pretrain(recipe: Recipe, raw_ds_config: dict[str, Any], ds_config_path: str, interrupts: StopSignals) -> int:
    """Run a recipe from its start, or from its last checkpoint, to its end. Every rank calls this.

    interrupts: this process's; SIGTERM and SIGUSR1 belong to it from now on.
    Returns the exit code: 0 at the end, EXIT_REQUEUE where it was told to stop, and saved. Raises ValueError for what the user
    can mend: the corpus, the recipe, the ds_config, the checkpoint.
    """
    rank, world_size = init_distributed()
    with PeerWatchdog(rank, world_size):
        run = prepare(recipe, raw_ds_config, ds_config_path, rank, world_size, interrupts)
        return carry_out(run)


def carry_out(run: Run) -> int:
    """Train what is prepared, and leave the results. Returns the exit code."""
    if run.reporter is not None:
        write_run_json(run, resumed=run.step > 0)
    try:
        train(run)
        if run.stopped is not None:
            run.say(f"stopped at step {run.step}: {run.stopped}; saved, the same command goes on")
    finally:
        if run.prober is not None:
            run.prober.stop()
        if run.reporter is not None:
            run.reporter.close()
    if run.stopped is None:
        finish(run)
    leave(run)
    return 0 if run.stopped is None else EXIT_REQUEUE


def finish(run: Run) -> None:
    """Leave the run's figures beside its checkpoints. Raises ValueError, on all ranks, if no update was ever made."""
    if not run.guard.norms:
        raise ValueError(
            f"all {run.step} updates were refused, see {SKIPPED} in {run.output_dir}: the weights are still the first ones."
        )
    if run.evaluation is None:  # a finished run, started again
        run.evaluation = evaluate(run.engine, run.held_out)
    if run.reporter is not None:
        result = {
            "steps": run.step,
            "tokens": run.tokens,
            "seconds": run.seconds,
            "tokens_per_second": run.tokens / run.seconds,
            "unigram_loss": run.unigram,
            "heldout_loss": run.evaluation.loss,
            "masked_accuracy": run.evaluation.accuracy,
            "skipped_updates": run.guard.skipped,
        }
        write_atomically(run.output_dir / RESULT, json.dumps(result, indent=1).encode())


def leave(run: Run) -> None:
    """End the process group together: a rank that leaves early makes the others fail."""
    del run.batches
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()
