"""launch/slurm/finetune_glue.sbatch, with a `python` that only prints its arguments.

And on a real SLURM cluster of two nodes on this machine, which tests/cluster/test_slurm.py starts: pytest -m slurm.
"""

import os
import subprocess
import sys
import time

import pytest

from megabert.finetune.main import parse_shard, run_finetuning
from tests.cluster.helpers.nodes import cluster as cluster
from tests.helpers.runs import REPOSITORY, make_printing_venv

SCRIPT = REPOSITORY / "launch/slurm/finetune_glue.sbatch"


@pytest.fixture
def part(tmp_path):
    """Run one part of an array, with the variables that SLURM and the user set."""
    make_printing_venv(tmp_path)

    def run(number: int, count: int, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        slurm = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": str(count)}
        env = {"PATH": os.environ["PATH"], "VENV": str(tmp_path)} | slurm | variables
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False
        )

    return run


def test_the_script_is_valid_bash_with_its_sbatch_options_first():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    lines = SCRIPT.read_text().splitlines()
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert all(line.split()[1].startswith("--") for line in options)
    code = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(line) < code for line in options), "sbatch ignores options after the first command"


def test_the_parts_of_an_array_become_shards(part):
    outputs = [
        part(number, 8, "--submission", CHECKPOINT="runs/x", OUT="out").stdout.split("\n") for number in range(8)
    ]
    shards = [parse_shard(words[words.index("--shard") + 1]) for words in outputs]
    assert shards == [(number, 8) for number in range(8)]
    for words in outputs:
        assert words[:2] == ["-u", "launch/finetune_glue.py"]
        assert "--checkpoint=runs/x" in words
        assert "--protocol=mosaicbert" in words
        assert words[-2] == "--submission"


def test_some_parts_can_run_again_and_numbers_beyond_the_last_are_refused(part):
    words = part(5, 2, PARTS="8").stdout.split("\n")
    assert words[words.index("--shard") + 1] == "5/8"
    for number, count in ((8, 8), (5, 2)):
        wrong = part(number, count)
        assert wrong.returncode == 2
        assert (
            f"part {number} of {count}: parts are counted from 0: use --array=0-{count - 1}, or set PARTS=N"
            in wrong.stderr
        )


def test_a_job_that_is_no_array_and_a_wrong_number_of_parts_are_refused(part):
    for variables, message in (
        ({"SLURM_ARRAY_TASK_ID": ""}, "this is not a part of an array: run sbatch --array=0-7"),
        ({"PARTS": "many"}, "PARTS is 'many', expected the number of parts, 1 or more"),
        ({"PARTS": "0"}, "PARTS is '0', expected the number of parts"),
        ({"SLURM_ARRAY_TASK_COUNT": ""}, "PARTS is '', expected the number of parts"),
    ):
        wrong = part(0, 8, **variables)
        assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
        assert wrong.stderr.startswith(message)


@pytest.mark.slurm
@pytest.mark.nightly
def test_an_array_and_one_after_it_run_every_job_once(options_for, tmp_path, cluster):
    options = options_for(tasks="rte,mnli,sst2")
    (tmp_path / "out").mkdir()
    env = cluster | {
        "CHECKPOINT": options.checkpoint,
        "DATA": options.data,
        "OUT": options.out,
        "PROTOCOL": options.protocol,
        "VENV": sys.prefix,
    }

    def call(*command: str) -> str:
        return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True).stdout

    def submit(*more: str) -> str:
        flags = ["--array=0-1", "--cpus-per-task=1", "--gpus-per-node=0", f"--output={tmp_path}/%A-%a.log", *more]
        return call("sbatch", "--parsable", *flags, str(SCRIPT), "--tasks=rte,mnli,sst2", "--ops=torch").strip()

    first = submit()
    second = submit(f"--dependency=afterany:{first}")
    deadline = time.monotonic() + 240
    while call("squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(0.5)
    logs = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
    assert sorted(logs) == sorted(f"{array}-{part}" for array in (first, second) for part in (0, 1))
    names = ["mnli-pretrained-c0-s1", *(f"{task}-pretrained-c0-s{seed}" for task in ("rte", "sst2") for seed in (1, 2))]
    done = [line.split(":")[0] for log in logs.values() for line in log.split("\n") if ": accuracy" in line]
    assert sorted(done) == names, "each job once, in whichever part"
    assert all("failed" not in log for log in logs.values())
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/jobs").glob("*.json")}
    assert run_finetuning(options) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/jobs").glob("*.json")} == before
    assert "| rte | fine-tuned, pretrained |" in (tmp_path / "out/results.md").read_text()
