"""Measure how much a checkpoint every 100 steps adds to the time of a run.

    python tests/benchmarks/bench_saving.py [--quick] [--json FILE]

In one process, windows of steps without a save alternate with windows that begin with a save, on the real loop, model
and optimizer at ZeRO stage 2. The difference is the cost of a save, including slower steps while it is written; if it
is not complete at the end of a window, the time until then counts too. Checkpoints go to the disk of the temporary
folder.
save_overhead: with run.async_save, the default. save_overhead_sync: without. --quick measures the size mini only.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# For the reason given in bench_train.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from support.corpus import write_text_shards
from support.report import read_arguments, write

from megabert.config.ds_config import read_ds_config
from megabert.config.recipe_parser import RecipeParser
from megabert.training import loop
from megabert.training.distributed.process import init_distributed
from megabert.training.distributed.signals import StopSignals
from megabert.training.plan import make_plan
from megabert.training.run import Run, build_run

REPOSITORY = Path(__file__).resolve().parents[2]
# Steps between two saves.
EVERY = 100
# Layers, hidden size, heads, MLP width; steps of a window, which must take longer than a save.
SIZES = {
    "mini": (4, 256, 4, 1024, 8),
    "small": (6, 512, 8, 2048, 5),
}
ROUNDS = 3


def run_flags(size: str, tokens: Path, out: Path) -> dict[str, object]:
    """Return the settings of a run on bins of 4,096 tokens with a vocabulary of 30,528."""
    layers, hidden, heads, width, _ = SIZES[size]
    return {
        "model.num_hidden_layers": layers, "model.hidden_size": hidden, "model.num_attention_heads": heads,
        "model.intermediate_size": width, "model.pad_vocab_to_multiple_of": 30_528, "data.max_seq_len": 512,
        "data.micro_batch_tokens": 4096, "data.global_batch_tokens": 4096, "data.train": tokens, "run.output_dir": out,
        "run.max_steps": 10_000, "run.eval_tokens": 4096,
    }  # fmt: skip


def open_run(size: str, tokens: Path, out: Path) -> Run:
    """Build a run as launch/pretrain.py does."""
    flags = run_flags(size, tokens, out)
    recipe, _ = RecipeParser("bench_saving.py").read([f"--{key}={value}" for key, value in flags.items()])
    ds_config = read_ds_config(REPOSITORY / "ds_configs/zero2.json")
    return build_run(make_plan(recipe, ds_config, *init_distributed()), StopSignals())


def window(run: Run, steps: int, save: bool) -> float:
    """Return the seconds of this many steps, with or without a save at their beginning."""
    started_at = time.perf_counter()
    if save:
        loop.save(run)
    for _ in range(steps):
        loop.set_learning_rate(run.engine, run.plan, run.state)
        loop.train_step(run)
    run.writer.wait()
    return time.perf_counter() - started_at


def overhead(run: Run, steps: int, overlap: bool) -> tuple[float, float, float]:
    """Return the seconds of a step, those that a save adds, and their share of EVERY steps: medians of ROUNDS."""
    run.writer.overlap = overlap
    plain, extra = [], []
    for _ in range(ROUNDS):
        plain.append(window(run, steps, save=False))
        extra.append(window(run, steps, save=True) - plain[-1])
    step, added = statistics.median(plain) / steps, statistics.median(extra)
    return step, added, added / (EVERY * step)


def main() -> None:
    options = read_arguments(__doc__ or "")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        tokens = write_text_shards(base)
        for size in ["mini"] if options.quick else list(SIZES):
            run = open_run(size, tokens, base / size)
            steps = SIZES[size][-1]
            # Before the first step the optimizer has no moments to save.
            window(run, 3, save=False)
            window(run, 1, save=True)
            files = next(path for path in run.plan.checkpoints.glob("step-*")).iterdir()
            mb = sum(path.stat().st_size for path in files) / 1e6
            for overlap, name in ((True, ""), (False, "_sync")):
                step, added, share = overhead(run, steps, overlap)
                figures |= {f"save_overhead{name}": share, f"save_s{name}": added}
                mode = "async_save" if overlap else "no async_save"
                print(
                    f"{size}, {mb:,.0f} MB, {mode}: a step takes {step:.2f} s, "
                    f"a save adds {added:.2f} s: {share:.1%} of {EVERY} steps",
                    flush=True,
                )
            run.reporter and run.reporter.close()
            del run
    write(figures, options.json)


if __name__ == "__main__":
    main()
