"""A run that is asked to stop finishes its step, saves, and exits with the code that requests another start."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.process.exit_codes import EXIT_INTERRUPTED, EXIT_REQUEUE
from megabert.training.distributed import signals
from megabert.training.distributed.signals import PEER_REASON, SIGNALS, StopRequested, StopSignals
from megabert.training.telemetry.reporter import read_metrics
from tests.helpers import warm
from tests.helpers.processes import start, wait_for_step
from tests.helpers.runs import (
    Corpus,
    ds_config_in,
    finish_ranks,
    forked_launcher,
    patched,
    pretrain_command,
    run_command,
    start_ranks,
)

ENDLESS = "--run.max_steps=1000000"


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (signal.SIGTERM, 0),
        (signal.SIGINT, 0),
        (signal.SIGTERM, 2),
        (signal.SIGUSR1, 2),
        (signal.SIGINT, 2),
        (signal.SIGHUP, 2),
    ],
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
    output, _ = process.communicate(timeout=300)
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
    process = start(forked_launcher(pretrain_command(corpus, tmp_path, ENDLESS, ranks=2)))
    wait_for_step(process, tmp_path, 3)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    kill_launchers(process, ranks)
    _, alive = psutil.wait_procs(ranks, timeout=300)
    assert not alive
    assert list((tmp_path / "checkpoints").glob("step-*"))


def test_ranks_end_when_their_launcher_is_killed_during_start_up(corpus: Corpus, tmp_path):
    """From the moment when a rank's second thread, which watches the launcher, runs: long before torch is loaded."""
    process = start(pretrain_command(corpus, tmp_path, ENDLESS, launcher=True))
    deadline = time.monotonic() + 300
    while not (ranks := ranks_of(process)) or any(rank.num_threads() < 2 for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_launchers(process, ranks)
    _, alive = psutil.wait_procs(ranks, timeout=90)
    assert not alive


@pytest.mark.nightly
def test_after_a_signal_to_the_deepspeed_command_alone_the_ranks_save(corpus: Corpus, tmp_path):
    """The command forwards no signals. Its ranks notice that it is gone."""
    process = start(pretrain_command(corpus, tmp_path, ENDLESS, launcher=True))
    wait_for_step(process, tmp_path, 3)
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    output, _ = process.communicate(timeout=90)
    _, alive = psutil.wait_procs(descendants, timeout=300)
    assert not alive
    assert "the deepspeed command is gone: stopping after a checkpoint" in output
    assert re.search("the deepspeed command is gone; .*saved", output)
    assert list((tmp_path / "checkpoints").glob("step-*"))


@pytest.fixture
def embedded() -> Iterator[StopSignals]:
    """The signals of a run in a process that continues, such as this one."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop_signals = StopSignals(embedded=True)
    stop_signals.install_handlers()
    yield stop_signals
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_reason_once(embedded: StopSignals, number):
    assert embedded.reason is None
    signal.raise_signal(number)
    signal.raise_signal(signal.SIGUSR1)
    assert embedded.reason == f"received {signal.Signals(number).name}"


def test_a_second_interrupt_is_not_met_by_waiting(embedded: StopSignals, monkeypatch):
    signal.raise_signal(signal.SIGINT)
    # The same Ctrl-C, sent by a launcher too.
    signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(signals, "SAME_INTERRUPT_S", -1.0)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_request_ends_a_wait_for_data_and_tells_the_other_ranks(embedded: StopSignals):
    """Whether it comes during the wait, from any thread, or before it."""
    told = []
    embedded.tell_peers = lambda: told.append(embedded.reason)
    timer = threading.Timer(0.1, embedded.request, ["the launcher is gone"])
    timer.start()
    for _ in range(2):
        with pytest.raises(StopRequested, match="the launcher is gone"), embedded.interrupting():
            time.sleep(60)
    assert told == ["the launcher is gone"]


def test_what_another_rank_passed_on_is_not_sent_back(embedded: StopSignals):
    told = []
    embedded.tell_peers = lambda: told.append(embedded.reason)
    embedded.request(PEER_REASON)
    assert embedded.reason == PEER_REASON
    assert told == []


def test_an_ignored_hangup_stays_ignored(embedded: StopSignals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    embedded.install_handlers()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# Data for five steps. A rank that waits for more makes the file $WAITING followed by its number.
HANGING = """
import os, pathlib, time
from megabert.data import stream
from megabert.training import loop
usual, usual_next = stream.open_stream, loop.next_batches
def hanging(*arguments):
    for item in usual(*arguments):
        if item[0].index >= 10:
            time.sleep(600)
        yield item
def next_batches(run):
    if run.state.next_index >= 10:
        pathlib.Path(os.environ["WAITING"] + str(run.plan.rank)).touch()
    return usual_next(run)
stream.open_stream, loop.next_batches = hanging, next_batches
"""


def wait_for_file(process: warm.Process, file: Path) -> None:
    while not file.exists():
        assert process.poll() is None, "the run has ended"
        time.sleep(0.02)


@pytest.mark.parametrize(("ranks", "workers", "number"), [(1, 0, signal.SIGTERM), (2, 2, signal.SIGHUP)])
def test_a_rank_that_waits_for_data_saves_and_ends(corpus: Corpus, tmp_path, ranks, workers, number):
    """Five steps of two bins; then no rank gets more. The signal goes to the last rank only."""
    command = patched(pretrain_command(corpus, tmp_path, ENDLESS, f"--data.num_workers={workers}"))
    processes = start_ranks(command, ranks, PATCH=HANGING, WAITING=f"{tmp_path}/waiting")
    for rank, process in enumerate(processes):
        wait_for_file(process, tmp_path / f"waiting{rank}")
    began = time.monotonic()
    processes[-1].send_signal(number)
    done = finish_ranks(processes, timeout_s=60)
    assert [process.returncode for process in processes] == [EXIT_REQUEUE] * ranks, done.output
    assert time.monotonic() - began < 20
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000005"
    assert re.search("stopped at step 5: .*; checkpoint saved", done.output)


def test_a_stop_while_waiting_changes_no_bit_of_the_rest(corpus: Corpus, tmp_path):
    command = patched(pretrain_command(corpus, tmp_path / "a", "--run.max_steps=7"))
    process = start(command, PATCH=HANGING, WAITING=f"{tmp_path}/waiting")
    wait_for_file(process, tmp_path / "waiting0")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == EXIT_REQUEUE
    for out in ("a", "b"):
        done = run_command(pretrain_command(corpus, tmp_path / out, "--run.max_steps=7"), OMP_NUM_THREADS="1")
        assert done.code == 0, done.output
    first, second = (read_checkpoint(tmp_path / out)[0] for out in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


# {name} of the loop makes the file {file} and then takes for ever.
SLOW = """
import pathlib, time
from megabert.training import loop
def slow(*_):
    pathlib.Path({file!r}).touch()
    time.sleep(600)
loop.{name} = slow
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, EXIT_REQUEUE), (signal.SIGINT, EXIT_INTERRUPTED)])
def test_before_the_first_step_a_signal_ends_the_run_at_once(corpus: Corpus, tmp_path, number, code):
    began_plan = tmp_path / "began"
    patch = SLOW.format(name="make_plan", file=str(began_plan))
    process = start(patched(pretrain_command(corpus, tmp_path, ENDLESS)), PATCH=patch)
    wait_for_file(process, began_plan)
    began = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    # 0.2 s on a quiet machine.
    assert time.monotonic() - began < 20
    assert len(output.splitlines()) == 1, output


