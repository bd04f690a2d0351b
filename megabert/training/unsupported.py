"""Explain why FP8, CUDA graphs, torch.compile or a tracker cannot be used; imports no torch."""

import importlib.util
from collections.abc import Callable, Sequence

from megabert.config.ds_config import ResolvedDsConfig
from megabert.config.recipe import Recipe

# FP8 tensor cores take rows whose length is a multiple of this.
FP8_MULTIPLE = 16


def check_compile_and_fp8(recipe: Recipe, ds_config: ResolvedDsConfig, device_type: str, has_fp8: bool) -> None:
    """Raise ValueError if run.compile or run.fp8 is set and cannot be used."""
    if recipe.run.compile and (reason := why_not_compile(device_type, ds_config.zero_stage)):
        raise ValueError(reason)
    if recipe.run.fp8 != "none" and (reason := why_not_fp8(recipe, ds_config, has_fp8)):
        raise ValueError(refusal_of_fp8(reason))


def choose_cuda_graphs(
    recipe: Recipe, ds_config: ResolvedDsConfig, device_type: str, why_not_captured: Callable[[], str | None]
) -> str | None:
    """Return why micro-batches are not launched as CUDA graphs, or None.

    why_not_captured: called last; returns why this device's operations cannot be captured, or None. Raises ValueError
    if run.cuda_graphs is true and graphs cannot be used.
    """
    if recipe.run.cuda_graphs is False:
        return "run.cuda_graphs is false"
    reason = why_not_cuda_graphs(recipe, ds_config, device_type) or why_not_captured()
    if reason and recipe.run.cuda_graphs is True:
        raise ValueError(refusal_of_graphs(reason))
    return reason


def why_not_compile(device_type: str, zero_stage: int) -> str | None:
    """Return why torch.compile cannot be applied to the whole model, or None. Not run on a GPU yet."""
    if device_type == "cpu":
        return (
            "run.compile true on a CPU: run.ops auto already compiles each operation there, and attention, which "
            "depends on the documents' lengths, would be compiled again at every step. Set run.compile false."
        )
    if zero_stage == 3:
        return (
            "run.compile true at ZeRO 3: fetching weights breaks the graph in every layer. Use ds_configs/zero2.json, "
            "or set run.compile false."
        )
    return None


def why_not_fp8(recipe: Recipe, ds_config: ResolvedDsConfig, has_fp8: bool) -> str | None:
    """Return why the layers cannot multiply in FP8, or None. has_fp8: whether the device can. Not run on a GPU yet."""
    model = recipe.model
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed (pip install 'megabert[fp8]')"
    if not has_fp8:
        return "this GPU has no FP8 (Hopper, Ada, MI300 and later ones have)"
    if not ds_config.bf16:
        return "the rest is computed in fp32, not in bf16 (torch_autocast.enabled in the ds_config)"
    if ds_config.zero_stage > 1:
        return f"ZeRO {ds_config.zero_stage} has not been tried with it (ds_configs/zero1.json)"
    if model.hidden_size % FP8_MULTIPLE or model.intermediate_size % FP8_MULTIPLE:
        return f"model.hidden_size or model.intermediate_size is no multiple of {FP8_MULTIPLE}"
    return None


def refusal_of_fp8(reason: str) -> str:
    """Return the message for run.fp8 torchao where it cannot be. reason: from why_not_fp8."""
    return f"run.fp8 is torchao, but {reason}. Change that, or set run.fp8 to none."


def why_not_cuda_graphs(recipe: Recipe, ds_config: ResolvedDsConfig, device_type: str) -> str | None:
    """Return why a micro-batch cannot be launched as one CUDA graph, or None. Not run on a GPU yet.

    The kernels may object too: training/plan.py, why_not_captured.
    """
    values = ds_config.values
    if device_type != "cuda":
        return f"this device is a {device_type}, and only CUDA devices have graphs"
    if ds_config.zero_stage == 2:
        return "ZeRO 2 reduces gradients within every backward pass (ds_configs/zero1.json does so once a step)"
    if ds_config.zero_stage == 3:
        return "ZeRO 3 fetches weights in every layer (ds_configs/zero1.json keeps them)"
    if ds_config.offloads_optimizer:
        return "the ds_config offloads the optimizer"
    if values.bf16.enabled or values.data_types.grad_accum_dtype not in (None, "fp32"):
        return "gradients can be accumulated in fp32 only, and the ds_config sets bf16.enabled or data_types"
    if values.wall_clock_breakdown or values.flops_profiler.enabled:
        return "wall_clock_breakdown or flops_profiler of the ds_config would not see the work"
    if recipe.run.ops == "torch":
        return "run.ops is torch, and plain PyTorch's operations cannot be captured"
    if recipe.run.compile:
        return "run.compile is true"
    if recipe.model.padding == "padded":
        return "with model.padding padded a bin has as many rows as documents, and a graph has fixed shapes"
    return None


def refusal_of_graphs(reason: str) -> str:
    """Return the message for run.cuda_graphs true where it cannot be. reason: from why_not_cuda_graphs."""
    return f"run.cuda_graphs is true, but {reason}. Change that, or set run.cuda_graphs to auto."


def why_no_trackers(names: Sequence[str]) -> str | None:
    """Return what these trackers lack, with a remedy; None if they can be opened."""
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        return "run.trackers contains wandb, which is not installed. Run pip install wandb, or leave it out."
    return None
