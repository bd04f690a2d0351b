"""The timing of kernels: what a measured pass does, on the CPU."""

import torch

from tests.benchmarks.bench_kernels import WORK, Contender, contenders, passes, time_s
from tests.benchmarks.bench_train import peak_of


def test_every_operation_runs_with_small_inputs():
    found = contenders(torch.device("cpu"), tokens=512)
    assert found.keys() == WORK.keys()
    for name in ("geglu", "attention_512"):
        assert time_s(found[name]["eager"], repeats=1, sets=1) > 0


def test_a_pass_takes_the_inputs_in_turn_and_keeps_no_gradient():
    seen, given = [], []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(x.data_ptr())
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[override]
            given.append(gradient)
            return 2 * gradient

    contender = Contender(Double.apply, [torch.randn(8).requires_grad_()])
    work = passes(contender, sets=3)
    for _ in range(2):
        seen.clear()
        given.clear()
        work()
        assert len(set(seen)) == 3
        assert all(gradient.is_contiguous() and gradient.unique().numel() > 1 for gradient in given)
    assert contender.leaves[0].grad is None


def test_a_peak_that_varies_is_said():
    assert peak_of([90.0, 100.0, 91.0]) == (100.0, None)
    peak, warning = peak_of([80.0, 100.0])
    assert peak == 100.0
    assert warning.startswith("the rate of the matrix products varied by 20% between rounds")
