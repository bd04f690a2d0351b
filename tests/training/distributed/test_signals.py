"""A run that is asked to stop finishes its step, saves, and exits with the code that requests another start."""

import os
import re
import signal
import subprocess
import time

import psutil
import pytest
import torch

from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.training.distributed.signals import EXIT_REQUEUE, StopSignals
from megabert.training.telemetry.reporter import read_metrics
from tests.helpers.processes import start, wait_for_step
from tests.helpers.runs import Corpus, ds_config_in, finish_ranks, pretrain_command, run_command, start_ranks

ENDLESS = "--run.max_steps=1000000"


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGTERM, 2), (signal.SIGUSR1, 2)]
)
def test_after_a_signal_a_run_saves_and_asks_to_be_requeued(corpus: Corpus, tmp_path, number, workers):
    """The signal goes to the rank, or with loader workers to the process group, as SLURM and terminals send it."""
    process = start(pretrain_command(corpus, tmp_path, ENDLESS, f"--data.num_workers={workers}"))
    wait_for_step(process, tmp_path, 5)
    if workers:
        assert len(psutil.Process(process.pid).children()) == workers
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, output
    assert re.search(f"received {number.name}; .*saved", output)
    step = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
    assert (tmp_path / "checkpoints/latest").read_text() == f"step-{step:08d}"
    assert not (tmp_path / "result.json").exists()


def test_a_stopped_and_resumed_run_ends_with_the_same_bits(corpus: Corpus, tmp_path):
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
    assert process.wait(60) == EXIT_REQUEUE
    done = run_command(pretrain_command(corpus, stopped, *settings, ds_config=config), OMP_NUM_THREADS="1")
    assert done.code == 0, done.output
    first, second = (read_checkpoint(out)[0] for out in (whole, stopped))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_signal_to_one_rank_stops_both(corpus: Corpus, tmp_path):
    ranks = start_ranks(pretrain_command(corpus, tmp_path, ENDLESS), 2)
    wait_for_step(ranks[0], tmp_path, 3)
    ranks[1].send_signal(signal.SIGUSR1)
    done = finish_ranks(ranks, timeout_s=90)
    assert re.search("another rank .*; .*saved", done.output)
    assert [rank.returncode for rank in ranks] == [EXIT_REQUEUE] * 2
    assert list((tmp_path / "checkpoints").glob("step-*"))


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The ranks below a `deepspeed` command, which starts a launcher, which starts them."""
    descendants = psutil.Process(process.pid).children(recursive=True)
    launchers = {child.pid for child in descendants if child.ppid() == process.pid}
    return [child for child in descendants if child.ppid() in launchers]


def kill_launchers(process: subprocess.Popen, ranks: list[psutil.Process]) -> None:
    for parent in {process.pid, *(rank.ppid() for rank in ranks)}:
        os.kill(parent, signal.SIGKILL)
    process.wait()


def test_ranks_end_when_their_launcher_is_killed(corpus: Corpus, tmp_path):
    """After a kill -9 of the launcher the ranks save and leave no process that keeps the port in use."""
    process = start(pretrain_command(corpus, tmp_path, ENDLESS, ranks=2))
    wait_for_step(process, tmp_path, 3)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    kill_launchers(process, ranks)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    assert list((tmp_path / "checkpoints").glob("step-*"))


def test_ranks_end_when_their_launcher_is_killed_during_start_up(corpus: Corpus, tmp_path):
    """From the moment when a rank's second thread, which watches the launcher, runs: long before torch is loaded."""
    process = start(pretrain_command(corpus, tmp_path, ENDLESS, launcher=True))
    deadline = time.monotonic() + 60
    while not (ranks := ranks_of(process)) or any(rank.num_threads() < 2 for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_launchers(process, ranks)
    _, alive = psutil.wait_procs(ranks, timeout=90)
    assert not alive


def test_after_a_signal_to_the_deepspeed_command_alone_the_ranks_save(corpus: Corpus, tmp_path):
    """The command forwards no signals. Its ranks notice that it is gone."""
    process = start(pretrain_command(corpus, tmp_path, ENDLESS, launcher=True))
    wait_for_step(process, tmp_path, 3)
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    output, _ = process.communicate(timeout=90)
    _, alive = psutil.wait_procs(descendants, timeout=60)
    assert not alive
    assert "the deepspeed command is gone: stopping after a checkpoint" in output
    assert re.search("the deepspeed command is gone; .*saved", output)
    assert list((tmp_path / "checkpoints").glob("step-*"))


def test_a_signal_only_sets_the_reason():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    stop_signals = StopSignals()
    try:
        stop_signals.install_handlers()
        assert stop_signals.reason is None
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop_signals.reason == "received SIGUSR1"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
