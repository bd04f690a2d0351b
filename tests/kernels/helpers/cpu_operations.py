"""The operations for a CPU as functions of their differentiable inputs."""

import torch
from torch import Tensor

NORM = {"eps": 1e-12, "low_precision": True}
LABELS = torch.tensor([3, 0, -100, 8, 8, -100, 1])


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def ids(rows: int) -> Tensor:
    return torch.arange(7) * 5 % rows


# Each operation: a function (implementation, dropout) -> function of the floating-point inputs, and one that draws
# them.
CASES = {
    "geglu": (lambda use, p: lambda x: use.geglu(x, p), lambda: [normal(7, 22)]),
    "add_layer_norm": (
        lambda use, p: lambda *x: use.add_layer_norm(*x, dropout_p=p, **NORM)[0],
        lambda: [normal(7, 10), normal(7, 10), normal(10), normal(10)],
    ),
    "embed_layer_norm": (
        lambda use, p: lambda a, b, *x: use.embed_layer_norm([ids(9), ids(2)], [a, b], *x, dropout_p=p, **NORM),
        lambda: [normal(9, 10), normal(2, 10), normal(10), normal(10)],
    ),
    "masked_cross_entropy": (
        lambda use, p: lambda *x: use.masked_cross_entropy(*x, LABELS).loss_sum,
        lambda: [normal(7, 10), normal(9, 10), normal(9)],
    ),
    "z_loss": (
        lambda use, p: lambda *x: use.masked_cross_entropy(*x, LABELS, 0.3).loss_sum,
        lambda: [normal(7, 10), normal(9, 10), normal(9)],
    ),
}


def results(function, inputs: list[Tensor], autocast: bool = False) -> list[Tensor]:
    """Return the output and each input's gradient in fp64. Weights on the output keep gradients from being trivial."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    gradients = torch.autograd.grad(out if out.dim() == 0 else (out * weights).sum(), inputs)
    return [part.double() for part in (out.detach(), *gradients)]
