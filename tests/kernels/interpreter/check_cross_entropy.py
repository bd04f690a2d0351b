"""masked_cross_entropy in Triton's interpreter: results, gradients, chunks, bytes moved."""

from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megabert.kernels import cross_entropy as kernels
from megabert.model import ops
from tests.helpers.cases import cases
from tests.kernels.helpers import interpreter
from tests.kernels.helpers.interpreter import counted
from tests.kernels.helpers.yardstick import assert_as_good, assert_gradients

interpreter.install()

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = [(1, 2), (7, 50), (5, 4097), (4, 9000)]


def inputs(rows, width, vocab, dtype=FP32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(rows, width).to(dtype)
    return hidden, torch.randn(vocab, width) / width**0.5, torch.randn(vocab) / 4


def some_labels(rows, vocab):
    labels = torch.randint(vocab, (rows,))
    labels[1::3] = ops.IGNORE_INDEX
    return labels


def loss_of(module, labels, *more):
    return lambda hidden, weight, bias: module.masked_cross_entropy(hidden, weight, bias, labels, *more).loss_sum


@pytest.mark.parametrize(
    ("rows", "vocab", "label_type"),
    cases(
        per_push=[(1, 2, torch.int64), (7, 50, torch.int32), (5, 4097, torch.int64)],
        nightly=[(*shape, dtype) for shape, dtype in product(SHAPES, [torch.int32, torch.int64])],
    ),
)
def test_equals_the_specification(rows, vocab, label_type):
    labels = some_labels(rows, vocab).to(label_type)
    assert_as_good(loss_of(kernels, labels), loss_of(ops, labels), inputs(rows, 24, vocab))


def test_equals_it_under_autocast():
    labels = some_labels(9, 300)
    assert_as_good(loss_of(kernels, labels), loss_of(ops, labels), inputs(9, 32, 300, BF16), autocast=True)


def test_equals_it_in_pure_bf16():
    labels = some_labels(9, 300)
    arguments = [x.bfloat16() for x in inputs(9, 32, 300)]
    assert_as_good(loss_of(kernels, labels), loss_of(ops, labels), arguments)


def test_equals_it_in_chunks(monkeypatch):
    """Ten rows in chunks of 4, 4 and 2."""
    monkeypatch.setattr(kernels, "MAX_LOGITS", 300 * 4)
    monkeypatch.setattr(kernels, "ROWS_MULTIPLE", 1)
    labels = some_labels(10, 300)
    assert kernels.chunk_rows(10, 300) == 4
    for dtype, autocast in ((FP32, False), (BF16, True)):
        assert_as_good(loss_of(kernels, labels), loss_of(ops, labels), inputs(10, 32, 300, dtype), autocast)


def test_chunks_are_few_equal_and_within_the_limit():
    assert kernels.chunk_rows(2458, 30_528) == 1280
    assert kernels.chunk_rows(3, 30_528) == 128
    assert kernels.chunk_rows(0, 30_528) == 128
    for rows in (1, 1000, 2198, 2199, 50_000):
        assert kernels.chunk_rows(rows, 30_528) * 30_528 <= kernels.MAX_LOGITS


def test_huge_logits_do_not_overflow():
    hidden, weight, bias = inputs(4, 16, 60)
    labels = some_labels(4, 60)
    assert_as_good(loss_of(kernels, labels), loss_of(ops, labels), [hidden * 1000, weight, bias])


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_gradients(z_loss):
    labels = some_labels(5, 30)
    assert_gradients(loss_of(kernels, labels, z_loss), inputs(5, 8, 30))


def test_z_loss_is_the_squared_log_sum_exp():
    hidden, weight, bias = (x.double() for x in inputs(6, 8, 40))
    labels = some_labels(6, 40)
    lse = torch.logsumexp(hidden @ weight.T + bias, dim=-1)[labels != ops.IGNORE_INDEX]
    extra = loss_of(kernels, labels, 0.5)(hidden, weight, bias) - loss_of(kernels, labels)(hidden, weight, bias)
    torch.testing.assert_close(extra, 0.5 * (lse**2).sum())


@pytest.mark.parametrize("autocast", [False, True])
def test_counts_correct_rows_as_the_specification_does(autocast):
    """A tie with the highest logit counts as correct; bf16 logits tie often."""
    hidden, weight, bias = inputs(40, 8, 12)
    weight[3], bias[3] = weight[5], bias[5]
    with torch.autocast("cpu", BF16, enabled=autocast):
        labels = torch.nn.functional.linear(hidden, weight, bias).argmax(-1)
        labels[labels == 3] = 5
        labels[::4] = 0
        labels[1::4] = ops.IGNORE_INDEX
        ours, theirs = (module.masked_cross_entropy(hidden, weight, bias, labels) for module in (kernels, ops))
    assert (ours.num_correct, ours.num_targets) == (theirs.num_correct, theirs.num_targets)
    assert ours.num_targets == 30
    assert 20 <= ours.num_correct < 30


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_moves_the_bytes_of_its_formula(gradient, dtype):
    rows, vocab = 6, 5000
    labels = some_labels(rows, vocab)
    used, size = 4, dtype.itemsize
    with counted() as traffic:
        kernels.loss_in_place(torch.randn(rows, vocab).to(dtype), labels, vocab, 0.0, gradient)
    assert traffic.loaded == used * ((1 + gradient) * vocab * size + size) + rows * 8
    assert traffic.stored == rows * (gradient * vocab * size + 12)


@pytest.mark.parametrize(("rows", "vocab", "dtype"), [(5, 4090, BF16), (7, 50, FP32), (2, 9001, BF16)])
def test_columns_for_alignment_change_no_bit(rows, vocab, dtype):
    labels, logits = some_labels(rows, vocab), torch.randn(rows, vocab).to(dtype)
    aligned = torch.cat([logits, torch.full((rows, -vocab % 16), -torch.inf, dtype=dtype)], dim=1)
    alone = kernels.loss_in_place(logits, labels, vocab, 0.1, True)
    beside = kernels.loss_in_place(aligned, labels, vocab, 0.1, True)
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
    assert torch.equal(aligned[:, :vocab], logits)
    assert not aligned[:, vocab:].any()


def test_logits_are_aligned_and_no_weight_is_copied_in_vain():
    weight, bias = inputs(3, 8, 30)[1:]
    padded, its_bias = kernels.with_columns(weight, bias, BF16)
    assert padded.shape == (32, 8)
    assert torch.equal(padded[:30], weight.bfloat16())
    assert torch.equal(its_bias, torch.cat([bias.bfloat16(), torch.full((2,), -torch.inf, dtype=BF16)]))
    weight, bias = inputs(3, 8, 32)[1:]
    assert all(a is b for a, b in zip(kernels.with_columns(weight, bias, FP32), (weight, bias), strict=True))


class Largest(TorchDispatchMode):
    """Record the largest tensor of each dtype that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements[x.dtype] = max(self.elements.get(x.dtype, 0), x.numel())
        return out


def test_no_fp32_logits_and_no_more_than_a_chunk(monkeypatch):
    rows, width, vocab = 48, 16, 200
    monkeypatch.setattr(kernels, "MAX_LOGITS", 16 * vocab)
    monkeypatch.setattr(kernels, "ROWS_MULTIPLE", 1)
    with Largest() as largest:
        kernels.in_chunks(*inputs(rows, width, vocab, BF16), some_labels(rows, vocab), 0.0, True, BF16)
    # The weight and its gradient.
    assert largest.elements[FP32] == vocab * width
    # One chunk's logits.
    assert largest.elements[BF16] == 16 * 208


def test_without_gradients_none_are_computed():
    hidden, weight, bias = inputs(4, 8, 30)
    weight.requires_grad_()
    with torch.no_grad(), counted() as traffic:
        kernels.masked_cross_entropy(hidden, weight, bias, torch.arange(4))
    assert traffic.stored == 4 * 12


@pytest.mark.parametrize("wrong", [-1, 30, 31, 32])
def test_a_label_outside_the_vocabulary_makes_the_loss_nan(wrong):
    """Training then skips the step."""
    labels = torch.tensor([4, wrong, 5])
    loss = kernels.masked_cross_entropy(*inputs(3, 8, 30), labels)
    assert loss.loss_sum.isnan()


def test_no_rows_and_only_ignored_rows():
    for labels in (torch.zeros(0, dtype=torch.long), torch.full((3,), ops.IGNORE_INDEX)):
        leaves = hidden, weight, bias = inputs(len(labels), 8, 30)
        for leaf in leaves:
            leaf.requires_grad_()
        loss = kernels.masked_cross_entropy(hidden, weight, bias, labels)
        assert (loss.loss_sum, loss.num_correct, loss.num_targets) == (0, 0, 0)
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss.loss_sum, leaves))


def test_torch_compile_sees_one_operation():
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    hidden, weight, bias = inputs(6, 8, 30)
    labels = some_labels(6, 30)
    for gradient in (True, False):
        assert torch.library.opcheck(kernels.forward, (hidden, weight, bias, labels, 0.0, gradient, FP32), **tests)
    assert torch.library.opcheck(kernels.loss_in_place, (torch.randn(6, 30), labels, 30, 0.0, True), **tests)
    compiled = torch.compile(loss_of(kernels, labels), fullgraph=True, backend="aot_eager")
    assert_as_good(compiled, loss_of(ops, labels), [hidden, weight, bias])
