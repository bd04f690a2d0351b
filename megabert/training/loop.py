"""The training loop: the story of a run."""

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
import yaml

from megabert.checkpoint_format import State, read_state
from megabert.config import Recipe, batches_per_step, total_steps
from megabert.data.batch import PackedBatch
from megabert.data.manifest import write_atomically
from megabert.data.schedule import Plan
from megabert.data.shards import Corpus, stream_count
from megabert.data.stream import DROPOUT, BatchStream, Position, open_loader, philox
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training import checkpoint
from megabert.training.checkpoint import Course
from megabert.training.ds_config import fill
from megabert.training.engine import build_engine, build_model, has_fast_bf16, start_process, training_device
from megabert.training.evaluate import Evaluation, evaluate, unigram_loss
from megabert.training.feed import open_corpora, open_held_out, plan_of, share_of, stream_config
from megabert.training.metrics import Meter, Reporter
from megabert.training.schedules import lr_factor

log = logging.getLogger(__name__)

RESULT = "result.json"


@dataclass
class Run:
    """All that a training run holds. step: optimizer steps done; index: the next bin; positions: of this rank's streams."""

    recipe: Recipe
    model: MegaBertForMaskedLM
    engine: deepspeed.DeepSpeedEngine
    batches: Iterator[tuple[PackedBatch, int, Position]]
    held_out: list[PackedBatch]
    ds_config: dict[str, Any]
    corpus: Corpus
    rank: int
    world_size: int
    plan: Plan
    step_batches: int
    num_streams: int
    total_steps: int
    reporter: Reporter | None
    meter: Meter
    unigram: float
    positions: dict[int, Position]
    step: int = 0
    index: int = 0
    tokens: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    evaluation: Evaluation | None = None

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.run.output_dir)


def train(run: Run) -> None:
    """Train to the end of the recipe."""
    every = run.recipe.run
    while run.step < run.total_steps:
        set_learning_rate(run)
        take_step(run, next_batches(run))
        run.step += 1
        run.meter.steps += 1
        last = run.step == run.total_steps
        saving = run.step % every.save_every_steps == 0 or last
        if run.step % every.log_every_steps == 0 or saving:
            report(run)  # before a save too: nothing that is counted is left out of the checkpoint
        if run.step % every.eval_every_steps == 0 or last:
            check_held_out(run)
        if saving:
            save(run)


def set_learning_rate(run: Run) -> None:
    """A function of the step alone, so that no scheduler has a state of its own to lose."""
    run.lr = run.recipe.optimizer.lr * lr_factor(run.step, run.total_steps, run.recipe.optimizer)
    assert run.engine.optimizer is not None, "an engine for training has one"
    for group in run.engine.optimizer.param_groups:
        group["lr"] = run.lr


def take_step(run: Run, batches: list[PackedBatch]) -> None:
    """Forward and backward of every micro-batch, and one update of the weights."""
    num_masked = global_count(sum(batch.num_masked for batch in batches), run.engine.device)
    for batch in batches:
        seed_dropout(run.recipe.run.seed, batch.index)
        # Said each time: in a batch warm-up, DeepSpeed's own count of micro-batches is another.
        run.engine.set_gradient_accumulation_boundary(batch is batches[-1])
        output = run.engine(**batch.model_inputs(run.engine.device))
        # The mean over all masked tokens of the global batch: DeepSpeed averages over ranks, so undo that.
        loss = output.loss_sum * (run.world_size / num_masked)
        run.engine.backward(loss, scale_wrt_gas=False)
        run.engine.step()
        run.meter.add(output, batch.num_tokens, run.recipe.data.micro_batch_tokens)


