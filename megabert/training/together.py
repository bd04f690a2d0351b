"""What ranks do once for all of them, and what they must see alike before the first step."""

import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed

T = TypeVar("T")

APPEARS_S = 10.0  # a network file system's clients may look at what they remember of a folder for a few seconds


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
