"""launch/shared/restart_policy.sh: which attempts are followed by another, and from which checkpoint it starts."""

import os
import subprocess
from pathlib import Path

import pytest

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
    ("code", "seconds", "expected"),
    [
        (0, 5, "stop 0"),  # done
        (2, 5, "stop 0"),  # a wrong flag
        (1, 59, "stop 0"),  # a wrong path, say
        (1, 60, "again 1"),  # a crash after a minute of training
        (85, 5, "again 0"),  # stopped on request, and saved
        (137, 5, "again 1"),  # killed
    ],
)
def test_one_attempt(code, seconds, expected):
    assert bash('decide "$1" "$2" step-5; echo $action $crashes', str(code), str(seconds)) == [expected]


def test_crashes_count_until_there_is_a_new_checkpoint():
    script = 'for latest; do decide 137 100 "$latest"; echo $action $crashes; done'
    assert bash(script, "none", "none", "step-1", "step-1", "step-1", MAX_CRASHES="2") == [
        "again 1", "again 2", "again 1", "again 2", "stop 3",
    ]  # fmt: skip


def test_a_stop_between_two_crashes_does_not_reset_their_count():
    script = "decide 137 9 none; decide 85 9 none; decide 137 9 none; echo $action $crashes"
    assert bash(script, MAX_CRASHES="1") == ["stop 2"]


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
