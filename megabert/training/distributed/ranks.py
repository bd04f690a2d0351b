"""What ranks tell one another."""

from typing import Any

import deepspeed
import torch.distributed


def gather(mine: dict[Any, Any], group: torch.distributed.ProcessGroup | None = None) -> dict[Any, Any]:
    """Merge every rank's dict; all ranks of the group call this and get the same."""
    parts: list[Any] = [None] * deepspeed.comm.get_world_size(group)
    torch.distributed.all_gather_object(parts, mine, group=group)
    return {key: value for part in parts for key, value in part.items()}
