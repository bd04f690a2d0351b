"""Open the corpora of a run, and choose the shape of its bins by them."""

from pathlib import Path

from megabert.config.data_section import DataConfig
from megabert.data.bin_shape import default_max_documents, four_medians
from megabert.data.shards.cache import CacheOptions
from megabert.data.shards.source import Corpus, check_same_tokenizer, open_corpus
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
    return corpus, held_out


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
