"""Everything before the first step: data, model, engine, and what a checkpoint says."""

import gc
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
import yaml

from megabert.config.ds_config import fill, numerics_of
from megabert.config.recipe import Recipe, batches_per_step, total_steps
from megabert.data.shards.source import Corpus, stream_count
from megabert.files.checkpoint_format import State, read_state
from megabert.kernels.resolve import has_fast_bf16
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training.checkpointing import resume, universal
from megabert.training.checkpointing.initial_weights import load_initial_weights
from megabert.training.checkpointing.resume import Course
from megabert.training.checkpointing.writer import Retention, Saver, check_room, set_aside_after
from megabert.training.distributed.device import device_event, device_name, training_device
from megabert.training.distributed.signals import Interrupts
from megabert.training.distributed.sync import check_shared, claim, from_rank_0
from megabert.training.engine import attach_guard, build_engine, build_model, choose
from megabert.training.evaluate import unigram_loss
from megabert.training.feed import Feed, open_corpora, open_held_out, plan_of, share_of, stream_config
from megabert.training.optim.guard import Guard, Verdict
from megabert.training.run import Run
from megabert.training.telemetry import probe, trackers
from megabert.training.telemetry.flops import peak_flops
from megabert.training.telemetry.reporter import Meter, Reporter
from megabert.training.telemetry.timers import Clock
from megabert.training.telemetry.trackers import open_trackers


def prepare(
    recipe: Recipe,
    raw_ds_config: dict[str, Any],
    ds_config_path: str,
    rank: int,
    world_size: int,
    interrupts: Interrupts,
) -> Run:
    """Open the data, build the model, and restore the newest checkpoint if there is one."""
    if problem := trackers.why_not(recipe.run.trackers):
        raise ValueError(problem)
    hours = recipe.run.max_hours
    clock = Clock(None if hours is None else 3600 * hours)
    interrupts.listen()
    check_shared(Path(recipe.run.output_dir, "checkpoints"), rank, world_size)
    claim(Path(recipe.run.output_dir), rank, world_size)
    corpus, held = from_rank_0(lambda: open_corpora(recipe), rank, world_size)
    from_rank_0(lambda: probe.check(recipe.probe), rank, world_size)
    ds_config, course = set_course(recipe, raw_ds_config, ds_config_path, corpus, world_size)
    found, state = last_checkpoint(recipe, course)
    positions = resume.read_positions(found) if found else {}
    feed = make_feed(recipe, corpus, course, state, rank)
    # Before the model: the workers are small copies of this process, and have batches ready when it is built.
    batches = feed.open(positions, state.next_index if state else 0)
    held_out = open_held_out(recipe, held, feed.config)
    verdict = Verdict(Guard(recipe.run.max_norm_ratio), recipe.optimizer.max_grad_norm)
    model, engine = build(recipe, corpus, ds_config, verdict, found)
    reporter = open_reporter(recipe, course.total_steps, state.step if state else 0) if rank == 0 else None
    run = Run(
        recipe=recipe,
        model=model,
        engine=engine,
        ds_config=ds_config,
        feed=feed,
        batches=batches,
        held_corpus=held,
        held_out=share_of(held_out, recipe, corpus, feed.config, rank, world_size),
        step_batches=course.step_batches,
        total_steps=course.total_steps,
        unigram=unigram_loss(corpus, held_out),
        peak=peak_of(model, ds_config),
        meter=Meter(device_event()),
        verdict=verdict,
        interrupts=interrupts,
        reporter=reporter,
        saver=open_saver(recipe, model, engine.zero_optimization_stage(), reporter),
        clock=clock,
        positions=feed.mine(positions),
    )
    if state:
        restore(run, state)
    if run.reporter is not None:
        describe(run, found)
        set_aside_after(run.checkpoints, run.step)
        run.prober = open_prober(recipe, run.reporter, run.step)
    return run


def set_course(
    recipe: Recipe, raw_ds_config: dict[str, Any], ds_config_path: str, corpus: Corpus, world_size: int
) -> tuple[dict[str, Any], Course]:
    """The ds_config that DeepSpeed gets, and what must be the same wherever the run goes on."""
    step_batches = batches_per_step(recipe, world_size)
    ds_config = fill(
        raw_ds_config,
        ds_config_path,
        accumulation=step_batches // world_size,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        world_size=world_size,
        fast_bf16=has_fast_bf16(training_device()),
    )
    course = Course(
        corpus=corpus.fingerprint,
        stage=ds_config.get("zero_optimization", {}).get("stage", 0),
        world_size=world_size,
        step_batches=step_batches,
        total_steps=total_steps(recipe, step_batches),
        adamw=choose(recipe, ds_config).source,
        numerics=numerics_of(ds_config),
    )
    return ds_config, course


def make_feed(recipe: Recipe, corpus: Corpus, course: Course, state: State | None, rank: int) -> Feed:
    """Where this rank's batches come from. state: of the checkpoint that the run goes on from."""
    plan = plan_of(recipe, course.step_batches, course.total_steps)
    num_streams = state.num_streams if state else stream_count(corpus.num_splits, recipe.data.max_streams)
    config = stream_config(recipe, corpus, plan, course.total_steps, num_streams)
    pin_memory = training_device().type != "cpu"
    return Feed(corpus, config, rank, course.world_size, recipe.data.num_workers, pin_memory)


