"""Convert (B, S) rows with padding to (T,) tokens without it, and back.

T tokens in a bin, B documents, S longest document or padded length. Example: lengths [3, 2] -> cu_seqlens [0, 3, 5].
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import IGNORE_INDEX, upcast


class Sequences(NamedTuple):
    """How T tokens divide into B documents.

    cu_seqlens: (B + 1,) int32 from 0 to T; repeated values are empty documents and are legal everywhere.
    max_seqlen: an upper bound on the longest document, in tokens.
    num_keys: None, or (B,) int32: every document occupies max_seqlen slots, of which the first num_keys hold real
        tokens; the rest is padding that is computed but never attended to.
    num_documents: None, or a number of documents after which all others are empty.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    num_keys: Tensor | None = None
    num_documents: int | None = None


class Unpadded(NamedTuple):
    """indices: (T,) int64, the position of each token in the flattened (B * S,) rows."""

    indices: Tensor
    sequences: Sequences


def unpad(attention_mask: Tensor) -> Unpadded:
    """Find the real tokens of padded rows.

    attention_mask: (B, S), non-zero at real tokens, which may be anywhere in the row.
    """
    mask = attention_mask != 0
    lengths = mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Unpadded(mask.flatten().nonzero().flatten(), Sequences(cu_seqlens, mask.shape[1]))


def unpad_in_place(attention_mask: Tensor) -> Unpadded:
    """Unpad for one graph, in shapes that do not depend on the mask: T is B * S, and padding is computed.

    Each row becomes a document of S slots. Its real tokens come first, in their order, and num_keys counts them.
    """
    mask = attention_mask != 0
    num_rows, length = mask.shape
    num_keys = mask.sum(dim=1, dtype=torch.int32)
    slot = torch.where(mask, mask.long().cumsum(1), num_keys[:, None] + (~mask).long().cumsum(1)) - 1  # (B, S)
    row = torch.arange(num_rows + 1, device=mask.device) * length
    position = row[:-1, None] + torch.arange(length, device=mask.device)
    indices = torch.zeros_like(position).scatter(1, slot, position).flatten()  # (B * S,)
    return Unpadded(indices, Sequences(row.int(), length, num_keys))


