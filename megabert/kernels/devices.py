"""Detect what this machine's devices can do: use a GPU, multiply bf16 and FP8 natively, launch Triton kernels."""

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import torch

from megabert.process.error_text import first_line

# Where an NVIDIA driver shows itself: a file of its own, or under WSL2 the library that Windows lends.
NVIDIA_FILES = (Path("/dev/nvidiactl"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
# AMD's driver; also for graphics inside a CPU, so that its presence is no reason to stop.
AMD_FILES = (Path("/dev/kfd"),)
# Ampere is the first generation with bf16 tensor cores.
OLDEST_CAPABILITY = (8, 0)
# Ada and Hopper are the first with FP8 tensor cores.
OLDEST_WITH_FP8 = (8, 9)
# AMD's names of the cards that multiply bf16 natively: MI100, MI200, MI300 and later, and RX 7000 and later; FP8: MI300
# and later, and RX 9000 (https://rocm.docs.amd.com/en/latest/reference/precision-support.html).
AMD_WITH_BF16, AMD_WITH_FP8 = re.compile(r"gfx(908|90a|9[45]|1[12])"), re.compile(r"gfx(9[45]|12)")
C_COMPILER = "install gcc, or set CC"
TRAIN_ON_CPU = "set DS_ACCELERATOR=cpu to train on the CPU"


def torch_sees_a_gpu() -> bool:
    """Whether torch can use a GPU: NVIDIA's, also under WSL2, or with torch's ROCm build AMD's."""
    return torch.cuda.is_available()


def can_torch_use_gpus() -> bool:
    """Whether this build of torch has GPU code."""
    return torch.version.cuda is not None or torch.version.hip is not None


def has_nvidia_driver() -> bool:
    return any(path.exists() for path in NVIDIA_FILES)


def why_gpu_is_unused(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return why torch does not use this machine's GPU, with the remedy; None if it does or there is none."""
    if torch_sees_a_gpu() or environ.get("DS_ACCELERATOR") == "cpu":
        return None
    if not has_nvidia_driver():
        return _why_amd_is_unused() if any(path.exists() for path in AMD_FILES) else None
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


def _why_amd_is_unused() -> str:
    if torch.version.hip is None:
        return (
            f"this machine has AMD's driver, but the installed torch {torch.__version__} is not a ROCm build. Install "
            "PyTorch's ROCm build into .venv, which launch/install.sh keeps. If ROCm does not support this GPU, "
            f"{TRAIN_ON_CPU}."
        )
    return (
        f"this machine has AMD's driver, but torch {torch.__version__} sees no GPU. If rocminfo lists none either, add "
        f"this user to the groups render and video. If this job has no GPU, {TRAIN_ON_CPU}."
    )


def local_devices() -> list[torch.device]:
    """Return all CUDA devices of this machine, or its CPU."""
    count = torch.cuda.device_count()
    return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]


def make_current(device: torch.device) -> None:
    """Make a CUDA device the current one of this process: Triton launches there, wherever a kernel's tensors are."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a CPU or CUDA device multiplies bf16 natively; torch's own question counts emulation as support.

    On a device that does not, bf16 is much slower than fp32.
    """
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if torch.version.hip is not None:
        return _is_amd(device, AMD_WITH_BF16)
    return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


def has_fp8(device: torch.device) -> bool:
    """Whether a CUDA device multiplies FP8 natively; on a CPU its rounding is emulated."""
    if torch.version.hip is not None and device.type == "cuda":
        return _is_amd(device, AMD_WITH_FP8)
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= OLDEST_WITH_FP8


def _is_amd(device: torch.device, names: re.Pattern[str]) -> bool:
    """Whether an AMD card has one of these names; its capability says less: MI50's is 9.0, as MI250X's."""
    return names.match(torch.cuda.get_device_properties(device).gcnArchName) is not None


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
    with torch.cuda.device(device):
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
