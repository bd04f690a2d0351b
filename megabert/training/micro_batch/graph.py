"""Capture a micro-batch's forward and backward pass as one CUDA graph, and replay it for each micro-batch."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megabert.data.batch import PackedBatch
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training.distributed import device as devices
from megabert.training.micro_batch.loss import scaled_loss

# Micro-batches that run as usual before one is captured, as many as torch's documentation advises.
WARM_UPS = 3


class MicroBatchGraph:
    """Adds up the gradients of a step's micro-batches by replaying a graph. Not run on a GPU yet.

    A graph repeats its kernels with the same arguments. So all that differs between micro-batches is in tensors that
    stay in their place: the batch, the factor of the loss, the gradients and the sums. Dropout's seed comes from the
    device's generator, see kernels/dropout.py. Batches of other shapes, and weights at other addresses, are captured
    anew; only one graph is kept, because it reserves the memory of all its activations.
    """

    def __init__(self, model: MegaBertForMaskedLM, bf16: bool):
        self.model, self.bf16 = model, bf16
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        """of the step so far, one for each parameter"""
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        """MaskedLoss's, of the step so far"""
        self.scale = torch.zeros((), device=self.device)
        self.batch: PackedBatch | None = None
        self.addresses: list[int] = []
        self.replay: Callable[[], None] | None = None
        self.warm_ups = 0

    def start_step(self, scale: Tensor) -> None:
        """Begin anew. scale: () fp32, the factor of each micro-batch's summed loss."""
        torch._foreach_zero_(self.gradients)
        self.sums.zero_()
        self.scale.copy_(scale)
        addresses = [parameter.data_ptr() for parameter in self.parameters]
        if addresses != self.addresses:
            self.addresses, self.batch = addresses, None

    def add(self, batch: PackedBatch) -> None:
        """Add a micro-batch's gradients and sums. Its dropout must be seeded. The host waits for a capture only."""
        kept = self.batch
        if kept is None or (kept.shapes, kept.max_seqlen) != (batch.shapes, batch.max_seqlen):
            self.replay, self.warm_ups = None, 0
            self.batch = kept = replace(batch, buffer=torch.empty_like(batch.buffer, device=self.device))
        kept.buffer.copy_(batch.buffer, non_blocking=True)
        if self.replay is None and self.warm_ups < WARM_UPS:
            self.warm_ups += 1
            devices.warm_up(self._compute)
            return
        if self.replay is None:
            self.replay = devices.capture(self._compute)
        self.replay()

    def _compute(self) -> None:
        """Compute what is in the kept batch's buffer. Nothing here may read a value that a micro-batch changes."""
        assert self.batch is not None, "a micro-batch is computed before add() has copied one"
        inputs = self.batch.model_inputs(self.device)
        # A number of the host; only model.padding padded, which has no graph, needs it.
        del inputs["num_documents"]
        # Without the engine: its hooks would run within the backward pass.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.model.masked_loss(**inputs)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(scaled_loss(output, self.scale), self.parameters)
        torch._foreach_add_(self.gradients, gradients)
        self.sums += torch.stack([part.detach().double() for part in output])
