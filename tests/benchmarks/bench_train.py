"""Compare the training speed of MegaBERT's MosaicBERT, BERT and ModernBERT with transformers' BERT and ModernBERT.

    python tests/benchmarks/bench_train.py [--quick] [--only ROW] [--runs N] [--json FILE]

It runs on a CPU, or on a GPU if there is one, where it has not been run yet. In one process the contenders take one
optimizer step each in turn, so that other load on the machine affects all of them. Each round also times the machine's
best bf16 matrix product of the model's shapes, of random numbers; the best round's rate is the peak. If the rounds'
rates differ by more than 10 %, the difference stands beside every MFU. The table has medians of the ratios per round.
Tokens are real tokens, never padding. Ratios also differ between processes, by more than between rounds: with --runs 5
each row is measured in five new processes, and the table has the medians and the range of the ratios.

ROW_vs_faster_hf_bert: against hf_bert with or without dropout on attention weights, whichever is faster.

Allocator and threads are torch's defaults, except that idle threads sleep instead of spinning (OMP_WAIT_POLICY): if
another process wants the cores, a spinning thread keeps the thread that it waits for from running, and steps take ten
times as long. On a GPU batches are eight times as large, and peak memory is the allocator's. MFU is the rate of needed
FLOPs (contenders.needed_flops) divided by the rate of the best matrix product.
"""

import ctypes
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

# torch reads this when it loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from support import report
from support.contenders import DEVICE, ROWS, Contender, Row, hf_bert, hf_modernbert, needed_flops, ours

from megabert.kernels.cpu.cross_entropy import free_workspaces
from megabert.process.subprocesses import exit_with_parent

QUICK_ROWS = ("quickstart", "mini_128", "mini_512", "small_512")
MOST_ROUNDS = 15
# Of the rate of the best matrix product between rounds; a run with more says so.
MOST_VARIATION = 0.1
# A row starts no new round after this many seconds, but has at least three rounds, with --quick at least one.
SECONDS = 40.0
QUICK_SECONDS = 3.0


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def gemm_gflops(row: Row) -> float:
    """Return the best rate of the model's bf16 matrix products: forward and both gradients of each of its shapes.

    The operands are random, because products of constants run faster on GPUs, whose clock follows their power. On a GPU
    one measurement is many products, so that starting them costs nothing.
    """
    times = 20 if DEVICE.type == "cuda" else 1
    masked = round(0.3 * row.tokens)
    wide, narrow = 2 * row.ffn, row.ffn
    shapes = [(row.tokens, row.hidden, 3 * row.hidden), (row.tokens, row.hidden, row.hidden)]
    shapes += [(row.tokens, row.hidden, wide), (row.tokens, narrow, row.hidden), (masked, row.hidden, row.vocab)]
    best = 0.0
    for tokens, width, out in shapes:
        x, weight, grad, result = (
            torch.randn(shape, device=DEVICE).bfloat16()
            for shape in ((tokens, width), (out, width), (tokens, out), (tokens, out))
        )
        to_x, to_weight = torch.empty_like(x), torch.empty_like(weight)
        products = [(x, weight.t(), result), (grad, weight, to_x), (grad.t(), x, to_weight)]
        for a, b, into in products:
            taken = min(seconds(lambda a=a, b=b, into=into: multiply(a, b, into, times)) for _ in range(3))
            best = max(best, times * 2 * tokens * width * out / taken / 1e9)
    return best


def multiply(a: torch.Tensor, b: torch.Tensor, into: torch.Tensor, times: int) -> None:
    for _ in range(times):
        torch.mm(a, b, out=into)


def peak_of(gemms: list[float]) -> tuple[float, str]:
    """Return the best rate over rounds, and what stands beside an MFU: how far the rates differ, where they do."""
    lowest, highest = min(gemms), max(gemms)
    if lowest >= (1 - MOST_VARIATION) * highest:
        return highest, ""
    return highest, f" (peak varied by {1 - lowest / highest:.0%})"


def resident_mb(field: str) -> float:
    """Return VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field}")


def held_mb(contender: Contender) -> float:
    """Return the size of the weights and the optimizer's state."""
    states = contender.optimizer.state.values()
    held = [*contender.model.parameters(), *(value for state in states for value in state.values())]
    return sum(tensor.numel() * tensor.element_size() for tensor in held) / 2**20


