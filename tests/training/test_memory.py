"""Freed memory stays with the process, so that using it again costs no page faults."""

import sys

import pytest

from tests.helpers.runs import run_command

HELD = """
import psutil, torch
from megabert.training.distributed.process import keep_freed_memory
{before}
torch.ones(1 << 24)
# malloc places it differently at first.
for _ in range(30):
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
    done = run_command([sys.executable, "tests/helpers/scripts/run_code.py", code])
    given_back = int(done.output)
    assert given_back < 1 << 20 if kept else given_back > 63 << 20
