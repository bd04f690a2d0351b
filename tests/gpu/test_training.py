"""Training by launch/pretrain.py on one GPU: engine, ZeRO 0 to 2, evaluation, saving, a kill, resuming, the guard.

The same bodies run on the CPU, one at every push and the others in the nightly run. No GPU has run them yet.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from megabert.files.checkpoint_format import find_checkpoint, read_state
from megabert.files.metrics_format import read_metrics
from tests.helpers import warm
from tests.helpers.runs import Corpus, ds_config_in, pretrain_command, run_command

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = [GPU, pytest.param("cpu", marks=pytest.mark.nightly)]
# Losses in fp32 that only the order of sums tells apart.
SAME = 1e-5


def command_of(device: str, corpus: Corpus, folder: Path, *flags: str, stage: int = 1, bf16: bool = True) -> list[str]:
    """Return the command of a run: in bf16 on a GPU with its kernels, else with PyTorch's operations in fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    kernels = bf16 and device == "cuda"
    config = ds_config_in(f"zero{stage}", folder, kernels)
    ops = "--run.ops=auto" if kernels else "--run.ops=torch"
    return pretrain_command(corpus, folder / "run", ops, *flags, ds_config=config)


def train(device: str, command: list[str], **environment: str) -> list[dict[str, float]]:
    """Run a command on a device. Returns its metrics."""
    done = run_command(command, DS_ACCELERATOR=device, **environment)
    assert done.code == 0, done.output
    out = next(Path(word.partition("=")[2]) for word in command if word.startswith("--run.output_dir="))
    return read_metrics(out / "metrics.jsonl")


def named(metrics: list[dict[str, float]], name: str) -> dict[float, float]:
    """Return a figure by step; of a step that was taken again the last one."""
    return {point["step"]: point[name] for point in metrics if name in point}


def test_a_run_on_a_gpu_is_not_forked_from_a_process_for_the_cpu(monkeypatch, tmp_path):
    """That process has loaded DeepSpeed for a CPU: the run would train there, and these tests would pass."""
    started: list[str] = []
    monkeypatch.setitem(warm.AT_START, "DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(warm, "_popen_cold", lambda *arguments: started.append("cold"))
    monkeypatch.setattr(warm, "WarmProcess", lambda *arguments: started.append("warm"))
    for device in ("cuda", "cpu"):
        command = [sys.executable, "launch/pretrain.py"]
        warm.popen(command, warm.AT_START | {"DS_ACCELERATOR": device}, tmp_path / "log.txt")
    assert started == ["cold", "warm"]


@pytest.mark.parametrize("device", [GPU, "cpu"])
def test_a_run_saves_evaluates_and_resumes(device, corpus: Corpus, tmp_path):
    command = command_of(device, corpus, tmp_path, "--run.max_steps=2", "--run.save_every_steps=1")
    first = train(device, command)
    assert list(named(first, "loss")) == [1, 2]
    assert 0 < named(first, "heldout_loss")[2] < 10
    resume = f"--run.resume={tmp_path / 'run/checkpoints/step-00000001'}"
    again = train(device, [*command[:-1], resume, command[-1].replace("/run", "/resumed")])
    assert named(again, "loss")[2] == named(first, "loss")[2]
    assert named(again, "heldout_loss")[2] == named(first, "heldout_loss")[2]


@pytest.mark.parametrize("device", DEVICES)
def test_zero_stages_train_the_same(device, corpus: Corpus, tmp_path):
    curves = {}
    for stage in (0, 1, 2):
        command = command_of(device, corpus, tmp_path / str(stage), "--run.max_steps=8", stage=stage, bf16=False)
        curves[stage] = named(train(device, command), "loss")
        assert list(curves[stage]) == list(range(1, 9))
        assert curves[stage] == pytest.approx(curves[0], rel=SAME)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("device", DEVICES)
def test_a_killed_run_ends_as_one_that_was_not(device, stage, corpus: Corpus, tmp_path):
    flags = ["--run.max_steps=60", "--run.save_every_steps=2"]
    whole = train(device, command_of(device, corpus, tmp_path / "whole", *flags, stage=stage))
    command = command_of(device, corpus, tmp_path / "killed", *flags, stage=stage)
    process = warm.popen(command, os.environ | {"DS_ACCELERATOR": device}, tmp_path / "log.txt")
    checkpoints = tmp_path / "killed/run/checkpoints"
    while process.poll() is None and not (checkpoints / "latest").exists():
        time.sleep(0.01)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
    resumed = train(device, command)
    for name in ("loss", "heldout_loss"):
        assert named(resumed, name) == named(whole, name)


@pytest.mark.parametrize("device", DEVICES)
def test_the_guard_leaves_out_an_update_that_is_not_finite(device, corpus: Corpus, tmp_path):
    command = command_of(device, corpus, tmp_path, "--run.max_steps=4")
    command = [word.replace("launch/pretrain.py", "tests/helpers/scripts/inject.py") for word in command]
    assert command[:2] == [sys.executable, "tests/helpers/scripts/inject.py"]
    metrics = train(device, command, INJECT=json.dumps({"bins": [4], "factor": "nan", "added": 0}))
    assert json.loads((tmp_path / "run/result.json").read_text())["skipped_updates"] == 1
    assert all(named(metrics, "loss")[step] > 0 for step in (1, 2, 4))
    # A CUDA graph would never see the fault.
    assert read_state(find_checkpoint(tmp_path / "run")).recipe["run"]["cuda_graphs"] is False
