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
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megabert.config.ds_config import read_ds_config
from megabert.config.recipe_parser import RecipeParser
from megabert.training import loop
from megabert.training.distributed.accelerator import choose_accelerator
from megabert.training.micro_batch import step as micro_batch_step
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
def at_each_micro_batch(begins: Callable[[], None]) -> Iterator[None]:
    """Call begins() before each micro-batch, whether the engine computes it or a CUDA graph."""
    seed_dropout = micro_batch_step.seed_dropout

    def seeding(seed: int, index: int) -> None:
        begins()
        seed_dropout(seed, index)

    with mock.patch.object(micro_batch_step, "seed_dropout", seeding):
        yield


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
        stack.enter_context(mock.patch.object(warnings, "showwarning", show))
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
    with waits_by_line() as lines, at_each_micro_batch(lambda: micro_batches.append(len(lines))):
        step(run)
    return {
        "waits": len(lines),
        "micro_batches": len(micro_batches),
        "between": micro_batches[-1] - micro_batches[0],
        "lines": dict(collections.Counter(lines).most_common()),
    }


class Work(NamedTuple):
    """A kernel or a copy on the device; without a GPU, an operation. In microseconds."""

    start: float
    end: float
    name: str


def activities(run: Run) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.engine.device.type == "cuda" else [])]


def device_work(profiler: profile, run: Run) -> list[Work]:
    """Return what the device did, in order."""
    on = DeviceType.CUDA if run.engine.device.type == "cuda" else DeviceType.CPU
    events = [event for event in profiler.events() or [] if event.device_type == on and not event.is_user_annotation]
    return sorted(Work(event.time_range.start, event.time_range.end, event.name) for event in events)


def gaps_after(work: list[Work]) -> list[tuple[float, str]]:
    """Return the microseconds in which the device had nothing to do, and after which work."""
    gaps, last = [], work[0]
    for one in work:
        if one.start > last.end:
            gaps.append((one.start - last.end, last.name))
        if one.end > last.end:
            last = one
    return gaps


def where_time_goes(run: Run, out: Path) -> dict[str, object]:
    """Profile one step. Returns the fifteen kernels that take longest and the fifteen longest gaps, in ms."""
    with profile(activities=activities(run)) as profiler:
        step(run)
    profiler.export_chrome_trace(str(out / "trace.json"))
    work = device_work(profiler, run)
    times: dict[str, float] = collections.defaultdict(float)
    for one in work:
        times[one.name[:80]] += one.end - one.start
    gaps = gaps_after(work)
    return {
        "top_ms": {name: round(times[name] / 1000, 3) for name in sorted(times, key=lambda n: -times[n])[:15]},
        "idle_percent": 100 * sum(gap for gap, _ in gaps) / (max(one.end for one in work) - work[0].start),
        "gaps_ms": [[round(gap / 1000, 3), f"after {name[:80]}"] for gap, name in sorted(gaps, reverse=True)[:15]],
    }


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
