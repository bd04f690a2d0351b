"""Set in the environment, before DeepSpeed is loaded, which accelerator it uses and which GPU this rank uses."""

import logging
import os
from collections.abc import MutableMapping

import torch
import torch.distributed

from megabert.kernels.devices import can_torch_use_gpus, has_nvidia_driver, torch_sees_a_gpu, why_gpu_is_unused

log = logging.getLogger(__name__)


def choose_accelerator(environ: MutableMapping[str, str] = os.environ) -> None:
    """Tell DeepSpeed which accelerator to use, unless the user has; without this it tries several and warns.

    Raises ValueError if torch is a CPU build on a machine with an NVIDIA GPU.
    """
    if environ.get("DS_ACCELERATOR"):
        return
    if problem := why_gpu_is_unused(environ):
        if has_nvidia_driver() and not can_torch_use_gpus():
            raise ValueError(problem)
        log.warning("training on the CPU: %s", problem)
    environ["DS_ACCELERATOR"] = "cuda" if torch_sees_a_gpu() else "cpu"


def choose_own_gpu(visible: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set LOCAL_RANK to the index of this rank's GPU, for us and for DeepSpeed. visible: the GPUs that this rank sees.

    SLURM's --gpus-per-task and --gpu-bind show each task its own GPUs only, numbered from 0. Other launchers show all
    GPUs of a machine to each rank. Raises ValueError if there are fewer GPUs than ranks.
    """
    if not visible:
        name = environ.get("DS_ACCELERATOR")
        raise ValueError(f"DS_ACCELERATOR is {name}, but torch sees no GPU here. Unset it, or set it to cpu.")
    local_rank = int(environ["LOCAL_RANK"])
    if local_rank >= visible and "SLURM_STEP_ID" not in environ:
        raise ValueError(
            f"rank {environ['RANK']} is number {local_rank} of this machine, counted from 0, but only {visible} GPUs "
            "are visible. Start one rank per GPU, as with deepspeed --num_gpus or torchrun --nproc-per-node."
        )
    environ["LOCAL_RANK"] = str(local_rank % visible)


def claim_gpu(store: torch.distributed.Store, host: str, gpu: str) -> None:
    """Raise ValueError if another rank has claimed the same GPU: NCCL would stop with a traceback, or wait.

    gpu: a name that is the same for all ranks of the host, such as the UUID.
    """
    if store.add(f"megabert/gpu/{host}/{gpu}", 1) > 1:
        raise ValueError(
            f"two ranks would use the same GPU {gpu} of {host}. Start one rank per GPU: with SLURM, give "
            "--ntasks-per-node the number of --gpus-per-node, or one GPU to each task with --gpus-per-task=1."
        )
