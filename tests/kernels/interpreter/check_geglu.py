"""geglu in Triton's interpreter: results, gradients, dropout, bytes moved."""

import pytest
import torch

from megabert.kernels import geglu as kernels
from megabert.model import ops
from tests.helpers.cases import cases
from tests.kernels.helpers import interpreter
from tests.kernels.helpers.interpreter import counted
from tests.kernels.helpers.yardstick import assert_as_good, assert_gradients

interpreter.install()

# (T, F), narrower and wider than a block.
SHAPES = [(1, 1), (3, 20), (5, 8), (2, 1500)]


@pytest.mark.parametrize(("tokens", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_specification(tokens, width, dtype):
    x = 2 * torch.randn(tokens, 2 * width, dtype=dtype)
    assert_as_good(lambda x: kernels.geglu(x, 0.0), lambda x: ops.geglu(x, 0.0), [x])


def test_is_the_specification_in_fp64():
    x = torch.randn(3, 40, dtype=torch.float64)
    assert (kernels.geglu(x, 0.0) - ops.geglu(x, 0.0)).abs().max() < 1e-14


@pytest.mark.parametrize("dropout_p", cases(per_push=[[0.3]], nightly=[[0.0], [0.3]]))
def test_gradients(dropout_p):
    def geglu(x):
        # The same mask at every point.
        torch.manual_seed(0)
        return kernels.geglu(x, dropout_p)

    assert_gradients(geglu, [torch.randn(3, 40)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_and_scales_both_ways(dtype):
    x = torch.randn(6, 2 * 200, dtype=dtype)
    torch.manual_seed(5)
    mask = kernels.geglu(x, 0.25) != 0
    assert 0.6 < mask.double().mean() < 0.9

    def dropped(x):
        torch.manual_seed(5)
        return kernels.geglu(x, 0.25)

    assert_as_good(dropped, lambda x: ops.geglu(x, 0.0) * mask / 0.75, [x])


def test_no_tokens():
    x = torch.randn(0, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(kernels.geglu(x, 0.1).sum(), x)
    assert gradient.shape == (0, 16)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moves_the_bytes_of_its_formula(dropout_p, dtype):
    tokens, width, size = 4, 1536, dtype.itemsize
    x = torch.randn(tokens, 2 * width, dtype=dtype, requires_grad=True)
    seeds = 8 * tokens * 2 if dropout_p else 0
    with counted() as forward:
        y = kernels.geglu(x, dropout_p)
    assert (forward.loaded, forward.stored) == (tokens * 2 * width * size + seeds, tokens * width * size)
    with counted() as backward:
        y.backward(torch.ones_like(y))
    assert (backward.loaded, backward.stored) == (tokens * 3 * width * size + seeds, tokens * 2 * width * size)


def test_saves_only_its_input():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        x = torch.randn(4, 32, requires_grad=True)
        kernels.geglu(x, 0.1)
    assert sorted(x.numel() for x in saved) == [1, x.numel()]


def test_torch_compile_sees_one_operation():
    """There is no graph break, and the operation's fake results have the right shapes and types."""
    x = torch.randn(4, 32)
    assert torch.library.opcheck(kernels.forward, (x, None, 0.0), test_utils=("test_schema", "test_faketensor"))
    arguments = (x, x[:, :16].contiguous(), None, 0.0)
    assert torch.library.opcheck(kernels.backward, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda x: kernels.geglu(2 * x, 0.0), fullgraph=True, backend="aot_eager")
    assert_as_good(compiled, lambda x: ops.geglu(2 * x, 0.0), [x])
