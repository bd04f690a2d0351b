"""The Triton kernels' numbers: all interpreter/check_*.py run in Triton's interpreter, in one process of their own."""

import sys

import pytest

from tests.helpers.runs import run_command

pytestmark = pytest.mark.triton

FOLDER = "tests/kernels/interpreter"


def run_checks(marks: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", FOLDER, f"--confcutdir={FOLDER}"]
    command += ["-o", "python_files=check_*.py", "-m", marks]
    done = run_command(command, timeout_s=1800, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.code == 0, done.output


def test_kernels_equal_the_specification():
    run_checks("not nightly")


@pytest.mark.nightly
def test_kernels_equal_the_specification_in_every_case():
    run_checks("nightly or not nightly")
