"""launch/install_gpu.sh without a GPU: it names what is missing and changes nothing."""

import sys

import pytest
import torch

from tests.benchmarks import bench_estimate, bench_kernels
from tests.helpers.runs import REPOSITORY, run_command


@pytest.mark.skipif(
    torch.cuda.device_count() > 0, reason="this machine has a GPU: the script would install for an hour"
)
def test_without_a_gpu_it_stops():
    done = run_command(["bash", "launch/install_gpu.sh"])
    assert done.code == 1
    assert done.output == (
        "install_gpu: no NVIDIA GPU here (/dev/nvidiactl is missing). On a CPU: bash launch/install.sh\n"
    )


def test_unknown_arguments_are_refused():
    for arguments in (["--all"], ["--no-apex", "--all"]):
        done = run_command(["bash", "launch/install_gpu.sh", *arguments])
        assert (done.code, done.output) == (1, "install_gpu: unknown argument --all; expected --no-apex or nothing.\n")


def test_the_script_has_no_syntax_error():
    assert run_command(["bash", "-n", "launch/install_gpu.sh"]).code == 0


def test_the_readmes_have_what_the_commands_print(capsys, monkeypatch):
    page, front = (
        (REPOSITORY / path).read_text() for path in ("megabert/kernels/README.md", "tests/benchmarks/README.md")
    )
    bench_kernels.estimate()
    bench_kernels.geglu_in_products()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("|", "GeGLU", "862.7"))]
    assert len(rows) == 8 + 2 + 5
    assert all(row in page for row in rows if not row.startswith("|---"))
    monkeypatch.setattr(sys, "argv", ["bench_estimate.py"])
    bench_estimate.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("|", "largest"))]
    levers = rows[len(bench_estimate.RUNS) + 3 :]
    assert len(levers) > 6
    training = (REPOSITORY / "megabert/training/README.md").read_text()
    assert all(row in front for row in rows[: -len(levers)] if not row.startswith("|---"))
    assert all(row in training for row in levers if not row.startswith("|---"))
