"""Read documents that are token ids already: Megatron's .bin and .idx, datatrove's .ds, and token columns of MDS."""

from collections.abc import Callable, Iterator

from data_prep.sources.base import InputSplit, LeftOut, ReadOptions
from data_prep.sources.tokens import datatrove, mds, megatron
from data_prep.sources.tokens.ids import IdRule, TokenBatch, clean

TOKEN_READERS: dict[str, Callable[[InputSplit, ReadOptions, LeftOut], Iterator[TokenBatch]]] = {
    "datatrove": datatrove.read,
    "mds_tokens": mds.read_tokens,
    "megatron": megatron.read,
}


def read_token_split(split: InputSplit, options: ReadOptions, rule: IdRule, left_out: LeftOut) -> Iterator[TokenBatch]:
    """Yield the documents of one input split in batches, without special tokens.

    Raises ValueError for ids that the tokenizer does not have, and for damaged input what read_input_split raises.
    """
    for batch in TOKEN_READERS[split.kind](split, options, left_out):
        yield clean(batch, rule, left_out)
