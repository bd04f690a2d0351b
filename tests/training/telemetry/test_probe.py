"""The probe during pretraining: it changes nothing, its failures end nothing, and a kill loses no score."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch

from megabert.config.recipe import ProbeConfig
from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.training.telemetry import probe
from megabert.training.telemetry.probe import Prober
from megabert.training.telemetry.reporter import METRICS, Reporter, read_metrics
from tests.conftest import REPOSITORY, Corpus, pretrain_command, run_command, run_ranks

SETTINGS = ["--run.max_steps=6", "--run.save_every_steps=2", "--probe.every_steps=2", "--probe.max_examples=64"]


@pytest.fixture
def task(tmp_path, corpus: Corpus) -> list[str]:
    """Flags for a task on the corpus's own texts: whether one is about tensors."""
    lines = [f"{' '.join(text.split())[:200]}\t{'yes' if 'ensor' in text else 'no'}" for text in corpus.texts[:80]]
    (tmp_path / "about.tsv").write_text("text\tabout\n" + "\n".join(lines) + "\n")
    (tmp_path / "about.yaml").write_text(
        "{name: about, texts: [text], label: about, labels: [no, yes], metrics: [accuracy], train: about.tsv, dev: about.tsv}"
        .replace("labels: [no, yes]", 'labels: ["no", "yes"]')
    )  # fmt: skip
    return [f"--probe.task={tmp_path / 'about.yaml'}", f"--probe.data={tmp_path}"]


def scores(out) -> dict[int, float]:
    return {point["step"]: point["probe/about"] for point in read_metrics(out / METRICS) if "probe/about" in point}


