"""Read the ds_config strictly, and fill in the values that the recipe determines.

This module imports neither DeepSpeed nor torch. ds_configs/README.md describes the settings for users.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from megabert.config.ds_schema import DsSettings, in_host_memory
from megabert.config.settings import shortened
from megabert.config.strict_yaml import build, read_small_file
from megabert.files.json_file import parse_json

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

NVME = "it is for NVMe, and only offloading to the CPU is supported"
DATA_PARALLEL = "MegaBERT trains data-parallel. Use ZeRO 3 for a model that does not fit"
PLAIN_SHARDS = "checkpoints and the guard handle only plain ZeRO shards"
DEPRECATED = "set zero_optimization.offload_optimizer or zero_optimization.offload_param instead"
# Keys that DeepSpeed reads without an effect here, or with an untested one, and why. They are refused unless they are
# off, or have the value in ON_BY_DEFAULT.
NOT_SUPPORTED = {
    "activation_checkpointing": "nothing here reads it. Set model.gradient_checkpointing in the recipe",
    "aio": NVME,
    "checkpoint": "MegaBERT writes its own checkpoints, and converts them itself where that is needed",
    "compile": "it has no effect here. Set run.compile in the recipe",
    "data_efficiency": "the recipe's data section determines batches, lengths and their schedules",
    "dataloader_drop_last": "MegaBERT has its own loader",
    "datastates_ckpt": "MegaBERT writes its own checkpoints. Set run.async_save in the recipe",
    "disable_allgather": "DeepSpeed does not use it",
    "expert_parallel": "MegaBERT has no experts",
    "gradient_allreduce_op": "MegaBERT's loss needs the mean over ranks",
    "hybrid_engine": "it is for generation",
    "managed_gradient_accumulation": "the training loop needs it",
    "pipeline": DATA_PARALLEL,
    "seq_parallel_communication_data_type": DATA_PARALLEL,
    "tensor_parallel": DATA_PARALLEL,
    "use_data_before_expert_parallelism": "MegaBERT has no experts",
    "weight_quantization": "weights are trained in full precision",
    "zero_optimization.cpu_offload": DEPRECATED,
    "zero_optimization.cpu_offload_param": DEPRECATED,
    "zero_optimization.cpu_offload_use_pin_memory": DEPRECATED,
    "zero_optimization.elastic_checkpoint": PLAIN_SHARDS,
    "zero_optimization.leaf_module": "MegaBERT's layers are partitioned parameter by parameter",
    "zero_optimization.legacy_stage1": PLAIN_SHARDS,
    "zero_optimization.load_from_fp32_weights": "checkpoints hold fp32 weights",
    "zero_optimization.mics_hierarchical_params_gather": PLAIN_SHARDS,
    "zero_optimization.mics_shard_size": PLAIN_SHARDS,
    "zero_optimization.pipeline_loading_checkpoint": DATA_PARALLEL,
    "zero_optimization.save_muon_momentum_buffer_in_memory": NVME,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "launch/convert_to_hf.py gathers the weights",
    "zero_optimization.zenflow": PLAIN_SHARDS,
    "zero_optimization.zero_hpz_partition_size": PLAIN_SHARDS,
    "zero_optimization.zero_quantized_gradients": PLAIN_SHARDS,
    "zero_optimization.zero_quantized_nontrainable_weights": PLAIN_SHARDS,
    "zero_optimization.zero_quantized_weights": PLAIN_SHARDS,
} | {
    f"zero_optimization.{part}.{key}": NVME
    for part in ("offload_optimizer", "offload_param")
    for key in (
        "buffer_count",
        "buffer_size",
        "fast_init",
        "max_in_cpu",
        "nvme_path",
        "pipeline_read",
        "pipeline_write",
        "super_offload",
        "cpuadam_cores_perc",
    )
}

ON_BY_DEFAULT = {
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "zero_optimization.load_from_fp32_weights": True,
    "zero_optimization.mics_shard_size": -1,
    "zero_optimization.zero_hpz_partition_size": 1,
}


@dataclass(frozen=True)
class ResolvedDsConfig:
    """A ds_config with all values filled in. settings: the dict for deepspeed.initialize."""

    settings: dict[str, object]

    @cached_property
    def values(self) -> DsSettings:
        """The settings as a typed value, with DeepSpeed's defaults."""
        return build(DsSettings, self.settings, "ds_config")

    @property
    def zero_stage(self) -> int:
        return self.values.zero_optimization.stage

    @property
    def bf16(self) -> bool:
        """Whether the forward pass runs under bf16 autocast."""
        return self.values.torch_autocast.enabled is True

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer state is in host memory."""
        return in_host_memory(self.values.zero_optimization.offload_optimizer)

    @property
    def reduce_scatter(self) -> bool:
        """Whether ZeRO reduces gradients by reduce-scatter."""
        return self.values.zero_optimization.reduce_scatter

    @property
    def numerics(self) -> dict[str, object]:
        """The settings that affect the arithmetic, without those that are off. A resume needs the same ones."""
        fixed = [field for field in fields(DsSettings) if not field.metadata.get("may_change_at_resume", True)]
        found = {field.name: (self.settings.get(field.name), field.default) for field in fixed}
        return {key: value for key, (value, default) in found.items() if _is_on(value) and value != default}

    def with_autocast(self, enabled: bool) -> "ResolvedDsConfig":
        """Return the ds_config with bf16 autocast on or off, as another device decides it."""
        autocast = _section(self.settings, "torch_autocast") | {"enabled": enabled}
        return ResolvedDsConfig(self.settings | {"torch_autocast": autocast})

    def with_universal_loading(self) -> "ResolvedDsConfig":
        """Return the ds_config of an engine that loads a universal checkpoint; it saves ordinary ones."""
        return ResolvedDsConfig(self.settings | {"checkpoint": {"load_universal": True}})


@dataclass(frozen=True)
class DsConfig:
    """A ds_config as the user wrote it. path: its file, for error messages."""

    path: str
    settings: dict[str, object]

    @cached_property
    def values(self) -> DsSettings:
        """The settings as a typed value, with DeepSpeed's defaults; "auto" stays.

        Raises ValueError, in one line that names file and key, for a key that is unknown or has no effect, and for a
        value of another type.
        """
        return build(DsSettings, _supported(self.settings, self.path), self.path)

    def computes_in_bf16(self, fast_bf16: bool) -> bool:
        """Return whether activations are in bf16. fast_bf16: whether the device multiplies bf16 natively."""
        enabled = self.values.torch_autocast.enabled
        return self.values.bf16.enabled or (fast_bf16 if enabled == "auto" else enabled)

    def resolve(self, *, accumulation: int, max_grad_norm: float, world_size: int, fast_bf16: bool) -> ResolvedDsConfig:
        """Fill in the recipe's values where they are absent or "auto".

        accumulation: micro-batches per rank and step. fast_bf16: whether the device multiplies bf16 natively, which
        decides torch_autocast.enabled "auto". Raises ValueError for a value that contradicts the recipe or is unsafe.
        """
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
        settings = _supported(self.settings, self.path) | from_recipe
        enabled = self.values.torch_autocast.enabled
        autocast = {"enabled": fast_bf16 if enabled == "auto" else enabled}
        settings["torch_autocast"] = _section(settings, "torch_autocast") | autocast
        # DeepSpeed's default makes the host wait for the device twice in every micro-batch.
        settings["timers"] = {"throughput": {"enabled": False}} | _section(settings, "timers")
        if self.values.zero_optimization.stage == 0:
            # training/updates/guard.py clips at stage 0: DeepSpeed's own clipping does not report the norm.
            settings["gradient_clipping"] = 0.0
        resolved = ResolvedDsConfig(settings)
        _check_safe(resolved, self.path)
        return resolved


def read_ds_config(path: str | Path) -> DsConfig:
    """Read a ds_config.

    Raises ValueError, in one line that names file and key, if the file is missing or is not JSON, and for a key that
    DeepSpeed does not know or that has no effect, and for a value of another type.
    """
    try:
        data = read_small_file(Path(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such ds_config. An example is ds_configs/zero2.json.") from error
    try:
        raw = parse_json(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds {shortened(raw)}, expected an object.")
    ds_config = DsConfig(str(path), raw)
    zero = ds_config.values.zero_optimization
    if zero.stage < 3 and in_host_memory(zero.offload_param):
        raise ValueError(f"{path}: zero_optimization.offload_param does nothing below stage 3. Remove it.")
    return ds_config


def _section(settings: dict[str, object], name: str) -> dict[str, object]:
    """Return a section as the user wrote it, or an empty one. Its type was checked when the file was read."""
    section = settings.get(name, {})
    assert isinstance(section, dict), f"the ds_config's {name} is {section!r}, expected a dict"
    return section


def _supported(raw: dict[str, object], path: str | Path, above: str = "") -> dict[str, object]:
    """Return the settings without those that are not supported but off; raise ValueError for one that is on."""
    kept: dict[str, object] = {}
    for key, value in raw.items():
        name = f"{above}{key}"
        if name in REFUSED:
            if value != "auto":
                raise ValueError(f"{path}: sets {name!r}, which MegaBERT takes from {REFUSED[name]}. Remove it.")
        elif name in NOT_SUPPORTED:
            if _is_on(value) and value != ON_BY_DEFAULT.get(name):
                raise ValueError(f"{path}: {name} is not supported: {NOT_SUPPORTED[name]}. Remove it.")
        else:
            kept[key] = _supported(value, path, f"{name}.") if isinstance(value, dict) else value
    return kept


def _check_safe(resolved: ResolvedDsConfig, path: str) -> None:
    """Raise ValueError for settings that would train wrongly or hide the gradient's norm."""
    values = resolved.values
    if resolved.bf16 and values.torch_autocast.dtype != "bfloat16":
        raise ValueError(
            f"{path}: torch_autocast.dtype is {values.torch_autocast.dtype!r}, expected bfloat16: the loss scaling of "
            "fp16 would change the norm that the guard and the clipping see."
        )
    if not values.zero_optimization.compute_grad_norm:
        raise ValueError(
            f"{path}: compute_grad_norm false hides the gradient's norm, which the guard reads. Remove it."
        )
    if resolved.zero_stage == 0 and values.bf16.enabled:
        raise ValueError(
            f"{path}: bf16.enabled at ZeRO stage 0 takes a wrong first Adam step in DeepSpeed 0.19.8. "
            "Use torch_autocast with dtype bfloat16, or stage 1."
        )
    if values.fp16.enabled:
        raise ValueError(f"{path}: fp16 is not supported; use torch_autocast with dtype bfloat16.")


def _is_on(section: object) -> bool:
    """Return whether a section requests anything."""
    if isinstance(section, str):
        return section not in ("", "none")
    if isinstance(section, dict):
        return section.get("enabled", True) is not False and any(_is_on(value) for value in section.values())
    return bool(section)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON.")
