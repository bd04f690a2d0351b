"""What reaches the model: one bin, packed and masked, in one flat buffer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from megabert.data.masking import mask
from megabert.data.packing import filler_lengths
from megabert.data.shards.manifest import TokenizerInfo

ALIGNMENT = 64  # elements, 256 bytes: every part of the buffer begins where the widest loads want it
IGNORE_INDEX = -100  # a label that asks for nothing


class Shapes(NamedTuple):
    """T, D_max and M_max: the shapes of all batches of a phase."""

    bin_tokens: int
    max_documents: int
    max_masked: int

    def parts(self) -> dict[str, tuple[int, int]]:
        """Where each tensor is in the buffer: (begin, elements)."""
        sizes = {
            "input_ids": self.bin_tokens,
            "position_ids": self.bin_tokens,
            "cu_seqlens": self.max_documents + 1,
            "masked_positions": self.max_masked,
            "masked_labels": self.max_masked,
        }
        places, begin = {}, 0
        for name, size in sizes.items():
            places[name] = (begin, size)
            begin += -(-size // ALIGNMENT) * ALIGNMENT
        return places

    @property
    def elements(self) -> int:
        begin, size = self.parts()["masked_labels"]
        return begin + size


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One bin. Every shape is the same for all bins of a phase.

    buffer: int32, holds what the properties view: one copy between processes, and one to the device.
    max_seqlen: the phase's constant bound. index: i. num_masked: labels in use. num_tokens: real tokens, specials
    counted, filler not. sum_squared_lengths: over real pieces, for counting attention's FLOPs.
    """

    buffer: torch.Tensor
    shapes: Shapes
    max_seqlen: int
    index: int
    num_masked: int
    num_tokens: int
    sum_squared_lengths: int

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: self.buffer[begin : begin + size] for name, (begin, size) in self.shapes.parts().items()}

    def __getstate__(self) -> dict[str, Any]:
        """Without the views, each of which would travel as a buffer of its own."""
        return {name: value for name, value in vars(self).items() if name != "_tensors"}

    @property
    def input_ids(self) -> torch.Tensor:
        """(T,)"""
        return self._tensors["input_ids"]

    @property
    def position_ids(self) -> torch.Tensor:
        """(T,), counted from 0 in each piece."""
        return self._tensors["position_ids"]

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """(D_max + 1,) from 0 to T, then T again for the places unused: empty sequences."""
        return self._tensors["cu_seqlens"]

    @property
    def masked_positions(self) -> torch.Tensor:
        """(M_max,) into T, ascending; 0 at unused places."""
        return self._tensors["masked_positions"]

    @property
    def masked_labels(self) -> torch.Tensor:
        """(M_max,); -100 at unused places."""
        return self._tensors["masked_labels"]

    def pin_memory(self) -> "PackedBatch":
        """The same in page-locked memory; a DataLoader calls this."""
        return PackedBatch(**(self.__getstate__() | {"buffer": self.buffer.pin_memory()}))

    def model_inputs(self, device: torch.device) -> dict[str, Any]:
        """What the model's forward takes, on its device."""
        buffer = self.buffer.to(device, non_blocking=True)
        parts = self.shapes.parts().items()
        return {name: buffer[begin : begin + size] for name, (begin, size) in parts} | {"max_seqlen": self.max_seqlen}


class Bin(NamedTuple):
    """Pieces to lay out. parts: runs of framed pieces, in order; lengths: (n,) of each piece, specials counted."""

    parts: Sequence[np.ndarray]
    lengths: np.ndarray


def lay_out(
    chosen: Bin,
    shapes: Shapes,
    *,
    index: int,
    max_seq_len: int,
    mlm_probability: float,
    tokenizer: TokenizerInfo,
    rng: np.random.Generator,
) -> PackedBatch:
    """Lay pieces one after the other, then filler of [PAD], mask, and make it batch number `index`."""
    buffer = np.empty(shapes.elements, dtype=np.int32)
    views = {name: buffer[begin : begin + size] for name, (begin, size) in shapes.parts().items()}
    num_tokens = int(chosen.lengths.sum())
    ids = views["input_ids"]
    if num_tokens:
        np.concatenate(chosen.parts, out=ids[:num_tokens], casting="same_kind")  # ids are below 2^31
    ids[num_tokens:] = tokenizer.special_ids["pad"]
    lengths = np.concatenate([chosen.lengths, filler_lengths(shapes.bin_tokens - num_tokens, max_seq_len)])
    ends = lengths.cumsum()
    views["cu_seqlens"][0] = 0
    views["cu_seqlens"][1 : len(ends) + 1] = ends
    views["cu_seqlens"][len(ends) + 1 :] = shapes.bin_tokens
    _count_from_zero(lengths, ends, views["position_ids"])
    masked = mask(
        ids,
        ~tokenizer.is_special.take(ids),
        mlm_probability,
        tokenizer.special_ids["mask"],
        tokenizer.ordinary_ids,
        rng,
    )
    count = len(masked.positions)
    views["masked_positions"][:count], views["masked_positions"][count:] = masked.positions, 0
    views["masked_labels"][:count], views["masked_labels"][count:] = masked.labels, IGNORE_INDEX
    return PackedBatch(
        buffer=torch.from_numpy(buffer),
        shapes=shapes,
        max_seqlen=max_seq_len,
        index=index,
        num_masked=count,
        num_tokens=num_tokens,
        sum_squared_lengths=int(np.dot(chosen.lengths, chosen.lengths)),
    )


def _count_from_zero(lengths: np.ndarray, ends: np.ndarray, out: np.ndarray) -> None:
    """lengths [2, 3] -> out [0, 1, 0, 1, 2]: a running sum of ones that falls back where a piece begins."""
    out.fill(1)
    out[0] = 0
    out[ends[:-1]] = 1 - lengths[:-1]
    np.cumsum(out, out=out)
