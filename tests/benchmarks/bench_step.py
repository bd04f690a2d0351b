"""Say where the time of a training step goes: a table of its parts, on one thread of a CPU.

    python tests/benchmarks/bench_step.py [--only ROW] [--quick] [--json FILE]

quickstart is the quickstart's recipe through the real loop, with loader, DeepSpeed and metrics, on generated
sentences; the other rows are the steps of bench_train.py. Each operation counts once, with the time that is not that
of an operation inside it. The n-th call of an operation with the same shapes counts with the lower quartile over the
steps, so that other load on the machine hardly changes the table. The profiler itself takes time, too.
"""

import collections
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Read when torch loads OpenMP.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from support import contenders, report
from support.corpus import write_text_shards
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from megabert.config.ds_config import read_ds_config
from megabert.config.recipe_parser import RecipeParser
from megabert.training import loop
from megabert.training.distributed.process import init_distributed
from megabert.training.distributed.signals import StopSignals
from megabert.training.engine import model_of
from megabert.training.plan import make_plan
from megabert.training.run import build_run

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = "quickstart"
ROWS = (RUN, "mini_128", "mini_512", "small_512", "base_128")
QUICK_ROWS = (RUN, "mini_128")
WARM_UP = 3
PRODUCTS = ("aten::mm", "aten::addmm", "aten::linear", "mkldnn::_linear_pointwise", "mkldnn::_reorder_linear_weight")
PLAN, DATA, SYNC, STEP, ENGINE = "plan of attention", "data", "agreement of ranks, metrics", "step", "engine"
# A part's name, and what begins the names of its operations or of those around them. The first part that fits counts.
PARTS: list[tuple[str, tuple[str, ...]]] = [
    (DATA, (DATA, "enumerate(DataLoader)")),
    (SYNC, (SYNC,)),
    (PLAN, (PLAN,)),
    ("attention", ("BucketAttention", "RotateBackward", "Rotate")),
    ("loss, without its products", ("MaskedCrossEntropy",)),
    ("LayerNorm, GeGLU, embeddings", ("AddNorm", "Geglu", "EmbedNorm", "aten::layer_norm", "NativeLayerNorm")),
    ("optimizer", ("Optimizer.",)),
    ("gradients: hooks, copies and norm of the engine", ("torch::autograd::AccumulateGrad", ENGINE, "c10d::")),
    ("autocast's casts", ("aten::to", "ToCopyBackward")),
]
OTHER, PYTHON = "other operations", "Python between operations"


def part_of(event: FunctionEvent) -> str:
    """Return the part that an event's own time belongs to."""
    names = []
    around: FunctionEvent | None = event
    while around is not None:
        names.append(around.name.removeprefix("autograd::engine::evaluate_function: "))
        around = around.cpu_parent
    in_attention = any(name.startswith("BucketAttention") for name in names)
    if names[0] in PRODUCTS and not in_attention:
        return "matrix products"
    if names[0] == STEP:
        return PYTHON
    for part, beginnings in PARTS:
        if any(name.startswith(beginnings) for name in names):
            return part
    return OTHER


