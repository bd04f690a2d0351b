"""Lay out pieces as a PackedBatch, the input of the model: one packed and masked bin in one flat buffer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from megabert.data.masking import mask
from megabert.data.packing import filler_lengths
from megabert.data.shards.manifest import TokenizerInfo

# Elements, which are 256 bytes: every tensor in the buffer is aligned for the widest loads.
ALIGNMENT = 64
# The label of an unused slot.
IGNORE_INDEX = -100


class Shapes(NamedTuple):
    """T, D_max and M_max, which determine the shapes of all batches of a phase."""

    bin_tokens: int
    max_documents: int
    max_masked: int

    def parts(self) -> dict[str, tuple[int, int]]:
        """Return the (begin, elements) of each tensor in the buffer."""
        sizes = {
            "input_ids": self.bin_tokens,
            "position_ids": self.bin_tokens,
            "cu_seqlens": self.max_documents + 1,
            "masked_positions": self.max_masked,
            "masked_labels": self.max_masked,
        }
        parts, begin = {}, 0
        for name, size in sizes.items():
            parts[name] = (begin, size)
            begin += -(-size // ALIGNMENT) * ALIGNMENT
        return parts

    @property
    def elements(self) -> int:
        begin, size = self.parts()["masked_labels"]
        return begin + size


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One packed and masked bin. All bins of a phase have the same shapes.

    buffer: int32, the storage of all tensors, so that one copy moves a batch between processes or to the device.
    max_seqlen: longest piece of the phase, the same for all its bins. index: the bin's global index. num_documents:
    places of cu_seqlens in use, filler counted. num_masked: labels in use. num_tokens: real tokens, specials counted,
    filler not. sum_squared_lengths: over real pieces, for counting the FLOPs of attention.
    """

    buffer: torch.Tensor
    shapes: Shapes
    max_seqlen: int
    index: int
    num_documents: int
    num_masked: int
    num_tokens: int
    sum_squared_lengths: int

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: self.buffer[begin : begin + size] for name, (begin, size) in self.shapes.parts().items()}

    def __getstate__(self) -> dict[str, object]:
        """Leave out the views: each of them would be pickled as a buffer of its own."""
        return {name: value for name, value in vars(self).items() if name != "_tensors"}

    @property
    def input_ids(self) -> torch.Tensor:
        """(T,)"""
        return self._tensors["input_ids"]

    @property
    def position_ids(self) -> torch.Tensor:
        """(T,), starts at 0 in each piece."""
        return self._tensors["position_ids"]

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """(D_max + 1,) from 0 to T; unused slots repeat T, which makes empty sequences."""
        return self._tensors["cu_seqlens"]

    @property
    def masked_positions(self) -> torch.Tensor:
        """(M_max,) positions in the T tokens, ascending; 0 in unused slots."""
        return self._tensors["masked_positions"]

    @property
    def masked_labels(self) -> torch.Tensor:
        """(M_max,); -100 in unused slots."""
        return self._tensors["masked_labels"]

    def pin_memory(self) -> "PackedBatch":
        """Copy the batch to page-locked memory; a DataLoader calls this."""
        return replace(self, buffer=self.buffer.pin_memory())

    def model_inputs(self, device: torch.device) -> dict[str, torch.Tensor | int]:
        """Return the keyword arguments of the model's forward, on its device."""
        buffer = self.buffer.to(device, non_blocking=True)
        parts = self.shapes.parts().items()
        tensors = {name: buffer[begin : begin + size] for name, (begin, size) in parts}
        return tensors | {"max_seqlen": self.max_seqlen, "num_documents": self.num_documents}


class Bin(NamedTuple):
    """The pieces of one bin. parts: framed pieces, end to end in order; lengths: (n,) of each piece with specials."""

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
    """Lay out pieces and then [PAD] filler in a buffer, mask them, and return batch number `index`."""
    buffer = np.empty(shapes.elements, dtype=np.int32)
    views = {name: buffer[begin : begin + size] for name, (begin, size) in shapes.parts().items()}
    num_tokens = int(chosen.lengths.sum())
    ids = views["input_ids"]
    if num_tokens:
        # Ids are below 2^31, so the cast to int32 loses nothing.
        np.concatenate(chosen.parts, out=ids[:num_tokens], casting="same_kind")
    ids[num_tokens:] = tokenizer.special_ids["pad"]
    lengths = np.concatenate([chosen.lengths, filler_lengths(shapes.bin_tokens - num_tokens, max_seq_len)])
    ends = lengths.cumsum()
    views["cu_seqlens"][0] = 0
    views["cu_seqlens"][1 : len(ends) + 1] = ends
    views["cu_seqlens"][len(ends) + 1 :] = shapes.bin_tokens
    _fill_position_ids(lengths, ends, views["position_ids"])
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
        num_documents=len(lengths),
        num_masked=count,
        num_tokens=num_tokens,
        sum_squared_lengths=int(np.dot(chosen.lengths, chosen.lengths)),
    )


def _fill_position_ids(lengths: np.ndarray, ends: np.ndarray, out: np.ndarray) -> None:
    """Count from 0 in each piece, lengths [2, 3] -> out [0, 1, 0, 1, 2], by a sum of ones that drops at its begin."""
    out.fill(1)
    out[0] = 0
    out[ends[:-1]] = 1 - lengths[:-1]
    np.cumsum(out, out=out)
