"""Choose the implementation of each operation, once at start-up, and log the choice with its reasons.

Fastest first, for each operation: flash-attn (attention only), Triton, PyTorch; on a CPU torch.compile, PyTorch. The
reason why one cannot run is logged, or raised as an error if `fused` was asked for.

This is the only place where pretraining and fine-tuning choose. A model without a call of resolve() follows
transformers' attn_implementation.
"""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Literal, NamedTuple

import torch
import torch._dynamo
import torch.distributed
from packaging.version import InvalidVersion, Version

from megabert.kernels import HEAD_DIMS, MAX_WIDTH
from megabert.kernels.cpu import CPU_OPS
from megabert.kernels.cpu.compiled import why_not_compiled
from megabert.kernels.devices import OLDEST_CAPABILITY, why_no_launch
from megabert.model.attention import PLANNERS
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.ops import TORCH_OPS, Ops

log = logging.getLogger(__name__)

# The first version with alibi_slopes.
FLASH_OLDEST = "2.4"
# The version of torch 2.11. Its kernels compile with the same registers as those of 3.7.1, which the tests run.
TRITON_OLDEST = "3.6"

# Modules to look for, and the distributions that may contain them and know their version. apex is recognised by its C
# extension, because PyPI's package of that name is another project.
MODULES = {
    "flash_attn": ("flash-attn",),
    "triton": ("triton", "pytorch-triton", "pytorch-triton-rocm"),
    "amp_C": (),
    "deepspeed.ops.adam.fused_adam_op": (),
}

# Each combination of dropout, dtypes and equal sizes is compiled separately. With torch's limit of 8 recompilations a
# long run would stop with an error.
RECOMPILE_LIMIT = 64


def nothing_wrong() -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the choice depends on.

    capability: a CUDA device's. installed: module -> version, "" where the version is unknown. is_amd: torch's ROCm
    build, which calls its devices "cuda" too. try_triton: launches a kernel; returns why that fails, or None.
    """

    device_type: str
    capability: tuple[int, int] | None = None
    installed: Mapping[str, str]
    is_amd: bool = False
    try_triton: Callable[[], str | None] = field(default=nothing_wrong, compare=False)

    def lacks(self, module: str) -> bool:
        return module not in self.installed


def inspect_machine(device: torch.device) -> Machine:
    """Find the device's capability and the installed modules, without importing them."""
    # Only CUDA devices use these modules, and looking for DeepSpeed's extension imports DeepSpeed.
    if device.type != "cuda":
        return Machine(device_type=device.type, installed={})
    found = {module: _version_of(module) for module in MODULES if _is_installed(module)}
    return Machine(
        device_type=device.type,
        capability=torch.cuda.get_device_capability(device),
        installed={module: version for module, version in found.items() if version is not None},
        is_amd=torch.version.hip is not None,
        try_triton=lambda: why_no_launch(device),
    )


def _is_installed(module: str) -> bool:
    """Whether a module can be imported. A folder without code is not one: flash-attn-4 leaves such a flash_attn."""
    package = module.split(".")[0]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        return False
    return module == package or importlib.util.find_spec(module) is not None


def _version_of(module: str) -> str | None:
    """Return a module's version, "" if it has none, and None if the distribution that it should come from is absent."""
    if not MODULES[module]:
        return ""
    for name in MODULES[module]:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _is_older(version: str, oldest: str) -> bool:
    try:
        return Version(version).release < Version(oldest).release
    except InvalidVersion:
        return True


def why_not_flash(
    device: torch.device, config: MegaBertConfig, bf16: bool, machine: Machine | None = None
) -> str | None:
    """Return the reason why flash-attn cannot run this model here, or None."""
    machine = machine or inspect_machine(device)
    if machine.device_type != "cuda":
        return f"flash-attn needs a CUDA device, this is {machine.device_type}"
    if machine.lacks("flash_attn"):
        return "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    if _is_older(version := machine.installed["flash_attn"], FLASH_OLDEST):
        return f"flash-attn {version} is older than {FLASH_OLDEST}, the first with ALiBi"
    if config.padding == "padded":
        return "model.padding padded computes the padding, which flash-attn leaves out"
    if too_old := _why_too_old("flash-attn", machine):
        return too_old
    return None if bf16 else "flash-attn computes in bf16, and torch_autocast is off"


def why_not_triton(operation: str, config: MegaBertConfig, bf16: bool, machine: Machine) -> str | None:
    """Return the reason why the Triton kernel of an operation cannot run this model here, or None."""
    if machine.device_type != "cuda":
        return f"Triton needs a CUDA device, this is {machine.device_type}"
    if machine.lacks("triton"):
        return "Triton is not installed (pip install 'megabert[kernels]')"
    if _is_older(version := machine.installed["triton"], TRITON_OLDEST):
        return f"Triton {version} is older than {TRITON_OLDEST} (pip install 'megabert[kernels]')"
    if too_old := _why_too_old("Triton", machine):
        return too_old
    if config.hidden_size > MAX_WIDTH and "norm" in operation:
        return f"Triton's LayerNorm takes rows of up to {MAX_WIDTH}, model.hidden_size is {config.hidden_size}"
    if operation == "attention" and config.head_dim not in HEAD_DIMS:
        return f"Triton's attention takes head sizes {', '.join(map(str, HEAD_DIMS))}, this one is {config.head_dim}"
    if operation == "attention" and not bf16:
        return "Triton's attention computes in bf16, and torch_autocast is off"
    return machine.try_triton()


