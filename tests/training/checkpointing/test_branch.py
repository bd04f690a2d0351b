"""A branch starts from another run's checkpoint with its optimizer, and every refusal names a way that works."""

import re
from pathlib import Path

import pytest
import torch

from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.files.checkpoint_format import read_state
from megabert.training.telemetry.reporter import read_metrics
from tests.helpers.runs import Corpus, ds_config_in, pretrain_command, run_command
from tests.helpers.scripts.many_runs import flags_of, run_many
from tests.training.helpers.checkpoints import differences

WSD = ["--optimizer.schedule=wsd", "--optimizer.warmup=0.125", "--optimizer.decay=0.25"]
TRUNK = [*WSD, "--run.max_steps=8", "--run.save_every_steps=2", "--run.keep_checkpoints=9"]


@pytest.fixture(scope="module")
def trunk(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The output folder and the ds_config of a run of 8 steps: one of warm-up, five at the plateau, two of decay."""
    folder = tmp_path_factory.mktemp("trunk")
    config = ds_config_in("zero2", folder, bf16=False)
    done = run_many([flags_of(corpus, folder / "run", config, *TRUNK)])
    assert done.code == 0, done.output
    return folder / "run", config


def recorded(out: Path, name: str) -> dict[int, float]:
    return {record["step"]: record[name] for record in read_metrics(out / "metrics.jsonl") if name in record}


def test_a_branch_in_which_nothing_changes_takes_the_steps_of_its_trunk(corpus: Corpus, tmp_path, trunk):
    """Bit for bit: losses, weights, moments, and positions in the data."""
    run, config = trunk
    origin = f"--run.branch_from={run}/checkpoints/step-00000004"
    done = run_many([flags_of(corpus, tmp_path, config, *TRUNK, origin)])
    assert done.code == 0, done.output
    assert f"branched off from {run}/checkpoints/step-00000004: step 4 of 8" in done.output
    assert recorded(tmp_path, "loss") == {s: loss for s, loss in recorded(run, "loss").items() if s > 4}
    for step in (6, 8):
        ends = [out / f"checkpoints/step-{step:08d}" for out in (run, tmp_path)]
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            assert not differences(*(torch.load(end / name, weights_only=False) for end in ends))
        assert (ends[0] / "streams.json").read_bytes() == (ends[1] / "streams.json").read_bytes()


def test_a_decay_branch_continues_the_plateau_and_resumes_like_any_run(corpus: Corpus, tmp_path, trunk):
    """From step 4 of the plateau, two steps of decay: the first is the trunk's step, the second has a lower rate."""
    run, config = trunk
    decay = ["--optimizer.schedule=wsd", "--optimizer.warmup=0.125", "--run.max_steps=6"]
    decay += ["--optimizer.decay=0.3333", f"--run.branch_from={run}/checkpoints/step-00000004"]
    flags = flags_of(corpus, tmp_path, config, *decay)
    done = run_many([flags])
    assert done.code == 0, done.output
    rates, losses = recorded(tmp_path, "lr"), recorded(tmp_path, "loss")
    assert rates[5] == recorded(run, "lr")[5] == recorded(run, "lr")[4]
    assert losses[5] == recorded(run, "loss")[5]
    assert rates[6] < 0.6 * rates[5]
    assert read_state(tmp_path / "checkpoints/step-00000006").next_index == 12
    # The folder's own checkpoint goes before the trunk's.
    again = run_many([flags])
    assert again.code == 0, again.output
    assert f"resumed from {tmp_path}/checkpoints/step-00000006" in again.output


def test_after_its_end_a_run_goes_on_as_its_refusal_says(corpus: Corpus, tmp_path, trunk):
    run, config = trunk
    longer = [*WSD, "--run.max_steps=10", "--optimizer.lr=1e-3"]
    refused = run_command(pretrain_command(corpus, run, *longer, ds_config=config))
    assert refused.code == 2
    assert "optimizer.lr was 0.002 and is 0.001; run.max_steps was 8 and is 10" in refused.output
    advice = re.search(r"--run\.branch_from (\S+) --run\.output_dir FOLDER", refused.output)
    assert advice is not None, refused.output
    done = run_command(pretrain_command(corpus, tmp_path, *longer, f"--run.branch_from={advice[1]}", ds_config=config))
    assert done.code == 0, done.output
    assert sorted(recorded(tmp_path, "loss")) == [9, 10]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run.max_steps=8", "--run.seed=3"], r"which a branch keeps: run\.seed was 17 and is 3\. Restore them, or"),
        (["--run.max_steps=8"], r"has done 8 steps already, and this run has 8\. Set run\.max_steps to more"),
        (["--run.max_steps=9", "--data.global_batch_tokens=1024"], r"data\.global_batch_tokens was 512 and is 1024"),
        (["--run.max_steps=9", "--run.resume=somewhere"], r"a run starts from one of them"),
    ],
)
def test_what_a_branch_cannot_change_is_refused(corpus: Corpus, tmp_path, trunk, flags, message):
    run, config = trunk
    command = pretrain_command(corpus, tmp_path, *WSD, f"--run.branch_from={run}", *flags, ds_config=config)
    done = run_command(command)
    assert done.code in (1, 2)
    assert re.search(message, done.output.splitlines()[-1]), done.output


def test_a_run_whose_lengths_follow_its_end_branches_at_the_same_length_only(corpus: Corpus, tmp_path):
    """The pieces that wait in the packing buffer have the length of their phase."""
    phases = '--data.max_seq_len=[{"max_seq_len": 32, "until": 0.5}, {"max_seq_len": 64, "until": 1.0}]'
    config = ds_config_in("zero0", tmp_path, bf16=False)
    run = tmp_path / "run"
    settings = [phases, "--run.save_every_steps=2"]
    branch = f"--run.branch_from={run}/checkpoints/step-00000002"
    done = run_many(
        [
            flags_of(corpus, run, config, *settings, "--run.max_steps=4"),
            flags_of(corpus, tmp_path / "same", config, *settings, "--run.max_steps=4", branch),
            flags_of(corpus, tmp_path / "longer", config, *settings, "--run.max_steps=6", branch),
        ]
    )
    assert done.code == 2
    assert "so a branch is as long as the run itself: 4 steps, not 6" in done.output
    first, second = (read_checkpoint(out)[0] for out in (run, tmp_path / "same"))
    assert all(torch.equal(first[name], second[name]) for name in first)
