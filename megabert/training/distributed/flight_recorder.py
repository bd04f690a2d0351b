"""Switch on PyTorch's flight recorder, and write the last collectives of each rank to a file when a run hangs."""

import os
import tempfile
from pathlib import Path

import torch._C._distributed_c10d as c10d

# A rank remembers this many collectives. They are those of some hundred steps, and take a megabyte.
RECORDS = "2000"
# NCCL's own watchdog writes PREFIX + rank at a collective's timeout, as dump_collectives does.
PREFIX = "TORCH_FR_DUMP_TEMP_FILE"
# The older name of the same variable.
NCCL_PREFIX = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"


def switch_on() -> None:
    """Let PyTorch record collectives; call this before a process group exists. The user's variables count more."""
    # The folder is on this machine's own disk: a run may hang because its output folder does.
    folder = Path(tempfile.gettempdir(), f"megabert-flight-recorder-{os.getuid()}")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDS)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault(PREFIX, str(folder / "rank_"))
    os.environ.setdefault(NCCL_PREFIX, os.environ[PREFIX])
    folder.mkdir(mode=0o700, exist_ok=True)


def dump_collectives(rank: int) -> str:
    """Write this rank's last collectives. Returns a sentence that says where they are, or why they are not."""
    # NCCL has a recorder of its own; the other one is gloo's.
    dump = getattr(c10d, "_dump_nccl_trace", None) or getattr(c10d, "_dump_fr_trace")  # noqa: B009 (not in its stub)
    path = Path(f"{os.environ.get(PREFIX, '')}{rank}")
    try:
        path.write_bytes(dump())
    except OSError as error:
        return f"the last collectives of rank {rank} cannot be written: {error}"
    return f"the last collectives of rank {rank}: {path}, for torchfrtrace"
