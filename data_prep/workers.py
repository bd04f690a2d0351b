"""Run tasks in a pool of worker processes and show their progress."""

import concurrent.futures
import errno
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

from tokenizers import Tokenizer
from tqdm import tqdm

from data_prep.sources.base import is_disk_full
from megabert.data.shards.tokenizer import TokenizerFile
from megabert.files.disk import explain
from megabert.process.open_files import allow_open_files
from megabert.process.subprocesses import exit_with_parent, use_short_socket_paths

R = TypeVar("R")

# Open files of the command itself, and for each worker: its pipes, and the end of the fork server's.
LEAST_OPEN_FILES, FILES_PER_WORKER = 32, 4

# Seconds between two lines of progress in a log. A terminal shows a bar instead.
LOG_EVERY_S = 30.0

# What the workers of both commands import.
PRELOADED = ("data_prep.writing.shard_writer", "megabert.config.cli")

# A worker sets this to the bytes that all workers have read so far, of the input and of the text in it.
_counters: Any = None


@lru_cache(maxsize=1)
def worker_tokenizer(file: TokenizerFile) -> Tokenizer:
    """Load a tokenizer once per process. Raises ValueError if the file was replaced since the command began."""
    return file.load()


def add_progress(input_bytes: int = 0, text_bytes: int = 0) -> None:
    """Add to the counters that all workers share. Does nothing outside a worker."""
    if _counters is not None:
        with _counters.get_lock():
            _counters[0] += input_bytes
            _counters[1] += text_bytes


@contextmanager
def own_counters() -> Iterator[Any]:
    """Count in the block what this process reads alone: yields [bytes of input, bytes of text]."""
    global _counters
    # Every core has a task of its own, so threads of the tokenizer would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    before, _counters = _counters, multiprocessing.Array("q", 2)
    try:
        yield _counters
    finally:
        _counters = before


def _start_worker(counters: Any) -> None:
    global _counters
    _counters = counters
    # There is already one process per core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A terminal sends Ctrl-C to all its processes. The parent handles it and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # No worker may write after its command was killed.
    exit_with_parent()


@contextmanager
def _sigint_deferred() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block. Threads and processes that are started in the block never receive it.

    It is blocked for this thread, and noted by a handler, since a thread of a library may receive it instead.
    """
    handler, noted = signal.getsignal(signal.SIGINT), []
    if callable(handler):
        signal.signal(signal.SIGINT, lambda number, frame: noted.append((number, frame)))
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        signal.signal(signal.SIGINT, handler)
    if callable(handler) and noted:
        handler(*noted[-1])


@contextmanager
def _naming_shared_memory() -> Iterator[None]:
    """Say where the space is missing that worker processes need, which is not the output folder."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        where = f"for the worker processes in /dev/shm or {tempfile.gettempdir()}"
        if error.errno == errno.EFBIG:
            raise ValueError(f"cannot write a file {where}: {explain(error)}") from error
        raise ValueError(
            f"no space left {where} ({error.strerror}). Free some space there and run the same command again. A "
            "container has little in /dev/shm: docker run --shm-size=1g gives it more."
        ) from error


def _ignore_result(_: object) -> None:
    pass


class WorkerPool:
    """A pool of processes, used as a context manager. An exception that leaves the context ends them at once."""

    def __init__(self, count: int):
        use_short_socket_paths()
        allow_open_files(LEAST_OPEN_FILES + FILES_PER_WORKER * count)
        context = multiprocessing.get_context("forkserver")
        # The modules are imported once, in the process that all workers are forked from, instead of in every worker.
        context.set_forkserver_preload(["__main__", *PRELOADED])
        self._count = count
        self._other_children = set(multiprocessing.active_children())
        with _naming_shared_memory():
            self._counters = context.Array("q", 2)
            self._pool = concurrent.futures.ProcessPoolExecutor(count, context, _start_worker, (self._counters,))

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            for child in set(multiprocessing.active_children()) - self._other_children:
                child.terminate()
        # Waits for the pool's thread, too: while it closes its pipe, the end of this process would write into it.
        self._pool.shutdown(cancel_futures=True)

    def counters(self) -> tuple[int, int]:
        """Return how many bytes are read so far, of the input and of the text in it."""
        read, text = self._counters[:]
        return read, text

    def run(
        self,
        function: Callable[..., R],
        tasks: Iterable[tuple],
        on_result: Callable[[R | None], object] = _ignore_result,
    ) -> None:
        """Call function(*task) in a worker for every task.

        on_result: called in this process with each result, and with None twice a second while there is none.
        Raises what a task raises, and ValueError if a worker dies.
        """
        pending: set[concurrent.futures.Future[R]] = set()
        remaining = iter(tasks)
        try:
            while True:
                # Two tasks per worker keep all of them busy. Submitting every task at once would only cost memory.
                while len(pending) < 2 * self._count and (task := next(remaining, None)) is not None:
                    # An interrupt while a worker starts would leave the worker running.
                    with _naming_shared_memory(), _sigint_deferred():
                        pending.add(self._pool.submit(function, *task))
                if not pending:
                    return
                done, pending = concurrent.futures.wait(pending, 0.5, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    on_result(future.result())
                if not done:
                    on_result(None)
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process died, perhaps killed because memory ran out (see dmesg). Finished work is kept: "
                "run the same command again with fewer --workers."
            ) from error


class Progress:
    """Shows a bar on a terminal; writes a line every half minute, and one at the end, to a log."""

    def __init__(self, title: str, total: int, unit: str):
        """Show a title. unit: "B" for bytes, otherwise the name of what is counted."""
        self._title, self._total, self._unit = title, total, unit
        self._bytes = unit == "B"
        self._started = self._logged = time.monotonic()
        self._initial = self._done = 0
        self._bar = tqdm(total=total, unit=unit, unit_scale=self._bytes, desc=title) if sys.stderr.isatty() else None

    def start_at(self, done: int) -> None:
        """Count the work of an earlier, interrupted command as done."""
        self._initial = self._done = done
        if self._bar is not None:
            self._bar.update(done)
            self._bar.initial = done

    def show(self, done: int, text_bytes: int = 0) -> None:
        """Show progress. done: by this command, in units; text_bytes: of text, for the rate."""
        done += self._initial
        elapsed = max(1e-9, time.monotonic() - self._started)
        text = f"{text_bytes / 1e6 / elapsed:.1f} MB/s of text" if text_bytes else ""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._done)
        self._done = done
        if self._bar is None and time.monotonic() - self._logged >= LOG_EVERY_S:
            self._logged = time.monotonic()
            left = _format_duration((self._total - done) * elapsed / max(1, done - self._initial))
            print(f"{self._title}: {self._figures()}, {text + ', ' if text else ''}{left} left", file=sys.stderr)

    def close(self) -> None:
        elapsed = time.monotonic() - self._started
        if self._bar is not None:
            self._bar.close()
        elif elapsed >= LOG_EVERY_S:
            print(f"{self._title}: {self._figures()} in {_format_duration(elapsed)}", file=sys.stderr)

    def _figures(self) -> str:
        if self._bytes:
            return f"{self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB"
        return f"{self._done:,} of {self._total:,} {self._unit}s"


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
