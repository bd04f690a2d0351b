"""Open the corpora of a run, and choose the shape of its bins by them."""

from contextlib import suppress
from pathlib import Path

from megabert.config.data_section import DataConfig
from megabert.data.bin_shape import default_max_documents, four_medians
from megabert.data.shards.cache import CacheOptions
from megabert.data.shards.shard_list import DamagedShardError
from megabert.data.shards.source import Corpus, Source, check_same_tokenizer, open_corpus
from megabert.files.checkpoint_format import State


def open_corpora(data: DataConfig) -> tuple[Corpus, Corpus]:
    """Open the training and the held-out corpus. Raises ValueError if one is missing or their tokenizers differ."""
    options = {
        "tokenizer": data.tokenizer,
        "cache": CacheOptions(Path(data.cache_dir), data.cache_gb << 30, data.store_patience_s),
        "on_bad_shard": data.on_bad_shard,
    }
    first, *later = data.mixtures
    corpus = open_corpus(first, later=later, **options)
    held_out = open_corpus([(data.heldout, 1.0)], "heldout", **options) if data.heldout else corpus.held_out()
    check_same_tokenizer(corpus.sources[0], held_out.sources[0])
    for source in corpus.sources:
        source.check_files()
    for source in (*corpus.sources, *held_out.sources):
        check_has_tokens(source)
    return corpus, held_out


def check_has_tokens(source: Source) -> None:
    """Raise ValueError for text of which the tokenizer leaves nothing: a stream would look for a token for ever.

    The manifest counts characters. Only if a sample of the documents has no token, all of them are read.
    """
    known = source.document_lengths() if source.tokenizer_path is not None else None
    if known is None or known[0].any():
        return
    for number, shard in enumerate(source.shards):
        for chunk in range(len(shard.chunks)):
            with suppress(DamagedShardError):
                if len(source.read_chunk(number, chunk).tokens):
                    return
    raise ValueError(
        f"{source.folder}: the tokenizer {source.tokenizer_path} leaves no token of any document. Use a corpus with "
        "text, or another data.tokenizer."
    )


def choose_max_documents(data: DataConfig, corpus: Corpus, saved: State | None) -> dict[int, int]:
    """Choose the most pieces of a bin, for each max_seq_len of the run. saved: of a resumed run, which keeps its bins.

    A bin that has that many pieces would have others with another number.
    """
    lengths, tokens = [length for length, _ in data.lengths], data.bin_tokens
    truncate = data.documents == "truncate"
    if data.max_documents != "auto":
        return dict.fromkeys(lengths, data.max_documents)
    if saved is None:
        return {length: default_max_documents(corpus, tokens, length, truncate) for length in lengths}
    if saved.max_documents is None:
        return {length: four_medians(corpus, tokens, length) for length in lengths}
    return saved.max_documents
