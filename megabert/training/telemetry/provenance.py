"""Write run.json, with all that is needed to repeat a run, and make the messages at the run's start."""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import torch
import yaml

from megabert.data.shards.source import Corpus
from megabert.files.json_file import read_json
from megabert.files.redact import redact, redact_all
from megabert.files.run_format import RUN, write_run_file
from megabert.training.checkpointing.resume import Checkpoint
from megabert.training.distributed.device import device_name
from megabert.training.plan import RunPlan

PACKAGES = """
    apex deepspeed flash-attn megabert numpy safetensors tokenizers torch transformers triton webdataset
""".split()
# Named after the release of CUDA, too.
NVIDIA_PACKAGES = re.compile(r"nvidia-(cudnn|nccl)-cu\d+")
# Environment variables that affect the arithmetic, its speed or the links between ranks. None is secret.
VARIABLES = ("CUDA_", "DS_", "GLOO_", "KMP_", "MKL_", "NCCL_", "OMP_", "PYTORCH_", "SLURM_JOB_", "TORCH_", "TRITON_")


def start_messages(
    plan: RunPlan, corpus: Corpus, num_streams: int, num_parameters: int, checkpoint: Checkpoint | None
) -> Iterator[str]:
    """Describe the run before its first step, with every setting as resolved."""
    recipe, ds_config, hours = plan.recipe, plan.ds_config, plan.recipe.run.max_hours
    settings = yaml.safe_dump(recipe.to_dict(), sort_keys=False).rstrip()
    yield f"recipe:\n{settings}\nds_config: {json.dumps(ds_config.settings)}"
    length = f"{plan.schedule.total_steps} steps" if hours is None else f"{hours} hours of steps"
    yield (
        f"{num_parameters:,} parameters, {'bf16 autocast' if ds_config.bf16 else 'fp32'} on {plan.world_size} x "
        f"{plan.device.type}, ZeRO {ds_config.zero_stage}; {corpus.tokens:,} tokens in {num_streams} "
        f"streams; {length} of {plan.schedule.batches_per_step} x {recipe.data.bin_tokens} token slots"
    )
    yield f"optimizer: {recipe.optimizer.name} from {plan.optimizer.source} ({plan.optimizer.reason})"
    if recipe.run.fp8 != "none":
        yield f"layers' products: FP8 from {recipe.run.fp8}, {_how_fp8_runs(plan)}"
    if plan.device.type == "cuda":
        how = (
            "as CUDA graphs (not run on a GPU yet)"
            if plan.why_no_graphs is None
            else f"kernel by kernel: {plan.why_no_graphs}"
        )
        yield f"micro-batches: launched {how}"
    if checkpoint is not None:
        state = checkpoint.state
        done = f" of {plan.schedule.total_steps}" if hours is None else f", {state.wall_seconds / 3600:.2f} hours"
        verb = "branched off from" if checkpoint.branched else "resumed from"
        yield f"{verb} {checkpoint.path}: step {state.step}{done}"


def _how_fp8_runs(plan: RunPlan) -> str:
    if plan.device.type == "cpu":
        return "emulated on this CPU"
    fused = "" if plan.recipe.run.compile else "; set run.compile true, which fuses the casts with other operations"
    return f"not run on a GPU yet{fused}"


def write_run_json(plan: RunPlan, corpus: Corpus, held_out: Corpus, first_step: int) -> None:
    """Write the facts of this attempt; for a resumed run, earlier attempts follow under `earlier`, the latest first."""
    path = plan.output_dir / RUN
    earlier = _attempts(path) if first_step else []
    write_run_file(path, attempt_facts(plan, corpus, held_out, first_step) | {"earlier": earlier})


def attempt_facts(plan: RunPlan, corpus: Corpus, held_out: Corpus, first_step: int) -> dict[str, object]:
    """Return the facts of one attempt, ready for JSON."""
    return {
        "command": redact_all(sys.argv),
        "first_step": first_step,
        "recipe": redact_all(plan.recipe.to_dict()),
        "ds_config": plan.ds_config.settings,
        "world_size": plan.world_size,
        "corpus": {"name": redact(corpus.name), "fingerprint": corpus.fingerprint},
        "heldout": {"name": redact(held_out.name), "fingerprint": held_out.fingerprint},
        "versions": versions(),
        "git": git_state(),
        "machine": {
            "node": platform.node(),
            "platform": platform.platform(),
            "cpu": cpu_model(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": device_name(plan.device),
            "cuda": torch.version.cuda,
        },
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)},
    }


def _attempts(path: Path) -> list[dict[str, Any]]:
    """Return the attempts in a run.json of any version, each as it is; none if the file is missing or damaged."""
    try:
        last = read_json(path)
    except (FileNotFoundError, ValueError):
        return []
    earlier = last.pop("earlier", [])
    return [last, *(earlier if isinstance(earlier, list) else [])]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages among PACKAGES and NVIDIA_PACKAGES."""
    found = {"python": platform.python_version()}
    names = {str(installed.name).lower().replace("_", "-") for installed in distributions()}
    for name in [*PACKAGES, *sorted(filter(NVIDIA_PACKAGES.fullmatch, names))]:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def cpu_model() -> str:
    """Return the CPU's name from Linux, or else from Python."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def git_state() -> dict[str, object] | None:
    """Return the commit of this checkout, and whether files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parents[3]
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        # A file's name may not be UTF-8.
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "changed": bool(git("status", "--porcelain"))} if commit else None
