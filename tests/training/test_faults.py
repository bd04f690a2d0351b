"""A run that is killed, out of disk space or damaged ends like an undisturbed one when started again."""

import json
import sys

import pytest

from tests.helpers.runs import run_command


# In the CI, single faults have tests of their own: test_keep_running.py, test_end_to_end.py, test_writer.py.
@pytest.mark.nightly
@pytest.mark.parametrize(("rounds", "seed"), [(25, 1)])
def test_a_run_survives(tmp_path, rounds, seed):
    figures = tmp_path / "figures.json"
    flags = [f"--rounds={rounds}", f"--seed={seed}", f"--json={figures}"]
    done = run_command([sys.executable, "tests/benchmarks/fault_injection.py", *flags], timeout_s=300 * rounds)
    assert done.code == 0, done.output
    assert json.loads(figures.read_text())["figures"] == {"rounds": rounds, "identical": rounds, "lost_samples": 0}
