"""Compilers' caches of the kernel tests: one temporary folder for the whole session."""

import os

import pytest
import torch._inductor.config


@pytest.fixture(scope="session", autouse=True)
def compiler_caches(tmp_path_factory):
    """Start with empty caches, so that nothing depends on earlier runs, and write only to the session's folder.

    If TORCHINDUCTOR_CACHE_DIR is set, inductor's cache is kept there. Inductor compiles in this process, because its
    worker processes would import torch again.
    """
    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(compile_threads=1):
        if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield
