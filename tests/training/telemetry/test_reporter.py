"""A run's output on rank 0: log lines, the progress bar, metrics.jsonl, and what happens on a full disk."""

import contextlib
import errno
import json
import sys

import pytest

from megabert.training.telemetry.reporter import METRICS, Reporter, read_metrics
from megabert.training.telemetry.trackers import TensorBoard

VALUES = {"loss": 2.5, "lr": 1e-3, "tokens_per_s": 1234.0, "seconds_per_step": 3600.0}


def test_plain_lines_in_a_log_file(tmp_path, capsys):
    reporter = Reporter(tmp_path, total_steps=10, step=0, trackers=[TensorBoard(tmp_path, 0)])
    reporter.log_step(4, VALUES)
    reporter.log_line("hello")
    reporter.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 4/10  loss 2.500  lr 1.00e-03  1,234 tokens/s  left 6:00:00",
        "hello",
    ]
    assert read_metrics(tmp_path / METRICS) == [{"step": 4, **VALUES}]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_progress_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    reporter = Reporter(tmp_path, total_steps=10, step=2, trackers=[])
    reporter.log_step(4, VALUES)
    reporter.log_line("hello")
    reporter.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hello" in captured.err
    assert "4/10" in captured.err


def test_a_resumed_run_drops_the_metrics_of_later_steps(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / METRICS).write_text("\n".join(lines) + '\n{"step": 4, "lo')
    Reporter(tmp_path, total_steps=10, step=2, trackers=[]).close()
    assert [record["step"] for record in read_metrics(tmp_path / METRICS)] == [1, 2]
    assert read_metrics(tmp_path / "none") == []


class Disk:
    """A file with room for a number of bytes, whose last write may be short."""

    def __init__(self, room: int):
        self.room, self.content, self.closed = room, b"", False

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = data[: self.room]
        self.room -= len(written)
        self.content += written
        return len(written)

    def close(self) -> None:
        self.closed = True


def test_a_full_disk_loses_no_metric_and_raises_nothing(tmp_path, capsys):
    reporter = Reporter(tmp_path, total_steps=10, step=0, trackers=[])
    reporter.file.close()
    disk = Disk(room=30)
    reporter.file.file = disk  # type: ignore[assignment]
    for step in range(1, 500):
        reporter.log_metrics(step, {"loss": 1.0})
    disk.room = 1_000_000
    reporter.log_metrics(500, {"loss": 1.0})
    reporter.close()
    assert disk.closed
    assert [json.loads(line)["step"] for line in disk.content.splitlines()] == list(range(1, 501))
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path}: the metrics of step 2 cannot be written there: [Errno 28] No space left")
    assert last == f"{tmp_path}: the metrics are written again"


def test_tensorboard_starts_a_new_file_after_a_full_disk(tmp_path, monkeypatch):
    board = TensorBoard(tmp_path, 0)
    board.log_metrics(1, {"loss": 1.0})
    monkeypatch.setattr(board.writer, "add_scalar", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    for step in (2, 3):
        with pytest.raises(OSError, match="full"):
            board.log_metrics(step, {"loss": 2.0})
    board.retry_at = 0.0
    board.log_metrics(4, {"loss": 3.0})
    board.close()
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 2


def test_a_log_that_cannot_be_written_raises_nothing(tmp_path, monkeypatch):
    reporter = Reporter(tmp_path, total_steps=10, step=0, trackers=[])
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        reporter.log_step(4, VALUES)
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    reporter.close()
    assert read_metrics(tmp_path / METRICS) == [{"step": 4, **VALUES}]


def test_lines_that_are_not_records_are_skipped(tmp_path):
    """A power failure may leave zeros, and a kill half a line before the next run's first."""
    (tmp_path / METRICS).write_bytes(
        b'{"step": 1}\n\0\0\0\n{"step": 2, "los{"step": 3}\n\xff\n[4]\n{"step": 5}\n{"step": 6, "step": 7}\n{"st'
    )
    assert read_metrics(tmp_path / METRICS) == [{"step": 1}, {"step": 5}]