def account(step: Callable[[], object], steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Profile steps. Returns the milliseconds and the calls of each part, per step."""
    for _ in range(WARM_UP):
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as recorded:
        for _ in range(steps):
            with record_function(STEP):
                step()
    events = sorted(recorded.events() or [], key=lambda event: event.time_range.start)
    groups: dict[tuple[str, str, str, int], list[float]] = collections.defaultdict(list)
    # In the current step.
    seen: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for event in events:
        if event.name == STEP:
            seen.clear()
        key = part_of(event), event.name, str(event.input_shapes)
        groups[*key, seen[key]].append(event.self_cpu_time_total)
        seen[key] += 1
    times: dict[str, float] = collections.defaultdict(float)
    calls: dict[str, float] = collections.defaultdict(float)
    for (part, _, _, _), taken in groups.items():
        times[part] += len(taken) * float(np.quantile(taken, 0.25)) / 1e3 / steps
        calls[part] += len(taken) / steps
    return dict(times), dict(calls)


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function under a name that the profile shows."""

    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(name):
            return function(*arguments, **options)

    return call


def run_step(folder: Path) -> Callable[[], object]:
    """Open a run of the quickstart's recipe, and return its step. The vocabulary has the quickstart's size."""
    # Chunks of the quickstart's size: a chunk of a tiny corpus is read by many streams, which costs as much as a step.
    tokens = write_text_shards(folder, texts=10_000, chunk_tokens=65_536)
    flags = {
        "data.train": tokens, "run.output_dir": folder / "run", "run.max_tokens": 10**9,
        "model.pad_vocab_to_multiple_of": 8192, "run.eval_tokens": 4096,
    }  # fmt: skip
    recipe, _ = RecipeParser("bench_step.py").read(["--recipe", RUN, *(f"--{k}={v}" for k, v in flags.items())])
    ds_config = read_ds_config(REPOSITORY / "ds_configs/zero0.json")
    run = build_run(make_plan(recipe, ds_config, *init_distributed()), StopSignals())
    encoder: Any = model_of(run.engine).bert.encoder
    encoder._plan = named(PLAN, encoder._plan)
    engine: Any = run.engine
    engine.step = named(ENGINE, engine.step)
    own = {name: named(part, getattr(loop, name)) for name, part in PARTS_OF_LOOP.items()}

    def step() -> None:
        lr = loop.set_learning_rate(run.engine, run.plan, run.state)
        loaded = own["next_batches"](run)
        num_masked = own["sum_masked"](loaded, run.plan.world_size, run.engine.device)
        batches, before = loop.advance_positions(run.state, loaded, run.plan.schedule)
        own["reduce_counts"](run, batches, before, loop.take_step(run, batches, num_masked))
        if run.state.step % recipe.run.log_every_steps == 0:
            own["report"](run, lr)

    return step


PARTS_OF_LOOP = {"next_batches": DATA, "sum_masked": SYNC, "reduce_counts": SYNC, "report": SYNC}


def model_step(name: str) -> Callable[[], object]:
    """Return the step of a row of bench_train.py, on batches that are drawn before the step's time begins."""
    contender = contenders.ours("mosaicbert", contenders.ROWS[name])
    encoder: Any = contender.model.bert.encoder  # type: ignore[union-attr]
    encoder._plan = named(PLAN, encoder._plan)
    rng = np.random.default_rng(17)
    draws: Iterator[list[dict]] = (contender.draw(rng)[0] for _ in range(1 << 30))
    draw = named(DATA, lambda: next(draws))
    return lambda: contender.step(draw())


def table(name: str, times: dict[str, float], calls: dict[str, float]) -> list[str]:
    total = sum(times.values())
    rows = sorted(times, key=lambda part: -times[part])
    lines = [f"| {name} | whole step | | {total:,.1f} | |"]
    return lines + [
        f"| | {part} | {calls[part]:,.0f} | {times[part]:,.1f} | {times[part] / total:.0%} |" for part in rows
    ]


def main() -> None:
    parser = report.make_parser(__doc__ or "", quick="few steps of the two smallest rows")
    parser.add_argument("--only", choices=ROWS, help="one row only")
    options = parser.parse_args()
    torch.manual_seed(17)
    figures: dict[str, float] = {}
    print("| row | part | calls | ms | share |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in [options.only] if options.only else QUICK_ROWS if options.quick else ROWS:
            step = run_step(Path(folder)) if name == RUN else model_step(name)
            times, calls = account(step, 5 if options.quick or name == "base_128" else 20)
            print("\n".join(table(name, times, calls)), flush=True)
            total = sum(times.values())
            figures |= {f"{name}_{part.split(',')[0].split(':')[0]}_share": ms / total for part, ms in times.items()}
            figures[f"{name}_step_ms"] = total
    report.write(figures, options.json)


if __name__ == "__main__":
    main()
