"""launch/pretrain.py on a CPU: one loss curve at every ZeRO stage and number of ranks, its files, and its errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megabert.kernels.devices import has_fast_bf16
from megabert.training.telemetry.reporter import read_metrics
from tests.helpers.runs import REPOSITORY, Corpus, ds_config_in, pretrain_command, run_command, run_ranks
from tests.helpers.scripts.many_runs import flags_of, run_many

STEPS = "--run.max_steps=4"

# Losses at different stages differ by rounding: of bf16 if the CPU is fast at it, so that "auto" uses it, else of fp32.
ROUNDING = 1e-4 if has_fast_bf16(torch.device("cpu")) else 1e-6


def losses(out: Path, key: str = "loss") -> list[float]:
    return [record[key] for record in read_metrics(out / "metrics.jsonl") if key in record]


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory) -> Path:
    """Four steps in fp32 at stage 0 on one rank, with dropout on."""
    out = tmp_path_factory.mktemp("reference")
    done = run_command(pretrain_command(corpus, out, STEPS, ds_config=ds_config_in("zero0", out, bf16=False)))
    assert done.code == 0, done.output
    assert "ZeRO 0" in done.output
    return out


@pytest.mark.parametrize(
    ("ds_config", "ranks"),
    [("zero1", 1), ("zero2", 1), ("zero3", 1), ("zero0", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)],
)
def test_every_stage_and_number_of_ranks_gives_the_same_curve(corpus, tmp_path, reference, ds_config, ranks):
    config = ds_config_in(ds_config, tmp_path, bf16=False)
    # Without the deepspeed launcher, which takes seconds; test_keep_running.py and test_signals.py start through it.
    done = run_ranks(corpus, tmp_path, STEPS, ds_config=config, ranks=ranks)
    assert done.code == 0, done.output
    assert f"fp32 on {ranks} x cpu, ZeRO {ds_config[-1]}" in done.output
    assert losses(tmp_path) == pytest.approx(losses(reference), rel=1e-6)
    assert losses(tmp_path, "heldout_loss") == pytest.approx(losses(reference, "heldout_loss"), rel=1e-5)


@pytest.mark.parametrize("stages", [["zero2"], pytest.param(["zero0", "zero1", "zero3"], marks=pytest.mark.nightly)])
def test_the_fused_operations_and_recomputed_layers_give_one_curve_at_every_stage(corpus, tmp_path, reference, stages):
    """The fused operations draw other dropout masks than PyTorch's; a recomputed layer draws the same ones again."""
    fused, recomputed = "--run.ops=auto", "--model.gradient_checkpointing=every_layer"
    # In bf16 on every CPU: in fp32 without dropout they are not chosen.
    configs = {stage: ds_config_in(stage, tmp_path, bf16=True) for stage in ("zero0", *stages)}
    runs = [flags_of(corpus, tmp_path / "fused", configs["zero0"], STEPS, fused)]
    runs += [flags_of(corpus, tmp_path / stage, configs[stage], STEPS, fused, recomputed) for stage in stages]
    done = run_many(runs, timeout_s=600)
    assert done.code == 0, done.output
    assert done.output.count("masked_cross_entropy fused by torch.compile") == len(runs)
    for stage in stages:
        out = tmp_path / stage
        assert losses(out) == pytest.approx(losses(tmp_path / "fused"), rel=ROUNDING)
        assert losses(out) != pytest.approx(losses(reference), rel=1e-7)
        assert losses(out, "heldout_loss") == pytest.approx(losses(reference, "heldout_loss"), rel=1e-3)


@pytest.mark.parametrize("ranks", [3, pytest.param(8, marks=pytest.mark.nightly)])
def test_the_quickstarts_batch_is_one_bin_per_rank(corpus, tmp_path, ranks):
    """global_batch_tokens auto, as on a machine with eight sockets or GPUs; eight ranks through the launcher."""
    flags = ["--data.global_batch_tokens=auto", "--run.max_steps=2"]
    if ranks == 8:
        done = run_command(pretrain_command(corpus, tmp_path, *flags, ranks=ranks), timeout_s=600)
    else:
        done = run_ranks(corpus, tmp_path, *flags, ranks=ranks)
    assert done.code == 0, done.output
    assert f"2 steps of {ranks} x 256 token slots" in done.output
    assert len(losses(tmp_path)) == 2


