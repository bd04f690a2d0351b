"""Read this process's rank from the environment variables of its launcher, without importing torch."""

import os
from collections.abc import Mapping

SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
SINGLE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
DEFAULT_PORT = "29500"  # torchrun's default, too
ANY_FREE_PORT = "0"  # for a single process: no other one has to know the port
# Everything that makes a process believe that it is a rank.
RANK_VARIABLES = (*SINGLE_PROCESS, "LOCAL_WORLD_SIZE", "MASTER_PORT")


def rank_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for torch.distributed.

    The deepspeed launcher and torchrun set them. Inside srun they are derived from SLURM's variables. A process that
    was started by itself is rank 0 of 1.
    """
    variables = {name: environ[name] for name in (*SINGLE_PROCESS, "MASTER_PORT") if name in environ}
    if "SLURM_STEP_ID" in environ:  # not by SLURM_PROCID: the shell of a batch script has that as well
        variables = {name: environ[slurm_name] for name, slurm_name in SLURM_NAMES.items()} | variables
    variables = SINGLE_PROCESS | variables
    return {"MASTER_PORT": ANY_FREE_PORT if variables["WORLD_SIZE"] == "1" else DEFAULT_PORT} | variables


def rank_of_this_process() -> int:
    """Return this process's rank among all processes of the run."""
    return int(rank_variables()["RANK"])
