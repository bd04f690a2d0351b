"""A rank that hangs is named with its host and with what it was doing, within run.hang_timeout_s; a slow one is not."""

import os
import pickle
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from megabert.data.shards.retry import waited_for_store_at, waiting_for_store
from megabert.process.exit_codes import EXIT_HANG
from megabert.training.distributed import flight_recorder
from megabert.training.distributed.hang_detector import HangDetector
from megabert.training.distributed.heartbeat import LONG_PART_LIMIT_S, Beat, Progress
from tests.helpers.processes import wait_for_step
from tests.helpers.runs import Corpus, finish_ranks, pretrain_command
from tests.helpers.runs import start_ranks as start_pretraining
from tests.training.helpers.watched_ranks import results_of, start_ranks

HOST = socket.gethostname()


def detector(*beats: Beat, timeout_s: float = 60.0) -> HangDetector:
    """All of these beats, of ranks 0, 1, ..., have arrived at time 0."""
    found = HangDetector(timeout_s, {rank: f"n{rank}" for rank in range(len(beats))}, 0.0)
    for rank, beat in enumerate(beats):
        found.update(rank, beat, 0.0)
    return found


def beat(count: int, part: str, age_s: float = 0.0, limit_s: float = 60.0) -> Beat:
    return Beat(12, count, part, age_s, limit_s)


def test_a_beat_survives_the_line_it_is_sent_in():
    original = Beat(12, 40, "waiting for the other ranks' data", 1.5, 60.0)
    assert Beat.from_line(original.to_line()) == original


def test_a_silent_rank_is_named_with_its_place():
    ranks = detector(beat(40, "agree"), beat(39, "forward"))
    ranks.update(0, beat(40, "agree", 55.0), 55.0)
    assert ranks.find_hang(59.0) is None
    assert ranks.find_hang(61.0) == (
        "rank 1 on n1 (step 12, forward) has sent no heartbeat for 61 s: a process, GPU or file system hangs. If "
        "it only needs longer, raise run.hang_timeout_s"
    )


def test_of_ranks_that_wait_for_each_other_the_one_behind_is_named():
    """None has moved for a minute: those in the all-reduce wait for the one that is still loading."""
    ranks = detector(beat(41, "agree", 61.0), beat(40, "data", 62.0), beat(41, "agree", 61.0))
    assert "rank 1 on n1 (step 12, data) has made no progress for 62 s" in str(ranks.find_hang(0.0))


@pytest.mark.parametrize(
    "culprit", [beat(40, "saving", 200.0, LONG_PART_LIMIT_S), beat(40, "data", 1.0), beat(40, "x", 90, 300)]
)
def test_ranks_that_wait_for_one_that_works_are_no_hang(culprit):
    """One that saves, waits within a store's patience, or compiles."""
    assert detector(culprit, beat(41, "agree", 200.0)).find_hang(0.0) is None


def test_a_rank_that_stands_still_in_the_same_place_as_one_that_moves_is_not_judged():
    assert detector(beat(40, "evaluating", 61.0), beat(40, "evaluating", 2.0)).find_hang(0.0) is None


def test_a_rank_that_hears_rank_0_alone_judges_its_silence_only():
    """Rank 0 stands still because it waits for another rank, which it will name."""
    found = detector(beat(41, "agree", 500.0))
    assert found.find_hang(59.0) is None
    assert "rank 0 on n0 (step 12, agree) has sent no heartbeat for 61 s" in str(found.find_hang(61.0))


def test_ranks_that_hang_together_are_counted():
    found = detector(*[beat(40, "agree", 61.0)] * 1024).find_hang(0.0)
    assert found is not None
    assert "rank 0 on n0 (step 12, agree), rank 1 on n1" in found
    assert "1016 more have made no progress" in found
    assert len(found) < 1000, "it is one line of a message"


def test_an_ended_rank_and_a_suspended_job_are_no_hang():
    ranks = detector(beat(40, "agree"), beat(40, "agree"))
    ranks.restart(5000.0)
    assert ranks.find_hang(5001.0) is None
    assert ranks.find_hang(5061.0) is not None
    ranks.forget(0)
    ranks.forget(1)
    assert ranks.find_hang(5061.0) is None


