"""A CUDA device that computes nothing: FakeTensors on "cuda", DeepSpeed's accelerator for them, and a log of their use.

Import it before DeepSpeed, in a process with the library of no_op_cuda.cpp preloaded.
"""

import contextlib
import traceback
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch._subclasses.fake_tensor as fake_tensor
import torch.cuda.amp.common
import torch.distributed
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch._dynamo.device_interface import CudaInterface
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that only make a view or reserve memory, and launch no kernel.
NO_LAUNCH = set(
    """view _unsafe_view t transpose detach slice expand permute unsqueeze alias select squeeze as_strided split chunk
    empty new_empty empty_like empty_strided new_empty_strided _reshape_alias unbind split_with_sizes lift_fresh
    record_stream set_ device""".split()
)


class Log(TorchDispatchMode):
    """What happens on the device while `on`: launches, products, and every moment that makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.capturing = False
        # What the host reads from the device.
        self.answer = 0.0
        # What these read instead, by FILE:FUNCTION.
        self.answers: dict[str, float] = {}
        # Bytes of the device's tensors.
        self.live = 0
        # The most of them so far.
        self.peak = 0
        self.known: set[int] = set()
        self.reset()

    def reset(self) -> None:
        self.waits: Counter[str] = Counter()
        """"kind FILE:FUNCTION" of a value that the host reads, a synchronization, or a blocking copy"""
        self.launches: Counter[str] = Counter()
        """operations on the device"""
        self.flops = 0
        """of matrix products outside MegaBERT's own operations"""
        self.wide_products = 0
        """matrix products in another precision than bf16"""
        self.captured = 0
        """operations on the device while `capturing`"""
        self.not_captured: Counter[str] = Counter()
        """what a graph would repeat with old values, or cannot do: values read by the host or taken from it"""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @property
    def value(self) -> float:
        """What the host reads now."""
        return self.answers.get(_caller(), self.answer)

    def wait(self, kind: str) -> None:
        if self.capturing:
            self.not_captured[f"{kind} {_caller()}"] += 1
        if self.on:
            self.waits[f"{kind} {_caller()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self._count_bytes(outputs)
        if not (self.on or self.capturing):
            return out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in inputs + outputs}
        if self.capturing:
            self.captured += "cuda" in devices
            # Even one that does not wait: a graph would copy from the old address.
            self.not_captured[f"{func} {_caller()}"] += devices == {"cpu", "cuda"}
            return out
        # A number on the host may take part in an operation on the device, unless it is copied there.
        copied = [tensor for tensor in inputs + outputs if tensor.dim() or "copy" in str(func)]
        if devices == {"cpu", "cuda"} and any(tensor.device.type == "cpu" for tensor in copied):
            if not (kwargs.get("non_blocking") or (str(func) == "aten.copy_.default" and True in args[2:])):
                self.wait("copy")
        name = func.overloadpacket.__name__
        if "cuda" in devices and name not in NO_LAUNCH:
            self.launches[name] += 1
            if name in ("mm", "addmm", "bmm"):
                left, right = inputs[-2:]
                self.flops += 2 * left.numel() * right.shape[-1]
                self.wide_products += left.dtype != torch.bfloat16
        return out

    def _count_bytes(self, outputs: list[torch.Tensor]) -> None:
        """Count new storages of the device, until they are freed."""
        for tensor in outputs:
            if tensor.device.type != "cuda":
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                weakref.finalize(storage, self._freed, key, size)
                self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


LOG = Log()


def _caller() -> str:
    """Return the innermost frame of MegaBERT or DeepSpeed as FILE:FUNCTION."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("megabert/", "deepspeed/"):
            if f"/{package}" in frame.filename:
                return f"{package}{frame.filename.rpartition(f'/{package}')[2]}:{frame.name}"
    return "elsewhere"


class Event:
    """A timing event."""

    def __init__(self, **options: bool) -> None:
        pass

    def record(self, *streams: Any) -> None:
        pass

    def wait(self, *streams: Any) -> None:
        pass

    def synchronize(self) -> None:
        LOG.wait("synchronize")

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


class Stream:
    """A stream."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def wait_stream(self, other: "Stream") -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        LOG.wait("synchronize")


# DeepSpeed does not annotate what an accelerator returns.
UNTYPED: Any = CPU_Accelerator


