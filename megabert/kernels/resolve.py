"""Which implementation of each operation runs: decided once, at start-up, and said aloud. The only place that dispatches."""

import importlib.util
import logging
from typing import Literal

import torch

from megabert.kernels.cpu import cpu_ops
from megabert.model.attention import PLANNERS
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.ops import TORCH_OPS, Ops

log = logging.getLogger(__name__)


def why_not_flash(device: torch.device, config: MegaBertConfig, bf16: bool) -> str | None:
    """Say what keeps flash-attn from running this model here, or None."""
    if device.type != "cuda":
        return f"flash-attn needs a CUDA device, this is {device.type}"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    if config.padding == "padded":
        return "model.padding padded computes its padding, which flash-attn leaves out"
    if not bf16:
        return "flash-attn computes in bf16, and torch_autocast is off"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"flash-attn needs compute capability 8.0, this is {torch.cuda.get_device_capability(device)}"
    return None


def resolve(name: Literal["auto", "torch", "fused"], device: torch.device, config: MegaBertConfig, bf16: bool) -> Ops:
    """Choose the operations for a model on a device.

    auto: the fastest that can run. torch: plain PyTorch. fused: the fused ones; raises ValueError if they cannot run.
    """
    if name == "auto" and device.type == "cpu":
        ops, said = cpu_ops(config, bf16)
        log.info("ops: %s", said)
        return ops
    missing = None if name == "torch" else why_not_flash(device, config, bf16)
    if name == "fused" and missing:
        raise ValueError(f"run.ops is fused, but {missing}. Fix that, or use run.ops auto.")
    attention = "sdpa" if name == "torch" or missing else "flash_attention_2"
    log.info("ops: attention %s, the rest plain PyTorch (%s)", attention, missing or f"run.ops {name}")
    return TORCH_OPS._replace(attention=PLANNERS[attention])
