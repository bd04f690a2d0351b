"""The ds_config: read it strictly, and fill in the values that the recipe determines.

This module imports neither DeepSpeed nor torch. ds_configs/README.md describes the settings for users.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabert.config.cli import nearest

# Every top-level key that DeepSpeed 0.19.8 reads (its runtime/config.py). It ignores all other keys silently:
# "zero_optimisation" trains at stage 0.
KNOWN_KEYS = frozenset(
    """
    activation_checkpointing aio bf16 checkpoint comms_logger communication_data_type compile csv_monitor
    data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc dump_state
    expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown optimizer pipeline
    prescale_gradients scheduler seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers
    torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
    """.split()
)

# Keys whose values follow from the recipe, and the recipe settings that determine them.
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

# Keys whose value must be an object. DeepSpeed fails with a traceback on other types, or uses its defaults.
SECTIONS = frozenset(
    """
    activation_checkpointing aio bf16 checkpoint comms_logger compile csv_monitor data_efficiency data_types
    datastates_ckpt flops_profiler fp16 hybrid_engine pipeline tensor_parallel tensorboard torch_autocast wandb
    weight_quantization zero_optimization
    """.split()
)

# Sections without effect here, or with an untested one, and why. They are refused unless they are switched off.
NOT_SUPPORTED = {
    "activation_checkpointing": "nothing here reads it. Set model.gradient_checkpointing in the recipe",
    "data_efficiency": "the recipe's data section determines batches, lengths and their schedules",
    "datastates_ckpt": "MegaBERT writes its own checkpoints. Set run.async_save in the recipe",
    "expert_parallel": "MegaBERT has no experts",
    "hybrid_engine": "it is for generation",
    "pipeline": "MegaBERT trains data-parallel. Use ZeRO 3 for a model that does not fit",
    "tensor_parallel": "MegaBERT trains data-parallel. Use ZeRO 3 for a model that does not fit",
    "weight_quantization": "weights are trained in full precision",
}
# The same for keys of zero_optimization, with the values that switch them off.
ZERO_NOT_SUPPORTED = {
    "mics_shard_size": (-1,),
    "mics_hierarchical_params_gather": (False,),
    "zero_hpz_partition_size": (1,),
    "zero_quantized_weights": (False,),
    "zero_quantized_gradients": (False,),
    "zero_quantized_nontrainable_weights": (False,),
}

# Keys that affect the arithmetic, with the values that have no effect.
NUMERICS: dict[str, Any] = {
    "bf16": None,
    "communication_data_type": None,
    "data_types": None,
    "gradient_allreduce_op": None,
    "gradient_predivide_factor": 1.0,
    "prescale_gradients": False,
    "torch_autocast": None,
}


@dataclass(frozen=True)
class ResolvedDsConfig:
    """A ds_config with all values filled in. settings: the dict for deepspeed.initialize."""

    settings: dict[str, Any]

    @property
    def zero_stage(self) -> int:
        return self._zero.get("stage", 0)

    @property
    def bf16(self) -> bool:
        """Whether the forward pass runs under bf16 autocast."""
        return self.settings.get("torch_autocast", {}).get("enabled", False)

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer state is in host memory."""
        return (self._zero.get("offload_optimizer") or {}).get("device", "none") != "none"

    @property
    def reduce_scatter(self) -> bool:
        """Whether ZeRO reduces gradients by reduce-scatter; DeepSpeed's default is True."""
        return self._zero.get("reduce_scatter", True)

    @property
    def numerics(self) -> dict[str, Any]:
        """The settings that affect the arithmetic, without those that are off. A resume needs the same ones."""
        found = {key: (self.settings.get(key), neutral) for key, neutral in NUMERICS.items()}
        return {key: value for key, (value, neutral) in found.items() if _is_on(value) and value != neutral}

    @property
    def _zero(self) -> dict[str, Any]:
        return self.settings.get("zero_optimization", {})


