"""Probes during pretraining: they do not affect the training, may fail, and a kill loses no score."""

import contextlib
import json
import os
import sys
import time

import psutil
import pytest
import torch

from megabert.config.recipe import ProbeConfig
from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.training.telemetry import probe
from megabert.training.telemetry.probe import ProbeRunner
from megabert.training.telemetry.reporter import METRICS, Reporter, read_metrics
from tests.helpers import warm
from tests.helpers.runs import Corpus, pretrain_command, run_command, run_ranks

SETTINGS = ["--run.max_steps=4", "--run.save_every_steps=2", "--probe.every_steps=2", "--probe.max_examples=64"]


@pytest.fixture
def task(tmp_path, corpus: Corpus) -> list[str]:
    """Flags of a task on the corpus's texts: whether a text is about tensors."""
    lines = [f"{' '.join(text.split())[:200]}\t{'yes' if 'ensor' in text else 'no'}" for text in corpus.texts[:80]]
    (tmp_path / "about.tsv").write_text("text\tabout\n" + "\n".join(lines) + "\n")
    (tmp_path / "about.yaml").write_text(
        'name: about\ntexts: [text]\nlabel: about\nlabels: ["no", "yes"]\nmetrics: [accuracy]\n'
        "train: about.tsv\ndev: about.tsv\n"
    )
    return [f"--probe.task={tmp_path / 'about.yaml'}", f"--probe.data={tmp_path}"]


def scores(out) -> dict[int, float]:
    return {point["step"]: point["probe/about"] for point in read_metrics(out / METRICS) if "probe/about" in point}


