"""Choose and use the accelerator of this rank; only this file and kernels/devices.py ask which device it is."""

import functools
import os
import resource
from collections.abc import Callable

import torch
from deepspeed.accelerator import get_accelerator

from megabert.process.error_text import first_line


def training_device() -> torch.device:
    """Return this rank's accelerator, and make it the current device."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(accelerator.current_device_name())


def visible_gpus() -> int | None:
    """Return how many GPUs this process sees; None where it trains on the CPU."""
    accelerator = get_accelerator()
    return None if accelerator.device_name() == "cpu" else accelerator.device_count()


def gpu_id(device: torch.device) -> str:
    """Return the UUID of a CUDA device, which is the same for all processes of a machine."""
    return str(torch.cuda.get_device_properties(device).uuid)


def backend_name() -> str:
    """Return torch.distributed's backend for the accelerator, such as gloo or nccl."""
    return get_accelerator().communication_backend_name()


def device_name(device: torch.device) -> str:
    """Return torch's name of the card, or "cpu"."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def to_device(values: list[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copy a few numbers to the device; the host does not wait for the copy."""
    host = torch.tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def event_class() -> Callable[..., torch.Event] | None:
    """Return the accelerator's class of timing events; None on a CPU."""
    return get_accelerator().Event


def memory_bytes(device: torch.device) -> int | None:
    """Return the whole memory of a card; None on a CPU."""
    return None if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has used so far: allocated on the device, or resident memory on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return get_accelerator().max_memory_allocated()


@functools.cache
def stream_of_graphs(device_index: int) -> torch.cuda.Stream:
    """Return the stream on which work is warmed up and captured, one for each device.

    The allocator keeps freed memory for the stream that it was freed on: on another stream, each warm-up would take as
    much memory again.
    """
    return torch.cuda.Stream(device_index)


def warm_up(work: Callable[[], None]) -> None:
    """Do work that will be captured on a stream of its own, as torch asks for; it then compiles and allocates."""
    stream = stream_of_graphs(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)


def capture(work: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels that work() launches, without running them, as a CUDA graph. Returns what launches them all.

    Raises ValueError if one of them cannot be recorded, and torch.OutOfMemoryError. Not run on a GPU yet.
    """
    graph, stream = torch.cuda.CUDAGraph(), stream_of_graphs(torch.cuda.current_device())
    try:
        # With "global" the loader's thread, which pins memory at any moment, would end the capture.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
    except RuntimeError as error:
        cause: BaseException = error
        # After an error the end of the capture fails too, with a message that says less.
        while cause.__context__ is not None:
            cause = cause.__context__
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        raise ValueError(
            f"run.cuda_graphs: the micro-batch cannot be captured: {first_line(cause)}. Set run.cuda_graphs to false."
        ) from error
    return graph.replay
