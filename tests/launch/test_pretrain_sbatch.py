"""launch/slurm/pretrain.sbatch with fake srun and scontrol; tests/cluster/test_slurm.py runs it on a real SLURM."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.runs import REPOSITORY

SCRIPT = REPOSITORY / "launch/slurm/pretrain.sbatch"


@pytest.fixture
def attempt(tmp_path: Path):
    """Run one attempt of a job whose srun is a script; returns exit code, what was printed, and srun's arguments."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/activate").write_text(f'PATH="{tmp_path}/bin:$PATH"\n')
    programs = {
        "srun": f'printf "%s\\n" "$@" > {tmp_path}/words\neval "$RANKS"',
        "scontrol": 'case $1 in show) echo node-1 ;; *) echo "scontrol $*" ;; esac',
    }
    for name, script in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NTASKS": "2"}

    def run(restarts: int, ranks: str, *flags: str) -> tuple[int, str, list[str]]:
        env = {"PATH": os.environ["PATH"], "VENV": str(tmp_path), "OUT": str(tmp_path / "out"), "RANKS": ranks}
        env |= slurm | {"SLURM_RESTART_COUNT": str(restarts), "MAX_CRASHES": "1"}
        done = subprocess.run(
            ["bash", str(SCRIPT), *flags], cwd=REPOSITORY, env=env, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, done.stdout, (tmp_path / "words").read_text().splitlines()

    return run


def test_every_line_for_sbatch_is_an_option():
    lines = SCRIPT.read_text().splitlines()
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert all(line.split()[1].startswith("--") for line in options)
    code = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(line) < code for line in options), "sbatch reads none after the first command"


def test_a_finished_run_and_an_error_of_the_user_end_the_job(attempt):
    for code in (0, 1, 2):
        ended, printed, _ = attempt(0, f"exit {code}")
        assert ended == code
        assert "requeue" not in printed


def test_a_stopped_run_is_queued_again(attempt):
    ended, printed, _ = attempt(0, "exit 85")
    assert ended == 0
    assert "stopped and saved: queueing again\nscontrol requeue 7" in printed


def test_crashes_are_counted_over_attempts_until_there_is_a_new_checkpoint(attempt, tmp_path):
    (tmp_path / "out/checkpoints").mkdir(parents=True)
    save = f"echo step-2 > {tmp_path}/out/checkpoints/latest; exit 9"
    ended = [attempt(0, "exit 9"), attempt(1, save), attempt(2, "exit 9")]
    assert [code for code, _, _ in ended] == [0, 0, 9]
    assert "crash 1 since checkpoint none\nscontrol requeue 7" in ended[0][1]
    assert "crash 1 since checkpoint step-2\nscontrol requeue 7" in ended[1][1]
    assert "crash 2 since checkpoint step-2" in ended[2][1]
    assert "requeue" not in ended[2][1]


def test_later_attempts_resume_from_the_jobs_own_checkpoint(attempt, tmp_path):
    (tmp_path / "out/checkpoints").mkdir(parents=True)
    (tmp_path / "out/logs").mkdir()
    user = ["--run.resume", "none", "--run.max_steps=5"]
    *_, words = attempt(0, f"echo step-2 > {tmp_path}/out/checkpoints/latest; exit 85", *user)
    assert words[-3:] == user
    assert words[words.index("--run.output_dir") + 1] == str(tmp_path / "out")
    os.utime(tmp_path / "out/logs/7-started", (0, 0))
    *_, words = attempt(1, "exit 0", *user)
    assert words[-3:] == ["--run.max_steps=5", "--run.resume", "auto"]
    assert words.count("--run.resume") == 1