@pytest.mark.nightly
def test_ranks_with_probes_have_the_bits_of_ranks_without(corpus: Corpus, tmp_path, task):
    # A probe is a process of its own, which takes seconds to start.
    every = "--probe.every_steps=4"
    with_probes = run_ranks(corpus, tmp_path / "with", *SETTINGS, *task, every, ranks=2, ds_config="zero3")
    assert with_probes.code == 0, with_probes.output
    without = run_ranks(corpus, tmp_path / "without", *SETTINGS, ranks=2, ds_config="zero3")
    assert without.code == 0, without.output
    first, second = (read_checkpoint(tmp_path / name)[0] for name in ("with", "without"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    found = scores(tmp_path / "with")
    assert found.keys() == {4}
    assert 0 <= found[4] <= 1
    assert f"probe of step 4: about {found[4]:.4f}" in with_probes.output
    point = next(p for p in read_metrics(tmp_path / "with" / METRICS) if p["step"] == 4 and "probe/about" in p)
    assert point["tokens"] == next(
        p["tokens"] for p in read_metrics(tmp_path / "with" / METRICS) if p["step"] == 4 and "loss" in p
    )
    assert not (tmp_path / "with/probe/start").exists()


def probes_of(training: warm.Process) -> list[psutil.Process]:
    """Return the probe processes that have started; the check of the task before the training is none."""
    found = []
    for child in psutil.Process(training.pid).children():
        with contextlib.suppress(psutil.Error):
            command = child.cmdline()
            if probe.MODULE in command and "--check" not in command:
                found.append(child)
    return found


def test_a_kill_loses_no_score_no_bit_and_leaves_no_process(corpus: Corpus, tmp_path, task):
    out = tmp_path / "out"
    env = os.environ | {"DS_ACCELERATOR": "cpu"}
    training = warm.popen(pretrain_command(corpus, out, *SETTINGS, *task), env, tmp_path / "log")
    deadline = time.monotonic() + 600
    while not (probes := probes_of(training)) and time.monotonic() < deadline and training.poll() is None:
        time.sleep(0.02)
    training.kill()
    training.wait()
    assert len(probes) == 1
    _, alive = psutil.wait_procs(probes, timeout=300)
    assert not alive
    done = run_command(pretrain_command(corpus, out, *SETTINGS, *task))
    assert done.code == 0, done.output
    assert 4 in scores(out)
    done = run_command(pretrain_command(corpus, tmp_path / "without", *SETTINGS))
    assert done.code == 0, done.output
    first, second = (read_checkpoint(folder)[0] for folder in (out, tmp_path / "without"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_task_that_cannot_be_probed_is_refused_before_the_training(corpus: Corpus, tmp_path, task):
    (tmp_path / "about.tsv").write_text("text\tabout\nsome words\tmaybe\n")
    done = run_command(pretrain_command(corpus, tmp_path / "out", *SETTINGS, *task))
    assert done.code == 2
    lines = done.output.strip().splitlines()
    assert lines[-1].startswith(f"launch/pretrain.py: probe: {tmp_path}/about.tsv, line 2, column about")
    assert not (tmp_path / "out" / METRICS).exists()
    done = run_command(pretrain_command(corpus, tmp_path / "out", *SETTINGS, *task, "--probe.every_steps=3"))
    assert done.code != 0
    assert "probe.every_steps is 3, expected a multiple of run.save_every_steps (2)" in done.output


class FakeProbe:
    """A ProbeRunner whose process is another program; lines: what it logged."""

    def __init__(self, folder, monkeypatch, program: str, step: int = 0):
        program = f"import sys, json, time\nout = sys.argv[2][len('--out='):]\n{program}"
        monkeypatch.setattr(probe, "probe_command", lambda config, *more: [sys.executable, "-c", program, *more])
        self.lines: list[str] = []
        self.reporter = Reporter(folder, 100, step, [])
        monkeypatch.setattr(self.reporter, "log_line", self.lines.append)
        config = ProbeConfig(task="about", every_steps=10)
        self.runner = ProbeRunner(config, "torch", folder, self.reporter, step)
        self.folder = folder

    def save(self, step: int) -> None:
        (self.folder / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        self.runner.checkpoint_saved(step)


WRITE = "json.dump({'score': 0.75, 'tokens': 123}, open(out, 'w'))"


def test_a_failure_is_logged(tmp_path, monkeypatch):
    fake = FakeProbe(tmp_path, monkeypatch, "print('no memory'); sys.exit(3)")
    fake.save(5)
    fake.runner.finish()
    assert not fake.lines, "not every checkpoint is due"
    fake.save(10)
    fake.runner.finish()
    assert fake.lines == ["probe of step 10: failed: no memory"]
    assert read_metrics(tmp_path / METRICS) == []


def test_the_newest_checkpoint_is_next_and_a_rollback_stops_probes(tmp_path, monkeypatch):
    fake = FakeProbe(tmp_path, monkeypatch, "time.sleep(60)")
    fake.save(10)
    fake.runner.poll()
    for step in (20, 30):
        fake.save(step)
        fake.runner.poll()
    assert fake.lines == ["probe of step 20: skipped, the previous one is still running"]
    fake.runner.discard_after(9)
    assert fake.lines[-1] == "probe of step 10: stopped with the training"
    assert (fake.runner.running, fake.runner.waiting) == (None, None)


def test_a_resumed_run_logs_scores_that_a_kill_left_unlogged(tmp_path, monkeypatch):
    """Step 10 is logged, step 20 has a score only, step 30 has none yet, and step 40 is after the resumed step."""
    fake = FakeProbe(tmp_path, monkeypatch, WRITE)
    fake.save(10)
    fake.runner.finish()
    fake.reporter.close()
    for step in (20, 40):
        (tmp_path / f"probe/step-{step:08d}.json").write_text(json.dumps({"score": step / 100, "tokens": step}))
    (tmp_path / "checkpoints/step-00000030").mkdir()
    again = FakeProbe(tmp_path, monkeypatch, WRITE, step=30)
    assert again.lines == ["probe of step 20: about 0.2000"]
    again.runner.finish()
    assert [(point["step"], point["probe/about"]) for point in read_metrics(tmp_path / METRICS)] == [
        (10, 0.75), (20, 0.2), (30, 0.75),
    ]  # fmt: skip
    assert not (tmp_path / "probe/step-00000040.json").exists()


def test_a_score_of_a_newer_format_is_refused_and_one_without_a_version_is_read(tmp_path, monkeypatch):
    fake = FakeProbe(tmp_path, monkeypatch, WRITE)
    fake.reporter.close()
    (tmp_path / "probe/step-00000010.json").write_text('{"score": 0.5, "tokens": 10}')
    assert FakeProbe(tmp_path, monkeypatch, WRITE, step=10).lines == ["probe of step 10: about 0.5000"]
    (tmp_path / "probe/step-00000020.json").write_text('{"format_version": 2, "score": 0.5, "tokens": 10}')
    with pytest.raises(ValueError, match=r"step-00000020.json: has format_version 2, this MegaBERT reads version 1"):
        FakeProbe(tmp_path, monkeypatch, WRITE, step=20)


def test_waiting_for_the_last_score_has_a_limit(tmp_path, monkeypatch):
    fake = FakeProbe(tmp_path, monkeypatch, "time.sleep(60)")
    monkeypatch.setattr(probe, "MAX_WAIT_S", 0.5)
    fake.save(10)
    fake.runner.finish()
    assert fake.lines == ["probe of step 10: stopped with the training"]
