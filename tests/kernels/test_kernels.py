"""The proofs of the Triton kernels that need no GPU.

Their numbers, in the interpreter: check_*.py, each in a process of its own. Their machine code, for three generations of
GPUs: no spilled registers, shared memory within the limit, 16-byte loads and stores, tensor cores where there are products.
"""

import sys
from pathlib import Path

import pytest

from tests.conftest import run_command

pytestmark = pytest.mark.triton

FOLDER = Path(__file__).parent
CHECKS = sorted(path.stem.removeprefix("check_") for path in FOLDER.glob("check_*.py"))


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name):
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", f"tests/kernels/check_{name}.py"]
    done = run_command(command, timeout_s=900, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.code == 0, done.output