def next_batches(run: Run) -> list[PackedBatch]:
    """This rank's micro-batches of the next step."""
    began = time.perf_counter()
    batches = []
    step_batches = run.plan.at(run.index).step_batches
    for _ in range(step_batches // run.world_size):
        batch, stream, position = next(run.batches)
        run.positions[stream] = position
        batches.append(batch)
    run.index += step_batches
    run.meter.waited += time.perf_counter() - began
    return batches


def global_count(value: int, device: torch.device) -> torch.Tensor:
    """Sum over ranks, at least 1, left on the device: nothing waits for it."""
    total = torch.tensor(float(value), device=device)
    deepspeed.comm.all_reduce(total)
    return total.clamp(min=1)  # a batch without a masked token has a loss of 0, not 0 / 0


def seed_dropout(seed: int, index: int) -> None:
    """Make a bin's dropout a function of (seed, index), whichever rank computes it."""
    torch.manual_seed(int(philox(seed, DROPOUT, index).integers(1 << 63)))


def report(run: Run) -> None:
    """Write one line of the log. Waits for the device."""
    meter = run.meter
    skipped = sum(position.skipped for position in run.positions.values())
    counts = torch.tensor([meter.tokens, meter.slots, skipped], dtype=torch.float64, device=run.engine.device)
    sums = torch.cat([meter.sums, counts])
    deepspeed.comm.all_reduce(sums)
    loss_sum, num_correct, num_targets, tokens, slots, skipped = sums.tolist()  # synchronises
    seconds = meter.seconds()
    run.tokens += int(tokens)
    run.seconds += seconds
    norm = run.engine.get_global_grad_norm()
    values = {
        "loss": loss_sum / num_targets,
        "masked_accuracy": num_correct / num_targets,
        "lr": run.lr,
        "masked_share": num_targets / tokens,
        "grad_norm": float("nan") if norm is None else float(norm),
        "tokens": run.tokens,
        "seconds": run.seconds,
        "tokens_per_s": tokens / seconds,
        "seconds_per_step": seconds / max(1, meter.steps),
        "fill": tokens / slots,
        "loader_wait": meter.waited / seconds,
        "skipped_chunks": skipped,
    }
    if run.reporter is not None:
        run.reporter.log(run.step, values)
    meter.reset()


def check_held_out(run: Run) -> None:
    """Evaluate, and say how far below the unigram bar the loss is."""
    began = time.perf_counter()
    run.evaluation = evaluate(run.engine, run.held_out)
    if run.reporter is not None:
        loss, accuracy, masked = run.evaluation
        run.reporter.record(run.step, {"heldout_loss": loss, "heldout_accuracy": accuracy, "tokens": run.tokens})
        run.reporter.say(
            f"step {run.step}: held-out loss {loss:.3f} (unigram {run.unigram:.3f}, {run.unigram - loss:+.3f} nats better), "
            f"accuracy {accuracy:.3f}, {masked:,} masked tokens"
        )
    run.meter.paused += time.perf_counter() - began


def save(run: Run) -> None:
    """Write a checkpoint."""
    began = time.perf_counter()
    state = State(
        step=run.step,
        next_index=run.index,
        tokens=run.tokens,
        seconds=run.seconds,
        world_size=run.world_size,
        num_streams=run.num_streams,
        step_batches=run.step_batches,
        total_steps=run.total_steps,
        corpus=run.corpus.fingerprint,
        recipe=run.recipe.to_dict(),
        ds_config=run.ds_config,
        model=run.model.config.to_dict(),
    )
    folder = run.output_dir / "checkpoints"
    path = checkpoint.save(
        run.engine, folder, state, run.positions, run.corpus.sources[0], run.recipe.run.keep_checkpoints
    )
    if run.reporter is not None:
        run.reporter.say(f"step {run.step}: saved {path}")
    run.meter.paused += time.perf_counter() - began


def pretrain(recipe: Recipe, raw_ds_config: dict[str, Any], ds_config_path: str) -> None:
    """Run a recipe from its start, or from its last checkpoint, to its end. Every rank calls this.

    Raises ValueError for what the user can mend: the corpus, the recipe, the ds_config, the checkpoint.
    """
    rank, world_size = start_process()
    run = prepare(recipe, raw_ds_config, ds_config_path, rank, world_size)
    if run.reporter is not None:
        write_run_json(run)
    try:
        train(run)
    finally:
        if run.reporter is not None:
            run.reporter.close()
    finish(run)


def prepare(recipe: Recipe, raw_ds_config: dict[str, Any], ds_config_path: str, rank: int, world_size: int) -> Run:
    """Open the data, build the model, and restore the newest checkpoint if there is one."""
    corpus, held = open_corpora(recipe)
    device = training_device()
    step_batches = batches_per_step(recipe, world_size)
    steps = total_steps(recipe, step_batches)
    stage = raw_ds_config.get("zero_optimization", {}).get("stage", 0)
    folder = Path(recipe.run.output_dir, "checkpoints")
    found = checkpoint.find(recipe, folder)
    state = read_state(found) if found else None
    if found and state:
        now = Course(corpus.fingerprint, stage, world_size, step_batches, steps)
        checkpoint.check_same_run(found, state, recipe, now)
    ds_config = fill(
        raw_ds_config,
        ds_config_path,
        accumulation=step_batches // world_size,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        world_size=world_size,
        fast_bf16=has_fast_bf16(device),
    )
    num_streams = state.num_streams if state else stream_count(corpus.num_splits, recipe.data.max_streams)
    plan = plan_of(recipe, step_batches, steps)
    config = stream_config(recipe, corpus, plan, steps, num_streams)
    positions = checkpoint.read_positions(found) if found else {}
    first = state.next_index if state else 0
    dataset = BatchStream(corpus, config, rank=rank, world_size=world_size, positions=positions, first_index=first)
    # Before the model: the workers are small copies of this process, and have batches ready when it is built.
    batches = iter(open_loader(dataset, recipe.data.num_workers, pin_memory=device.type != "cpu"))
    every_held_out = open_held_out(recipe, held, config)
    model = build_model(recipe, corpus.tokenizer, device, ds_config["torch_autocast"]["enabled"])
    engine = build_engine(model, recipe, ds_config)
    if found:
        checkpoint.load(engine, found)
    run = Run(
        recipe=recipe,
        model=model,
        engine=engine,
        batches=batches,
        held_out=share_of(every_held_out, recipe, corpus, config, rank, world_size),
        ds_config=ds_config,
        corpus=corpus,
        rank=rank,
        world_size=world_size,
        plan=plan,
        step_batches=step_batches,
        num_streams=num_streams,
        total_steps=steps,
        reporter=Reporter(Path(recipe.run.output_dir), steps, state.step if state else 0) if rank == 0 else None,
        meter=Meter(engine.device),
        unigram=unigram_loss(corpus, every_held_out),
        positions={stream: position for stream, position in positions.items() if stream % world_size == rank},
    )
    if state:
        run.step, run.index, run.tokens, run.seconds = state.step, state.next_index, state.tokens, state.seconds
    if run.reporter is not None:
        describe(run, found)
        checkpoint.set_aside_after(folder, run.step)
    return run


def describe(run: Run, found: Path | None) -> None:
    """Say what is about to happen, with every setting as resolved."""
    assert run.reporter is not None, "rank 0 speaks"
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in run.model.parameters())
    precision = "bf16 autocast" if run.ds_config["torch_autocast"]["enabled"] else "fp32"
    settings = yaml.safe_dump(run.recipe.to_dict(), sort_keys=False).rstrip()
    run.reporter.say(f"recipe:\n{settings}\nds_config: {json.dumps(run.ds_config)}")
    run.reporter.say(
        f"{parameters:,} parameters, {precision} on {run.world_size} x {run.engine.device.type}, "
        f"ZeRO {run.engine.zero_optimization_stage()}; {run.corpus.tokens:,} tokens in {run.num_streams} streams; "
        f"{run.total_steps} steps of {run.step_batches} x {run.recipe.data.micro_batch_tokens} token slots"
    )
    if found:
        run.reporter.say(f"resumed from {found}: step {run.step} of {run.total_steps}")


