"""Bad updates are skipped at every stage on all ranks; after several, the run rolls back and leaves their data out."""

import json
import math
from pathlib import Path

import pytest
import torch

from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.files.checkpoint_format import read_state
from megabert.training.distributed.deepspeed_compat import gate_optimizer_step
from megabert.training.telemetry.reporter import read_metrics
from megabert.training.updates.guard import MIN_NORMS, Guard, UpdateGate
from tests.helpers.runs import Corpus, Finished, ds_config_in, finish_ranks, pretrain_command, start_ranks


def guard_with(norms: list[float], ratio: float = 10.0) -> Guard:
    guard = Guard(ratio)
    for norm in norms:
        guard.record(norm, applied=True)
    return guard


def test_a_norm_that_is_not_finite_is_refused_from_the_first_step():
    assert not any(Guard(10.0).allows(norm) for norm in (math.nan, math.inf, -math.inf))
    # No norm is known yet.
    assert Guard(10.0).allows(1e30)


def test_a_norm_far_above_the_median_is_refused():
    guard = guard_with([1.0, 2.0, 3.0] * MIN_NORMS)
    assert guard.allows(20.0)
    assert not guard.allows(20.1)
    assert guard_with([1.0, 2.0, 3.0] * MIN_NORMS, ratio=0.0).allows(1e9)


def test_skipped_updates_are_counted_and_their_norms_are_not_kept():
    guard = guard_with([1.0] * MIN_NORMS)
    guard.record(math.nan, applied=False)
    guard.record(99.0, applied=False)
    assert (guard.skipped, guard.skipped_in_a_row, len(guard.norms)) == (2, 2, MIN_NORMS)
    guard.record(1.0, applied=True)
    assert (guard.skipped, guard.skipped_in_a_row) == (2, 0)
    again = Guard(10.0)
    again.restore(json.loads(json.dumps(guard.to_json())))
    assert again == guard


def test_the_gate_stops_and_clips_an_optimizer_at_stage_0():
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    gate = UpdateGate(Guard(10.0), max_grad_norm=1.0)
    gate.parameters_to_clip = [parameter]
    gate_optimizer_step(optimizer, gate.allows_step)
    parameter.grad = torch.full((4,), 3.0)
    gate.start_step()
    optimizer.step()
    assert gate.norm == pytest.approx(6.0)
    assert parameter.tolist() == pytest.approx([-0.5] * 4, abs=1e-5)
    assert gate.finish_step()
    parameter.grad = torch.tensor([1.0, math.nan, 0.0, 0.0])
    gate.start_step()
    optimizer.step()
    assert parameter.tolist() == pytest.approx([-0.5] * 4, abs=1e-5)
    assert not gate.finish_step()
    assert gate.guard.skipped == 1


