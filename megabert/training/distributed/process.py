"""Join the process group and set up this rank's process."""

import ctypes
import errno
import os
import socket
from datetime import timedelta

import deepspeed
import torch
import torch.distributed

from megabert.process.error_text import first_line
from megabert.process.open_files import allow_open_files
from megabert.training.distributed import deepspeed_compat, flight_recorder
from megabert.training.distributed.accelerator import choose_own_gpu, claim_gpu
from megabert.training.distributed.device import backend_name, gpu_id, training_device, visible_gpus
from megabert.training.distributed.gloo import ring_all_gather
from megabert.training.distributed.rank_env import (
    LOOPBACK,
    are_ranks_on_one_machine,
    rank_variables,
    ranks_on_this_machine,
)
from megabert.training.distributed.watchdog import RankLostError

# How long a collective waits for other ranks: while rank 0 prepares the quickstart's corpus, they wait for minutes.
# The watchdog notices a dead rank at once (distributed/watchdog.py).
TIMEOUT = timedelta(minutes=30)

# A rank holds shards, batches of its loader workers and DeepSpeed's files open, 40 to 100 in all; rank 0 also the
# connections of a store and of a watchdog to each rank.
LEAST_OPEN_FILES, FILES_PER_RANK = 128, 4

OTHER_PORT = (
    "Perhaps another run has the port. Choose another one: deepspeed --master_port PORT, or MASTER_PORT=PORT for "
    "launch/slurm/pretrain.sbatch."
)

# Parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def init_distributed() -> tuple[int, int]:
    """Join the process group under any launcher (see distributed/rank_env.py). Returns (rank, world size)."""
    deepspeed_compat.ignore_deprecated_collectives()
    deepspeed_compat.skip_shm_comm_build()
    deepspeed_compat.pickle_enums_by_value()
    os.environ.update(rank_variables())
    if (visible := visible_gpus()) is not None:
        choose_own_gpu(visible)
    flight_recorder.switch_on()
    # Else every gloo group of W ranks opens W connections in each of them at once; few are ever used. Not under
    # torchrun: connections that are made late need its store, which is gone when the ranks save after its death.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    allow_open_files(LEAST_OPEN_FILES + FILES_PER_RANK * int(os.environ["WORLD_SIZE"]))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (ranks_on_this_machine() or 1)))
    join_process_group(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    try:
        deepspeed.init_distributed(timeout=TIMEOUT, verbose=False)
    except torch.distributed.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankLostError(f"the ranks cannot meet at {address}: {first_line(error)} {OTHER_PORT}") from error
    # Called on a GPU too: it sets the current device, from which NCCL sends Python objects.
    device = training_device()
    if device.type == "cpu":
        keep_freed_memory()
        deepspeed_compat.replace_all_gather(ring_all_gather)
    elif device.type == "cuda":
        # This precedes the first collective, in which NCCL fails, or waits, if two ranks have one GPU.
        claim_gpu(torch.distributed.distributed_c10d._get_default_store(), socket.gethostname(), gpu_id(device))
    return deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()


def join_process_group(rank: int, world_size: int) -> None:
    """Join the process group if all ranks are on this machine, so that no other machine can connect to it.

    By itself, torch's store listens on every network interface, and gloo on the one of the host's name. torchrun has
    opened a store before its ranks start, and several machines need theirs: there, DeepSpeed joins the group later.
    """
    if torch.distributed.is_initialized() or not are_ranks_on_one_machine():
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.HashStore() if world_size == 1 else open_store(rank, world_size)
    torch.distributed.init_process_group(backend_name(), store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)


def open_store(rank: int, world_size: int) -> torch.distributed.Store:
    """Open the store through which ranks find each other, on the loopback interface; rank 0 serves it.

    Raises RankLostError if the port is taken.
    """
    port, listening = int(os.environ["MASTER_PORT"]), None
    if rank == 0:
        try:
            server = socket.create_server((LOOPBACK, port), backlog=world_size)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise RankLostError(
                f"port {port}, where the ranks of this run meet, cannot be used: {os.strerror(error.errno or 0)}. "
                f"{OTHER_PORT}"
            ) from error
        # The store closes the detached descriptor.
        port, listening = server.getsockname()[1], server.detach()
    return torch.distributed.TCPStore(
        LOOPBACK, port, world_size, is_master=rank == 0, timeout=TIMEOUT, master_listen_fd=listening
    )


def keep_freed_memory() -> None:
    """Let malloc keep freed memory for later allocations, as GPU allocators do. Does nothing without glibc.

    By default malloc maps new pages for every large tensor, and the first write to each is a page fault: a tenth of
    the time of a step. The price is that the process never returns memory to the system.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
