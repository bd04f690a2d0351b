"""Detect what this machine's devices can do: use a GPU, multiply bf16 and FP8 natively, launch Triton kernels."""

import functools
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import torch

# Where an NVIDIA driver shows itself: a file of its own, or under WSL2 the library that Windows lends.
NVIDIA_FILES = (Path("/dev/nvidiactl"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
# Ampere is the first generation with bf16 tensor cores.
OLDEST_CAPABILITY = (8, 0)
# Ada and Hopper are the first with FP8 tensor cores.
OLDEST_WITH_FP8 = (8, 9)
# Of AMD's, which count on their own: the MI200 series is (9, 0) and has none, nor has RDNA 3, which is (11, 0); MI300,
# MI350 and RDNA 4 have (https://rocm.docs.amd.com/en/latest/reference/precision-support.html).
AMD_WITH_FP8 = ((9, 4), (9, 5), (12, 0))
C_COMPILER = "install gcc, or set CC"
TRAIN_ON_CPU = "set DS_ACCELERATOR=cpu to train on the CPU"


def torch_sees_a_gpu() -> bool:
    """Whether torch can use a GPU: NVIDIA's, also under WSL2, or with torch's ROCm build AMD's."""
    return torch.cuda.is_available()


def can_torch_use_gpus() -> bool:
    """Whether this build of torch has GPU code."""
    return torch.version.cuda is not None or torch.version.hip is not None


def why_gpu_is_unused(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return why torch does not use this machine's NVIDIA GPU, with the remedy; None if it does or there is none."""
    if torch_sees_a_gpu() or not any(path.exists() for path in NVIDIA_FILES) or environ.get("DS_ACCELERATOR") == "cpu":
        return None
    if not can_torch_use_gpus():
        return (
            f"this machine has an NVIDIA GPU, but the installed torch {torch.__version__} is a CPU build, as "
            "launch/install.sh installs where it finds no GPU. "
            f"Run TORCH_BUILD=gpu bash launch/install.sh, or {TRAIN_ON_CPU}."
        )
    if environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return None
    return (
        f"this machine has an NVIDIA driver, but torch {torch.__version__} sees no GPU. If nvidia-smi lists one, the "
        f"driver is older than CUDA {torch.version.cuda}: update it, or install a torch for an older CUDA. If this job "
        f"has no GPU, {TRAIN_ON_CPU}."
    )


def local_devices() -> list[torch.device]:
    """Return all CUDA devices of this machine, or its CPU."""
    count = torch.cuda.device_count()
    return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a CPU or CUDA device multiplies bf16 natively; torch's own question counts emulation as support.

    On a device that does not, bf16 is much slower than fp32.
    """
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


def has_fp8(device: torch.device) -> bool:
    """Whether a CUDA device multiplies FP8 natively; on a CPU its rounding is emulated."""
    if device.type == "cpu":
        return True
    capability = torch.cuda.get_device_capability(device)
    return capability in AMD_WITH_FP8 if torch.version.hip else capability >= OLDEST_WITH_FP8


@functools.cache
def why_no_launch(device: torch.device) -> str | None:
    """Launch a kernel on a CUDA device. Return the reason why that fails, with the remedy, or None.

    Triton compiles C at its first launch and calls ptxas: without a compiler, Python.h, libcuda.so or a cache folder
    that can be written, a run would fail at its first step.
    """
    try:
        from triton.runtime.errors import TritonError
    except (ImportError, OSError, RuntimeError) as error:
        return f"Triton cannot be imported: {first_line(error)}"
    try:
        launch(device)
    # OSError: the cache folder. AssertionError: no libcuda.so. CUDA's own errors are RuntimeErrors.
    except (
        TritonError, RuntimeError, ImportError, OSError, AssertionError, subprocess.CalledProcessError
    ) as error:  # fmt: skip
        return f"Triton cannot launch a kernel: {explain(error)}"
    return None


def launch(device: torch.device) -> None:
    """Compute GeGLU of a row of ones with the Triton kernel, and check the result."""
    from megabert.kernels.geglu import geglu

    wanted = torch.nn.functional.gelu(torch.ones(()))
    got = geglu(torch.ones(1, 32, device=device), 0.0).cpu()
    if not torch.allclose(got, wanted, atol=1e-5):
        raise RuntimeError(f"a trivial kernel gives {got[0, 0].item()} instead of {wanted.item():.4f}")


def explain(error: BaseException) -> str:
    """Name what is missing on this machine for Triton's launcher, or else the error itself."""
    if isinstance(error, subprocess.CalledProcessError | RuntimeError) and not has_compiler():
        return f"there is no C compiler ({C_COMPILER})"
    if isinstance(error, subprocess.CalledProcessError):
        header = Path(sysconfig.get_paths()["include"], "Python.h")
        if not header.is_file():
            return f"{header} is missing (install Python's development package, such as python3-dev)"
        return f"{Path(str(error.cmd[0])).name} fails with exit code {error.returncode}, see its message above"
    if isinstance(error, PermissionError):
        return f"{first_line(error)} (set TRITON_CACHE_DIR to a folder that can be written)"
    return first_line(error)


def has_compiler() -> bool:
    """Whether Triton finds a C compiler as it looks for one."""
    named = os.environ.get("CC")
    return shutil.which(named.split()[0] if named else "gcc") is not None or (not named and bool(shutil.which("clang")))


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
