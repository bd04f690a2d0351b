"""Join the process group and set up this rank's process."""

import ctypes
import os
from datetime import timedelta

import deepspeed
import torch

from megabert.training.distributed import deepspeed_compat
from megabert.training.distributed.device import training_device
from megabert.training.distributed.gloo import ring_all_gather
from megabert.training.distributed.rank_env import rank_variables

# How long a collective waits for other ranks: while rank 0 prepares the quickstart's corpus, they wait for minutes.
# The watchdog notices a dead rank at once (distributed/watchdog.py).
TIMEOUT = timedelta(minutes=30)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt(3), from glibc's malloc.h


def init_distributed() -> tuple[int, int]:
    """Join the process group under any launcher (see distributed/rank_env.py). Returns (rank, world size)."""
    deepspeed_compat.ignore_deprecated_collectives()
    deepspeed_compat.skip_shm_comm_build()
    os.environ.update(rank_variables())
    if "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    deepspeed.init_distributed(timeout=TIMEOUT, verbose=False)
    # Called on a GPU too: it sets the current device, from which NCCL sends Python objects.
    if training_device().type == "cpu":
        keep_freed_memory()
        deepspeed_compat.replace_all_gather(ring_all_gather)
    return deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()


def keep_freed_memory() -> None:
    """Let malloc keep freed memory for later allocations, as GPU allocators do. Does nothing without glibc.

    By default malloc maps new pages for every large tensor, and the first write to each is a page fault: a tenth of
    the time of a step. The price is that the process never returns memory to the system.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
