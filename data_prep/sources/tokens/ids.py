"""Check the ids of tokenized documents, cut the documents where they end, and remove special tokens at their ends."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data_prep.sources import base
from data_prep.sources.base import DamagedError, InputSplit, LeftOut, too_long
from megabert.data.shards.manifest import TokenizerInfo

# Ids that are read at a time, as for text: large enough to outweigh the call, small enough to hold.
BATCH_TOKENS = 1 << 18
SPECIAL = "special tokens at the ends of documents"


class TokenBatch(NamedTuple):
    """ids: of all documents, end to end; lengths: (documents,) int64; where: file; first: number of its document 0."""

    ids: np.ndarray
    lengths: np.ndarray
    where: str
    first: int


class IdRule(NamedTuple):
    """Which ids may occur. special: all special ids but [UNK]; document_end: the id at which documents are cut."""

    vocab_size: int
    special: tuple[int, ...]
    document_end: int | None


def make_rule(tokenizer: TokenizerInfo, document_end: int | None) -> IdRule:
    special = {*tokenizer.all_special_ids} - {tokenizer.special_ids["unk"]}
    if document_end is not None:
        special.add(document_end)
    return IdRule(tokenizer.vocab_size, tuple(sorted(special)), document_end)


def cut_at_documents(kind: Literal["datatrove", "megatron"], path: Path, edges: np.ndarray) -> list[InputSplit]:
    """Cut a file into input splits of whole documents. edges: (documents + 1,) bytes between which documents are."""
    splits, start = [], 0
    while start < len(edges) - 1:
        stop = int(np.searchsorted(edges, edges[start] + base.INPUT_SPLIT_BYTES, side="right")) - 1
        stop = min(max(stop, start + 1), len(edges) - 1)
        splits.append(InputSplit(kind, (str(path),), start, stop, int(edges[stop] - edges[start])))
        start = stop
    return splits


def batches_of(ids: np.ndarray, ends: np.ndarray, where: str, first: int, left_out: LeftOut) -> Iterator[TokenBatch]:
    """Yield the documents of a flat array in batches. ends: where each document ends in `ids`, which may be mapped."""
    begin = at = 0
    while at < len(ends):
        stop = max(at + 1, int(np.searchsorted(ends, begin + BATCH_TOKENS, side="right")))
        lengths = np.diff(ends[at:stop].astype(np.int64), prepend=begin)
        if int(lengths[0]) * ids.itemsize > base.MAX_DOCUMENT_BYTES:
            left_out.damaged(too_long(f"{where}: document {first + at}", "Cut it into documents."))
        else:
            yield TokenBatch(np.array(ids[begin : int(ends[stop - 1])]), lengths, where, first + at)
        begin, at = int(ends[stop - 1]), stop


def clean(batch: TokenBatch, rule: IdRule, left_out: LeftOut) -> TokenBatch:
    """Return a batch whose documents have no special tokens but [UNK].

    Raises ValueError for ids that the tokenizer does not have, DamagedError for a special token within a document.
    """
    ids, ends = batch.ids, batch.lengths.cumsum()
    if len(ids) and (int(ids.max()) >= rule.vocab_size or int(ids.min()) < 0):
        at = int(np.flatnonzero((ids < 0) | (ids >= rule.vocab_size))[0])
        raise ValueError(
            f"{batch.where}: document {batch.first + int(np.searchsorted(ends, at, side='right'))} contains the id "
            f"{int(ids[at])}, but the tokenizer has only the ids below {rule.vocab_size}. Pass the tokenizer that "
            "these tokens were made with as --tokenizer."
        )
    is_special = np.zeros(rule.vocab_size, bool)
    is_special[list(rule.special)] = True
    special = is_special[ids]
    owner = np.arange(len(ends))
    if rule.document_end is not None:
        cuts = np.union1d(ends, np.flatnonzero(ids == rule.document_end) + 1)
        owner, ends = np.searchsorted(ends, cuts, side="left"), cuts
    kept = np.flatnonzero(~special)
    low, high = np.searchsorted(kept, np.concatenate([[0], ends[:-1]])), np.searchsorted(kept, ends)
    good = _without_inner(batch, ids, kept, (low, high), owner, left_out)
    lengths = high - low
    left_out_specials = int(special.sum())
    if left_out_specials:
        left_out.add(SPECIAL, f"{batch.where}: id {int(ids[np.flatnonzero(special)[0]])}", left_out_specials)
    payload = ids[kept] if good.all() else ids[kept][np.repeat(good, lengths)]
    return TokenBatch(payload, lengths[good], batch.where, batch.first)


def _without_inner(
    batch: TokenBatch,
    ids: np.ndarray,
    kept: np.ndarray,
    span: tuple[np.ndarray, np.ndarray],
    owner: np.ndarray,
    left_out: LeftOut,
) -> np.ndarray:
    """Return which documents have no special token between other tokens; the others count as damaged.

    kept: places of the other tokens; span: where in `kept` each document begins and ends; owner: its number.
    """
    low, high = span
    good = np.ones(len(low), bool)
    filled = np.flatnonzero(high > low)
    inner = kept[high[filled] - 1] - kept[low[filled]] + 1 != (high - low)[filled]
    for document in filled[inner].tolist():
        places = kept[low[document] : high[document]]
        at = int(places[np.flatnonzero(np.diff(places) > 1)[0]]) + 1
        good[document] = False
        left_out.damaged(
            DamagedError(
                f"{batch.where}: document {batch.first + int(owner[document])} contains the special token "
                f"{int(ids[at])} between other tokens. If documents end there, pass the token as --document-end, such "
                "as --document-end '[SEP]'."
            )
        )
    return good
