"""The schedules of a run: steps, batches, lengths, masking rate and learning rate."""

import dataclasses
import re
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabert.config.recipe import OptimizerConfig, Recipe
from megabert.config.recipe_parser import RecipeParser, load_recipe, recipe_names
from megabert.data.batch_schedule import Length, MaskingRate, count_steps, make_schedule
from megabert.plots.schedule import plot_schedule
from megabert.training.micro_batch.sizes import MOST_TOKENS, possible_micro_batches
from megabert.training.run_schedule import (
    RunSchedule,
    choose_batches_per_step,
    lr_factor,
    make_run_schedule,
    total_steps,
)
from megabert.training.telemetry.reporter import read_metrics
from tests.helpers.runs import TINY, last_of_each, pretrain_command, run_command

BATCH_WARMUP = ["--data.global_batch_tokens=1024", "--data.batch_warmup=0.5", "--data.batch_warmup_from=512"]


def read(*argv: str) -> Recipe:
    return RecipeParser("pretrain", "").read(list(argv))[0]


def factors(schedule: str, *steps: int, total: int = 1000, **changes) -> list[float]:
    config = OptimizerConfig(schedule=schedule, **changes)  # pyrefly: ignore[bad-argument-type]
    return [lr_factor(step, total, config) for step in steps]


def test_the_learning_rate_is_the_papers():
    """6 % warm-up, then linear to 2 % of the peak, over 70,000 steps."""
    found = factors("linear", 0, 4199, 4200, 37_100, 70_000, total=70_000)
    assert found == pytest.approx([1 / 4200, 1.0, 1.0, 0.51, 0.02])
    assert lr_factor(0, 1, dataclasses.replace(OptimizerConfig(), warmup=0.0)) == 1.0


def test_the_other_schedules_at_points_computed_by_hand():
    assert factors("cosine", 60, 530, 1000) == pytest.approx([1.0, 0.51, 0.02])
    # Decays over the last 100 steps: a quarter of them done is half of the way down.
    assert factors("wsd", 60, 900, 925, 1000) == pytest.approx([1.0, 1.0, 0.02 + 0.98 * 0.5, 0.02])
    assert factors("constant", 0, 60, 1000) == pytest.approx([1 / 60, 1.0, 1.0])


@given(
    st.sampled_from(["linear", "cosine", "wsd", "constant"]),
    st.integers(1, 300),
    st.floats(0, 0.5),
    st.floats(0.01, 0.5),
    st.floats(0, 1),
)
def test_every_schedule_rises_then_falls_to_its_end(schedule, total, warmup, decay, final_lr):
    config = OptimizerConfig(schedule=schedule, warmup=warmup, decay=decay, final_lr=final_lr)
    curve = np.array([lr_factor(step, total, config) for step in range(total + 1)])
    peak = round(warmup * total)
    assert ((curve > 0) | (final_lr == 0)).all()
    assert (curve <= 1 + 1e-12).all()
    assert (np.diff(curve[:peak]) > 0).all()
    assert (np.diff(curve[peak:]) <= 1e-12).all()
    if total > peak and schedule != "constant":
        assert curve[-1] == pytest.approx(final_lr)


def test_the_masking_rate_follows_its_schedule():
    linear, cosine = MaskingRate(0.3, 0.15, 100), MaskingRate(0.3, 0.15, 100, "cosine")
    assert [linear.at(i) for i in (0, 50, 100, 500)] == pytest.approx([0.3, 0.225, 0.15, 0.15])
    assert [cosine.at(i) for i in (0, 25, 50, 100)] == pytest.approx([0.3, 0.3 - 0.15 * 0.1464466, 0.225, 0.15])
    assert MaskingRate.constant(0.2).at(10**9) == 0.2
    assert linear.highest == 0.3


@given(st.integers(1, 10**6), st.integers(1, 40), st.integers(1, 12), st.floats(0, 0.99))
def test_a_run_with_a_batch_warm_up_has_the_bins_that_it_was_asked_for(num_bins, first, levels, warmup):
    full = first * levels
    steps = count_steps(num_bins, full, first, warmup)
    schedule = make_schedule(steps, full, [Length(128, 1.0)], first_batches=first, warmup=warmup)
    assert abs(schedule.bins_before(steps) - num_bins) <= max(2 * full, full - num_bins)


def test_without_a_batch_warm_up_the_count_is_exact():
    assert count_steps(10**18 - 1, 10) == 10**17 - 1
    assert count_steps(9, 10) == 1


