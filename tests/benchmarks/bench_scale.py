"""The order of documents at scale: copies in a batch, repeated bin-mates, reads in vain, and numbers of ranks.

    python tests/benchmarks/bench_scale.py [--quick] [--json FILE]

Documents are made up in memory. All figures are counts of a deterministic order, so they do not depend on the machine.
"""

import sys
from pathlib import Path

from support.report import read_arguments, write

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megabert.data.ranks import count_streams, possible_ranks
from tests.helpers.order_quality import (
    FIRST_ID,
    NumberedSource,
    config_of,
    copies_in_batch,
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


def main() -> None:
    arguments = read_arguments(__doc__ or "")
    source = NumberedSource(24, 20)
    corpus = mixture_of(source)
    config = config_of(corpus, 8, 1024)
    figures: dict[str, float] = {
        "copies_in_batch": copies(192 if arguments.quick else 1024),
        "repeated_binmates": repeated_binmates(corpus, config, source.num_documents),
        "reads_per_chunk": reads_per_chunk(corpus, config, 2 * source.tokens),
        "reads_per_chunk_few_chunks": reads_per_chunk(corpus, config_of(corpus, 240, 1024), 2 * source.tokens),
        "ranks_allowed": len(possible_ranks(count_streams([48, 56, 64], 2))),
    }
    for name, value in figures.items():
        print(f"{name:32} {value:,.4g}")
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
