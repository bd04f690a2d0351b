"""The ds_config: read it, refuse what DeepSpeed would silently ignore, and fill in what the recipe owns.

Pure: knows no DeepSpeed and no device. ds_configs/README.md tells the user what belongs where.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megabert.config.cli import nearest

# Every top-level key that DeepSpeed 0.19.8 reads (its runtime/config.py). It ignores all others without a word:
# "zero_optimisation" trains at stage 0.
KNOWN_KEYS = frozenset(
    """
    activation_checkpointing aio bf16 checkpoint comms_logger communication_data_type compile csv_monitor data_efficiency
    data_types dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc dump_state expert_parallel
    flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
    hybrid_engine log_level managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers torch_autocast
    train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism wall_clock_breakdown wandb
    weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """.split()
)

# The recipe's, under our names: where a user changes them instead.
OWNED_BY_RECIPE = {
    "train_batch_size": "data.global_batch_tokens / data.micro_batch_tokens",
    "train_micro_batch_size_per_gpu": "always 1: one DeepSpeed sample is one bin of data.micro_batch_tokens",
    "gradient_accumulation_steps": "data.global_batch_tokens, data.micro_batch_tokens and the number of ranks",
    "gradient_clipping": "optimizer.max_grad_norm",
}
REFUSED = {
    "optimizer": "the recipe's optimizer section",
    "scheduler": "the recipe's optimizer.warmup and optimizer.final_lr",
}

# What DeepSpeed reads there is an object; for anything else it has a traceback or, worse, its defaults.
SECTIONS = frozenset(
    """
    activation_checkpointing aio bf16 checkpoint comms_logger compile csv_monitor data_efficiency data_types datastates_ckpt
    flops_profiler fp16 hybrid_engine pipeline tensor_parallel tensorboard torch_autocast wandb weight_quantization zero_optimization
    """.split()
)

# What would have no effect here, or one that nobody has looked at; refused unless it is off.
NOT_HERE = {
    "activation_checkpointing": "nothing here reads it. Set model.gradient_checkpointing in the recipe",
    "data_efficiency": "the recipe's data section owns batches, lengths and their schedules",
    "datastates_ckpt": "checkpoints are written by megabert/training/checkpointing/writer.py, which run.async_save rules",
    "expert_parallel": "MegaBERT has no experts",
    "hybrid_engine": "it is for generation",
    "pipeline": "MegaBERT trains data-parallel. Use ZeRO 3 for a model that does not fit",
    "tensor_parallel": "MegaBERT trains data-parallel. Use ZeRO 3 for a model that does not fit",
    "weight_quantization": "weights are trained as they are",
}
ZERO_NOT_HERE = {  # the values that are off
    "mics_shard_size": (-1,),
    "mics_hierarchical_params_gather": (False,),
    "zero_hpz_partition_size": (1,),
    "zero_quantized_weights": (False,),
    "zero_quantized_gradients": (False,),
    "zero_quantized_nontrainable_weights": (False,),
}

# Of a ds_config, what the arithmetic depends on, and the value that changes nothing.
NUMERICS: dict[str, Any] = {
    "bf16": None,
    "communication_data_type": None,
    "data_types": None,
    "gradient_allreduce_op": None,
    "gradient_predivide_factor": 1.0,
    "prescale_gradients": False,
    "torch_autocast": None,
}


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a ds_config. Raises ValueError for a file that is missing, not JSON, or asks for what nothing would do."""
    try:
        raw = json.loads(Path(path).read_text(), object_pairs_hook=_without_duplicates)
    except FileNotFoundError as missing:
        raise ValueError(
            f"{path}: no such ds_config; --ds_config names a file such as ds_configs/zero2.json."
        ) from missing
    except json.JSONDecodeError as mistake:
        raise ValueError(f"{path}: not valid JSON: {mistake}") from mistake
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds {json.dumps(raw)[:40]}, expected an object.")
    for key, value in raw.items():
        if key not in KNOWN_KEYS:
            raise ValueError(f"{path}: DeepSpeed knows no top-level key {key!r}.{nearest(key, sorted(KNOWN_KEYS))}")
        if key in SECTIONS and not isinstance(value, dict):
            raise ValueError(f'{path}: {key} is {json.dumps(value)[:40]}, expected an object, as {{"enabled": true}}.')
        if key in NOT_HERE and _is_on(value):
            raise ValueError(f"{path}: {key} is not supported: {NOT_HERE[key]}.")
    _check_zero(raw.get("zero_optimization", {}), path)
    autocast = raw.get("torch_autocast", {}).get("enabled", False)
    if autocast not in (True, False, "auto") or isinstance(autocast, int) != isinstance(autocast, bool):
        raise ValueError(f'{path}: torch_autocast.enabled is {autocast!r}, expected true, false or "auto".')
    modules = raw.get("torch_autocast", {}).get("lower_precision_safe_modules", [])
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise ValueError(
            f"{path}: torch_autocast.lower_precision_safe_modules is {modules!r}, expected a list of names."
        )
    every = raw.get("steps_per_print")
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise ValueError(f"{path}: steps_per_print is {every!r}, expected a number of steps, or null.")
    if raw.get("checkpoint", {}).get("load_universal"):
        raise ValueError(f"{path}: checkpoint.load_universal is set by MegaBERT where it is needed. Remove it.")
    return raw


