"""Which implementation of each operation runs: decided once, at start-up, and said aloud. The only place that dispatches.

Fastest first, for each operation: flash-attn (attention only), Triton, PyTorch. What keeps one from running is a sentence
that ends in the log, or in the error when `fused` was asked for.
"""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, NamedTuple

import torch
from packaging.version import Version

from megabert.kernels import HEAD_DIMS, MAX_WIDTH
from megabert.kernels.cpu import cpu_ops
from megabert.model.attention import PLANNERS
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.ops import TORCH_OPS, Ops

log = logging.getLogger(__name__)

FLASH_OLDEST = Version("2.4")  # the first with alibi_slopes
TRITON_OLDEST = Version("3.7")  # tests/kernels prove the kernels with 3.7.1
OLDEST_CAPABILITY = (8, 0)  # Ampere: bf16 tensor cores

# Modules to look for, and the distribution that knows their version. apex is known by its C extension: PyPI's package
# of that name is another project.
MODULES = {
    "flash_attn": "flash-attn",
    "triton": "triton",
    "amp_C": None,
    "deepspeed.ops.adam.fused_adam_op": None,
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is to run on. capability: of a CUDA device; installed: module -> version, "" where it has none."""

    device_type: str
    capability: tuple[int, int] | None = None
    installed: Mapping[str, str]

    def lacks(self, module: str) -> bool:
        return module not in self.installed


def look_at(device: torch.device) -> Machine:
    """See what is there; imports none of it."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    # Only on CUDA is anything of this used, and looking for DeepSpeed's extension imports DeepSpeed.
    modules = [module for module in MODULES if device.type == "cuda" and _found(module)]
    installed = {module: metadata.version(name) if (name := MODULES[module]) else "" for module in modules}
    return Machine(device_type=device.type, capability=capability, installed=installed)


def _found(module: str) -> bool:
    package = module.split(".")[0]
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(module) is not None


def local_devices() -> list[torch.device]:
    """Every CUDA device of this machine, or its CPU."""
    count = torch.cuda.device_count()
    return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a CPU or CUDA device multiplies bf16 natively."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


def why_not_flash(
    device: torch.device, config: MegaBertConfig, bf16: bool, machine: Machine | None = None
) -> str | None:
    """Say what keeps flash-attn from running this model here, or None."""
    machine = machine or look_at(device)
    if machine.device_type != "cuda":
        return f"flash-attn needs a CUDA device, this is {machine.device_type}"
    if machine.lacks("flash_attn"):
        return "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    if (version := Version(machine.installed["flash_attn"])) < FLASH_OLDEST:
        return f"flash-attn {version} is older than {FLASH_OLDEST}, which brought ALiBi"
    if config.padding == "padded":
        return "model.padding padded computes its padding, which flash-attn leaves out"
    if not bf16:
        return "flash-attn computes in bf16, and torch_autocast is off"
    return _too_old("flash-attn", machine)


def why_not_triton(operation: str, config: MegaBertConfig, bf16: bool, machine: Machine) -> str | None:
    """Say what keeps our Triton kernel for an operation from running this model here, or None."""
    if machine.device_type != "cuda":
        return f"Triton needs a CUDA device, this is {machine.device_type}"
    if machine.lacks("triton"):
        return "Triton is not installed (pip install -e '.[kernels]')"
    if (version := Version(machine.installed["triton"])) < TRITON_OLDEST:
        return f"Triton {version} is older than {TRITON_OLDEST} (pip install -e '.[kernels]')"
    if config.hidden_size > MAX_WIDTH and "norm" in operation:
        return f"Triton's LayerNorm takes rows of {MAX_WIDTH}, model.hidden_size is {config.hidden_size}"
    if operation == "attention" and config.head_dim not in HEAD_DIMS:
        return f"Triton's attention takes heads of {', '.join(map(str, HEAD_DIMS))}, these are of {config.head_dim}"
    if operation == "attention" and not bf16:
        return "Triton's attention computes in bf16, and torch_autocast is off"
    return _too_old("Triton", machine)


def _too_old(name: str, machine: Machine) -> str | None:
    if machine.capability is None or machine.capability >= OLDEST_CAPABILITY:
        return None
    needed, got = (".".join(map(str, x)) for x in (OLDEST_CAPABILITY, machine.capability))
    return f"{name} needs compute capability {needed}, this is {got}"


def triton_ops() -> Ops:
    """Our kernels. Imports Triton: only here, and only when one of them was chosen."""
    from megabert.kernels.add_layer_norm import add_layer_norm, layer_norm
    from megabert.kernels.attention import plan_triton
    from megabert.kernels.cross_entropy import masked_cross_entropy
    from megabert.kernels.embed_layer_norm import embed_layer_norm
    from megabert.kernels.geglu import geglu

    return Ops(
        attention=plan_triton,
        layer_norm=layer_norm,
        geglu=geglu,
        add_layer_norm=add_layer_norm,
        embed_layer_norm=embed_layer_norm,
        masked_cross_entropy=masked_cross_entropy,
    )


def torch_ops() -> Ops:
    """Plain PyTorch, anywhere."""
    return TORCH_OPS._replace(attention=PLANNERS["sdpa"])


def resolve(
    name: Literal["auto", "torch", "fused"],
    device: torch.device,
    config: MegaBertConfig,
    bf16: bool,
    machine: Machine | None = None,
) -> Ops:
    """Choose the operations for a model on a device.

    auto: the fastest that can run. torch: plain PyTorch. fused: the fused ones; raises ValueError if one cannot run.
    bf16: whether torch_autocast is on. machine: what is there, if not what look_at finds.
    """
    machine = machine or look_at(device)
    if name == "auto" and machine.device_type == "cpu":
        ops, said = cpu_ops(config, bf16)
        log.info("ops: %s", said)
        return ops
    plain = torch_ops()
    chosen, reasons = {}, {}
    for operation in Ops._fields:
        why_not: dict[str, str | None] = {}
        if name != "torch":
            if operation == "attention":
                why_not["flash-attn"] = why_not_flash(device, config, bf16, machine)
            why_not["Triton"] = why_not_triton(operation, config, bf16, machine)
        chosen[operation] = next((source for source, reason in why_not.items() if reason is None), "PyTorch")
        reasons[operation] = [reason for reason in why_not.values() if reason]
        if name == "fused" and chosen[operation] == "PyTorch":
            raise ValueError(
                f"run.ops is fused, but {'; '.join(reasons[operation])}. Fix one of these, or use run.ops auto."
            )
    log.info("%s", _account(chosen, reasons, name))
    sources = {"PyTorch": plain, "flash-attn": plain._replace(attention=PLANNERS["flash_attention_2"])}
    if "Triton" in chosen.values():
        sources["Triton"] = triton_ops()
    return Ops(**{operation: getattr(sources[source], operation) for operation, source in chosen.items()})


def _account(chosen: Mapping[str, str], reasons: Mapping[str, list[str]], name: str) -> str:
    """One line: which operation comes from where, and why not from somewhere faster."""
    by_source: dict[str, list[str]] = {}
    for operation, source in chosen.items():
        by_source.setdefault(source, []).append(operation)
    parts = [f"{', '.join(operations)} from {source}" for source, operations in by_source.items()]
    if len(parts) == 1:
        parts = [f"all from {next(iter(by_source))}"]
    # A reason counts where something slower was taken because of it; each is said once.
    why = list(dict.fromkeys(reason for given in reasons.values() for reason in given))
    return f"ops: {'; '.join(parts)} ({'; '.join(why) or f'run.ops {name}'})"


class Implementation(NamedTuple):
    """make: a constructor taking (params, lr=, betas=, eps=, weight_decay=); source: whose; reason: why not a faster one."""

    make: Callable[..., torch.optim.Optimizer]
    source: str
    reason: str


def choose_adamw(
    name: Literal["auto", "torch", "fused"], device: torch.device, offloaded: bool, machine: Machine | None = None
) -> Implementation:
    """Choose AdamW's implementation, by run.ops.

    apex's, then DeepSpeed's, where their extension is built; else PyTorch's own fused one, which also runs on a CPU.
    offloaded: the optimizer's state lives in the CPU's memory. apex and DeepSpeed count steps for each group, PyTorch for
    each parameter: a checkpoint goes on only with the implementation that it was saved with.
    """
    machine = machine or look_at(device)

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
    if not machine.lacks("amp_C"):
        return Implementation(from_apex, "apex", f"run.ops {name}")
    if not machine.lacks("deepspeed.ops.adam.fused_adam_op"):
        return Implementation(from_deepspeed, "DeepSpeed", "apex is not built: bash launch/install_gpu.sh")
    return Implementation(
        from_torch,
        "PyTorch",
        "apex is not built: bash launch/install_gpu.sh; "
        "DeepSpeed's is not built: DS_BUILD_FUSED_ADAM=1 pip install deepspeed",
    )
