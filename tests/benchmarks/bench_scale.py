"""Data at scale: copies in a batch, repeated bin-mates, repeated reads, numbers of ranks, and how a run opens shards.

    python tests/benchmarks/bench_scale.py [--quick] [--json FILE]

Documents are made up in memory, and the shards that are opened are empty files of $TMPDIR. All figures but the CPU
seconds are counts of a deterministic order, so they do not depend on the machine.
"""

import pickle
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from support.report import read_arguments, write

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megabert.data.ranks import count_streams, possible_ranks
from megabert.data.shards.manifest import Manifest, Shard, TokenizerInfo, write_manifest
from megabert.data.shards.source import open_corpus
from tests.helpers.order_quality import (
    FIRST_ID,
    NumberedSource,
    config_of,
    copies_in_batch,
    copies_in_batches,
    mixture_of,
    reads_per_chunk,
    repeated_binmates,
)


def copies(num_streams: int) -> int:
    """Copies of a document of a source of 24 shards, at weight 0.1, in a global batch of one bin of each stream."""
    large = NumberedSource(num_streams, 4)
    small = NumberedSource(24, 100, first_id=FIRST_ID + large.num_documents)
    corpus = mixture_of(large, small, weights=(0.9, 0.1))
    numbers = range(small.first_id, small.first_id + small.num_documents)
    return copies_in_batch(corpus, config_of(corpus, num_streams, 8192), numbers, count=3)


def copies_few_chunks() -> int:
    """Copies of a document in the batches before a source of 4 or 5 chunks for each stream has been through."""
    source = NumberedSource(24, 10, documents=400)
    corpus = mixture_of(source)
    numbers = range(source.first_id, source.first_id + source.num_documents)
    config = config_of(corpus, 60, 8192)
    batches = source.tokens // (config.num_streams * config.bin_tokens)
    return copies_in_batches(corpus, config, numbers, batches)


def start(num_shards: int, chunks: int) -> tuple[float, float]:
    """Open a folder of many shards as rank 0 does. Returns its CPU seconds, and the bytes that each rank gets."""
    with tempfile.TemporaryDirectory() as name:
        write_empty_shards(Path(name), num_shards, chunks)
        began = time.process_time()
        corpus = open_corpus([(name, 1.0)])
        held_out = corpus.held_out()
        return time.process_time() - began, len(pickle.dumps((corpus, held_out)))


def write_empty_shards(folder: Path, num_shards: int, chunks: int) -> None:
    """Write a manifest of shards, and files of their sizes without content."""
    rows = np.tile([[0, 262_656, 500, 131_072, 7]], (num_shards * chunks, 1))
    rows[:, 0] = np.tile(np.arange(chunks) * 262_656, num_shards)
    shards = [
        Shard(f"train-{n:06d}.tar", f"{n:064x}", 262_656 * chunks, 500 * chunks, 131_072 * chunks, part)
        for n, part in enumerate(np.split(rows, num_shards))
    ]
    held_out = replace(shards[0], name="heldout-000000.tar")
    special = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    tokenizer = TokenizerInfo("f" * 64, 32_768, special, tuple(special.values()))
    parts = {"train": tuple(shards), "heldout": (held_out,)}
    write_manifest(folder, Manifest("tokens", parts, {"median_document_tokens": 200}, tokenizer))
    for shard in (*shards, held_out):
        with open(folder / shard.name, "wb") as file:
            file.truncate(shard.bytes)


def main() -> None:
    arguments = read_arguments(__doc__ or "")
    source = NumberedSource(24, 20)
    corpus = mixture_of(source)
    config = config_of(corpus, 8, 1024)
    figures: dict[str, float] = {
        "copies_in_batch": copies(192 if arguments.quick else 1024),
        "copies_few_chunks": copies_few_chunks(),
        "repeated_binmates": repeated_binmates(corpus, config, source.num_documents),
        "reads_per_chunk": reads_per_chunk(corpus, config, 2 * source.tokens),
        "reads_per_chunk_few_chunks": reads_per_chunk(corpus, config_of(corpus, 240, 1024), 2 * source.tokens),
        "ranks_allowed": len(possible_ranks(count_streams([48, 56, 64], 2))),
    }
    thousands = 1 if arguments.quick else 100
    opened = start(1000 * thousands, 100)
    figures |= {f"open_s_{thousands}k_shards": opened[0], "start_bytes_per_rank": opened[1]}
    for name, value in figures.items():
        print(f"{name:32} {value:,.4g}")
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
