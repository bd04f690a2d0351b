"""Speed of the data path compared with other loaders: shards, tokenizing during training, resuming, and memory.

    python tests/benchmarks/bench_data.py [--quick] [--json FILE]

Documents have lengths lognormal(5.5, 1.0) as web text has; T is 65,536 and max_seq_len 512. Rates count real tokens:
specials but no padding or filler. The loaders take turns in one run, and the median of the rounds' ratios is printed.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import torch
from support import peers, preparing
from support.corpus import VOCAB, write_token_shards
from support.report import read_arguments, write

from data_prep import train_tokenizer, write_shards
from megabert.data.batch_schedule import Length, MaskingRate, make_schedule
from megabert.data.bin_shape import default_max_documents
from megabert.data.masking import masked_count
from megabert.data.order import cut_into_splits
from megabert.data.packing import SPECIALS_PER_PIECE, cut
from megabert.data.shards.source import Corpus, open_corpus
from megabert.data.stream import (
    BatchStream,
    Position,
    StreamConfig,
    open_loader,
    positions_to_json,
)

T, CAP = 65_536, 512
# One rank's tokens in an hour at 200,000 tokens/s, a good rate for the base model on an A100.
HOUR_TOKENS = 720_000_000


def config_of(corpus: Corpus, cap: int = CAP, bin_tokens: int = T, num_streams: int = 24) -> StreamConfig:
    return StreamConfig(
        bin_tokens=bin_tokens,
        schedule=make_schedule(1_000_000, num_streams, [Length(cap, 1.0)]),
        max_documents={cap: default_max_documents(corpus, bin_tokens, cap, False)},
        max_masked=masked_count(bin_tokens, 0.3),
        masking=MaskingRate.constant(0.3),
        truncate=False,
        seed=17,
        num_streams=num_streams,
    )


def stream(
    corpus: Corpus, config: StreamConfig, positions: dict[int, Position] | None = None, first: int = 0
) -> BatchStream:
    return BatchStream(corpus, config, rank=0, world_size=1, positions=positions or {}, first_index=first)


def counted(batches: Iterator) -> Iterator[int]:
    return (batch.num_tokens for batch, _, _ in batches)


def rate(tokens: Iterator[int], seconds: float) -> float:
    """Measure tokens per second over about `seconds` seconds, from one batch to another."""
    next(tokens)
    began, total = time.perf_counter(), 0
    while (taken := time.perf_counter() - began) < seconds:
        total += next(tokens)
    return total / taken


def fill(corpus: Corpus, cap: int) -> float:
    """Measure real tokens per slot at T = 16 x cap, over 480 bins."""
    config = config_of(corpus, cap, 16 * cap)
    return sum(islice(counted(iter(stream(corpus, config))), 480)) / (480 * 16 * cap)


def compare_loaders(corpus: Corpus, folder: Path, rounds: int, seconds: float) -> dict[str, float]:
    """Measure our loader on one core, and our loader and the other ones in one worker each, in turn."""
    source = corpus.sources[0]
    chunks = [source.read_chunk(n, c) for n, shard in enumerate(source.shards) for c in range(len(shard.chunks))]
    pieces = [piece for chunk in chunks[:16] for piece in framed(*chunk)]
    config = config_of(corpus)
    alone = counted(iter(stream(corpus, config)))
    # Fills every stream's packing buffer.
    sum(islice(alone, 48))
    loaders = {
        "ours": counted(iter(open_loader(stream(corpus, config), 1))),
        "memory_mapped": peers.packed_tokens(peers.MemoryMapped(pieces, VOCAB, T, folder / "tokens.bin")),
        "greedy": peers.packed_tokens(peers.Greedy(pieces, VOCAB, T)),
        "datasets": peers.real_tokens(peers.huggingface_loader(pieces, VOCAB, folder / "arrow")),
        "mosaicml_streaming": peers.real_tokens(peers.streaming_loader(pieces, VOCAB, folder / "mds")),
    }
    loaders["streaming_greedy"] = peers.packed_tokens(peers.GreedyStreaming(folder / "mds", VOCAB, T))
    for tokens in loaders.values():
        sum(islice(tokens, 48))
    rates: dict[str, list[float]] = {name: [] for name in ("alone", *loaders)}
    for _ in range(rounds):
        rates["alone"].append(rate(alone, seconds))
        for name, tokens in loaders.items():
            # Until the queues of the other loaders are full and their workers sleep.
            time.sleep(0.5)
            rates[name].append(rate(tokens, seconds))
    for name, values in rates.items():
        print(f"  {name:20} {statistics.median(values) / 1e6:8.2f} M tokens/s")
    return {"loader_tokens_per_s_core": statistics.median(rates["alone"])} | {
        f"loader_vs_{name}": statistics.median(a / b for a, b in zip(rates["ours"], rates[name], strict=True))
        for name in loaders
        if name != "ours"
    }


def framed(tokens: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Return the pieces of a chunk, with [CLS] and [SEP], as samples for the other loaders."""
    pieces = cut(lengths, CAP, truncate=False)
    begins = lengths.cumsum() - lengths
    starts = (begins[pieces.document] + pieces.start).tolist()
    parts = zip(starts, pieces.size.tolist(), strict=True)
    return [np.concatenate([[2], tokens[a : a + n], [3]]).astype(np.int64) for a, n in parts]


