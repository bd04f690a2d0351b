"""A file that lines are added to while a run goes on, on a disk that may be full for a while."""

from pathlib import Path


class Appended:
    """What cannot be written waits in memory for the next attempt; a line that was cut short is then made whole."""

    def __init__(self, path: Path):
        self.file = open(path, "ab", buffering=0)  # a buffer would lose what its write() was given and could not keep
        self.waiting = b""

    def add(self, lines: str) -> None:
        """Raises OSError if a part of them waits."""
        self.waiting += lines.encode()
        while self.waiting:
            self.waiting = self.waiting[self.file.write(self.waiting) :]

    def close(self) -> None:
        """Raises OSError if a part is lost."""
        try:
            self.add("")
        finally:
            self.file.close()
