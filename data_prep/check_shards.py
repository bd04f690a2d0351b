"""Check shards against their manifest: every byte's hash, every chunk's documents and tokens, every id's range.

    python data_prep/check_shards.py data/quickstart/tokens

Prints what is wrong with shard and byte, one per line. Exit code 0 if nothing is, 1 otherwise.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megabert import flags
from megabert.data.manifest import Chunk, Manifest, Shard, read_manifest
from megabert.data.sample_format import decode_text, decode_tokens, read_sample


@dataclass(frozen=True)
class Options:
    folder: str
    """folder with a manifest.json"""


def problems_of_chunk(data: bytes, chunk: Chunk, manifest: Manifest, where: str) -> Iterator[str]:
    """data: the chunk's bytes. Yields what is wrong with it."""
    try:
        sample = read_sample(data, where)
        if manifest.tokenizer is None:
            texts = decode_text(sample, where)
            found = len(texts), sum(map(len, texts))
        else:
            tokens, lengths = decode_tokens(sample, where)
            found = len(lengths), len(tokens)
            if len(tokens) and tokens.max() >= manifest.tokenizer.vocab_size:
                yield f"{where}: holds id {tokens.max()}, but the vocabulary has {manifest.tokenizer.vocab_size}"
    except ValueError as mistake:
        yield str(mistake)
        return
    if found != (chunk.documents, chunk.tokens):
        yield f"{where}: {found[0]} documents of {found[1]} tokens, the manifest says {chunk.documents} of {chunk.tokens}"


def problems_of_shard(path: Path, shard: Shard, manifest: Manifest) -> Iterator[str]:
    """Yields what is wrong with one shard; chunks are looked at only where the hash says that something is."""
    if not path.is_file():
        yield f"{path}: missing"
        return
    data = path.read_bytes()
    if len(data) != shard.bytes:
        yield f"{path}: {len(data)} bytes, the manifest says {shard.bytes}"
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        yield f"{path}: its hash is not the manifest's"
    for number in range(len(shard.chunks)):
        chunk = shard.chunk(number)
        where = f"{path} chunk {number} (byte {chunk.offset})"
        yield from problems_of_chunk(data[chunk.offset : chunk.offset + chunk.size], chunk, manifest, where)
    documents, tokens = shard.chunks[:, 2:4].sum(axis=0).tolist()
    if manifest.tokenizer and tokens != shard.tokens:
        yield f"{path}: its chunks have {tokens} tokens, the manifest says {shard.tokens} ({documents} documents)"


def main(argv: list[str] | None = None) -> int:
    options = flags.read_flags(Options, "check_shards.py", __doc__ or "", argv)
    folder = Path(options.folder)
    manifest = read_manifest(folder)
    shards = [shard for part in manifest.splits.values() for shard in part]
    found = 0
    for shard in tqdm(shards, unit="shard", disable=None):
        for problem in problems_of_shard(folder / shard.name, shard, manifest):
            print(problem)
            found += 1
    print(f"{folder}: {len(shards)} shards, {manifest.statistics['documents']:,} documents, {found} problems")
    return 1 if found else 0


if __name__ == "__main__":
    flags.run(main, sys.argv[0])
