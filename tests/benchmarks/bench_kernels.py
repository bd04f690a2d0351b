"""Times each kernel against PyTorch, eager and compiled. Without a GPU it prints a theoretical estimate.

    python tests/benchmarks/bench_kernels.py [--quick] [--json FILE]

The shapes are those of MosaicBERT-Base on 8,192 tokens, 30 % of them masked, in documents of 128 tokens, then of 512.
Each figure is the median of many runs of forward and backward together, in bf16 autocast. --quick times fewer runs.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from support import report

TOKENS, MASKED, HIDDEN, WIDTH, VOCAB, HEADS, LAYERS = 8192, 2458, 768, 3072, 30_528, 12, 12
HEAD_DIM = HIDDEN // HEADS
DROPOUT = 0.1

# Peak bf16 FLOP/s and bytes/s, from NVIDIA's data sheets. That 85 % of the bandwidth and 65 % of the FLOP/s can be
# reached is an assumption.
GPUS = {"A100": (312e12, 2.0e12), "H100": (989e12, 3.35e12)}  # A100-80GB, H100 SXM
REACHABLE_BYTES, REACHABLE_FLOPS = 0.85, 0.65


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of an operation, forward and backward: bytes by the kernel's docstring, FLOPs of its matrix products."""

    moved_bytes: float
    flops: float = 0.0


def attention_work(length: int) -> Work:
    rows, columns = -(-length // 128), -(-length // 64)
    again = rows * 2 * HEAD_DIM * 2
    backward = 8 * HEAD_DIM * 2 + 4
    if length > 128:
        backward += 4 + again + columns * (2 * HEAD_DIM * 2 + 8)
    products = 2 + (5 if length <= 128 else 7)
    return Work(
        moved_bytes=TOKENS * HEADS * (2 * HEAD_DIM * 2 + 4 + again + backward),
        flops=products * 2 * TOKENS * length * HIDDEN,
    )


WORK = {
    "geglu": Work(moved_bytes=TOKENS * 8 * WIDTH * 2),
    "add_layer_norm": Work(moved_bytes=TOKENS * (HIDDEN * (3 + 5) * 2 + 16)),
    "embed_layer_norm": Work(
        moved_bytes=TOKENS * (HIDDEN * (2 * 4 + 2 + 2 * 4 + 2 * 2 + 2 * 2) + 80) + VOCAB * HIDDEN * 4
    ),
    "masked_cross_entropy": Work(moved_bytes=MASKED * 3 * VOCAB * 2, flops=3 * 2 * MASKED * HIDDEN * VOCAB),
    "attention_128": attention_work(128),
    "attention_512": attention_work(512),
}


def bound_s(work: Work, gpu: str) -> float:
    """Return the time at the reachable rates, without overlap. Repeated reads count as reads from memory."""
    flops, bandwidth = GPUS[gpu]
    return work.moved_bytes / (bandwidth * REACHABLE_BYTES) + work.flops / (flops * REACHABLE_FLOPS)


def model_bound(gpu: str, elements: int) -> float:
    """Return the tokens/s of a training step in which each layer moves `elements` bf16 numbers per hidden unit.

    The traffic of the matrix products is not counted.
    """
    flops, bandwidth = GPUS[gpu]
    layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDTH) + 4 * 128 * HIDDEN
    forward = LAYERS * layer + MASKED / TOKENS * 2 * (HIDDEN * HIDDEN + HIDDEN * VOCAB)
    moved = LAYERS * elements * HIDDEN * 2
    return 1 / (3 * forward / (flops * REACHABLE_FLOPS) + moved / (bandwidth * REACHABLE_BYTES))


def estimate() -> dict[str, float]:
    print("Theoretical estimate, not run on a GPU.\n")
    print("| operation, forward + backward | MB | GFLOP | " + " | ".join(f"{gpu}, us" for gpu in GPUS) + " |")
    print("|---|---|---|" + "---|" * len(GPUS))
    figures = {}
    for name, work in WORK.items():
        times = {gpu: bound_s(work, gpu) * 1e6 for gpu in GPUS}
        figures |= {f"estimate_{name}_{gpu.lower()}_us": time for gpu, time in times.items()}
        cells = " | ".join(f"{time:.0f}" for time in times.values())
        print(f"| {name} | {work.moved_bytes / 1e6:.1f} | {work.flops / 1e9:.1f} | {cells} |")
    # Numbers moved per hidden unit and layer: by eager operations, counted one by one; by fused ones, from the
    # docstrings.
    print("\n| MosaicBERT-Base, S = 128, tokens/s, estimate | " + " | ".join(GPUS) + " |\n|---|" + "---|" * len(GPUS))
    for label, elements in (("operation by operation", 147), ("fused", 49)):
        bounds = {gpu: model_bound(gpu, elements) for gpu in GPUS}
        key = label.split()[0]
        figures |= {f"estimate_{key}_{gpu.lower()}_tokens_per_s": x for gpu, x in bounds.items()}
        print(f"| {label} | " + " | ".join(f"{x / 1000:,.0f}k" for x in bounds.values()) + " |")
    return figures


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


