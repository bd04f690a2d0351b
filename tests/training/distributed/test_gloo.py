"""The ring all-gather gives the same result as gloo's own."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megabert.training.distributed.gloo import ring_all_gather
from tests.helpers.runs import finish_ranks, start_ranks

RANKS = 3


def compare_on_one_rank(rank: int, store: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    pair = dist.new_group([0, 2])
    for group in (None, pair):
        if group is pair and rank == 1:
            continue
        size, group_rank = (RANKS, rank) if group is None else (2, rank // 2)
        for count in (1, 7, 100_000):
            part = torch.arange(count) * 10 + rank
            expected, separate, in_place = (torch.zeros(size * count, dtype=part.dtype) for _ in range(3))
            dist.all_gather_into_tensor(expected, part, group=group)
            ring_all_gather(separate, part, group=group)
            in_place[group_rank * count : (group_rank + 1) * count] = part
            ring_all_gather(in_place, in_place[group_rank * count : (group_rank + 1) * count], group=group)
            assert expected.equal(separate)
            assert expected.equal(in_place)
            asynchronous = torch.zeros_like(expected)
            work = ring_all_gather(asynchronous, part, group=group, async_op=True)
            assert work is not None
            work.wait()
            assert expected.equal(asynchronous)
    dist.barrier()
    dist.destroy_process_group()


RANK = """
import os, pathlib, sys
from tests.training.distributed.test_gloo import compare_on_one_rank
compare_on_one_rank(int(os.environ["RANK"]), pathlib.Path(sys.argv[1]))
"""


def test_the_ring_gathers_what_gloo_gathers(tmp_path):
    command = [sys.executable, "tests/helpers/scripts/run_code.py", RANK, str(tmp_path / "store")]
    done = finish_ranks(start_ranks(command, RANKS))
    assert done.code == 0, done.output
