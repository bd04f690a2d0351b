"""Coordinate ranks at start-up: do work once on rank 0, check the shared folder, and lock the output folder."""

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
from megabert.training.distributed.rank_env import host_name

K = TypeVar("K")
T = TypeVar("T")

log = logging.getLogger(__name__)

# This file in the output folder names the process that trains there.
LOCK_FILE = "running.lock"
# A run whose launcher was killed saves and exits within 45 s, see signals.py.
LOCK_WAIT_S = 60.0
# Clients of a network file system may cache a folder's listing for a few seconds.
VISIBLE_WITHIN_S = 10.0

# The locks by their folders. They are held until the process ends.
_held_locks: dict[Path, Lock] = {}


def gather_dicts(part: dict[K, T], group: torch.distributed.ProcessGroup | None = None) -> dict[K, T]:
    """Merge the dicts of all ranks of the group; every rank calls this and gets the same result."""
    parts: list[Any] = [None] * deepspeed.comm.get_world_size(group)
    torch.distributed.all_gather_object(parts, part, group=group)
    return {key: value for part in parts for key, value in part.items()}


def gather_hosts(world_size: int) -> list[str]:
    """Return the host of every rank; every rank calls this."""
    hosts = [host_name()] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(hosts, host_name())
    return hosts


def broadcast_from_rank0(work: Callable[[], T], rank: int, world_size: int) -> T:
    """Call work() on rank 0 only and return its result, which must pickle, on every rank; every rank calls this.

    A ValueError or OSError that work() raises is raised on every rank.
    """
    if world_size == 1:
        return work()
    message: list[Any] = [None, None]
    if rank == 0:
        try:
            message[0] = work()
        except (ValueError, OSError) as error:
            message[1] = error
    torch.distributed.broadcast_object_list(message)
    result, error = message
    if error is not None:
        raise error
    return result


def check_shared_folder(folder: Path, rank: int, world_size: int) -> None:
    """Raise ValueError, naming the machines, unless every rank sees the same folder and may write to it.

    Every rank calls this. Rank 0 creates the folder, and for a moment a file with a random name in it.
    """
    if world_size == 1:
        return
    name = broadcast_from_rank0(lambda: _create_marker(folder), rank, world_size)
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while not (visible := (folder / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    usable = visible and os.access(folder, os.W_OK)
    hosts: list[str | None] = [None] * world_size
    torch.distributed.all_gather_object(hosts, None if usable else socket.gethostname())
    if rank == 0:
        (folder / name).unlink()
    if failing_hosts := sorted({host for host in hosts if host is not None}):
        raise ValueError(
            f"{folder.absolute()}: {', '.join(failing_hosts)} cannot read or write files that rank 0 creates "
            "there. Put run.output_dir on a file system that all machines share."
        )


def _create_marker(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f".seen-by-all-{secrets.token_hex(8)}"
    (folder / name).touch()
    return name


def lock_output_dir(folder: Path, rank: int, world_size: int) -> None:
    """Lock an output folder for this run until its process ends, by whatever cause; every rank calls this.

    Raises ValueError if another process on this machine still holds the lock after LOCK_WAIT_S. For a process on
    another machine it only logs a warning: on a network file system the lock of a dead machine may remain.
    """
    broadcast_from_rank0(lambda: _lock(folder), rank, world_size)


def unlock_output_dir(folder: Path) -> None:
    """Release the lock of lock_output_dir, in a process that continues after its run."""
    if lock := _held_locks.pop(folder.resolve(), None):
        lock.release()


def _lock(folder: Path) -> None:
    if folder.resolve() in _held_locks:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _held_locks[folder.resolve()] = acquire(folder / LOCK_FILE, LOCK_WAIT_S)
    except OSError:
        # The folder cannot be written, which checkpointing/writer.py reports.
        return
    except LockHeldError as error:
        holder = f"{folder}: process {error.pid} on {error.host}"
        if error.is_local:
            raise ValueError(f"{holder} is training there. Stop it, or choose another run.output_dir.") from error
        log.warning(
            "%s holds the lock. Continuing: if that machine still trains there, stop one of the two runs", holder
        )
