"""Between (B, S) rows with padding and (T,) tokens without.

T tokens in a bin, B documents, S longest document or padded length. The worked example for all of it:
lengths [3, 2] -> cu_seqlens [0, 3, 5].
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """How T tokens divide into B documents.

    cu_seqlens: (B + 1,) int32 from 0 to T; repeated values are empty documents and are legal everywhere.
    max_seqlen: an upper bound on the longest document, in tokens.
    num_keys: None, or (B,) int32: documents that occupy max_seqlen slots each but have only so many
        real tokens, the rest padding that is computed yet never attended to.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    num_keys: Tensor | None = None


class Unpadded(NamedTuple):
    """indices: (T,) int64, each real token's place in the flattened (B * S,) rows."""

    indices: Tensor
    sequences: Sequences


def unpad(attention_mask: Tensor) -> Unpadded:
    """Find the real tokens of padded rows.

    attention_mask: (B, S), non-zero at real tokens, wherever in the row they are.
    """
    mask = attention_mask != 0
    lengths = mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Unpadded(mask.flatten().nonzero().flatten(), Sequences(cu_seqlens, mask.shape[1]))


def unpad_in_place(attention_mask: Tensor) -> Unpadded:
    """As unpad(), in shapes that do not depend on the mask, as torch.export's graphs need: T is B * S, padding is computed.

    Each row is a document of S slots, its real tokens first, in their order, so that num_keys tells them from its padding.
    """
    mask = attention_mask != 0
    num_rows, length = mask.shape
    num_keys = mask.sum(dim=1, dtype=torch.int32)
    slot = torch.where(mask, mask.long().cumsum(1), num_keys[:, None] + (~mask).long().cumsum(1)) - 1  # (B, S)
    row = torch.arange(num_rows + 1, device=mask.device) * length
    place = row[:-1, None] + torch.arange(length, device=mask.device)
    indices = torch.zeros_like(place).scatter(1, slot, place).flatten()  # (B * S,)
    return Unpadded(indices, Sequences(row.int(), length, num_keys))


def first_tokens(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """The documents that are not empty, and the first token of each: (M,) int64 both, M <= B. Padded rows are never empty."""
    if sequences.num_keys is not None:
        return torch.arange(sequences.num_keys.shape[0], device=sequences.num_keys.device), sequences.cu_seqlens[
            :-1
        ].long()
    documents = sequences.cu_seqlens.diff().nonzero().flatten()
    return documents, sequences.cu_seqlens[documents].long()


def spread(values: Tensor, indices: Tensor, size: int) -> Tensor:
    """Place (N, ...) at `indices` of (size, ...), zeros elsewhere: the inverse of indexing with them."""
    return values.new_zeros((size, *values.shape[1:])).index_copy(0, indices, values)


def repad(values: Tensor, indices: Tensor, batch_size: int, length: int) -> Tensor:
    """Spread (T, ...) over (B, S, ...), zeros at padding."""
    return spread(values, indices, batch_size * length).view(batch_size, length, *values.shape[1:])


def row_slots(sequences: Sequences) -> Tensor:
    """Give each of the T tokens its slot in rows of max_seqlen: document * max_seqlen + place in document.

    Returns (T,) int64. Needs cu_seqlens[-1] == T.
    """
    cu_seqlens, length = sequences.cu_seqlens.long(), sequences.max_seqlen
    token = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return document * length + token - cu_seqlens[document]


def as_rows(sequences: Sequences) -> Sequences:
    """Describe the same documents laid out as padded rows of max_seqlen slots each."""
    cu_seqlens, length = sequences.cu_seqlens, sequences.max_seqlen
    lengths = cu_seqlens.diff()
    rows = torch.arange(len(lengths) + 1, device=cu_seqlens.device, dtype=torch.int32) * length
    return Sequences(rows, length, num_keys=lengths)
