"""Steps of a real run in this process, for accept.py: the host's waits for the device, or where the time goes.

python tests/gpu/steps.py waits|profile STAGE OUT [FLAG ...]
"""

import collections
import contextlib
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

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
# The files through which a call to synchronize() passes: this one, and DeepSpeed's view of the device.
HANDS_ON = (__file__, "/deepspeed/accelerator/cuda_accelerator.py")


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


@contextlib.contextmanager
def waits_by_line() -> Iterator[list[str]]:
    """Collect the line of each wait of the host for the GPU, in order.

    torch's debug mode warns of reads, copies and streams, but not of torch.cuda.synchronize(), which DeepSpeed calls,
    nor of events.
    """
    lines: list[str] = []

    def show(message: Warning | str, category: type[Warning], filename: str, line: int, *_: object) -> None:
        # Not the notice that the debug mode itself is a prototype.
        if "called a synchronizing" in str(message):
            lines.append(f"{filename}:{line}")

    def counted(wait: Callable[..., None]) -> Callable[..., None]:
        def waiting(*arguments: Any, **options: Any) -> None:
            before = len(lines)
            wait(*arguments, **options)
            # Once, though torch warns of a stream's, too.
            lines[before:] = [line_of_caller()]

        return waiting

    with contextlib.ExitStack() as stack:
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            stack.enter_context(mock.patch.object(owner, "synchronize", counted(owner.synchronize)))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = show
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        yield lines


def line_of_caller() -> str:
    """Return the innermost line that is not in this file, nor in one that only hands a wait on to torch."""
    frames = (frame for frame in reversed(traceback.extract_stack()) if not frame.filename.endswith(HANDS_ON))
    frame = next(frames)
    return f"{frame.filename}:{frame.lineno}"


def waits(run: Run) -> dict[str, object]:
    """Return the host's waits for the GPU in one step, by line, and those before its last micro-batch began."""
    micro_batches: list[int] = []
    begin = run.engine.set_gradient_accumulation_boundary

    def begins(is_boundary: bool) -> None:
        micro_batches.append(len(lines))
        begin(is_boundary)

    with waits_by_line() as lines, mock.patch.object(run.engine, "set_gradient_accumulation_boundary", begins):
        step(run)
    return {
        "waits": len(lines),
        "micro_batches": len(micro_batches),
        "between": micro_batches[-1] - micro_batches[0],
        "lines": dict(collections.Counter(lines).most_common()),
    }


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
