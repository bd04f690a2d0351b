"""A command that has done its work exits with 0, whatever has become of its output."""

import os
import subprocess
import sys

import pytest

COMMAND = """
import logging, sys
from megabert.config import cli
def main():
    for number in range(2000):
        print("line", number)
        sys.stderr.write("and another\\n")
        logging.warning("%d", number)
    open(sys.argv[1], "w").write("done")
getattr(cli, sys.argv[2])(main, "command")
"""


def run(tmp_path, redirection: str, door: str = "run") -> tuple[int, str]:
    """Run a command that prints a lot and then writes a file, in a shell. Returns its exit code and the file."""
    out, script = tmp_path / "file", tmp_path / "command.py"
    script.write_text(COMMAND)
    shell = f"{sys.executable} {script} {out} {door} {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, check=False, timeout=300)
    return done.returncode, out.read_text() if out.exists() else "missing"


@pytest.mark.parametrize("door", ["run", "run_and_leave"])
@pytest.mark.parametrize(
    "redirection", [">&-", "2>&-", "<&- >&- 2>&-", "| head -1", "2>&1 | head -1", ">/dev/full", ">/dev/full 2>&1"]
)
def test_a_finished_command_exits_with_0(tmp_path, redirection, door):
    assert run(tmp_path, redirection, door) == (0, "done")


def test_a_full_disk_under_stdout_is_said_once():
    script = 'from megabert.config import cli; cli.run(lambda: print("x" * 100000), "command")'
    command = ["bash", "-c", f"{sys.executable} -c '{script}' > /dev/full"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "stdout: No space left on device: what was printed is incomplete\n")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict", "latin-1"])
def test_a_name_that_a_stream_cannot_encode_is_printed_with_escapes(encoding):
    """In a locale of UTF-8 a name of other bytes would be an error, and end a command that has done its work."""
    script = r'from megabert.config import cli; cli.run(lambda: print("a\u4f60\udcffb"), "command")'
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, env=environment, check=False, timeout=300)
    printed = "a\u4f60" if encoding.startswith("utf") else r"a\u4f60"
    assert (done.returncode, done.stdout.decode()) == (0, printed + "\\udcffb\n")


def test_an_error_keeps_its_exit_code_when_nobody_can_read_it():
    script = "from megabert.config import cli; cli.run(lambda: int(chr(120)), chr(99))"
    command = ["bash", "-c", f"{sys.executable} -c '{script}' 2>&-"]
    assert subprocess.run(command, check=False, timeout=300).returncode == 1


def test_files_do_not_get_the_number_of_a_closed_stream(tmp_path):
    """What a library prints to descriptor 1 must not land in a file of ours."""
    program = "import os, sys; from megabert.config import cli; f = sys.argv[1]\n"
    program += 'cli.run(lambda: open(f, "w").fileno() < 3 or os.write(1, b"x") - 1, "command")'
    (tmp_path / "command.py").write_text(program)
    command = ["bash", "-c", f"{sys.executable} {tmp_path}/command.py {tmp_path}/f >&- 2>&-"]
    assert subprocess.run(command, check=False, timeout=300).returncode == 0
    assert (tmp_path / "f").read_bytes() == b""
