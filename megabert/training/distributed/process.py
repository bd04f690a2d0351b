"""Joining the process group, and the environment of a rank's process."""

import ctypes
import os
import socket
import warnings
from datetime import timedelta

import deepspeed
import torch

from megabert.training.distributed.device import training_device
from megabert.training.distributed.gloo import gather_in_place

# A rank waits this long for the others: while rank 0 prepares the quickstart's corpus, nothing moves for a minute or two.
# A rank that dies is noticed at once all the same (roll_call.py).
TIMEOUT = timedelta(minutes=30)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h; see mallopt(3)


def start_process() -> tuple[int, int]:
    """Join the process group, from whatever launched this process. Returns (rank, world size).

    Understands the deepspeed launcher, torchrun and srun; alone, a process is rank 0 of 1.
    """
    # DeepSpeed 0.19.8 calls collectives by names that PyTorch is about to change: nothing for a user to do.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # DeepSpeed would compile this operation, which training does not use, for over a minute at every first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    slurm = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    if "SLURM_STEP_ID" in os.environ:  # inside srun; the batch script's own shell has SLURM_PROCID too
        for ours, theirs in slurm.items():
            os.environ.setdefault(ours, os.environ[theirs])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(_free_port()) if os.environ["WORLD_SIZE"] == "1" else "29500")
    if "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    deepspeed.init_distributed(timeout=TIMEOUT, verbose=False)
    if training_device().type == "cpu":  # asked on a GPU too: it sets the device that NCCL sends objects from
        keep_freed_memory()
        gather_in_place()
    return deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()


def keep_freed_memory() -> None:
    """Let malloc keep what is freed for the next allocation, as the allocators of GPUs do. Does nothing without glibc.

    By default every large tensor is mapped anew, and each 4 kB of it costs a page fault when they are first written to: a
    tenth of a step's time. What the process has used once it now holds to its end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
