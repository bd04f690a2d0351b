"""Token shards for benchmarks: lengths of web text, or generated sentences with a tokenizer and a held-out part."""

import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np

from data_prep import train_tokenizer, write_shards
from megabert.data.shards.manifest import TOKEN_COUNTS, Manifest, Shard, TokenizerInfo, write_manifest
from megabert.data.shards.sample_format import MAX_CHUNK_TOKENS, SPECIAL_TOKENS, TokenChunk, encode_tokens, write_sample

VOCAB = 30_522
# Of the logarithm of a document's tokens.
MEAN, SIGMA = 5.5, 1.0


def chunk_lengths(rng: np.random.Generator) -> np.ndarray:
    lengths = np.maximum(1, rng.lognormal(MEAN, SIGMA, 1000)).astype(np.int32)
    return lengths[lengths.cumsum() <= MAX_CHUNK_TOKENS]


def write_token_shards(folder: Path, num_shards: int, shard_tokens: int) -> None:
    """Write a folder of shards in the format of data_prep/write_shards.py."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shards, counts = [], np.zeros(VOCAB, dtype=np.int64)
    for number in range(num_shards):
        name, buffer, chunks, documents = f"train-{number:05d}.tar", io.BytesIO(), [], 0
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            while sum(chunk[3] for chunk in chunks) < shard_tokens:
                lengths = chunk_lengths(rng)
                tokens = rng.integers(len(SPECIAL_TOKENS), VOCAB, lengths.sum()).astype(np.uint16)
                counts += np.bincount(tokens, minlength=VOCAB)
                begin = tar.offset
                write_sample(tar, f"train-{number:05d}-{len(chunks):05d}", encode_tokens(TokenChunk(tokens, lengths)))
                checksum = zlib.crc32(buffer.getbuffer()[begin : tar.offset])
                chunks.append([begin, tar.offset - begin, len(lengths), len(tokens), checksum])
                documents += len(lengths)
        data = buffer.getvalue()
        (folder / name).write_bytes(data)
        size = sum(chunk[3] for chunk in chunks)
        shards.append(Shard(name, hashlib.sha256(data).hexdigest(), len(data), documents, size, np.array(chunks)))
    np.save(folder / TOKEN_COUNTS, counts)
    special_ids = {name: number for number, name in enumerate(SPECIAL_TOKENS)}
    tokenizer = TokenizerInfo("0" * 64, VOCAB, special_ids, tuple(special_ids.values()))
    statistics = {"documents": sum(shard.documents for shard in shards), "median_document_tokens": round(np.exp(MEAN))}
    write_manifest(folder, Manifest("tokens", {"train": tuple(shards)}, statistics, tokenizer))


def write_text_shards(folder: Path, texts: int = 600, chunk_tokens: int = 2048) -> Path:
    """Write shards of random sentences, with a tokenizer and a held-out part, for a run to train on.

    Returns the folder of the shards. This runs in a process of its own, because data_prep's workers import everything
    that the main program imports.
    """
    subprocess.run([sys.executable, __file__, str(folder), str(texts), str(chunk_tokens)], check=True)
    return folder / "tokens"


def _write_text_shards(folder: Path, num_texts: int, chunk_tokens: int) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(400)]
    texts = [" ".join(rng.choices(words, k=rng.randint(20, 120))) for _ in range(num_texts)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source, tokenizer, tokens = (folder / name for name in ("corpus.jsonl", "tokenizer", "tokens"))
    train_tokenizer.main([f"--source={source}", f"--out={tokenizer}", "--vocab_size=400"])
    write_shards.main(
        [
            f"--source={source}",
            f"--tokenizer={tokenizer}",
            f"--out={tokens}",
            "--heldout=0.1",
            f"--chunk_tokens={chunk_tokens}",
        ]
    )


if __name__ == "__main__":
    _write_text_shards(Path(sys.argv[1]), *map(int, sys.argv[2:]))
