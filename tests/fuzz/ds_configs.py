"""Hostile ds_configs: what MegaBERT accepts, DeepSpeed's own parser must accept too."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig

from megabert.config.ds_config import read_ds_config
from tests.fuzz.mutations import mutate_json, mutate_tree
from tests.fuzz.outcome import Case

REPOSITORY = Path(__file__).resolve().parents[2]
# Valid settings that our own files do not have.
MORE = {
    "train_batch_size": "auto",
    "gradient_predivide_factor": 1.0,
    "prescale_gradients": False,
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "bf16": {"enabled": False},
    "memory_breakdown": False,
    "dump_state": False,
    "timers": {"throughput": {"enabled": True, "synchronized": False}},
    "comms_logger": {"enabled": False, "prof_ops": ["all_reduce"]},
    "flops_profiler": {"enabled": False, "profile_step": 1, "output_file": None},
    "csv_monitor": {"enabled": False, "output_path": "x", "job_name": "y"},
    "aio": {"enabled": False},
}


def ds_config_cases(folder: Path, random: Random) -> Iterator[Case]:
    """Yield ds_configs with hostile values, names or bytes."""
    path = folder / "fuzzed.json"
    bases = [json.loads(file.read_text()) | MORE for file in sorted((REPOSITORY / "ds_configs").glob("*.json"))]
    while True:
        base = random.choice(bases)
        data = mutate_json(json.dumps(mutate_tree(base, random) if random.random() < 0.3 else base).encode(), random)
        path.write_bytes(data)

        def is_right(settings: Any, data: bytes = data) -> bool:
            return json.loads(data, object_pairs_hook=list) == json.loads(json.dumps(settings), object_pairs_hook=list)

        yield Case(f"ds_config {data[:300]!r}", lambda: _read(path), is_right, (str(path),))


def _read(path: Path) -> dict[str, Any]:
    """Return the settings that were read, after giving what a run makes of them to DeepSpeed's parser."""
    ds_config = read_ds_config(path)
    resolved = ds_config.resolve(accumulation=2, max_grad_norm=1.0, world_size=1, fast_bf16=True)
    try:
        DeepSpeedConfig(dict(resolved.settings))
    except Exception as error:
        raise AssertionError(f"DeepSpeed refuses: {error!r}") from error
    return ds_config.settings