def peak_mb(contender: Contender, batches: list[dict]) -> float:
    """Return held_mb() plus the most that one step adds: gradients, activations, scratch.

    The step may be the first, which allocates the optimizer's state.
    """
    held = held_mb(contender)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.step(batches)
        return held + (torch.cuda.max_memory_allocated() - before) / 2**20
    free_workspaces()
    ctypes.CDLL(None).malloc_trim(0)
    # Resets the high-water mark.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mb("VmRSS")
    contender.step(batches)
    return held + resident_mb("VmHWM") - before


def contenders_of(name: str, row: Row, quick: bool) -> list[Contender]:
    """Build MegaBERT's model first, then what the figures compare it with.

    Activation checkpointing and MegaBERT's BERT run at one size each.
    """
    if row.family == "modernbert":
        return [ours("modernbert", row), hf_modernbert(row)._replace(name="hf_modernbert, same architecture")]
    chosen = [ours("mosaicbert", row), hf_bert(row, attention_dropout=0.0), hf_bert(row), hf_modernbert(row)]
    if name == "base_128":
        chosen.append(ours("bert, unpadded", row))
    if name == "mini_128" and not quick:
        chosen.append(ours("mosaicbert, every layer recomputed", row, checkpoint_every=1))
    return chosen


class Rounds(NamedTuple):
    """Each contender's rates in each round. gflops: of needed FLOPs; gemms: of the best matrix product."""

    tokens_per_s: list[list[float]]
    gflops: list[list[float]]
    gemms: list[float]


def take_turns(row: Row, contenders: list[Contender], rng: np.random.Generator, least: int, limit_s: float) -> Rounds:
    rounds = Rounds([[] for _ in contenders], [[] for _ in contenders], [])
    began = time.perf_counter()
    for number in range(MOST_ROUNDS):
        if number >= least and time.perf_counter() - began > limit_s:
            break
        rounds.gemms.append(gemm_gflops(row))
        for index, contender in enumerate(contenders):
            batches, lengths = contender.draw(rng)
            taken = seconds(lambda contender=contender, batches=batches: contender.step(batches))
            rounds.tokens_per_s[index].append(sum(lengths) / taken)
            needed = needed_flops(contender.architecture, lengths)
            rounds.gflops[index].append(needed / taken / 1e9)
    return rounds


class Line(NamedTuple):
    """A line of the table, of one run. ratio: by how much the row's first contender is faster."""

    contender: str
    tokens_per_s: float
    ratio: float
    mfu: float
    peak_mb: float


class Run(NamedTuple):
    """What one process measured of a row. gemms: rates of the best matrix product, GFLOP/s."""

    figures: dict[str, float]
    lines: list[Line]
    gemms: list[float]


def run_row(name: str, quick: bool) -> Run:
    """Measure one size."""
    torch.manual_seed(17)
    row = ROWS[name]
    contenders = contenders_of(name, row, quick)
    rng = np.random.default_rng(17)
    for contender in contenders:
        if contender.compiles or DEVICE.type == "cuda":
            contender.step(contender.draw(rng)[0])
    peaks = [peak_mb(contender, contender.draw(rng)[0]) for contender in contenders]
    rounds = take_turns(row, contenders, rng, least=1 if quick else 3, limit_s=QUICK_SECONDS if quick else SECONDS)
    peak = max(rounds.gemms)
    lines = [
        Line(
            contender=contenders[index].name,
            tokens_per_s=statistics.median(speeds := rounds.tokens_per_s[index]),
            ratio=median_ratio(rounds.tokens_per_s[0], speeds),
            mfu=statistics.median(rounds.gflops[index]) / peak,
            peak_mb=peaks[index],
        )
        for index in order_of(contenders, rounds.tokens_per_s)
    ]
    figures = ratio_figures(name, [contender.name for contender in contenders], rounds.tokens_per_s) | {
        f"{name}_mfu": lines[0].mfu,
        f"{name}_tokens_per_s": lines[0].tokens_per_s,
        f"{name}_peak_mb": lines[0].peak_mb,
    }
    return Run(figures, lines, rounds.gemms)


def run_in_new_process(name: str, quick: bool) -> Run:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), exit_with_parent) as pool:
        return pool.submit(run_row, name, quick).result()


