"""Correct the bf16 of Triton's interpreter, which runs kernels on a CPU, and count the bytes that they move.

TRITON_INTERPRET=1 selects the interpreter when a kernel is defined, so tests that use it need a process of their own,
which test_interpreter.py starts. Triton 3.7.1's interpreter truncates where a GPU rounds to nearest even, and
multiplies the bits of bf16 matrices as integers. install() corrects both; check_interpreter.py fails once Triton has
corrected them. It also saves the time that Triton takes to replace the functions of its language at every
call and to look up types.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# Its methods are replaced by others.
builder: Any = InterpreterBuilder
stock_cast = builder.cast_impl
stock_dot = builder.create_dot


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """Round fp32 to the 16 bits of bf16, to nearest even, as GPUs do."""
    return torch.from_numpy(np.array(x, dtype=np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def cast(self, source, target):
    types = (source.dtype.scalar, target.scalar)
    if types == (tl.float32, tl.bfloat16):
        return TensorHandle(round_to_bf16(source.data), tl.bfloat16)
    if types == (tl.bfloat16, tl.float32):
        return TensorHandle(widen_bf16(source.data), tl.float32)
    return stock_cast(self, source, target)


def dot(self, a, b, accumulator, *rest):
    a, b = (TensorHandle(widen_bf16(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return stock_dot(self, a, b, accumulator, *rest)


def install() -> None:
    """Correct the interpreter for this process."""
    builder.cast_impl = cast
    builder.create_dot = dot
    patch_language_once()


@functools.cache
def patch_language_once() -> None:
    """Replace the functions of Triton's language once, not at every call, and keep the types that were looked up."""
    triton_interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    triton_interpreter._patch_lang = lambda fn: triton_interpreter._LangPatchScope()
    stock_type = triton_interpreter._get_np_dtype
    # Types of pointers have no hash.
    kept = functools.cache(stock_type)
    triton_interpreter._get_np_dtype = lambda tt_dtype: (kept if type(tt_dtype.scalar) is tl.dtype else stock_type)(
        tt_dtype.scalar
    )


@contextlib.contextmanager
def stock() -> Iterator[None]:
    """Use the interpreter as Triton ships it."""
    builder.cast_impl, builder.create_dot = stock_cast, stock_dot
    try:
        yield
    finally:
        install()


@dataclass
class Traffic:
    """Bytes that kernels moved: every lane of a load or store that its mask includes."""

    loaded: int = 0
    stored: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    traffic = Traffic()
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, pointers, mask, *rest):
        result = load(self, pointers, mask, *rest)
        traffic.loaded += int(np.count_nonzero(mask.data)) * result.data.dtype.itemsize
        return result

    def counted_store(self, pointers, value, mask, *rest):
        traffic.stored += int(np.count_nonzero(mask.data)) * value.data.dtype.itemsize
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
