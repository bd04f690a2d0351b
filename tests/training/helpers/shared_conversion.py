"""Convert a checkpoint as several ranks do, with threads in place of the ranks."""

import contextlib
import hashlib
import os
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megabert.training.checkpointing import universal
from megabert.training.checkpointing.universal import Conversion
from megabert.training.distributed.deepspeed_compat import literal_folder, loading_only_weights


class Threads:
    """What the ranks of one conversion exchange."""

    def __init__(self, size: int):
        self.size, self.parts, self.barrier = size, [None] * size, threading.Barrier(size)

    def exchange(self, rank: int, part: Any) -> list[Any]:
        self.parts[rank] = part
        self.barrier.wait(60)
        parts = list(self.parts)
        self.barrier.wait(60)
        return parts


class ThreadRank:
    def __init__(self, threads: Threads, rank: int):
        self.threads, self.rank, self.size = threads, rank, threads.size

    def gather(self, part: Any) -> list[Any]:
        return self.threads.exchange(self.rank, part)

    def broadcast(self, value: Any) -> Any:
        return self.threads.exchange(self.rank, value)[0]


def convert(checkpoint: Path, out: Path, size: int) -> list[str | None]:
    """Convert with `size` ranks. Returns what each of them returns."""
    threads = Threads(size)
    results: list[str | None] = [None] * size

    def run(rank: int) -> None:
        results[rank] = Conversion(checkpoint, out / checkpoint.name, ThreadRank(threads, rank)).run()

    running = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    # They change the whole process, which a rank is and a thread is not.
    literal = literal_folder(Path(os.path.commonpath([checkpoint, out])))
    with literal, loading_only_weights(), patch.object(universal, "loading_only_weights", contextlib.nullcontext):
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    return results


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
