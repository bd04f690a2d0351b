"""The accelerator of this rank: the only file beside kernels/resolve.py that asks what device this is."""

import os
import resource
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator


def training_device() -> torch.device:
    """The accelerator of this rank."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(accelerator.current_device_name())


def device_name(device: torch.device) -> str:
    """As torch calls the card, or cpu."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def device_event() -> Any:
    """The accelerator's class of events, or None for a CPU."""
    return get_accelerator().Event


def peak_memory(device: torch.device) -> int:
    """Bytes, the most that this process has used so far: of the device, as its allocator says; on a CPU resident memory."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return get_accelerator().max_memory_allocated()
