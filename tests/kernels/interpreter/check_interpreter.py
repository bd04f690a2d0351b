"""Checks of the helpers: the corrections of Triton's interpreter are still needed, and the counter counts."""

import torch
import triton
import triton.language as tl

from tests.kernels.helpers import interpreter
from tests.kernels.helpers.yardstick import error

interpreter.install()


@triton.jit
def product(A, B, C, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(C + place, tl.dot(tl.load(A + place), tl.load(B + place)))


@triton.jit
def copy(X, Y, N, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    value = tl.load(X + place, mask=place < N)
    tl.store(Y + place, value.to(Y.dtype.element_ty), mask=place < N)


def multiply(a, b):
    c = torch.zeros(16, 16)
    product[(1,)](a, b, c, N=16)
    return c


def narrow(x):
    y = torch.zeros_like(x, dtype=torch.bfloat16)
    copy[(1,)](x, y, len(x), BLOCK=16)
    return y


def test_canary_the_interpreters_bf16_is_still_wrong():
    """If this fails, Triton has corrected its interpreter: delete install(), stock() and this file's two canaries."""
    a, b = torch.randn(2, 16, 16).bfloat16()
    with interpreter.stock():
        assert error(multiply(a, b), a.double() @ b.double()) > 0.1


def test_canary_the_interpreter_still_truncates():
    # Nearer to 1 + 2^-7 than to 1.
    x = torch.tensor([1.0 + 2**-8 + 2**-9])
    with interpreter.stock():
        assert narrow(x).item() == 1.0
    assert narrow(x).item() == 1.0 + 2**-7


def test_corrected_bf16_is_right():
    a, b = torch.randn(2, 16, 16).bfloat16()
    assert error(multiply(a, b), a.double() @ b.double()) < 1e-6
    x = torch.randn(13) * 100
    assert torch.equal(narrow(x), x.bfloat16())


def test_the_counter_counts_the_bytes_inside_the_masks():
    with interpreter.counted() as traffic:
        narrow(torch.randn(13))
    assert (traffic.loaded, traffic.stored) == (13 * 4, 13 * 2)
