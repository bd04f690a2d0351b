"""Muon for whole weight matrices: those of one shape are orthogonalized together."""

from collections.abc import Callable

import torch
from torch import Tensor

from megabert.kernels.devices import has_fast_bf16
from megabert.optim.parameter_groups import Groups

MOMENTUM = 0.95
ITERATIONS = 5
# Of the quintic polynomial that pushes singular values between 0 and 1 to about 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) for groups with use_muon, and PyTorch's AdamW for the others.

    A matrix's update is the momentum of its gradients, with Nesterov, orthogonalized by Newton-Schulz and multiplied by
    sqrt(max(1, rows / columns)). DeepSpeed's MuonWithAuxAdam takes the same steps to rounding, one matrix after
    another. In small models most of its time goes into calling the operations, of which this class needs fewer.

    For ZeRO 0 only: above, ZeRO holds slices of flattened matrices.
    """

    def __init__(self, groups: Groups, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "use_muon": False}
        super().__init__(groups, defaults)
        self.adamw = torch.optim.AdamW(self._groups_of_adamw(), fused=True)

    def _groups_of_adamw(self) -> Groups:
        return [group for group in self.param_groups if not group["use_muon"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        # Loading a checkpoint replaces both.
        self.adamw.param_groups, self.adamw.state = self._groups_of_adamw(), self.state
        # It calls the closure, which computes the gradients of all groups.
        loss = self.adamw.step(closure)
        for group in self.param_groups:
            if group["use_muon"]:
                for matrices in _by_shape(group["params"]):
                    self._update(matrices, group["lr"], group["weight_decay"])
        return loss

    def _update(self, matrices: list[Tensor], lr: float, weight_decay: float) -> None:
        """Update matrices of one shape, and their momentum, in place."""
        momentum = []
        for matrix in matrices:
            state = self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            momentum.append(state["momentum_buffer"])
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        torch._foreach_lerp_(momentum, gradients, 1 - MOMENTUM)
        directions = torch.stack(torch._foreach_lerp(gradients, momentum, MOMENTUM))
        dtype = torch.bfloat16 if has_fast_bf16(directions.device) else torch.float32
        updates = orthogonalize(directions, dtype)
        rows, columns = updates.shape[1:]
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        torch._foreach_add_(matrices, list(updates), alpha=-lr * max(1, rows / columns) ** 0.5)


def _by_shape(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Group the matrices that have a gradient by shape."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(parameter.shape, []).append(parameter)
    return list(groups.values())


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of each matrix near 1 (0.5 to 1.5), by five steps of Newton-Schulz.

    matrices: (n, rows, columns). dtype: of the products. Returns a tensor of the shape and dtype of matrices.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype).contiguous()
    for _ in range(ITERATIONS):
        squares = x @ x.mT
        polynomial = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
