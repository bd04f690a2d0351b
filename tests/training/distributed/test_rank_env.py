"""The rank is found in the environment of every launcher, and without loading torch."""

import subprocess
import sys

import pytest

from megabert.training.distributed.rank_env import rank_variables

DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "MASTER_ADDR": "node0"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (DEEPSPEED | {"PATH": "/bin"}, DEEPSPEED),
        (SRUN, DEEPSPEED | {"MASTER_PORT": "29500"}),
        (SRUN | DEEPSPEED | {"RANK": "2"}, DEEPSPEED | {"RANK": "2"}),
    ],
)
def test_the_variables_of_a_launcher_are_found(environ, expected):
    assert rank_variables(environ) == expected


@pytest.mark.parametrize("environ", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}])
def test_a_process_without_a_launcher_is_the_only_rank(environ):
    """The shell of a SLURM batch script has SLURM_PROCID as well, but no step."""
    variables = rank_variables(environ)
    assert (variables["RANK"], variables["WORLD_SIZE"], variables["LOCAL_RANK"]) == ("0", "1", "0")
    assert variables["MASTER_PORT"] == "0"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE is 1, expected a rank below .*unset RANK WORLD_SIZE LOCAL_RANK"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "3"}, "RANK is 3 and WORLD_SIZE is 1, expected"),
        (DEEPSPEED | {"WORLD_SIZE": "0"}, "RANK is 3 and WORLD_SIZE is 0, expected"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected a number.*unset"),
        ({"RANK": "-1"}, "RANK is '-1', expected a number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is '', expected a number"),
        (DEEPSPEED | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000, expected a number up to 65535"),
    ],
)
def test_what_no_launcher_sets_is_refused(environ, message):
    """An interactive shell on a cluster, or a notebook, may have variables of an earlier job."""
    with pytest.raises(ValueError, match=message):
        rank_variables(environ)


def test_reading_the_rank_loads_no_torch():
    program = "import sys; import megabert.training.distributed.rank_env; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