def test_a_run_writes_its_result_files(reference):
    result = json.loads((reference / "result.json").read_text())
    assert result["steps"] == 4
    assert result["heldout_loss"] == losses(reference, "heldout_loss")[-1]
    assert 0 < result["unigram_loss"] < 10
    run = json.loads((reference / "run.json").read_text())
    assert result["format_version"] == run["format_version"] == 1
    assert {"recipe", "ds_config", "versions", "machine", "corpus"} <= run.keys()
    assert {"python", "torch", "tokenizers"} <= run["versions"].keys()
    assert (run["machine"]["threads"], run["first_step"], run["earlier"]) == (torch.get_num_threads(), 0, [])
    assert len(run["heldout"]["fingerprint"]) == 64
    assert run["heldout"]["fingerprint"] != run["corpus"]["fingerprint"]
    assert run["environment"]["DS_ACCELERATOR"] == "cpu"
    assert list((reference / "tensorboard").glob("events*"))
    assert (reference / "checkpoints" / "latest").read_text() == "step-00000004"


def test_a_finished_run_started_again_does_not_train(corpus, tmp_path, reference):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    first = json.loads((reference / "run.json").read_text())
    # As MegaBERT wrote it before it had a version.
    del first["format_version"]
    (tmp_path / "run.json").write_text(json.dumps(first))
    config = ds_config_in("zero0", tmp_path, bf16=False)
    done = run_command(pretrain_command(corpus, tmp_path, STEPS, ds_config=config))
    assert done.code == 0, done.output
    assert "step 4 of 4" in done.output
    second = json.loads((tmp_path / "run.json").read_text())
    del first["earlier"]
    assert (second["first_step"], second["earlier"]) == (4, [first])
    assert losses(tmp_path) == losses(reference)


def error_of(corpus: Corpus, out: Path, *more: str, ds_config: str = "zero2") -> str:
    """Run a command that must fail with one line, without a traceback, and return its output."""
    done = run_command(pretrain_command(corpus, out, *more, ds_config=ds_config))
    assert done.code in (1, 2), done.output
    assert "Traceback" not in done.output
    return done.output


def test_a_missing_shard(corpus, tmp_path):
    folder = shutil.copytree(corpus.tokens, tmp_path / "tokens")
    (folder / "train-00003.tar").unlink()
    output = error_of(corpus, tmp_path, STEPS, f"--data.train={folder}")
    assert "train-00003.tar: the manifest lists this shard, but it is missing" in output


def test_a_ds_config_that_contradicts_the_recipe(corpus, tmp_path):
    raw = json.loads((REPOSITORY / "ds_configs/zero2.json").read_text()) | {"gradient_clipping": 5.0}
    (tmp_path / "mine.json").write_text(json.dumps(raw))
    output = error_of(corpus, tmp_path, STEPS, f"--ds_config={tmp_path / 'mine.json'}")
    assert "sets gradient_clipping to 5.0, but the recipe makes it 1.0" in output


def test_compiling_the_whole_model_on_a_cpu(corpus, tmp_path):
    assert "run.compile true on a CPU" in error_of(corpus, tmp_path, STEPS, "--run.compile")


def test_a_missing_checkpoint(corpus, tmp_path):
    assert "no checkpoint here" in error_of(corpus, tmp_path, STEPS, f"--run.resume={tmp_path / 'none'}")


def test_a_mistyped_flag(corpus, tmp_path):
    output = error_of(corpus, tmp_path, "--optimizer.learning_rate=1")
    assert "unknown setting --optimizer.learning_rate" in output


def test_a_world_size_that_does_not_divide_the_batch(corpus, tmp_path):
    done = run_ranks(corpus, tmp_path, "--data.global_batch_tokens=768", STEPS, ranks=2)
    assert done.code == 2
    assert "3 micro-batches of 256 tokens, which 2 ranks cannot share evenly" in done.output
    assert "Traceback" not in done.output