class FakeCuda(UNTYPED):
    """DeepSpeed's view of the device: it answers as a CUDA accelerator does."""

    Event, Stream = Event, Stream

    def __init__(self) -> None:
        super().__init__()
        self._name, self._communication_backend_name = "cuda", "fake"

    def is_synchronized_device(self) -> bool:
        return False

    def resolves_data_dependency(self) -> bool:
        return False

    def handles_memory_backpressure(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return "cuda" if device_index is None else f"cuda:{device_index}"

    def current_device_name(self) -> str:
        return "cuda:0"

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def device(self, device_index: int | None = None) -> Any:
        return contextlib.nullcontext()

    def synchronize(self, device_index: int | None = None) -> None:
        LOG.wait("synchronize")

    def stream(self, stream: Stream) -> Any:
        return contextlib.nullcontext()

    def current_stream(self, device_index: int | None = None) -> Stream:
        return Stream()

    def default_stream(self, device_index: int | None = None) -> Stream:
        return Stream()

    def is_bf16_supported(self) -> bool:
        return True

    def memory_allocated(self, device_index: int | None = None) -> int:
        return 0

    max_memory_allocated = memory_allocated

    def empty_cache(self) -> None:
        pass

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cuda"

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        return tensor


def _reading(kind: str, value: Callable[[torch.Tensor], Any], usual: Callable[..., Any]) -> Callable[..., Any]:
    def read(tensor: torch.Tensor, *arguments: Any) -> Any:
        if torch._guards.TracingContext.try_get() is not None:
            return usual(tensor, *arguments)
        if tensor.device.type == "cuda":
            LOG.wait(f"read({kind})")
        return value(tensor)

    return read


def capture(work: Callable[[], None]) -> Callable[[], None]:
    """Do work(), and log what of it cannot be in a CUDA graph. Returns a replay that does nothing."""
    LOG.capturing = True
    work()
    LOG.capturing = False
    return lambda: None


def _answers(tensor: torch.Tensor) -> Any:
    return np.full(tensor.shape, LOG.value).tolist()


def _gather_objects(object_list: list[Any], obj: Any, group: Any = None) -> None:
    """Take every rank for this one; torch would read the sizes of what the others sent from the device."""
    LOG.wait("objects")
    object_list[:] = [obj] * len(object_list)


def install() -> None:
    """Make torch and DeepSpeed believe in the device. Every value that the host reads from it is LOG.answer."""
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "current_device": 0,
        "device_count": 1,
        "get_device_capability": (9, 0),
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "get_device_properties": types.SimpleNamespace(multi_processor_count=132, major=9, minor=0),
        "get_rng_state": None,
        "set_rng_state": None,
        "_lazy_init": None,
        "_is_in_bad_fork": False,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *arguments, answer=answer, **options: answer)
    CudaInterface.Worker.get_device_properties = staticmethod(torch.cuda.get_device_properties)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    fake: Any = FakeTensor
    fake.item = _reading("item", lambda tensor: LOG.value, torch.Tensor.item)
    fake.tolist = _reading("tolist", _answers, torch.Tensor.tolist)
    for kind, convert in (("float", float), ("int", int), ("bool", bool)):
        usual = getattr(torch.Tensor, f"__{kind}__")
        setattr(fake, f"__{kind}__", _reading(kind, lambda tensor, convert=convert: convert(LOG.value), usual))
    fake.data_ptr = lambda tensor: tensor.untyped_storage()._cdata
    storage: Any = torch.UntypedStorage
    storage.data_ptr = lambda storage: storage._cdata
    # A small constant would be remembered and read without the device.
    fake_tensor.CONSTANT_NUMEL_LIMIT = 0  # pyrefly: ignore[bad-assignment]
    torch.Tensor.record_stream = lambda tensor, stream: None  # pyrefly: ignore[bad-assignment]
    torch.Tensor.pin_memory = lambda tensor, *arguments: tensor  # pyrefly: ignore[bad-assignment]
    # Dynamo would leave alone what runs below another mode of dispatch.
    modes: Any = fake_tensor.FakeTensorMode
    modes.ignore_compile_internals = classmethod(lambda cls: True)
    torch.distributed.all_gather_object = _gather_objects
    load = torch.load
    # Of fake tensors it cannot be asked with a function, DeepSpeed's way to say the CPU.
    torch.load = lambda f, map_location=None, **options: load(f, map_location="cpu", **options)  # pyrefly: ignore[bad-assignment]
    set_accelerator(FakeCuda())


@contextlib.contextmanager
def fake_device() -> Iterator[None]:
    """Compute nothing within the block: every new tensor is fake."""
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        # torch.tensor(..., device="cuda") stays fake.
        torch._C._set_only_lift_cpu_tensors(True)
        yield
