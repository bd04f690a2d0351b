"""DeepSpeed's traps that MegaBERT avoids: a test that fails shows that DeepSpeed has changed and a workaround can go.

The traps of Muon are in updates/test_muon.py.
"""

import ast
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from megabert.training.distributed import deepspeed_compat
from tests.helpers.runs import REPOSITORY, run_command


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What traps.py found."""
    done = run_command([sys.executable, "tests/training/helpers/traps.py"])
    assert done.code == 0, done.output
    return json.loads(next(line for line in done.output.splitlines() if line.startswith("{")))


COMPAT = "training/distributed/deepspeed_compat.py"

# What DeepSpeed does, and what avoids it.
TRAPS = {
    "shm_comm_by_default": (True, f"{COMPAT} skip_shm_comm_build: otherwise it compiles for a minute"),
    "deprecated_collectives": (True, f"{COMPAT} ignore_deprecated_collectives"),
    "all_gather_is_an_attribute": (True, f"{COMPAT} replace_all_gather: it must be called for gathering weights"),
    "bf16_at_stage_0": (
        1,
        "config/ds_config.py DsConfig.resolve refuses it: Adam has counted a step that was not made",
    ),
    "nan_at_stage_0": (True, f"{COMPAT} gate_optimizer_step"),
    "nan_at_stage_2": (False, "nothing: ZeRO skips the step, and training/updates/guard.py counts it"),
    "norm_at_stage_0": (False, "training/updates/guard.py UpdateGate clips there itself"),
    "norm_within_step": (
        [3.0, 6.0],
        f"{COMPAT} install_norm_reader: the engine has the last step's norm, ZeRO this one's",
    ),
    # Of 1 x 8 and 1, padded at stages 1 and 2.
    "flat_partitions": (
        [[8, 2], [8, 2], [8, 1]],
        f"{COMPAT} optimizer_partitions: StableAdamW's sums are those of whole parameters",
    ),
    "reads_norm_again": ([3, 2], f"{COMPAT} replace_norm_checks"),
    "one_rank_is_reduced": ([True, False], f"{COMPAT} skip_reduction_of_one_rank"),
    "gradients_move": (True, f"{COMPAT} reduce_once: a graph's gradients stay where they are"),
    "numel_at_stage_3": ([0, 0], f"{COMPAT} num_parameters"),
    "mistyped_stage": (0, "config/ds_schema.py DsSettings: otherwise it would train at stage 0 without a message"),
    "autocast_reduces_in": ("torch.bfloat16", "ds_configs: lower_precision_safe_modules []"),
    "monitored": (["Train_Samples_lr.csv"], "training/telemetry/reporter.py: no loss, no norm"),
    "saves_in_place": (True, f"{COMPAT} capture_checkpoint"),
    "flipped_bit_loads": (True, "files/checkpoint_format.py: a manifest has the hash of every file"),
    "client_state_overwrites": (99, "training/checkpointing/writer.py keeps the state in a file of its own"),
    "loads_any_pickle": (True, f"{COMPAT} loading_only_weights, and files/pickles.py"),
    "stage_is_an_enum": (True, f"{COMPAT} pickle_enums_by_value and enum_member"),
    "nothing_to_load": (True, "training/checkpointing/resume.py load: it loads only what was found before"),
    "folder_is_a_pattern": (True, f"{COMPAT} literal_folder"),
    "folder_is_an_expression": (True, f"{COMPAT} literal_folder"),
    "refuses_another_world_size": (True, f"{COMPAT} convert_to_universal"),
    "converter_loops": (
        ["extract_zero_shards", "merge_tp_slices", "extract_zero_shards_stage3", "merge_zero3_slices"],
        f"{COMPAT} convert_to_universal, and checkpointing/universal.py",
    ),
    "universal_load_at_stage_3": ({"weight_decay": [0.5, 0.5], "steps": 1}, f"{COMPAT} repair_universal_load"),
    "compiles_muon": (True, f"{COMPAT} skip_compiler_of_muon_on_cpus"),
    "fragments_keep_graphs": ([True, True], f"{COMPAT} free_accumulators"),
    "gathered_after_load": (True, f"{COMPAT} partition_after_load"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_the_trap_still_exists(found, trap):
    expected, workaround = TRAPS[trap]
    assert found[trap] == expected, f"DeepSpeed has changed; look at {workaround}"


def test_offloading_still_needs_a_flag_for_a_client_optimizer(found):
    assert "zero_force_ds_cpu_optimizer" in found["offload_refuses_torch"]


def test_every_hook_names_its_canary():
    hooks = [
        item for name, item in vars(deepspeed_compat).items()
        if inspect.isfunction(item) and item.__module__ == deepspeed_compat.__name__ and name != "group_settings"
    ]  # fmt: skip
    assert len(hooks) > 5
    for hook in hooks:
        canary = re.search(r"Canary: (\w+)", hook.__doc__ or "")
        assert canary is not None, hook.__name__
        assert hook.__name__ in TRAPS[canary[1]][1], (
            f"{hook.__name__} names {canary[1]}, which names another workaround"
        )


INTERNALS = ("deepspeed.runtime", "deepspeed.checkpoint", "deepspeed.comm.comm", "deepspeed.utils", "deepspeed.ops")
# An optimizer's class, which has no public name, and whose import needs no hook.
ALLOWED = {"megabert/training/updates/optimizers.py": {"deepspeed.runtime.zero.muon.muon_optimizer"}}
ALLOWED |= {"megabert/kernels/resolve.py": {"deepspeed.ops.adam"}}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "megabert").rglob("*.py")), ids=lambda path: path.stem)
def test_only_one_file_imports_the_internals_of_deepspeed(path: Path):
    name = str(path.relative_to(REPOSITORY))
    if name == "megabert/training/distributed/deepspeed_compat.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        internal = {module for module in names if module.startswith(INTERNALS)}
        assert internal <= ALLOWED.get(name, set()), f"{name} imports {internal}: move that to deepspeed_compat.py"