@dataclass(frozen=True)
class DsConfig:
    """A ds_config as the user wrote it. path: its file, for error messages."""

    path: str
    settings: dict[str, Any]

    def resolve(self, *, accumulation: int, max_grad_norm: float, world_size: int, fast_bf16: bool) -> ResolvedDsConfig:
        """Fill in the recipe's values where they are absent or "auto".

        accumulation: micro-batches per rank and step. fast_bf16: whether the device multiplies bf16 natively, which
        decides torch_autocast.enabled "auto". Raises ValueError for a value that contradicts the recipe or is unsafe.
        """
        for key, owner in REFUSED.items():
            if self.settings.get(key, "auto") != "auto":
                raise ValueError(
                    f"{self.path}: sets {key!r}, which MegaBERT takes from {owner}. Remove it from the ds_config."
                )
        from_recipe = {
            "train_batch_size": accumulation * world_size,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": max_grad_norm,
        }
        for key, value in from_recipe.items():
            if self.settings.get(key, "auto") not in ("auto", value):
                raise ValueError(
                    f"{self.path}: sets {key} to {self.settings[key]}, but the recipe makes it {value} "
                    f"({OWNED_BY_RECIPE[key]}). Remove it from the ds_config, or change the recipe."
                )
        settings: dict[str, Any] = {key: value for key, value in self.settings.items() if key not in REFUSED}
        settings |= from_recipe
        settings["torch_autocast"] = {"enabled": False} | settings.get("torch_autocast", {})
        if settings["torch_autocast"]["enabled"] == "auto":
            settings["torch_autocast"]["enabled"] = fast_bf16
        resolved = ResolvedDsConfig(settings)
        _check_safe(resolved, self.path)
        if resolved.zero_stage == 0:
            # training/optim/guard.py clips at stage 0: DeepSpeed's own clipping does not report the norm.
            settings["gradient_clipping"] = 0.0
        return resolved


def read_ds_config(path: str | Path) -> DsConfig:
    """Read a ds_config. Raises ValueError if the file is missing, is not JSON, or has a key without effect."""
    try:
        raw = json.loads(Path(path).read_text(), object_pairs_hook=_without_duplicates)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such ds_config; pass a file such as ds_configs/zero2.json.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds {json.dumps(raw)[:40]}, expected an object.")
    _check_keys(raw, path)
    _check_zero(raw.get("zero_optimization", {}), path)
    autocast = raw.get("torch_autocast", {}).get("enabled", False)
    if not isinstance(autocast, bool) and autocast != "auto":
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
        raise ValueError(f"{path}: MegaBERT sets checkpoint.load_universal itself when it is needed. Remove it.")
    return DsConfig(str(path), raw)


def _check_keys(raw: dict[str, Any], path: str | Path) -> None:
    for key, value in raw.items():
        if key not in KNOWN_KEYS:
            raise ValueError(f"{path}: DeepSpeed knows no top-level key {key!r}.{nearest(key, sorted(KNOWN_KEYS))}")
        if key in SECTIONS and not isinstance(value, dict):
            raise ValueError(
                f'{path}: {key} is {json.dumps(value)[:40]}, expected an object such as {{"enabled": true}}.'
            )
        if key in NOT_SUPPORTED and _is_on(value):
            raise ValueError(f"{path}: {key} is not supported: {NOT_SUPPORTED[key]}.")


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
                f'{path}: zero_optimization.{key}.device is {device!r}, expected "cpu" or "none": '
                "no other offloading is supported."
            )
        if key == "offload_param" and stage < 3 and part.get("device", "none") != "none":
            raise ValueError(f"{path}: zero_optimization.offload_param does nothing below stage 3. Remove it.")
    for key, off in ZERO_NOT_SUPPORTED.items():
        if zero.get(key, off[0]) not in off:
            raise ValueError(
                f"{path}: zero_optimization.{key} is not supported: checkpoints and the guard handle only plain ZeRO "
                "shards. Remove it."
            )


def _check_safe(resolved: ResolvedDsConfig, path: str) -> None:
    """Raise ValueError for settings that would train wrongly or hide the gradient's norm."""
    settings = resolved.settings
    dtype = settings["torch_autocast"].get("dtype", "bfloat16")
    if resolved.bf16 and dtype != "bfloat16":
        raise ValueError(
            f"{path}: torch_autocast.dtype is {dtype!r}, expected bfloat16: the loss scaling of fp16 would change the "
            "norm that the guard and the clipping see."
        )
    if not settings.get("zero_optimization", {}).get("compute_grad_norm", True):
        raise ValueError(
            f"{path}: compute_grad_norm false hides the gradient's norm, which the guard reads. Remove it."
        )
    if resolved.zero_stage == 0 and settings.get("bf16", {}).get("enabled"):
        raise ValueError(
            f"{path}: bf16.enabled at ZeRO stage 0 takes a wrong first Adam step in DeepSpeed 0.19.8. "
            "Use torch_autocast with dtype bfloat16, or stage 1."
        )
    if settings.get("fp16", {}).get("enabled"):
        raise ValueError(f"{path}: fp16 is not supported; use torch_autocast with dtype bfloat16.")


def _is_on(section: Any) -> bool:
    """Whether a section requests anything."""
    if isinstance(section, dict):
        return section.get("enabled", True) is not False and any(_is_on(value) for value in section.values())
    return bool(section)


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"ds_config: the key {key!r} appears twice.")
        found[key] = value
    return found
