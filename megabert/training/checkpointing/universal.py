"""Load a checkpoint on another number of ranks, through DeepSpeed's universal checkpoint format."""

import contextlib
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import deepspeed
import torch.distributed

from megabert.files import checkpoint_format
from megabert.files.disk import DiskError
from megabert.training.distributed.deepspeed_compat import convert_to_universal, loading_only_weights
from megabert.training.distributed.heartbeat import progress
from megabert.training.distributed.sync import gather_dicts

log = logging.getLogger(__name__)

T = TypeVar("T")

LOG_EVERY_S = 10.0
# Clients of a network file system may cache a folder's listing for a minute.
VISIBLE_WITHIN_S, POLL_S = 120.0, 0.2
# DeepSpeed's functions that merge the fragments of one parameter, and where the fragments are.
MERGES = ("merge_tp_slices", "merge_zero3_slices")
FRAGMENTS, MERGED = "tmp", "zero"


class Ranks(Protocol):
    """The ranks that convert together. gather: what every rank passes, by rank; broadcast: what rank 0 passes."""

    rank: int
    size: int

    def gather(self, part: T) -> list[T]: ...
    def broadcast(self, value: T) -> T: ...


class RanksOfRun:
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def gather(self, part: T) -> list[T]:
        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, part)
        return parts

    def broadcast(self, value: T) -> T:
        if self.size == 1:
            return value
        message = [value]
        torch.distributed.broadcast_object_list(message)
        return message[0]


def needs_conversion(state: checkpoint_format.State, stage: int, world_size: int) -> bool:
    """Return whether the checkpoint must be converted to be loaded; at stage 0 every rank has the whole state."""
    return stage > 0 and state.world_size != world_size


@contextlib.contextmanager
def converted(path: Path, rank: int, world_size: int) -> Iterator[Path]:
    """Convert a checkpoint to the universal format in a temporary folder next to it; every rank calls this.

    An ordinary ZeRO checkpoint can only be loaded by as many ranks as wrote it. The universal format has one file per
    parameter and optimizer state, and takes about twice the checkpoint's bytes while the block runs. What a killed
    conversion leaves is removed by the next one, and never read. Raises DiskError if it cannot be written.
    """
    ranks = RanksOfRun(rank, world_size)
    # A folder of its own, because the converter also writes a `latest_universal` file next to its result.
    folder = path.parent / f"{checkpoint_format.TEMPORARY}universal"
    problem = Conversion(path, folder / path.name, ranks).run()
    problems = gather_dicts({} if problem is None else {ranks.rank: problem})
    if problems:
        raise DiskError(f"{path}: cannot be converted for this number of ranks: {problems[0]}")
    yield folder / path.name
    deepspeed.comm.barrier()
    if ranks.rank == 0:
        shutil.rmtree(folder)


class Conversion:
    """Rank 0 runs DeepSpeed's converter. Its loops over files and parameters are shared with the other ranks."""

    def __init__(self, path: Path, out: Path, ranks: Ranks):
        self.path, self.out, self.ranks = path, out, ranks
        self.began = self.logged = time.monotonic()
        # How many files have a fragment of each parameter, as all ranks have written them.
        self.fragments: Counter[str] = Counter()

    def run(self) -> str | None:
        """Convert; every rank calls this. Returns the error message on rank 0, or None."""
        with loading_only_weights():
            if self.ranks.rank:
                while (work := self.ranks.broadcast(None)) is not None:
                    self._do_part(*work)
                return None
            try:
                shutil.rmtree(self.out.parent, ignore_errors=True)
                self.out.mkdir(parents=True)
                convert_to_universal(self.path, self.out, self._share)
            except (OSError, RuntimeError) as error:
                # torch reports a full disk as a RuntimeError.
                shutil.rmtree(self.out.parent, ignore_errors=True)
                return f"{type(error).__name__}: {error}"
            finally:
                self.ranks.broadcast(None)
        log.info("%s: converted by %d ranks in %.0f s", self.path, self.ranks.size, time.monotonic() - self.began)
        return None

    def _share(self, do_work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        """Do one of DeepSpeed's loops on all ranks. Returns the results. Raises what this rank's part raises."""
        self.ranks.broadcast((do_work, items))
        results = self._do_part(do_work, items)
        if _name_of(do_work) in MERGES:
            # DeepSpeed writes rounded weights for a parameter whose file is not there.
            for parameter in filter(self.fragments.get, map(_parameter, items)):
                self._wait(self.out / MERGED / parameter / "fp32.pt", os.path.exists)
        return results

    def _do_part(self, do_work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        """Do this rank's part of the items. Returns the results of all. On rank 0 raises any rank's OSError."""
        name, mine, results = _name_of(do_work), items[self.ranks.rank :: self.ranks.size], []
        found: Counter[str] = Counter()
        problem: str | None = None
        try:
            for number, item in enumerate(mine):
                if name in MERGES:
                    self._wait(self.out / FRAGMENTS / _parameter(item), self._has_all_fragments)
                results.append(do_work(item))
                if name not in MERGES:
                    found.update(self._written(*item[-2:]))
                self._report("parameters" if name in MERGES else "files", number + 1, len(items))
        except (OSError, RuntimeError) as error:
            problem = f"rank {self.ranks.rank}: {type(error).__name__}: {error}"
        parts = self.ranks.gather((results, found, problem))
        for _, of_rank, _ in parts:
            self.fragments.update(of_rank)
        if self.ranks.rank == 0 and (problems := [problem for *_, problem in parts if problem]):
            raise OSError(problems[0])
        return [result for results, *_ in parts for result in results]

    def _written(self, tp_index: int, dp_index: int) -> Iterator[str]:
        """Yield the parameters of which this rank has written a fragment from a file."""
        for entry in os.scandir(self.out / FRAGMENTS):
            if os.path.exists(f"{entry.path}/{tp_index}/fp32.{dp_index:02d}"):
                yield entry.name

    def _has_all_fragments(self, folder: Path) -> bool:
        return len(list(folder.glob("*/fp32.*"))) >= self.fragments[folder.name]

    def _wait(self, path: Path, is_there: Callable[[Path], bool]) -> None:
        """Wait until this machine sees what other ranks have written."""
        until = time.monotonic() + VISIBLE_WITHIN_S
        while not is_there(path):
            if time.monotonic() > until:
                raise OSError(f"{path}: not all that other ranks have written is visible on this machine")
            progress.advance()
            time.sleep(POLL_S)

    def _report(self, what: str, done: int, total: int) -> None:
        """Report progress. done: by this rank; the others have done about as many."""
        progress.advance()
        now = time.monotonic()
        if self.ranks.rank == 0 and now - self.logged >= LOG_EVERY_S:
            self.logged = now
            done = min(total, done * self.ranks.size)
            log.info("%s: converting for another number of ranks: %d of %d %s", self.path, done, total, what)


def _name_of(do_work: Callable[[Any], Any]) -> str:
    """Return the name of DeepSpeed's function in a functools.partial."""
    return getattr(do_work, "func", do_work).__name__


def _parameter(item: str | tuple[str, Any]) -> str:
    """Return the parameter of an item of a merge: its name, or (name, shapes)."""
    return item if isinstance(item, str) else item[0]