def peak_of(model: MegaBertForMaskedLM, ds_config: dict[str, Any]) -> float | None:
    """FLOP/s of this rank's device in the precision of the run, where known."""
    device = training_device()
    precision = torch.bfloat16 if ds_config["torch_autocast"]["enabled"] else torch.float32
    return peak_flops(device, device_name(device), model.config, precision)


def open_saver(recipe: Recipe, model: MegaBertForMaskedLM, stage: int, reporter: Reporter | None) -> Saver:
    """This rank's, once there is room for what it will write."""
    settings, folder = recipe.run, Path(recipe.run.output_dir, "checkpoints")
    retention = Retention(settings.keep_checkpoints, settings.keep_every_steps, settings.keep_best)
    check_room(folder, num_parameters(model), stage, retention)
    return Saver(folder, retention, settings.async_save, reporter.say if reporter else _say_nothing)


def num_parameters(model: MegaBertForMaskedLM) -> int:
    """Of the whole model, also where ZeRO 3 has cut it to pieces."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def last_checkpoint(recipe: Recipe, now: Course) -> tuple[Path | None, State | None]:
    """What the run goes on from, if anything. Raises ValueError if that is another run's."""
    found = resume.find(recipe, Path(recipe.run.output_dir, "checkpoints"))
    if found is None:
        return None, None
    state = read_state(found)
    resume.check_same_run(found, state, recipe, now)
    return found, state


def restore(run: Run, state: State) -> None:
    """The counters and the guard, as a checkpoint has them."""
    run.clock.go_on_from(state.used, state.slowest)
    run.step, run.index, run.tokens, run.seconds = state.step, state.next_index, state.tokens, state.seconds
    run.left_behind = [tuple(part) for part in state.left_behind]
    run.guard.restore(state.guard)


def open_prober(recipe: Recipe, reporter: Reporter, step: int) -> probe.Prober | None:
    """Rank 0's, where the recipe asks for one."""
    if recipe.probe.task is None:
        return None
    ops = "torch" if recipe.run.ops == "torch" else "auto"  # none is fused on a CPU
    return probe.Prober(recipe.probe, ops, Path(recipe.run.output_dir), reporter, step)


def open_reporter(recipe: Recipe, steps: int, step: int) -> Reporter:
    """Rank 0's, with the recipe's trackers. step: that the run goes on from."""
    folder = Path(recipe.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return Reporter(folder, steps, step, open_trackers(recipe.run.trackers, folder, step, recipe.to_dict()))


def _say_nothing(_: str) -> None:
    """What ranks without a reporter say."""


def build(
    recipe: Recipe, corpus: Corpus, ds_config: dict[str, Any], verdict: Verdict, found: Path | None
) -> tuple[MegaBertForMaskedLM, deepspeed.DeepSpeedEngine]:
    """The model and its engine, at its start or as a checkpoint has it."""
    model = build_model(recipe, corpus.tokenizer, training_device(), ds_config["torch_autocast"]["enabled"])
    if recipe.model.init_from and not found:
        load_initial_weights(model, Path(recipe.model.init_from), corpus.sources[0])
    stage, world_size = ds_config.get("zero_optimization", {}).get("stage", 0), deepspeed.comm.get_world_size()
    convert = found is not None and universal.is_needed(read_state(found), stage, world_size)
    engine = build_engine(model, recipe, universal.ds_config_for(ds_config) if convert else ds_config, verdict)
    if found:
        resume.load(engine, found)
    attach_guard(engine, verdict)
    return model, engine


def rebuild(run: Run, path: Path) -> None:
    """Replace the engine by one as a checkpoint has it."""
    run.engine.destroy()
    del run.engine, run.model
    gc.collect()
    run.model, run.engine = build(run.recipe, run.corpus, run.ds_config, run.verdict, path)


def describe(run: Run, found: Path | None) -> None:
    """Say what is about to happen, with every setting as resolved."""
    precision = "bf16 autocast" if run.ds_config["torch_autocast"]["enabled"] else "fp32"
    hours = run.recipe.run.max_hours
    length = f"{run.total_steps} steps" if hours is None else f"{hours} hours of steps"
    settings = yaml.safe_dump(run.recipe.to_dict(), sort_keys=False).rstrip()
    run.say(f"recipe:\n{settings}\nds_config: {json.dumps(run.ds_config)}")
    run.say(
        f"{num_parameters(run.model):,} parameters, {precision} on {run.world_size} x {run.engine.device.type}, "
        f"ZeRO {run.engine.zero_optimization_stage()}; {run.corpus.tokens:,} tokens in {run.feed.config.num_streams} streams; "
        f"{length} of {run.step_batches} x {run.recipe.data.micro_batch_tokens} token slots"
    )
    chosen = choose(run.recipe, run.ds_config)
    run.say(f"optimizer: {run.recipe.optimizer.name} from {chosen.source} ({chosen.reason})")
    if found:
        done = (
            f"step {run.step} of {run.total_steps}"
            if hours is None
            else f"step {run.step}, {run.clock.used / 3600:.2f} hours"
        )
        run.say(f"resumed from {found}: {done}")
