"""Read this process's rank from the environment variables of its launcher, without importing torch."""

import ipaddress
import os
import socket
from collections.abc import Mapping

LOOPBACK = "127.0.0.1"
SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
SINGLE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": LOOPBACK}
# torchrun has the same default.
DEFAULT_PORT = "29500"
# The number of ranks on this machine, as torchrun and the deepspeed launcher name it.
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
# A single process may take any free port, because no other one has to know it.
ANY_FREE_PORT = "0"
# Everything that makes a process believe that it is a rank.
RANK_VARIABLES = (*SINGLE_PROCESS, "LOCAL_WORLD_SIZE", "MASTER_PORT")

LAST_PORT = 65535
UNSET = (
    "If no launcher started this process, remove what an earlier one left: unset RANK WORLD_SIZE LOCAL_RANK "
    "MASTER_ADDR MASTER_PORT."
)


def rank_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for torch.distributed.

    The deepspeed launcher and torchrun set them. Inside srun they are derived from SLURM's variables. A process that
    was started by itself is rank 0 of 1. Raises ValueError for what no launcher sets.
    """
    variables = {name: environ[name] for name in (*SINGLE_PROCESS, "MASTER_PORT") if name in environ}
    # SLURM_PROCID would not tell srun from the shell of a batch script, which has that variable as well.
    if "SLURM_STEP_ID" in environ:
        found = {name: environ[slurms] for name, slurms in SLURM_NAMES.items() if slurms in environ}
        variables = found | variables
    variables = SINGLE_PROCESS | variables
    variables = {"MASTER_PORT": ANY_FREE_PORT if variables["WORLD_SIZE"] == "1" else DEFAULT_PORT} | variables
    _check(variables)
    return variables


def _check(variables: Mapping[str, str]) -> None:
    """Raise ValueError for numbers that are none, and for a rank that is not below the number of ranks."""
    for name, value in variables.items():
        if name != "MASTER_ADDR" and not value.isdecimal():
            raise ValueError(f"the environment variable {name} is {value!r}, expected a number. {UNSET}")
    rank, size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    if rank >= size:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE is {size}, expected a rank below the number of ranks. {UNSET}")
    if int(variables["MASTER_PORT"]) > LAST_PORT:
        raise ValueError(f"MASTER_PORT is {variables['MASTER_PORT']}, expected a number up to {LAST_PORT}.")


def rank_of_this_process() -> int:
    """Return this process's rank among all processes of the run."""
    return int(rank_variables()["RANK"])


def host_name(environ: Mapping[str, str] = os.environ) -> str:
    """Return the name of this machine, as SLURM calls it if it started this process."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def ranks_on_this_machine(environ: Mapping[str, str] = os.environ) -> int | None:
    """Return how many ranks run on this machine; None if the launcher does not say."""
    given = next((environ[name] for name in LOCAL_SIZES if environ.get(name)), None)
    return None if given is None else int(given)


def are_ranks_on_one_machine(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether all ranks run on this machine, as far as the launcher says."""
    variables = rank_variables(environ)
    if "SLURM_STEP_ID" in environ and environ.get("SLURM_STEP_NUM_NODES") == "1":
        return True
    here = ranks_on_this_machine(environ)
    return here == int(variables["WORLD_SIZE"]) or _is_loopback(variables.get("MASTER_ADDR", LOOPBACK))


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        # The address is a host name.
        return address == "localhost"
