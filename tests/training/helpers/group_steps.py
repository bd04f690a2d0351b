"""A stand-in on the CPU for apex's FusedAdam, which counts steps in each group and keeps nothing else but moments."""

import math
from collections.abc import Callable
from typing import Any

import torch

from megabert.kernels.resolve import Implementation


class FusedAdam(torch.optim.Optimizer):
    """AdamW. As apex's, step() counts each call in every group that has a parameter."""

    def __init__(self, params: Any, *, adam_w_mode: bool, **settings: Any):
        assert adam_w_mode
        super().__init__(params, settings | {"bias_correction": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["exp_avg"].lerp_(parameter.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                scale = math.sqrt(1 - second ** group["step"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                divisor = state["exp_avg_sq"].sqrt().div_(scale).add_(group["eps"])
                parameter.addcdiv_(state["exp_avg"], divisor, value=-group["lr"] / (1 - first ** group["step"]))


def install() -> None:
    """Let a run on the CPU train with it as if it were apex's."""
    from megabert.training.updates import optimizers

    def choose(*arguments: Any, **options: Any) -> Implementation:
        return Implementation(lambda params, **more: FusedAdam(params, adam_w_mode=True, **more), "apex", "a test's")

    optimizers.choose_adamw = choose
