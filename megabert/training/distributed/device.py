"""The accelerator of this rank; only this file and kernels/resolve.py ask which device it is."""

import os
import resource
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator


def training_device() -> torch.device:
    """Return this rank's accelerator, and make it the current device."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(accelerator.current_device_name())


def device_name(device: torch.device) -> str:
    """Return torch's name of the card, or "cpu"."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def event_class() -> Any:
    """Return the accelerator's class of timing events; None on a CPU."""
    return get_accelerator().Event


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has used so far: allocated on the device, or resident memory on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return get_accelerator().max_memory_allocated()


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 natively; on other CPUs bf16 is several times slower than fp32."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return get_accelerator().is_bf16_supported()
