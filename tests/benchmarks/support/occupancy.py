"""Registers, shared memory and resident warps of every Triton kernel, compiled for three generations of GPUs.

The launches are those of MosaicBERT-Base and ModernBERT-Base in bf16, with the dropout of the first.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from megabert.kernels import SHORT, Tile, attention
from megabert.kernels.add_layer_norm import add_layer_norm
from megabert.kernels.attention import plan_triton
from megabert.kernels.cross_entropy import in_chunks
from megabert.kernels.embed_layer_norm import embed_layer_norm
from megabert.kernels.geglu import geglu
from megabert.kernels.rotate import rotate
from megabert.model.ops import alibi_slopes
from megabert.model.padding import Sequences
from tests.kernels.helpers.aot import Launch, compile_for, recorded, resident_programs

# Compute capabilities of A100, H100 and B200.
TARGETS = {"sm_80": 80, "sm_90a": 90, "sm_100a": 100}
WIDTH, INNER, HEADS, VOCAB = 768, 3072, 12, 30_522
HEAD_DIM = WIDTH // HEADS
DROPOUT = 0.1
# That a multiprocessor of these cards holds.
MOST_WARPS = 64
# Columns, warps and stages.
SHORT_TILES = ((64, 8, 1), (64, 16, 1), (32, 8, 1), (32, 8, 2), (32, 4, 1), (16, 8, 1))


class Occupancy(NamedTuple):
    """One kernel on one card. shared: bytes of a program; warps: resident ones of a multiprocessor."""

    registers: int
    shared: int
    spills: int
    warps: int

    def __str__(self) -> str:
        spilled = f", {self.spills} B spilled" if self.spills else ""
        return f"{self.registers}, {self.shared / 1024:.0f} KB, {self.warps}{spilled}"


def kernels() -> dict[str, Launch]:
    """Return one launch of each kernel, by its name; attention's by dropout, too."""
    found: dict[str, Launch] = {}
    for label, call in _calls():
        with recorded() as launches:
            call()
        for launch in launches:
            found.setdefault(f"{launch.name.removesuffix('_kernel')}{label}", launch)
    return found


def warps_of(launch: Launch) -> int:
    """Return the warps of a program; Triton's default is 4."""
    return launch.options.get("num_warps", 4)


def occupancy(launch: Launch, capability: int) -> Occupancy:
    """Compile a launch for a capability."""
    code, warps = compile_for(launch, capability), warps_of(launch)
    return Occupancy(code.registers, code.shared, code.spills, warps * resident_programs(code, warps, capability))


def print_table(targets: Sequence[str] = tuple(TARGETS)) -> dict[str, float]:
    """Print a table of all kernels and these cards. Returns the resident warps as figures."""
    print("\nCompiled, not run on a GPU: registers of a thread, KB of shared memory of a program, and the warps of")
    print(f"{MOST_WARPS} that a multiprocessor holds at once.\n")
    print("| kernel | warps of a program | " + " | ".join(targets) + " |\n|---|---|" + "---|" * len(targets))
    figures = {}
    for name, launch in kernels().items():
        found = {target: occupancy(launch, TARGETS[target]) for target in targets}
        figures |= {f"warps_{name}_{target}": float(one.warps) for target, one in found.items()}
        print(f"| {name} | {warps_of(launch)} | {' | '.join(map(str, found.values()))} |")
    return figures


def print_tiles_of_short() -> dict[str, float]:
    """Print what other tiles would make of attention's short kernel, without dropout."""
    print("\nOther tiles of attention.short, 128:\n\n| columns, warps, stages | " + " | ".join(TARGETS) + " |")
    print("|---|" + "---|" * len(TARGETS))
    usual, figures = attention.tile_of, {}

    def tile_of(kernel: str, *rest: Any, tile: Tile) -> Tile:
        return tile if kernel == "short" else usual(kernel, *rest)

    for columns, warps, stages in SHORT_TILES:
        tile = Tile(SHORT, columns, warps, stages)
        with mock.patch.object(attention, "tile_of", functools.partial(tile_of, tile=tile)):
            launch = kernels()["attention.short, 128"]
        found = {target: occupancy(launch, capability) for target, capability in TARGETS.items()}
        figures |= {f"warps_short_{columns}_{warps}_{stages}_{name}": float(one.warps) for name, one in found.items()}
        print(f"| {columns}, {warps}, {stages} | {' | '.join(map(str, found.values()))} |")
    return figures


def _calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield calls whose launches are recorded, each with what its kernels' names get."""
    norm = [_leaf(WIDTH, dtype=torch.float32), _leaf(WIDTH, dtype=torch.float32)]
    options = {"eps": 1e-12, "dropout_p": DROPOUT, "low_precision": True}
    yield "", lambda: geglu(_leaf(16, 2 * INNER), DROPOUT).sum().backward()
    yield "", lambda: torch.stack(add_layer_norm(_leaf(16, WIDTH), _leaf(16, WIDTH), *norm, **options)).sum().backward()
    yield "", lambda: _embed(norm, options)
    yield "", _loss
    yield "", lambda: rotate(_leaf(64, 3, HEADS, HEAD_DIM), torch.zeros(64, 2, HEAD_DIM // 2)).sum().backward()
    for longest in (128, 512):
        for dropout in (0.0, DROPOUT):
            label = f", {longest}{', dropout' if dropout else ''}"
            yield label, lambda longest=longest, dropout=dropout: _attend(longest, dropout)


def _leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def _embed(norm: list[Tensor], options: dict[str, object]) -> None:
    ids = [torch.zeros(64, dtype=torch.int64)] * 2
    tables = [_leaf(32, WIDTH, dtype=torch.float32) for _ in ids]
    with torch.autocast("cpu", torch.bfloat16):
        embed_layer_norm(ids, tables, *norm, **options).sum().backward()  # type: ignore[arg-type]


def _loss() -> None:
    hidden, weight, bias = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((16, 8), (VOCAB, 8), VOCAB))
    in_chunks(hidden, weight, bias, torch.zeros(16, dtype=torch.int64), 0.0, True, torch.bfloat16)


def _attend(longest: int, dropout: float) -> None:
    sequences = Sequences(torch.tensor([0, 40, 64], dtype=torch.int32), longest)
    attend = plan_triton(sequences, alibi_slopes(HEADS), HEAD_DIM)
    attend(_leaf(64, 3, HEADS, HEAD_DIM), dropout).sum().backward()
