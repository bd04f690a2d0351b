"""A run that stopped and went on is bitwise the run that never stopped: weights and optimizer, at every ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megabert import checkpoint_format as layout
from tests.conftest import Corpus, ds_config_in
from tests.training.many_runs import flags_of, run_many

STEPS, STOPPED = 4, 2
PLAIN, SAVING = f"--run.max_steps={STEPS}", f"--run.save_every_steps={STOPPED}"


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """Where two checkpoints' contents are not the same, bit for bit."""
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{where}: {first.keys() ^ second.keys()}"]
        return [found for key in first for found in differences(first[key], second[key], f"{where}/{key}")]
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [f"{where}: {len(first)} and {len(second)} items"]
        pairs = enumerate(zip(first, second, strict=True))
        return [found for i, (a, b) in pairs for found in differences(a, b, f"{where}/{i}")]
    if isinstance(first, torch.Tensor):
        return [] if first.dtype == second.dtype and torch.equal(first, second) else [where]
    return []


def assert_same_end(first: Path, second: Path) -> None:
    """Both runs' last checkpoints hold the same weights and optimizer state."""
    ends = [checkpoint_of(out, STEPS) for out in (first, second)]
    files = [sorted(path.name for path in end.glob("*.pt")) for end in ends]
    assert files[0] == files[1]
    tensors = 0
    for name in files[0]:
        states = [torch.load(end / name, weights_only=False) for end in ends]
        assert not differences(*states, where=name)
        tensors += sum(isinstance(value, torch.Tensor) for value in states[0].get("module", {}).values())
    assert tensors > 10


def checkpoint_of(out: Path, step: int = STOPPED) -> Path:
    return out / "checkpoints" / layout.tag_of(step)


@pytest.mark.parametrize(
    ("stages", "ranks"), [(["zero0", "zero1", "zero2", "zero2_offload", "zero3"], 1), (["zero1", "zero2", "zero3"], 2)]
)
def test_a_resumed_run_ends_bitwise_the_same(corpus: Corpus, tmp_path, stages, ranks):
    """In fp32 and bf16. One process makes all runs; test_interrupts.py and fault_injection.py start anew."""
    folders, runs = [], []
    for stage in stages:
        for bf16 in (False, True):
            folder = tmp_path / f"{stage}-{bf16}"
            folder.mkdir()
            config = ds_config_in(stage, folder, bf16)
            folders.append(folder)
            runs.append(flags_of(corpus, folder / "whole", config, PLAIN, SAVING))
            resume = f"--run.resume={checkpoint_of(folder / 'whole')}"
            runs.append(flags_of(corpus, folder / "resumed", config, PLAIN, resume))
    done = run_many(runs, ranks)
    assert done.code == 0, done.output
    assert done.output.count(f"resumed from {tmp_path}") == len(folders)
    for folder in folders:
        assert_same_end(folder / "whole", folder / "resumed")


def test_a_run_saved_on_its_way_ends_bitwise_the_same(corpus: Corpus, tmp_path):
    """Stage 3, where saving partitions the weights anew."""
    config = ds_config_in("zero3", tmp_path, bf16=False)
    runs = [flags_of(corpus, tmp_path / out, config, PLAIN, *more) for out, more in (("a", []), ("b", [SAVING]))]
    done = run_many(runs)
    assert done.code == 0, done.output
    assert_same_end(tmp_path / "a", tmp_path / "b")
