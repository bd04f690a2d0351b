"""launch/shared/restart_policy.sh: which attempts are followed by another, and from which checkpoint it starts."""

import os
import subprocess
from pathlib import Path

import pytest

from megabert.training.distributed.hang_detector import HangDetector
from megabert.training.distributed.heartbeat import Beat
from megabert.training.distributed.watchdog import PEER_DIED
from tests.helpers.runs import REPOSITORY


def bash(script: str, *arguments: str, **variables: str) -> list[str]:
    """Run a script after launch/shared/restart_policy.sh; return the lines that it prints."""
    command = [
        "bash",
        "-euo",
        "pipefail",
        "-c",
        f"source launch/shared/restart_policy.sh\n{script}",
        "bash",
        *arguments,
    ]
    env = {"PATH": os.environ["PATH"]} | variables
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        # Done.
        (0, "stop 0"),
        # An error of the user.
        (2, "stop 0"),
        # A second Ctrl-C.
        (130, "stop 0"),
        # Stopped on request, and saved.
        (85, "again 0"),
        (1, "again 1"),
        # A store stayed away.
        (75, "again 1"),
        # A rank hung.
        (87, "again 1"),
        # Killed.
        (137, "again 1"),
    ],
)
def test_one_attempt(code, expected):
    assert bash('decide "$1" step-5; echo $action $crashes', str(code)) == [expected]


def test_crashes_count_until_there_is_a_new_checkpoint():
    script = 'for latest; do decide 137 "$latest"; echo $action $crashes; done'
    assert bash(script, "none", "none", "step-1", "step-1", "step-1", MAX_CRASHES="2") == [
        "again 1", "again 2", "again 1", "again 2", "stop 3",
    ]  # fmt: skip


def test_a_stop_between_two_crashes_does_not_reset_their_count():
    script = "decide 137 none; decide 85 none; decide 137 none; echo $action $crashes"
    assert bash(script, MAX_CRASHES="1") == ["stop 2"]


def test_the_host_of_a_crash_is_read_from_the_last_line_that_the_watchdog_writes(tmp_path):
    ranks = HangDetector(60.0, {0: "n1", 1: "n2"}, 0.0)
    together = ranks.find_hang(1000.0)
    ranks.update(0, Beat(12, 40, "agree", 0.0, 60.0), 1000.0)
    alone = ranks.find_hang(1000.0)
    node = HangDetector(60.0, {rank: f"n{rank // 8}" for rank in range(16)}, 0.0)
    for rank in range(8):
        node.update(rank, Beat(12, 40, "agree", 0.0, 60.0), 1000.0)
    whole_node = node.find_hang(1000.0)
    assert whole_node is not None
    others_too = whole_node.replace(" have", ", 1 more have")
    lines = {
        f"rank 1 on n2 {PEER_DIED}; ending rank 0 on n1": ["n2"],
        "rank 3 on n2.site failed: RuntimeError: CUDA error: a, b; ending rank 0 on n1": ["n2.site"],
        f"{alone}; ending rank 0 on n1": ["n2"],
        f"{together}; ending rank 0 on n1": [],
        f"{whole_node}; ending rank 0 on n0": ["n1"],
        f"{others_too}; ending rank 0 on n0": [],
        "step 12/200  loss 1.000": [],
        "": [],
    }
    for number, (line, host) in enumerate(lines.items()):
        log = tmp_path / str(number)
        log.write_text(f"rank 7 on n7 {PEER_DIED}; ending rank 0 on n1\nattempt 2\n{line}\n")
        assert bash('crashed_host "$@"', str(tmp_path / "missing"), str(log)) == host, line
    assert bash("crashed_host") == []


def flags(folder: Path, *given: str) -> list[str]:
    return bash('set_flags "$@"; printf "%s\\n" "${flags[@]}"', str(folder), str(folder / "started"), *given)


@pytest.mark.parametrize(
    "resume",
    [["--run.resume", "none"], ["--run.resume=none"], ["--resume", "none"], ["--resume=a-b"], ["--run.resume"]],
)
def test_the_first_attempt_obeys_the_users_resume_and_later_ones_resume_from_their_own_checkpoint(tmp_path, resume):
    given = ["--run.max-steps=5", *resume]
    (tmp_path / "started").touch()
    assert flags(tmp_path, *given) == given
    (tmp_path / "checkpoints").mkdir()
    latest = tmp_path / "checkpoints/latest"
    latest.write_text("step-1")
    os.utime(latest, (1, 1))
    assert flags(tmp_path, *given) == given, "a checkpoint of an earlier run"
    os.utime(tmp_path / "started", (0, 0))
    assert flags(tmp_path, *given) == ["--run.max-steps=5", "--run.resume", "auto"]
    assert bash('newest_checkpoint "$1"', str(tmp_path)) == ["step-1"]
    assert bash('newest_checkpoint "$1/nowhere"', str(tmp_path)) == ["none"]
