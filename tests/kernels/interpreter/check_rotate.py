"""RoPE in Triton's interpreter: results, gradients, bytes moved."""

from itertools import product

import pytest
import torch

from megabert.kernels.rotate import rotate, turn
from megabert.model import ops
from tests.helpers.cases import cases
from tests.kernels.helpers import interpreter
from tests.kernels.helpers.interpreter import counted
from tests.kernels.helpers.yardstick import assert_as_good, assert_gradients

interpreter.install()

BF16, FP32 = torch.bfloat16, torch.float32


def inputs(tokens, heads, size, dtype=FP32):
    table = ops.rope_table(torch.arange(tokens) * 7 % 50, size, 10_000.0)
    return torch.randn(tokens, 3, heads, size).to(dtype), table


@pytest.mark.parametrize(
    ("tokens", "heads", "size", "dtype"),
    cases(
        per_push=[(5, 3, 24, BF16), (1, 1, 2, FP32)], nightly=product([1, 37], [1, 3], [2, 24, 64, 128], [BF16, FP32])
    ),
)
def test_equals_the_specification(tokens, heads, size, dtype):
    qkv, table = inputs(tokens, heads, size, dtype)
    assert_as_good(lambda x: rotate(x, table), lambda x: ops.rotate(x, table), [qkv])
    assert torch.equal(rotate(qkv, table)[:, 2], qkv[:, 2])


def test_backward_is_the_derivative_of_forward():
    qkv, table = inputs(5, 2, 6)
    assert_gradients(lambda x: rotate(x, table), [qkv])


def test_moves_the_bytes_of_its_formula():
    tokens, heads, size, s = 7, 2, 16, 2
    qkv, table = inputs(tokens, heads, size, BF16)
    with counted() as traffic:
        rotate(qkv, table)
    # Every head of queries and keys reads the table, from the cache after the first.
    assert traffic.total == tokens * (6 * heads * size * s + 2 * heads * size * 4)


def test_no_tokens():
    qkv, table = inputs(0, 2, 16)
    assert rotate(qkv, table).shape == qkv.shape


def test_torch_compile_sees_one_operation():
    qkv, table = inputs(5, 2, 16)
    assert torch.library.opcheck(turn, (qkv, table, 1.0), test_utils=("test_schema", "test_faketensor"))
