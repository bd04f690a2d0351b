"""What ranks do once for all of them, and what they must see alike, and have for themselves, before the first step."""

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch.distributed

from megabert.files.lock import Lock, LockHeldError, acquire

T = TypeVar("T")

log = logging.getLogger(__name__)

CLAIM = "running.lock"  # of an output folder; says who trains there
LEAVES_S = 60.0  # a run whose launcher was killed saves and ends within 45 s
_claims: dict[Path, Lock] = {}  # by folder; held to the end of the process

APPEARS_S = 10.0  # a network file system's clients may look at what they remember of a folder for a few seconds


def gather(mine: dict[Any, Any], group: torch.distributed.ProcessGroup | None = None) -> dict[Any, Any]:
    """Merge every rank's dict; all ranks of the group call this and get the same."""
    parts: list[Any] = [None] * deepspeed.comm.get_world_size(group)
    torch.distributed.all_gather_object(parts, mine, group=group)
    return {key: value for part in parts for key, value in part.items()}


def from_rank_0(work: Callable[[], T], rank: int, world_size: int) -> T:
    """Do something on rank 0 alone, and give every rank its result, which must pickle; every rank calls this.

    A ValueError or OSError is raised on every rank.
    """
    if world_size == 1:
        return work()
    told: list[Any] = [None, None]
    if rank == 0:
        try:
            told[0] = work()
        except (ValueError, OSError) as mistake:
            told[1] = mistake
    torch.distributed.broadcast_object_list(told)
    result, mistake = told
    if mistake is not None:
        raise mistake
    return result


def check_shared(folder: Path, rank: int, world_size: int) -> None:
    """Raise ValueError unless every rank sees the same folder and may write there, naming the machines where not.

    Every rank calls this. Rank 0 makes the folder, and for a moment a file in it with a name that nobody can guess.
    """
    if world_size == 1:
        return
    name = from_rank_0(lambda: _leave_mark(folder), rank, world_size)
    until = time.monotonic() + APPEARS_S
    while not (seen := (folder / name).exists()) and time.monotonic() < until:
        time.sleep(0.1)
    fine = seen and os.access(folder, os.W_OK)
    answers: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(answers, None if fine else socket.gethostname())
    if rank == 0:
        (folder / name).unlink()
    if machines := sorted({machine for machine in answers if machine is not None}):
        raise ValueError(
            f"{folder.absolute()}: {', '.join(machines)} cannot see there, or not write, what rank 0 does. "
            "Put run.output_dir on a file system that all machines share."
        )


def _leave_mark(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f".seen-by-all-{secrets.token_hex(8)}"
    (folder / name).touch()
    return name


def claim(folder: Path, rank: int, world_size: int) -> None:
    """Have an output folder for this run alone, until its process ends, however it does; every rank calls this.

    Raises ValueError if another run of this machine is still there after LEAVES_S. One of another machine is only warned of:
    on a network file system a dead machine's lock may outlive it.
    """
    from_rank_0(lambda: _claim(folder), rank, world_size)


def _claim(folder: Path) -> None:
    if folder.resolve() in _claims:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _claims[folder.resolve()] = acquire(folder / CLAIM, LEAVES_S)
    except OSError:
        return  # nothing can be written there, which saving.py explains
    except LockHeldError as taken:
        where = f"{folder}: process {taken.pid} on {taken.host} is training there"
        if taken.is_local:
            raise ValueError(f"{where}. End that, or choose another run.output_dir.") from taken
        log.warning("%s, or was until its machine died; going on", where)
