"""launch/install.sh and what the install scripts decide, with a python that records what pip is asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.runs import REPOSITORY

[TORCH] = [line for line in (REPOSITORY / "constraints.txt").read_text().split() if line.startswith("torch==")]

# A stand-in for .venv/bin/python: `torch` holds the kind of the installed torch, and pip changes it.
PYTHON = """#!/usr/bin/env bash
cd "$(dirname "$0")/../.."
case "$*" in
    *"torch.version.cuda"*) [ "$(cat torch 2>/dev/null)" = gpu ] ;;
    *"import torch"*) [ -e torch ] ;;
    *"uninstall -y torch"*) rm torch; echo "$*" >> asked ;;
    *torch==*+cpu*) echo cpu > torch; echo "$*" >> asked ;;
    *torch==*) cat plain > torch; echo "$*" >> asked ;;
    *" -e "*) [ -e torch ] || cat plain > torch; echo "$*" >> asked ;;
esac
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name in ("launch/install.sh", "launch/shared/gpu.sh", "setup.py", "constraints.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    # What plain torch is: on most machines a CUDA build.
    (tmp_path / "plain").write_text("gpu\n")
    return tmp_path


def install(checkout: Path, build: str) -> tuple[int, str, list[str]]:
    """Run install.sh. Returns its exit code and output, and what it asked of pip."""
    (checkout / "asked").write_text("")
    done = subprocess.run(
        ["bash", "launch/install.sh"], cwd=checkout, env=os.environ | {"TORCH_BUILD": build}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    asked = [line.split("-q ")[1].split() for line in (checkout / "asked").read_text().splitlines()]
    return done.returncode, done.stdout, [f"{words[0]} {words[-1]}" for words in asked]


def test_a_cpu_install_becomes_one_for_gpus_where_it_is_asked_for(checkout):
    assert install(checkout, "cpu")[2] == [f"install {TORCH}+cpu", "install ."]
    assert install(checkout, "cpu") == (0, "", [])
    assert install(checkout, "gpu")[2] == ["uninstall torch", f"install {TORCH}", "install ."]
    # A login node that shares this .venv leaves it alone.
    for build in ("gpu", "cpu"):
        assert install(checkout, build) == (0, "", [])


def test_a_new_install_for_gpus_asks_for_plain_torch(checkout):
    assert install(checkout, "gpu")[2] == [f"install {TORCH}", "install ."]


def test_where_plain_torch_is_a_cpu_build_one_line_says_what_to_do(checkout):
    (checkout / "plain").write_text("cpu\n")
    code, output, _ = install(checkout, "gpu")
    assert code == 1
    assert output.splitlines()[-1] == (
        f"install: pip found only a CPU build of {TORCH}. Set TORCH_INDEX_URL to PyTorch's index of a CUDA release "
        "and run this again, or set TORCH_BUILD=cpu."
    )
    assert not list((checkout / ".venv").glob("installed*"))


def test_another_build_is_refused(checkout):
    code, output, asked = install(checkout, "rocm")
    assert (code, output, asked) == (1, "TORCH_BUILD is rocm, expected cpu or gpu.\n", [])


def from_bash(script: str) -> str:
    command = ["bash", "-euo", "pipefail", "-c", f"source launch/shared/gpu.sh\n{script}"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def test_a_driver_is_found_by_either_file(tmp_path):
    (tmp_path / "libcuda.so.1").touch()
    found = from_bash(
        f"unset TORCH_BUILD; nvidia_files=({tmp_path}/no {tmp_path}/libcuda.so.1); torch_build\n"
        f"nvidia_files=({tmp_path}/no); torch_build"
    )
    assert found.split() == ["gpu", "cpu"]


def test_the_code_is_compiled_for_the_card_on_as_many_cores_as_memory_allows():
    cards = (
        "for card in 8.0 8.6 8.9 9.0 10.0 10.3 12.0; do flash_attn_arch $card; done; flash_attn_arch 7.5 || echo none"
    )
    assert from_bash(cards).split() == ["80", "80", "80", "90", "100", "100", "120", "none"]
    jobs = "compiler_jobs 16 128; compiler_jobs 64 60; compiler_jobs 4 3; ((`free_memory_gb` > 0))"
    assert from_bash(jobs).split() == ["16", "12", "1"]


@pytest.mark.parametrize(
    ("groups", "limits", "gb"),
    [
        ("0::/\n", {}, "64"),
        # A container.
        ("0::/\n", {"memory.max": 8 << 30}, "8"),
        ("0::/job_1/step_0/task_0\n", {"job_1/memory.max": 12 << 30, "job_1/step_0/memory.max": "max"}, "12"),
        ("0::/\n", {"memory.max": 512 << 30}, "64"),
        ("4:cpu:/a\n9:memory:/slurm/job_1\n0::/\n", {"memory/slurm/job_1/memory.limit_in_bytes": 5 << 30}, "5"),
        ("9:memory:/a\n", {"memory/memory.limit_in_bytes": 9223372036854771712}, "64"),
        ("0::/../other\n", {"memory.max": 6 << 30}, "6"),
    ],
)
def test_a_jobs_limit_of_memory_counts(groups, limits, gb, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {64 << 20} kB\n")
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, limit in limits.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    assert from_bash(f"free_memory_gb {tmp_path}") == f"{gb}\n"
