"""Read the dropout masks that an operation draws, test their statistics, and measure the noise that they make."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NORM = {"eps": 1e-12, "low_precision": True}


def kept_by_geglu(ops: Any, rows: int, columns: int, p: float) -> Tensor:
    """Return which elements are kept, (rows, columns) bool: a dropped one is 0 in the output."""
    return ops.geglu(torch.ones(rows, 2 * columns), p) != 0


def kept_by_add_layer_norm(ops: Any, rows: int, columns: int, p: float) -> Tensor:
    """A dropped element of x gets no gradient."""
    x = torch.randn(rows, columns, requires_grad=True)
    weight, bias = torch.ones(columns), torch.zeros(columns)
    out, _ = ops.add_layer_norm(x, torch.randn(rows, columns), weight, bias, dropout_p=p, **NORM)
    (out * torch.randn(rows, columns)).sum().backward()
    assert x.grad is not None
    return x.grad != 0


def kept_by_embed_layer_norm(ops: Any, rows: int, columns: int, p: float) -> Tensor:
    ids, tables = torch.arange(rows) % 7, [torch.randn(7, columns), torch.randn(2, columns)]
    # Far from 0.
    weight, bias = torch.ones(columns), torch.ones(columns) * 20
    return ops.embed_layer_norm([ids, ids % 2], tables, weight, bias, dropout_p=p, **NORM) != 0


MASKS: dict[str, Callable[[Any, int, int, float], Tensor]] = {
    "geglu": kept_by_geglu,
    "add_layer_norm": kept_by_add_layer_norm,
    "embed_layer_norm": kept_by_embed_layer_norm,
}


def assert_independent(masks: Tensor, p: float) -> None:
    """Test masks of several layers or steps: the rate of drops, and that no two of them drop together too often.

    masks: (N, rows, columns) bool, true where kept. Every statistic is within five standard deviations.
    """
    drops = (~masks).double()
    rows = drops.shape[1]

    def check(values: Tensor, expected: float, variance: float, what: str) -> None:
        """Compare a mean of independent values with what is expected of it."""
        deviation = (variance / values.numel()) ** 0.5
        assert abs(values.mean().item() - expected) < 5 * deviation, what

    check(drops, p, p * (1 - p), "rate")
    centred = (drops - p) / (p * (1 - p)) ** 0.5
    pairs = {
        "tokens": centred[:, 1:] * centred[:, :-1],
        "distant tokens": centred[:, rows // 2 :] * centred[:, : rows - rows // 2],
        "features": centred[:, :, 1:] * centred[:, :, :-1],
        "eighth features": centred[:, :, 8:] * centred[:, :, :-8],
        "tokens and features": centred[:, 1:, 1:] * centred[:, :-1, :-1],
        "the end of a token and the beginning of the next": centred[:, 1:, 0] * centred[:, :-1, -1],
        "layers or steps": centred[1:] * centred[:-1],
        "every second layer or step": centred[2:] * centred[:-2],
    }
    for what, products in pairs.items():
        check(products, 0.0, 1.0, what)
    # Over the masks, a token, a feature and an element drop as often as chance has it: the sums' variances are right.
    for what, dims in {"a token": (0, 2), "a feature": (0, 1), "an element": (0,)}.items():
        sums = centred.sum(dim=dims).flatten()
        # Of a binomial, plus 2.
        kurtosis = 2 + 1 / (p * (1 - p) * (centred.numel() / sums.numel()))
        ratio = sums.square() / (centred.numel() / sums.numel())
        check(ratio, 1.0, kurtosis, f"the drops of {what}")


def noise_of_rows(name: str, ops: Any, rows: int, columns: int, p: float) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the gradient over equal rows, which differ in their masks only: each (columns,)."""
    generator = torch.Generator().manual_seed(1)
    width = 2 * columns if name == "geglu" else columns
    row, residual = torch.randn(width, generator=generator), torch.randn(columns, generator=generator)
    weight, bias, target = (torch.randn(columns, generator=generator) for _ in range(3))
    x = row.expand(rows, -1).clone().requires_grad_()
    if name == "geglu":
        out = ops.geglu(x, p)
    elif name == "add_layer_norm":
        out, _ = ops.add_layer_norm(x, residual.expand(rows, -1).clone(), weight, bias, dropout_p=p, **NORM)
    else:
        ids, other = torch.arange(rows), residual[None]
        out = ops.embed_layer_norm([ids, ids * 0], [x, other], weight, bias, dropout_p=p, **NORM)
    (out * target).sum().backward()
    assert x.grad is not None
    return x.grad.double().mean(dim=0), x.grad.double().var(dim=0)


def gradient_noise(model: torch.nn.Module, inputs: dict[str, Any], steps: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance, over the masks, of every gradient of one step: each (parameters,)."""
    gradients = []
    for _ in range(steps):
        model.zero_grad()
        model(**inputs).loss.backward()
        parts = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        gradients.append(torch.cat(parts).double())
    stacked = torch.stack(gradients)
    return stacked.mean(dim=0), stacked.var(dim=0)


def assert_same_noise(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], steps: int, tolerance: float) -> None:
    """Compare two gradient_noise(): total variances within the tolerance, and means as close as their noise allows."""
    (mean, variance), (other_mean, other_variance) = one, other
    assert variance.sum() > 0, "dropout is on"
    ratio = (variance.sum() / other_variance.sum()).item()
    assert 1 - tolerance < ratio < 1 + tolerance, f"the variance is {ratio:.3f} times the other"
    distance = (mean - other_mean).square().sum()
    expected = (variance.sum() + other_variance.sum()) / steps
    # The squared distance of two means is their variance on average; here it is dominated by few directions.
    assert distance < 4 * expected, f"the means differ by {(distance / expected).item():.2f} times what noise makes"
