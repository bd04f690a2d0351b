"""Children end with their parent, however that ends; the last line of an output is found."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megabert.process.subprocesses import exit_with_parent, last_line, why_ended

CHILD = "from megabert.process.subprocesses import exit_with_parent; import os, time\n"
CHILD += "exit_with_parent(); print(os.getpid(), flush=True); time.sleep(600)"
PARENTS = {
    "subprocess": f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdin=subprocess.PIPE).wait()
""",
    "multiprocessing": """
import multiprocessing
from tests.process.test_subprocesses import sleep
process = multiprocessing.get_context("forkserver").Process(target=sleep)
process.start()
process.join()
""",
}


def sleep() -> None:
    exit_with_parent()
    os.write(1, f"{os.getpid()}\n".encode())
    time.sleep(600)


@pytest.mark.parametrize("started_by", sorted(PARENTS))
def test_a_child_ends_when_its_parent_is_killed(started_by):
    parent = subprocess.Popen([sys.executable, "-c", PARENTS[started_by]], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert not psutil.wait_procs([child], timeout=300)[1]


def test_a_child_that_ends_before_its_parent_ends_normally():
    command = [sys.executable, "-c", CHILD.replace("600", "0.1")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    # Unlike communicate(), wait() leaves the pipe to its stdin open.
    assert child.wait(60) == 0
    assert child.stderr is not None
    assert child.stderr.read() == b""


def test_a_process_that_nobody_watches_goes_on():
    assert multiprocessing.parent_process() is None
    with open(os.devnull) as nothing:
        done = subprocess.run([sys.executable, "-c", CHILD.replace("600", "0.2")], stdin=nothing, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(("text", "line"), [("", ""), ("one\n two \n\n", "two"), ("\n \n", ""), ("only", "only")])
def test_the_last_line_that_says_something(text, line):
    assert last_line(text) == line


SOCKETS = """
import multiprocessing, sys, tempfile
from multiprocessing.connection import Listener
from megabert.process.subprocesses import use_short_socket_paths
use_short_socket_paths()
with Listener(family="AF_UNIX") as listener:
    print(len(listener.address) <= 107, tempfile.gettempdir())
"""


@pytest.mark.parametrize("length", [40, 76, 130])
def test_sockets_have_short_paths_whatever_tmpdir_is(tmp_path, length):
    folder = tmp_path / "x"
    folder = folder.with_name("x" * max(1, length - len(str(folder)) + 1))
    folder.mkdir()
    env = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", SOCKETS], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == f"True {folder}\n", done.stderr


def test_a_command_gets_sigterm_when_its_parent_is_killed():
    script = """
import subprocess, sys
from megabert.process.subprocesses import end_with_parent
subprocess.run(["bash", "-c", "echo $$; sleep 600"], preexec_fn=end_with_parent)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    assert not psutil.wait_procs([child], timeout=60)[1]
    parent.wait()


@pytest.mark.parametrize(
    ("code", "output", "reason"),
    [
        (1, "a\nno such file\n", "no such file"),
        (3, "\n", "exit code 3, without output"),
        (-9, "", "killed by SIGKILL"),
        (-4, "loading\n", "killed by SIGILL, after 'loading'"),
        (-45, "", "killed by signal 45"),
    ],
)
def test_why_a_process_ended(code, output, reason):
    assert why_ended(code, output) == reason