def test_a_run_with_probes_is_bitwise_the_run_without(corpus: Corpus, tmp_path, task):
    with_probes = run_ranks(corpus, tmp_path / "with", *SETTINGS, *task, ranks=2, ds_config="zero3")
    assert with_probes.code == 0, with_probes.output
    without = run_ranks(corpus, tmp_path / "without", *SETTINGS, ranks=2, ds_config="zero3")
    assert without.code == 0, without.output
    first, second = (read_checkpoint(tmp_path / name)[0] for name in ("with", "without"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    found = scores(tmp_path / "with")
    assert 6 in found
    assert found.keys() <= {2, 4, 6}
    assert all(0 <= score <= 1 for score in found.values())
    assert f"probe of step 6: about {found[6]:.4f}" in with_probes.output
    point = next(p for p in read_metrics(tmp_path / "with" / METRICS) if p["step"] == 6 and "probe/about" in p)
    assert point["tokens"] == next(
        p["tokens"] for p in read_metrics(tmp_path / "with" / METRICS) if p["step"] == 6 and "loss" in p
    )
    assert not (tmp_path / "with/probe/start").exists()


def test_a_kill_loses_no_score_and_leaves_no_process(corpus: Corpus, tmp_path, task):
    out = tmp_path / "out"
    env = os.environ | {"DS_ACCELERATOR": "cpu"}
    with open(tmp_path / "log", "w") as log:
        training = subprocess.Popen(
            pretrain_command(corpus, out, *SETTINGS, *task), cwd=REPOSITORY, env=env, stdout=log, stderr=log
        )
        until = time.monotonic() + 120
        while not list((out / "probe").glob("*.log")) and time.monotonic() < until and training.poll() is None:
            time.sleep(0.02)
        probing = [
            child
            for child in psutil.Process(training.pid).children()
            if "megabert.finetune.jobs.probe" in child.cmdline()
        ]
        training.kill()
        training.wait()
    assert len(probing) == 1
    _, alive = psutil.wait_procs(probing, timeout=60)
    assert not alive
    done = run_command(pretrain_command(corpus, out, *SETTINGS, *task))
    assert done.code == 0, done.output
    assert 6 in scores(out)


def test_what_cannot_be_probed_is_said_before_the_training(corpus: Corpus, tmp_path, task):
    (tmp_path / "about.tsv").write_text("text\tabout\nsome words\tmaybe\n")
    done = run_command(pretrain_command(corpus, tmp_path / "out", *SETTINGS, *task))
    assert done.code == 1
    lines = done.output.strip().splitlines()
    assert lines[-1].startswith(f"launch/pretrain.py: probe: {tmp_path}/about.tsv, line 2, column about")
    assert not (tmp_path / "out" / METRICS).exists()
    done = run_command(pretrain_command(corpus, tmp_path / "out", *SETTINGS, *task, "--probe.every_steps=3"))
    assert done.code != 0
    assert "probe.every_steps is 3, expected a multiple of run.save_every_steps (2)" in done.output


class Stand:
    """A prober whose process is another program; lines: what it said in the log."""

    def __init__(self, folder, monkeypatch, program: str, step: int = 0):
        program = f"import sys, json, time\nout = sys.argv[2][len('--out='):]\n{program}"
        monkeypatch.setattr(probe, "command", lambda config, *more: [sys.executable, "-c", program, *more])
        self.lines: list[str] = []
        self.reporter = Reporter(folder, 100, step, [])
        monkeypatch.setattr(self.reporter, "say", self.lines.append)
        config = ProbeConfig(task="about", every_steps=10)
        self.prober = Prober(config, "torch", folder, self.reporter, step)
        self.folder = folder

    def save(self, step: int) -> None:
        (self.folder / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        self.prober.saved(step)


WRITE = "json.dump({'score': 0.75, 'tokens': 123}, open(out, 'w'))"


def test_a_failure_is_a_line_in_the_log(tmp_path, monkeypatch):
    stand = Stand(tmp_path, monkeypatch, "print('no memory'); sys.exit(3)")
    stand.save(5)
    stand.prober.finish()
    assert not stand.lines, "not every checkpoint is due"
    stand.save(10)
    stand.prober.finish()
    assert stand.lines == ["probe of step 10: failed with exit code 3: no memory"]
    assert read_metrics(tmp_path / METRICS) == []


def test_the_newest_checkpoint_goes_first_and_what_is_undone_is_forgotten(tmp_path, monkeypatch):
    stand = Stand(tmp_path, monkeypatch, "time.sleep(60)")
    stand.save(10)
    stand.prober.look()
    for step in (20, 30):
        stand.save(step)
        stand.prober.look()
    assert stand.lines == ["probe of step 20: left out, the one before is not done yet"]
    stand.prober.forget_after(9)
    assert stand.lines[-1] == "probe of step 10: stopped with the training"
    assert (stand.prober.running, stand.prober.waiting) == (None, None)


def test_a_resumed_run_logs_what_a_kill_kept_from_the_log(tmp_path, monkeypatch):
    """Of steps 10 to 40 the first is logged, the second is not, the third has no score yet, the fourth is done again."""
    stand = Stand(tmp_path, monkeypatch, WRITE)
    stand.save(10)
    stand.prober.finish()
    stand.reporter.close()
    for step in (20, 40):
        (tmp_path / f"probe/step-{step:08d}.json").write_text(json.dumps({"score": step / 100, "tokens": step}))
    (tmp_path / "checkpoints/step-00000030").mkdir()
    again = Stand(tmp_path, monkeypatch, WRITE, step=30)
    assert again.lines == ["probe of step 20: about 0.2000"]
    again.prober.finish()
    assert [(point["step"], point["probe/about"]) for point in read_metrics(tmp_path / METRICS)] == [
        (10, 0.75), (20, 0.2), (30, 0.75),
    ]  # fmt: skip
    assert not (tmp_path / "probe/step-00000040.json").exists()


def test_the_last_score_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    stand = Stand(tmp_path, monkeypatch, "time.sleep(60)")
    monkeypatch.setattr(probe, "LONGEST_WAIT_S", 0.5)
    stand.save(10)
    stand.prober.finish()
    assert stand.lines == ["probe of step 10: stopped with the training"]