def run_with(
    corpus: Corpus,
    out: Path,
    bins: list[int],
    factor: str,
    *more: str,
    stage: str = "zero2",
    ranks: int = 1,
    added: str = "0",
) -> Finished:
    out.mkdir(exist_ok=True)
    command = pretrain_command(corpus, out, *more, ds_config=ds_config_in(stage, out, bf16=False))
    command[command.index("launch/pretrain.py")] = "tests/helpers/scripts/inject.py"
    injected = json.dumps({"bins": bins, "factor": factor, "added": added})
    return finish_ranks(start_ranks(command, ranks, INJECT=injected))


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [("zero0", 1), ("zero1", 1), ("zero2", 1), ("zero3", 1), ("zero0", 2), ("zero2", 2), ("zero3", 2)],
)
def test_nan_never_reaches_the_weights(corpus: Corpus, tmp_path, stage, ranks):
    """Bins 4 and 5 are step 3 of 5, and one of them has a NaN."""
    done = run_with(corpus, tmp_path, [5], "nan", "--run.max_steps=5", stage=stage, ranks=ranks)
    assert done.code == 0, done.output
    assert "step 3: update skipped" in done.output
    assert "bins 4 to 5" in done.output
    weights = read_checkpoint(tmp_path)[0]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    records = read_metrics(tmp_path / "metrics.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    # The skipped step has none.
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    assert records[-1].get("heldout_loss", 0) > 0
    assert read_state(tmp_path / "checkpoints/step-00000005").guard["skipped"] == 1
    [skipped] = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert (skipped["step"], skipped["bins"], skipped["loss"]) == (3, [4, 6], "nan")
    # From both ranks.
    assert set(skipped["positions"]) == {"4", "5"}


@pytest.mark.parametrize("stage", ["zero0", "zero2"])
def test_a_loss_that_is_not_finite_is_refused_even_if_its_gradient_is(corpus: Corpus, tmp_path, stage):
    done = run_with(corpus, tmp_path, [5], "1", "--run.max_steps=4", stage=stage, added="inf")
    assert done.code == 0, done.output
    assert "step 3: update skipped, gradient norm nan, loss inf" in done.output


def test_a_run_without_any_update_fails(corpus: Corpus, tmp_path):
    done = run_with(corpus, tmp_path, [*range(9)], "nan", "--run.max_steps=2", "--run.rollback_after=0", stage="zero0")
    assert done.code == 2
    assert "all 2 updates were skipped, see skipped.jsonl" in done.output
    assert not (tmp_path / "result.json").exists()


def test_a_rollback_finds_its_checkpoint_even_if_only_one_is_kept(corpus: Corpus, tmp_path):
    settings = ["--run.max_steps=6", "--run.save_every_steps=1", "--run.rollback_after=3", "--run.keep_checkpoints=1"]
    done = run_with(corpus, tmp_path, [4, 5, 6, 7, 8, 9], "nan", *settings, stage="zero0")
    assert done.code == 0, done.output
    assert "step-00000002 after 3 skipped updates; continuing at bin 10" in done.output
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000006"]


def test_a_spike_is_refused_once_the_usual_norm_is_known(corpus: Corpus, tmp_path):
    settings = [f"--run.max_steps={MIN_NORMS + 4}", "--run.log_every_steps=4", "--optimizer.lr=1e-5"]
    spike = [2 * MIN_NORMS + 2, 2 * MIN_NORMS + 3]
    done = run_with(corpus, tmp_path, [2, 3, *spike], "1000", *settings, stage="zero0")
    assert done.code == 0, done.output
    # At step 2 the usual norm was not known.
    assert done.output.count("update skipped") == 1
    assert f"step {MIN_NORMS + 2}: update skipped" in done.output


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_after_several_in_a_row_the_run_rolls_back_and_skips_their_data(corpus: Corpus, tmp_path, stage):
    """Steps of two bins, saved every second step; bins 6 to 9 are bad, and two skipped updates cause a rollback.

    The run then continues with later bins. A run that is resumed after the rollback ends with the same bits.
    """
    settings = ["--run.max_steps=6", "--run.save_every_steps=2", "--run.rollback_after=2", "--run.keep_checkpoints=9"]
    out = tmp_path / "run"
    done = run_with(corpus, out, [6, 7, 8, 9], "nan", *settings, stage=stage)
    assert done.code == 0, done.output
    assert "rolled back to" in done.output
    assert "step-00000002 after 2 skipped updates; continuing at bin 10" in done.output
    # At stage 3 DeepSpeed itself keeps a destroyed engine's optimizer.
    assert stage == "zero3" or "optimizers before the rollback's engine: 0\n" in done.output
    state = read_state(out / "checkpoints/step-00000006")
    assert (state.next_index, state.rolled_back_bins, state.guard["skipped"]) == (18, [(4, 10)], 2)
    # The checkpoint of step 4 was written after the rollback.
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    (out / "checkpoints/step-00000004").rename(again / "checkpoints/step-00000004")
    done = run_with(corpus, again, [6, 7, 8, 9], "nan", *settings, stage=stage)
    assert done.code == 0, done.output
    first, second = (read_checkpoint(folder)[0] for folder in (out, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_rollback_without_a_checkpoint_or_without_success_is_an_error(corpus: Corpus, tmp_path):
    done = run_with(corpus, tmp_path / "a", list(range(99)), "nan", "--run.max_steps=9", "--run.rollback_after=2")
    assert done.code == 2
    assert "2 updates in a row were skipped" in done.output
    assert "no checkpoint to return to" in done.output
    settings = ["--run.max_steps=9", "--run.rollback_after=2", "--run.save_every_steps=1"]
    done = run_with(corpus, tmp_path / "b", list(range(2, 999)), "nan", *settings)
    assert done.code == 2
    assert "the data is not the cause" in done.output
    assert "Traceback" not in done.output
