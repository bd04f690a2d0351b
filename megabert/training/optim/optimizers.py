"""What steps the parameters: AdamW, Muon, LAMB or StableAdamW, and which group each parameter is in."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megabert.config.recipe import OptimizerConfig, Recipe
from megabert.kernels.resolve import Implementation, choose_adamw
from megabert.model.layers import Block

Groups = list[dict[str, Any]]

# They measure the update of each weight matrix; ZeRO hands an optimizer flat pieces of several, and they would be silently wrong.
NEED_WHOLE_TENSORS = ("lamb", "stable_adamw")


def why_not(config: OptimizerConfig, ds_config: dict[str, Any]) -> str | None:
    """Say why an optimizer would not do under this ds_config what it says, or None."""
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if config.name in NEED_WHOLE_TENSORS and stage > 0:
        return (
            f"optimizer.name {config.name} needs whole weight matrices, ZeRO {stage} gives it pieces. Use ds_configs/zero0.json, "
            "or optimizer.name adamw."
        )
    if config.name != "muon":
        return None
    if config.max_grad_norm:
        return (
            f"optimizer.max_grad_norm is {config.max_grad_norm}, but ZeRO clips Muon's updates, whose norm says nothing, not "
            "its gradients. Set optimizer.max_grad_norm 0."
        )
    if stage == 3 and zero.get("reduce_scatter", True):
        return "Muon at ZeRO 3 needs whole gradients. Set zero_optimization.reduce_scatter false in the ds_config."
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        return "Muon with an offloaded optimizer is not supported here. Remove zero_optimization.offload_optimizer."
    return None


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> Groups:
    """Every parameter in exactly one group: with Muon the encoder's matrices; and the rest with and without weight decay."""
    matrices = muon_matrices(model) if config.name == "muon" else set()
    muon, decaying, others = [], [], []
    for parameter in model.parameters():
        if parameter in matrices:
            muon.append(parameter)
        elif config.decay_norms_and_biases or parameter.dim() > 1:
            decaying.append(parameter)
        else:
            others.append(parameter)
    assert len(muon) + len(decaying) + len(others) == len(list(model.parameters())), "each parameter is in one group"
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if muon:
        groups.insert(0, {"params": muon, "weight_decay": config.weight_decay, "use_muon": True})
    return [group for group in groups if group["params"]]


def muon_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The weight matrices of the encoder's layers: not the embeddings, nor the head, whose rows are tokens."""
    return {
        parameter
        for block in model.modules()
        if isinstance(block, Block)
        for parameter in block.parameters()
        if parameter.dim() == 2
    }


def peak_lr(group: dict[str, Any], config: OptimizerConfig) -> float:
    """The learning rate of a group before its schedule."""
    return config.muon_lr if group.get("use_muon") else config.lr


def choose(recipe: Recipe, ds_config: dict[str, Any], device: torch.device) -> Implementation:
    """An optimizer's constructor, as in choose_adamw; whose it is; and why not a faster one. Raises ValueError."""
    if reason := why_not(recipe.optimizer, ds_config):
        raise ValueError(reason)
    if recipe.optimizer.name == "muon":
        return Implementation(make_muon, "DeepSpeed", "with PyTorch's AdamW for all but the encoder's matrices")
    if recipe.optimizer.name == "lamb":
        return Implementation(Lamb, "MegaBERT", "PyTorch has none")
    if recipe.optimizer.name == "stable_adamw":
        return Implementation(StableAdamW, "MegaBERT", "PyTorch has none")
    offloaded = "offload_optimizer" in ds_config.get("zero_optimization", {})
    return choose_adamw(recipe.run.ops, device, offloaded)


def make_muon(
    groups: Groups, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """DeepSpeed's Muon (https://kellerjordan.github.io/posts/muon/): at stage 0 it orthogonalises in step(), above ZeRO does.

    Newton-Schulz in its standard form, in bf16; momentum 0.95 with Nesterov's.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # importing it compiles its kernels

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


class Matrixwise(torch.optim.Optimizer):
    """Adam's two moments, and a step for each tensor that depends on the whole of it."""

    def __init__(self, groups: Groups, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

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
                self.step_one(parameter, parameter.grad, state, group)
        return loss

    def step_one(self, parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError


class Lamb(Matrixwise):
    """LAMB (https://arxiv.org/abs/1904.00962, algorithm 2): Adam's update, decay added, scaled to the norm of its tensor.

    With bias correction. Where weight_decay is 0 (biases, norms), or a norm is, the scale is 1.
    """

    def step_one(self, parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        step = int(state["step"])
        average = state["exp_avg"].lerp_(grad, 1 - first)
        square = state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
        update = (average / (1 - first**step)) / ((square / (1 - second**step)).sqrt_() + group["eps"])
        scale = torch.ones((), device=parameter.device)
        if group["weight_decay"]:
            update.add_(parameter, alpha=group["weight_decay"])
            weight_norm, update_norm = parameter.norm(), update.norm()
            scale = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, scale)
        parameter.sub_(update.mul_(scale * group["lr"]))


class StableAdamW(Matrixwise):
    """AdamW whose step is shortened where the second moment lags behind (https://arxiv.org/abs/2304.13013, algorithm 2).

    RMS is sqrt(mean(g^2 / max(u, eps^2))) of each tensor; lr / max(1, RMS) is used for the update and for the decay.
    """

    def step_one(self, parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        step = int(state["step"])
        # Moments that are right from the first step on, instead of a correction afterwards.
        first, second = (beta * (1 - beta ** (step - 1)) / (1 - beta**step) for beta in group["betas"])
        average = state["exp_avg"].lerp_(grad, 1 - first)
        square = state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
        rms = (grad.square() / square.clamp(min=group["eps"] ** 2)).mean().sqrt_()
        lr = group["lr"] / rms.clamp(min=1)
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.sub_(average / square.sqrt().add_(group["eps"]) * lr)
