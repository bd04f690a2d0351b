"""Two nodes of a SLURM cluster on this machine, as a fixture."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.helpers.runs import REPOSITORY


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Start two idle nodes; returns the environment for SLURM's commands."""
    folder = tmp_path_factory.mktemp("slurm")
    script = ["bash", str(REPOSITORY / "tests/cluster/slurm.sh")]
    try:
        subprocess.run([*script, "up", str(folder)], check=True, timeout=300)
        # The nodes' names do not resolve: all of them are this machine.
        yield os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}
    finally:
        subprocess.run([*script, "down", str(folder)], check=True, timeout=300)
