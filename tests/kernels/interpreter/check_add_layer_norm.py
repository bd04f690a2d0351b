"""add_layer_norm and layer_norm in Triton's interpreter: results, gradients, dropout, bytes moved."""

from itertools import product

import pytest
import torch

from megabert.kernels import add_layer_norm as kernels
from megabert.kernels import row_statistics
from megabert.model import ops
from tests.helpers.cases import cases
from tests.kernels.helpers import interpreter
from tests.kernels.helpers.interpreter import counted
from tests.kernels.helpers.yardstick import assert_as_good, assert_gradients

interpreter.install()

EPS = 1e-12
BF16, FP32 = torch.bfloat16, torch.float32


def inputs(tokens, width, x_dtype=FP32, residual_dtype=FP32):
    x, residual = torch.randn(tokens, width).to(x_dtype), torch.randn(tokens, width).to(residual_dtype)
    return [x, residual, 1 + torch.randn(width) / 4, torch.randn(width)]


def call(module, dropout_p=0.0, low_precision=True, uses=1):
    """uses: 1 takes the first result alone, 2 both, whose gradients then differ."""

    def function(x, residual, weight, bias):
        if dropout_p:
            torch.manual_seed(5)
        options = {"eps": EPS, "dropout_p": dropout_p, "low_precision": low_precision}
        found = module.add_layer_norm(x, residual, weight, bias, **options)
        return found[0] if uses == 1 else torch.stack(found)

    return function


def set_programs(monkeypatch, most):
    """Set the most programs of a backward pass."""
    monkeypatch.setattr(kernels, "num_programs", lambda rows, width, device: min(rows, most))


@pytest.mark.parametrize(
    ("tokens", "width", "programs", "uses"),
    cases(
        per_push=[(1, 1, 256, 2), (7, 20, 256, 1), (11, 8, 4, 2)],
        nightly=[(*shape, 256, uses) for shape in [(1, 1), (1, 16), (7, 20), (3, 768), (300, 8)] for uses in (1, 2)],
    ),
)
def test_equals_the_specification(monkeypatch, tokens, width, programs, uses):
    """programs: of the backward pass; where there are more tokens, each program sums over several."""
    set_programs(monkeypatch, programs)
    assert_as_good(call(kernels, uses=uses), call(ops, uses=uses), inputs(tokens, width))


def test_programs_fill_a_card_at_once(monkeypatch):
    """An H100 and an A100; rows that one program of 16 warps sums; fewer rows than programs; the interpreter."""
    for count, rows, width, programs in ((132, 14_720, 768, 660), (108, 14_720, 768, 540), (132, 999, 8192, 132)):
        monkeypatch.setattr(row_statistics, "multiprocessors", lambda device, count=count: count)
        assert row_statistics.num_programs(rows, width, torch.device("cuda")) == programs
        assert row_statistics.num_programs(7, width, torch.device("cuda")) == 7
    monkeypatch.undo()
    assert row_statistics.num_programs(99, 768, torch.device("cpu")) == 5


@pytest.mark.parametrize("low_precision", [True, False])
@pytest.mark.parametrize("residual_dtype", [BF16, FP32])
def test_equals_it_under_autocast(low_precision, residual_dtype):
    """The low-precision stream, the fp32 stream, and the first layer's mixture of both."""
    arguments = inputs(9, 96, BF16, residual_dtype)
    ours, theirs = (call(module, 0.0, low_precision, uses=2) for module in (kernels, ops))
    assert_as_good(ours, theirs, arguments, autocast=True)


def test_equals_it_in_pure_bf16():
    arguments = [x.bfloat16() for x in inputs(9, 96)]
    assert_as_good(call(kernels), call(ops), arguments)


@pytest.mark.parametrize(
    ("low_precision", "autocast", "dtype"),
    cases(
        per_push=[(True, True, BF16), (False, True, BF16), (True, True, FP32), (False, False, BF16)],
        nightly=product([True, False], [True, False], [BF16, FP32]),
    ),
)
def test_layer_norm_alone_equals_the_specification(low_precision, autocast, dtype):
    x, _, weight, bias = inputs(6, 40, dtype)
    if not autocast:
        weight, bias = weight.to(dtype), bias.to(dtype)

    def norm(module):
        return lambda x, weight, bias: module.layer_norm(x, weight, bias, EPS, low_precision)

    assert_as_good(norm(kernels), norm(ops), [x, weight, bias], autocast)
    rows = x.view(2, 3, 40)
    assert torch.equal(norm(kernels)(rows, weight, bias), norm(kernels)(x, weight, bias).view(2, 3, 40))