def table_lines(name: str, runs: Sequence[Run]) -> list[str]:
    """Return a row's lines of the table: medians over runs, and the range of the ratios if there are several."""
    doubt = peak_of([rate for run in runs for rate in run.gemms])[1]
    found = []
    for first in runs[0].lines:
        lines = [line for run in runs for line in run.lines if line.contender == first.contender]
        ratios = [line.ratio for line in lines]
        faster = f"{statistics.median(ratios):.2f}"
        if len(runs) > 1:
            faster += f" ({min(ratios):.2f} to {max(ratios):.2f})"
        is_ours = first is runs[0].lines[0]
        found.append(
            f"| {name if is_ours else ''} | {first.contender} "
            f"| {statistics.median(line.tokens_per_s for line in lines):,.0f} | {'' if is_ours else faster} "
            f"| {100 * statistics.median(line.mfu for line in lines):.0f} %{doubt} "
            f"| {statistics.median(line.peak_mb for line in lines):,.0f} |"
        )
    return found


def median_figures(runs: Sequence[Run]) -> dict[str, float]:
    """Return each figure's median over runs. Of several runs, ratios also have _lowest and _highest."""
    figures: dict[str, float] = {}
    for key in runs[0].figures:
        values = [run.figures[key] for run in runs]
        figures[key] = statistics.median(values)
        if len(runs) > 1 and "_vs_" in key:
            figures |= {f"{key}_lowest": min(values), f"{key}_highest": max(values)}
    return figures


def median_ratio(fast: list[float], slow: list[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(fast, slow, strict=True))


def order_of(contenders: list[Contender], speeds: list[list[float]]) -> list[int]:
    """Return the order of the table: ours, the faster hf_bert, the other one, the rest."""
    order = list(range(len(contenders)))
    berts = [index for index in order if contenders[index].name.startswith("hf_bert")]
    berts.sort(key=lambda index: -statistics.median(speeds[index]))
    return [0, *berts, *(index for index in order[1:] if index not in berts)]


def ratio_figures(name: str, contenders: list[str], speeds: list[list[float]]) -> dict[str, float]:
    """Return the figures that are ratios of speeds. contenders: their names; speeds: of each in each round."""
    by_name = dict(zip(contenders, speeds, strict=True))
    ours_speeds = speeds[0]
    figures = {
        f"{name}_vs_{suffix}": median_ratio(ours_speeds, by_name[contender])
        for contender, suffix in (
            ("hf_bert", "hf_bert"),
            ("hf_bert, no attention dropout", "hf_bert_no_attention_dropout"),
            ("hf_modernbert", "hf_modernbert"),
            ("hf_modernbert, same architecture", "hf_modernbert_same"),
        )
        if contender in by_name
    }
    if "hf_bert" in by_name:
        figures[f"{name}_vs_faster_hf_bert"] = min(
            figures[f"{name}_vs_hf_bert"], figures[f"{name}_vs_hf_bert_no_attention_dropout"]
        )
    if "bert, unpadded" in by_name:
        figures[f"{name}_bert_vs_hf_bert"] = median_ratio(by_name["bert, unpadded"], by_name["hf_bert"])
    return figures


def torch_facts() -> dict[str, object]:
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    quick = "few rounds, without base and modernbert: about 80 s on two cores"
    parser = report.make_parser(__doc__ or "", quick)
    parser.add_argument("--only", choices=ROWS, help="measure this size only")
    parser.add_argument("--runs", type=int, choices=range(1, 10), metavar="N", default=1, help="processes per row")
    options = parser.parse_args()
    names = [options.only] if options.only else QUICK_ROWS if options.quick else list(ROWS)
    print(", ".join(f"{name} {value}" for name, value in (report.machine() | torch_facts()).items()), flush=True)
    print("| size | contender | real tokens/s | the first is faster by | MFU | peak MB |\n|---|---|---|---|---|---|")
    figures: dict[str, float] = {}
    best = 0.0
    measure = run_row if options.runs == 1 else run_in_new_process
    for name in names:
        runs = [measure(name, options.quick) for _ in range(options.runs)]
        figures |= median_figures(runs)
        best = max(best, *(rate for run in runs for rate in run.gemms))
        print("\n".join(table_lines(name, runs)), flush=True)
    print(f"\nbest bf16 matrix product: {best:,.0f} GFLOP/s")
    report.write(figures | {"gemm_peak_gflops": best}, options.json, **torch_facts())


if __name__ == "__main__":
    main()
