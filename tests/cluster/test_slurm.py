"""launch/slurm/pretrain.sbatch on a real SLURM cluster of two nodes, both on this machine (slurm.sh)."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.training.telemetry.reporter import read_metrics
from tests.cluster.helpers.nodes import cluster as cluster
from tests.helpers.runs import REPOSITORY, TINY, Corpus, run_ranks

pytestmark = pytest.mark.slurm

SETTINGS = ["--run.max_steps=200", "--run.save_every_steps=10", "--run.eval_every_steps=200"]


class Job:
    """A submitted job."""

    def __init__(self, cluster: dict[str, str], log: Path, *arguments: str, **variables: str):
        self.env, self.log = cluster | variables, log
        nodes = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"]
        script = str(REPOSITORY / "launch/slurm/pretrain.sbatch")
        self.id = self.run("sbatch", "--parsable", *nodes, f"--output={log}", script, *arguments).strip()

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=self.env, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def facts(self) -> dict[str, str]:
        return dict(
            word.split("=", 1) for word in self.run("scontrol", "show", "-o", "job", self.id).split() if "=" in word
        )

    def wait_for(self, what: str, condition: Callable[[dict[str, str]], bool], seconds: float = 900) -> dict[str, str]:
        """Wait until the condition holds for the job's facts, and return them.

        A requeued job, which SLURM delays by two minutes, is started at once.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            facts = self.facts()
            if condition(facts):
                return facts
            assert facts["JobState"] not in ("FAILED", "CANCELLED", "TIMEOUT"), f"{facts}\n{self.log.read_text()}"
            if facts["JobState"] == "PENDING" and facts["Reason"] == "BeginTime":
                # In the second in which the old attempt ends, the nodes mistake the new one for it.
                time.sleep(2)
                self.run("scontrol", "update", f"jobid={self.id}", "starttime=now")
            time.sleep(0.2)
        raise AssertionError(f"{what} was not reached: {facts['JobState']}\n{self.log.read_text()}")

    def rank(self, number: int) -> psutil.Process:
        """Return a rank's process."""
        for process in psutil.process_iter():
            try:
                variables = process.environ()
                if (variables.get("SLURM_JOB_ID"), variables.get("SLURM_PROCID")) == (self.id, str(number)):
                    if "launch/pretrain.py" in process.cmdline():
                        return process
            except psutil.Error:
                continue
        raise AssertionError(f"no process of rank {number}")


def test_a_warned_killed_and_preempted_job_ends_with_the_bits_of_an_undisturbed_one(corpus: Corpus, tmp_path, cluster):
    """The job is requeued three times: after SLURM's warning, a killed rank, and a preemption.

    Its --run.resume none applies to the first attempt only.
    """
    out, log = tmp_path / "disturbed", tmp_path / "job.log"
    variables = {"RECIPE": "quickstart", "DATA": str(corpus.tokens), "OUT": str(out), "VENV": sys.prefix}
    job = Job(cluster, log, *TINY, *SETTINGS, "--run.resume=none", **variables)

    def steps(least: int) -> Callable[[dict[str, str]], bool]:
        return lambda facts: (
            facts["JobState"] == "RUNNING"
            and any(record["step"] >= least for record in read_metrics(out / "metrics.jsonl"))
        )

    try:
        job.wait_for("step 15", steps(15))
        job.run("scancel", "--signal=USR1", job.id)
        job.wait_for("the first requeue", lambda facts: facts["Restarts"] == "1")
        reached = read_metrics(out / "metrics.jsonl")[-1]["step"]
        job.wait_for("more steps", steps(reached + 15))
        job.rank(1).kill()
        job.wait_for("the second requeue", lambda facts: facts["Restarts"] == "2")
        reached = read_metrics(out / "metrics.jsonl")[-1]["step"]
        job.wait_for("more steps", steps(reached + 15))
        job.run("scontrol", "requeue", job.id)
        job.wait_for("the third requeue", lambda facts: facts["Restarts"] == "3")
        facts = job.wait_for("the end", lambda facts: facts["JobState"] == "COMPLETED")
    finally:
        subprocess.run(["scancel", job.id], env=cluster, check=False, stderr=subprocess.DEVNULL)
    assert facts["ExitCode"] == "0:0"
    job_log = log.read_text()
    assert "stopped and saved: queueing again" in job_log
    assert "crash 1 since checkpoint step-" in job_log
    assert "attempt 4 of job" in job_log
    logs = {path.name: path.read_text() for path in (out / "logs").glob("*.log")}
    assert sorted(logs) == [f"{job.id}-rank0.log", f"{job.id}-rank1.log"]
    assert "rank 1 on" in logs[f"{job.id}-rank0.log"]
    assert "resumed from" in logs[f"{job.id}-rank0.log"]
    assert re.search("received SIGUSR1; .*saved", logs[f"{job.id}-rank0.log"])
    progress = r"step \d+/200  loss \d+\.\d{3}  lr \d\.\d\de-\d\d  [\d,]+ tokens/s  left \d+:\d\d:\d\d"
    lines = [
        line for line in logs[f"{job.id}-rank0.log"].split("\n") if line.startswith("step ") and "tokens/s" in line
    ]
    assert len(lines) > 50
    # Whole lines without a terminal's control characters.
    assert all(re.fullmatch(progress, line) for line in lines)
    assert "tokens/s" not in logs[f"{job.id}-rank1.log"]
    done = run_ranks(corpus, tmp_path / "whole", *SETTINGS, ranks=2)
    assert done.code == 0, done.output
    first, second = (read_checkpoint(folder)[0] for folder in (tmp_path / "whole", out))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_failing_command_is_not_retried(corpus: Corpus, tmp_path, cluster):
    variables = {"RECIPE": "quickstart", "DATA": str(tmp_path / "none"), "OUT": str(tmp_path), "VENV": sys.prefix}
    job = Job(cluster, tmp_path / "job.log", *TINY, **variables)
    ended: dict[str, str] = {}
    until = time.monotonic() + 300
    while ended.get("JobState") not in ("FAILED", "COMPLETED") and time.monotonic() < until:
        time.sleep(0.2)
        ended = job.facts()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert "manifest.json: no such file" in (tmp_path / "logs" / f"{job.id}-rank0.log").read_text()
