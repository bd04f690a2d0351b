import json
import sys

import pytest

from megabert.training.metrics import METRICS, Reporter, read_metrics
from megabert.training.trackers import TensorBoard

VALUES = {"loss": 2.5, "lr": 1e-3, "tokens_per_s": 1234.0, "seconds_per_step": 3600.0}


def test_lines_in_a_log_file(tmp_path, capsys):
    reporter = Reporter(tmp_path, total_steps=10, step=0, trackers=[TensorBoard(tmp_path, 0)])
    reporter.log(4, VALUES)
    reporter.say("hello")
    reporter.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 4/10  loss 2.500  lr 1.00e-03  1,234 tokens/s  left 6:00:00",
        "hello",
    ]
    assert read_metrics(tmp_path / METRICS) == [{"step": 4, **VALUES}]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    reporter = Reporter(tmp_path, total_steps=10, step=2, trackers=[])
    reporter.log(4, VALUES)
    reporter.say("hello")
    reporter.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hello" in captured.err
    assert "4/10" in captured.err


def test_a_resumed_run_forgets_what_it_will_do_again(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / METRICS).write_text("\n".join(lines) + '\n{"step": 4, "lo')
    Reporter(tmp_path, total_steps=10, step=2, trackers=[]).close()
    assert [record["step"] for record in read_metrics(tmp_path / METRICS)] == [1, 2]
    assert read_metrics(tmp_path / "none") == []


def test_a_full_disk_is_named_with_its_folder(tmp_path):
    reporter = Reporter(tmp_path, total_steps=10, step=0, trackers=[])
    reporter.file.close()
    reporter.file = open("/dev/full", "w")
    with pytest.raises(
        ValueError, match=f"^{tmp_path}: the metrics of step 3 cannot be written there: .*No space left"
    ):
        reporter.record(3, {"loss": 1.0})
    reporter.close()


def test_what_is_no_record_is_left_out(tmp_path):
    """A power failure may leave zeros, a kill half a line before the next run's first."""
    (tmp_path / METRICS).write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 2, "los{"step": 3}\n\xff\n[4]\n{"step": 5}\n{"st')
    assert read_metrics(tmp_path / METRICS) == [{"step": 1}, {"step": 5}]
