"""The quickstart's stages end with it."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.runs import REPOSITORY


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository whose stages do nothing but write a file: the first waits for ever, after preparing as usual."""
    shutil.copytree(REPOSITORY / "launch", tmp_path / "launch")
    (tmp_path / "launch/install.sh").write_text("exit 0\n")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text(f'PATH="{tmp_path}/bin:$PATH"\n')
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f"#!/usr/bin/env bash\ntouch {tmp_path}/up\nsleep 600 & wait\n")
    (tmp_path / "bin/python").chmod(0o755)
    return tmp_path


def start(repository: Path, script: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """Start a script, and return it with its descendants once its first command runs."""
    env = os.environ | {"PATH": f"{repository}/bin:{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", f"launch/{script}"], cwd=repository, env=env, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while not (repository / "up").exists() or len(psutil.Process(process.pid).children(recursive=True)) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_to_the_quickstart_ends_its_stage(repository, number, code):
    process, stage = start(repository, "quickstart.sh")
    process.send_signal(number)
    assert process.wait(300) == code
    _, alive = psutil.wait_procs(stage, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_a_killed_quickstart_ends_its_stage(repository):
    process, (stage, command, *rest) = start(repository, "quickstart.sh")
    assert "prepare.sh" in " ".join(stage.cmdline())
    process.kill()
    assert not psutil.wait_procs([stage, command], timeout=60)[1]
    for other in rest:
        other.kill()


def test_a_signal_to_the_preparation_ends_its_command(repository):
    process, commands = start(repository, "quickstart/prepare.sh")
    process.terminate()
    assert process.wait(300) == 143
    assert not psutil.wait_procs(commands[:1], timeout=60)[1]
    for command in commands[1:]:
        command.kill()