def _why_too_old(name: str, machine: Machine) -> str | None:
    if machine.is_amd:
        return f"{name} is used on NVIDIA's GPUs only, this is AMD's"
    if machine.capability is None or machine.capability >= OLDEST_CAPABILITY:
        return None
    needed, got = (".".join(map(str, x)) for x in (OLDEST_CAPABILITY, machine.capability))
    return f"{name} needs compute capability {needed}, this is {got}"


def why_not_cpu_fused(config: MegaBertConfig, bf16: bool) -> str | None:
    """Return the reason why plain PyTorch is the better choice for this model on a CPU, or None.

    In fp32 without dropout the matrix products take nearly all of the time, and compiled calls cost as much as they
    save: a step of the quickstart takes 110 ms with them, 103 ms without.
    """
    if not bf16 and config.hidden_dropout_prob == 0:
        return "in fp32 without dropout fusing them gains nothing"
    return why_not_compiled()


def triton_ops() -> Ops:
    """Return the Triton kernels. Only this function imports Triton, and only a choice of one of them calls it."""
    from megabert.kernels.add_layer_norm import add_layer_norm, layer_norm
    from megabert.kernels.attention import plan_triton
    from megabert.kernels.cross_entropy import masked_cross_entropy
    from megabert.kernels.embed_layer_norm import embed_layer_norm
    from megabert.kernels.geglu import geglu
    from megabert.kernels.rotate import rotate

    return Ops(
        attention=plan_triton,
        rotate=rotate,
        layer_norm=layer_norm,
        geglu=geglu,
        add_layer_norm=add_layer_norm,
        embed_layer_norm=embed_layer_norm,
        masked_cross_entropy=masked_cross_entropy,
    )


def torch_ops() -> Ops:
    """Return plain PyTorch's operations, which run on every device."""
    return TORCH_OPS._replace(attention=PLANNERS["sdpa"])


def cpu_ops(config: MegaBertConfig, bf16: bool) -> tuple[Ops, str]:
    """Choose the fastest operations for a CPU. Returns them and their description for the log."""
    attention = "over padded rows" if config.padding == "padded" else "by document length"
    if reason := why_not_cpu_fused(config, bf16):
        return torch_ops(), f"attention {attention}, the rest plain PyTorch ({reason})"
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    rotate_too = "rotate, " if config.position == "rope" else ""
    fused = f"{rotate_too}geglu, add_layer_norm, embed_layer_norm, masked_cross_entropy fused by torch.compile"
    description = f"attention {attention}; {fused}; layer_norm, the head's, plain PyTorch"
    return CPU_OPS._replace(attention=PLANNERS["sdpa"]), description


def resolve(
    name: Literal["auto", "torch", "fused"],
    device: torch.device,
    config: MegaBertConfig,
    bf16: bool,
    machine: Machine | None = None,
) -> Ops:
    """Choose the operations for a model on a device.

    auto: the fastest that can run. torch: plain PyTorch. fused: the fused ones; raises ValueError if one cannot run.
    bf16: whether torch_autocast is on. machine: by default what inspect_machine() finds.
    """
    machine = machine or inspect_machine(device)
    if name == "auto" and machine.device_type == "cpu":
        ops, description = cpu_ops(config, bf16)
        log.info("ops: %s", description)
        return ops
    plain, has_rope = torch_ops(), config.position == "rope"
    chosen, reasons = {}, {}
    for operation in Ops._fields:
        why_not = {} if name == "torch" else why_not_fused(operation, device, config, bf16, machine)
        chosen[operation] = next((source for source, reason in why_not.items() if reason is None), "PyTorch")
        reasons[operation] = [reason for reason in why_not.values() if reason]
        if name == "fused" and chosen[operation] == "PyTorch":
            raise ValueError(
                f"run.ops is fused, but {'; '.join(reasons[operation])}. Fix one of these, or use run.ops auto."
            )
    used = {operation: source for operation, source in chosen.items() if operation != "rotate" or has_rope}
    line = _describe(used, reasons, name)
    warnings = [] if name == "torch" else slow_choices(chosen["attention"], bf16, machine)
    log.log(logging.WARNING if warnings and _is_first_rank() else logging.INFO, "%s", ". ".join([line, *warnings]))
    sources = {"PyTorch": plain, "flash-attn": plain._replace(attention=PLANNERS["flash_attention_2"])}
    if "Triton" in chosen.values():
        sources["Triton"] = triton_ops()
    return Ops(**{operation: getattr(sources[source], operation) for operation, source in chosen.items()})


