"""A stand-in for a CUDA graph on the CPU: it repeats recorded operations with the tensors and numbers that they had."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megabert.kernels import resolve
from megabert.model.ops import TORCH_OPS
from megabert.model.padding import Sequences
from megabert.training import plan
from megabert.training.distributed import device
from megabert.training.micro_batch.graph import MicroBatchGraph


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Recorder(TorchDispatchMode):
    """Records every operation within the block. What they wrote is restored at its end, as if they had not run.

    As in a real graph, dropout draws from the generator of the moment of the replay, and the states that activation
    checkpointing saves and restores count from there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self.written: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.get_state, self.set_state = torch.get_rng_state, torch.set_rng_state

    def __enter__(self) -> "Recorder":
        self.before = self.get_state()
        torch.get_rng_state, torch.set_rng_state = self._get, self._set
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        torch.get_rng_state, torch.set_rng_state = self.get_state, self.set_state
        for storage, content in self.written.values():
            storage.copy_(content)
        self.set_state(self.before)

    def _get(self) -> Tensor:
        state = self.get_state()
        self.calls.append(lambda: state.set_(self.get_state()))  # type: ignore[call-overload]
        return state

    def _set(self, new_state: Tensor) -> None:
        self.set_state(new_state)
        self.calls.append(lambda: self.set_state(new_state))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors(given.get(argument.name)):
                    storage = tensor.untyped_storage()
                    self.written.setdefault(storage._cdata, (storage, storage.clone()))
        results = func(*args, **kwargs)

        def repeat() -> None:
            for result, fresh in zip(tensors(results), tensors(func(*args, **kwargs)), strict=True):
                if result.untyped_storage()._cdata != fresh.untyped_storage()._cdata:
                    result.copy_(fresh)

        self.calls.append(repeat)
        return results


def record(work: Callable[[], None]) -> Callable[[], None]:
    """Do what device.capture() does."""
    with Recorder() as recorder:
        work()
    sys.stdout.write(f"captured {len(recorder.calls)} operations\n")

    def replay() -> None:
        with torch.no_grad():
            for call in recorder.calls:
                call()

    return replay


def marks_of(graph: MicroBatchGraph) -> list[dict]:
    """Return the notes on the nodes of autograd that collect the parameters' gradients; an unused node is made anew."""
    # torch declares a method where its nodes have a property.
    nodes: list[Any] = [get_gradient_edge(parameter).node for parameter in graph.parameters]
    return [node.metadata for node in nodes]


def plan_on_device(
    sequences: Sequences, slopes: Tensor | None, head_dim: int, reach: int | None = None
) -> Callable[[Tensor, float], Tensor]:
    """Plan attention without reading a length on the host, as kernels do."""

    def attend(qkv: Tensor, dropout_p: float) -> Tensor:
        token = torch.arange(qkv.shape[0])
        document = torch.searchsorted(sequences.cu_seqlens.long(), token, right=True)
        distance = (token[:, None] - token).abs()
        bias = torch.zeros_like(distance, dtype=qkv.dtype)[None]
        if slopes is not None:
            bias = -(slopes[:, None, None] * distance).to(qkv.dtype)
        bias = bias.masked_fill(document[:, None] != document, -torch.inf)
        query, key, value = qkv.permute(1, 2, 0, 3)[:, None]  # (1, H, T, D) each
        return scaled_dot_product_attention(query, key, value, bias[None], dropout_p)[0].transpose(0, 1)

    return attend


def install(graphs: bool) -> None:
    """Let a run on the CPU have attention that can be captured, and with graphs=True capture its micro-batches."""
    resolve.torch_ops = lambda: TORCH_OPS._replace(attention=plan_on_device)
    if graphs:
        plan.choose_cuda_graphs = lambda recipe, ds_config, device_type, why_not_captured: None
        device.warm_up, device.capture = Capture.warm_up, Capture.capture


class Capture:
    """What device.py does for a graph, and a check that no node of a parameter's gradient is older than the graph.

    A backward pass waits for the stream that such a node was made on. If that is not the capture's own stream or one
    that warmed up, a real capture fails.
    """

    has_begun = False

    @classmethod
    def warm_up(cls, work: Any) -> None:
        if not cls.has_begun:
            cls.has_begun = True
            for marks in marks_of(work.__self__):
                marks["older"] = True
        work()

    @staticmethod
    def capture(work: Any) -> Callable[[], None]:
        assert not any("older" in marks for marks in marks_of(work.__self__)), "a node is older than the graph"
        return record(work)
