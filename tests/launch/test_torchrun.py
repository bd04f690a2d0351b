"""Pretraining under torchrun: a killed agent, a killed rank, and SIGTERM to the agent, as Kubernetes sends it."""

import os
import signal
import socket
import sys
import threading
from pathlib import Path

import psutil
import pytest

from megabert.files.checkpoint_format import list_tags, step_of
from megabert.training.distributed import signals
from megabert.training.distributed.signals import StopSignals
from tests.helpers import warm
from tests.helpers.processes import start, wait_for_step
from tests.helpers.runs import Corpus, pretrain_command

ENDLESS = "--run.max_steps=100000"


@pytest.mark.parametrize("variable", [None, "TORCHELASTIC_RUN_ID", "CROSS_RANK"])
def test_a_rank_watches_the_launcher_that_started_it(monkeypatch, variable):
    for name in signals.SET_BY_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "0")
    watched = []
    monkeypatch.setattr(StopSignals, "_watch", lambda self, pid: watched.append(pid))
    stop_signals = StopSignals(embedded=True)
    stop_signals.watch_launcher()
    for thread in threading.enumerate():
        if thread.name == "launcher-watch":
            thread.join(10)
    assert watched == ([] if variable is None else [os.getppid()])


def torchrun(corpus: Corpus, out: Path, *more: str, step: int = 5) -> tuple[warm.Process, list[psutil.Process]]:
    """Start two ranks and wait until they have done a step; returns the agent and the ranks."""
    command = pretrain_command(corpus, out, *more)[1:]
    agent = start([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command])
    wait_for_step(agent, out, step)
    return agent, psutil.Process(agent.pid).children()


@pytest.mark.nightly
def test_ranks_save_and_end_when_the_agent_is_killed(corpus: Corpus, tmp_path):
    agent, ranks = torchrun(corpus, tmp_path, ENDLESS)
    assert len(ranks) == 2
    agent.kill()
    _, alive = psutil.wait_procs(ranks, timeout=300)
    assert not alive
    assert list_tags(tmp_path / "checkpoints")


@pytest.mark.nightly
def test_a_killed_rank_ends_the_other_and_is_named(corpus: Corpus, tmp_path):
    agent, ranks = torchrun(corpus, tmp_path, ENDLESS)
    victim = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
    victim.kill()
    output = agent.communicate(timeout=90)[0]
    assert agent.returncode == 1, "torchrun's own code"
    assert f"rank 1 on {socket.gethostname()} is gone" in output


@pytest.mark.nightly
def test_a_pod_that_is_deleted_saves_and_its_successor_resumes(corpus: Corpus, tmp_path):
    agent, ranks = torchrun(corpus, tmp_path, ENDLESS)
    agent.send_signal(signal.SIGTERM)
    agent.communicate(timeout=90)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    [tag] = list_tags(tmp_path / "checkpoints")
    again, _ = torchrun(corpus, tmp_path, ENDLESS, step=step_of(tag) + 2)
    again.send_signal(signal.SIGTERM)
    assert f"resumed from {tmp_path}/checkpoints/{tag}" in again.communicate(timeout=90)[0]
