"""The benchmark of the host's work launches what a GPU would be given, in every mode."""

import json
import subprocess
import sys

import pytest

from tests.helpers.runs import REPOSITORY


@pytest.mark.nightly
@pytest.mark.triton
def test_every_mode_launches_the_kernels_of_the_walk(tmp_path):
    command = [sys.executable, "tests/benchmarks/bench_host.py", "--quick", f"--json={tmp_path / 'host.json'}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| bare") or "| zero" in line]
    # Of the 12 layers of mosaicbert-base, with what is around them.
    assert [row[-1].strip() for row in rows] == ["105"] * 4
    assert "OVERFLOW" not in done.stdout + done.stderr
    figures = json.loads((tmp_path / "host.json").read_text())["figures"]
    assert set(figures) == {"host_ms_bare", "host_ms_zero0", "host_ms_zero1", "host_ms_zero2"}
    assert 0 < figures["host_ms_bare"] < figures["host_ms_zero2"]
