"""The commands in launch/slurm/write_shards.sbatch on a real SLURM cluster of two nodes on this machine (slurm.sh)."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import write_shards
from tests.cluster.helpers.nodes import cluster as cluster
from tests.helpers.runs import REPOSITORY, Corpus

pytestmark = pytest.mark.slurm

SCRIPT = REPOSITORY / "launch/slurm/write_shards.sbatch"
# A node of the test has 2 cores.
SBATCH = 'set -euo pipefail\nsbatch() { command sbatch --cpus-per-task=1 --output="$LOGS/%A-%a.log" "$@"; }\n'
AGAIN = "runs=$(PARTS=2 STEP=runs sbatch --parsable --dependency=afterok:$runs --array=1 $script $FLAGS)"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def wait_for_end(job: str, cluster: dict[str, str], logs: Path) -> None:
    """Wait until a job has succeeded. Fails with all logs if it cannot."""
    until = time.monotonic() + 900
    facts = ""
    while "JobState=COMPLETED" not in facts:
        command = ["scontrol", "show", "-o", "job", job]
        facts = subprocess.run(command, env=cluster, capture_output=True, text=True, check=True).stdout
        ended = re.search("JobState=(FAILED|CANCELLED|TIMEOUT)|Reason=DependencyNeverSatisfied", facts)
        assert not ended, "\n".join([facts, *(path.read_text() for path in sorted(logs.iterdir()))])
        assert time.monotonic() < until, facts
        time.sleep(0.5)


def test_dependent_arrays_write_the_bytes_of_one_command(corpus: Corpus, tmp_path, cluster):
    """The commands are those of the script's header, with arrays of 2 tasks; one task of the second step runs twice."""
    lines = re.findall(r"^#     (script=.*|\w+=\$\(STEP=.*|STEP=.*)$", SCRIPT.read_text(), re.MULTILINE)
    assert len(lines) == 6
    lines.insert(3, AGAIN)
    commands = (
        "\n".join(lines).replace("--array=0-63", "--array=0-1").replace("finish sbatch", "finish sbatch --parsable")
    )
    flags = [f"--source={corpus.jsonl}", f"--tokenizer={corpus.tokenizer}", "--heldout=0.05", "--min_shards=4"]
    logs = tmp_path / "logs"
    logs.mkdir()
    variables = {"FLAGS": " ".join(flags), "OUT": str(tmp_path / "arrays"), "VENV": sys.prefix, "LOGS": str(logs)}
    submitted = subprocess.run(
        ["bash", "-c", SBATCH + commands], cwd=REPOSITORY, env=cluster | variables, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    wait_for_end(submitted.stdout.strip(), cluster, logs)
    # plan and finish; two tasks each of runs, merge and shards, and the repeated one.
    assert len(list(logs.iterdir())) == 9
    write_shards.main([*flags, f"--out={tmp_path / 'whole'}", "--workers=1"])
    whole = contents(tmp_path / "whole")
    assert len([name for name in whole if name.endswith(".tar")]) >= 4
    assert contents(tmp_path / "arrays") == whole
