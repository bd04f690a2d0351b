"""Optimizers for pretraining: AdamW, Muon and StableAdamW, and their parameter groups."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megabert.config.ds_config import ResolvedDsConfig
from megabert.config.recipe import OptimizerConfig, Recipe
from megabert.kernels.resolve import Implementation, choose_adamw
from megabert.model.layers import Block
from megabert.optim.parameter_groups import Groups, decay_groups
from megabert.training.updates.unsupported_optimizers import why_not_optimizer


def choose_optimizer(recipe: Recipe, ds_config: ResolvedDsConfig, device: torch.device) -> Implementation:
    """Choose the optimizer's implementation. Raises ValueError if it would train wrongly under this ds_config."""
    if reason := why_not_optimizer(recipe.optimizer, ds_config):
        raise ValueError(reason)
    if recipe.optimizer.name == "muon":
        return Implementation(make_muon, "DeepSpeed", "with PyTorch's AdamW for all but the encoder's matrices")
    if recipe.optimizer.name == "stable_adamw":
        return Implementation(StableAdamW, "MegaBERT", "PyTorch has none")
    return choose_adamw(recipe.run.ops, device, ds_config.offloads_optimizer)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> Groups:
    """Put every parameter in exactly one group: Muon's matrices, and the rest with and without weight decay."""
    matrices = muon_matrices(model) if config.name == "muon" else set()
    rest = [parameter for parameter in model.parameters() if parameter not in matrices]
    groups = decay_groups(rest, config.weight_decay, config.decay_norms_and_biases)
    if matrices:
        muon = [parameter for parameter in model.parameters() if parameter in matrices]
        groups.insert(0, {"params": muon, "weight_decay": config.weight_decay, "use_muon": True})
    return groups


def muon_matrices(model: nn.Module) -> set[nn.Parameter]:
    """Return the weight matrices of the encoder's layers; in embeddings and head, rows are tokens."""
    return {
        parameter
        for block in model.modules()
        if isinstance(block, Block)
        for parameter in block.parameters()
        if parameter.dim() == 2
    }


def peak_lr(group: dict[str, Any], config: OptimizerConfig) -> float:
    """Return the peak learning rate of a parameter group."""
    return config.muon_lr if group.get("use_muon") else config.lr


def make_muon(
    groups: Groups, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Make DeepSpeed's Muon (https://kellerjordan.github.io/posts/muon/).

    At stage 0 step() orthogonalizes the updates; above, ZeRO does. Newton-Schulz runs in its standard form, in bf16.
    Momentum 0.95, with Nesterov.
    """
    # Imported here because the import compiles kernels.
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    muon: Groups = []
    for group in groups:
        if group.get("use_muon"):
            muon.append(group | {"momentum": 0.95, "ns_method": "standard"})
        else:
            muon.append(
                {"weight_decay": weight_decay} | group | {"use_muon": False, "lr": lr, "betas": betas, "eps": eps}
            )
        for parameter in group["params"]:
            parameter.use_muon = muon[-1]["use_muon"]
    return MuonWithAuxAdam(muon, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})


class Partition(NamedTuple):
    """A rank's share of some parameters, which a flat tensor holds.

    parts: where each parameter's part is, an empty slice if other ranks have all of it; the same parameters in the same
    order on every rank. numels: elements of the whole parameters.
    """

    parts: list[slice]
    numels: list[int]


class StableAdamW(torch.optim.Optimizer):
    """AdamW with update clipping (https://arxiv.org/abs/2304.13013, algorithm 2).

    RMS is sqrt(mean(g^2 / max(u, eps^2))) of each tensor; lr / max(1, RMS) scales both the update and the decay.

    pytorch_optimizer 4.1 and torch-optimi 0.3.3 take the same steps to rounding. Both compute the RMS of whole tensors
    only, so that neither could be used with ZeRO's partitions.

    partitions: of tensors that ZeRO has put in the place of the parameters, which parts of which parameters they hold.
    The sums over a parameter are then added over all ranks, which must call step() together.
    """

    def __init__(self, groups: Groups, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.partitions: dict[Tensor, Partition] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                partition = self.partitions[parameter] if self.partitions else None
                _stable_adamw_step(parameter, parameter.grad, state, group, partition)
        return loss


def _stable_adamw_step(
    parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], partition: Partition | None
) -> None:
    """Update one parameter, or a rank's partition of several, and their moments in place."""
    step = int(state["step"])
    # Betas that make the moments unbiased at every step, so that no bias correction follows.
    first, second = (beta * (1 - beta ** (step - 1)) / (1 - beta**step) for beta in group["betas"])
    average = state["exp_avg"].lerp_(grad, 1 - first)
    square = state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
    parts, numels = ([...], [parameter.numel()]) if partition is None else partition
    # Part by part, so that nothing as large as a whole partition is allocated.
    ratios = (grad[part].square() / square[part].clamp(min=group["eps"] ** 2) for part in parts)
    means = torch.stack([ratio.sum() / numel for ratio, numel in zip(ratios, numels, strict=True)])
    if partition is not None:
        torch.distributed.all_reduce(means)
    lrs = group["lr"] / means.sqrt_().clamp_(min=1)
    for part, lr in zip(parts, lrs, strict=True):
        weights = parameter[part]
        weights.mul_(1 - lr * group["weight_decay"])
        weights.sub_(average[part] / square[part].sqrt().add_(group["eps"]) * lr)