def test_a_second_interrupt_ends_a_run_that_does_not_save(corpus: Corpus, tmp_path):
    """Here because saving takes for ever."""
    began_save = tmp_path / "began"
    patch = SLOW.format(name="save", file=str(began_save))
    process = start(patched(pretrain_command(corpus, tmp_path, ENDLESS)), PATCH=patch)
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGINT)
    wait_for_file(process, began_save)
    # Two Ctrl-C within a second are one.
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == EXIT_INTERRUPTED
    assert output.endswith("pretrain: interrupted again: ending without saving\n")


def test_loader_workers_end_with_their_rank(corpus: Corpus, tmp_path):
    process = start(pretrain_command(corpus, tmp_path, ENDLESS, "--data.num_workers=2"))
    wait_for_step(process, tmp_path, 3)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    assert not psutil.wait_procs(workers, timeout=60)[1]


def test_a_hangup_under_nohup_is_ignored(corpus: Corpus, tmp_path):
    command = patched(pretrain_command(corpus, tmp_path, "--run.max_steps=40"))
    process = start(command, PATCH="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_ctrl_c_at_the_deepspeed_command_saves(corpus: Corpus, tmp_path, ranks):
    """A terminal sends it to the whole process group: the command, its launcher and the ranks."""
    command = pretrain_command(corpus, tmp_path, ENDLESS, "--data.num_workers=2", ranks=ranks, launcher=True)
    process = start(forked_launcher(command) if ranks == 1 else command)
    wait_for_step(process, tmp_path, 3)
    descendants = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=90)
    assert not psutil.wait_procs(descendants, timeout=300)[1]
    # The rank that logs may learn of the signal from the other rank.
    assert re.search("(received SIG(INT|TERM)|another rank was asked to stop); checkpoint saved", output), output
    assert list((tmp_path / "checkpoints").glob("step-*"))