def write_run_json(run: Run) -> None:
    """Write down enough to repeat the run."""
    facts = {
        "command": sys.argv,
        "recipe": run.recipe.to_dict(),
        "ds_config": run.ds_config,
        "world_size": run.world_size,
        "corpus": {"name": run.corpus.name, "fingerprint": run.corpus.fingerprint},
        "versions": {name: version(name) for name in ("megabert", "torch", "deepspeed", "transformers", "numpy")},
        "machine": {"node": platform.node(), "platform": platform.platform(), "cpus": os.cpu_count()},
    }
    write_atomically(run.output_dir / "run.json", json.dumps(facts, indent=1).encode())


def finish(run: Run) -> None:
    """Leave the run's figures beside its checkpoints, and the process group together."""
    if run.evaluation is None:  # a finished run, started again
        run.evaluation = evaluate(run.engine, run.held_out)
    if run.rank == 0:
        result = {
            "steps": run.step,
            "tokens": run.tokens,
            "seconds": run.seconds,
            "tokens_per_second": run.tokens / run.seconds,
            "unigram_loss": run.unigram,
            "heldout_loss": run.evaluation.loss,
            "masked_accuracy": run.evaluation.accuracy,
        }
        write_atomically(run.output_dir / RESULT, json.dumps(result, indent=1).encode())
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()
