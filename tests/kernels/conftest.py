"""Compilers' caches of the kernel tests: one temporary folder for the whole session."""

import os

import pytest
import torch._inductor.config
from torch._inductor.runtime.runtime_utils import default_cache_dir

from megabert.kernels.cpu.ahead import skip_tests_of_this_cpu


@pytest.fixture(scope="session", autouse=True)
def compiler_caches(tmp_path_factory):
    """Start with empty caches, so that nothing depends on earlier runs, and write only to the session's folder.

    A TORCHINDUCTOR_CACHE_DIR other than torch's default, which importing torch may set, is kept. Inductor compiles in
    this process, because its worker processes would import torch again.
    """
    inductor = "TORCHINDUCTOR_CACHE_DIR"
    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(compile_threads=1):
        if os.environ.get(inductor) in (None, default_cache_dir()):
            patch.setenv(inductor, str(tmp_path_factory.mktemp("inductor")))
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        skip_tests_of_this_cpu()
        yield