def _check_zero(zero: dict[str, Any], path: str | Path) -> None:
    stage = zero.get("stage", 0)
    if not isinstance(stage, int) or isinstance(stage, bool) or stage not in range(4):
        raise ValueError(f"{path}: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3.")
    for key in ("offload_optimizer", "offload_param"):
        part = zero.get(key) or {}
        if not isinstance(part, dict):
            raise ValueError(f"{path}: zero_optimization.{key} is {part!r}, expected an object.")
        if (device := part.get("device", "cpu")) not in ("cpu", "none"):
            raise ValueError(
                f"{path}: zero_optimization.{key}.device is {device!r}; this stack offloads to the cpu only."
            )
        if key == "offload_param" and stage < 3 and part.get("device", "none") != "none":
            raise ValueError(f"{path}: zero_optimization.offload_param does nothing below stage 3.")
    for key, off in ZERO_NOT_HERE.items():
        if zero.get(key, off[0]) not in off:
            raise ValueError(
                f"{path}: zero_optimization.{key} is not supported: checkpoints and the guard know ZeRO's own shards only."
            )


def _is_on(section: Any) -> bool:
    """Whether a section asks for anything."""
    if isinstance(section, dict):
        return section.get("enabled", True) is not False and any(_is_on(value) for value in section.values())
    return bool(section)


def numerics_of(ds_config: dict[str, Any]) -> dict[str, Any]:
    """What a filled ds_config says of the arithmetic, without what is off: a run goes on bitwise only under the same."""
    found = {key: (ds_config.get(key), plain) for key, plain in NUMERICS.items()}
    return {key: value for key, (value, plain) in found.items() if _is_on(value) and value != plain}


def fill(
    raw: dict[str, Any], path: str | Path, *, accumulation: int, max_grad_norm: float, world_size: int, fast_bf16: bool
) -> dict[str, Any]:
    """Give the ds_config that DeepSpeed gets: `raw` with the recipe's values where absent or "auto".

    accumulation: micro-batches per rank and step. fast_bf16: whether this device multiplies bf16 natively, which is
    what torch_autocast.enabled "auto" asks. Raises ValueError where raw contradicts the recipe or asks what is unsafe.
    """
    for key, owner in REFUSED.items():
        if raw.get(key, "auto") != "auto":
            raise ValueError(f"{path}: sets {key!r}, which MegaBERT takes from {owner}. Remove it from the ds_config.")
    ours = {
        "train_batch_size": accumulation * world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
    }
    stage = raw.get("zero_optimization", {}).get("stage", 0)
    for key, value in ours.items():
        if raw.get(key, "auto") not in ("auto", value):
            raise ValueError(
                f"{path}: sets {key} to {raw[key]}, but the recipe makes it {value} ({OWNED_BY_RECIPE[key]}). "
                "Remove it from the ds_config, or change the recipe."
            )
    filled: dict[str, Any] = {key: value for key, value in raw.items() if key not in REFUSED} | ours
    autocast = {"enabled": False} | filled.get("torch_autocast", {})
    if autocast.get("enabled") == "auto":
        autocast["enabled"] = fast_bf16
    filled["torch_autocast"] = autocast
    if autocast.get("enabled") and autocast.get("dtype", "bfloat16") != "bfloat16":
        raise ValueError(
            f"{path}: torch_autocast.dtype is {autocast['dtype']!r}, expected bfloat16: fp16's loss scaling would reach the guard's and "
            "the clipping's norm."
        )
    if stage == 0:
        filled["gradient_clipping"] = (
            0.0  # training/optim/guard.py clips: DeepSpeed would, but does not say what the norm was
        )
    if not filled.get("zero_optimization", {}).get("compute_grad_norm", True):
        raise ValueError(
            f"{path}: compute_grad_norm false hides the gradient's norm, which the guard reads. Remove it."
        )
    if stage == 0 and filled.get("bf16", {}).get("enabled"):
        raise ValueError(
            f"{path}: bf16.enabled at ZeRO stage 0 takes a wrong first Adam step in DeepSpeed 0.19.8. "
            "Use torch_autocast with dtype bfloat16, or stage 1."
        )
    if filled.get("fp16", {}).get("enabled"):
        raise ValueError(f"{path}: fp16 is not supported; use torch_autocast with dtype bfloat16.")
    return filled


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"ds_config: the key {key!r} stands twice.")
        found[key] = value
    return found
