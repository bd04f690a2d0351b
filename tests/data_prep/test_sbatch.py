"""launch/slurm/write_shards.sbatch, with a `python` that only prints its arguments; test_slurm_arrays.py runs it."""

import os
import subprocess

import pytest

from tests.helpers.runs import REPOSITORY, make_printing_venv

SCRIPT = REPOSITORY / "launch/slurm/write_shards.sbatch"


@pytest.fixture
def run(tmp_path):
    make_printing_venv(tmp_path)

    def start(**variables: str) -> tuple[int, list[str]]:
        env = {"PATH": os.environ["PATH"], "VENV": str(tmp_path), "OUT": "out"} | variables
        command = ["bash", str(SCRIPT), "--source", "a b"]
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
        return done.returncode, (done.stdout or done.stderr).splitlines()

    return start


def test_each_step_becomes_one_command(run):
    common = ["-u", "data_prep/write_shards.py", "--out=out", "--workers", "16", "--step"]
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "64", "SLURM_CPUS_PER_TASK": "16"}
    for step in ("runs", "merge", "shards"):
        assert run(STEP=step, **array) == (0, [*common, step, "--task", "3/64", "--source", "a b"])
    for step in ("plan", "finish"):
        assert run(STEP=step, SLURM_CPUS_PER_TASK="16") == (0, [*common, step, "--source", "a b"])


def test_a_wrong_step_or_part_is_refused(run):
    code, (line,) = run(STEP="shard")
    assert (code, "expected plan, runs, merge, shards or finish" in line) == (2, True)
    code, (line,) = run(STEP="runs", PARTS="3", SLURM_ARRAY_TASK_ID="3")
    assert (code, "parts are counted from 0" in line) == (2, True)