def on_the_fly(jsonl: Path, tokenizer: Path, folder: Path, rounds: int, seconds: float) -> float:
    """Compare one worker on text shards with the bare tokenizer on the same text and one core."""
    text = folder / "text"
    write_shards.main([f"--source={jsonl}", f"--out={text}"])
    corpus = open_corpus([(str(text), 1.0)], tokenizer=str(tokenizer))
    source = corpus.sources[0]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    bare = counted_bare(source)
    config = config_of(corpus, bin_tokens=16_384, num_streams=2)
    ours = text_tokens(iter(open_loader(stream(corpus, config), 1)))
    sum(islice(ours, 64))
    ratios = []
    for _ in range(rounds):
        mine = rate(ours, seconds)
        theirs = rate(bare, seconds)
        ratios.append(mine / theirs)
        time.sleep(0.2)
    print(f"  text on the fly {mine / 1e6:.2f} M tokens/s, the bare tokenizer {theirs / 1e6:.2f} M")
    return statistics.median(ratios)


def text_tokens(batches: Iterator) -> Iterator[int]:
    """Yield the tokens of each batch without specials, which the bare tokenizer does not add."""
    for batch, _, _ in batches:
        pieces = int((batch.cu_seqlens.diff() > 0).sum())
        yield batch.num_tokens - SPECIALS_PER_PIECE * pieces


def counted_bare(source) -> Iterator[int]:
    """Yield the tokens that encode_batch_fast makes of one chunk's documents after another."""
    from megabert.data.shards.sample_format import decode_text, read_sample

    chunks = []
    for shard in source.shards[:8]:
        data = Path(source.storage.url(shard.name)).read_bytes()
        chunks += [decode_text(read_sample(data[a : a + n], "x"), "x") for a, n in shard.chunks[:, :2].tolist()]
    encoder = source.encoder
    while True:
        for texts in chunks:
            yield sum(len(encoding) for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False))


RESUME = """
import json, sys, time
from megabert.data.shards.source import open_corpus
from megabert.data.stream import open_loader, positions_from_json
sys.path[:0] = [sys.argv[1]]
from bench_data import config_of, stream
raw = json.load(open(sys.argv[3]))
corpus = open_corpus([(sys.argv[2], 1.0)])
positions = positions_from_json(raw["positions"], sys.argv[3])
batches = iter(open_loader(stream(corpus, config_of(corpus), positions, raw["index"]), 2))
batch, _, _ = next(batches)
print(batch.index, time.time())
"""


