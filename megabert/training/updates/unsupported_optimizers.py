"""Explain why an optimizer would train wrongly under a ds_config; imports no torch."""

from megabert.config.ds_config import ResolvedDsConfig
from megabert.config.recipe import OptimizerConfig


def why_not_optimizer(config: OptimizerConfig, ds_config: ResolvedDsConfig) -> str | None:
    """Return why this optimizer would train wrongly under this ds_config, or None."""
    stage = ds_config.zero_stage
    if config.name == "stable_adamw" and ds_config.offloads_optimizer:
        return (
            "optimizer.name stable_adamw adds sums over the ranks, which an offloaded optimizer cannot. Remove "
            "zero_optimization.offload_optimizer, or use optimizer.name adamw."
        )
    if config.name != "muon":
        return None
    if config.max_grad_norm and stage > 0:
        return (
            f"optimizer.max_grad_norm is {config.max_grad_norm}, but with Muon ZeRO clips the orthogonalized updates "
            "instead of the gradients. Set optimizer.max_grad_norm 0, or use ZeRO 0."
        )
    if stage == 3 and ds_config.reduce_scatter:
        return "Muon at ZeRO 3 needs whole gradients. Set zero_optimization.reduce_scatter false in the ds_config."
    if ds_config.offloads_optimizer:
        return "Muon with an offloaded optimizer is not supported. Remove zero_optimization.offload_optimizer."
    return None
