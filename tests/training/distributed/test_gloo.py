"""What goes around the ring is what gloo's own all-gather brings."""

from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import torch.multiprocessing

from megabert.training.distributed.gloo import all_gather
from tests.conftest import REPOSITORY

RANKS = 3


def gather(rank: int, meeting: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    pair = dist.new_group([0, 2])
    for group in (None, pair):
        if group is pair and rank == 1:
            continue
        size, place = (RANKS, rank) if group is None else (2, rank // 2)
        for count in (1, 7, 100_000):
            own = torch.arange(count) * 10 + rank
            expected, outside, inside = (torch.zeros(size * count, dtype=own.dtype) for _ in range(3))
            dist.all_gather_into_tensor(expected, own, group=group)
            all_gather(outside, own, group=group)
            inside[place * count : (place + 1) * count] = own
            all_gather(inside, inside[place * count : (place + 1) * count], group=group)
            assert expected.equal(outside)
            assert expected.equal(inside)
            later = torch.zeros_like(expected)
            work = all_gather(later, own, group=group, async_op=True)
            assert work is not None
            work.wait()
            assert expected.equal(later)
    dist.barrier()
    dist.destroy_process_group()


def test_the_ring_gathers_as_gloo_does(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY)  # for the processes that are spawned
    torch.multiprocessing.spawn(gather, (tmp_path / "meeting",), nprocs=RANKS)


def test_deepspeed_gathers_around_the_ring():
    """If DeepSpeed calls its function otherwise, it says so here."""
    folder = Path(deepspeed.__file__).parent
    assert "return self.all_gather_function(output_tensor=output_tensor," in (folder / "comm/torch.py").read_text()
    assert "dist.all_gather_into_tensor(group_flat, partitioned" in (folder / "runtime/utils.py").read_text()
