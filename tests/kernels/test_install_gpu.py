"""launch/install_gpu.sh, as far as it goes without a GPU: it says what is missing and changes nothing."""

import pytest
import torch

from tests.conftest import REPOSITORY, run_command


@pytest.mark.skipif(
    torch.cuda.device_count() > 0, reason="this machine has a GPU: the script would install for an hour"
)
def test_without_a_gpu_it_says_so():
    done = run_command(["bash", "launch/install_gpu.sh"])
    assert done.code == 1
    assert done.output == (
        "install_gpu: no NVIDIA GPU here (/dev/nvidiactl is missing). On a CPU: bash launch/install.sh\n"
    )


def test_unknown_arguments_are_refused():
    for arguments in (["--all"], ["--no-apex", "--all"]):
        done = run_command(["bash", "launch/install_gpu.sh", *arguments])
        assert (done.code, done.output) == (1, "install_gpu: unknown argument --all; the only one is --no-apex.\n")


def test_the_script_is_whole():
    assert run_command(["bash", "-n", "launch/install_gpu.sh"]).code == 0


def test_paper_is_in_the_readme_as_it_is_printed():
    """The benchmark's prediction, line by line, and its label."""
    done = run_command(["python", "tests/benchmarks/bench_kernels.py", "--quick"])
    if torch.cuda.device_count() == 0:
        assert "a prediction that no GPU has confirmed" in done.output
        page, front = ((REPOSITORY / path).read_text() for path in ("megabert/kernels/README.md", "README.md"))
        rows = [line for line in done.output.splitlines() if line.startswith("|")]
        assert len(rows) == 12
        assert all(row in page for row in rows if not row.startswith("|---"))
        assert all(row in front for row in rows[-2:])
    assert done.code == 0, done.output