def test_the_limit_follows_what_a_rank_does(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress()
    store = [0.0]
    progress.restart(60.0, lambda: store[0])
    assert progress.beat() == Beat(0, 1, "starting", 0.0, 300.0)
    assert progress.beat().place == "before the first step, starting"
    progress.step_done(1)
    progress.enter("data")
    now[0] += 50
    assert progress.beat() == Beat(1, 2, "data", 50.0, 60.0)
    # A worker waits for a store.
    store[0] = now[0] - 1
    assert progress.beat().age_s == 1.0
    progress.compile_began()
    assert progress.beat() == Beat(1, 2, "compiling (data)", 0.0, 300.0)
    progress.compile_ended()
    progress.enter("saving", long=True)
    assert progress.beat().limit_s == LONG_PART_LIMIT_S


def test_a_step_that_takes_minutes_raises_the_limit_while_it_does(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress()
    progress.restart(60.0)
    for step, seconds in enumerate((50.0, 40.0, 1.0, 1.0), start=1):
        for part in ("forward", "backward", "agree"):
            progress.enter(part)
            now[0] += seconds
        progress.step_done(step)
        assert progress.beat().limit_s == max(60.0, {1: 150.0, 2: 120.0, 3: 60.0, 4: 60.0}[step])
    progress.enter("backward")
    now[0] += 30.0
    progress.enter("agree")
    assert progress.beat().limit_s == 90.0


def test_pytorch_says_when_it_compiles():
    from torch._dynamo.callback import callback_handler

    seen = []
    for register in (callback_handler.register_start_callback, callback_handler.register_end_callback):
        register(seen.append)
    try:
        torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))
    finally:
        callback_handler.remove_start_callback(seen.append)
        callback_handler.remove_end_callback(seen.append)
    assert len(seen) == 2


def test_a_worker_tells_its_rank_that_it_waits_for_a_store():
    before = waited_for_store_at()
    pid = os.fork()
    if not pid:
        waiting_for_store()
        os._exit(0)
    os.waitpid(pid, 0)
    assert before < waited_for_store_at() <= time.monotonic()


def test_a_record_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv(flight_recorder.PREFIX, str(tmp_path / "missing/rank_"))
    assert "the last collectives of rank 3 cannot be written: " in flight_recorder.dump_collectives(3)


@pytest.mark.parametrize("stopped", [1, 0])
def test_a_stopped_rank_is_named_and_ends_the_others(tmp_path, stopped):
    """Two processes, one of which gets a SIGSTOP; the other one waits for it in a collective."""
    prefix = str(tmp_path / "rank_")
    actions = ["wait" if rank == stopped else "all_reduce" for rank in range(2)]
    ranks = start_ranks(tmp_path, *actions, HANG_TIMEOUT_S="1.5", **{flight_recorder.PREFIX: prefix})
    os.kill(ranks[stopped].pid, signal.SIGSTOP)
    began = time.monotonic()
    other = 1 - stopped
    assert ranks[other].wait(30) == EXIT_HANG
    assert time.monotonic() - began < 15
    ranks[stopped].kill()
    output = results_of(tmp_path, ranks)[other][1].splitlines()
    named = rf"rank {stopped} on {HOST} \(step 12, data\) has (sent no heartbeat|made no progress) for \d+ s: "
    assert re.match(named, output[-1]), output
    assert output[-1].endswith(f"; ending rank {other} on {HOST}")
    assert output[-2] == f"the last collectives of rank {other}: {prefix}{other}, for torchfrtrace"
    [entry] = pickle.loads(Path(f"{prefix}{other}").read_bytes())["entries"][-1:]
    assert entry["profiling_name"] == "gloo:all_reduce"


@pytest.mark.nightly
@pytest.mark.parametrize("stopped", [0, 2])
def test_a_stopped_rank_of_four_ends_the_run(corpus: Corpus, tmp_path, stopped):
    flags = ["--run.max_steps=100000", "--data.global_batch_tokens=1024", "--run.hang_timeout_s=4"]
    ranks = start_pretraining(pretrain_command(corpus, tmp_path, *flags), 4)
    wait_for_step(ranks[0], tmp_path, 3)
    os.kill(ranks[stopped].pid, signal.SIGSTOP)
    for rank, process in enumerate(ranks):
        if rank != stopped:
            assert process.wait(30) == EXIT_HANG
    ranks[stopped].kill()
    done = finish_ranks(ranks, timeout_s=60)
    assert stopped == 0 or re.search(rf"rank {stopped} on {HOST} \([^)]+\) has ", done.output)
