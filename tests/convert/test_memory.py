"""The peak memory of an export and its subprocess, measured by the benchmark."""

import json
import sys

import pytest

from tests.helpers.runs import run_command


@pytest.mark.nightly
def test_the_large_size_is_exported_in_less_than_six_gigabytes(tmp_path):
    """435 million parameters take 1.6 GB; DeepSpeed's files, with optimizer states, 6.5 GB."""
    command = [sys.executable, "tests/benchmarks/bench_convert.py", "--quick", "--json", str(tmp_path / "figures.json")]
    done = run_command(command, timeout_s=900)
    assert done.code == 0, done.output
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert 1.6 < figures["export_peak_gb_large"] < 6
    assert figures["export_peak_gb_base"] < figures["export_peak_gb_large"]