@pytest.mark.parametrize(("name", "batch", "warmup"), [("modernbert-base", 50, 3), ("modernbert-large", 10, 2)])
def test_the_parts_of_modernberts_schedule_are_the_papers(name, batch, warmup):
    """batch, warmup: billions of tokens in which the batch and the learning rate grow."""
    recipe = load_recipe(name)
    schedule = make_run_schedule(recipe, 8)
    stages, steps, optimizer = schedule.stages, schedule.total_steps, recipe.optimizer

    def billions(step: int) -> float:
        return stages.bins_before(step) * recipe.data.bin_tokens / 1e9

    full = next(stage.first_step for stage in stages.stages if stage.batches_per_step == schedule.batches_per_step)
    long = next(stage.first_step for stage in stages.stages if stage.max_seq_len == 8192)
    decay = steps - round(optimizer.decay * steps)
    found = [billions(step) for step in (full, round(optimizer.warmup * steps), long, steps)]
    assert found == pytest.approx([batch, warmup, 1719, 2019], rel=1e-3)
    assert billions(steps) - billions(decay) == pytest.approx(50, rel=1e-3)


def test_the_masking_rate_counts_bins_of_a_batch_warm_up():
    recipe = read(*last_of_each([*TINY, "--run.max_steps=10", "--masking.schedule=linear", *BATCH_WARMUP]))
    schedule = make_run_schedule(recipe, 1)
    rate = schedule.masking
    assert (schedule.batches_per_step, schedule.total_steps) == (4, 10)
    assert [(stage.first_step, stage.batches_per_step) for stage in schedule.stages.stages] == [(0, 2), (2, 4)]
    assert isinstance(rate, MaskingRate)
    assert rate.num_bins == 2 * 2 + 8 * 4
    assert rate.at(rate.num_bins) == 0.15


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--data.batch_warmup=0.5"], "expected both or neither"),
        ([*BATCH_WARMUP, "--data.batch_warmup_from=768"], "expected a multiple of data.micro_batch_tokens"),
        (["--optimizer.schedule=wsd", "--optimizer.warmup=0.95"], "together exceed the whole run"),
        (["--optimizer.schedule=square"], "square"),
        (["--masking.final_mlm_probability=1.5"], "expected a number in (0, 1)"),
    ],
)
def test_impossible_schedules_are_refused(capsys, settings, message):
    with pytest.raises(SystemExit):
        RecipeParser("p", "").read(last_of_each([*TINY, "--run.max_steps=10", *settings]))
    assert message in capsys.readouterr().err


def test_ranks_share_a_global_batch():
    recipe = read("--data.global_batch_tokens=16384")
    assert [choose_batches_per_step(recipe.data, world_size) for world_size in (1, 2, 8)] == [8, 8, 8]
    message = (
        "8 micro-batches of 2048 tokens, which 3 ranks cannot share evenly.*set data.global_batch_tokens 18432; or"
    )
    with pytest.raises(ValueError, match=f"{message} use 1, 2 or 4 ranks"):
        choose_batches_per_step(recipe.data, 3)
    assert choose_batches_per_step(read().data, 5) == 5