def contenders() -> dict[str, dict[str, Callable[[], torch.Tensor]]]:
    """Return operation -> implementation -> a call that returns a scalar to differentiate."""
    from megabert.kernels.resolve import inspect_machine, torch_ops, triton_ops
    from megabert.model.alibi import alibi_slopes
    from megabert.model.attention import PLANNERS
    from megabert.model.padding import Sequences

    x, residual, gated = leaf(TOKENS, HIDDEN), leaf(TOKENS, HIDDEN), leaf(TOKENS, 2 * WIDTH)
    weight, bias = leaf(HIDDEN, dtype=torch.float32), leaf(HIDDEN, dtype=torch.float32)
    ids = [torch.randint(VOCAB, (TOKENS,), device="cuda"), torch.zeros(TOKENS, device="cuda", dtype=torch.long)]
    tables = [leaf(VOCAB, HIDDEN, dtype=torch.float32), leaf(2, HIDDEN, dtype=torch.float32)]
    hidden, decoder_bias = leaf(MASKED, HIDDEN), leaf(VOCAB, dtype=torch.float32)
    labels = torch.randint(VOCAB, (MASKED,), device="cuda")
    options = {"eps": 1e-12, "dropout_p": DROPOUT, "low_precision": True}

    def calls(ops) -> dict[str, Callable[[], torch.Tensor]]:
        return {
            "geglu": lambda: ops.geglu(gated, DROPOUT).sum(),
            "add_layer_norm": lambda: ops.add_layer_norm(x, residual, weight, bias, **options).sum(),
            "embed_layer_norm": lambda: ops.embed_layer_norm(ids, tables, weight, bias, **options).sum(),
            "masked_cross_entropy": lambda: ops.masked_cross_entropy(hidden, tables[0], decoder_bias, labels).loss_sum,
        }

    plain = calls(torch_ops())
    found = {name: {"Triton": call, "eager": plain[name]} for name, call in calls(triton_ops()).items()}
    for name, call in plain.items():
        found[name]["compiled"] = torch.compile(call)
    planners = {"Triton": triton_ops().attention, "eager": PLANNERS["sdpa"]}
    if not inspect_machine(torch.device("cuda")).lacks("flash_attn"):
        planners["flash-attn"] = PLANNERS["flash_attention_2"]
    qkv, slopes = leaf(TOKENS, 3, HEADS, HEAD_DIM), alibi_slopes(HEADS).cuda()
    for length in (128, 512):
        sequences = Sequences(torch.arange(0, TOKENS + 1, length, device="cuda", dtype=torch.int32), length)
        found[f"attention_{length}"] = {
            name: (lambda planner=planner, s=sequences: planner(s, slopes, HEAD_DIM)(qkv, 0.0).sum())
            for name, planner in planners.items()
            if planner is not None
        }
    return found


def time_s(call: Callable[[], torch.Tensor], repeats: int) -> float:
    """Return the median time of forward and backward, with a cold L2 cache, as inside a model."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times = []
    for repeat in range(repeats + 5):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        with torch.autocast("cuda", torch.bfloat16):
            loss = call()
        loss.backward()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 5:
            times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def measure(repeats: int) -> dict[str, float]:
    print(f"{torch.cuda.get_device_name()}: forward + backward, median of {repeats}\n")
    print(
        "| operation | implementation | us | GB/s of the formula's bytes | speed-up over eager |\n|---|---|---|---|---|"
    )
    figures = {}
    for operation, implementations in contenders().items():
        times = {name: time_s(call, repeats) for name, call in implementations.items()}
        for name, seconds in times.items():
            figures[f"{operation}_{name.lower().replace('-', '_')}_us"] = seconds * 1e6
            rate = WORK[operation].moved_bytes / seconds / 1e9
            print(f"| {operation} | {name} | {seconds * 1e6:.0f} | {rate:.0f} | {times['eager'] / seconds:.2f} |")
        figures[f"{operation}_vs_eager"] = times["eager"] / times["Triton"]
    return figures


def main() -> None:
    arguments = report.read_arguments(__doc__ or "")
    gpu = torch.cuda.is_available()
    figures = measure(10 if arguments.quick else 50) if gpu else estimate()
    report.write(figures, arguments.json, gpu=torch.cuda.get_device_name() if gpu else "none: theoretical estimate")


if __name__ == "__main__":
    main()
