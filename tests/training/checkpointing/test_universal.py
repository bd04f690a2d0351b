"""Tests of sharing a conversion over ranks; test_resume.py compares what ranks convert with what one does."""

import errno
import functools
import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megabert.training.checkpointing import universal
from megabert.training.checkpointing.universal import Conversion
from megabert.training.distributed.deepspeed_compat import group_settings, repair_universal_load
from megabert.training.updates.optimizers import StableAdamW
from tests.training.helpers.shared_conversion import ThreadRank, Threads


def merge_zero3_slices(folder: Path, name: str) -> int:
    """Stands for DeepSpeed's function of this name. Returns how many fragments it sees."""
    return len(list((folder / name).glob("0/fp32.*")))


def conversion(tmp_path: Path) -> Conversion:
    (tmp_path / "out/tmp/w/0").mkdir(parents=True)
    (tmp_path / "out/tmp/w/0/fp32.00").touch()
    found = Conversion(tmp_path / "step-1", tmp_path / "out", ThreadRank(Threads(1), 0))
    found.fragments["w"] = 2
    return found


def test_a_rank_waits_until_it_sees_what_others_have_written(tmp_path, monkeypatch):
    merging, merge = conversion(tmp_path), functools.partial(merge_zero3_slices, tmp_path / "out/tmp")
    timer = threading.Timer(0.3, (tmp_path / "out/tmp/w/0/fp32.01").touch)
    timer.start()
    assert merging._do_part(merge, ["w"]) == [2]
    monkeypatch.setattr(universal, "VISIBLE_WITHIN_S", 0.1)
    merging.fragments["w"] = 3
    with pytest.raises(OSError, match="tmp/w: not all that other ranks have written is visible on this machine"):
        merging._do_part(merge, ["w"])
    # A parameter whose merged file rank 0 does not see would be written again by DeepSpeed, rounded.
    merging.fragments["w"] = 2
    with pytest.raises(OSError, match=r"zero/w/fp32\.pt: not all that other ranks have written"):
        merging._share(merge, ["w"])


def test_the_error_of_any_rank_ends_the_conversion_on_rank_0(tmp_path):
    threads, raised = Threads(3), []

    def work(item: tuple[int, int]) -> None:
        if item == (0, 1):
            raise OSError(errno.ENOSPC, "No space left on device")

    def run(rank: int) -> None:
        (tmp_path / "out/tmp").mkdir(parents=True, exist_ok=True)
        try:
            Conversion(tmp_path, tmp_path / "out", ThreadRank(threads, rank))._do_part(work, [(0, n) for n in range(5)])
        except OSError as error:
            raised.append((rank, str(error)))

    running = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert raised == [(0, "rank 1: OSError: [Errno 28] No space left on device")]


def test_progress_is_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(universal, "LOG_EVERY_S", 0.0)
    caplog.set_level(logging.INFO)
    merging = conversion(tmp_path)
    merging.fragments.clear()
    merging._do_part(functools.partial(merge_zero3_slices, tmp_path), ["v", "w"])
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'step-1'}: converting for another number of ranks: {done} of 2 parameters" for done in (1, 2)
    ]


@pytest.mark.parametrize(
    ("optimizer_class", "options", "device"),
    [
        (torch.optim.AdamW, {"fused": True}, "meta"),
        (StableAdamW, {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}, "cpu"),
    ],
)
def test_steps_of_a_universal_checkpoint_are_where_the_optimizer_looks_for_them(optimizer_class, options, device):
    """The device "meta" stands for a GPU, where fused AdamW refuses steps in host memory."""
    flat = [torch.nn.Parameter(torch.zeros(4, device="meta")) for _ in range(2)]
    optimizer = optimizer_class([{"params": [part]} for part in flat], lr=1e-3, **options)
    engine: Any = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer, param_groups=optimizer.param_groups))
    settings, loaded = group_settings(engine), torch.tensor(3.0)
    for part in flat:
        optimizer.state[part]["step"] = loaded
    repair_universal_load(engine, settings)
    steps = [optimizer.state[part]["step"] for part in flat]
    assert [step.device.type for step in steps] == [device] * 2
    assert steps[0] is not steps[1]
    assert all(step is not loaded for step in steps)