@pytest.mark.parametrize("name", ["mosaicbert-base", "mosaicbert-large", "bert-base", "bert-large"])
def test_the_documented_clusters_share_a_published_batch(name):
    """8 GPUs, the two machines of launch/hostfile.example, and four nodes of 8 under SLURM."""
    recipe = read("--recipe", name)
    for ranks in (1, 8, 16, 32):
        assert {14_720, 471_040 // max(4, ranks)} <= set(possible_micro_batches(recipe.data, ranks, MOST_TOKENS))
        assert choose_batches_per_step(recipe.with_micro_batch(14_720).data, ranks) == 32


def schedule_on(recipe: Recipe, ranks: int) -> RunSchedule:
    if recipe.data.micro_batch_tokens == "auto":
        recipe = recipe.with_micro_batch(possible_micro_batches(recipe.data, ranks, MOST_TOKENS)[-1])
    return make_run_schedule(recipe, ranks)


def settings_in(message: str) -> list[dict[str, int]]:
    """The ways to change settings that a message names, each with all that must be set together."""
    ways = re.findall(r"[Ss]et ((?:data\.\w+ \d+(?:, | and )?)+)", message)
    return [{name: int(value) for name, value in re.findall(r"data\.(\w+) (\d+)", way)} for way in ways]


@pytest.mark.parametrize("ranks", [8, 64, 256, 1000, 1024])
@pytest.mark.parametrize("name", recipe_names())
def test_one_message_says_all_that_a_number_of_ranks_needs(name, ranks):
    """The batch warm-up too. Each way that it names is followed, and none ends in another refusal."""
    recipe = load_recipe(name)
    try:
        schedule = schedule_on(recipe, ranks)
    except ValueError as error:
        message = str(error)
    else:
        assert all(size % ranks == 0 for size in schedule.stages.batches_per_step)
        return
    ways, others = settings_in(message), re.findall(r"\d+", message.rpartition("use ")[2])
    assert ways
    assert others
    for changes in ways:
        data = dataclasses.replace(recipe.data, **changes)  # pyrefly: ignore[bad-argument-type]
        assert schedule_on(dataclasses.replace(recipe, data=data), ranks)
    for number in others:
        assert schedule_on(recipe, int(number))


def test_modernbert_large_on_1000_ranks_needs_three_settings_at_once():
    with pytest.raises(ValueError, match="which 1000 ranks cannot share evenly") as error:
        make_run_schedule(load_recipe("modernbert-large"), 1000)
    expected = {"micro_batch_tokens": 8192, "global_batch_tokens": 8_192_000, "batch_warmup_from": 8_192_000}
    assert settings_in(str(error.value)) == [expected]


def test_the_length_of_a_run():
    assert total_steps(read("--run.max_tokens=20000"), 2) == 4
    assert total_steps(read("--run.max_steps=9"), 2) == 9


def test_length_phases_become_stages_of_the_schedule():
    phases = '[{"max_seq_len": 32, "until": 0.9}, {"max_seq_len": 64, "until": 1}]'
    recipe = read(*last_of_each([*TINY, "--run.max_steps=10", f"--data.max_seq_len={phases}"]))
    stages = make_run_schedule(recipe, 1).stages.stages
    assert [(stage.first_step, stage.max_seq_len) for stage in stages] == [(0, 32), (9, 64)]
    assert recipe.data.longest == 64
    assert read(*TINY).data.lengths == [(32, 1.0)]


def test_every_schedule_is_drawn(tmp_path):
    out = tmp_path / "schedule.png"
    settings = ["--run.max_steps=50", *BATCH_WARMUP, "--optimizer.schedule=wsd", "--masking.schedule=cosine"]
    flags = last_of_each([*TINY, *settings, f"--plot-schedule={out}"])
    done = run_command([sys.executable, "launch/pretrain.py", *flags])
    assert done.code == 0, done.output
    assert done.output.splitlines()[-1] == str(out)
    assert out.read_bytes().startswith(b"\x89PNG")
    hours = ["--max-hours=2", "--masking.schedule=linear"]
    for name, flags in {"paper.png": [], "hours.png": hours}.items():
        plot_schedule(read("--recipe=mosaicbert-base", *flags), tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000


def test_a_batch_warm_up_with_fewer_masks_each_step_resumes_bitwise(corpus, tmp_path):
    """Steps of 2 micro-batches, then 4; masks from 30 to 15 %; WSD. Stopped inside the warm-up, and after."""
    settings = [*BATCH_WARMUP, "--masking.schedule=linear", "--optimizer.schedule=wsd", "--optimizer.decay=0.5"]
    settings += ["--run.max_steps=8", "--run.save_every_steps=1", "--run.keep_checkpoints=9"]
    whole = tmp_path / "whole"
    done = run_command(pretrain_command(corpus, whole, *settings))
    assert done.code == 0, done.output
    records = [record for record in read_metrics(whole / "metrics.jsonl") if "loss" in record]
    steps = np.diff([0, *(record["tokens"] for record in records)])
    assert steps[1] < 0.6 * steps[2]
    shares = [record["masked_share"] for record in records]
    assert shares == sorted(shares, reverse=True)
    assert records[-1]["lr"] < 0.7 * records[3]["lr"]
    for step in (1, 3):
        out = tmp_path / f"from-{step}"
        (out / "checkpoints").mkdir(parents=True)
        (whole / "checkpoints" / f"step-{step:08d}").rename(out / "checkpoints" / f"step-{step:08d}")
        done = run_command(pretrain_command(corpus, out, *settings))
        assert done.code == 0, done.output
        again = [record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]
        assert again == [record["loss"] for record in records][step:]
