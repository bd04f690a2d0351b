"""launch/slurm/finetune_glue.sbatch as each part of an array runs it, with a Python that only says what it was asked for.

And on a real SLURM of two nodes on this machine, as tests/cluster/test_slurm.py makes it: pytest -m slurm.
"""

import os
import subprocess
import sys
import time

import pytest

from megabert.finetune.main import read_shard, run
from tests.cluster.test_slurm import cluster as cluster
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "launch/slurm/finetune_glue.sbatch"


@pytest.fixture
def part(tmp_path):
    """Run one: variables as SLURM and the user set them."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/activate").write_text(f'PATH="{tmp_path}/bin:$PATH"\n')
    (tmp_path / "bin/python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)

    def run(number: int, count: int, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        slurm = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": str(count)}
        env = {"PATH": os.environ["PATH"], "VENV": str(tmp_path)} | slurm | variables
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False
        )

    return run


def test_bash_reads_it_and_every_line_for_sbatch_is_an_option():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    lines = SCRIPT.read_text().splitlines()
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert all(line.split()[1].startswith("--") for line in options)
    code = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(line) < code for line in options), "sbatch reads none after the first command"


def test_the_parts_of_an_array_are_those_of_the_command(part):
    said = [part(number, 8, "--submission", CHECKPOINT="runs/x", OUT="out").stdout.split("\n") for number in range(8)]
    shards = [read_shard(words[words.index("--shard") + 1]) for words in said]
    assert shards == [(number, 8) for number in range(8)]
    for words in said:
        assert words[:2] == ["-u", "launch/finetune_glue.py"]
        assert words[words.index("--checkpoint") + 1] == "runs/x"
        assert words[words.index("--protocol") + 1] == "mosaicbert"
        assert words[-2] == "--submission"


def test_some_parts_again_and_parts_that_do_not_begin_at_0(part):
    words = part(5, 2, PARTS="8").stdout.split("\n")
    assert words[words.index("--shard") + 1] == "5/8"
    for number, count in ((8, 8), (5, 2)):
        wrong = part(number, count)
        assert wrong.returncode == 2
        assert f"part {number} of {count}: parts are counted from 0: --array=0-{count - 1}, or PARTS=N" in wrong.stderr


@pytest.mark.slurm
@pytest.mark.nightly
def test_an_array_and_one_after_it_do_every_job_once(request_for, tmp_path, cluster):
    request = request_for(tasks="rte,mnli,sst2")
    (tmp_path / "out").mkdir()
    env = cluster | {
        "CHECKPOINT": request.checkpoint, "DATA": request.data, "OUT": request.out, "PROTOCOL": request.protocol, "VENV": sys.prefix,
    }  # fmt: skip

    def tell(*command: str) -> str:
        return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True).stdout

    def submit(*more: str) -> str:
        flags = ["--array=0-1", "--cpus-per-task=1", "--gpus-per-node=0", f"--output={tmp_path}/%A-%a.log", *more]
        return tell("sbatch", "--parsable", *flags, str(SCRIPT), "--tasks=rte,mnli,sst2", "--ops=torch").strip()

    first = submit()
    second = submit(f"--dependency=afterany:{first}")
    until = time.monotonic() + 240
    while tell("squeue", "--noheader") and time.monotonic() < until:
        time.sleep(0.5)
    logs = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
    assert sorted(logs) == sorted(f"{array}-{part}" for array in (first, second) for part in (0, 1))
    names = ["mnli-pretrained-c0-s1", *(f"{task}-pretrained-c0-s{seed}" for task in ("rte", "sst2") for seed in (1, 2))]
    done = [line.split(":")[0] for log in logs.values() for line in log.split("\n") if ": accuracy" in line]
    assert sorted(done) == names, "each once, whichever part it fell to"
    assert all("failed" not in log for log in logs.values())
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/jobs").glob("*.json")}
    assert run(request) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/jobs").glob("*.json")} == before
    assert "| rte | fine-tuned, pretrained |" in (tmp_path / "out/results.md").read_text()