def first_tokens(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Return the documents that are not empty and the first token of each, both (M,) int64 with M <= B.

    A padded row counts as not empty.
    """
    starts = sequences.cu_seqlens[:-1]
    if sequences.num_keys is not None:
        return torch.arange(sequences.num_keys.shape[0], device=sequences.num_keys.device), starts.long()
    documents = sequences.cu_seqlens.diff().nonzero().flatten()
    return documents, starts[documents].long()


def places_in_documents(sequences: Sequences, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return each token's place in its document, from 0, and the document's real tokens; both (T,)."""
    cu_seqlens, num_keys = sequences.cu_seqlens, sequences.num_keys
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    if num_keys is not None:
        return tokens % sequences.max_seqlen, num_keys[tokens // sequences.max_seqlen]
    document = torch.bucketize(tokens, cu_seqlens[1:], right=True)
    return tokens - cu_seqlens[document], cu_seqlens.diff()[document]


def shift(hidden: Tensor, offset: int, places: Tensor, lengths: Tensor) -> Tensor:
    """Return for each token the (T, E) of the one `offset` tokens later in its document, or zeros beyond its ends."""
    exists = (places + offset >= 0) & (places + offset < lengths)
    return hidden.roll(-offset, 0).where(exists[:, None], hidden.new_zeros(()))


def spread_documents(values: Tensor, documents: Tensor, sequences: Sequences) -> Tensor:
    """Write (M, E), in the order of first_tokens(), to (B, E), with zeros for empty documents."""
    if sequences.num_keys is not None:
        return values.masked_fill(sequences.num_keys[:, None] == 0, 0.0)
    return spread(values, documents, sequences.cu_seqlens.shape[0] - 1)


def mean_of_documents(hidden: Tensor, cu_seqlens: Tensor, num_keys: Tensor | None = None) -> Tensor:
    """Average (T, E) over each document: (B, E), in fp32 where hidden is half precision, zeros for an empty document.

    num_keys: (B,) as in Sequences, for documents that all occupy the same number of slots.
    """
    if num_keys is not None:
        rows = upcast(hidden).view(num_keys.shape[0], -1, hidden.shape[1])  # (B, S, E)
        real = torch.arange(rows.shape[1], device=hidden.device) < num_keys[:, None]
        return (rows * real[:, :, None]).sum(dim=1) / num_keys.clamp(min=1)[:, None]
    lengths = cu_seqlens.diff().long()
    document = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)
    sums = upcast(hidden.new_zeros(len(lengths), hidden.shape[1])).index_add(0, document, upcast(hidden))
    return sums / lengths.clamp(min=1)[:, None]


def spread(values: Tensor, indices: Tensor, size: int) -> Tensor:
    """Write (N, ...) to rows `indices` of a zero tensor (size, ...): the inverse of indexing with `indices`."""
    return values.new_zeros((size, *values.shape[1:])).index_copy(0, indices, values)


def row_slots(sequences: Sequences, num_tokens: int) -> Tensor:
    """Return each token's slot in rows of max_seqlen slots: document * max_seqlen + position in the document.

    num_tokens: T, which cu_seqlens[-1] must equal; reading that on a GPU would wait for it. Returns (T,) int64.
    """
    cu_seqlens, length = sequences.cu_seqlens.long(), sequences.max_seqlen
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return document * length + token - cu_seqlens[document]


def as_rows(sequences: Sequences) -> Sequences:
    """Describe the same documents laid out as padded rows of max_seqlen slots each, without those after num_documents.

    A packed batch has a fixed number of places for documents. Rows for unused places would cost as much as real ones.
    """
    cu_seqlens, length = sequences.cu_seqlens, sequences.max_seqlen
    if sequences.num_documents is not None:
        cu_seqlens = cu_seqlens[: sequences.num_documents + 1]
    lengths = cu_seqlens.diff()
    rows = torch.arange(len(lengths) + 1, device=cu_seqlens.device, dtype=torch.int32) * length
    return Sequences(rows, length, num_keys=lengths)


@dataclass(frozen=True)
class Tokens:
    """The input of one forward pass as T tokens, and how to restore (B, S).

    inputs_embeds: (T, E), or None where input_ids (T,) say what the tokens are. indices: (T,) position of each token in
    the flattened rows, or None for a packed batch. shape: of the input, (B, S) or (T,). padding: (B, S), true at
    padding that is computed, or None.
    """

    input_ids: Tensor | None
    position_ids: Tensor
    token_type_ids: Tensor | None
    sequences: Sequences
    inputs_embeds: Tensor | None = None
    indices: Tensor | None = None
    shape: tuple[int, ...] = ()
    padding: Tensor | None = None

    def pick_labels(self, labels: Tensor) -> Tensor:
        """Select the tokens' labels: (B, S) -> (T,); those of computed padding become IGNORE_INDEX."""
        if self.indices is None:
            return labels
        if self.padding is not None:
            labels = labels.masked_fill(self.padding, IGNORE_INDEX)
        return labels.flatten()[self.indices]

    def spread(self, values: Tensor) -> Tensor:
        """Restore the rows, with zeros at padding: (T, ...) -> (B, S, ...). Returns a packed batch unchanged."""
        if self.indices is None:
            return values
        num_rows, length = self.shape
        rows = spread(values, self.indices, num_rows * length).view(num_rows, length, *values.shape[1:])
        if self.padding is None:
            return rows
        return rows.masked_fill(self.padding.view(*self.padding.shape, *[1] * (rows.dim() - 2)), 0.0)


def positions_within(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Count from 0 in each document. [0, 3, 5] -> [0, 1, 2, 0, 1]."""
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    return token - cu_seqlens.long()[document]
