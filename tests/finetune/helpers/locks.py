"""Hold a lock in another process."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(path: Path, exclusive: bool | None = None) -> Iterator[int]:
    """Lock a file in another process. Yields its process id."""
    program = (
        "import sys, time; from pathlib import Path; from megabert.files.lock import acquire, acquire_read_write\n"
    )
    call = "acquire(path)" if exclusive is None else f"acquire_read_write(path, exclusive={exclusive})"
    program += f"path = Path(sys.argv[1]); lock = {call}; print('locked', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process.pid
    finally:
        process.kill()
        process.communicate()
