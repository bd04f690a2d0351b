"""Provoke DeepSpeed's traps in folders and their names; traps.py runs them."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal


def nothing_to_load(make_engine: Callable[[], Any]) -> bool:
    """Return whether loading from a folder without checkpoints returns None instead of raising."""
    with tempfile.TemporaryDirectory() as folder:
        return make_engine().load_checkpoint(folder)[0] is None


def folder_is_a_pattern(make_engine: Callable[[], Any]) -> bool:
    """Return whether loading run[1] loads run1."""
    with tempfile.TemporaryDirectory() as folder:
        make_engine().save_checkpoint(f"{folder}/run1", "tag")
        os.mkdir(f"{folder}/run[1]")
        return make_engine().load_checkpoint(f"{folder}/run[1]", "tag")[0] is not None


def folder_is_an_expression() -> bool:
    """Return whether the converter to the universal format fails in a folder called lr+1."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "lr+1/0").mkdir(parents=True)
        torch.save(torch.ones(1), f"{folder}/lr+1/0/fp32.00")
        try:
            ds_to_universal._merge_zero_shards(f"{folder}/lr+1", "fp32", 1)
        except ValueError as error:
            return "Cannot parse dp_rank" in str(error)
    return False
