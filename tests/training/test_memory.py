"""Memory that is freed stays with the process, and costs no page faults when it is used again."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, statistics, torch
from megabert.training.engine import keep_freed_memory
{before}
def faults():
    began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began
print(round(statistics.median(faults() for _ in range(30))))
"""


@pytest.mark.parametrize(("before", "most"), [("keep_freed_memory()", 100), ("", None)])
def test_a_large_tensor_soon_costs_no_page_faults(before, most):
    """Not at once: malloc first places it here and there. Without the call each is mapped anew; should that change, it can go."""
    command = [sys.executable, "-c", FAULTS.format(before=before)]
    faults = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults > 10_000 if most is None else faults < most
