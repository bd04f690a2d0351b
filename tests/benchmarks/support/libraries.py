"""Liger's fused linear cross-entropy and PyTorch's FlexAttention beside our kernels, counted without a GPU.

Launches and bytes are those of operations on fake CUDA tensors: each reads its inputs and writes its outputs once. The
kernels of the loss read the logits twice and write them once. Registers are the assembler's, for an H100.
"""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megabert.kernels import attention, cross_entropy
from tests.kernels.helpers.aot import Launch, compile_for, recorded, resident_programs

H100 = 90
# Rows and columns of a block of FlexAttention's mask, by default.
FLEX_BLOCK = 128
# Bytes of a bf16 number.
NUMBER = 2
# The mean piece of C4's documents, cut at 128 tokens.
MEAN_PIECE = 115
CODE = "registers | spilled bytes | programs on a multiprocessor |"


class Count(TorchDispatchMode):
    """Counts launches on the device, and the bytes that they move."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.moved_bytes = 0

    def add(self, moved_bytes: int) -> None:
        self.launches += 1
        self.moved_bytes += moved_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = (
            [x for x in tree_leaves(part) if isinstance(x, torch.Tensor)] for part in ((args, kwargs), out)
        )
        if func.is_view or "empty" in func.overloadpacket.__name__ or not read + written:
            return out
        self.add(3 * size_of(args[0]) if func.namespace == "megabert" else sum(map(size_of, read + written)))
        return out


def size_of(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements; of an expanded one those of its memory."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def get(tensor: torch.Tensor, index: slice) -> torch.Tensor:
    return torch.ops.aten.slice(tensor, 0, index.start, index.stop)


def copy(tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.copy_(tensor, source)


@contextlib.contextmanager
def fake_h100(reads: list[int]) -> Iterator[Count]:
    """Make tensors on "cuda" fake, and count. reads: gets an entry for each number that the host reads."""
    counted = Count()

    def item(tensor: torch.Tensor) -> int:
        reads.append(1)
        return 1

    def addmm(*operands: torch.Tensor, out: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        if out is None:
            return torch.ops.aten.addmm(*operands)
        counted.add(sum(map(size_of, [*operands, out])))
        return out

    # Python's own forms of these ask CUDA for its current device, which a torch for CPUs does not have.
    tensor_methods = {"__getitem__": get, "__setitem__": lambda x, at, source: copy(get(x, at), source), "copy_": copy}
    answers = {"is_available": True, "get_device_capability": (9, 0), "_lazy_init": None}
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer: answer))
        for name, method in tensor_methods.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, method))
        stack.enter_context(mock.patch.object(torch, "addmm", addmm))
        stack.enter_context(mock.patch.object(FakeTensor, "item", item))
        stack.enter_context(FakeTensorMode())
        yield stack.enter_context(counted)


class Row(NamedTuple):
    """One way to compute the loss. rows: of each matrix product; waits: numbers that the host reads."""

    rows: int
    launches: int
    moved_bytes: int
    waits: int
    registers: int
    spills: int
    programs: int


def row_of(counted: Count, kernel: Launch, rows: int, reads: list[int]) -> Row:
    code = compile_for(kernel, H100)
    programs = resident_programs(code, kernel.options["num_warps"], H100)
    return Row(rows, counted.launches, counted.moved_bytes, len(reads), code.registers, code.spills, programs)


def loss_operands(
    masked: int, hidden: int, vocab: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden (M, E), weight (V, E), bias (V,) in bf16, as autocast casts them, and labels (M,)."""
    shapes = ((masked, hidden), (vocab, hidden), (vocab,))
    rows, weight, bias = (torch.empty(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
    return rows, weight, bias, torch.empty(masked, device=device, dtype=torch.int64)


def our_loss(masked: int, hidden: int, vocab: int) -> Row:
    """Count forward and backward of the masked loss, whose gradients are computed in the forward pass."""
    reads: list[int] = []
    with fake_h100(reads) as counted:
        cross_entropy.in_chunks(*loss_operands(masked, hidden, vocab, "cuda"), 0.0, True, torch.bfloat16)
    with recorded() as kernels:
        cross_entropy.in_chunks(*loss_operands(16, 8, vocab, "cpu"), 0.0, True, torch.bfloat16)
    columns = -(-vocab // cross_entropy.COLUMNS_MULTIPLE) * cross_entropy.COLUMNS_MULTIPLE
    return row_of(counted, kernels[0], min(masked, cross_entropy.chunk_rows(masked, columns)), reads)


def liger_loss(masked: int, hidden: int, vocab: int) -> Row:
    """Count Liger's, with gradients summed in fp32 as ours are."""
    from liger_kernel.ops.fused_linear_cross_entropy import (  # pyrefly: ignore[missing-import]
        fused_linear_cross_entropy_forward,
    )

    reads: list[int] = []
    with fake_h100(reads) as counted, recorded() as kernels, torch.no_grad():
        rows, weight, bias, labels = loss_operands(masked, hidden, vocab, "cuda")
        fused_linear_cross_entropy_forward(
            rows, weight, labels, bias=bias, reduction="sum", accum_dtype=torch.float32, compute_gradients=True,
            weight_requires_grad=True, return_token_accuracy=True,
        )  # fmt: skip
    for kernel in kernels:
        counted.add(3 * size_of(kernel.arguments["X_ptr"]))
    return row_of(counted, kernels[0], kernels[0].arguments["X_ptr"].shape[0], reads)


class Tiles(NamedTuple):
    """Attention of one layer, forward: FLOPs and bytes; and launches and bytes of what is made once for a batch."""

    flops: float
    moved_bytes: float
    planning_launches: int
    planning_bytes: int


def our_tiles(lengths: torch.Tensor, heads: int, head_dim: int) -> Tiles:
    """Count ours by the formula in attention.py, for tiles that hold tokens."""
    tile = attention.tile_of("forward", head_dim, False, False)
    rows, columns = -(-lengths // tile.rows), -(-lengths // tile.columns)
    tokens = int(lengths.sum())
    flops = int((rows * columns).sum()) * tile.rows * tile.columns * 4 * head_dim * heads
    moved = heads * (tokens * (2 * head_dim * NUMBER + 4) + int((rows * lengths).sum()) * 2 * head_dim * NUMBER)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)])
    with Count() as counted:
        attention.tiles_of(bounds, tokens, tile.rows)
    return Tiles(flops, moved, counted.launches, counted.moved_bytes)


def flex_tiles(lengths: torch.Tensor, heads: int, head_dim: int) -> Tiles:
    """Count FlexAttention's blocks that any two tokens of one document touch. Its mask is made for each batch."""
    tokens = int(lengths.sum())
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def same(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return document[query] == document[key]

    with Count() as counted:
        mask = create_block_mask(same, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=FLEX_BLOCK)
    full = 0 if mask.full_kv_num_blocks is None else int(mask.full_kv_num_blocks.sum())
    blocks = int(mask.kv_num_blocks.sum()) + full
    flops = blocks * FLEX_BLOCK**2 * 4 * head_dim * heads
    moved = heads * (tokens * (2 * head_dim * NUMBER + 4) + blocks * FLEX_BLOCK * 2 * head_dim * NUMBER)
    return Tiles(flops, moved, counted.launches, counted.moved_bytes)


def compare(masked: int, hidden: int, vocab: int, tokens: int, heads: int) -> dict[str, float]:
    """Print both comparisons. Returns the figures."""
    losses, figures = {"MegaBERT": our_loss(masked, hidden, vocab)}, {}
    if find_spec("liger_kernel") is not None:
        losses["Liger"] = liger_loss(masked, hidden, vocab)
    print(f"\n| loss of {masked:,} rows, V = {vocab:,} | rows of a product | launches | MB | host's waits | " + CODE)
    print("|---" * 8 + "|")
    for name, row in losses.items():
        cells = [row.rows, row.launches, f"{row.moved_bytes / 1e6:,.0f}", *row[3:]]
        print(f"| {name} | {' | '.join(map(str, cells))} |")
        figures |= {f"loss_{name.lower()}_{field}": value for field, value in row._asdict().items()}
    if len(losses) == 1:
        print("\nLiger is not installed (pip install liger-kernel).")
    print("\n| attention of a layer, forward | documents of | GFLOP | MB | launches for tiles | MB for tiles |")
    print("|---" * 6 + "|")
    for length in (128, 512, MEAN_PIECE):
        lengths = torch.full((tokens // length,), length)
        for name, count in (("MegaBERT", our_tiles), ("FlexAttention", flex_tiles)):
            found = count(lengths, heads, hidden // heads)
            cells = [length, f"{found.flops / 1e9:.1f}", f"{found.moved_bytes / 1e6:.1f}", found.planning_launches]
            print(f"| {name} | {' | '.join(map(str, cells))} | {found.planning_bytes / 1e6:.1f} |")
            prefix = f"attention_{length}_{name.lower()}"
            figures |= {f"{prefix}_{field}": value for field, value in found._asdict().items()}
    return figures
