"""Comparison of kernels with the specification: the plain operations of model/, in fp64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# The error of a sum of a few hundred terms in fp32, relative to the largest result.
FP32_TOLERANCE = 2e-6


def results(function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Return the function's output, then the gradient of each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def error(got: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    if not wanted.numel():
        return 0.0
    return ((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def assert_as_good(
    kernel: Callable[..., Tensor],
    specification: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    autocast: bool = False,
) -> None:
    """Compare a kernel with the specification in fp64.

    Its error may be at most twice the error of the specification in the inputs' precision.
    autocast: run both under bf16 autocast. The kernel's results must have the types of the specification's.
    """
    context = torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=autocast)
    with context:
        upstream = torch.randn_like(specification(*inputs))
        plain = results(specification, inputs, upstream)
        got = results(kernel, inputs, upstream)
    wanted = results(specification, [x.double() for x in inputs], upstream.double())
    for index, (ours, theirs, exact) in enumerate(zip(got, plain, wanted, strict=True)):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), f"result {index}"
        allowed = 2 * error(theirs, exact) + FP32_TOLERANCE
        assert error(ours, exact) <= allowed, f"result {index}: {error(ours, exact)} above {allowed}"


def assert_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Check in fp64 that the backward kernel is the derivative of the forward kernel."""
    leaves = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