def resume_seconds(corpus: Corpus, folder: Path, epochs: int, repeats: int) -> float:
    """Measure the seconds from the start of a process to its first batch, resumed after `epochs` passes."""
    batches = iter(stream(corpus, config_of(corpus)))
    positions: dict[int, Position] = {}
    index = 0
    wanted = epochs * len(cut_into_splits(corpus.sources[0], 24)) // 24
    while len(positions) < 24 or min(p.sources[0].entry for p in positions.values()) < wanted or index % 24:
        batch, number, position = next(batches)
        positions[number] = position
        index = batch.index + 1
    file = folder / f"positions-{epochs}.json"
    file.write_text(json.dumps({"index": index, "positions": positions_to_json(positions)}))
    taken = []
    for _ in range(repeats):
        began = time.time()
        command = [sys.executable, "-c", RESUME, str(Path(__file__).parent), corpus.sources[0].folder, str(file)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
        number, ready = done.stdout.split()
        assert int(number) == index, "it resumed at another bin"
        taken.append(float(ready) - began)
    largest = max(len(json.dumps(position.to_json())) for position in positions.values())
    seconds = statistics.median(taken)
    print(f"  after {epochs} epochs ({index:,} bins): {seconds:.2f} s; the largest position has {largest} bytes")
    return seconds


def worker_memory(corpus: Corpus, tokens: int) -> float:
    """Measure the peak resident memory of a worker with all streams over `tokens` tokens, and print its growth."""
    loader = iter(open_loader(stream(corpus, config_of(corpus)), 1))
    [worker] = psutil.Process().children()
    resident, seen = [], 0
    for number, (batch, _, _) in enumerate(loader):
        seen += batch.num_tokens
        if number % 100 == 0:
            resident.append(worker.memory_info().rss / 1e6)
        if seen >= tokens:
            break
    quarter = len(resident) // 4
    early, late = statistics.mean(resident[quarter : 2 * quarter]), statistics.mean(resident[-quarter:])
    print(f"  peak {max(resident):.0f} MB, grows by {late - early:+.1f} MB in the last half of {seen:,} tokens")
    return max(resident)


def main() -> None:
    arguments = read_arguments(__doc__ or "")
    torch.set_num_threads(1)
    rounds, seconds = (3, 0.7) if arguments.quick else (9, 2.0)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_token_shards(folder / "tokens", 50, 400_000)
        corpus = open_corpus([(str(folder / "tokens"), 1.0)])
        print("memory of a worker", flush=True)
        figures["worker_rss_mb"] = worker_memory(corpus, HOUR_TOKENS // (20 if arguments.quick else 1))
        print("loading, T = 65,536, cap 512", flush=True)
        figures |= compare_loaders(corpus, folder, rounds, seconds)
        print("resuming", flush=True)
        figures["resume_first_batch_s"] = resume_seconds(corpus, folder, 3, 3 if arguments.quick else 5)
        if not arguments.quick:
            resume_seconds(corpus, folder, 30, 5)
        for cap in (128, 512, 1024):
            figures[f"fill_{cap}"] = fill(corpus, cap)
        print("tokenizing while training", flush=True)
        jsonl, tokenizer = folder / "corpus.jsonl", folder / "tokenizer"
        preparing.write_corpus(jsonl, preparing.QUICK_BYTES if arguments.quick else preparing.FULL_BYTES)
        train_tokenizer.main([f"--source={jsonl}", f"--out={tokenizer}", "--sample_bytes=3000000"])
        figures["on_the_fly_vs_bare_tokenizer"] = on_the_fly(jsonl, tokenizer, folder, rounds, seconds)
        print("preparing shards", flush=True)
        figures |= preparing.measure(jsonl, tokenizer, folder, arguments.quick)
    for name, value in figures.items():
        print(f"{name:32} {value:,.4g}")
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
