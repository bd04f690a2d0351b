"""Gather tensors of CPU ranks in a ring, because gloo's own all-gather allocates buffers in every call."""

import torch.distributed as dist
from torch import Tensor


def ring_all_gather(
    output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> dist.Work | None:
    """Do what torch.distributed.all_gather_into_tensor does: concatenate the ranks' inputs in rank order.

    In each of size - 1 rounds a rank sends the part that it received last to the next rank, straight from and into the
    output. With async_op, gloo's own all-gather is used.
    """
    if async_op:
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=True)
    group = group or dist.group.WORLD
    assert group is not None, "gathering began before the process group was initialized"
    size, rank = group.size(), group.rank()
    parts = output_tensor.view(size, -1)
    if parts[rank].data_ptr() != input_tensor.data_ptr():
        parts[rank].copy_(input_tensor.view(-1))
    next_rank, previous_rank = ((rank + step) % size for step in (1, -1))
    for step in range(size - 1):
        transfers = [
            dist.P2POp(dist.isend, parts[(rank - step) % size], group=group, group_peer=next_rank),
            dist.P2POp(dist.irecv, parts[(rank - step - 1) % size], group=group, group_peer=previous_rank),
        ]
        for work in dist.batch_isend_irecv(transfers):
            work.wait()
    return None
