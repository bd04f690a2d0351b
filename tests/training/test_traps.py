"""DeepSpeed's traps that MegaBERT goes round, still there: a test that fails says that a detour may be given up.

Those of checkpoints on other numbers of ranks are in test_checkpoint.py, those of Muon in test_optimizers.py.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import REPOSITORY, free_port


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What traps.py saw."""
    command = [sys.executable, "tests/training/traps.py", str(free_port())]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# What DeepSpeed does, and the name of what goes round it.
TRAPS = {
    "shm_comm_by_default": (True, "training/engine.py start_process: else a minute of compiling at every first start"),
    "bf16_at_stage_0": (1, "config/ds_config.py fill refuses it: Adam has counted a step that was none"),
    "nan_at_stage_0": (True, "training/optim/guard.py hold_back"),
    "nan_at_stage_2": (False, "nothing: ZeRO skips the step, and training/optim/guard.py counts it"),
    "norm_at_stage_0": (False, "training/optim/guard.py Verdict clips itself there"),
    "mistyped_stage": (0, "config/ds_config.py KNOWN_KEYS: trained at stage 0 without a word"),
    "autocast_reduces_in": ("torch.bfloat16", "ds_configs: lower_precision_safe_modules []"),
    "monitored": (["Train_Samples_lr.csv"], "training/telemetry/reporter.py: no loss, no norm"),
    "flipped_bit_loads": (True, "checkpoint_format.py: every file has its hash in a manifest"),
    "client_state_overwrites": (99, "training/checkpointing/resume.py keeps its own state in a file of its own"),
    "nothing_to_load": (True, "training/checkpointing/resume.py load: only what find found is loaded"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_the_trap_is_still_there(found, trap):
    expected, detour = TRAPS[trap]
    assert found[trap] == expected, f"DeepSpeed has changed; look at {detour}"


def test_offloading_still_wants_a_word_for_a_client_optimizer(found):
    assert "zero_force_ds_cpu_optimizer" in found["offload_refuses_torch"]
