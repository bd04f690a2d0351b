"""Told to stop, a run finishes its step, saves, and ends with the code that asks to be started again."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.training.distributed.signals import REQUEUE, Interrupts
from megabert.training.telemetry.reporter import read_metrics
from tests.conftest import REPOSITORY, Corpus, ds_config_in, pretrain_command, run_command

STEPS = "--run.max_steps=400"


def start(command: list[str], **environment: str) -> subprocess.Popen:
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=env,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if any(record["step"] >= step for record in read_metrics(out / "metrics.jsonl")):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came: {process.communicate()[0]}")


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGTERM, 2), (signal.SIGUSR1, 2)]
)
def test_a_signal_saves_and_asks_to_be_requeued(corpus: Corpus, tmp_path, number, workers):
    """To the rank, or with loader workers to all processes of the group, as SLURM and terminals do."""
    process = start(pretrain_command(corpus, tmp_path, STEPS, f"--data.num_workers={workers}"))
    wait_for_step(process, tmp_path, 5)
    if workers:
        assert len(psutil.Process(process.pid).children()) == workers
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == REQUEUE, output
    assert f"{number.name} arrived; checkpoint saved, run the same command to resume" in output
    step = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
    assert (tmp_path / "checkpoints/latest").read_text() == f"step-{step:08d}"
    assert not (tmp_path / "result.json").exists()


def test_stopped_and_started_again_it_ends_bitwise_the_same(corpus: Corpus, tmp_path):
    settings = ["--run.max_steps=60", "--run.log_every_steps=2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for out in (whole, stopped):
        out.mkdir()
    config = ds_config_in("zero2", tmp_path, bf16=False)
    done = run_command(pretrain_command(corpus, whole, *settings, ds_config=config), OMP_NUM_THREADS="1")
    assert done.code == 0, done.output
    process = start(pretrain_command(corpus, stopped, *settings, ds_config=config))
    wait_for_step(process, stopped, 10)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == REQUEUE
    done = run_command(pretrain_command(corpus, stopped, *settings, ds_config=config), OMP_NUM_THREADS="1")
    assert done.code == 0, done.output
    first, second = (read_checkpoint(out)[0] for out in (whole, stopped))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_rank_is_told_and_both_stop(corpus: Corpus, tmp_path):
    process = start(pretrain_command(corpus, tmp_path, STEPS, ranks=2))
    wait_for_step(process, tmp_path, 3)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "--local_rank=1" in p.cmdline()]
    ranks[0].send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=90)
    assert "another rank was asked to stop; checkpoint saved" in output
    assert process.returncode != 0
    assert list((tmp_path / "checkpoints").glob("step-*"))


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    everyone = psutil.Process(process.pid).children(recursive=True)
    launchers = [child for child in everyone if child.ppid() == process.pid]
    return [child for child in everyone if child.ppid() in {launcher.pid for launcher in launchers}]


def test_ranks_end_when_their_launcher_is_killed(corpus: Corpus, tmp_path):
    """kill -9 of the launcher: the ranks notice, save, and leave nothing behind that holds the port."""
    process = start(pretrain_command(corpus, tmp_path, STEPS, ranks=2))
    wait_for_step(process, tmp_path, 3)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    for parent in {process.pid, *(rank.ppid() for rank in ranks)}:
        os.kill(parent, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    assert list((tmp_path / "checkpoints").glob("step-*"))


def test_ranks_end_when_their_launcher_is_killed_while_they_start(corpus: Corpus, tmp_path):
    process = start(pretrain_command(corpus, tmp_path, "--run.max_steps=1000000", ranks=2))
    until = time.monotonic() + 60
    while len(ranks := ranks_of(process)) < 2 or any("pretrain.py" not in str(rank.cmdline()) for rank in ranks):
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.5)  # Python is there, and torch is not yet
    for parent in {process.pid, *(rank.ppid() for rank in ranks)}:
        os.kill(parent, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=90)
    assert not alive


def test_the_deepspeed_command_alone_is_told_to_end(corpus: Corpus, tmp_path):
    """It passes nothing on: the ranks see that it is gone, save, and end their launcher."""
    process = start(pretrain_command(corpus, tmp_path, "--run.max_steps=1000000", ranks=2))
    wait_for_step(process, tmp_path, 3)
    everyone = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    output, _ = process.communicate(timeout=90)
    _, alive = psutil.wait_procs(everyone, timeout=60)
    assert not alive
    assert "the deepspeed command is gone; checkpoint saved, run the same command to resume" in output
    assert list((tmp_path / "checkpoints").glob("step-*"))


def test_a_flag_is_all_that_a_signal_sets():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    interrupts = Interrupts()
    try:
        interrupts.listen()
        assert interrupts.reason is None
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.reason == "SIGUSR1 arrived"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
