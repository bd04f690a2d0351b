"""The kernels' times for accept.py, beside the times that the card's data sheet allows, and those of other shapes."""

from collections.abc import Callable
from unittest import mock

import torch

from megabert.kernels import SHORT, Tile
from megabert.training.telemetry.cards import find_card
from tests.benchmarks import bench_kernels
from tests.gpu.parts import Outcome, Setup, timed

# Of the memory's bandwidth, by the bytes of a kernel without matrix products.
LEAST_SHARE = 0.6
# Warps of LayerNorm's backward pass on each multiprocessor: its programs by two to one, as on an H100 264 to 2,112.
RESIDENT_WARPS = (8, 20, 32, 64)


def kernel_times(setup: Setup) -> Outcome:
    """Each kernel by replayed graphs beside its floor; LayerNorm's programs and the tiles of short attention."""
    device = torch.device(setup.accelerator)
    tokens, repeats, sets = (512, 1, 1) if setup.dry else (bench_kernels.TOKENS, 20, bench_kernels.SETS)
    card = None if setup.dry else find_card(torch.cuda.get_device_name())
    bandwidth = card.bandwidth if card else copy_rate(device, 256 if setup.dry else 8192)
    found: dict[str, object] = {"bytes_per_s": bandwidth, "of_data_sheet": card is not None}
    shares: dict[str, float] = {}
    for operation, contenders in bench_kernels.contenders(device, tokens).items():
        if setup.dry and operation == "masked_cross_entropy":
            # Minutes in bf16 on a CPU.
            continue
        work = bench_kernels.WORK[operation]
        floor = max(work.moved_bytes / bandwidth, work.flops / (card.bf16 or card.fp32) if card else 0.0)
        for source, contender in contenders.items():
            if source == "compiled":
                continue
            seconds = bench_kernels.time_s(contender, repeats, sets)
            found[f"{operation}, {source}"] = {"us": 1e6 * seconds, "floor_us": 1e6 * floor, "share": floor / seconds}
            if source == "Triton" and not work.flops:
                shares[operation] = floor / seconds
    if setup.dry:
        return Outcome(True, "no kernel here", found)
    found["LayerNorm, us by warps"] = by_warps(device)
    found["attention_128, us by tile"] = by_tile(device)
    slowest = min(shares, key=lambda operation: shares[operation])
    figure = f"{slowest} {100 * shares[slowest]:.0f} % of {bandwidth / 1e9:,.0f} GB/s"
    return Outcome(shares[slowest] >= LEAST_SHARE, figure, found)


def copy_rate(device: torch.device, size: int) -> float:
    """Return the bytes/s of a copy of size * size numbers, read and written."""
    data = torch.randn(size * size, device=device)
    return 2 * 4 * size**2 / timed(device, data.clone)


def time_us(device: torch.device, operation: str) -> float:
    return 1e6 * bench_kernels.time_s(bench_kernels.contenders(device)[operation]["Triton"], 10)


def by_warps(device: torch.device) -> dict[str, object]:
    """Time LayerNorm with other numbers of programs in its backward pass."""
    from megabert.kernels import row_statistics

    return {
        str(warps): with_other(row_statistics, "RESIDENT_WARPS", warps, lambda: time_us(device, "add_layer_norm"))
        for warps in RESIDENT_WARPS
    }


def by_tile(device: torch.device) -> dict[str, object]:
    """Time attention in documents of 128 tokens with other tiles; the columns, warps and stages of each."""
    from support.occupancy import SHORT_TILES

    from megabert.kernels import attention

    usual, found = attention.tile_of, {}
    for shape in SHORT_TILES:
        tile = Tile(SHORT, *shape)
        found[", ".join(map(str, shape))] = with_other(
            attention,
            "tile_of",
            lambda kernel, *rest, tile=tile: tile if kernel == "short" else usual(kernel, *rest),
            lambda: time_us(device, "attention_128"),
        )
    return found


def with_other(module: object, name: str, value: object, work: Callable[[], float]) -> float | str:
    """Return work's result while a module has another value, or why the card cannot hold it."""
    from triton.runtime.errors import OutOfResources

    with mock.patch.object(module, name, value):
        try:
            return work()
        except OutOfResources as error:
            return str(error)
