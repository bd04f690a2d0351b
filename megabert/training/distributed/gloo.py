"""All-gather among CPU ranks: gloo's own copies everything through buffers that it allocates anew for every call."""

from typing import Any

import deepspeed.comm.comm
import torch.distributed as dist
from torch import Tensor


def gather_in_place() -> None:
    """Have DeepSpeed gather weights by `all_gather`: bench_engine.py's two_rank_efficiency is what it is worth."""
    backend: Any = deepspeed.comm.comm.cdb
    backend.all_gather_function = all_gather


def all_gather(
    output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> dist.Work | None:
    """As torch.distributed.all_gather_into_tensor: this rank's part, of which the ranks' make up the output in their order.

    Around the ring, each rank passes on to the next what it was passed last, from and to the output itself. What need not be
    there when this returns (async_op) is gathered by gloo.
    """
    if async_op:
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=True)
    group = group or dist.group.WORLD
    assert group is not None, "the process group was made"
    size, rank = group.size(), group.rank()
    parts = output_tensor.view(size, -1)
    if parts[rank].data_ptr() != input_tensor.data_ptr():
        parts[rank].copy_(input_tensor.view(-1))
    following, preceding = ((rank + step) % size for step in (1, -1))
    for step in range(size - 1):
        passing = [
            dist.P2POp(dist.isend, parts[(rank - step) % size], group=group, group_peer=following),
            dist.P2POp(dist.irecv, parts[(rank - step - 1) % size], group=group, group_peer=preceding),
        ]
        for work in dist.batch_isend_irecv(passing):
            work.wait()
    return None
