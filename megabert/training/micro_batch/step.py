"""Compute a step's micro-batches, forward and backward, kernel by kernel or by a CUDA graph, and update once."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import deepspeed
import torch
from torch import Tensor

from megabert.data.batch import PackedBatch
from megabert.data.stream import DROPOUT, philox
from megabert.training.distributed.deepspeed_compat import reduce_once
from megabert.training.micro_batch.graph import MicroBatchGraph
from megabert.training.micro_batch.loss import scaled_loss

# Times a part of the step by its name.
Timed = Callable[[str], AbstractContextManager[None]]


def eager_step(
    engine: deepspeed.DeepSpeedEngine, batches: list[PackedBatch], scale: Tensor, seed: int, timed: Timed
) -> Tensor:
    """Compute the micro-batches through the engine, and update. Returns the MaskedLoss sums, (3,) fp64.

    scale: () fp32, see scaled_loss(). seed: the run's.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
    for batch in batches:
        seed_dropout(seed, batch.index)
        # Set explicitly, because DeepSpeed's own count of micro-batches is wrong during a batch warm-up.
        engine.set_gradient_accumulation_boundary(batch is batches[-1])
        with timed("forward"):
            output = engine(**batch.model_inputs(engine.device))
            loss = scaled_loss(output, scale)
        with timed("backward"):
            engine.backward(loss, scale_wrt_gas=False)
        with timed("optimizer"):
            engine.step()
        sums += torch.stack([part.detach().double() for part in output])
    return sums


def graph_step(
    engine: deepspeed.DeepSpeedEngine,
    graph: MicroBatchGraph,
    batches: list[PackedBatch],
    scale: Tensor,
    seed: int,
    timed: Timed,
) -> Tensor:
    """Do what eager_step() does by replaying the graph; the engine reduces the summed gradients and updates."""
    # Both passes: a graph cannot be timed in parts.
    with timed("forward"):
        graph.start_step(scale)
        for batch in batches:
            seed_dropout(seed, batch.index)
            graph.add(batch)
    with timed("backward"):
        reduce_once(engine, graph.gradients)
    with timed("optimizer"):
        engine.step()
    return graph.sums


def seed_dropout(seed: int, index: int) -> None:
    """Make a bin's dropout a function of (seed, index), on whichever rank it is computed."""
    torch.manual_seed(int(philox(seed, DROPOUT, index).integers(1 << 63)))
