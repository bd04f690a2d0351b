"""Steps of a real run in this process, for accept.py: the host's waits for the device, or where the time goes.

python tests/gpu/steps.py waits|profile STAGE OUT [FLAG ...]
"""

import collections
import json
import sys
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megabert.config.ds_config import read_ds_config
from megabert.config.recipe_parser import RecipeParser
from megabert.training import loop
from megabert.training.distributed.accelerator import choose_accelerator
from megabert.training.run import Run

REPOSITORY = Path(__file__).resolve().parents[2]
# With one micro-batch in a step, its graph is captured in the fourth.
WARM_UP_STEPS = 4


def open_run(stage: str, flags: list[str]) -> Run:
    """Build a run as launch/pretrain.py does."""
    choose_accelerator()
    from megabert.training.distributed.process import init_distributed
    from megabert.training.distributed.signals import StopSignals
    from megabert.training.micro_batch.choose import resolve_micro_batch
    from megabert.training.plan import make_plan
    from megabert.training.run import build_run

    recipe, _ = RecipeParser("tests/gpu/steps.py").read(flags)
    ds_config = read_ds_config(REPOSITORY / f"ds_configs/zero{stage}.json")
    rank, world_size = init_distributed()
    recipe = resolve_micro_batch(recipe, ds_config, rank, world_size)
    return build_run(make_plan(recipe, ds_config, rank, world_size), StopSignals())


def step(run: Run) -> None:
    loop.set_learning_rate(run.engine, run.plan, run.state)
    loop.train_step(run)


def waits(run: Run) -> dict[str, object]:
    """Return the host's waits in one step, by the line that waits. torch reports them on a GPU only."""
    gpu = run.engine.device.type == "cuda"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if gpu:
            torch.cuda.set_sync_debug_mode("warn")
        step(run)
        if gpu:
            torch.cuda.set_sync_debug_mode("default")
    lines = [f"{warning.filename}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)]
    return {"waits": len(lines), "lines": dict(collections.Counter(lines).most_common())}


def where_time_goes(run: Run, out: Path) -> dict[str, object]:
    """Profile one step. Returns the fifteen operations or kernels that take longest, in ms."""
    gpu = run.engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        step(run)
    time_of = "self_device_time_total" if gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, time_of))
    profiler.export_chrome_trace(str(out / "trace.json"))
    return {"top_ms": {event.key[:80]: round(getattr(event, time_of) / 1000, 3) for event in events[:15]}}


def main() -> None:
    what, stage, out, *flags = sys.argv[1:]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    run = open_run(stage, [*flags, f"--run.output_dir={folder / 'run'}"])
    for _ in range(WARM_UP_STEPS):
        step(run)
    found = waits(run) if what == "waits" else where_time_goes(run, folder)
    (folder / f"{what}{stage}.json").write_text(json.dumps(found, indent=1))
    loop.shutdown(run.feed)


if __name__ == "__main__":
    main()
