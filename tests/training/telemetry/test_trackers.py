"""TensorBoard, CSV, Weights & Biases, the step timer, and the plot of several runs."""

import csv
import itertools
import json
import sys
import time
import types
from typing import Any

import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megabert.training import unsupported
from megabert.training.telemetry.timers import PARTS, StepTimer
from megabert.training.telemetry.trackers import CSV, open_trackers
from megabert.training.unsupported import why_no_trackers
from tests.helpers.runs import finish_ranks, patched, pretrain_command, run_command, start_ranks


def rows(folder) -> list[list[str]]:
    with open(folder / CSV, newline="") as file:
        return list(csv.reader(file))


def test_csv_has_a_row_per_number_and_drops_those_of_later_steps(tmp_path):
    (tracker,) = open_trackers(["csv"], tmp_path, 0, {})
    for step in (1, 2, 3):
        tracker.log_metrics(step, {"loss": step / 2, "time/data": 0.25})
    tracker.close()
    with open(tmp_path / CSV, "a") as file:
        # Cut short by a kill.
        file.write("4,lo")
    (tracker,) = open_trackers(["csv"], tmp_path, 2, {})
    tracker.log_metrics(3, {"loss": 9.0})
    tracker.close()
    assert rows(tmp_path) == [
        ["step", "name", "value"],
        ["1", "loss", "0.5"],
        ["1", "time/data", "0.25"],
        ["2", "loss", "1.0"],
        ["2", "time/data", "0.25"],
        ["3", "loss", "9.0"],
    ]


def test_tensorboard_gets_every_number(tmp_path):
    (tracker,) = open_trackers(["tensorboard"], tmp_path, 0, {})
    tracker.log_metrics(5, {"loss": 0.5})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(5, 0.5)]


def test_wandb_continues_the_run_of_its_folder(tmp_path, monkeypatch):
    """With a fake module: the real one needs an account."""
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    fake: Any = types.ModuleType("wandb")
    fake.init = lambda **options: calls.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = tmp_path / "my-run"
    folder.mkdir()
    (tracker,) = open_trackers(["wandb"], folder, 7, {"model": {}})
    tracker.log_metrics(8, {"loss": 1.0})
    tracker.close()
    options = {"id": "my-run", "name": "my-run", "resume": "allow", "dir": str(folder), "config": {"model": {}}}
    assert calls == [options, (8, {"loss": 1.0}), "end"]


def test_wandb_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(unsupported.importlib.util, "find_spec", lambda name: None)
    assert "pip install wandb" in str(why_no_trackers(["tensorboard", "wandb"]))
    assert why_no_trackers(["tensorboard", "csv"]) is None


class FakeEvent:
    """An event of a device whose clock advances by 2 ms with every recorded event."""

    now = 0.0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += 2.0
        self.at = FakeEvent.now

    def elapsed_time(self, later: "FakeEvent") -> float:
        return later.at - self.at


def test_the_step_timer_adds_up_each_part():
    timer = StepTimer(None)
    for _ in range(2):
        with timer.time("forward"):
            sum(range(100_000))
    assert timer.totals()["forward"] > 0
    assert timer.totals()["backward"] == 0
    timer.reset()
    assert timer.totals() == dict.fromkeys(PARTS, 0.0)


def test_the_step_timer_uses_the_clock_of_the_device(monkeypatch):
    """But for loading, which the host does itself."""
    monkeypatch.setattr(time, "perf_counter", itertools.count(5.0, 0.25).__next__)
    timer = StepTimer(FakeEvent)
    for _ in range(3):
        with timer.time("forward"):
            pass
    with timer.time("data"):
        pass
    assert timer.totals()["forward"] == pytest.approx(3 * 2e-3)
    # Not twice.
    assert timer.totals()["forward"] == pytest.approx(3 * 2e-3)
    assert timer.totals()["data"] == 0.25


SLOW_FORWARD = """
import os, time
if os.environ.get("RANK") == "1":
    from megabert.model.modeling_megabert import MegaBertForMaskedLM as Model
    forward = Model.forward
    Model.forward = lambda *rest, **more: (time.sleep(0.3), forward(*rest, **more))[1]
"""


def test_the_slowest_and_the_fastest_rank_are_reported(corpus, tmp_path):
    """Rank 1 needs 0.3 s more for its 256 token slots, and rank 0 waits for it."""
    command = patched(pretrain_command(corpus, tmp_path / "out", "--run.max_steps=3"))
    done = finish_ranks(start_ranks(command, 2, PATCH=SLOW_FORWARD))
    assert done.code == 0, done.output
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    point = [json.loads(line) for line in lines if "slowest_rank" in line][-1]
    assert 0 < point["slowest_rank"] < min(256 / 0.3, point["fastest_rank"])
    # Rank 0's own, which includes no waiting.
    assert point["time/forward"] < point["seconds_per_step"] - 0.2
    assert point["seconds_per_step"] > 0.3


def test_a_run_reports_its_times_and_two_runs_are_plotted(corpus, tmp_path):
    command = pretrain_command(corpus, tmp_path / "one", "--run.max_steps=3", '--run.trackers=["csv"]')
    done = run_command(command)
    assert done.code == 0, done.output
    lines = (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    point = [json.loads(line) for line in lines if "tokens_per_s" in line][-1]
    parts = sum(point[f"time/{part}"] for part in PARTS)
    assert 0.5 * point["seconds_per_step"] < parts <= point["seconds_per_step"]
    assert 0.1 < point["memory_gb"] < 10
    assert point["tokens_per_s_per_rank"] == point["tokens_per_s"]
    assert ["3", "loss", str(point["loss"])] in rows(tmp_path / "one")
    assert not (tmp_path / "one" / "tensorboard").exists()
    facts = json.loads((tmp_path / "one" / "run.json").read_text())
    assert facts["git"] is None or len(facts["git"]["commit"]) == 40
    assert facts["machine"]["device"] == "cpu"
    out = tmp_path / "runs.png"
    plot = [sys.executable, "launch/plot_run.py", str(tmp_path / "one"), str(tmp_path / "one"), f"--out={out}"]
    assert run_command(plot) == (0, f"{out}\n")
    assert imread(out).std() > 0.05
    with (tmp_path / "one/metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1.0}\n[1]\n{"step": 10}\n')
    assert run_command(plot) == (0, f"{out}\n")
    missing = run_command([sys.executable, "launch/plot_run.py", str(tmp_path)])
    assert missing.code == 2
    assert f"{tmp_path}: has no metrics.jsonl with a training loss" in missing.output