def test_a_large_mean_costs_no_precision():
    x, residual, weight, bias = inputs(4, 64)
    assert_as_good(call(kernels), call(ops), [x + 1000, residual, weight, bias])


@pytest.mark.parametrize(("dropout_p", "uses"), cases(per_push=[(0.3, 2)], nightly=product([0.0, 0.3], [1, 2])))
def test_gradients(dropout_p, uses):
    assert_gradients(call(kernels, dropout_p, uses=uses), inputs(5, 40))


def test_a_gradient_of_the_residual_alone_is_enough():
    def second(module):
        options = {"eps": EPS, "dropout_p": 0.0, "low_precision": True}
        return lambda *arguments: module.add_layer_norm(*arguments, **options)[1]

    assert_as_good(second(kernels), second(ops), inputs(3, 16))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_dropout_is_on_x_alone(dtype):
    x, residual, weight, bias = inputs(8, 64, dtype, dtype)
    ones = torch.ones_like(weight)
    only_x = call(kernels, 0.25)(torch.ones_like(x), torch.zeros_like(x), ones, 0 * ones)
    # A kept 1 is above its row's mean, a dropped 1 below.
    mask = only_x > 0
    assert 0.6 < mask.double().mean() < 0.9

    def specification(x, residual, weight, bias):
        return call(ops)(x * mask / 0.75, residual, weight, bias)

    assert_as_good(call(kernels, 0.25), specification, [x, residual, weight.to(dtype), bias.to(dtype)])


def test_no_tokens():
    leaves = [x.requires_grad_() for x in inputs(0, 16)]
    gradients = torch.autograd.grad(call(kernels, 0.1)(*leaves).sum(), leaves)
    assert [tuple(x.shape) for x in gradients] == [(0, 16), (0, 16), (16,), (16,)]


@pytest.mark.parametrize(
    ("dropout_p", "residual_dtype", "tokens", "most_programs", "uses"),
    cases(
        per_push=[(0.0, BF16, 3, 4, 2), (0.0, FP32, 7, 4, 1), (0.1, BF16, 7, 4, 2)],
        nightly=product([0.0, 0.1], [BF16, FP32], [3, 270], [256], [1, 2]),
    ),
)
def test_moves_the_bytes_of_its_formula(monkeypatch, dropout_p, residual_dtype, tokens, most_programs, uses):
    set_programs(monkeypatch, most_programs)
    width, x_size, r_size = 24, 2, residual_dtype.itemsize
    y_size = r_size
    leaves = [x.requires_grad_() for x in inputs(tokens, width, BF16, residual_dtype)]
    seed = 8 if dropout_p else 0
    with counted() as forward:
        y = call(kernels, dropout_p, uses=uses)(*leaves)
    assert forward.loaded == tokens * (width * (x_size + r_size) + 8 * width + seed)
    assert forward.stored == tokens * (width * y_size + 8)
    with counted() as backward:
        y.backward(torch.ones_like(y))
    programs = min(tokens, most_programs)
    apart = dropout_p > 0 or x_size != r_size
    assert backward.loaded == tokens * (width * (uses * y_size + x_size + r_size) + 8 + seed) + programs * 4 * width
    assert backward.stored == tokens * width * (x_size + apart * r_size) + programs * 8 * width


def test_saves_no_sum_and_no_mask():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        call(kernels, 0.1)(*[x.requires_grad_() for x in inputs(5, 32)])
    assert sorted(x.numel() for x in saved) == [1, 5, 5, 32, 5 * 32, 5 * 32]


def test_too_wide_is_refused():
    with pytest.raises(ValueError, match="hidden_size is 20000, the LayerNorm kernels take at most .* run.ops torch"):
        call(kernels)(*inputs(1, 20_000))


@pytest.mark.parametrize(
    ("residual_dtype", "uses"), cases(per_push=[(BF16, 2)], nightly=[(None, 1), (FP32, 1), (FP32, 2), (BF16, 2)])
)
def test_torch_compile_sees_one_operation(residual_dtype, uses):
    """residual_dtype: None is layer_norm, without a residual."""
    x, residual, weight, bias = inputs(4, 32)
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    mean = torch.zeros(4)
    other = None if residual_dtype is None else residual.to(residual_dtype)
    assert torch.library.opcheck(kernels.forward, (x, other, weight, bias, None, EPS, 0.0, FP32), **tests)
    for of_residual in (None, x):
        arguments = (x, of_residual, x, other, weight, mean, mean + 1, None, 0.0)
        assert torch.library.opcheck(kernels.backward, arguments, **tests)
    compiled = torch.compile(call(kernels, uses=uses), fullgraph=True, backend="aot_eager")
    assert_as_good(compiled, call(ops, uses=uses), [x, residual, weight, bias])
