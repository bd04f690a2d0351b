"""All cores at work on a list of tasks, with progress; a worker that dies ends the command instead of hanging it."""

import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from megabert.data.shards.tokenizer import read_tokenizer

LOG_EVERY_S = 30.0  # a log keeps every line; a terminal shows one that moves

# Of this process, if it is a worker: bytes read so far by all workers, of the input and as text.
_counters: Any = None


@lru_cache(maxsize=1)
def tokenizer(path: str | None) -> Tokenizer | None:
    """This process's tokenizer."""
    return read_tokenizer(Path(path)) if path else None


def report(input_bytes: int = 0, text_bytes: int = 0) -> None:
    """Say, in a worker, what has been done."""
    if _counters is not None:
        with _counters.get_lock():
            _counters[0] += input_bytes
            _counters[1] += text_bytes


def _start_worker(counters: Any) -> None:
    global _counters
    _counters = counters
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed command must not leave workers that go on writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Ctrl-C waits until the end; the threads that are started meanwhile never see it, as is right."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerPool:
    """Processes that take tasks. Use as a context; leaving it with an exception ends them at once."""

    def __init__(self, count: int):
        context = multiprocessing.get_context("forkserver")
        self.counters = context.Array("q", 2)
        self._count = count
        self._others = set(multiprocessing.active_children())
        self._pool = concurrent.futures.ProcessPoolExecutor(count, context, _start_worker, (self.counters,))

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:
            for child in set(multiprocessing.active_children()) - self._others:
                child.terminate()

    def run(self, function: Callable, tasks: Iterable[tuple], finished: Callable[[Any], None] = lambda _: None) -> None:
        """Call function(*task) for each; `finished` here with each result, or with None twice a second meanwhile.

        Raises what a task raises, and ValueError if a worker dies.
        """
        waiting: set[concurrent.futures.Future] = set()
        rest = iter(tasks)
        try:
            while True:
                # Enough to be busy: all at once would be memory for nothing.
                while len(waiting) < 2 * self._count and (task := next(rest, None)) is not None:
                    with _sigint_blocked():  # by Ctrl-C: a worker that is just being started would outlive the command
                        waiting.add(self._pool.submit(function, *task))
                if not waiting:
                    return
                done, waiting = concurrent.futures.wait(waiting, 0.5, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    finished(future.result())
                if not done:
                    finished(None)
        except BrokenProcessPool as broken:
            raise ValueError(
                "a worker process died, killed perhaps because memory ran out (see dmesg). What is finished is kept: "
                "run the same command again, with fewer --workers."
            ) from broken


class Progress:
    """A bar on a terminal; in a log, a line every half minute and at the end."""

    def __init__(self, what: str, total: int, unit: str):
        self._what, self._total, self._unit = what, total, unit
        self._bytes = unit == "B"
        self._started = self._logged = time.monotonic()
        self._first = self._done = 0
        self._bar = tqdm(total=total, unit=unit, unit_scale=self._bytes, desc=what) if sys.stderr.isatty() else None

    def start_at(self, done: int) -> None:
        """Count what an earlier, interrupted command did."""
        self._first = self._done = done
        if self._bar is not None:
            self._bar.update(done)
            self._bar.initial = done

    def show(self, done: int, text_bytes: int = 0) -> None:
        done += self._first
        elapsed = max(1e-9, time.monotonic() - self._started)
        text = f"{text_bytes / 1e6 / elapsed:.1f} MB/s of text" if text_bytes else ""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._done)
        self._done = done
        if self._bar is None and time.monotonic() - self._logged >= LOG_EVERY_S:
            self._logged = time.monotonic()
            left = (self._total - done) * elapsed / max(1, done - self._first)
            print(
                f"{self._what}: {self._figures()}, {text + ', ' if text else ''}{_format_duration(left)} left",
                file=sys.stderr,
            )

    def close(self) -> None:
        elapsed = time.monotonic() - self._started
        if self._bar is not None:
            self._bar.close()
        elif elapsed >= LOG_EVERY_S:
            print(f"{self._what}: {self._figures()} in {_format_duration(elapsed)}", file=sys.stderr)

    def _figures(self) -> str:
        if self._bytes:
            return f"{self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB"
        return f"{self._done:,} of {self._total:,} {self._unit}s"


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