def why_not_fused(
    operation: str, device: torch.device, config: MegaBertConfig, bf16: bool, machine: Machine
) -> dict[str, str | None]:
    """Return each fused implementation of an operation, fastest first, with the reason why it cannot run, or None."""
    flash = {"flash-attn": why_not_flash(device, config, bf16, machine)} if operation == "attention" else {}
    return flash | {"Triton": why_not_triton(operation, config, bf16, machine)}


def why_not_all_fused(
    device: torch.device, config: MegaBertConfig, bf16: bool, machine: Machine | None = None
) -> str | None:
    """Return why an operation of a model on a GPU would be plain PyTorch's with run.ops auto, or None.

    PyTorch's attention reads the documents' lengths on the host. The config's vocabulary does not matter.
    """
    machine = machine or inspect_machine(device)
    for operation in Ops._fields:
        reasons = why_not_fused(operation, device, config, bf16, machine).values()
        if None not in reasons:
            return "; ".join(reason for reason in reasons if reason)
    return None


def slow_choices(attention: str, bf16: bool, machine: Machine) -> list[str]:
    """Return a sentence for each choice that makes training on this GPU several times slower than it could be."""
    found = []
    if machine.device_type == "cuda" and attention == "PyTorch":
        found.append("SLOW: PyTorch's attention makes one call per document length in each layer")
    old = machine.device_type == "cuda" and machine.capability is not None and machine.capability < OLDEST_CAPABILITY
    if bf16 and old:
        found.append("SLOW: this GPU emulates bf16; set torch_autocast.enabled to auto in the ds_config")
    return found


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _describe(chosen: Mapping[str, str], reasons: Mapping[str, list[str]], name: str) -> str:
    """Write one line: the source of each operation, and each reason against a faster one once."""
    by_source: dict[str, list[str]] = {}
    for operation, source in chosen.items():
        by_source.setdefault(source, []).append(operation)
    parts = [f"{', '.join(operations)} from {source}" for source, operations in by_source.items()]
    if len(parts) == 1:
        parts = [f"all from {next(iter(by_source))}"]
    distinct = dict.fromkeys(reason for given in reasons.values() for reason in given)
    return f"ops: {'; '.join(parts)} ({'; '.join(distinct) or f'run.ops {name}'})"


class Implementation(NamedTuple):
    """An optimizer's implementation.

    make: a constructor taking (params, lr=, betas=, eps=, weight_decay=). source: the library it comes from.
    reason: why no faster one was chosen.
    """

    make: Callable[..., torch.optim.Optimizer]
    source: str
    reason: str


def choose_adamw(
    name: Literal["auto", "torch", "fused"],
    device: torch.device,
    offloaded: bool,
    zero_stage: int,
    machine: Machine | None = None,
) -> Implementation:
    """Choose AdamW's implementation for run.ops `name`.

    apex's below ZeRO 3, then DeepSpeed's, if their extension is built; else PyTorch's fused one, which also runs on a
    CPU. offloaded: the optimizer's state is in the CPU's memory. apex counts steps per group, the others per tensor:
    training resumes from a checkpoint only with the implementation that saved it. ZeRO 3 calls step() once for each
    part of a group, and loads a checkpoint of another number of ranks by the count that a tensor has.
    """
    machine = machine or inspect_machine(device)

    def from_torch(params, **settings) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, fused=True, **settings)

    def from_apex(params, **settings) -> torch.optim.Optimizer:
        from apex.optimizers import FusedAdam  # pyrefly: ignore[missing-import] # built by launch/install_gpu.sh

        return FusedAdam(params, adam_w_mode=True, **settings)

    def from_deepspeed(params, **settings) -> torch.optim.Optimizer:
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(params, adam_w_mode=True, **settings)

    if name == "torch":
        return Implementation(from_torch, "PyTorch", "run.ops torch")
    if machine.device_type != "cuda":
        return Implementation(from_torch, "PyTorch", f"the others need a CUDA device, this is {machine.device_type}")
    if offloaded:
        return Implementation(from_torch, "PyTorch", "the others need their state on the GPU, it is offloaded")
    if zero_stage < 3 and not machine.lacks("amp_C"):
        return Implementation(from_apex, "apex", f"run.ops {name}")
    no_apex = "apex counts steps per group, which ZeRO 3 takes in parts" if zero_stage == 3 else "apex is not built"
    remedy = "" if zero_stage == 3 else ": bash launch/install_gpu.sh"
    if not machine.lacks("deepspeed.ops.adam.fused_adam_op"):
        return Implementation(from_deepspeed, "DeepSpeed", f"{no_apex}{remedy}")
    return Implementation(from_torch, "PyTorch", f"DeepSpeed's is not built, and {no_apex}{remedy}")
