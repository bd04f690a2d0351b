"""A checkpoint for another number of ranks, or for ZeRO 2 where 1 wrote it: through DeepSpeed's universal form.

DeepSpeed's own shards can be loaded by as many ranks as wrote them. Its converter cuts them into one file per parameter and
state, of which any number of ranks can load their parts; that happens here on the fly, in a temporary folder.
"""

import contextlib
import io
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal

from megabert.files import checkpoint_format as layout
from megabert.training.distributed.sync import gather

FIXED = ("params", "lr")  # of a parameter group: DeepSpeed's own, and what the loop sets before every step


def is_needed(state: layout.State, stage: int, world_size: int) -> bool:
    """Whether this checkpoint must be converted to be loaded. At stage 0 every rank has all."""
    return stage > 0 and state.world_size != world_size


def ds_config_for(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The same, for an engine that loads such a checkpoint. It saves as every other."""
    return ds_config | {"checkpoint": ds_config.get("checkpoint", {}) | {"load_universal": True}}


@contextlib.contextmanager
def converted(path: Path) -> Iterator[Path]:
    """The universal form of a checkpoint, for as long as the block runs; every rank calls this.

    It takes about twice the checkpoint's bytes beside it. Raises ValueError if there is no room, or it cannot be written.
    """
    rank = deepspeed.comm.get_rank()
    # In a folder of its own: the converter writes a `latest_universal` beside its result.
    folder = path.parent / f"{layout.TEMPORARY}universal"
    problem = _convert(path, folder / path.name) if rank == 0 else None
    problems = gather({} if problem is None else {rank: problem})
    if problems:
        raise ValueError(f"{path}: cannot be converted for this number of ranks: {problems[0]}")
    yield folder / path.name
    deepspeed.comm.barrier()
    if rank == 0:
        shutil.rmtree(folder)


def _convert(path: Path, out: Path) -> str | None:
    """Returns why it failed, or None."""
    options = Namespace(
        input_folder=str(path),
        output_folder=str(out),
        # In this process: a fork would copy gloo's locks as its threads happen to hold them.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.mkdir(parents=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(options)
    except (OSError, RuntimeError) as mistake:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(out.parent, ignore_errors=True)
        return f"{type(mistake).__name__}: {mistake}"
    return None


def repair_groups(engine: deepspeed.DeepSpeedEngine, before: list[dict[str, Any]]) -> None:
    """Undo what DeepSpeed 0.19.8 gets wrong in a universal load at stage 3; elsewhere it changes nothing.

    Every parameter group got the first one's settings (weight decay on norms and biases), and all of them one `step` tensor,
    which then advances once per group. before: `settings_of` before the load.
    """
    optimizer: Any = engine.optimizer
    for group, settings in zip(optimizer.param_groups, before, strict=True):
        group.update(settings)
    for state in optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def settings_of(engine: deepspeed.DeepSpeedEngine) -> list[dict[str, Any]]:
    """Each parameter group's, without its parameters."""
    optimizer: Any = engine.optimizer
    return [{key: value for key, value in group.items() if key not in FIXED} for group in optimizer.param_groups]
