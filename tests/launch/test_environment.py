"""What commands and scripts say where MegaBERT, or a package that it needs, is not installed."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from megabert.config import cli
from megabert.process.interrupts import missing_package
from tests.helpers.runs import REPOSITORY

MAIN = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)
PYTHON = [
    str(path.relative_to(REPOSITORY))
    for folder in ("launch", "data_prep")
    for path in sorted([*(REPOSITORY / folder).glob("*.py"), *(REPOSITORY / folder / "quickstart").glob("*.py")])
    if MAIN.search(path.read_text())
]
SBATCH = sorted(path.name for path in (REPOSITORY / "launch/slurm").glob("*.sbatch"))
PART_OF_A_JOB = {"STEP": "plan", "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_JOB_ID": "1"}


def run(*command: str, **env: str) -> tuple[int, list[str]]:
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_every_command_is_found():
    assert {"launch/pretrain.py", "launch/quickstart/summarize.py", "data_prep/check_shards.py"} < set(PYTHON)
    assert len(PYTHON) >= 12


@pytest.mark.parametrize("script", PYTHON)
def test_a_python_without_megabert_is_one_line_with_the_remedy(script):
    # -S: without site-packages.
    code, (line,) = run(sys.executable, "-S", script, "--help")
    assert code == 2
    assert line == "No module named 'megabert': run bash launch/install.sh, then source .venv/bin/activate."


@pytest.mark.parametrize("script", PYTHON)
def test_a_python_without_the_other_packages_is_one_line_with_the_remedy(script):
    code, (line,) = run(sys.executable, "-S", script, "--help", PYTHONPATH=str(REPOSITORY))
    assert code == 2
    assert re.match(
        rf"{sys.executable} has no package \w+\. In a checkout of MegaBERT run bash launch/install\.sh", line
    )


def test_a_package_that_a_running_command_lacks_is_one_line(capsys):
    def main() -> int:
        raise ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")

    with pytest.raises(SystemExit) as end:
        cli.run(main, "launch/x.py")
    assert end.value.code == 2
    assert capsys.readouterr().err == f"launch/x.py: {missing_package(ModuleNotFoundError(name='torch'))}\n"


@pytest.mark.parametrize("name", ["megabert.nowhere", "data_prep.nowhere", None])
def test_a_missing_module_of_our_own_is_a_fault_with_its_traceback(name):
    def main() -> int:
        raise ModuleNotFoundError(name=name)

    with pytest.raises(ModuleNotFoundError):
        cli.run(main, "launch/x.py")


@pytest.mark.parametrize("script", SBATCH)
def test_a_job_without_its_environment_ends_with_one_line(script, tmp_path):
    command, variables = ["bash", f"launch/slurm/{script}"], PART_OF_A_JOB | {"PATH": os.environ["PATH"]}
    code, (line,) = run(*command, VENV=str(tmp_path / "venv"), **variables)
    assert code == 2
    assert line.startswith(f"{tmp_path}/venv is no Python environment: run bash launch/install.sh, or set VENV to")


@pytest.mark.parametrize("script", [*(f"slurm/{name}" for name in SBATCH), "keep_running.sh", "quickstart/prepare.sh"])
def test_a_script_without_python_ends_with_one_line(script, tmp_path):
    # A checkout without .venv, and a PATH without Python.
    shutil.copytree(REPOSITORY / "launch", tmp_path / "launch")
    for name in ("dirname", "id"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    done = subprocess.run(
        ["/usr/bin/bash", f"launch/{script}"],
        cwd=tmp_path,
        env={"PATH": str(tmp_path), "VENV": "", "OUT": "x"} | PART_OF_A_JOB,
        capture_output=True,
        text=True,
        check=False,
    )
    code, (line,) = done.returncode, done.stderr.splitlines()
    assert code == 2
    assert re.fullmatch(r"there is no command (python|deepspeed): run bash launch/install.sh, then source .*", line)
