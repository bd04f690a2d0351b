"""Load a checkpoint on another number of ranks, through DeepSpeed's universal checkpoint format."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed

from megabert.files import checkpoint_format as layout
from megabert.files.disk import DiskError
from megabert.training.distributed.deepspeed_compat import convert_to_universal, loading_only_weights
from megabert.training.distributed.sync import gather_dicts


def needs_conversion(state: layout.State, stage: int, world_size: int) -> bool:
    """Return whether the checkpoint must be converted to be loaded; at stage 0 every rank has the whole state."""
    return stage > 0 and state.world_size != world_size


def with_universal_loading(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Return the ds_config of an engine that loads a universal checkpoint; it saves ordinary ones."""
    return ds_config | {"checkpoint": ds_config.get("checkpoint", {}) | {"load_universal": True}}


@contextlib.contextmanager
def converted(path: Path) -> Iterator[Path]:
    """Convert a checkpoint to the universal format in a temporary folder next to it; every rank calls this.

    An ordinary ZeRO checkpoint can only be loaded by as many ranks as wrote it. The universal format has one file per
    parameter and optimizer state, and takes about twice the checkpoint's bytes while the block runs. Raises
    DiskError if it cannot be written.
    """
    rank = deepspeed.comm.get_rank()
    # A folder of its own, because the converter also writes a `latest_universal` file next to its result.
    folder = path.parent / f"{layout.TEMPORARY}universal"
    problem = _convert(path, folder / path.name) if rank == 0 else None
    problems = gather_dicts({} if problem is None else {rank: problem})
    if problems:
        raise DiskError(f"{path}: cannot be converted for this number of ranks: {problems[0]}")
    yield folder / path.name
    deepspeed.comm.barrier()
    if rank == 0:
        shutil.rmtree(folder)


def _convert(path: Path, out: Path) -> str | None:
    """Convert on this rank. Returns the error message, or None."""
    try:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.mkdir(parents=True)
        with loading_only_weights():
            convert_to_universal(path, out)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError.
        shutil.rmtree(out.parent, ignore_errors=True)
        return f"{type(error).__name__}: {error}"
    return None
