"""Time each kernel against PyTorch, eager and compiled. Without a GPU, print a theoretical estimate.

    python tests/benchmarks/bench_kernels.py [--quick] [--json FILE]

It then compiles all kernels for three generations of GPUs and prints their registers, shared memory and resident warps.
The estimate also counts what Liger's fused linear cross-entropy, if it is installed, and FlexAttention would do.

The shapes are those of MosaicBERT-Base on 8,192 tokens, 30 % of them masked, in documents of 128 tokens, then of 512.
Each figure is the median of many replays of a CUDA graph of forward and backward, in bf16 autocast. --quick times fewer
runs, and compiles for one generation.
"""

import statistics
import sys
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from support import report

sys.path.append(str(Path(__file__).resolve().parents[2]))

from megabert.config.recipe_parser import load_recipe
from megabert.kernels.resolve import inspect_machine, torch_ops, triton_ops
from megabert.model.attention import PLANNERS, Planner
from megabert.model.ops import Ops, alibi_slopes
from megabert.model.padding import Sequences
from megabert.training.roofline.estimate import predict_recipe
from megabert.training.roofline.work import ATTENTION, ATTENTION_FALL, ROWS, Operation
from megabert.training.telemetry.cards import card_named

TOKENS, MASKED, HIDDEN, WIDTH, VOCAB, HEADS = 8192, 2458, 768, 3072, 30_528, 12
HEAD_DIM = HIDDEN // HEADS
# Of BERT's own tokenizer, which is not a multiple of 8.
BERT_VOCAB = 30_522
DROPOUT = 0.1
# Equal sets of inputs that are used in turn: together more than the caches of an H100 or B200 hold.
SETS = 3

GPUS = ("A100", "H100")
# Triton's speed relative to cuBLAS's in published measurements on an H100; sources in megabert/kernels/README.md.
PRODUCTS_OF_TRITON = (0.76, 0.92, 0.97)


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


def bound_s(operation: str, gpu: str) -> float:
    """Return the time that launch/estimate.py assumes. Repeated reads count as reads from memory."""
    work, shares = WORK[operation], {}
    if operation.startswith("attention"):
        shares = {"share": ATTENTION, "fall": ATTENTION_FALL}
    elif operation == "add_layer_norm":
        shares = {"bandwidth": ROWS}
    one = Operation(name=operation, flops=work.flops, moved_bytes=work.moved_bytes, **shares)
    return one.seconds(card_named(gpu))


def estimate() -> dict[str, float]:
    print("Theoretical estimate, not run on a GPU.\n")
    print("| operation, forward + backward | MB | GFLOP | " + " | ".join(f"{gpu}, us" for gpu in GPUS) + " |")
    print("|---|---|---|" + "---|" * len(GPUS))
    figures = {}
    for name, work in WORK.items():
        times = {gpu: bound_s(name, gpu) * 1e6 for gpu in GPUS}
        figures |= {f"estimate_{name}_{gpu.lower()}_us": time for gpu, time in times.items()}
        cells = " | ".join(f"{time:.0f}" for time in times.values())
        print(f"| {name} | {work.moved_bytes / 1e6:.1f} | {work.flops / 1e9:.1f} | {cells} |")
    return figures


def geglu_in_products(gpu: str = "H100") -> dict[str, float]:
    """Predict training with GeGLU inside the products before and after it, in Triton, for shares of cuBLAS's speed.

    The up-projection's forward pass would write GeGLU's result too, and the down-projection's gradient the gate's and
    the value's: 4 F of the 8 F numbers per token are left. These two products are a quarter of the layers'.
    """
    recipe = load_recipe("mosaicbert-base")
    now = predict_recipe(recipe, card_named(gpu), 1, 1)
    saved, model = now.seconds["MLP's activation"] / 2, recipe.model
    gated = 6 * model.hidden_size * model.intermediate_size
    slower = now.seconds["layers' products"] * gated / (24 * model.hidden_size**2 + 3 * gated)
    even = slower / (slower + saved)
    print(f"\nGeGLU in its products, mosaicbert-base on one {gpu}, predicted: {saved * 1000:.1f} ms of a step's")
    print(f"{now.step_s * 1000:.1f} ms less for the activation; lost again at {100 * even:.0f} % of cuBLAS's speed.\n")
    print("| speed of Triton's products | tokens/s |\n|---|---|")
    figures = {"geglu_in_products_break_even": even}
    for share in PRODUCTS_OF_TRITON:
        gain = now.step_s / (now.step_s - saved + slower * (1 / share - 1)) - 1
        figures[f"geglu_in_products_gain_at_{100 * share:.0f}"] = gain
        print(f"| {100 * share:.0f} % of cuBLAS's | {100 * gain:+.1f} % |")
    return figures


def compare_libraries() -> dict[str, float]:
    if find_spec("triton") is None:
        return {}
    from support.libraries import compare

    return compare(MASKED, HIDDEN, BERT_VOCAB, TOKENS, HEADS)


def compile_kernels(quick: bool) -> dict[str, float]:
    if find_spec("triton") is None:
        return {}
    from support.occupancy import print_table, print_tiles_of_short

    return print_table(["sm_90a"]) if quick else print_table() | print_tiles_of_short()


class Contender(NamedTuple):
    """One implementation. forward takes the leaves; leaves: what backward computes gradients of."""

    forward: Callable[..., torch.Tensor]
    leaves: list[torch.Tensor]


