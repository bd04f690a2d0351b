"""Tests of the progress on a terminal and in a log, of the worker pool, and of the grouping into tasks."""

import errno
import operator
import os
import re
import resource
import signal
import subprocess
import sys
import threading

import pytest

from data_prep import workers, write_shards
from data_prep.sources.base import InputSplit
from data_prep.workers import Progress, WorkerPool
from data_prep.writing.passes import TASK_BYTES, group_into_tasks
from tests.helpers.runs import REPOSITORY


def test_too_few_open_files_are_named_before_a_worker_starts(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20, 20))
    with pytest.raises(ValueError, match=r"only 20 files here .* expected at least 40\."):
        WorkerPool(2)


def test_ctrl_c_waits_for_the_start_of_a_worker_whichever_thread_gets_it():
    done = []

    def start_a_worker():
        with workers._sigint_deferred():
            other = threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT))
            # As in a library's own thread.
            unblocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            other.start()
            other.join()
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            done.append(True)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            start_a_worker()
        assert done
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


LATE_WAKEUP = """
import os, sys, time
from concurrent.futures import process
from data_prep.workers import WorkerPool

def wakeup(self):
    if not self._closed:
        if process._global_shutdown:
            time.sleep(1)
        self._writer.send_bytes(b"")

if __name__ == "__main__":
    process._ThreadWakeup.wakeup = wakeup
    try:
        with WorkerPool(1) as pool:
            pool.run(os._exit, [(1,)])
    except ValueError as error:
        sys.exit(str(error))
"""


def test_the_end_of_the_command_and_of_a_pool_whose_worker_died_do_not_meet(tmp_path):
    """Python writes into the pool's pipe at its end, after a look at whether the pool's thread has closed it."""
    (tmp_path / "late.py").write_text(LATE_WAKEUP)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "late.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("a worker process died")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def clock(monkeypatch):
    """The seconds that time.monotonic() returns to workers.py, in a list."""
    seconds = [1000.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: seconds[0])
    return seconds


def test_a_log_gets_a_line_every_half_minute_and_at_the_end(clock, capsys):
    progress = Progress("reading", 100_000_000, "B")
    # Done by an interrupted command.
    progress.start_at(40_000_000)
    for second in range(0, 61, 5):
        clock[0] = 1000 + second
        progress.show(500_000 * second, 800_000 * second)
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "reading: 55 of 100 MB, 0.8 MB/s of text, 0:01:30 left",
        "reading: 70 of 100 MB, 0.8 MB/s of text, 0:01:00 left",
        "reading: 70 of 100 MB in 0:01:00",
    ]


def test_a_short_command_writes_no_line_to_a_log(clock, capsys):
    progress = Progress("writing", 24, "shard")
    progress.show(24)
    clock[0] += 29
    progress.close()
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar_with_rate_and_time_left(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress("reading", 100_000_000, "B")
    progress.start_at(40_000_000)
    progress.show(20_000_000, 30_000_000)
    progress.close()
    assert re.search(r"reading:  60%.*60\.0M/100M \[.*B/s, .*MB/s of text\]", capsys.readouterr().err)


def test_results_and_errors_of_workers_are_returned():
    results = []
    with WorkerPool(2) as pool:
        pool.run(operator.add, [(n, 1) for n in range(20)], results.append)
    assert sorted(result for result in results if result is not None) == list(range(1, 21))
    with pytest.raises(ZeroDivisionError), WorkerPool(1) as pool:
        pool.run(operator.truediv, [(1, 0)])


def test_input_splits_are_grouped_in_order_and_each_once():
    splits = [
        InputSplit("jsonl", (str(n),), 0, size, size)
        for n, size in enumerate([10, 1 << 20, TASK_BYTES * 2, 5, 1 << 22] * 40)
    ]
    tasks = group_into_tasks(splits)
    assert [split for task in tasks for split in task] == splits
    assert all(len(task) == 1 or sum(split.size for split in task) <= TASK_BYTES for task in tasks)
    assert len(tasks) > 40
    hub = [InputSplit("hub", ("a/b", "", "train", ""), n, 9, 1) for n in range(9)]
    assert [len(task) for task in group_into_tasks(hub)] == [1] * 9
    assert group_into_tasks([]) == []


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EFBIG, errno.EACCES])
def test_full_shared_memory_is_not_blamed_on_the_output(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", fail)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises((ValueError, OSError)) as found:
        write_shards.main([f"--source={tmp_path / 'a.txt'}", f"--out={tmp_path / 'out'}"])
    if error == errno.ENOSPC:
        assert "no space left for the worker processes in /dev/shm or /tmp" in str(found.value)
        assert "docker run --shm-size=1g" in str(found.value)
    elif error == errno.EFBIG:
        assert "/dev/shm or /tmp: File too large. Raise the limit of file sizes (ulimit -f)" in str(found.value)
    else:
        assert str(found.value) == "[Errno 13] Permission denied"
