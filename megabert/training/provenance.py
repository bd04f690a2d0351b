"""run.json: what a run was made of, enough to repeat it."""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megabert.files.atomic import write_atomically
from megabert.training.distributed.device import device_name
from megabert.training.run import Run

RUN_JSON = "run.json"
PACKAGES = """
    apex deepspeed flash-attn megabert numpy nvidia-cudnn-cu12 nvidia-nccl-cu12 safetensors tokenizers torch transformers triton webdataset
""".split()
# What changes the arithmetic, its speed or how ranks meet. None of these carries a secret.
VARIABLES = ("CUDA_", "DS_", "GLOO_", "KMP_", "MKL_", "NCCL_", "OMP_", "PYTORCH_", "SLURM_JOB_", "TORCH_", "TRITON_")


def write_run_json(run: Run, resumed: bool) -> None:
    """Write down this attempt; of a resumed run, what was there of the ones before stands below `earlier`, the last one first."""
    path = run.output_dir / RUN_JSON
    earlier = _attempts(path) if resumed else []
    write_atomically(path, json.dumps(facts_of(run) | {"earlier": earlier}, indent=1).encode())


def facts_of(run: Run) -> dict[str, Any]:
    """Of this attempt, as JSON has it."""
    return {
        "command": sys.argv,
        "first_step": run.step,
        "recipe": run.recipe.to_dict(),
        "ds_config": run.ds_config,
        "world_size": run.world_size,
        "corpus": {"name": run.corpus.name, "fingerprint": run.corpus.fingerprint},
        "heldout": {"name": run.held_corpus.name, "fingerprint": run.held_corpus.fingerprint},
        "versions": versions(),
        "git": git_state(),
        "machine": {
            "node": platform.node(),
            "platform": platform.platform(),
            "cpu": cpu_model(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": device_name(run.engine.device),
            "cuda": torch.version.cuda,
        },
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)},
    }


def _attempts(path: Path) -> list[dict[str, Any]]:
    """What a run.json holds, each attempt by itself; nothing of one that is missing or damaged."""
    try:
        last = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return []
    if not isinstance(last, dict):
        return []
    return [last, *last.pop("earlier", [])]


def versions() -> dict[str, str]:
    """Python's, and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def cpu_model() -> str:
    """As Linux names it, else as Python does."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def git_state() -> dict[str, object] | None:
    """The commit that this code is of, and whether files differ from it; None where it is not run from a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "changed": bool(git("status", "--porcelain"))} if commit else None
