"""launch/install_gpu.sh without a GPU: it names what is missing and changes nothing."""

import pytest
import torch

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


def test_the_readme_has_the_estimate_that_the_benchmark_prints():
    done = run_command(["python", "tests/benchmarks/bench_kernels.py", "--quick"])
    if torch.cuda.device_count() == 0:
        assert "Theoretical estimate, not run on a GPU" in done.output
        page, front = ((REPOSITORY / path).read_text() for path in ("megabert/kernels/README.md", "README.md"))
        rows = [line for line in done.output.splitlines() if line.startswith("|")]
        assert len(rows) == 12
        assert all(row in page for row in rows if not row.startswith("|---"))
        for row in rows[-2:]:
            name = row.split("|")[1]
            assert {line for line in front.splitlines() if line.startswith(f"|{name}|")} <= {row}
    assert done.code == 0, done.output
