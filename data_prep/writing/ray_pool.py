"""Run tasks on a Ray cluster whose machines share the folders, with the package ray of the extra [ray]."""

import secrets
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from data_prep import workers
from megabert.process.error_text import first_line

R = TypeVar("R")

# A file in the work folder that every machine must see.
MARK = "ray"
# A task whose process or machine died is started again at most this many times.
TRIES = 5
POLL_S = 0.5
# This many tasks per CPU wait or run at a time. Submitting all at once would only cost memory.
TASKS_PER_CPU = 2


class RayPool:
    """Runs tasks as Ray tasks, each on one core; used as a context manager. Stands in for WorkerPool."""

    def __init__(self, address: str, work: Path):
        """address: a running cluster's address; work: the folder that all machines must share."""
        self._address, self._work = address, work
        self._mark = secrets.token_hex(8)
        self._counters = [0, 0]

    def __enter__(self) -> "RayPool":
        self._ray = _import_ray()
        if not self._ray.is_initialized():
            try:
                self._ray.init(address=self._address, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
                raise ValueError(
                    f"ray_address is {self._address}: no Ray cluster answers there: {first_line(error)} Start "
                    "one with ray start --head, and ray start --address on the other machines."
                ) from error
        (self._work / MARK).write_text(self._mark)
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def counters(self) -> tuple[int, int]:
        """Return how many bytes are read by the tasks that are done, of the input and of the text in it."""
        return self._counters[0], self._counters[1]

    def run(self, function: Callable[..., R], tasks: Iterable[tuple], on_result: Callable[[R | None], object]) -> None:
        """Call function(*task) on the cluster for every task; otherwise as WorkerPool.run.

        A task whose process or machine dies is done again elsewhere. Raises what a task raises, and ValueError if a
        machine does not see the work folder, or if a task's processes die again and again.
        """
        ray = self._ray
        remote = ray.remote(num_cpus=1, max_retries=TRIES)(_run_task)
        remaining, pending = iter(tasks), []
        try:
            while True:
                limit = max(2, int(TASKS_PER_CPU * ray.cluster_resources().get("CPU", 1)))
                while len(pending) < limit and (task := next(remaining, None)) is not None:
                    pending.append(remote.remote(str(self._work / MARK), self._mark, function, task))
                if not pending:
                    return
                done, pending = ray.wait(pending, timeout=POLL_S)
                for result in ray.get(done):
                    self._count(result[1])
                    on_result(result[0])
                if not done:
                    on_result(None)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise ValueError(
                f"a Ray task was lost {TRIES + 1} times, perhaps killed because memory ran out: "
                f"{first_line(error)} Finished work is kept: run the same command again."
            ) from error
        finally:
            for task in pending:
                ray.cancel(task, force=True)

    def _count(self, read: tuple[int, int]) -> None:
        self._counters = [self._counters[0] + read[0], self._counters[1] + read[1]]


def _run_task(mark: str, expected: str, function: Callable[..., R], task: tuple[Any, ...]) -> tuple[R, tuple[int, int]]:
    """Run one task on a machine of the cluster. Returns its result, and the bytes that it read of input and text."""
    try:
        found = Path(mark).read_text()
    except OSError:
        found = ""
    if found != expected:
        raise ValueError(
            f"{mark}: {socket.gethostname()} does not see this file as it was written. Put --out on a file system that "
            "all machines of the Ray cluster share."
        )
    with workers.own_counters() as read:
        result = function(*task)
    return result, (read[0], read[1])


def _import_ray() -> ModuleType:
    try:
        import ray  # pyrefly: ignore[missing-import] # of the extra [ray]
        import ray.exceptions  # pyrefly: ignore[missing-import]
    except ImportError as missing:
        raise ValueError("--engine ray needs the package ray. Install it: pip install 'megabert[ray]'") from missing
    return ray