def implementations(device: torch.device) -> dict[str, tuple[Ops, Planner]]:
    """Return the implementations that this device has: operations, and the planner of attention."""
    plain = torch_ops()
    found: dict[str, tuple[Ops, Planner]] = {"eager": (plain, PLANNERS["sdpa"])}
    if device.type == "cuda":
        fused = triton_ops()
        assert fused.attention is not None, "Triton's operations have no attention"
        found = {"Triton": (fused, fused.attention), **found}
        if not inspect_machine(device).lacks("flash_attn"):
            found["flash-attn"] = (plain, PLANNERS["flash_attention_2"])
    return found


def contenders(device: torch.device, tokens: int = TOKENS) -> dict[str, dict[str, Contender]]:
    """Return operation -> implementation -> contender, with random inputs."""

    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    masked, fp32 = max(1, round(MASKED / TOKENS * tokens)), torch.float32
    norm = [leaf(HIDDEN, dtype=fp32), leaf(HIDDEN, dtype=fp32)]
    tables = [leaf(VOCAB, HIDDEN, dtype=fp32), leaf(2, HIDDEN, dtype=fp32)]
    ids = [torch.randint(VOCAB, (tokens,), device=device), torch.zeros(tokens, device=device, dtype=torch.long)]
    labels = torch.randint(VOCAB, (masked,), device=device)
    options = {"eps": 1e-12, "dropout_p": DROPOUT, "low_precision": True}
    found: dict[str, dict[str, Contender]] = {}

    def add(name: str, source: str, forward: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> None:
        found.setdefault(name, {})[source] = Contender(forward, leaves)
        if source == "eager" and device.type == "cuda" and not name.startswith("attention"):
            found[name]["compiled"] = Contender(torch.compile(forward), leaves)

    for source, (ops, planner) in implementations(device).items():
        for length in (128, 512):
            bounds = torch.arange(0, tokens + 1, length, device=device, dtype=torch.int32)
            attend = planner(Sequences(bounds, length), alibi_slopes(HEADS).to(device), HEAD_DIM)
            qkv = leaf(int(bounds[-1]), 3, HEADS, HEAD_DIM)
            add(f"attention_{length}", source, lambda qkv, attend=attend: attend(qkv, 0.0), [qkv])
        if source == "flash-attn":
            continue
        rows = [leaf(tokens, HIDDEN), leaf(tokens, HIDDEN), *norm]
        add("geglu", source, lambda x, ops=ops: ops.geglu(x, DROPOUT), [leaf(tokens, 2 * WIDTH)])
        add("add_layer_norm", source, lambda *x, ops=ops: ops.add_layer_norm(*x, **options)[0], rows)
        add(
            "embed_layer_norm",
            source,
            lambda words, types, *x, ops=ops: ops.embed_layer_norm(ids, [words, types], *x, **options),
            [*tables, *norm],
        )
        add(
            "masked_cross_entropy",
            source,
            lambda *x, ops=ops: ops.masked_cross_entropy(*x, labels).loss_sum,
            [leaf(masked, HIDDEN), tables[0], leaf(VOCAB, dtype=fp32)],
        )
    return found


def passes(contender: Contender, sets: int) -> Callable[[], None]:
    """Return a call that does forward and backward once for each of several equal sets of inputs.

    The inputs are used in turn, so that a cache that holds one set is of no use, as inside a model. The gradient of the
    output is ready and random; gradients are returned, not added to others.
    """
    device = contender.leaves[0].device.type
    copies = [[x.detach().clone().requires_grad_() for x in contender.leaves] for _ in range(sets)]

    def forward(leaves: list[torch.Tensor]) -> torch.Tensor:
        # Without the cache of casts, which would keep weights of one pass for the next.
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            return contender.forward(*leaves)

    upstream = [torch.randn_like(forward(leaves)) for leaves in copies]

    def work() -> None:
        for leaves, gradient in zip(copies, upstream, strict=True):
            torch.autograd.grad(forward(leaves), leaves, gradient)

    return work


def time_s(contender: Contender, repeats: int, sets: int = SETS) -> float:
    """Return the median time of one forward and backward. On a GPU a CUDA graph is replayed, without Python's time."""
    work = passes(contender, sets)
    if contender.leaves[0].device.type != "cuda":
        work()
        return statistics.median(timeit.repeat(work, number=1, repeat=repeats)) / sets
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Compiles and tunes what it will.
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times) / sets


def measure(repeats: int) -> dict[str, float]:
    print(f"{torch.cuda.get_device_name()}: forward + backward, median of {repeats}\n")
    print(
        "| operation | implementation | us | GB/s of the formula's bytes | speed-up over eager |\n|---|---|---|---|---|"
    )
    figures = {}
    for operation, found in contenders(torch.device("cuda")).items():
        times = {name: time_s(contender, repeats) for name, contender in found.items()}
        for name, seconds in times.items():
            figures[f"{operation}_{name.lower().replace('-', '_')}_us"] = seconds * 1e6
            rate = WORK[operation].moved_bytes / seconds / 1e9
            print(f"| {operation} | {name} | {seconds * 1e6:.0f} | {rate:.0f} | {times['eager'] / seconds:.2f} |")
        figures[f"{operation}_vs_eager"] = times["eager"] / times["Triton"]
    return figures


def main() -> None:
    arguments = report.read_arguments(__doc__ or "")
    gpu = torch.cuda.is_available()
    if gpu:
        figures = measure(10 if arguments.quick else 50)
    else:
        figures = estimate() | compile_kernels(arguments.quick) | compare_libraries() | geglu_in_products()
    report.write(figures, arguments.json, gpu=torch.cuda.get_device_name() if gpu else "none: theoretical estimate")


if __name__ == "__main__":
    main()
