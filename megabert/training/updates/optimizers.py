"""Build the optimizers for pretraining, AdamW, Muon and StableAdamW, and their parameter groups."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megabert.config.ds_config import ResolvedDsConfig
from megabert.config.recipe import OptimizerConfig, Recipe
from megabert.kernels.resolve import Implementation, choose_adamw
from megabert.optim.parameter_groups import Groups, decay_groups
from megabert.training.updates.muon import Muon
from megabert.training.updates.unsupported_optimizers import why_not_optimizer


def choose_optimizer(recipe: Recipe, ds_config: ResolvedDsConfig, device: torch.device) -> Implementation:
    """Choose the optimizer's implementation. Raises ValueError if it would train wrongly under this ds_config."""
    if reason := why_not_optimizer(recipe.optimizer, ds_config):
        raise ValueError(reason)
    if recipe.optimizer.name == "muon" and ds_config.zero_stage == 0:
        return Implementation(Muon, "MegaBERT", "DeepSpeed's orthogonalizes one matrix after another")
    if recipe.optimizer.name == "muon":
        return Implementation(make_muon, "DeepSpeed", "with PyTorch's AdamW for all but the matrices of linear maps")
    if recipe.optimizer.name == "stable_adamw":
        return Implementation(StableAdamW, "MegaBERT", "PyTorch has none")
    return choose_adamw(recipe.run.ops, device, ds_config.offloads_optimizer, ds_config.zero_stage)


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
    """Return the matrices of the linear maps: in layers, between neighbors and before the decoder.

    AdamW trains the embeddings, one of which is the decoder's: their rows are tokens. If it trains the map before the
    decoder, too, a small model learns more slowly.
    """
    maps = (module for module in model.modules() if isinstance(module, nn.Linear))
    return {parameter for map_ in maps for parameter in map_.parameters() if parameter.dim() == 2}


def peak_lr(group: dict[str, Any], config: OptimizerConfig) -> float:
    """Return the peak learning rate of a parameter group."""
    return config.muon_lr if group.get("use_muon") else config.lr


def make_muon(
    groups: Groups, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Make DeepSpeed's Muon, for which ZeRO orthogonalizes the updates.

    Newton-Schulz runs in its standard form, in bf16. Momentum 0.95, with Nesterov.
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

    partitions: for each tensor that ZeRO has put in the place of parameters, the parts of parameters that it holds.
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
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
            if self.partitions:
                for flat in parameters:
                    _stable_adamw_step([flat], self.state, group, self.partitions[flat])
            elif parameters:
                _stable_adamw_step(parameters, self.state, group, None)
        return loss


def _stable_adamw_step(
    parameters: list[Tensor], states: dict[Tensor, Any], group: dict[str, Any], partition: Partition | None
) -> None:
    """Update some parameters, or a rank's partition of several, and their moments in place.

    Most operations are done for all tensors at once, so that a GPU gets a few kernels instead of some for each tensor.
    """
    weights, grads = parameters, [parameter.grad for parameter in parameters if parameter.grad is not None]
    averages, squares = ([states[parameter][name] for parameter in parameters] for name in ("exp_avg", "exp_avg_sq"))
    steps = list(map(int, [states[parameter]["step"] for parameter in parameters]))
    # Betas that make the moments unbiased at every step, so that no bias correction follows.
    first, second = ([beta * (1 - beta ** (n - 1)) / (1 - beta**n) for n in steps] for beta in group["betas"])
    torch._foreach_lerp_(averages, grads, [1 - beta for beta in first])
    torch._foreach_mul_(squares, second)
    torch._foreach_addcmul_(squares, grads, grads, [1 - beta for beta in second])
    held, numels = slice(None), [weight.numel() for weight in weights]
    if partition is not None:
        numels = partition.numels
        own = [number for number, part in enumerate(partition.parts) if part.start < part.stop]
        # They follow each other. A partition that is nothing but padding has none.
        held = slice(own[0], own[-1] + 1) if own else slice(0)
        weights, grads, averages, squares = (
            [flat[part] for part in partition.parts[held]] for (flat,) in (weights, grads, averages, squares)
        )
    means = parameters[0].new_zeros(len(numels))
    if weights:
        ratios = torch._foreach_mul(grads, grads)
        torch._foreach_div_(ratios, torch._foreach_clamp_min(squares, group["eps"] ** 2))
        sums = [ratio.sum() for ratio in ratios]
        torch._foreach_div_(sums, numels[held])
        means[held] = torch.stack(sums)
        del ratios
    if partition is not None:
        torch.distributed.all_reduce(means)
    if weights:
        _descend(weights, averages, squares, group, group["lr"] / means[held].sqrt().clamp_(min=1))


def _descend(
    weights: list[Tensor], averages: list[Tensor], squares: list[Tensor], group: dict[str, Any], lrs: Tensor
) -> None:
    """Change the weights in place. lrs: each one's learning rate."""
    updates = torch._foreach_sqrt(squares)
    torch._foreach_add_(updates, group["eps"])
    updates = torch._foreach_div(averages, updates)
    # torch has no operation that multiplies many tensors by a number each which is on the device.
    for weight, update, lr, decay in zip(weights, updates, lrs, 1 - lrs * group["weight_decay"], strict=True):
        weight.mul_(decay)
        update.mul_(lr)
    torch._foreach_sub_(weights, updates)
