"""Measure what the engine adds to a bare training loop, how two ranks scale, and the time to the first step.

    python tests/benchmarks/bench_engine.py [--quick] [--json FILE]

overhead: in one process, steps of a real run (loader, loop, metrics, DeepSpeed at ZeRO 2) alternate with steps of a
bare PyTorch loop: the same model class with weights of its own, batches of the same kind that are made ahead, bf16
autocast, fused AdamW, gradient clipping. The figure is the median ratio of a pair of steps, minus 1.
two_rank_efficiency: tokens per second of two ranks with one thread each, who share every batch, divided by those of
one rank with two threads. The commands alternate; of each the median step counts, and of the ratios the median.
first_step_s: from the command, on one rank, to the end of its first step of 8,192 tokens, with compiled operations
from the cache; first_step_cold_s: with an empty cache.
save_overhead: see bench_saving.py.
The size is 6 layers of 512 with 8 heads, on bins of 4,096 tokens with pieces of up to 512; with --quick 4 layers of
256.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# For the reason given in bench_train.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from bench_saving import SIZES, open_run, overhead, run_flags, window
from support.corpus import write_text_shards
from support.report import read_arguments, write

from megabert.data.batch import PackedBatch
from megabert.training import loop
from megabert.training.engine import build_model
from megabert.training.run import Run
from megabert.training.telemetry.reporter import read_metrics
from megabert.training.updates.optimizers import parameter_groups

REPOSITORY = Path(__file__).resolve().parents[2]
# For the commands; taken before the run in this process sets its rank and its port.
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
ROUNDS = 25
QUICK_ROUNDS = 7
# Pairs of commands, on one and on two ranks; one pair with --quick.
PAIRS = 3
# Steps of a command whose speed is measured; the first WARM_UP_STEPS do not count.
SPEED_STEPS = 12
QUICK_SPEED_STEPS = 7
WARM_UP_STEPS = 3


class BareLoop:
    """A minimal training loop: no loader, no ranks, no metrics."""

    def __init__(self, run: Run):
        recipe = run.plan.recipe
        self.bf16 = run.plan.ds_config.bf16
        self.model = build_model(recipe, run.feed.corpus.tokenizer, torch.device("cpu"), self.bf16).train()
        groups = parameter_groups(self.model, recipe.optimizer)
        settings = {"lr": recipe.optimizer.lr, "betas": recipe.optimizer.betas, "eps": recipe.optimizer.eps}
        self.optimizer = torch.optim.AdamW(groups, fused=True, **settings)
        self.max_norm = recipe.optimizer.max_grad_norm

    def step(self, batch: PackedBatch) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            output = self.model(**batch.model_inputs(torch.device("cpu")))
        (output.loss_sum / output.num_targets).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def engine_step(run: Run) -> None:
    """Do what train() of training/loop.py does per step, with a report after every step."""
    lr = loop.set_learning_rate(run.engine, run.plan, run.state)
    loop.train_step(run)
    loop.report(run, lr)


def seconds(work: Any, *arguments: Any) -> float:
    started_at = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started_at


def measure_overhead(run: Run, rounds: int) -> tuple[float, float, float]:
    """Return the overhead, and the seconds of a step of the engine and of the bare loop: medians."""
    bare = BareLoop(run)
    ahead = [batch for batch, _, _ in (next(run.feed) for _ in range(rounds + 1))]
    run.state.next_index += len(ahead)
    bare.step(ahead.pop())
    engine_step(run)
    ours, theirs = [], []
    for number, batch in enumerate(ahead):
        turns = [(ours, engine_step, run), (theirs, bare.step, batch)]
        for taken, work, argument in turns if number % 2 else turns[::-1]:
            taken.append(seconds(work, argument))
    share = statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) - 1
    return share, statistics.median(ours), statistics.median(theirs)


def command_of(size: str, tokens: Path, out: Path, ranks: int, *more: str) -> list[str]:
    launcher = (
        [sys.executable] if ranks == 1 else [str(Path(sys.executable).parent / "deepspeed"), f"--num_gpus={ranks}"]
    )
    flags = [f"--{key}={value}" for key, value in run_flags(size, tokens, out).items()]
    return [*launcher, "launch/pretrain.py", *flags, "--run.log_every_steps=1", *more]


class Timing(NamedTuple):
    """tokens_per_s: of the median step. first_step_s: from the command to the end of its first step."""

    tokens_per_s: float
    first_step_s: float


def time_command(size: str, tokens: Path, out: Path, ranks: int, steps: int, **environment: str) -> Timing:
    """Train for some steps of 8,192 tokens; several ranks have one thread each."""
    command = command_of(size, tokens, out, ranks, "--data.global_batch_tokens=8192", f"--run.max_steps={steps}")
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "2") if ranks == 1 else "1"
    first = None
    with open(out.with_suffix(".log"), "w+") as log:
        started_at = time.perf_counter()
        process = subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT | environment, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(0.05)
            if first is None and read_metrics(out / "metrics.jsonl"):
                first = time.perf_counter() - started_at
        log.seek(0)
        if process.returncode or first is None:
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read()}")
    speeds = [point["tokens_per_s"] for point in read_metrics(out / "metrics.jsonl") if "tokens_per_s" in point]
    return Timing(statistics.median(speeds[WARM_UP_STEPS:]), first)


def main() -> None:
    options = read_arguments(__doc__ or "")
    size = "mini" if options.quick else "small"
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        tokens = write_text_shards(base)
        run = open_run(size, tokens, base / "run")
        share, ours, theirs = measure_overhead(run, QUICK_ROUNDS if options.quick else ROUNDS)
        print(
            f"{size}: a step takes {1e3 * ours:.0f} ms, a bare loop's {1e3 * theirs:.0f} ms: overhead {share:+.1%}",
            flush=True,
        )
        figures = {"overhead": share}
        steps = SIZES[size][-1] // (2 if options.quick else 1)
        window(run, 1, save=True)
        _, added, figures["save_overhead"] = overhead(run, steps, overlap=True)
        print(f"a checkpoint adds {added:.2f} s: {figures['save_overhead']:.1%} of 100 steps", flush=True)
        assert run.reporter is not None, "this is rank 0"
        run.reporter.close()
        del run
        steps = QUICK_SPEED_STEPS if options.quick else SPEED_STEPS
        pairs = [
            [time_command(size, tokens, base / f"{ranks}-ranks-{number}", ranks, steps) for ranks in (1, 2)]
            for number in range(1 if options.quick else PAIRS)
        ]
        one, two = (
            statistics.median(command.tokens_per_s for command in commands) for commands in zip(*pairs, strict=True)
        )
        figures["two_rank_efficiency"] = statistics.median(
            both.tokens_per_s / alone.tokens_per_s for alone, both in pairs
        )
        print(
            f"one rank {one:,.0f} tokens/s, two ranks {two:,.0f}: {figures['two_rank_efficiency']:.0%}",
            flush=True,
        )
        figures["first_step_s"] = statistics.median(alone.first_step_s for alone, _ in pairs)
        print(f"first step {figures['first_step_s']:.1f} s after the command", flush=True)
        if not options.quick:
            empty = {"TORCHINDUCTOR_CACHE_DIR": str(base / "empty")}
            figures["first_step_cold_s"] = time_command(
                size, tokens, base / "cold", 1, WARM_UP_STEPS + 1, **empty
            ).first_step_s
            print(f"and {figures['first_step_cold_s']:.1f} s where nothing was compiled before", flush=True)
    write(figures, options.json)


if __name__ == "__main__":
    main()
