"""Compile a model's operations for a CPU before its first step: one call of the C++ compiler for all of them.

By default inductor calls the compiler once for every graph and waits for it each time. Before that it compiles a
header, and ten tests of what this CPU can do. Most of that time goes into reading the same headers.
"""

import contextlib
import copy
import functools
import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch._inductor import async_compile, codecache, config, cpp_builder, cpu_vec_isa

from megabert.kernels.cpu import CPU_OPS
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.layers import set_ops
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.model.ops import Ops

# More tokens do not change how inductor divides the work.
MOST_TOKENS = 8192
COMPILER = codecache.CppPythonBindingsCodeCache
ENTRY = COMPILER.entry_function


class Kernels:
    """The kernels of graphs that are traced while `collected()`: their sources become one library."""

    def __init__(self) -> None:
        self.sources: list[str] = []
        self.collecting = True
        self.library: Callable[[], ModuleType] | None = None

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Within this block inductor's kernels are not compiled, and calls of them do nothing."""
        original = COMPILER.load_async

        def load_async(main_code: str, *_: Any, **__: Any) -> Callable[[], ModuleType]:
            module = ModuleType(ENTRY)
            setattr(module, ENTRY, Kernel(self, len(self.sources)))
            self.sources.append(main_code)
            return lambda: module

        COMPILER.load_async = load_async
        try:
            yield
        finally:
            COMPILER.load_async = original
            self.collecting = False
        if self.sources:
            self._start_compiling()

    def _start_compiling(self) -> None:
        """Compile in another thread, and without the header, which is read only once here."""
        options = {"cpp_cache_precompile_headers": False, "aot_inductor.enable_line_tables": False}
        with config.patch(options):
            threads = async_compile.get_compile_threads()
            submit = async_compile.AsyncCompile.submit if threads > 1 else None
            self.library = COMPILER.load_async(join_sources(self.sources), submit_fn=submit)

    def load(self, number: int) -> Callable[..., None]:
        """Wait for the library, and return one of its kernels."""
        assert self.library is not None, f"kernel {number} was loaded before the kernels were compiled"
        first = self.library()
        if number == 0:
            return getattr(first, ENTRY)
        assert first.__file__ is not None, f"{first.__name__}, the library of the kernels, has no file"
        spec = importlib.util.spec_from_file_location(f"{first.__name__}_{number}", first.__file__)
        assert spec is not None, f"{first.__file__}: cannot be imported as a Python module"
        assert spec.loader is not None, f"{first.__file__}: has no loader of Python modules"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, ENTRY)


class Kernel:
    """A kernel that is loaded at its first call."""

    def __init__(self, kernels: Kernels, number: int):
        self.kernels, self.number = kernels, number
        self.run: Callable[..., None] | None = None

    def __call__(self, *arguments: Any) -> None:
        if self.run is None:
            if self.kernels.collecting:
                return
            self.run = self.kernels.load(self.number)
        self.run(*arguments)


def join_sources(sources: list[str]) -> str:
    """Join sources of Python modules with one kernel each to one source with all of these modules."""
    lines = ["#include <torch/csrc/inductor/cpp_prefix.h>", "#define PY_SSIZE_T_CLEAN", "#include <Python.h>"]
    lines += ["#include <sstream>", "#include <cstdlib>", "#include <cerrno>"]
    for number, source in enumerate(sources):
        # The first one keeps the name by which inductor opens the library.
        names = [ENTRY] if number == 0 else [ENTRY, f"PyInit_{ENTRY}"]
        lines += [f"#undef {name}" for name in (ENTRY, f"PyInit_{ENTRY}")]
        lines += [f"#define {name} {name}_{number}" for name in names]
        lines += [f"namespace module_{number} {{", source.replace("#define PY_SSIZE_T_CLEAN", ""), "}"]
    return "\n".join(lines)


def compile_ahead(config: MegaBertConfig, ops: Ops, bf16: bool, tokens: int, masked: int) -> None:
    """Compile what training and evaluating a model of this configuration calls, by a step of two of its layers.

    tokens, masked: the numbers of tokens and of masked tokens in the first batch; inductor divides the work by them.
    The C++ compiler works in another thread, and the first call of a kernel waits for it. The state of torch's random
    generator does not change.
    """
    if ops.masked_cross_entropy is not CPU_OPS.masked_cross_entropy:
        return
    tokens, masked = min(tokens, MOST_TOKENS), min(masked, MOST_TOKENS)
    small = copy.copy(config)
    small.num_hidden_layers = min(2, config.num_hidden_layers)
    kernels = Kernels()
    with torch.random.fork_rng(devices=[]), kernels.collected():
        skip_tests_of_this_cpu()
        with torch.device("meta"):
            model = MegaBertForMaskedLM(small)
        model.to_empty(device="cpu")
        set_ops(model, ops)
        ids, rows = torch.zeros(tokens, dtype=torch.int32), torch.zeros(masked, dtype=torch.int32)
        bounds = torch.arange(tokens + 1, dtype=torch.int32)
        for training in (True, False):
            model.train(training)
            with torch.set_grad_enabled(training):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = model.masked_loss(ids, ids, bounds, 1, rows, rows).loss_sum
                if training:
                    loss.backward()


@functools.cache
def skip_tests_of_this_cpu() -> None:
    """Let inductor use the widest vectors of this CPU for which PyTorch itself was built, if the compiler knows them.

    Inductor would compile, link and load small programs for every kind of vectors first. Without an answer here it does
    that as before, and where ATEN_CPU_CAPABILITY or inductor's configuration names the vectors.
    """
    if config.cpp.simdlen is not None or os.environ.get("ATEN_CPU_CAPABILITY"):
        return
    offered = cpu_vec_isa.x86_isa_checker()
    for isa in cpu_vec_isa.supported_vec_isa_list:
        built_for = torch.backends.cpu.get_cpu_capability() in isa.build_macro()[0]
        if built_for and set(str(isa).split()) <= set(offered):
            known = untested(type(isa))
            if compiler_accepts(known.build_arch_flags().split()):
                cpu_vec_isa.valid_vec_isa_list = functools.cache(functools.partial(list, [known]))
                return


def untested(isa: type[cpu_vec_isa.VecISA]) -> cpu_vec_isa.VecISA:
    """Return vectors that inductor takes without a test of its own, with the same flags for the compiler."""
    has_bf16 = torch.cpu._is_avx512_bf16_supported()
    changes = {"__bool__": lambda _: True, "__hash__": isa.__hash__, "_is_avx512_bf16_supported": has_bf16}
    return type(isa.__name__, (isa,), changes)()


def compiler_accepts(flags: list[str]) -> bool:
    """Whether compiler and assembler take these flags, and those of this CPU."""
    command = [cpp_builder.get_cpp_compiler(), *flags, "-march=native", "-O1", "-c", "-x", "c++", "-", "-o", os.devnull]
    code = "typedef float V __attribute__((vector_size(64))); V f(V a, V b) { return a * b; }"
    return subprocess.run(command, input=code.encode(), capture_output=True, check=False).returncode == 0
