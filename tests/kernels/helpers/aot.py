"""Compile kernels to machine code without a GPU, with the assembler in Triton's wheel.

The launches are recorded from the operations, so that the compiled code is that of a GPU: the same types, alignments,
block sizes and warps.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
# Shared memory that one program may use, in bytes: CUDA C Programming Guide, table of technical specifications.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.split('.')[-1]}.{self.kernel.fn.__name__}"


class Compiled(NamedTuple):
    """The assembler's report. spills: bytes stored and loaded; shared: bytes; ptx: the text before assembly."""

    registers: int
    spills: int
    shared: int
    ptx: str

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record the launches in this context instead of running them. The kernels' results stay uninitialised."""
    launches: list[Launch] = []
    original = JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        names = [name for name in self.arg_names if name not in kwargs]
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        constants = {name: value for name, value in kwargs.items() if name in self.arg_names}
        launches.append(Launch(self, dict(zip(names, args, strict=True)) | constants, options))

    JITFunction.run = record  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = original  # type: ignore[method-assign]


def source_of(launch: Launch) -> ASTSource:
    """Specialise as the just-in-time compiler does: None and 1 become constants, multiples of 16 are marked."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        aligned = False
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            # Memory itself is aligned; fake tensors have none.
            aligned = value.storage_offset() * value.itemsize % 16 == 0
        elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[parameter.name] = "fp32"
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def resident_programs(code: Compiled, warps: int, capability: int) -> int:
    """Return the programs that one multiprocessor holds at once, by registers, warps and shared memory."""
    # Registers are given out in blocks of 8 for each thread; each program takes 1 KiB of shared memory more.
    registers = -(-code.registers // 8) * 8
    by_memory = (SHARED_LIMIT[capability] + 1024) // (code.shared + 1024)
    return min(65536 // (registers * 32 * warps), 64 // warps, 32, by_memory)


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Assemble a launch for compute capability 80, 90 or 100."""
    kernel = triton.compile(source_of(launch), target=GPUTarget("cuda", capability, 32), options=launch.options)
    ptx = kernel.asm["ptx"]
    found = re.search(r"\.target (sm_\w+)", ptx)
    assert found, "the PTX names no target"
    assembler = TOOLS / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(assembler), "-v", f"--gpu-name={found[1]}", str(source), "-o", f"{folder}/kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill", report))
    return Compiled(int(re.findall(r"Used (\d+) registers", report)[-1]), spills, kernel.metadata.shared, ptx)
