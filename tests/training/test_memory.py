"""Freed memory stays with the process, so that using it again costs no page faults."""

import subprocess
import sys

import pytest

HELD = """
import psutil, torch
from megabert.training.distributed.process import keep_freed_memory
{before}
torch.ones(1 << 24)
for _ in range(30):  # malloc places it differently at first
    torch.ones(1 << 24)
held = torch.ones(1 << 24)
full = psutil.Process().memory_info().rss
del held
print(full - psutil.Process().memory_info().rss)
"""


@pytest.mark.parametrize("kept", [True, False])
def test_a_freed_tensors_memory_is_kept(kept):
    """A tensor of 64 MB. If its memory is kept without the call too, the call can be deleted."""
    code = HELD.format(before="keep_freed_memory()" if kept else "")
    given_back = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert given_back < 1 << 20 if kept else given_back > 63 << 20
