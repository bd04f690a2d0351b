"""Define the ds_config's values, their types and limits, as DeepSpeed 0.19.8 reads and MegaBERT supports them."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megabert.config.settings import setting


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


# DeepSpeed takes 5e8 for an integer.
Count = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=1 << 62)]
Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=1 << 62)]
Fraction = Annotated[float, Field(ge=0, le=1)]
DataType = Annotated[Literal["fp32", "bf16", "fp16"], BeforeValidator(_lower)]
# DeepSpeed imports these by name. A ds_config is data, so only torch's own modules are allowed.
TorchModule = Annotated[str, Field(pattern=r"^torch\.nn\.[A-Z][A-Za-z0-9]*$")]
Auto = Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class Offload:
    """zero_optimization.offload_optimizer and offload_param."""

    device: Literal["cpu", "none"] = "none"
    pin_memory: bool = True
    ratio: Fraction = 1.0


def in_host_memory(offload: Offload | None) -> bool:
    """Return whether something is in host memory."""
    return offload is not None and offload.device != "none"


@dataclass(frozen=True, kw_only=True)
class ZeroOptimization:
    """How ZeRO partitions and communicates."""

    stage: Annotated[int, Field(ge=0, le=3)] = 0
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Positive = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Positive = 500_000_000
    overlap_comm: bool | None = None
    compute_grad_norm: bool = True
    sub_group_size: Positive = 1_000_000_000
    offload_optimizer: Offload | None = None
    offload_param: Offload | None = None
    stage3_prefetch_bucket_size: Count = 50_000_000
    stage3_param_persistence_threshold: Count = 100_000
    stage3_model_persistence_threshold: Count = 1 << 62
    stage3_max_live_parameters: Count = 1_000_000_000
    stage3_max_reuse_distance: Count = 1_000_000_000
    stage3_module_granularity_threshold: Count = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    stage3_gather_16bit_weights_on_model_save: bool = False
    ignore_unused_parameters: bool = True
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    memory_efficient_linear: bool = True
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False


@dataclass(frozen=True, kw_only=True)
class TorchAutocast:
    """torch.autocast around the forward pass."""

    enabled: bool | Auto = False
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    lower_precision_safe_modules: list[TorchModule] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Bf16:
    """Weights in bf16, with fp32 master weights."""

    enabled: bool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


@dataclass(frozen=True, kw_only=True)
class Fp16:
    """Not supported; only enabled: false passes."""

    enabled: bool = False
    auto_cast: bool = False
    loss_scale: float = 0
    initial_scale_power: Count = 16
    loss_scale_window: Positive = 1000
    hysteresis: Count = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: Count = 1
    fp16_master_weights_and_grads: bool = False


@dataclass(frozen=True, kw_only=True)
class DataTypes:
    """The precision in which gradients are accumulated."""

    grad_accum_dtype: DataType | None = None


@dataclass(frozen=True, kw_only=True)
class CommsLogger:
    """A log of the communication."""

    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[str] = field(default_factory=list)
    verbose: bool = False
    debug: bool = False


@dataclass(frozen=True, kw_only=True)
class FlopsProfiler:
    """A profile of one step."""

    enabled: bool = False
    recompute_fwd_factor: Annotated[float, Field(ge=0)] = 0.0
    profile_step: Positive = 1
    module_depth: Annotated[int, Field(ge=-1)] = -1
    top_modules: Positive = 1
    detailed: bool = True
    output_file: str | None = None


@dataclass(frozen=True, kw_only=True)
class FileMonitor:
    """DeepSpeed's own curves, as TensorBoard or CSV files."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """DeepSpeed's own curves, in wandb."""

    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


@dataclass(frozen=True, kw_only=True)
class ThroughputTimer:
    """The timer of samples per second."""

    enabled: bool = True
    synchronized: bool = True


@dataclass(frozen=True, kw_only=True)
class Timers:
    """DeepSpeed's timers."""

    throughput: ThroughputTimer = ThroughputTimer()


@dataclass(frozen=True, kw_only=True)
class DsSettings:
    """A ds_config. The defaults are DeepSpeed's; None: DeepSpeed decides.

    setting(): affects the arithmetic, and may not change at a resume.
    """

    train_batch_size: Positive | Auto = "auto"
    train_micro_batch_size_per_gpu: Positive | Auto = "auto"
    gradient_accumulation_steps: Positive | Auto = "auto"
    gradient_clipping: Annotated[float, Field(ge=0)] | Auto = "auto"
    zero_optimization: ZeroOptimization = ZeroOptimization()
    torch_autocast: TorchAutocast = setting(TorchAutocast())
    bf16: Bf16 = setting(Bf16())
    fp16: Fp16 = Fp16()
    data_types: DataTypes = setting(DataTypes())
    communication_data_type: DataType | None = setting(None)
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = setting(1.0)
    prescale_gradients: bool = setting(False)
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    steps_per_print: Positive | None = 10
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    timers: Timers = Timers()
    comms_logger: CommsLogger = CommsLogger()
    flops_profiler: FlopsProfiler = FlopsProfiler()
    tensorboard: FileMonitor = FileMonitor()
    csv_monitor: FileMonitor = FileMonitor()
    wandb: Wandb = Wandb()
